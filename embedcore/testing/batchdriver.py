"""How do the jobs of the fake Batch API move, by hand and by themselves?"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from embedcore.testing.api import OPENAI_MODELS, ApiError, FakeModel
from embedcore.testing.batchfiles import FileStore, Stored
from embedcore.testing.batchjobs import Job, LineRule, Runner
from embedcore.testing.batchlines import LineError
from embedcore.testing.batchoutput import Failure
from embedcore.testing.batchrecord import recorded_job, stored_file
from embedcore.testing.batchsettings import BatchSettings
from embedcore.testing.embeddings_api import Count, EmbeddingsApi, Limits
from embedcore.testing.landing import Effect, Landings
from embedcore.testing.meter import Meter

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

        What is in a record: ``embedcore.testing.batchrecord``.
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
    ) -> None:
        """Lines with ``marker`` in a text fail, ``times`` over; ``http=False``: no response."""
        failure = Failure(http=http, status=status, kind=kind, code=code, message=message)
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
            return len(self._landings)

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
