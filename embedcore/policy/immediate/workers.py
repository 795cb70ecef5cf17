"""The worker threads of one call."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedcore.errors import EmbeddingError, OutcomeUnknown
from embedcore.policy.threads import LOOK_SECONDS, InFlight, Pause, SentRequest, Stopped

if TYPE_CHECKING:
    from embedcore.policy.budget import CallBudget
    from embedcore.policy.engine import Engine
    from embedcore.policy.threads import Task


class Workers:
    """Do the tasks of a call in the threads of the client's pool.

    Between two tasks a worker queues again behind other calls, so that a short call need not wait
    for the end of a long one. An attempt that is waited for no longer is charged to ``budget``.
    """

    def __init__(
        self,
        engine: Engine,
        budget: CallBudget,
        in_flight: InFlight,
        pause: Pause,
        deadline: float | None,
    ) -> None:
        self._engine = engine
        self._budget = budget
        self._in_flight = in_flight
        self._pause = pause
        self._deadline = deadline
        # What is traced in the pool's threads belongs to the caller's trace.
        self._context = contextvars.copy_context()
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._running = 0
        self._error: BaseException | None = None

    def work(self, tasks: Sequence[Task]) -> None:
        """Do them all. The first error ends the work, once what is under way has its answer.

        Raises it; ``Stopped`` when the call was ended from outside; ``OutcomeUnknown`` when the
        deadline and the grace after it have passed.
        """
        if tasks:
            self._engine.load()
        self._tasks.extend(tasks)
        try:
            for _ in range(min(len(tasks), self._engine.pool.size)):
                self._add_worker()
            self._wait()
        except BaseException:
            self._end()
            raise
        if self._error is not None:
            raise self._error

    def do_last(self) -> None:
        """Do, in this thread and at once, the last of the tasks that were not begun, if any."""
        try:
            task = self._tasks.pop()
        except IndexError:
            return
        task()

    def _add_worker(self) -> None:
        with self._changed:
            self._running += 1
        try:
            self._engine.pool.submit(self._take_one)
        except BaseException:
            self._leave()
            raise

    def _take_one(self) -> None:
        """One task, in a thread of the pool. Never raises."""
        try:
            task = None if self._pause.ended else self._tasks.popleft()
        except IndexError:
            # Another worker took the last one.
            task = None
        try:
            if task is not None:
                self._context.copy().run(task)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            self.fail(error)
        self._go_on()

    def _go_on(self) -> None:
        if self._tasks and not self._pause.ended:
            try:
                self._engine.pool.submit(self._take_one)
            except EmbeddingError as error:
                self.fail(error)
            else:
                return
        self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End the work with this error, unless it has ended: no worker begins anything any more."""
        with self._changed:
            if self._error is None:
                self._error = error
        self._pause.end()

    def _wait(self) -> None:
        while True:
            with self._changed:
                if not self._running:
                    return
                self._changed.wait(LOOK_SECONDS)
                if self._pause.ended and self._error is None:
                    raise Stopped
                if self.is_late():
                    raise self._error or self.too_late()
            self._engine.renew_claims()

    def is_late(self) -> bool:
        """Whether the deadline has passed, and the grace after it."""
        engine = self._engine
        return self._deadline is not None and engine.monotonic() > self._deadline + engine.grace

    def too_late(self) -> OutcomeUnknown:
        """What the call ends with then."""
        return OutcomeUnknown(
            f"{self._engine.label} did not answer within the deadline of "
            f"{self._engine.retry.deadline} s; the requests under way count as spent"
        )

    def _end(self) -> None:
        """Send nothing more, wait a little for what is under way, give up the rest."""
        self._pause.end()
        self._in_flight.close()
        why = "the call was interrupted"
        try:
            if self.is_late():
                why = "the call's deadline passed"
            else:
                self._wait_for_answers()
        finally:
            for sent in self._in_flight.give_up():
                self._engine.pool.replace(sent.thread)
                self.give_up(sent, why)
        # What has its answer is being accounted for.
        self._wait_for_answers()

    def give_up(self, sent: SentRequest, why: str) -> None:
        """It is waited for no longer. Should its answer come, that only corrects the amount."""
        if sent.attempt is None:
            return
        counted = self._engine.most_billed(sent.texts)
        self._budget.charge(sent.attempt, note=why, counted=counted)

    def _wait_for_answers(self) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: not (self._running and self._in_flight.under_way), self._engine.grace
            )
