"""Collects the results of a job: each line is checked alone and put into the cache.

Vectors go into the cache before their texts count as stored. A process that is killed in between
reads the same results again and loses nothing. Memory holds one chunk of vectors and a few bytes a
text.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import EmbeddingError, StorageError
from embedcore.events import BoundViolated, Event
from embedcore.policy.batch.verify import Row, Verifier
from embedcore.policy.immediate.shortening import may_be_cut, way_to_cut
from embedcore.policy.reply_checks import wrong_model
from embedcore.storage.cutting import priced
from embedcore.storage.keys import Origin
from embedcore.storage.manifest import Sent
from embedcore.storage.parts import Superseded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.engine import Engine
    from embedcore.provider.types import BatchOutcome, BatchStatus, Vectors
    from embedcore.storage.amounts import Amount
    from embedcore.storage.batches import BatchRecord
    from embedcore.storage.parts import Part


logger = logging.getLogger("embedcore")


@dataclass(kw_only=True, slots=True)
class Checked:
    """``vectors``: float32, shape (n, d), row i for ``places[i]``; ``problems``: place → reason.

    ``answered_as``: the model's name that was answered with, if there is one.
    """

    places: list[int]
    vectors: Vectors
    problems: dict[int, str]
    answered_as: str | None

    def choose(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        if len(rows) < len(self.places):
            self.places = [self.places[row] for row in rows]
            self.vectors = self.vectors[list(rows)]


def check(engine: Engine, outcomes: Mapping[int, BatchOutcome]) -> Checked:
    """Type, width, finiteness, model and (if it is not allowed) all zeros of each vector."""
    import numpy as np

    problems: dict[int, str] = {}
    places: list[int] = []
    rows: list[Any] = []
    names: set[str | None] = set()
    for place, outcome in outcomes.items():
        problem = _wrong_name(engine, outcome) or _wrong_shape(engine, outcome.vector)
        if problem is not None:
            problems[place] = problem
            continue
        places.append(place)
        rows.append(outcome.vector)
        names.add(outcome.model)
    width = engine.info.dimensions or engine.learned.width or 0
    vectors = np.empty((len(rows), width), dtype=np.float32)
    if rows:
        with np.errstate(over="ignore"):
            np.stack(rows, out=vectors, casting="same_kind")
    checked = Checked(
        places=places,
        vectors=vectors,
        problems=problems,
        answered_as=next((name for name in names if name), None),
    )
    _leave_out_worthless(engine, checked)
    return checked


def _wrong_name(engine: Engine, outcome: BatchOutcome) -> str | None:
    problem = wrong_model(engine.info, outcome.model)
    if problem is None:
        return None
    return (
        f"{problem}. embedcore batch fetch --again, or read_again() of the job, then takes it from "
        "the results: it is not paid for again"
    )


def _wrong_shape(engine: Engine, vector: object) -> str | None:
    import numpy as np

    if not isinstance(vector, np.ndarray) or vector.dtype.kind != "f":
        return f"the vector is of type {type(vector).__name__}, not an array of floats"
    if vector.ndim != 1 or not vector.size:
        return f"the vector has the shape {vector.shape}"
    expected = engine.info.dimensions
    width = len(vector)
    if (expected is not None and width != expected) or not engine.learned.agrees(width):
        return f"the vector has the width {width}, not {expected or engine.learned.width}"
    return None


def _leave_out_worthless(engine: Engine, checked: Checked) -> None:
    import numpy as np

    finite: NDArray[np.bool_] = np.asarray(np.isfinite(checked.vectors).all(axis=1))
    good = finite.copy()
    zeros = ~checked.vectors.any(axis=1)
    if engine.reject_zero:
        good &= ~zeros
    elif zeros.any():
        logger.warning(
            '%s returned zeros for %d texts of a batch; on_zero = "reject" refuses them',
            engine.label,
            int(zeros.sum()),
        )
    for row in np.flatnonzero(~good).tolist():
        why = "is all zeros" if finite[row] else "has a number that is not finite"
        checked.problems[checked.places[row]] = f"the vector {why}"
    checked.choose(np.flatnonzero(good).tolist())


_OUTCOMES_PER_CHUNK: Final = 1_024
_MOST_TOKENS: Final = 2**32


@dataclass(kw_only=True, slots=True)
class Found:
    """What the lines of a job said.

    - ``lines``: how many. ``unknown``: of these, lines of no text of this job.
    - ``stored``: texts with a vector, of which ``fresh`` were not stored before. ``ran``: those
      that the job came to; ``done``: those that were paid for, whether or not the vector is right.
    - ``tokens``: billed by the lines; those that do not say count as what was reserved, and
      then ``reported`` is False.
    - ``billed_in_vain``: lines that failed, may pass in another job, and were billed.
    - ``refused``: id of a text and the provider's reason; ``unbelieved``: the same of those whose
      vector came and cannot be used; ``retry``: of those that another job may do.
    - ``long``: of the refused ones those that may be too long, with their lines.
    - ``without_line``: of each text that no line spoke of, the tokens reserved for it.
    - ``broken``: what ended the reading before its end.
    """

    provider: str = ""
    model: str = ""
    lines: int = 0
    unknown: int = 0
    stored: int = 0
    fresh: int = 0
    ran: int = 0
    done: int = 0
    tokens: int = 0
    reported: bool = True
    billed_in_vain: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)
    unbelieved: list[tuple[int, str]] = field(default_factory=list)
    retry: list[tuple[int, str]] = field(default_factory=list)
    long: dict[int, BatchOutcome] = field(default_factory=dict)
    without_line: list[int] = field(default_factory=list)
    broken: EmbeddingError | None = None

    def may_be_paid(self, status: BatchStatus, part: Part) -> bool:
        """Whether texts without a line may have been billed all the same.

        They were not only where the provider's own figures leave no room for it: it is money that
        is at stake, and a figure that is missing, or contradicts another one, proves nothing.
        """
        billed, completed = _billed(status), status.completed
        if not self.without_line:
            return False
        if self.unknown or (completed is not None and completed > self.done):
            return True
        if self.reported and billed is not None and billed >= self.tokens:
            # Every token of the bill has its line, or some have none.
            return billed > self.tokens
        counted = _completed(status, part)
        if status.state == "completed":
            return counted != self.done
        return status.state == "expired" and counted is None

    def may_grow(self, status: BatchStatus, part: Part) -> bool:
        """Whether lines may still come for texts that have none."""
        counted = (status.completed or 0) + (status.failed or 0)
        if self.may_be_paid(status, part) or counted > self.ran:
            return True
        if status.state == "completed":
            # It did everything, it says; only the bill can prove that this is all that there is.
            return not self.reported or _billed(status) != self.tokens
        return status.completed is None and status.state in ("expired", "cancelled")

    def cost(self, status: BatchStatus, part: Part) -> Amount:
        """What the job cost: by its lines, or by its own total where that is more.

        What may have been billed and has no line counts as what was reserved for it.
        """
        tokens, billed = self.tokens, _billed(status)
        if billed is not None:
            tokens = max(tokens, billed) if self.reported else billed
        elif self.may_be_paid(status, part):
            unseen, counted = len(self.without_line), _completed(status, part)
            if counted is not None and counted > self.done:
                unseen = min(unseen, counted - self.done)
            tokens += sum(sorted(self.without_line, reverse=True)[:unseen])
            self.reported = False
        return priced(tokens, part.price)

    def events(self, part: Part, actual: Amount | None) -> Iterator[Event]:
        if actual is not None and actual.tokens > part.tokens:
            yield BoundViolated(
                provider=self.provider, model=self.model, reserved=part.tokens, billed=actual.tokens
            )


class Collector:
    """Reads the results of parts into the cache."""

    def __init__(self, context: BatchContext) -> None:
        self._context = context

    def collect(self, part: Part) -> Found:
        """Store every vector of the part's job. Harmless to repeat.

        Raises ``StorageFull`` when the cache takes no more: the provider's copy stays the only one
        until there is room. Raises ``Superseded``; what ``results`` raises is in ``broken``.
        """
        jobs = self._context.jobs
        rows, sent = jobs.contents(part)
        cut = {one: (key, sent[one]) for _, one, key, _ in rows if one in sent}

        texts = {
            ordinal: Row(
                key=key, sent_key=sent[one].key if one in sent else key, sent=sent.get(one)
            )
            for ordinal, one, key, _ in rows
        }

        def keep(ids: list[int]) -> None:
            self._context.note_cuts(part.pool, [cut[one] for one in ids if one in cut])
            jobs.store(part, ids)

        reading = _Reading(
            self._context,
            part,
            [
                (ordinal, one, sent[one].key if one in sent else key, held)
                for ordinal, one, key, held in rows
            ],
            before=jobs.stored(part),
            keep=keep,
        )
        return self._read(reading, part, texts)

    def collect_unread(self, part: Part) -> Found:
        """The same for what a part that has ended was left without."""
        came: list[int] = []
        rows = self._context.jobs.unread_items(part)
        reading = _Reading(
            self._context,
            part,
            [(row.ordinal, row.ordinal, row.sent_key or row.key, 0) for row in rows],
            keep=came.extend,
        )
        texts = {row.ordinal: Row(row.key, row.key) for row in rows if row.sent_key is None}
        found = self._read(reading, part, texts)
        useful = set(came) - {ordinal for ordinal, _ in found.unbelieved}
        cut = [
            (
                row.key,
                Sent(
                    characters_cut=row.characters_cut or 0,
                    key=row.sent_key,
                    tokens_cut=row.tokens_cut,
                ),
            )
            for row in rows
            if row.sent_key is not None and row.ordinal in useful
        ]
        self._context.note_cuts(part.pool, cut)
        self._context.jobs.was_read(part, [one for one in came if one in useful])
        return found

    def _read(self, reading: _Reading, part: Part, texts: Mapping[int, Row]) -> Found:
        chunk: list[BatchOutcome] = []
        broken: EmbeddingError | None = None
        try:
            reading.withheld = Verifier(self._context).doubt(part, texts)
            for outcome in self._context.strategy.results(part.job or ""):
                chunk.append(outcome)
                if len(chunk) == _OUTCOMES_PER_CHUNK:
                    chunk, full = [], chunk
                    reading.take(full)
        except (Superseded, StorageError):
            raise
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            broken = self._context.engine.typed(error)
        # What came before an error is paid for as well.
        reading.take(chunk)
        found = reading.end()
        found.broken = broken
        return found


def read_again(
    context: BatchContext, batch: BatchRecord, *, lost: bool = False
) -> tuple[int, list[EmbeddingError]]:
    """Read results again for texts of a batch that were paid for and have no vector. Costs nothing.

    ``lost``: only where they were not to be had. Returns how many texts have their vector now, and
    what kept others from being read.
    """
    collector, texts, problems = Collector(context), 0, []
    for part in context.jobs.unread(batch, lost=lost):
        found = collector.collect_unread(part)
        texts += found.fresh
        if found.broken is not None:
            problems.append(found.broken)
    return texts, problems


class _Reading:
    """One pass over the results of a part."""

    def __init__(
        self,
        context: BatchContext,
        part: Part,
        rows: Sequence[tuple[int, int, bytes, int]],
        *,
        keep: Callable[[list[int]], None],
        before: frozenset[int] = frozenset(),
    ) -> None:
        self._context = context
        self._part = part
        self._keep_ids = keep
        self._ids = [row[1] for row in rows]
        self._keys = [row[2] for row in rows]
        self._held = [row[3] for row in rows]
        self._place = {row[0]: place for place, row in enumerate(rows)}
        self._before = {place for place, row in enumerate(rows) if row[1] in before}
        # Of each text the checksum of the vector that came: equal ones may come twice.
        # Why no vector of the job may be kept.
        self.withheld: str | None = None
        self._seen: list[int | None] = [None] * len(rows)
        self._spoken_of: set[int] = set()
        self._done: set[int] = set(self._before)
        self._not_run: set[int] = set()
        self._counted: set[int] = set()
        self._bad: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        self._long: dict[int, BatchOutcome] = {}
        self._retry: dict[int, str] = {}
        info = context.engine.info
        self._found = Found(provider=info.provider, model=info.model)
        self._keep_until = context.keep_until(context.jobs.now())

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
        ordinal = self._part.ordinal_of(outcome.id)
        return None if ordinal is None else self._place.get(ordinal)

    def _failed(self, place: int, outcome: BatchOutcome) -> None:
        self._count(place, outcome, billed=outcome.billed != "no")
        if outcome.billed != "no" or _said(outcome):
            self._done.add(place)
        elif not outcome.ran:
            self._not_run.add(place)
        if self._seen[place] is not None or not outcome.ran:
            return
        reason = self._context.engine.scrubbed(outcome.error or "no reason was given")[:500]
        if outcome.code and outcome.code not in reason:
            reason = f"{outcome.code}: {reason}"
        if outcome.retryable:
            if place in self._done:
                self._found.billed_in_vain += 1
                reason += "; and it was billed"
            self._retry[place] = reason
        else:
            engine, held, known = self._context.engine, self._held[place], outcome.too_long
            self._refused[place] = reason + way_to_cut(engine, held, known)
            if may_be_cut(engine, held, known) and place not in self._done:
                self._long[place] = outcome

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
        self._done.update(mine)
        if self.withheld is not None:
            self._bad.update(dict.fromkeys(mine, self.withheld))
            return
        checked = check(self._context.engine, mine)
        self._bad.update(checked.problems)
        self._refuse_others(checked)
        if not checked.places:
            return
        engine = self._context.engine
        origin = Origin(
            model=engine.label,
            fingerprint=engine.fingerprint,
            input_type=self._part.input_type or None,
            answered_as=checked.answered_as,
        )
        keys = [self._keys[place] for place in checked.places]
        self._context.keep(keys, checked.vectors, origin, self._keep_until)
        self._keep_ids([self._ids[place] for place in checked.places])

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
        """What came of it all. Nothing more comes."""
        for place in self._bad:
            if self._seen[place] is not None:
                self._context.store.drop(self._keys[place])
        found, good = self._found, self._good()
        # A vector outdoes an error line for the same text, whichever came first.
        found.refused = self._named(self._refused, without=good | self._bad.keys())
        refused = {one for one, _ in found.refused}
        found.long = {
            self._ids[place]: line
            for place, line in self._long.items()
            if self._ids[place] in refused
        }
        found.unbelieved = self._named(self._bad, without=())
        found.retry = self._named(
            self._retry, without=good | self._bad.keys() | self._refused.keys()
        )
        found.stored, found.fresh = len(good), len(good - self._before)
        found.done = len(self._done)
        found.ran = len(self._before | self._spoken_of) - len(self._not_run - self._done)
        for place, held in enumerate(self._held):
            if place in self._spoken_of:
                continue
            if place in self._before:
                # It was there when its results were read before.
                found.tokens, found.reported = found.tokens + held, False
            else:
                found.without_line.append(held)
        return found

    def _good(self) -> set[int]:
        came = {place for place, one in enumerate(self._seen) if one is not None}
        return (self._before | came) - self._bad.keys()

    def _named(
        self, reasons: Mapping[int, str], *, without: Collection[int]
    ) -> list[tuple[int, str]]:
        return [(self._ids[one], why) for one, why in reasons.items() if one not in without]


def _completed(status: BatchStatus, part: Part) -> int | None:
    """How many texts the provider says that it did; None where its figures do not add up.

    A job that has completed is done with all of its texts, so these must say of each what became
    of it.
    """
    completed, failed, total = status.completed, status.failed, status.total
    if status.state == "completed" and (
        completed is None or failed is None or completed + failed != total
    ):
        return None
    return completed if total in (None, part.items) else None


def _billed(status: BatchStatus) -> int | None:
    """What the provider says the whole job cost, if that can be right."""
    counted = status.tokens
    return counted if counted is not None and 0 < counted <= _MOST_TOKENS else None


def _said(outcome: BatchOutcome) -> int | None:
    """The tokens that a line says were billed, if that can be right."""
    tokens: object = outcome.tokens
    if isinstance(tokens, bool) or not isinstance(tokens, Integral):
        return None
    return int(tokens) if 0 <= int(tokens) <= _MOST_TOKENS else None
