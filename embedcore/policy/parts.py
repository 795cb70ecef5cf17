"""One part of a batch: the table of what is committed, called and done when the answer is lost.

Every remote call is made between two transactions, by the one owner of the part. A lost answer
changes nothing that was committed: the next owner finds the part where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from embedcore.errors import (
    EmbeddingError,
    RemoteGone,
    StorageError,
    TransientProviderError,
)
from embedcore.events import BatchChanged
from embedcore.policy.adopting import Adopter
from embedcore.policy.asking import Asker
from embedcore.policy.ending import Ending
from embedcore.provider.batchstates import is_stopping
from embedcore.storage.amounts import Amount
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.cutting import priced
from embedcore.storage.jobsteps import Ended
from embedcore.storage.partrecords import Part, Superseded

if TYPE_CHECKING:
    from embedcore.policy.batchoffice import BatchOffice
    from embedcore.provider.types import BatchStatus

logger = logging.getLogger("embedcore")

_OVERDUE_SECONDS: Final = 3_600.0
_LOOKED_AT_WHEN_ASKED: Final = frozenset({"planned", "submitted", "collecting"})

Got = TypeVar("Got")


class PartWork:
    """Does whatever is due for parts. ``problems``: what a person or a longer wait must mend.

    ``asked``: somebody asks for it now, so what the provider should have by now is looked for again
    at once.
    """

    def __init__(self, office: BatchOffice, *, asked: bool = False) -> None:
        self._office = office
        self._asked = asked
        self._engine = office.engine
        self._jobs, self._steps = office.jobs, office.steps
        self.problems: list[EmbeddingError] = []
        # What failed is not tried again in the same look.
        self._failed: set[int] = set()
        self._adopter = Adopter(office, self._call)
        self._ending = Ending(office)
        self._asker = Asker(office, self._call, self.problems)

    def work(self, part: Part) -> bool:
        """Do what is due for a part, if nobody else is. Returns whether anything changed.

        Raises ``StorageError``.
        """
        if part.state == "done" or self._rests(part) or part.id in self._failed:
            return False
        owned = self._jobs.take(part)
        if owned is None:
            return False
        try:
            last: Part | None = None
            current = owned
            # What a step leads to is done at once, until it has to wait for somebody.
            while last is None or (current.state != last.state and current.state != "done"):
                last = current
                current = self._step(current)
                if current.since is not None:
                    break
            if current.tries > owned.tries or current.since is not None:
                self._failed.add(part.id)
            return current.state != owned.state or current.status != owned.status
        except Superseded:
            return True
        finally:
            self._jobs.leave(owned)

    def _rests(self, part: Part) -> bool:
        """Whether nothing is to be done for it yet.

        Our own pauses are for those who look all the time. Somebody who asks now has it looked at
        now, unless the provider asked for a pause. Only looks for a job whose name was lost have
        to lie apart: the list that they read may lag.
        """
        asked = self._asked and part.state in _LOOKED_AT_WHEN_ASKED
        return (part.not_before if asked else part.next) > self._jobs.now()

    def _step(self, part: Part) -> Part:
        steps: dict[str, Callable[[Part], Part]] = {
            "planned": self._asker.ask,
            "creating": self._adopter.look,
            "fenced": self._adopter.fence,
            "lost": self._adopter.watch,
            "stray": self._stray,
            "submitted": self._submitted,
            "collecting": self._collecting,
        }
        try:
            return steps[part.state](part)
        except (Superseded, StorageError):
            raise
        except EmbeddingError as error:
            return self._put_off(part, error)

    def _call(self, call: Callable[[], Got]) -> Got:
        """A remote call; whatever escapes it is an error of ours."""
        try:
            return call()
        except (Superseded, StorageError):
            raise
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            raise self._engine.typed(error) from None

    def _put_off(self, part: Part, error: EmbeddingError) -> Part:
        """An error changes nothing but the time of the next try."""
        logger.warning("Batch %s: %s", part.job or f"part {part.id}", error)
        if not isinstance(error, TransientProviderError) or not error.retryable:
            self.problems.append(error)
        # What waiting does not mend is tried again by whoever asks next.
        waits = isinstance(error, TransientProviderError)
        return self._jobs.note(
            part,
            tries=part.tries + 1,
            next=self._office.backoff(part.tries, error) if waits else 0,
            not_before=self._office.not_before(error),
            trouble=str(error),
        )

    def _submitted(self, part: Part) -> Part:
        status = self._poll(part)
        if status is None:
            return replace(part, state="done")
        part = self._told(part, status)
        if status.state == "running":
            if not self._jobs.is_wanted(part) and not is_stopping(part.status):
                part = self._cancelled(part)
            return self._overdue(part)
        part = self._jobs.note(part, state="collecting")
        return self._ending.collected(part, status)

    def _cancelled(self, part: Part) -> Part:
        """Tell a job to stop. That it was embedcore who did is written down before."""
        if not part.cancelled:
            part = self._jobs.note(part, cancelled=True)
        self._call(lambda: self._office.strategy.cancel(part.job or ""))
        return part

    def _overdue(self, part: Part) -> Part:
        """Say once that a job should have ended long ago; it is still waited for."""
        window = self._office.strategy.limits.window
        end = (part.asked or 0) + round(((window or 0) + _OVERDUE_SECONDS) * MICROSECONDS)
        if window is None or part.trouble is not None or self._jobs.now() < end:
            return part
        trouble = (
            f"its provider still says {part.status}, and its window of {window / 3600:.0f} h is "
            "over: wait on, cancel the batch, or give it up with embedcore batch abandon"
        )
        logger.warning("Batch %s: %s", part.job, trouble)
        return self._jobs.note(part, trouble=trouble)

    def _collecting(self, part: Part) -> Part:
        status = self._poll(part)
        if status is None:
            return replace(part, state="done")
        if status.state == "running":
            return self._jobs.note(part, state="submitted", since=None)
        return self._ending.collected(part, status)

    def _poll(self, part: Part) -> BatchStatus | None:
        """The job's state; None if it is gone and the part was ended for that."""
        try:
            return self._call(lambda: self._office.strategy.poll(part.job or ""))
        except RemoteGone as error:
            if self._jobs.is_wanted(part) and not self._ending.resubmits_lost(part):
                raise
            self._office.tell(
                *self._steps.end(
                    part,
                    Ended(
                        actual=None,
                        note=f"job gone: {error}",
                        reason=str(error),
                        most_tries=self._office.settings.attempts,
                    ),
                )
            )
            return None

    def _told(self, part: Part, status: BatchStatus) -> Part:
        """Note what the provider says, and tell of it if it is news."""
        if (status.completed or 0) > 0 or status.state in ("completed", "expired"):
            self._jobs.queue_took(self._office.pool)
        word = status.detail or status.state
        news = (word, status.completed, status.failed, status.total)
        if news == (part.status, part.completed, part.failed, part.total):
            if part.tries:
                return self._jobs.note(part, tries=0, next=0, trouble=None)
            return part
        part = self._jobs.note(
            part,
            status=word,
            completed=status.completed,
            failed=status.failed,
            total=status.total,
            tries=0,
            next=0,
            trouble=None,
        )
        self._office.tell(
            BatchChanged(
                job=part.job or "",
                status=word,
                completed=status.completed or 0,
                failed=status.failed or 0,
                total=status.total or part.items,
                scope=self._office.pool.scope,
            )
        )
        return part

    def _stray(self, part: Part) -> Part:
        """A job that appeared after its money was charged and its texts were given to another."""
        try:
            status = self._call(lambda: self._office.strategy.poll(part.job or ""))
        except RemoteGone:
            self._office.tell(*self._steps.end(part, Ended(actual=None, note="stray job gone")))
            return replace(part, state="done")
        part = self._told(part, status)
        if status.state == "running":
            if not is_stopping(part.status):
                self._call(lambda: self._office.strategy.cancel(part.job or ""))
            return part
        actual = None if status.tokens is None else priced(status.tokens, part.price)
        if status.state == "failed" and not status.completed:
            actual = Amount()
        self._office.tell(*self._steps.end(part, Ended(actual=actual, note="stray job ended")))
        return replace(part, state="done")
