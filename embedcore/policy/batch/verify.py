"""Some rows of a job against vectors of single requests, where its service may mix rows up.

Of such a service (``BatchLimits.verify_rows``) nothing is kept before so many random rows of the
job are what single requests give for their texts. These cost the immediate price, and are kept as
any vector is, so that looking again costs nothing.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from embedcore import money
from embedcore.errors import InvalidResponse
from embedcore.policy.immediate.recipe import embed_now
from embedcore.policy.immediate.reuse import vector_width
from embedcore.storage.keys import Origin

if TYPE_CHECKING:
    from embedcore.policy.batch.context import BatchContext
    from embedcore.provider.types import BatchOutcome, Vectors
    from embedcore.storage.manifest import Sent
    from embedcore.storage.parts import Part

logger = logging.getLogger("embedcore")

# Two answers for one text differ in their last digits; those of two texts in their first.
_LEAST_COSINE: Final = 0.999


@dataclass(frozen=True, slots=True)
class Row:
    """A text of a job: its own key, that of what was sent, and how much of it was not."""

    key: bytes
    sent_key: bytes
    sent: Sent | None = None


class Verifier:
    """Judges jobs. ``choose`` is what is asked for random numbers."""

    def __init__(
        self, context: BatchContext, choose: Callable[[int], int] = random.randrange
    ) -> None:
        self._context = context
        self._choose = choose

    def doubt(self, part: Part, rows: Mapping[int, Row]) -> str | None:
        """Why no vector of a job may be kept; None: nothing speaks against them.

        ``rows``: its texts by their places. Raises what ``results`` and single requests raise:
        then nothing is known yet.
        """
        wanted = self._context.strategy.limits.verify_rows
        if not wanted:
            return None
        sample = self._sample(part, rows, wanted)
        if not sample:
            return None
        texts = self._texts(part, {place: rows[place] for place in sample})
        if not texts:
            return "it cannot be checked against single requests, since its texts are gone"
        expected = self._single(part, rows, texts)
        for place, vector in expected.items():
            cosine = _cosine(sample[place], vector)
            if not cosine >= _LEAST_COSINE:
                why = (
                    f"the vectors of job {part.job} are not those of its texts, and none is kept. "
                    f"Of {len(expected)} that single requests were sent for, one has a cosine of "
                    f"{cosine:.3f}"
                )
                logger.warning("Batch %s: %s", part.job, why)
                return why
        return None

    def _sample(self, part: Part, rows: Mapping[int, Row], wanted: int) -> dict[int, Vectors]:
        """So many vectors of the job, each of its rows with equal chance."""
        kept: list[tuple[int, Vectors]] = []
        for seen, (place, vector) in enumerate(self._vectors(part, rows)):
            if len(kept) < wanted:
                kept.append((place, vector))
            elif (instead := self._choose(seen + 1)) < wanted:
                kept[instead] = place, vector
        return dict(kept)

    def _vectors(self, part: Part, rows: Mapping[int, Row]) -> Iterable[tuple[int, Vectors]]:
        outcomes: Iterable[BatchOutcome] = self._context.strategy.results(part.job or "")
        for outcome in outcomes:
            place = part.ordinal_of(outcome.id)
            if place is not None and place in rows and outcome.vector is not None:
                yield place, outcome.vector

    def _texts(self, part: Part, rows: Mapping[int, Row]) -> dict[int, str]:
        """What was sent of each; those that are gone are left out."""
        batch = None if part.batch is None else self._context.batches.numbered(part.batch)
        if batch is None:
            return {}
        manifest = self._context.manifest(batch)
        try:
            found = manifest.texts([row.key for row in rows.values()])
        finally:
            manifest.close()
        return {
            place: found[row.key] if row.sent is None else row.sent.part_of(found[row.key])
            for place, row in rows.items()
            if row.key in found
        }

    def _single(
        self, part: Part, rows: Mapping[int, Row], texts: Mapping[int, str]
    ) -> dict[int, Vectors]:
        """The vectors of single requests, from the cache or embedded now, by their places."""
        context, engine = self._context, self._context.engine
        keys = {place: rows[place].sent_key for place in texts}
        there = self._stored(keys)
        missing = [place for place in texts if place not in there]
        if not missing:
            return there
        result = embed_now(
            replace(engine, cache=None),
            [texts[place] for place in missing],
            input_type=part.input_type or None,
            on_error="keep",
        )
        whole = [row for row in range(len(missing)) if result.ok[row] and row not in result.cuts]
        origin = Origin(
            model=engine.label, fingerprint=engine.fingerprint, input_type=part.input_type or None
        )
        until = context.keep_until(context.jobs.now())
        context.store.put(
            [keys[missing[row]] for row in whole], result.vectors[whole], origin, keep_until=until
        )
        self._book(part, result.usage.tokens, money.in_picodollars(result.usage.cost))
        there.update({missing[row]: result.vectors[row] for row in whole})
        if not there:
            raise next(
                iter(result.errors.values()),
                InvalidResponse("none of the rows could be compared with a single request"),
            )
        return there

    def _stored(self, keys: Mapping[int, bytes]) -> dict[int, Vectors]:
        places, found = list(keys), dict[int, Any]()

        def take(hits: Sequence[int], vectors: Vectors) -> None:
            found.update({places[hit]: vectors[row].copy() for row, hit in enumerate(hits)})

        self._context.store.get(
            [keys[place] for place in places], vector_width(self._context.engine), take
        )
        return found

    def _book(self, part: Part, tokens: int, cost: int) -> None:
        """To the batch that the part was cut for; the ledger has it already."""
        batches = self._context.batches
        batch = None if part.batch is None else batches.numbered(part.batch)
        if batch is not None:
            batches.settle_now(batch, tokens=tokens, cost=cost)


def _cosine(one: Vectors, other: Vectors) -> float:
    import numpy as np

    if one.shape != other.shape:
        return float("nan")
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else float("nan")
