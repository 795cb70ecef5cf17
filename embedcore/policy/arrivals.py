"""Who gets the vectors of a finished request while the call goes on?"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedcore.policy.result import Arrival, OnArrival

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.policy.preparing import Prepared
    from embedcore.provider.types import Vectors


class Delivery:
    """Hands arrivals to the caller, one at a time, under the caller's own row numbers."""

    def __init__(self, prepared: Prepared, receiver: OnArrival) -> None:
        self._prepared = prepared
        self._receiver = receiver
        self._lock = threading.Lock()
        self._rows_of = _by_index(prepared.taken.rows)

    def __call__(self, indices: Sequence[int], vectors: Vectors) -> None:
        import numpy as np

        rows = [self._rows_of[index] for index in indices]
        repeats = [len(one) for one in rows]
        # Always a copy: they may be the call's own, which moves them when it ends.
        vectors = np.repeat(vectors, repeats, axis=0)
        with self._lock:
            flat = np.concatenate(rows)
            cuts = self._prepared.cuts(flat.tolist())
            self._receiver(Arrival(rows=flat, vectors=vectors, cuts=cuts))


def _by_index(rows: Sequence[int]) -> dict[int, NDArray[np.intp]]:
    import numpy as np

    indices = np.asarray(rows, dtype=np.intp)
    order = np.argsort(indices, kind="stable")
    found, starts = np.unique(indices[order], return_index=True)
    parts = np.split(order, starts[1:]) if len(found) else []
    return dict(zip(found.tolist(), parts, strict=True))
