"""What do a fake job and its results look like to the core?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import cast

from embedcore.errors import (
    InputNotReady,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    RemoteGone,
    RequestRejected,
)
from embedcore.provider.batchstates import batch_state
from embedcore.provider.types import BatchOutcome, BatchState, BatchStatus
from embedcore.testing.api import ApiError
from embedcore.testing.batchlines import LineError
from embedcore.testing.batchoutput import Failure, OutputContent, Result, model_of
from embedcore.testing.batchsettings import NOT_READY
from embedcore.testing.vectors import vectors_of

_CUSTOM_ID = re.compile(rb'\{"custom_id": ("(?:[^"\\]|\\.)*")')


def status_of(
    job: Mapping[str, object], errors: Sequence[LineError] = (), ids: Sequence[str] = ()
) -> BatchStatus:
    """A batch object in the core's words. ``ids``: those of the input's lines, in their order."""
    state = state_of(job["status"])
    counts, usage = job.get("request_counts"), job.get("usage")
    numbers = counts if isinstance(counts, dict) else {}
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    full = [error for error in errors if error.code == "token_limit_exceeded"]
    limit = re.search(r"Limit: ([\d,]+)", full[0].message) if full else None
    places = {error: (error.line or 0) - 1 for error in errors}
    return BatchStatus(
        state=state,
        detail=str(job["status"]),
        completed=numbers.get("completed"),
        failed=numbers.get("failed"),
        total=numbers.get("total"),
        tokens=tokens if state != "running" and tokens else None,
        errors={
            ids[place] if 0 <= place < len(ids) else "": error.message
            for error, place in places.items()
        },
        queue_full=bool(full) and len(full) == len(errors),
        queue_limit=int(limit[1].replace(",", "")) if limit else None,
    )


def custom_id_of(line: bytes) -> str:
    """The id that a line of an input file begins with; "" if it does not."""
    found = _CUSTOM_ID.match(line)
    return str(json.loads(found[1])) if found else ""


def embedded(results: Sequence[Result], content: OutputContent) -> Iterator[BatchOutcome]:
    for kind, group in groupby(results, content.kind):
        rows = list(group)
        if kind is None:
            yield from (_failed(row, _id_of(row, content)) for row in rows)
            continue
        width, salt, _ = kind
        vectors = vectors_of([row.line.texts[0] for row in rows], width, salt=salt)
        for row, vector in zip(rows, vectors, strict=True):
            yield BatchOutcome(
                id=_id_of(row, content),
                vector=vector,
                tokens=row.line.tokens if content.quirks.line_usage else None,
                model=model_of(row, content.quirks),
            )


def _id_of(result: Result, content: OutputContent) -> str:
    if content.quirks.numeric_ids:
        return str(result.line.number - 1)
    return result.custom_id or ""


def _failed(result: Result, item: str) -> BatchOutcome:
    failure = result.failure or Failure()
    status = failure.status if failure.http else None
    return BatchOutcome(
        id=item,
        error=failure.message,
        code=failure.code or (str(status) if status else None),
        retryable=status is None or status in (408, 409, 429) or status >= 500,
        ran=failure.code not in ("batch_expired", "batch_cancelled"),
    )


def translated(error: ApiError) -> ProviderError:
    # Of a create it says that there is no input, and so no job either; but there was one.
    if error.error["param"] == "input_file_id" and (
        error.status == 404 or error.error["code"] == NOT_READY
    ):
        return InputNotReady(str(error), status=error.status)
    if error.status == 404:
        return RemoteGone(str(error), status=404)
    if error.status == 429:
        return RateLimited(str(error), status=429)
    if error.status >= 500:
        return ProviderUnavailable(str(error), status=error.status, billed="no")
    return RequestRejected(str(error), status=error.status, billed="no")


def state_of(status: object) -> BatchState:
    return batch_state(str(status))


def moment_of(seconds: object) -> datetime:
    return datetime.fromtimestamp(cast(float, seconds), UTC)
