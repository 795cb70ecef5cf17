"""Jobs of the fake Batch API: states, lists, and jobs restored from a record.

``files``: each with id, filename, purpose, created_at, expires_at, gone and its content as text.
``jobs``: each with the fields of ``Job``; ``errors`` with those of ``LineError``; ``results`` say
of each line that was run its number, its custom_id and its ``failure`` (fields of ``Failure``, or
None). The lines themselves are read from the job's input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

from embedcore.errors import EmbeddingError
from embedcore.testing.meter import Meter
from embedcore.testing.openai.batch_files import FileStore, Stored, StoredFile
from embedcore.testing.openai.batch_lines import (
    Failure,
    FileReader,
    Line,
    LineError,
    OutputContent,
    Parsed,
    Result,
)
from embedcore.testing.openai.batch_settings import BatchSettings, Listing, Quirks
from embedcore.testing.openai.embeddings import ApiError, EmbeddingsApi

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
QUEUED = frozenset({"in_progress", "finalizing", "cancelling"})
EXPIRED = Failure(
    http=False,
    code="batch_expired",
    message="This request could not be executed before the completion window expired.",
)
_TIMES = (
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


@dataclass(kw_only=True)
class Job:
    """One job. ``results`` are the lines that were run, ``lines`` those of a valid input file."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    output_expires_after: int | None
    created_at: float
    times: dict[str, int]
    status: str = "validating"
    model: str | None = None
    errors: list[LineError] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    billed_tokens: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    polls: int = 0
    polls_when_cancelled: int = 0
    listings: int = 0
    looks: int = 0
    ended_at: float = 0.0
    gone: bool = False

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def tokens(self) -> int:
        """What all of its lines cost."""
        return sum(line.tokens for line in self.lines)

    @property
    def failed(self) -> int:
        return sum(result.failure is not None for result in self.results)

    def is_late(self, quirks: Quirks, now: float) -> bool:
        """Whether its results are not there yet, though it has ended. ``looks`` were in vain."""
        over = quirks.late_looks is not None and self.looks >= quirks.late_looks
        seconds = quirks.late_seconds
        return (
            self.ended
            and quirks.late is not None
            and not over
            and (seconds is None or now < self.ended_at + seconds)
        )

    def is_late_file(self, file_id: str | None, quirks: Quirks) -> bool:
        """Whether it is one of the files that are late."""
        files = {"output": [self.output_file_id], "error": [self.error_file_id]}
        both = [self.output_file_id, self.error_file_id]
        return file_id is not None and file_id in files.get(quirks.late_files, both)

    def described(self, quirks: Quirks, *, hidden: bool = False) -> dict[str, object]:
        """The batch object. ``hidden``: without the files that are late."""
        known = quirks.status_word is None or self.ended

        def shown(file_id: str | None) -> str | None:
            return None if hidden and self.is_late_file(file_id, quirks) else file_id

        found: dict[str, object] = {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": self._errors(),
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": quirks.words.get(self.status, self.status) if known else quirks.status_word,
            "output_file_id": shown(self.output_file_id),
            "error_file_id": shown(self.error_file_id),
            "created_at": int(self.created_at),
            **{name: self.times.get(name) for name in _TIMES},
            "request_counts": self._counts(quirks),
            "usage": self._usage(quirks),
            "metadata": self.metadata,
        }
        for name, setting in (("request_counts", quirks.counts), ("usage", quirks.usage)):
            if setting == "absent":
                del found[name]
        return found

    def _errors(self) -> dict[str, object] | None:
        if not self.errors:
            return None
        return {"object": "list", "data": [error.described() for error in self.errors]}

    def _counts(self, quirks: Quirks) -> dict[str, object]:
        if quirks.counts == "null":
            return {"total": len(self.lines), "completed": None, "failed": None}
        extra = {"wrong": 1, "few": -1}.get(quirks.counts, 0)
        completed = len(self.results) - self.failed
        return {
            "total": len(self.lines),
            "completed": max(completed + extra, 0),
            "failed": self.failed,
        }

    def _usage(self, quirks: Quirks) -> dict[str, object] | None:
        if quirks.usage == "null":
            return None
        tokens = self.billed_tokens if self.ended and quirks.usage == "honest" else 0
        return {
            "input_tokens": tokens,
            "output_tokens": 0,
            "total_tokens": tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }


