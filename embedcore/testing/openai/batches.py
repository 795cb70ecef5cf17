"""The fake Batch API without HTTP: files, jobs, progress, bill.

::

    service = BatchService(settings=BatchSettings(progress=Progress()))   # moves only by hand
    file = service.upload(b'{"custom_id": "0", ...}')
    job = service.create(file["id"], metadata={"mine": "1"})
    service.finish(job["id"], done=1)
    b"".join(service.content(service.retrieve(job["id"])["output_file_id"]).blocks())
    assert service.meter.billed_texts == ...

Behaves as OpenAI's published description, its recordings and its guide say as of November 2026.
Everything under ``settings`` may be changed at any time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from embedcore.testing.meter import Meter
from embedcore.testing.openai import batch_jobs as batchpages
from embedcore.testing.openai.batch_files import Content, FileStore, Stored, StoredFile, missing
from embedcore.testing.openai.batch_jobs import (
    Effect,
    Job,
    Landings,
    LineRule,
    Runner,
    recorded_job,
    stored_file,
)
from embedcore.testing.openai.batch_lines import Failure, LineError, OutputContent
from embedcore.testing.openai.batch_settings import (
    NOT_READY,
    BatchSettings as BatchSettings,
    FileLimits as FileLimits,
    Listing as Listing,
    Progress as Progress,
    Quirks as Quirks,
)
from embedcore.testing.openai.embeddings import (
    EMBEDDINGS,
    OPENAI_MODELS,
    ApiError,
    Count,
    EmbeddingsApi,
    FakeModel,
    Limits,
)

_STARTS, _RUNS = 0.25, 0.65  # the shares of a job's time that it validates and runs


class ServiceClock:
    """Seconds since 1970, by another clock and ahead of it by what ``advance`` was told."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ahead = 0.0

    def __call__(self) -> float:
        return self._clock() + self._ahead

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


