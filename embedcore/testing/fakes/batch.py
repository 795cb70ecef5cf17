"""A fake batch strategy whose every call can be made to fail.

::

    batch.faults.push("create", "after")                   # done; the caller sees OutcomeUnknown
    batch.faults.push("create", "late", requests=2)        # done before the third further call
    batch.faults.push("upload", "before", crash=True)      # the process dies, nothing was sent
    batch.faults.push("results", "before", at=3)           # cut off after three outcomes

::

    embedder = batch_embedder(settings=BatchSettings(progress=Progress()))
    embedder.batch.faults.push("create", "late", crash=True)
    embedder.batch.service.finish(...)
    assert not embedder.batch.service.meter.billed_twice
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, cast, get_args

from embedcore.errors import (
    InputNotReady,
    InvalidResponse,
    OutcomeUnknown,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    RemoteGone,
    RequestRejected,
    TransientProviderError,
)
from embedcore.provider.batchstates import batch_state
from embedcore.provider.types import (
    BatchItem,
    BatchLimits,
    BatchOutcome,
    BatchState,
    BatchStatus,
    FoundJob,
    ModelInfo,
)
from embedcore.testing.fakes.embedder import FAKE_INFO, FakeEmbedder
from embedcore.testing.openai.batch_lines import Failure, LineError, OutputContent, Result, model_of
from embedcore.testing.openai.batch_settings import NOT_READY, BatchSettings
from embedcore.testing.openai.batches import BatchService
from embedcore.testing.openai.embeddings import ApiError, FakeModel
from embedcore.testing.vectors import tokens_of, vectors_of

if TYPE_CHECKING:
    from embedcore.testing.openai.batch_jobs import Job


Method: TypeAlias = Literal[
    "upload", "create", "find", "discard", "orphans", "poll", "results", "cancel"
]
Effect: TypeAlias = Literal["before", "after", "late"]

METHODS: tuple[str, ...] = get_args(Method)
EFFECTS: tuple[str, ...] = get_args(Effect)


class Crashed(BaseException):
    """The process died here. Nothing may catch it but the test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFault:
    """One call that fails: ``effect`` says when its work is done, ``error`` what is raised.

    ``requests`` and ``seconds``: when a late effect lands, by the calls and the time that pass;
    with neither, when the service is told to ``land``. ``at``: outcomes of ``results`` that are
    given before it strikes.
    """

    effect: Effect = "before"
    error: BaseException | None = None
    crash: bool = False
    requests: int | None = None
    seconds: float | None = None
    at: int = 0

    def raised(self) -> BaseException:
        if self.error is not None:
            return self.error
        if self.crash:
            return Crashed(f"crashed, with the effect {self.effect}")
        if self.effect == "before":
            return ProviderUnavailable("the connection was refused", billed="no")
        return OutcomeUnknown("the answer was lost")


