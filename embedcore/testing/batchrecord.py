"""Jobs and files that were there before: put into a fake Batch API from what was written down.

``files``: each with id, filename, purpose, created_at, expires_at, gone and its content as text.
``jobs``: each with the fields of ``Job``; ``errors`` with those of ``LineError``; ``results`` say
of each line that was run its number, its custom_id and its ``failure`` (fields of ``Failure``, or
None). The lines themselves are read from the job's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from embedcore.testing.batchfiles import Stored, StoredFile
from embedcore.testing.batchjobs import Job
from embedcore.testing.batchlines import Line, LineError
from embedcore.testing.batchoutput import Failure, Result

ReadLines = Callable[[Job, Stored], list[Line]]


def stored_file(record: Mapping[str, Any]) -> StoredFile:
    """A file of the record."""
    return StoredFile(**{**record, "content": Stored(record["content"].encode())})


def recorded_job(
    record: Mapping[str, Any], input_file: StoredFile | None, read_lines: ReadLines, *, salt: str
) -> Job:
    """A job of the record, as far as it was."""
    plain = {name: value for name, value in record.items() if name != "results"}
    job = Job(**{**plain, "errors": [LineError(**one) for one in record["errors"]]})
    # One that was never begun is yet to be read, and may be refused then.
    if input_file is not None and "in_progress_at" in job.times:
        assert isinstance(input_file.content, Stored)
        job.lines = read_lines(job, input_file.content)
    by_number = {line.number: line for line in job.lines}
    job.results = [
        Result(
            line=by_number[one["line"]],
            custom_id=one["custom_id"],
            failure=None if one["failure"] is None else Failure(**one["failure"]),
            salt=salt,
        )
        for one in record["results"]
    ]
    return job
