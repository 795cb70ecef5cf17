"""A job may exist and nobody has its name: look for it, adopt it, or make sure that there is none.

The input is the fence: once it is deleted, no call that is still on its way can create a job of it.
What is assumed of the provider for that is in docs/assumptions.md.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import RemoteGone
from embedcore.events import BatchStray
from embedcore.storage.calendar import MICROSECONDS

if TYPE_CHECKING:
    from embedcore.policy.batchoffice import BatchOffice
    from embedcore.provider.types import FoundJob
    from embedcore.storage.partrecords import Part

logger = logging.getLogger("embedcore")

# Two listings: one alone may have been answered by a copy that lags behind.
_LOOKS: Final = 2
_WATCH_SECONDS: Final = 3_600.0
# The provider's clock and ours need not agree.
_SKEW: Final = timedelta(hours=1)

Call = Callable[[Callable[[], Any]], Any]


class Adopter:
    """Steps of a part whose ``create`` was sent and whose job is not known."""

    def __init__(self, office: BatchOffice, call: Call) -> None:
        self._office = office
        self._jobs, self._steps = office.jobs, office.steps
        self._call = call

    def look(self, part: Part) -> Part:
        """State *creating*: adopt what is found; after two empty looks beyond the grace, fence."""
        found = self._find(part)
        if found:
            return self._adopt(part, found)
        settings, now = self._office.settings, self._jobs.now()
        end = (part.asked or 0) + round(settings.grace * MICROSECONDS)
        if now < end:
            wait = min(settings.look_again, max((end - now) / MICROSECONDS, 0.0))
            return self._jobs.note(part, next=self._office.later(wait), tries=0)
        looks = part.looks + 1
        if looks < _LOOKS:
            later = self._office.later(settings.look_again)
            return self._jobs.note(part, looks=looks, next=later, tries=0)
        logger.warning(
            "Batch part %d: no job of it appeared in %.0f s; its input is deleted, so none can",
            part.id,
            (now - (part.asked or 0)) / MICROSECONDS,
        )
        return self._jobs.note(part, state="fenced", looks=looks, next=0, tries=0)

    def fence(self, part: Part) -> Part:
        """State *fenced*: delete the input, look once more, and write the attempt off."""
        self._call(lambda: self._office.strategy.discard(part.input or ""))
        found = self._find(part)
        if found:
            return self._adopt(part, found)
        note = "no job of it was found; it is charged, since a job may have been created"
        near = self._steps.lose(part, next_at=self._office.later(_WATCH_SECONDS), note=note)
        self._office.tell(*near)
        return replace(part, state="lost")

    def watch(self, part: Part) -> Part:
        """State *lost*: its money is charged; corrected when nothing ever shows such a job."""
        found = self._find(part)
        if found:
            self._stop_others(part, found)
            self._tell_of_stray(part, found)
            return self._jobs.note(part, state="stray", job=found[0].id, next=0, tries=0)
        end = (part.asked or 0) + round(self._office.settings.watch * MICROSECONDS)
        if self._jobs.now() < end:
            return self._jobs.note(part, next=self._office.later(_WATCH_SECONDS), tries=0)
        self._office.tell(*self._steps.clear(part))
        return replace(part, state="done")

    def _find(self, part: Part) -> list[FoundJob]:
        since = datetime.fromtimestamp((part.asked or 0) / MICROSECONDS, UTC) - _SKEW
        jobs: list[FoundJob] = self._call(
            lambda: self._office.strategy.find(
                key=part.key, input_ref=part.input or "", since=since
            )
        )
        last = datetime.max.replace(tzinfo=UTC)
        return sorted(jobs, key=lambda one: (one.created_at or last, one.id))

    def _adopt(self, part: Part, found: list[FoundJob]) -> Part:
        """The earliest is ours; every other one is cancelled, and what it may cost is spent."""
        self._stop_others(part, found)
        self._tell_of_stray(part, found[1:])
        logger.info("Batch %s: found again as the job of part %d", found[0].id, part.id)
        return self._jobs.note(
            part, state="submitted", job=found[0].id, tries=0, next=0, trouble=None
        )

    def _stop_others(self, part: Part, found: list[FoundJob]) -> None:
        for other in found[1:]:
            # On the books before the call that may fail: it is certain to be there.
            self._office.tell(*self._steps.charge_extra(part, other.id))
            if other.state == "running":
                with contextlib.suppress(RemoteGone):
                    self._call(partial(self._office.strategy.cancel, other.id))

    def _tell_of_stray(self, part: Part, jobs: list[FoundJob]) -> None:
        for job in jobs:
            self._office.tell(
                BatchStray(
                    job=job.id,
                    scope=self._office.pool.scope,
                    tokens=part.tokens,
                    picodollars=part.cost,
                )
            )