class BatchDriver:
    """The jobs and files, and the hands that move them. Callable from several threads."""

    def __init__(
        self,
        *,
        models: Mapping[str, FakeModel] = OPENAI_MODELS,
        count: Count | None = None,
        salt: str = "",
        limits: Limits | None = None,
        settings: BatchSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings or BatchSettings()
        self.meter = Meter()
        self.clock = ServiceClock(clock)
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._files = FileStore(self.clock)
        self._landings = Landings(self.clock)
        self._runner = Runner(
            api=EmbeddingsApi(models=models, limits=limits, count=count, salt=salt),
            files=self._files,
            meter=self.meter,
            settings=self._settings,
            clock=self.clock,
        )

    @property
    def settings(self) -> BatchSettings:
        """How it behaves; to be changed field by field."""
        return self._settings

    @property
    def jobs(self) -> list[Job]:
        """Every job, oldest first. Looking at one is no poll."""
        with self._lock:
            return list(self._jobs.values())

    def job(self, job_id: str) -> Job:
        """Raises ``ApiError`` (404) for one that is not there, or was made to vanish."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None or job.gone:
                raise ApiError(404, f"No batch found with id '{job_id}'.", param="batch_id")
            return job

    def restore(
        self, *, files: Iterable[Mapping[str, Any]], jobs: Iterable[Mapping[str, Any]]
    ) -> None:
        """Have the files and jobs of a record beside its own; what they cost is on no bill.

        What is in a record: ``embedcore.testing.openai.batch_jobs``.
        """
        with self._lock:
            for each in files:
                self._files.put(stored_file(each))
            for each in jobs:
                input_file = self._files.once(each["input_file_id"])
                job = recorded_job(each, input_file, self._runner.lines, salt=self._runner.salt)
                self._jobs[job.id] = job

    def input_lines(self, file_id: str) -> list[bytes]:
        """The lines of an uploaded file, also of one that is gone by now."""
        with self._lock:
            file = self._files.once(file_id)
            stored = file.content if file else None
            return list(stored.lines()) if isinstance(stored, Stored) else []

    def step(self, job_id: str, *, done: int | None = None) -> None:
        """One state further; with ``done``, no further than in_progress with so many lines run."""
        with self._lock:
            job = self.job(job_id)
            if job.status == "validating":
                self._validate(job)
            elif job.status == "in_progress" and done is None:
                self._runner.run(job, len(job.lines))
                self._runner.finalize(job)
            elif job.status in ("finalizing", "cancelling"):
                done_for = {"finalizing": "completed", "cancelling": "cancelled"}
                self._runner.end(job, done_for[job.status])
            if job.status == "in_progress" and done is not None:
                self._runner.run(job, done)

    def finish(self, job_id: str, *, done: int | None = None) -> None:
        """To completed; with ``done`` only so many lines were run, and the rest is in no file."""
        self._end(job_id, "completed", sys.maxsize if done is None else done)

    def expire(self, job_id: str, *, done: int | None = None) -> None:
        """To expired with so many lines run (None: those that were), the rest as error lines."""
        self._end(job_id, "expired", done)

    def end_cancel(self, job_id: str, *, done: int | None = None) -> None:
        """To cancelled with so many lines run (None: those that were), the rest in no file."""
        self._end(job_id, "cancelled", done)

    def fail(
        self,
        job_id: str,
        code: str = "token_limit_exceeded",
        message: str = "Enqueued token limit reached. Limit: 1,000 enqueued tokens.",
        *,
        line: int | None = None,
        param: str | None = None,
    ) -> None:
        """To failed, as validation does it."""
        with self._lock:
            error = LineError(code=code, message=message, line=line, param=param)
            self._runner.fail(self.job(job_id), [error])

    def vanish(self, some_id: str) -> None:
        """A job or a file is no longer there."""
        with self._lock:
            if some_id in self._jobs:
                self._jobs[some_id].gone = True
            else:
                self._files.delete(some_id)

    def vanish_output(self, job_id: str) -> None:
        """The files that a job left are no longer there."""
        job = self.job(job_id)
        for file_id in (job.output_file_id, job.error_file_id):
            if file_id is not None:
                self.vanish(file_id)

    def fail_lines(
        self,
        marker: str,
        *,
        status: int = 400,
        code: str | None = None,
        message: str = "'$.input' is invalid.",
        kind: str = "invalid_request_error",
        http: bool = True,
        times: int | None = None,
        billed: bool = False,
        usage: bool = False,
    ) -> None:
        """Lines with ``marker`` in a text fail, ``times`` over; ``http=False``: no response.

        ``billed``: they cost their tokens; ``usage``: and say so.
        """
        failure = Failure(
            http=http, status=status, kind=kind, code=code, message=message, usage=usage
        )
        with self._lock:
            self._runner.rules.append(
                LineRule(marker=marker, failure=failure, times=times, billed=billed)
            )

    def defer(
        self, effect: Effect, *, requests: int | None = None, seconds: float | None = None
    ) -> None:
        """Let something happen late: before the request after so many more, or after that long.

        With neither it happens when ``land`` is called.
        """
        with self._lock:
            self._landings.defer(effect, requests=requests, seconds=seconds)

    def land(self) -> int:
        """Everything that is late happens now. How many there were."""
        with self._lock:
            return self._landings.land()

    @property
    def pending(self) -> int:
        """What is late and has not happened yet."""
        with self._lock:
            return len(self._landings.pending)

    @property
    def landed(self) -> list[str]:
        """What came of each that was late, in order: an id, or the refusal it met."""
        with self._lock:
            return list(self._landings.landed)

    def refresh(self) -> None:
        """Let what goes by the clock catch up with it, as any request does."""
        with self._request():
            pass

    @contextmanager
    def _request(self) -> Iterator[None]:
        """One request: first happens what is late and due, and jobs catch up with the clock."""
        with self._lock:
            if self._landings.pending:
                self._landings.tick()
            for job in self._jobs.values():
                if not job.ended:
                    self._catch_up(job)
            yield

    def _catch_up(self, job: Job) -> None:
        """As far as its polls and the clock say; past its window it has expired."""
        if job.gone:
            return
        progress, now = self.settings.progress, self.clock()
        if job.status == "cancelling":
            polls = job.polls - job.polls_when_cancelled
            by_polls = progress.polls is not None and polls >= progress.cancel_polls
            passed = now - job.times["cancelling_at"]
            by_time = progress.seconds is not None and passed >= progress.cancel_seconds
            if by_polls or by_time:
                self._runner.end(job, "cancelled")
        else:
            shares = [0.0]
            if progress.polls is not None:
                shares.append(job.polls / max(progress.polls, 1))
            if progress.seconds is not None:
                passed = now - job.created_at
                shares.append(passed / progress.seconds if progress.seconds else 1.0)
            self._advance(job, max(shares))
        expires = job.times.get("expires_at")
        if not job.ended and expires is not None and now >= expires:
            self._end(job.id, "cancelled" if job.status == "cancelling" else "expired", None)

    def _advance(self, job: Job, share: float) -> None:
        """To where a job is after this share of its time."""
        if job.status == "validating" and share >= _STARTS:
            self._validate(job)
        if job.status == "in_progress":
            part = min(max(share - _STARTS, 0.0) / _RUNS, 1.0)
            self._runner.run(job, int(len(job.lines) * part))
            if share >= _STARTS + _RUNS:
                self._runner.finalize(job)
        if job.status == "finalizing" and share >= 1:
            self._runner.end(job, "completed")

    def _validate(self, job: Job) -> None:
        self._runner.validate(job, [one for one in self._jobs.values() if one is not job])

    def _end(self, job_id: str, status: str, done: int | None) -> None:
        """By way of validation, which may end it otherwise; ``done``: None for what was run."""
        with self._lock:
            job = self.job(job_id)
            if job.ended:
                raise ValueError(f"the job has already ended: it is {job.status}")
            # One that was cancelled at once was never read, and need not be to run nothing.
            if "in_progress_at" not in job.times and (done or job.status == "validating"):
                self._validate(job)
            if not job.ended:
                self._runner.run(job, len(job.results) if done is None else done)
                self._runner.end(job, status)


LATE_ERROR = b'{"error": {"message": "The file is not there yet.", "code": "not_found"}}\n'


class BatchService(BatchDriver):
    """The API and the hands that drive it. Callable from several threads.

    - ``models``, ``count``, ``salt``, ``limits``: as for ``FakeOpenAI``.
    - ``settings``: how it behaves. ``clock``: advances by itself and by ``clock.advance``.
    - ``meter``: the bill. Every line that was run is one request of it, billed or rejected.

    The methods of the API return what is on the wire and raise ``ApiError``.
    """

    # Files

    def upload(
        self,
        content: Stored | bytes,
        *,
        filename: str = "batch.jsonl",
        purpose: str = "batch",
        expires_after: int | None = None,
    ) -> dict[str, object]:
        """Keep a file. ``expires_after``: seconds; 30 days for a batch's by default."""
        stored = Stored(content) if isinstance(content, bytes) else content
        with self._request():
            if not stored.size:
                raise ApiError(400, "The uploaded file is empty.", param="file")
            file = self._files.add(
                stored, filename=filename, purpose=purpose, expires_after=expires_after
            )
            return file.described(self._state_of(file) or "uploaded")

    def files(
        self, *, after: str | None = None, limit: int = 10_000, purpose: str | None = None
    ) -> dict[str, object]:
        """A page of the files, newest first."""
        with self._request():
            found = [one for one in self._files.newest_first(purpose) if self._state_of(one)]
            return batchpages.page(
                found,
                lambda file: file.described(self._state_of(file) or ""),
                after=after,
                limit=limit,
            )

    def file(self, file_id: str) -> dict[str, object]:
        with self._request():
            file = self._files.get(file_id)
            state = self._state_of(file)
            if state is None:
                raise missing(file_id, param="id", status=404)
            return file.described(state)

    def content(self, file_id: str) -> Content:
        """What is in a file; readable after the file is gone as well, as a running download is."""
        with self._request():
            content, quirks = self._files.get(file_id).content, self.settings.quirks
            for job in self._jobs.values():
                late = job.is_late_file(file_id, quirks) and job.is_late(quirks, self.clock())
                if late and quirks.late != "no file":
                    job.looks += 1
                    return self._instead(file_id, content)
            return content

    def _instead(self, file_id: str, content: Content) -> Content:
        """What is there as long as a result is late."""
        late = self.settings.quirks.late
        if late == "missing":
            raise missing(file_id, param="id", status=404)
        if late == "first line" and isinstance(content, OutputContent):
            return OutputContent(content.results[:1], content.quirks)
        if late == "half" and isinstance(content, OutputContent):
            return OutputContent(content.results, replace(content.quirks, cut=0.5))
        return Stored(b"" if late == "empty" else LATE_ERROR)

    def result_files(self, job_id: str) -> list[str]:
        """The files with what a job did, as far as its object names them."""
        with self._request():
            described = self._looked_at(self.job(job_id))
            named = (described["output_file_id"], described["error_file_id"])
            return [str(file) for file in named if file is not None]

    def delete(self, file_id: str) -> dict[str, object]:
        with self._request():
            self._files.delete(file_id)
            return {"object": "file", "id": file_id, "deleted": True}

    # Jobs

    def create(
        self,
        input_file_id: str,
        *,
        endpoint: str = EMBEDDINGS,
        completion_window: str = "24h",
        metadata: dict[str, str] | None = None,
        output_expires_after: int | None = None,
    ) -> dict[str, object]:
        """Start a job on an uploaded file; what is wrong inside that file shows only later."""
        with self._request():
            self._check_input(input_file_id)
            now = self.clock()
            window = self.settings.window
            job = Job(
                id=f"batch_{len(self._jobs) + 1:032x}",
                endpoint=endpoint,
                input_file_id=input_file_id,
                completion_window=completion_window,
                metadata=metadata,
                output_expires_after=output_expires_after,
                created_at=now,
                times={} if window is None else {"expires_at": int(now + window)},
            )
            self._jobs[job.id] = job
            return self._described(job)

    def retrieve(self, job_id: str) -> dict[str, object]:
        """The job now. Counts as a poll."""
        with self._request():
            job = self.job(job_id)
            job.polls += 1
            if not job.ended:
                self._catch_up(job)
            return self._looked_at(job)

    def batches(self, *, after: str | None = None, limit: int = 20) -> dict[str, object]:
        """A page of the jobs, newest first, as far as ``settings.listing`` shows them."""
        with self._request():
            listing = self.settings.listing
            found = batchpages.visible(self._jobs.values(), listing, after, self.clock())
            return batchpages.page(
                found,
                self._described,
                after=None if listing.repeats else after,
                limit=limit,
                has_more=True if listing.repeats and found else listing.has_more,
            )

    def cancel(self, job_id: str) -> dict[str, object]:
        with self._request():
            job = self.job(job_id)
            if job.ended:
                message = f"Cannot cancel a batch with status '{job.status}'."
                raise ApiError(409, message)
            if job.status != "cancelling":
                self._runner.begin_cancel(job)
            return self._described(job)

    def swap_outputs(self, one: str, other: str) -> None:
        """Two jobs that have ended: each names the output of the other from now on."""
        with self._request():
            first, second = self.job(one), self.job(other)
            first.output_file_id, second.output_file_id = (
                second.output_file_id,
                first.output_file_id,
            )

    def _state_of(self, file: StoredFile) -> str | None:
        """The file's own state; None: there seems to be none."""
        settings = self.settings
        waits = self.clock() < file.created_at + settings.not_ready_seconds
        if file.purpose == "batch" and (waits or file.refused < settings.not_ready_creates):
            return settings.not_ready_word
        return "processed"

    def _check_input(self, file_id: str) -> None:
        """Raises ``ApiError`` unless a job may read the file."""
        kept = self._files.once(file_id)
        if kept is not None and kept.gone and self.settings.accepts_deleted_input:
            return
        status = self.settings.missing_input_status
        file = self._files.get(file_id, param="input_file_id", status=status)
        state = self._state_of(file)
        if state != "processed":
            file.refused += 1
            message = f"The input file {file_id} is not in processed state (it is {state})."
            raise ApiError(
                self.settings.not_ready_status, message, param="input_file_id", code=NOT_READY
            )
        if file.purpose != "batch":
            message = f"The file {file_id} was not uploaded for the purpose 'batch'."
            raise ApiError(400, message, param="input_file_id")

    def _described(self, job: Job) -> dict[str, object]:
        quirks = self.settings.quirks
        hidden = quirks.late == "no file" and job.is_late(quirks, self.clock())
        return job.described(quirks, hidden=hidden)

    def _looked_at(self, job: Job) -> dict[str, object]:
        """The object, as one sees it who looks whether its results are there."""
        described = self._described(job)
        job.looks += job.ended and self.settings.quirks.late == "no file"
        return described
