"""A remote job has ended: store what it brought, settle its money, free what must be sent again."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from embedcore.errors import RemoteGone, StorageError, TransientProviderError
from embedcore.policy.collecting import Collector
from embedcore.storage.cutting import priced
from embedcore.storage.jobsteps import Ended
from embedcore.storage.partrecords import Part, Superseded

if TYPE_CHECKING:
    from embedcore.policy.batchoffice import BatchOffice
    from embedcore.policy.collecting import Found
    from embedcore.provider.types import BatchStatus

logger = logging.getLogger("embedcore")

_MOST_READS: Final = 12
_QUEUE_SECONDS: Final = 60.0
_LONGEST_QUEUE_SECONDS: Final = 1_800.0


class Ending:
    """The last step of parts."""

    def __init__(self, office: BatchOffice) -> None:
        self._office = office
        self._engine = office.engine
        self._jobs, self._steps = office.jobs, office.steps
        self._collector = Collector(office)

    def collected(self, part: Part, status: BatchStatus) -> Part:
        """Store what came, settle the money, and free what must be submitted again."""
        try:
            found = self._collector.collect(part)
        except (Superseded, StorageError):
            raise
        except Exception as raw:  # noqa: BLE001 - a plugin may raise anything
            error = self._engine.typed(raw)
            if isinstance(error, RemoteGone):
                return self._lost(part, status, f"output_gone: {error}")
            if isinstance(error, TransientProviderError) and part.tries >= _MOST_READS:
                # The provider's own copy is cut off: what could be read is stored, that is all.
                return self._lost(part, status, f"its result could not be read: {error}")
            raise error from None
        self._warn(part, status, found)
        refused = self._note_refusals(part, status)
        waits = status.queue_full and not found.lines
        if waits:
            waits = self._queue_full(part, status)
        # Where the whole job is at fault, that it names some texts as well leads nowhere.
        progress = bool(found.stored or (refused and "" not in status.errors))
        cancelled = status.state == "cancelled" and not self._jobs.is_wanted(part)
        actual = found.cost(status, part)
        if actual.tokens > part.tokens > 0:
            self._engine.learned.billed(actual.tokens / part.tokens)
        ended = Ended(
            actual=actual,
            reported=found.reported or bool(status.tokens),
            note=f"batch job {part.job} ended {status.detail or status.state}",
            counts=not (progress or cancelled or waits),
            reason=self._why(status),
            most_tries=self._office.settings.attempts,
        )
        self._office.tell(*found.events(part, actual), *self._steps.end(part, ended, found.retry))
        return replace(part, state="done")

    def _lost(self, part: Part, status: BatchStatus, reason: str) -> Part:
        """Paid for, and not to be had: bought again only by those who say so."""
        logger.warning("Batch %s: %s", part.job, reason)
        again = self.resubmits_lost(part)
        ended = Ended(
            actual=None if status.tokens is None else priced(status.tokens, part.price),
            note=reason,
            reason=reason,
            retry=again,
            lost=not again,
            most_tries=self._office.settings.attempts,
        )
        self._office.tell(*self._steps.end(part, ended))
        return replace(part, state="done")

    def _warn(self, part: Part, status: BatchStatus, found: Found) -> None:
        """What does not add up: the lines are believed, and somebody should know."""
        if found.unknown:
            logger.warning(
                "Batch %s: %d lines of its results belong to no text of it and are ignored",
                part.job,
                found.unknown,
            )
        told = None if status.completed is None else status.completed + (status.failed or 0)
        if told is not None and told != found.lines:
            logger.warning(
                "Batch %s: its provider counts %d texts as done, and there are %d lines",
                part.job,
                told,
                found.lines,
            )

    def _note_refusals(self, part: Part, status: BatchStatus) -> int:
        """Texts that the provider named as the reason why it took none of the job."""
        if status.state != "failed":
            return 0
        places = {str(item[0]): item[1] for item in self._jobs.items(part)}
        named = [
            (places[one], self._engine.scrubbed(f"refused: {why}"))
            for one, why in status.errors.items()
            if one in places
        ]
        self._jobs.fail(part, named)
        return len(named)

    def _why(self, status: BatchStatus) -> str:
        said = self._engine.scrubbed(status.errors.get("", ""))
        word = status.detail or status.state
        return f"the job ended {word}{': ' if said else ' without a result for it'}{said}"

    def _queue_full(self, part: Part, status: BatchStatus) -> bool:
        """Too much is enqueued: wait for other parts, and learn how much is allowed.

        Returns whether waiting may help: one text alone that is too much may never go.
        """
        office = self._office
        queue = self._jobs.queue(office.pool)
        limit = status.queue_limit
        others = self._jobs.in_flight(office.pool)[0] - 1
        if limit is None and others <= 0 and part.items > 1:
            # It was alone: so much at once never goes.
            limit = max(part.tokens // 2, 1)
        seconds = min(_QUEUE_SECONDS * 2 ** min(queue.refusals, 10), _LONGEST_QUEUE_SECONDS)
        self._jobs.queue_refused(office.pool, limit=limit, until=office.later(seconds))
        logger.info(
            "%s: too many tokens are enqueued; the next job is created in %.0f s at the earliest",
            self._engine.label,
            seconds,
        )
        return others > 0 or part.items > 1

    def resubmits_lost(self, part: Part) -> bool:
        """Whether one who waits for it wants to buy again what was paid for and lost."""
        batches = self._office.batches
        found = [batches.numbered(one) for one in self._jobs.wanted_by(part)]
        return any(batch is not None and batch.resubmits_lost for batch in found)
