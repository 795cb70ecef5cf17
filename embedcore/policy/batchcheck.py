"""May these vectors of a batch be believed? Each is judged alone: the others are paid for too."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedcore.policy.integrity import wrong_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedcore.policy.engine import Engine
    from embedcore.provider.types import BatchOutcome, Vectors


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
