"""What a remote job brought: checked line by line, stored, and only then counted as there.

Vectors go into the store before their texts count as stored; so whoever is killed in between reads
the same results again and loses nothing. Memory holds one chunk of vectors and a few bytes a text.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Final

from embedcore.events import BoundViolated, Event
from embedcore.policy.batchcheck import Checked, check
from embedcore.storage.cutting import priced
from embedcore.storage.keys import Origin

if TYPE_CHECKING:
    from embedcore.policy.batchoffice import BatchOffice
    from embedcore.provider.types import BatchOutcome, BatchStatus
    from embedcore.storage.amounts import Amount
    from embedcore.storage.partrecords import Part

_OUTCOMES_PER_CHUNK: Final = 1_024
_MOST_TOKENS: Final = 2**32


@dataclass(kw_only=True, slots=True)
class Found:
    """What the lines of a job said.

    - ``lines``: how many. ``stored``: texts with a vector. ``unknown``: lines of nobody.
    - ``tokens``: billed by the lines; those that do not say count as what was held for them, and
      then ``reported`` is False.
    - ``retry``: id of a text and why it may be tried in another job.
    - ``without_line``: of each text that no line spoke of, the tokens held for it.
    """

    provider: str = ""
    model: str = ""
    lines: int = 0
    stored: int = 0
    unknown: int = 0
    tokens: int = 0
    reported: bool = True
    retry: list[tuple[int, str]] = field(default_factory=list)
    without_line: list[int] = field(default_factory=list)

    def cost(self, status: BatchStatus, part: Part) -> Amount:
        """What the job cost: by its lines, or by its own total where that is more.

        What the provider counts as done and has no line for may be billed as well.
        """
        tokens, told = self.tokens, status.tokens
        if told is not None and 0 < told <= _MOST_TOKENS:
            tokens = max(tokens, told) if self.reported else told
        elif (unseen := (status.completed or 0) - self.stored) > 0:
            tokens += sum(sorted(self.without_line, reverse=True)[:unseen])
            self.reported = self.reported and not self.without_line
        return priced(tokens, part.price)

    def events(self, part: Part, actual: Amount | None) -> Iterator[Event]:
        if actual is not None and actual.tokens > part.tokens:
            yield BoundViolated(
                provider=self.provider, model=self.model, held=part.tokens, billed=actual.tokens
            )


class Collector:
    """Reads the results of parts into the store."""

    def __init__(self, office: BatchOffice) -> None:
        self._office = office
        self._jobs = office.jobs

    def collect(self, part: Part) -> Found:
        """Store every vector of the part's job. Harmless to repeat.

        Raises ``StorageFull`` when the store takes no more: the provider's copy stays the only one
        until there is room. Raises what ``results`` raises, and ``Superseded``.
        """
        reading = _Reading(self._office, part)
        chunk: list[BatchOutcome] = []
        try:
            for outcome in self._office.strategy.results(part.job or ""):
                chunk.append(outcome)
                if len(chunk) == _OUTCOMES_PER_CHUNK:
                    chunk, full = [], chunk
                    reading.take(full)
        finally:
            # What came before an error is paid for as well.
            reading.take(chunk)
        return reading.end()


class _Reading:
    """One pass over the results of a part."""

    def __init__(self, office: BatchOffice, part: Part) -> None:
        self._office = office
        self._part = part
        rows = office.jobs.items(part)
        self._ids = [row[1] for row in rows]
        self._keys = [row[2] for row in rows]
        self._held = [row[3] for row in rows]
        self._place = {row[0]: place for place, row in enumerate(rows)}
        # Of each text the checksum of the vector that came: equal ones may come twice.
        self._seen: list[int | None] = [None] * len(rows)
        self._spoken_of: set[int] = set()
        self._counted: set[int] = set()
        self._bad: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        self._retry: dict[int, str] = {}
        info = office.engine.info
        self._found = Found(provider=info.provider, model=info.model)
        self._keep_until = office.keep_until()

    def take(self, outcomes: Sequence[BatchOutcome]) -> None:
        found = self._found
        found.lines += len(outcomes)
        mine: dict[int, BatchOutcome] = {}
        for outcome in outcomes:
            place = self._placed(outcome)
            if place is not None:
                self._spoken_of.add(place)
            if place is None:
                found.unknown += 1
                found.tokens += _said(outcome) or 0
            elif outcome.vector is None:
                self._failed(place, outcome)
            elif place in mine:
                # The second of two in one chunk waits for its own turn.
                self._keep(mine)
                mine = {place: outcome}
            else:
                mine[place] = outcome
        self._keep(mine)

    def _placed(self, outcome: BatchOutcome) -> int | None:
        name = outcome.id
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            return None
        # "07" is nobody's name for 7.
        return self._place.get(int(name)) if str(int(name)) == name else None

    def _failed(self, place: int, outcome: BatchOutcome) -> None:
        self._count(place, outcome, billed=outcome.billed != "no")
        if self._seen[place] is not None or not outcome.ran:
            return
        reason = self._office.engine.scrubbed(outcome.error or "no reason was given")[:500]
        if outcome.code and outcome.code not in reason:
            reason = f"{outcome.code}: {reason}"
        if outcome.retryable:
            self._retry[place] = reason
        else:
            self._refused[place] = reason

    def _count(self, place: int, outcome: BatchOutcome, *, billed: bool) -> None:
        """What a line cost; a text is billed once, however many lines it has."""
        tokens = _said(outcome)
        if place in self._counted or (tokens is None and not billed):
            return
        self._counted.add(place)
        if tokens is None:
            self._found.reported = False
        self._found.tokens += self._held[place] if tokens is None else tokens

    def _keep(self, mine: dict[int, BatchOutcome]) -> None:
        """Check the vectors of different texts and store those that are sound."""
        if not mine:
            return
        for place, outcome in mine.items():
            self._count(place, outcome, billed=True)
        checked = check(self._office.engine, mine)
        self._bad.update(checked.problems)
        self._refuse_others(checked)
        if not checked.places:
            return
        engine = self._office.engine
        origin = Origin(
            model=engine.label,
            fingerprint=engine.fingerprint,
            input_type=self._part.input_type or None,
            answered_as=checked.answered_as,
        )
        keys = [self._keys[place] for place in checked.places]
        self._office.store.put(keys, checked.vectors, origin, keep_until=self._keep_until)
        self._office.jobs.store(self._part, [self._ids[place] for place in checked.places])
        self._found.stored += len(checked.places)

    def _refuse_others(self, checked: Checked) -> None:
        """Leave out what came before; a second vector that differs makes both worthless."""
        fresh: list[int] = []
        for row, place in enumerate(checked.places):
            checksum = zlib.crc32(checked.vectors[row].tobytes())
            if self._seen[place] is None:
                self._seen[place] = checksum
                if place not in self._bad:
                    fresh.append(row)
            elif self._seen[place] != checksum:
                self._bad[place] = "two different vectors came for it"
        checked.choose(fresh)

    def end(self) -> Found:
        """Write down what failed. Nothing more comes."""
        for place in self._bad:
            if self._seen[place] is not None:
                self._office.store.drop(self._keys[place])
        refused = self._jobs_fail()
        self._found.retry = [
            (self._ids[place], reason)
            for place, reason in self._retry.items()
            if self._seen[place] is None and place not in self._bad and place not in refused
        ]
        self._found.without_line = [
            held for place, held in enumerate(self._held) if place not in self._spoken_of
        ]
        return self._found

    def _jobs_fail(self) -> Mapping[int, str]:
        # A vector outdoes an error line for the same text, whichever came first.
        refused = {place: why for place, why in self._refused.items() if self._seen[place] is None}
        reasons = [(self._ids[place], reason) for place, reason in {**refused, **self._bad}.items()]
        if reasons:
            self._office.jobs.fail(self._part, reasons)
        return refused


def _said(outcome: BatchOutcome) -> int | None:
    """The tokens that a line says were billed, if that can be right."""
    tokens: object = outcome.tokens
    if isinstance(tokens, bool) or not isinstance(tokens, Integral):
        return None
    return int(tokens) if 0 <= int(tokens) <= _MOST_TOKENS else None
