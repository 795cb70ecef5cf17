"""The handle of a batch: status, wait, result, cancel.

Everything is written down, so that another process has the same by its id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.policy.batch import advance as recipe
from embedcore.policy.batch.cleanup import deliver, forget
from embedcore.policy.batch.collect import read_again
from embedcore.policy.batch.context import context_of
from embedcore.policy.batch.report import BatchReport, report_of
from embedcore.policy.batch.result import blocks_of, failure, result_of
from embedcore.policy.result import EmbeddingResult
from embedcore.policy.threads import Pause, Stopped
from embedcore.storage.standing import standing

if TYPE_CHECKING:
    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.batch.submit import Submission
    from embedcore.policy.engine import Stop
    from embedcore.policy.stream.rows import Block
    from embedcore.storage.batches import BatchRecord


logger = logging.getLogger("embedcore")

_SHORTEST_SLEEP: Final = 0.05
_BLOCK_ROWS: Final = 4_096


@dataclass(kw_only=True)
class BatchJob:
    """A batch, in this process or another one than that which submitted it.

    ``open_context`` gives what it works with; the client it came from must not be closed meanwhile.
    """

    record: BatchRecord
    open_context: Callable[[], BatchContext] = field(repr=False)
    on_error: Literal["raise", "keep"] = "raise"
    transient: bool = False

    @property
    def id(self) -> str:
        """Its name, by which any process finds it."""
        return self.record.name

    def status(self, *, poll: bool = True) -> BatchReport:
        """How it stands. ``poll``: ask the provider and do whatever is due; else only what is
        written down is read, without network.

        What the provider answered badly is in ``trouble`` of the job concerned. Raises
        ``StorageError``.
        """
        context = self._context
        if poll and not self.record.has_ended:
            found = recipe.advance(context, self.record, asked=True).standing
        else:
            found = standing(context.batches.ledger, self.record)
        self.record = found.batch
        return report_of(context, found)

    def advance(self, *, asked: bool = False) -> list[EmbeddingError]:
        """Do whatever is due, once. Returns the errors that waiting alone does not mend.

        ``asked``: as ``status`` does, look now for what the provider should have by now, and not
        only when it is due.
        """
        return self._advance(self._context, asked=asked)

    def _advance(self, context: BatchContext, *, asked: bool = False) -> list[EmbeddingError]:
        found = recipe.advance(context, self.record, asked=asked)
        self.record = found.batch
        return found.problems

    def wait(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 30.0,
        stop: Stop | None = None,
    ) -> BatchReport:
        """Look after it until it has ended, or ``timeout`` seconds have passed.

        ``poll_interval``: seconds between two looks. Raises the error that keeps it from going on,
        once nothing else of it goes on: to call again after it is mended loses nothing.
        """
        if not poll_interval > 0:
            raise ConfigurationError(f"poll_interval = {poll_interval} must be above 0 seconds")
        context, asked = self._context, True
        engine = context.engine
        end = None if timeout is None else engine.monotonic() + timeout
        pause = Pause(stop, engine.wait_for)
        while True:
            found = recipe.advance(context, self.record, asked=asked)
            self.record, asked = found.batch, False
            if self.record.has_ended:
                break
            if self.transient:
                context.batches.still_waiting(self.record, waiting_lease(poll_interval))
            if found.problems and not self._goes_on():
                raise found.problems[0]
            left = None if end is None else end - engine.monotonic()
            if left is not None and left <= 0:
                break
            seconds = min(poll_interval, found.due or poll_interval, left or poll_interval)
            try:
                pause(max(seconds, _SHORTEST_SLEEP))
            except Stopped:
                break
            # The client may have been closed meanwhile, and opened again.
            context = self._context
        return report_of(context, found.standing)

    def result(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 30.0,
        on_error: Literal["raise", "keep"] | None = None,
    ) -> EmbeddingResult:
        """Wait for it and return row i for text i, as ``embed`` does.

        Raises ``BatchEmbeddingFailed`` if a row has no vector, after ``timeout`` seconds also for
        those that are still under way (``retryable`` then); ``on_error="keep"`` leaves them NaN.
        What was received is in its ``.result``. Of a batch that has ended, results that were not to
        be had are read again first; that costs nothing.
        """
        context = self._context
        self.record = context.batches.again(self.record)
        if self.record.has_ended:
            # What cannot be read now either says so in its row, as before.
            read_again(context, self.record, lost=True)
        report = self.wait(timeout, poll_interval=poll_interval)
        result = result_of(self._context, self.record, report.usage)
        if not result.ok.all() and (on_error or self.on_error) == "raise":
            jobs = [job.id for job in report.jobs if job.id is not None]
            raise failure(self.record, jobs, result)
        return result

    def blocks(self, size: int = _BLOCK_ROWS) -> Iterator[Block]:
        """The rows so far as ``embed_iter`` gives them, in bounded memory and without waiting.

        A row that has no vector yet, or gets none, says why in ``errors`` of its block.
        """
        if not size > 0:
            raise ConfigurationError(f"size = {size} must be at least 1 row")
        return blocks_of(self._context, self.record, size)

    def cancel(self) -> BatchReport:
        """Send nothing more, and stop jobs that no other batch waits for.

        What was done is still collected, and paid: call ``wait`` to see the end of it.
        """
        self.record = recipe.cancel(self._context, self.record)
        return self.status()

    def forget(self) -> BatchReport:
        """End it here and now without asking the provider, for what can never end otherwise.

        Its state is then "abandoned".

        Whatever may have been billed counts as spent.
        """
        self.record = recipe.abandon(self._context, self.record)
        return self.status(poll=False)

    def deliver(self) -> int:
        """Say that all of its vectors are where they are wanted: what ``cache_cap`` or
        ``cache = false`` leaves no room for is deleted here, and would be billed again.

        Vectors that are cached, and those that other batches count on, stay. Returns how many were
        deleted. ``embedcore batch fetch`` calls it once its output is complete. Raises
        ``ConfigurationError`` for a batch that has not ended, and ``StorageError``.
        """
        self.record = self._context.batches.again(self.record)
        if not self.record.has_ended:
            raise ConfigurationError(
                f"batch {self.id} has not ended: its vectors are not all there"
            )
        return deliver(self._context, self.record)

    def resubmit_lost(self) -> int:
        """Pay again for what was paid for and lost at the provider. Returns how many texts that
        are now; jobs that are gone follow at the next look.

        Raises ``ConfigurationError`` for a batch that has ended, whose texts are no longer there.
        """
        self.record = self._context.batches.again(self.record)
        if self.record.has_ended:
            raise ConfigurationError(
                f"batch {self.id} has ended and keeps no texts: submit them again with "
                "resubmit_lost=True, which sends only what is missing"
            )
        return self._context.batches.resubmit_lost(self.record)

    def read_again(self, *, lost: bool = False) -> int:
        """Read the results of its jobs again for texts that were paid for and have no vector: they
        came too late, or could not be believed with the settings of then. Costs nothing, and works
        as long as the provider has the results, also after the batch has ended.

        ``lost``: only for results that were not to be had. Returns how many texts have their vector
        now. Raises what kept results from being read, if none were.
        """
        texts, problems = read_again(self._context, self.record, lost=lost)
        self.record = self._context.batches.again(self.record)
        if problems and not texts:
            raise problems[0]
        return texts

    def resubmit_cancelled(self) -> int:
        """Send again the texts of jobs that were cancelled by hand at the provider: they wait
        until this is called. Returns how many that are.

        Raises ``ConfigurationError`` for a batch that has ended, whose texts are no longer there.
        """
        self.record = self._context.batches.again(self.record)
        if self.record.has_ended:
            raise ConfigurationError(
                f"batch {self.id} has ended and keeps no texts: submit them again"
            )
        return self._context.batches.resubmit_cancelled(self.record)

    def __repr__(self) -> str:
        return f"BatchJob({self.id!r}, {self.record.state}, {self.record.rows} rows)"

    def _goes_on(self) -> bool:
        """Whether some job of it is under way without trouble."""
        return any(
            part.since is not None
            or (part.missing is not None and not part.needs_a_person)
            or (part.state in ("creating", "submitted", "collecting") and part.trouble is None)
            for part in self._context.jobs.of_batch(self.record)
        )

    @property
    def _context(self) -> BatchContext:
        return context_of(self.open_context(), self.record)


def start(job: BatchJob, how: Submission) -> BatchJob:
    """Do the first of what is due for a batch that was submitted in that way.

    Raises what the provider refuses for good; nothing of the batch is left then.
    """
    job.on_error = how.on_error
    job.transient = how.waiting is not None
    context = job._context
    try:
        problems = job._advance(context)
        refused = problems and not any(
            part.attempt is not None for part in context.jobs.of_batch(job.record)
        )
    except BaseException:
        if not job.transient:
            logger.warning("batch %s is written down and goes on when it is resumed", job.id)
        raise
    if refused:
        # Nothing of it was created, and waiting does not help: as if it had not been asked for.
        job.forget()
        forget(context, job.record)
        raise problems[0]
    return job


def finished(job: BatchJob, poll_interval: float) -> list[list[float]]:
    """The vectors of a batch that a call waits for. Interrupted, it says that the batch goes on."""
    try:
        result = job.result(poll_interval=poll_interval)
    except KeyboardInterrupt:
        logger.warning(
            "batch %s goes on at the provider: to call again with the same texts goes on with it, "
            "and so does embedcore batch status %s",
            job.id,
            job.id,
        )
        raise
    listed: list[list[float]] = result.vectors.tolist()
    return listed


def waiting_lease(poll_interval: float) -> float:
    """For how long a call that looks every so often is believed to be alive."""
    return 4 * poll_interval + 3_600.0