@dataclass(kw_only=True, slots=True)
class LineRule:
    """Lines with the marker in a text fail, ``times`` over (None: always)."""

    marker: str
    failure: Failure
    times: int | None = None
    billed: bool = False

    def meets(self, line: Line) -> bool:
        return self.times != 0 and any(self.marker in text for text in line.texts)


class Runner:
    """Moves jobs on. Not locked: its owner is."""

    def __init__(
        self,
        *,
        api: EmbeddingsApi,
        files: FileStore,
        meter: Meter,
        settings: BatchSettings,
        clock: Callable[[], float],
    ) -> None:
        self.rules: list[LineRule] = []
        self._api = api
        self._files = files
        self._meter = meter
        self._settings = settings
        self._clock = clock

    def validate(self, job: Job, others: Iterable[Job]) -> None:
        """From validating to in_progress, or to failed."""
        file = self._files.once(job.input_file_id)
        kept = self._settings.accepts_deleted_input
        if file is None or (file.gone and not kept) or not isinstance(file.content, Stored):
            message = f"The input file {job.input_file_id} could not be found."
            return self.fail(job, [LineError(code="file_not_found", message=message)])
        parsed = self._read(job, file.content)
        job.model = parsed.model
        errors = parsed.errors or self._over_queue(parsed.tokens, parsed.model, others)
        if errors:
            return self.fail(job, errors)
        job.lines = parsed.lines
        return self._enter(job, "in_progress")

    def lines(self, job: Job, content: Stored) -> list[Line]:
        """The lines of a valid input file."""
        return self._read(job, content).lines

    @property
    def salt(self) -> str:
        """That of the vectors."""
        return self._api.salt

    def _read(self, job: Job, content: Stored) -> Parsed:
        reader = FileReader(self._api, self._settings.file_limits, endpoint=job.endpoint)
        return reader.read(content.lines(), content.size)

    def run(self, job: Job, upto: int) -> None:
        """Run and bill lines until ``upto`` of them were run."""
        for line in job.lines[len(job.results) : upto]:
            failure, billed = self._failure(line)
            job.results.append(
                Result(line=line, custom_id=line.custom_id, failure=failure, salt=self._api.salt)
            )
            if billed:
                self._meter.bill(line.texts, line.tokens)
                job.billed_tokens += line.tokens
            else:
                self._meter.reject()

    def finalize(self, job: Job) -> None:
        self._enter(job, "finalizing")

    def begin_cancel(self, job: Job) -> None:
        job.polls_when_cancelled = job.polls
        self._enter(job, "cancelling")

    def fail(self, job: Job, errors: Sequence[LineError]) -> None:
        job.errors = list(errors)
        self._enter(job, "failed")

    def end(self, job: Job, status: str) -> None:
        """To completed, expired or cancelled, with the files of what was run."""
        quirks = replace(self._settings.quirks)
        shown = list(_shown(job.results, quirks))
        good = [result for result in shown if result.failure is None]
        bad = [result for result in shown if result.failure is not None]
        if status == "expired":
            left = job.lines[len(job.results) :]
            bad += [Result(line=one, custom_id=one.custom_id, failure=EXPIRED) for one in left]
        if good and not quirks.no_output_file:
            job.output_file_id = self._output(job, "output", _ordered(good, quirks), quirks).id
        if bad or quirks.empty_error_file:
            plain = replace(quirks, cut=None)
            job.error_file_id = self._output(job, "error", _ordered(bad, quirks), plain).id
        self._enter(job, status)

    def _enter(self, job: Job, status: str) -> None:
        job.status = status
        job.times[f"{status}_at"] = int(self._clock())
        job.ended_at = self._clock()

    def _failure(self, line: Line) -> tuple[Failure | None, bool]:
        """What goes wrong with a line, and whether it costs its tokens."""
        if line.refused is not None:
            error = line.refused.error
            return Failure(
                status=line.refused.status,
                kind=str(error["type"]),
                code=error["code"],
                param=error["param"],
                message=str(error["message"]),
            ), False
        for rule in self.rules:
            if rule.meets(line):
                rule.times = None if rule.times is None else rule.times - 1
                return rule.failure, rule.billed
        return None, True

    def _over_queue(self, tokens: int, model: str | None, others: Iterable[Job]) -> list[LineError]:
        limit = self._settings.enqueued_token_limit
        queued = [job.tokens for job in others if job.status in QUEUED and job.model == model]
        if limit is None or tokens + sum(queued) <= limit:
            return []
        message = (
            f"Enqueued token limit reached for {model} in organization org-fake. Limit: {limit:,} "
            "enqueued tokens. Please try again once some in_progress batches have been completed."
        )
        return [LineError(code="token_limit_exceeded", message=message)]

    def _output(self, job: Job, kind: str, results: Sequence[Result], quirks: Quirks) -> StoredFile:
        return self._files.add(
            OutputContent(results, quirks),
            filename=f"{job.id}_{kind}.jsonl",
            purpose="batch_output",
            expires_after=job.output_expires_after,
        )


