"""Parts of a batch: upload, create, find a lost job, poll.

The input is the fence: once it is deleted, no call that is still on its way can create a job of it.
What is assumed of the provider for that is in docs/assumptions.md.

Every remote call is made between two transactions, by the one owner of the part. A lost answer
changes nothing that was committed: the next owner finds the part where it was.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from embedcore import money
from embedcore.errors import (
    EmbeddingError,
    InputNotReady,
    InvalidResponse,
    ProviderError,
    ProviderUnavailable,
    RemoteGone,
    RequestRejected,
    RequestTooLarge,
    StorageCorrupt,
    StorageError,
    TransientProviderError,
)
from embedcore.events import BatchChanged, BatchDuplicate
from embedcore.policy.batch.ending import Ending
from embedcore.provider.batchstates import is_stopping
from embedcore.provider.types import BatchItem
from embedcore.storage.amounts import Amount
from embedcore.storage.calendar import MICROSECONDS, as_datetime
from embedcore.storage.cutting import priced
from embedcore.storage.part_money import Ended
from embedcore.storage.parts import Part, Superseded

if TYPE_CHECKING:
    from embedcore.policy.batch.context import BatchContext
    from embedcore.provider.types import BatchStatus, FoundJob


logger = logging.getLogger("embedcore")

# Two listings: one alone may have been answered by a copy that lags behind.
_LOOKS: Final = 2
_WATCH_SECONDS: Final = 3_600.0
# The provider's clock and ours need not agree.
_SKEW: Final = timedelta(hours=1)

_RENEW_SECONDS: Final = 20.0
_TEXTS_PER_READ: Final = 1_000
_MOST_CREATE_TRIES: Final = 5
_OVERDUE_SECONDS: Final = 3_600.0
_LOOKED_AT_WHEN_ASKED: Final = frozenset({"planned", "submitted", "collecting"})

Got = TypeVar("Got")


class PartWorker:
    """Does whatever is due for parts. ``problems``: what a person or a longer wait must mend.

    ``asked``: a caller asks for it now, so what the provider should have by now is looked for again
    at once.
    """

    def __init__(self, context: BatchContext, *, asked: bool = False) -> None:
        self._context = context
        self._asked = asked
        self._engine = context.engine
        self._jobs, self._steps = context.jobs, context.steps
        self.problems: list[EmbeddingError] = []
        # What failed is not tried again in the same look.
        self._failed: set[int] = set()
        self._now = 0

    def work(self, part: Part, now: int) -> bool:
        """Do what is due for a part at that time, if no other process does. Returns whether
        anything changed. Raises ``StorageError``.
        """
        if part.state == "done" or self._rests(part, now) or part.id in self._failed:
            return False
        self._now = now
        owned = self._jobs.take(part)
        if owned is None:
            return False
        try:
            last: Part | None = None
            current = owned
            # What a step leads to is done at once, until it has to wait.
            while last is None or (current.state != last.state and current.state != "done"):
                last = current
                current = self._step(current)
                if current.since is not None:
                    break
            if current.tries > owned.tries or current.since is not None or current.missing:
                self._failed.add(part.id)
            return current.state != owned.state or current.status != owned.status
        except Superseded:
            return True
        finally:
            self._jobs.leave(owned)

    def _rests(self, part: Part, now: int) -> bool:
        """Whether nothing is to be done for it yet.

        Our own pauses are for those who look all the time. A caller who asks now has it looked at
        now, unless the provider asked for a pause. Only looks for a job whose name was lost have
        to lie apart: the list that they read may lag.
        """
        asked = self._asked and part.state in _LOOKED_AT_WHEN_ASKED
        return (part.not_before if asked else part.next) > now

    def _step(self, part: Part) -> Part:
        steps: dict[str, Callable[[Part], Part]] = {
            "planned": self._planned,
            "creating": self._creating,
            "fenced": self._fenced,
            "lost": self._lost,
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
        # What waiting does not mend is tried again when it is asked for next.
        waits = isinstance(error, TransientProviderError)
        return self._jobs.note(
            part,
            tries=part.tries + 1,
            next=self._context.backoff(part.tries, error) if waits else 0,
            not_before=self._context.not_before(error),
            trouble=str(error),
        )

    def _planned(self, part: Part) -> Part:
        """State *planned*: upload its input and have its job created, if there is room for it."""
        context = self._context
        found = self._jobs.prospect(part, context.pool)
        room = context.room(found.queue)
        too_large = room.tokens is not None and part.tokens > room.tokens and part.items > 1
        if too_large or not found.is_wanted or not found.has_texts:
            # It is larger than was learned since to be allowed, or no batch wants it, or the batch
            # that planned it has ended: others who want it cut parts of their own.
            self._delete_input(part)
            self._steps.dissolve(part)
            return replace(part, state="done")
        if room.is_full(*found.in_flight, part) or found.queue.until > found.now:
            return part
        if part.input is None:
            part = self._upload(part)
            if part.state != "planned":
                return part
        asked = self._steps.ask(part, room)
        return part if asked is None else self._create(asked)

    def _upload(self, part: Part) -> Part:
        try:
            reference = self._call(
                lambda: self._context.strategy.upload(self._texts(part), key=part.key)
            )
        except RequestTooLarge as error:
            if part.items == 1:
                return self._refused(part, error)
            raise
        return self._jobs.note(part, input=reference, tries=0, trouble=None)

    def _texts(self, part: Part) -> Iterator[BatchItem]:
        context = self._context
        batch = None if part.batch is None else context.batches.numbered(part.batch)
        if batch is None:
            raise StorageCorrupt(f"part {part.id} belongs to no batch any more")
        manifest, (items, sent) = context.manifest(batch), self._jobs.contents(part)
        renewed = self._engine.monotonic()
        try:
            for start in range(0, len(items), _TEXTS_PER_READ):
                some = items[start : start + _TEXTS_PER_READ]
                texts = manifest.texts([key for _, _, key, _ in some])
                for ordinal, item, key, _ in some:
                    if key not in texts:
                        raise StorageCorrupt(
                            f"{manifest.path} lacks a text of batch {batch.name}: submit it again"
                        )
                    yield BatchItem(
                        id=part.item_id(ordinal),
                        text=sent[item].part_of(texts[key]) if item in sent else texts[key],
                        input_type=part.input_type or None,
                    )
                if self._engine.monotonic() - renewed > _RENEW_SECONDS:
                    renewed = self._engine.monotonic()
                    self._jobs.renew(part)
        finally:
            manifest.close()

    def _create(self, part: Part) -> Part:
        """The call that costs money: it was committed that it is made, and it is made once."""
        try:
            job = self._call(lambda: self._context.strategy.create(part.input or "", key=part.key))
        except EmbeddingError as error:
            if error.billed == "no":
                return self._not_created(part, error)
            logger.warning(
                "Batch part %d: whether its job was created is not known (%s); it is looked for",
                part.id,
                error,
            )
            return self._jobs.note(part, next=self._context.backoff(0), trouble=str(error))
        return self._jobs.note(
            part, state="submitted", job=job, tries=0, next=0, since=None, status="", trouble=None
        )

    def _not_created(self, part: Part, error: EmbeddingError) -> Part:
        by_status = isinstance(error, ProviderError) and error.free_by_status
        if isinstance(error, InputNotReady):
            now = self._jobs.now()
            since = now if part.since is None else part.since
            end = since + round(self._context.settings.input_wait * MICROSECONDS)
            if now < end:
                return self._not_ready(part, error, since, end)
            error = RequestRejected(
                f"its input, which was uploaded, could not be used for "
                f"{(now - since) / MICROSECONDS:.0f} s: {error}",
                billed="no",
                status=error.status,
                code=error.code,
            )
        # An input that was kept in a process which has ended: it is given once more.
        is_gone = isinstance(error, RemoteGone) and part.tries < _MOST_CREATE_TRIES
        lasting = not (is_gone or isinstance(error, TransientProviderError))
        if lasting:
            self.problems.append(error)
        # The input itself may be what is refused, or be gone.
        new_input = lasting or is_gone or part.tries >= _MOST_CREATE_TRIES
        if new_input:
            self._delete_input(part)
        return self._steps.not_created(
            part,
            next_at=0 if lasting or is_gone else self._context.backoff(part.tries, error),
            why=str(error),
            new_input=new_input,
            not_before=self._context.not_before(error),
            by_status=by_status,
        )

    def _not_ready(self, part: Part, error: InputNotReady, since: int, end: int) -> Part:
        """Ask again at once, then more and more rarely, with the input that is there."""
        logger.info("Batch part %d: its job is asked for again (%s)", part.id, error)
        not_before = self._context.not_before(error)
        return self._steps.not_created(
            part,
            next_at=max(self._context.next_look(since, end), not_before),
            why=str(error),
            new_input=False,
            since=since,
            not_before=not_before,
            by_status=error.free_by_status,
        )

    def _delete_input(self, part: Part) -> None:
        """No job was made of it, and none will be."""
        if part.input is None:
            return
        try:
            self._call(lambda: self._context.strategy.discard(part.input or ""))
        except EmbeddingError as error:
            # It costs nothing, and embedcore batch gc finds it.
            logger.info("Batch part %d: its input stays at the provider (%s)", part.id, error)

    def _refused(self, part: Part, error: EmbeddingError) -> Part:
        self._jobs.fail(part, [(one[1], str(error)) for one in self._jobs.items(part)])
        ended = Ended(actual=Amount(), note=str(error), retry=False)
        self._context.tell(*self._steps.end(part, ended))
        return replace(part, state="done")

    def _creating(self, part: Part) -> Part:
        """State *creating*: adopt what is found; after two empty looks beyond the grace, fence."""
        found = self._find(part)
        if found:
            return self._adopt(part, found)
        settings, now = self._context.settings, self._jobs.now()
        end = (part.asked or 0) + round(settings.grace * MICROSECONDS)
        if now < end:
            wait = min(settings.look_again, max((end - now) / MICROSECONDS, 0.0))
            return self._jobs.note(part, next=self._context.later(wait), tries=0)
        looks = part.looks + 1
        if looks < _LOOKS:
            later = self._context.later(settings.look_again)
            return self._jobs.note(part, looks=looks, next=later, tries=0)
        logger.warning(
            "Batch part %d: no job of it appeared in %.0f s; its input is deleted, so none can",
            part.id,
            (now - (part.asked or 0)) / MICROSECONDS,
        )
        return self._jobs.note(part, state="fenced", looks=looks, next=0, tries=0)

    def _fenced(self, part: Part) -> Part:
        """State *fenced*: delete the input, look once more, and write the attempt off."""
        self._call(lambda: self._context.strategy.discard(part.input or ""))
        found = self._find(part)
        if found:
            return self._adopt(part, found)
        note = "no job of it was found; it is charged, since a job may have been created"
        near = self._steps.lose(part, next_at=self._context.later(_WATCH_SECONDS), note=note)
        self._context.tell(*near)
        return replace(part, state="lost")

    def _lost(self, part: Part) -> Part:
        """State *lost*: its money is charged; corrected when nothing ever shows such a job."""
        found = self._find(part)
        if found:
            self._stop_others(part, found)
            self._tell_of_duplicates(part, found)
            return self._jobs.note(part, state="stray", job=found[0].id, next=0, tries=0)
        end = (part.asked or 0) + round(self._context.settings.watch * MICROSECONDS)
        if self._jobs.now() < end:
            return self._jobs.note(part, next=self._context.later(_WATCH_SECONDS), tries=0)
        self._context.tell(*self._steps.clear(part))
        return replace(part, state="done")

    def _find(self, part: Part) -> list[FoundJob]:
        since = datetime.fromtimestamp((part.asked or 0) / MICROSECONDS, UTC) - _SKEW
        try:
            jobs: list[FoundJob] = self._call(
                lambda: self._context.strategy.find(
                    key=part.key, input_ref=part.input or "", since=since
                )
            )
        except InvalidResponse as error:
            way = self._way_out(part)
            if way not in error.message:
                error.message += way
            raise
        last = datetime.max.replace(tzinfo=UTC)
        return sorted(jobs, key=lambda one: (one.created_at or last, one.id))

    def _way_out(self, part: Part) -> str:
        """What ends the wait for a list that may never be readable."""
        records = map(self._context.batches.numbered, self._jobs.wanted_by(part))
        names = [record.name for record in records if record is not None]
        ways = " and ".join(f"embedcore batch forget {name}" for name in names)
        return f". It is read again; without it only this goes on: {ways}" if ways else ""

    def _listed(self, part: Part) -> list[FoundJob]:
        """The jobs of it that the provider lists, but for those that were told to stop."""
        stopped = part.jobs.split(",")
        return [one for one in self._find(part) if one.id not in stopped]

    def _adopt(self, part: Part, found: list[FoundJob]) -> Part:
        """The earliest is ours; every other one is cancelled, and what it may cost is spent."""
        self._stop_others(part, found)
        self._tell_of_duplicates(part, found[1:])
        logger.info("Batch %s: found again as the job of part %d", found[0].id, part.id)
        return self._jobs.note(
            part,
            state="submitted",
            job=found[0].id,
            missing=None,
            tries=0,
            next=0,
            trouble=None,
        )

    def _stop_others(self, part: Part, found: list[FoundJob]) -> None:
        for other in found[1:]:
            # In the ledger before the call that may fail: it is certain to be there.
            self._context.tell(*self._steps.charge_extra(part, other.id))
            if other.state == "running":
                with contextlib.suppress(RemoteGone):
                    self._call(partial(self._context.strategy.cancel, other.id))

    def _tell_of_duplicates(self, part: Part, jobs: list[FoundJob]) -> None:
        for job in jobs:
            self._context.tell(
                BatchDuplicate(
                    job=job.id,
                    scope=self._context.pool.scope,
                    tokens=part.tokens,
                    cost=money.in_dollars(part.cost),
                )
            )

    def _submitted(self, part: Part) -> Part:
        part, status = self._poll(part)
        if status is None:
            return part
        if status.state == "running":
            part = self._noted(part, status)
            if not self._jobs.is_wanted(part) and not is_stopping(part.status):
                part = self._cancelled(part)
            return self._overdue(part)
        part = self._noted(part, status, state="collecting")
        return Ending(self._context).collected(part, status)

    def _cancelled(self, part: Part) -> Part:
        """Tell a job to stop. That it was embedcore who did is written down before."""
        if not part.cancelled:
            part = self._jobs.note(part, cancelled=True)
        self._call(lambda: self._context.strategy.cancel(part.job or ""))
        return part

    def _overdue(self, part: Part) -> Part:
        """Say once that a job should have ended long ago; it is still waited for."""
        window = self._context.strategy.limits.window
        end = (part.asked or 0) + round(((window or 0) + _OVERDUE_SECONDS) * MICROSECONDS)
        if window is None or part.trouble is not None or self._now < end:
            return part
        trouble = (
            f"its provider still says {part.status}, and its window of {window / 3600:.0f} h is "
            "over: wait on, cancel the batch, or end it with embedcore batch forget"
        )
        logger.warning("Batch %s: %s", part.job, trouble)
        return self._jobs.note(part, trouble=trouble)

    def _collecting(self, part: Part) -> Part:
        part, status = self._poll(part)
        if status is None:
            return part
        if status.state == "running":
            return self._jobs.note(part, state="submitted", since=None)
        return Ending(self._context).collected(part, status)

    def _poll(self, part: Part) -> tuple[Part, BatchStatus | None]:
        """The job's state; None if it is not found, or is gone and the part was ended for that."""
        try:
            status = self._call(lambda: self._context.strategy.poll(part.job or ""))
        except RemoteGone as error:
            return self._not_found(part, error), None
        if part.missing is not None:
            part = self._jobs.note(part, missing=None, trouble=None)
        return part, status

    def _not_found(self, part: Part, error: RemoteGone) -> Part:
        """One answer proves no loss: it is looked for all through the grace, and in the list."""
        now, grace = self._jobs.now(), round(self._context.settings.grace * MICROSECONDS)
        since = now if part.missing is None else part.missing
        if part.missing is None or now < since + grace:
            trouble = f"{error}; it is looked for until {as_datetime(since + grace):%H:%M:%S} UTC"
            logger.info("Batch %s: %s", part.job, trouble)
            next_at = self._context.next_look(since, since + grace)
            return self._jobs.note(part, missing=since, next=next_at, tries=0, trouble=trouble)
        listed = self._listed(part)
        if part.job in {one.id for one in listed}:
            # Its name leads nowhere and it is there: that may pass.
            self._jobs.note(part, missing=now)
            raise ProviderUnavailable(
                f"{error}; and yet it is in the list of jobs: it is looked for again", billed="no"
            )
        if listed and part.state == "stray":
            return self._jobs.note(part, job=listed[0].id, missing=None, next=0, tries=0)
        if listed:
            return self._adopt(part, listed)
        return self._gone(part, error)

    def _gone(self, part: Part, error: RemoteGone) -> Part:
        stray = part.state == "stray"
        wanted = not stray and self._jobs.is_wanted(part)
        if wanted and not self._jobs.may_be_paid_again(part):
            raise error
        ended = Ended(
            actual=None,
            note=f"{'stray ' if stray else ''}job gone: {error}",
            reason=str(error),
            most_tries=self._context.settings.attempts,
        )
        self._context.tell(*self._steps.end(part, ended))
        return replace(part, state="done")

    def _noted(self, part: Part, status: BatchStatus, **more: object) -> Part:
        """Note what the provider says, and ``more`` columns; tell of it if it is news."""
        if (status.completed or 0) > 0 or status.state in ("completed", "expired"):
            self._jobs.queue_took(self._context.pool)
        word = status.detail or status.state
        news = (word, status.completed, status.failed, status.total)
        if news == (part.status, part.completed, part.failed, part.total):
            if part.tries:
                more |= {"tries": 0, "next": 0, "trouble": None}
            return self._jobs.note(part, **more) if more else part
        part = self._jobs.note(
            part,
            status=word,
            completed=status.completed,
            failed=status.failed,
            total=status.total,
            tries=0,
            next=0,
            trouble=None,
            **more,
        )
        self._context.tell(
            BatchChanged(
                job=part.job or "",
                status=word,
                completed=status.completed or 0,
                failed=status.failed or 0,
                total=status.total or part.items,
                scope=self._context.pool.scope,
            )
        )
        return part

    def _stray(self, part: Part) -> Part:
        """A job that appeared after its money was charged and its texts were given to another."""
        part, status = self._poll(part)
        if status is None:
            return part
        part = self._noted(part, status)
        if status.state == "running":
            if not is_stopping(part.status):
                self._call(lambda: self._context.strategy.cancel(part.job or ""))
            return part
        actual = None if status.tokens is None else priced(status.tokens, part.price)
        if status.state == "failed" and not status.completed:
            actual = Amount()
        self._context.tell(*self._steps.end(part, Ended(actual=actual, note="surplus job ended")))
        return replace(part, state="done")
