"""The vectors of one call as they arrive, and the result made of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from embedcore.errors import EmbeddingError
from embedcore.policy.result import (
    Arrival,
    EmbeddingResult,
    OnArrival,
    Spending,
    StoppedAt,
    TextCut,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.policy.texts import Intake, Prepared
    from embedcore.provider.types import Vectors


_LARGE_BYTES: Final = 1 << 20


class ResultBuffer:
    """One vector or one error for each different text; hands arrivals to ``on_arrival``, if any.

    ``rows``: for each row of the caller the index of its text, or -1. The array has room for all
    rows; text i is at place i until the result is asked for, and is moved to its rows then.
    """

    def __init__(
        self,
        rows: Sequence[int],
        texts: int,
        dimensions: int | None,
        *,
        prepared: Prepared | None = None,
        on_arrival: OnArrival | None = None,
    ) -> None:
        """``prepared`` tells ``on_arrival`` which texts were cut."""
        import numpy as np

        self._rows: NDArray[np.intp] = np.asarray(rows, dtype=np.intp)
        self._width = dimensions
        self._lock = threading.Lock()
        self._vectors: Vectors | None = None
        self._in_rows = False
        self._done: NDArray[np.bool_] = np.zeros(texts, dtype=np.bool_)
        self._reused: NDArray[np.bool_] = np.zeros(texts, dtype=np.bool_)
        self._errors: dict[int, EmbeddingError] = {}
        self._prepared = prepared
        self._on_arrival = on_arrival
        self._delivering = threading.Lock()
        # The caller's rows of each text; only arrivals need them.
        self._rows_of = {} if on_arrival is None else _by_index(rows)

    def room_for(self, indices: Sequence[int]) -> Vectors | None:
        """Where vector j of text ``indices[j]`` may be written, if they are neighbours and the
        width is known. What is there counts only once it is ``put``."""
        if self._width is None or not indices or indices[-1] - indices[0] + 1 != len(indices):
            return None
        return self._array(self._width)[indices[0] : indices[-1] + 1]

    def make_room(self) -> None:
        """Have the memory for all vectors now, if their width is known. Raises ``MemoryError``."""
        if self._width is not None:
            self._array(self._width)

    def put(self, indices: Sequence[int], vectors: Vectors, *, reused: bool = False) -> None:
        """Keep vector j as that of text ``indices[j]``, each text once. ``reused``: not billed.

        An error that ``on_arrival`` raises is raised.
        """
        import numpy as np

        places = np.asarray(indices, dtype=np.intp)
        kept = self._array(vectors.shape[1])
        room = kept[places[0] : places[-1] + 1]
        # No two threads have the same text: the copying needs no lock.
        if len(room) != len(places) or not (np.diff(places) == 1).all():
            kept[places] = vectors
        elif not _is_same(room, vectors):
            room[:] = vectors
        with self._lock:
            self._done[places] = True
            self._reused[places] = reused
            for index in self._errors.keys() & set(indices):
                del self._errors[index]
        if self._on_arrival is not None:
            self._deliver(self._on_arrival, indices, vectors)

    def _deliver(self, receiver: OnArrival, indices: Sequence[int], vectors: Vectors) -> None:
        """Hand arrivals to the caller, one at a time, under the caller's own row numbers."""
        import numpy as np

        rows = [self._rows_of[index] for index in indices]
        repeats = [len(one) for one in rows]
        # Always a copy: they may be the call's own, which moves them when it ends.
        vectors = np.repeat(vectors, repeats, axis=0)
        with self._delivering:
            flat = np.concatenate(rows)
            cuts = {} if self._prepared is None else self._prepared.cuts(flat.tolist())
            receiver(Arrival(rows=flat, vectors=vectors, cuts=cuts))

    def _array(self, width: int) -> Vectors:

        with self._lock:
            if self._vectors is None:
                self._width = width
                self._vectors = _fresh(len(self._rows), width)
            return self._vectors

    def fail(self, indices: Sequence[int], error: EmbeddingError) -> None:
        """Note why these texts have no vector; those that have one keep it."""
        with self._lock:
            for index in indices:
                if not self._done[index]:
                    self._errors[index] = error

    def left(self) -> list[int]:
        """Texts without an outcome."""
        with self._lock:
            missing = (~self._done).nonzero()[0].tolist()
            return [index for index in missing if index not in self._errors]

    def result(
        self,
        taken: Intake,
        cuts: Mapping[int, TextCut],
        *,
        spending: Spending,
        model: str,
        fingerprint: str,
        stopped_at: StoppedAt | None = None,
    ) -> EmbeddingResult:
        """The caller's rows in their order; those without a vector are NaN."""
        import numpy as np

        with self._lock:
            rows = self._rows
            ok = np.zeros(len(rows), dtype=np.bool_)
            ok[rows >= 0] = self._done[rows[rows >= 0]]
            reused = _repeated(rows) & ok
            reused[ok] |= self._reused[rows[ok]]
            errors = dict(taken.rejected)
            errors.update(self._errors_of_rows(rows))
            return EmbeddingResult(
                vectors=self._matrix(ok),
                ok=ok,
                reused=reused,
                usage=spending,
                model=model,
                fingerprint=fingerprint,
                # Of a text without a vector there is nothing to find out.
                cuts={row: cut for row, cut in cuts.items() if cut.is_known or ok[row]},
                errors=errors,
                stopped_at=stopped_at,
            )

    def _matrix(self, ok: NDArray[np.bool_]) -> Vectors:
        import numpy as np

        if self._vectors is None:
            return np.full((len(ok), self._width or 0), np.nan, dtype=np.float32)
        if self._in_rows:
            return self._vectors
        vectors, whole = self._vectors, bool(self._done.all())
        if not whole:
            # What is still under way may yet write into the other.
            vectors = vectors.copy()
        _move_to_rows(vectors, self._rows)
        vectors[~ok] = np.nan
        self._in_rows = whole
        return vectors

    def _errors_of_rows(self, rows: NDArray[np.intp]) -> dict[int, EmbeddingError]:
        if not self._errors:
            return {}
        return {
            row: self._errors[index]
            for row, index in enumerate(rows.tolist())
            if index in self._errors
        }