class CallFaults:
    """The script of a fake strategy: the next calls of each method. Callable from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: defaultdict[str, deque[CallFault]] = defaultdict(deque)

    def push(
        self,
        method: Method,
        effect: Effect = "before",
        *,
        error: BaseException | None = None,
        crash: bool = False,
        requests: int | None = None,
        seconds: float | None = None,
        at: int = 0,
        times: int = 1,
    ) -> None:
        """The next ``times`` calls of this method that have no fault yet."""
        if method not in METHODS or effect not in EFFECTS:
            raise ValueError(f"no fault {effect!r} of {method!r}; {METHODS}, {EFFECTS}")
        fault = CallFault(
            effect=effect, error=error, crash=crash, requests=requests, seconds=seconds, at=at
        )
        with self._lock:
            self._next[method].extend([fault] * times)

    def clear(self) -> None:
        with self._lock:
            self._next.clear()

    @property
    def pending(self) -> int:
        """Faults that no call has met yet."""
        with self._lock:
            return sum(map(len, self._next.values()))

    def take(self, method: Method) -> CallFault | None:
        with self._lock:
            waiting = self._next.get(method)
            return waiting.popleft() if waiting else None


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


Returned = TypeVar("Returned")

KEY = "embedcore_job"
PREFIX = "embedcore-"
LIMITS = BatchLimits(max_items=50_000, max_bytes=200_000_000, window=86400.0)
_PAGE = 100
_ROWS = 64


class FakeBatch:
    """A ``BatchStrategy`` over a ``BatchService``.

    ``model`` must be one of the service's. ``faults`` is the script of what goes wrong, ``calls``
    lists the methods that were called. A job is found by the key in its metadata or by its input.
    ``counts_rows``: fewer results than the service counts are ``InvalidResponse``; without it, that
    is left to who reads them.
    """

    def __init__(
        self,
        service: BatchService | None = None,
        *,
        model: str = FAKE_INFO.model,
        limits: BatchLimits = LIMITS,
        counts_rows: bool = False,
    ) -> None:
        self.counts_rows = counts_rows
        self.service = service or BatchService(models={model: _fake_model(FAKE_INFO)})
        self.limits = limits
        self.faults = CallFaults()
        self.calls: list[str] = []
        self._model = model
        self._lock = threading.Lock()

    def sizes(self, items: Sequence[BatchItem]) -> list[int]:
        return [len(self._line(item)) for item in items]

    def upload(self, items: Iterable[BatchItem], *, key: str) -> str:
        content = b"".join(map(self._line, items))
        name = f"{PREFIX}{key}.jsonl"
        return self._call("upload", lambda: str(self.service.upload(content, filename=name)["id"]))

    def create(self, input_ref: str, *, key: str) -> str:
        return self._call(
            "create", lambda: str(self.service.create(input_ref, metadata={KEY: key})["id"])
        )

    def find(self, *, key: str, input_ref: str, since: datetime) -> list[FoundJob]:
        def found() -> list[FoundJob]:
            return [
                FoundJob(
                    id=str(entry["id"]),
                    created_at=moment_of(entry["created_at"]),
                    state=state_of(entry["status"]),
                )
                for entry in reversed(self._listed(since))
                if _metadata(entry).get(KEY) == key or entry["input_file_id"] == input_ref
            ]

        return self._call("find", found)

    def discard(self, input_ref: str) -> None:
        def deleted() -> str:
            try:
                self.service.delete(input_ref)
            except ApiError as error:
                if error.status != 404:
                    raise
            return input_ref

        self._call("discard", deleted)

    def orphans(self, *, before: datetime) -> Iterator[str]:
        def found() -> list[str]:
            used = {job.input_file_id for job in self.service.jobs}
            page = self.service.files(purpose="batch")
            return [
                str(file["id"])
                for file in cast(list[dict[str, object]], page["data"])
                if str(file["filename"]).startswith(PREFIX)
                and file["id"] not in used
                and moment_of(file["created_at"]) < before
            ]

        return iter(self._call("orphans", found))

    def poll(self, job_id: str) -> BatchStatus:
        return self._call("poll", lambda: self._status(self.service.retrieve(job_id)))

    def results(self, job_id: str) -> Iterator[BatchOutcome]:
        fault = self._taken("results")
        self.service.refresh()
        if fault is not None and fault.at == 0:
            raise fault.raised()
        return self._outcomes(job_id, fault)

    def cancel(self, job_id: str) -> None:
        def cancelled() -> str:
            try:
                self.service.cancel(job_id)
            except ApiError as error:
                if error.status != 409:
                    raise
            return job_id

        self._call("cancel", cancelled)

    # Inside

    def _taken(self, method: Method) -> CallFault | None:
        with self._lock:
            self.calls.append(method)
        return self.faults.take(method)

    def _call(self, method: Method, work: Callable[[], Returned]) -> Returned:
        """Do the work, or what the script says of it instead; translates the API's errors."""
        fault = self._taken(method)
        if fault is None:
            return self._answer(work)
        if fault.effect == "after":
            try:
                work()
            except ApiError as error:
                # A refusal is an answer like any other: it is lost as well.
                raise fault.raised() from error
        elif fault.effect == "late":
            self.service.defer(lambda: str(work()), requests=fault.requests, seconds=fault.seconds)
        else:
            # Nothing was done, but the request may have taken its time.
            self.service.refresh()
        raise fault.raised()

    def _line(self, item: BatchItem) -> bytes:
        line = {
            "custom_id": item.id,
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": self._model, "input": item.text},
        }
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"

    def _listed(self, since: datetime) -> list[dict[str, object]]:
        """Every job created since then, newest first; raises if the list does not end."""
        # The API's moments are whole seconds.
        since = since.replace(microsecond=0)
        listed: dict[str, dict[str, object]] = {}
        after: str | None = None
        while True:
            page = self.service.batches(after=after, limit=_PAGE)
            data = cast(list[dict[str, object]], page["data"])
            fresh = [entry for entry in data if entry["id"] not in listed]
            listed.update((str(entry["id"]), entry) for entry in fresh)
            past = any(moment_of(entry["created_at"]) < since for entry in data)
            if past or not page["has_more"]:
                break
            if not fresh:
                raise TransientProviderError("the list of jobs does not go on", billed="no")
            after = str(data[-1]["id"])
        return [entry for entry in listed.values() if moment_of(entry["created_at"]) >= since]

    def _status(self, job: Mapping[str, object]) -> BatchStatus:
        errors = self.service.job(str(job["id"])).errors
        if not errors:
            return status_of(job)
        lines = self.service.input_lines(str(job["input_file_id"]))
        return status_of(job, errors, [custom_id_of(line) for line in lines])

    def _outcomes(self, job_id: str, fault: CallFault | None) -> Iterator[BatchOutcome]:
        for given, outcome in enumerate(self._all_outcomes(job_id)):
            if fault is not None and given >= fault.at:
                raise fault.raised()
            yield outcome
        if fault is not None:
            raise fault.raised()

    def _all_outcomes(self, job_id: str) -> Iterator[BatchOutcome]:
        job = self._answer(lambda: self.service.job(job_id))
        if not job.ended:
            raise ProviderUnavailable(f"{job.id} has not ended: it is {job.status}", billed="no")
        gone: RemoteGone | None = None
        given = 0
        for file in self._answer(lambda: self.service.result_files(job_id)):
            try:
                content = self._answer(partial(self.service.content, file))
            except RemoteGone as error:
                # What the other file says is worth having all the same.
                gone = error
                continue
            if isinstance(content, OutputContent):
                for outcome in self._read(content, job):
                    given += 1
                    yield outcome
            elif content.size:
                yield BatchOutcome(error="a line has no custom_id", billed="unknown")
        if gone is not None:
            raise gone
        if self.counts_rows and given < len(job.results):
            raise InvalidResponse(f"{job.id} has {given} rows of {len(job.results)}", billed="no")

    def _answer(self, work: Callable[[], Returned]) -> Returned:
        try:
            return work()
        except ApiError as error:
            raise translated(error) from error

    def _read(self, content: OutputContent, job: Job) -> Iterator[BatchOutcome]:
        results = content.results
        share = content.quirks.cut
        whole = results if share is None else results[: int(len(results) * share)]
        for first in range(0, len(whole), _ROWS):
            yield from embedded(whole[first : first + _ROWS], content)
        if share is not None:
            raise TransientProviderError(f"the results of {job.id} are cut off", billed="no")


