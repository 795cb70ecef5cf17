"""The vectors of a call, collected by any number of threads and put into rows at the end."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from embedcore.errors import EmbeddingError
from embedcore.policy.result import EmbeddingResult, Spending

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.policy.intake import Intake
    from embedcore.provider.types import Vectors


class Collected:
    """One vector or one error for each different text."""

    def __init__(self, texts: int, dimensions: int | None) -> None:
        import numpy as np

        self._texts = texts
        self._width = dimensions
        self._lock = threading.Lock()
        self._vectors: Vectors | None = None
        self._done: NDArray[np.bool_] = np.zeros(texts, dtype=np.bool_)
        self._errors: dict[int, EmbeddingError] = {}

    def put(self, indices: Sequence[int], vectors: Vectors) -> None:
        """Keep vector j as that of text ``indices[j]``, each text once."""
        import numpy as np

        places = np.asarray(indices, dtype=np.intp)
        with self._lock:
            if self._vectors is None:
                self._width = vectors.shape[1]
                self._vectors = np.empty((self._texts, self._width), dtype=np.float32)
            # A request is nearly always a run of neighbours, and a slice copies faster.
            if (np.diff(places) == 1).all():
                self._vectors[places[0] : places[-1] + 1] = vectors
            else:
                self._vectors[places] = vectors
            self._done[places] = True
            for index in self._errors.keys() & set(indices):
                del self._errors[index]

    def fail(self, indices: Sequence[int], error: EmbeddingError) -> None:
        """Note why these texts have no vector; those that have one keep it."""
        with self._lock:
            for index in indices:
                if not self._done[index]:
                    self._errors[index] = error

    @property
    def finished(self) -> int:
        """Texts with an outcome."""
        with self._lock:
            return int(self._done.sum()) + len(self._errors)

    def result(
        self,
        taken: Intake,
        tokens_cut: Mapping[int, int],
        *,
        spending: Spending,
        model: str,
        fingerprint: str,
    ) -> EmbeddingResult:
        """The caller's rows in their order; those without a vector are NaN."""
        import numpy as np

        with self._lock:
            rows = np.asarray(taken.rows, dtype=np.int64)
            ok = np.zeros(len(rows), dtype=np.bool_)
            ok[rows >= 0] = self._done[rows[rows >= 0]]
            errors = dict(taken.rejected)
            errors.update(self._errors_of_rows(rows))
            return EmbeddingResult(
                vectors=self._matrix(rows, ok),
                ok=ok,
                reused=_repeated(rows) & ok,
                usage=spending,
                model=model,
                fingerprint=fingerprint,
                tokens_cut=tokens_cut,
                errors=errors,
            )

    def _matrix(self, rows: NDArray[np.int64], ok: NDArray[np.bool_]) -> Vectors:
        import numpy as np

        if self._vectors is None:
            return np.full((len(rows), self._width or 0), np.nan, dtype=np.float32)
        if ok.all() and len(rows) == self._texts and (rows == np.arange(len(rows))).all():
            return self._vectors
        matrix = np.full((len(rows), self._vectors.shape[1]), np.nan, dtype=np.float32)
        matrix[ok] = self._vectors[rows[ok]]
        return matrix

    def _errors_of_rows(self, rows: NDArray[np.int64]) -> dict[int, EmbeddingError]:
        if not self._errors:
            return {}
        return {
            row: self._errors[index]
            for row, index in enumerate(rows.tolist())
            if index in self._errors
        }


def _repeated(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for each row whose text an earlier row had already."""
    import numpy as np

    repeated = np.ones(len(rows), dtype=np.bool_)
    repeated[np.unique(rows, return_index=True)[1]] = False
    return repeated