def _fresh(rows: int, width: int) -> Vectors:
    """An array of a call's own; a large one has pages of its own.

    They go back to the system as soon as the array is let go. What the heap of a thread gets back
    it keeps, and a stream has a dozen threads that each make one array after the other.
    """
    import mmap

    import numpy as np

    size = rows * width * np.dtype(np.float32).itemsize
    if size < _LARGE_BYTES:
        return np.empty((rows, width), dtype=np.float32)
    # Not shared: a child's changes must not be seen by its parent.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if hasattr(mmap, "MAP_PRIVATE") else None
    try:
        pages = mmap.mmap(-1, size) if private is None else mmap.mmap(-1, size, flags=private)
    except OSError as error:
        raise MemoryError(f"no memory for {rows:,} vectors of {width:,} dimensions") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.float32).reshape(rows, width)


def _is_same(room: Vectors, vectors: Vectors) -> bool:
    """Whether the provider has written the vectors where they belong."""
    return (
        vectors.shape == room.shape
        and vectors.ctypes.data == room.ctypes.data
        and vectors.strides == room.strides
    )


def _move_to_rows(vectors: Vectors, rows: NDArray[np.intp]) -> None:
    """Make row i what was at place ``rows[i]``, in place.

    Texts are numbered in the order of their first rows, so that no row is before its text's place:
    from the last row to the first, what is overwritten is needed no more.
    """
    import numpy as np

    ends = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
    for run in reversed(np.split(np.arange(len(rows)), ends)):
        if len(run) and rows[run[0]] >= 0 and rows[run[0]] != run[0]:
            first = rows[run[0]]
            vectors[run[0] : run[-1] + 1] = vectors[first : first + len(run)]


def _repeated(rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """True for each row whose text an earlier row had already."""
    import numpy as np

    repeated = np.ones(len(rows), dtype=np.bool_)
    repeated[np.unique(rows, return_index=True)[1]] = False
    return repeated


def _by_index(rows: Sequence[int]) -> dict[int, NDArray[np.intp]]:
    import numpy as np

    indices = np.asarray(rows, dtype=np.intp)
    order = np.argsort(indices, kind="stable")
    found, starts = np.unique(indices[order], return_index=True)
    parts = np.split(order, starts[1:]) if len(found) else []
    return dict(zip(found.tolist(), parts, strict=True))