class FakeBatchEmbedder(FakeEmbedder):
    """A ``FakeEmbedder`` that has a ``FakeBatch``."""

    batch: FakeBatch


def batch_embedder(
    *,
    service: BatchService | None = None,
    info: ModelInfo = FAKE_INFO,
    limits: BatchLimits = LIMITS,
    settings: BatchSettings | None = None,
    clock: Callable[[], float] = time.time,
    salt: str = "",
) -> FakeBatchEmbedder:
    """An embedder whose ``batch`` is a ``FakeBatch``.

    Both give a text one vector and one price in tokens. ``info`` holds the price in money.
    """
    overhead = info.overhead_tokens_per_text
    found = service or BatchService(
        models={info.model: _fake_model(info)},
        count=lambda texts: [tokens_of(text) + overhead for text in texts],
        salt=salt,
        settings=settings,
        clock=clock,
    )
    batch = FakeBatch(found, model=info.model, limits=limits)
    return FakeBatchEmbedder(info=info, salt=salt, batch=batch)


def _fake_model(info: ModelInfo) -> FakeModel:
    return FakeModel(dimensions=info.dimensions or 32)


def _metadata(entry: Mapping[str, object]) -> Mapping[str, object]:
    found = entry["metadata"]
    return found if isinstance(found, dict) else {}
