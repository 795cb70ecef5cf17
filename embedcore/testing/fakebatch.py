"""A batch strategy in this process, whose bill is known and whose every call can go wrong.

::

    embedder = batch_embedder(settings=BatchSettings(progress=Progress()))
    embedder.batch.faults.push("create", "late", crash=True)
    embedder.batch.service.finish(...)
    assert not embedder.batch.service.meter.billed_twice
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from embedcore.errors import RemoteGone, TransientProviderError
from embedcore.provider.types import (
    BatchItem,
    BatchLimits,
    BatchOutcome,
    BatchStatus,
    FoundJob,
    ModelInfo,
)
from embedcore.testing.api import ApiError, FakeModel
from embedcore.testing.batches import BatchService
from embedcore.testing.batchoutput import OutputContent
from embedcore.testing.batchsettings import BatchSettings
from embedcore.testing.callfaults import CallFault, CallFaults, Crashed as Crashed, Method
from embedcore.testing.fakeoutcomes import (
    custom_id_of,
    embedded,
    moment_of,
    state_of,
    status_of,
    translated,
)
from embedcore.testing.fakes import FAKE_INFO, FakeEmbedder
from embedcore.testing.vectors import tokens_of

if TYPE_CHECKING:
    from embedcore.testing.batchjobs import Job

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
    """

    def __init__(
        self,
        service: BatchService | None = None,
        *,
        model: str = FAKE_INFO.model,
        limits: BatchLimits = LIMITS,
    ) -> None:
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
            raise RuntimeError(f"the results of a job that has not ended: {job.status}")
        gone: RemoteGone | None = None
        for file in self._answer(lambda: self.service.result_files(job_id)):
            try:
                content = self._answer(partial(self.service.content, file))
            except RemoteGone as error:
                # What the other file says is worth having all the same.
                gone = error
                continue
            if isinstance(content, OutputContent):
                yield from self._read(content, job)
            elif content.size:
                yield BatchOutcome(error="a line has no custom_id", billed="unknown")
        if gone is not None:
            raise gone

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
