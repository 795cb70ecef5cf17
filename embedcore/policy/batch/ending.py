"""A job that has ended: collects its results, settles its money, frees what must be sent again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from embedcore.errors import (
    AuthenticationFailed,
    EmbeddingError,
    InvalidResponse,
    PermanentProviderError,
    PermissionDenied,
    QuotaExhausted,
    TransientProviderError,
)
from embedcore.events import BatchStopped
from embedcore.policy.batch.collect import Collector
from embedcore.policy.batch.shorter import Shortener
from embedcore.policy.immediate.shortening import way_to_cut
from embedcore.storage.calendar import MICROSECONDS, as_datetime
from embedcore.storage.part_money import Ended
from embedcore.storage.parts import Part, ordinal_in

if TYPE_CHECKING:
    from embedcore.policy.batch.collect import Found
    from embedcore.policy.batch.context import BatchContext
    from embedcore.provider.types import BatchStatus
    from embedcore.storage.amounts import Amount


logger = logging.getLogger("embedcore")

_MOST_READS: Final = 12
# What a provider answers instead of results that are late is what it answers where there are none
# any more. A connection that breaks is tried again, though not for ever: its own copy may be cut.
_MAY_BE_LATE: Final = (TransientProviderError, PermanentProviderError, InvalidResponse)
# What a person can mend ends no wait: a key, a right, money.
_OF_THE_ACCOUNT: Final = (AuthenticationFailed, PermissionDenied, QuotaExhausted)
_QUEUE_SECONDS: Final = 60.0
_LONGEST_QUEUE_SECONDS: Final = 1_800.0


class Ending:
    """The last step of parts."""

    def __init__(self, context: BatchContext) -> None:
        self._context = context
        self._engine = context.engine
        self._jobs, self._steps = context.jobs, context.steps
        self._collector = Collector(context)
        self._shortener = Shortener(context)

    def collected(self, part: Part, status: BatchStatus) -> Part:
        """Store what came, settle the money, and free what must be submitted again.

        Where results are missing that the job owes, they are looked for again for a while first.
        """
        found = self._collector.collect(part)
        if found.broken is not None and not _may_be_late(found.broken):
            raise found.broken
        if (since := self._waits_since(part, status, found)) is not None:
            return self._look_again(part, status, found, since)
        self._warn(part, status, found)
        shorter = self._shortener.take(part, found)
        if failed := [*found.refused, *found.unbelieved]:
            self._jobs.fail(part, failed)
        refused = self._note_refusals(part, status)
        waits = status.queue_full and not found.lines
        if waits:
            waits = self._queue_full(part, status)
        # Where the whole job is at fault, that it names some texts as well leads nowhere.
        progress = bool(found.stored or shorter or (refused and "" not in status.errors))
        cancelled = status.state == "cancelled"
        paid = found.may_be_paid(status, part)
        again = paid and self._jobs.may_be_paid_again(part)
        actual = self._cost(part, status, found)
        if actual is not None and actual.tokens > part.tokens > 0:
            self._engine.learned.billed(actual.tokens / part.tokens)
        ended = Ended(
            actual=actual,
            reported=found.reported or bool(status.tokens),
            note=f"batch job {part.job} ended {status.detail or status.state}",
            counts=not (progress or cancelled or waits),
            reason=self._gone(status, found) if paid else self._why(part, status),
            retry=not paid or again,
            lost=paid and not again,
            stopped=cancelled and not part.cancelled,
            unbelieved=tuple(identity for identity, _ in found.unbelieved),
            most_tries=self._context.settings.attempts,
        )
        waiting = self._jobs.wanted_by(part) if ended.stopped else []
        self._context.tell(
            *found.events(part, actual), *self._steps.end(part, ended, found.retry, shorter)
        )
        self._tell_of_stop(part, waiting)
        return replace(part, state="done")

    def _tell_of_stop(self, part: Part, waiting: Sequence[int]) -> None:
        """A job was cancelled by hand: its batches must say what is to become of them."""
        batches, scope = self._context.batches, self._context.pool.scope
        for identity in waiting:
            batch = batches.numbered(identity)
            texts = 0 if batch is None else batches.counts(batch).stopped
            if batch is not None and texts:
                self._context.tell(
                    BatchStopped(batch=batch.name, job=part.job or "", texts=texts, scope=scope)
                )

    def _waits_since(self, part: Part, status: BatchStatus, found: Found) -> int | None:
        """Since when missing results are waited for; None: they are not, or not any more."""
        is_late = isinstance(found.broken, TransientProviderError)
        if not is_late and not found.without_line:
            return None
        now = self._jobs.now()
        since = now if part.since is None or found.fresh else part.since
        over = now >= since + round(self._context.settings.output_wait * MICROSECONDS)
        if part.since is None and self._jobs.may_be_paid_again(part):
            # However short the wait is: what one look does not find is not sent again.
            over = False
        if is_late:
            # However often it was asked for meanwhile, and though a server may be away for longer.
            return None if over and part.tries >= _MOST_READS else since
        if not self._jobs.is_awaited(part):
            return None
        if found.broken is None and not found.may_grow(status, part):
            return None
        return None if over else since

    def _look_again(self, part: Part, status: BatchStatus, found: Found, since: int) -> Part:
        """At once, and then more and more rarely; a caller who asks for it does not wait for that.

        Raises what broke on the way: it is tried again as any call is.
        """
        if isinstance(found.broken, TransientProviderError):
            self._jobs.note(part, since=since)
            raise found.broken
        end = since + round(self._context.settings.output_wait * MICROSECONDS)
        trouble = (
            f"its results are not all there yet ({self._missing(status, found)}); they are looked "
            f"for until {as_datetime(end):%H:%M:%S} UTC"
        )
        if part.since is None:
            logger.info("Batch %s: %s", part.job, trouble)
        next_at = self._context.next_look(since, end)
        return self._jobs.note(part, since=since, next=next_at, tries=0, trouble=trouble)

    def _cost(self, part: Part, status: BatchStatus, found: Found) -> Amount | None:
        """None where nothing at all says what it cost, and it may have been billed."""
        if found.lines or status.tokens is not None or not found.may_be_paid(status, part):
            return found.cost(status, part)
        return None

    def _gone(self, status: BatchStatus, found: Found) -> str:
        """Paid for, and not to be had: paid for again only by those who say so."""
        if isinstance(found.broken, TransientProviderError):
            reason = f"its result could not be read: {found.broken}"
        else:
            reason = f"output_gone: {self._missing(status, found)}"
        return self._engine.scrubbed(reason)

    def _missing(self, status: BatchStatus, found: Found) -> str:
        """What there is, and what there should be."""
        if found.broken is not None:
            return str(found.broken)
        done = "" if status.completed is None else f"its provider counts {status.completed} done, "
        here = f"{done}and there are results for {found.done}"
        return f"{here}; {found.unknown} lines name no text of it" if found.unknown else here

    def _warn(self, part: Part, status: BatchStatus, found: Found) -> None:
        """What does not add up: the lines are believed, and a person should know."""
        if found.unknown:
            logger.warning(
                "Batch %s: %d lines of its results belong to no text of it and are ignored",
                part.job,
                found.unknown,
            )
        if found.billed_in_vain:
            logger.warning(
                "Batch %s: %d texts failed for the moment and were billed all the same; they are "
                "sent again, in at most %d jobs in all, and billed once more",
                part.job,
                found.billed_in_vain,
                self._context.settings.attempts,
            )
        counted = None if status.completed is None else status.completed + (status.failed or 0)
        if counted is not None and counted != found.lines:
            logger.warning(
                "Batch %s: its provider counts %d texts as done, and there are %d lines",
                part.job,
                counted,
                found.lines,
            )

    def _note_refusals(self, part: Part, status: BatchStatus) -> int:
        """Texts that the provider named as the reason why it took none of the job."""
        if status.state != "failed":
            return 0
        items = {place: (identity, held) for place, identity, _, held in self._jobs.items(part)}
        named = [
            (
                items[place][0],
                self._engine.scrubbed(f"refused: {why}")
                + way_to_cut(self._engine, items[place][1]),
            )
            for one, why in status.errors.items()
            if (place := _place_of(part, one)) in items
        ]
        self._jobs.fail(part, named)
        return len(named)

    def _why(self, part: Part, status: BatchStatus) -> str:
        if status.state == "cancelled" and not part.cancelled:
            return f"job {part.job} was cancelled at the provider"
        said = self._engine.scrubbed(status.errors.get("", ""))
        word = status.detail or status.state
        return f"the job ended {word}{': ' if said else ' without a result for it'}{said}"

    def _queue_full(self, part: Part, status: BatchStatus) -> bool:
        """Too much is enqueued: wait for other parts, and learn how much is allowed.

        Returns whether waiting may help: one text alone that is too much may never go.
        """
        context = self._context
        queue = self._jobs.queue(context.pool, self._jobs.now())
        limit = status.queue_limit
        others = self._jobs.in_flight(context.pool)[0] - 1
        if limit is None and others <= 0 and part.items > 1:
            # It was alone: so much at once never goes.
            limit = max(part.tokens // 2, 1)
        seconds = min(_QUEUE_SECONDS * 2 ** min(queue.refusals, 10), _LONGEST_QUEUE_SECONDS)
        self._jobs.queue_refused(context.pool, limit=limit, until=context.later(seconds))
        logger.info(
            "%s: too many tokens are enqueued; the next job is created in %.0f s at the earliest",
            self._engine.label,
            seconds,
        )
        return others > 0 or part.items > 1


def _may_be_late(error: EmbeddingError) -> bool:
    return isinstance(error, _MAY_BE_LATE) and not isinstance(error, _OF_THE_ACCOUNT)


def _place_of(part: Part, name: str) -> int | None:
    """The place of an item that is named by its id, or by that place itself."""
    place = part.ordinal_of(name)
    return ordinal_in(name) if place is None else place