def _shown(results: Sequence[Result], quirks: Quirks) -> Iterator[Result]:
    """The results as the files have them, oddities included."""

    def marked(result: Result, marker: str | None) -> bool:
        return marker is not None and any(marker in text for text in result.line.texts)

    for result in results:
        if marked(result, quirks.missing):
            continue
        yield replace(result, custom_id=None) if marked(result, quirks.no_id) else result
        if marked(result, quirks.duplicate_equal):
            yield result
        if marked(result, quirks.duplicate_different):
            yield replace(result, salt=f"{result.salt}another")
    if quirks.unknown_id and results:
        yield replace(results[0], custom_id="nobody-sent-this")


def _ordered(results: list[Result], quirks: Quirks) -> list[Result]:
    if quirks.order == "input":
        return results
    if quirks.order == "reversed":
        return results[::-1]
    places = range(len(results))
    shuffled = sorted(places, key=lambda place: hashlib.blake2b(b"%d" % place).digest())
    # So few that the order happened to stay would hide what the order is for.
    order = shuffled if shuffled != list(places) else shuffled[::-1]
    return [results[place] for place in order]


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


Entry = TypeVar("Entry", Job, StoredFile)


def visible(jobs: Iterable[Job], listing: Listing, after: str | None, now: float) -> list[Job]:
    """The jobs a list knows of by now, newest first. A first page counts as one listing."""
    shown = []
    for job in jobs:
        there = job.listings >= listing.lag_listings
        if there and now - job.created_at >= listing.lag_seconds and not job.gone:
            shown.append(job)
        job.listings += after is None
    return shown[::-1]


def page(
    entries: Sequence[Entry],
    describe: Callable[[Entry], dict[str, object]],
    *,
    after: str | None,
    limit: int,
    has_more: bool | None = None,
) -> dict[str, object]:
    """``limit`` entries behind the one called ``after``; ``has_more`` overrides the truth."""
    start = 0
    if after is not None:
        places = [place for place, entry in enumerate(entries) if entry.id == after]
        if not places:
            raise ApiError(400, f"No entry found with id '{after}'.", param="after")
        start = places[0] + 1
    data = [describe(entry) for entry in entries[start : start + limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": start + limit < len(entries) if has_more is None else has_more,
    }


Effect: TypeAlias = Callable[[], str]


@dataclass(kw_only=True, slots=True)
class _Pending:
    effect: Effect
    requests: int | None
    at: float | None


class Landings:
    """Effects that happen late. Not locked: its owner is.

    ``pending``: those to come. ``landed`` says what came of each other: what the effect returned,
    or the refusal it met.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.landed: list[str] = []
        self._clock = clock
        self.pending: list[_Pending] = []
        self._busy = False

    def defer(self, effect: Effect, *, requests: int | None, seconds: float | None) -> None:
        at = None if seconds is None else self._clock() + seconds
        self.pending.append(_Pending(effect=effect, requests=requests, at=at))

    def tick(self) -> None:
        """Another request arrives: what is due by now happens before it."""
        if self._busy:
            return
        now = self._clock()
        due = []
        for each in self.pending:
            if each.requests == 0 or (each.at is not None and each.at <= now):
                due.append(each)
            elif each.requests is not None:
                each.requests -= 1
        self._land(due)

    def land(self) -> int:
        """Everything happens now. How many there were."""
        due = list(self.pending)
        self._land(due)
        return len(due)

    def _land(self, due: list[_Pending]) -> None:
        self.pending = [each for each in self.pending if each not in due]
        self._busy = True
        try:
            for each in due:
                try:
                    self.landed.append(each.effect())
                except (ApiError, EmbeddingError) as error:
                    self.landed.append(str(error))
        finally:
            self._busy = False
