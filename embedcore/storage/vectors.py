"""The vector cache on disk: paid vectors under the keys that decide them.

New vectors go into the segments of a folder (``vector_index``). What was kept before lies in one
file beside it (``old_vectors``): it is looked up there second, until it is moved by hand.

A vector of zeros says nothing of its text, and the next answer may be better: it is kept only for
the batch that paid for it and reads it from here (``zeros=True``), and is no hit for other calls.

The cache is no ledger: without it everything is only dearer. At its cap it takes no more; nothing
is thrown out to make room, since that would be to pay for it again one day. What a batch brings
then, which is nowhere else, lies in segments of its own until the output of the batch is complete.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from embedcore.errors import StorageError, StorageFull
from embedcore.forksafe import Lock
from embedcore.storage.claims import Claims
from embedcore.storage.keys import Origin
from embedcore.storage.old_vectors import Known, OldVectors
from embedcore.storage.vector_compaction import let_go
from embedcore.storage.vector_format import Encoder, all_zero
from embedcore.storage.vector_index import VectorIndex
from embedcore.storage.vector_table import (
    KEYS_PER_QUERY,
    NOTHING,
    Damaged,
    Found,
    VectorTable,
)

if TYPE_CHECKING:
    import sqlite3

    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Take = Callable[[Sequence[int], Vectors], None]
    Room = Callable[[Sequence[int]], Vectors | None]

Answer = TypeVar("Answer")

DAY_SECONDS: Final = 86_400
# A cache that stays locked must not keep a call that could go on without it.
_BUSY_SECONDS: Final = 10.0
_ROW_OVERHEAD: Final = 130


class Looked(NamedTuple):
    """``there``: places in the keys that have a sound vector. ``damaged``: bad rows."""

    there: set[int]
    damaged: list[Damaged]


class VectorStore:
    """One folder of vectors by key. Safe to share between threads and processes.

    Every method raises ``StorageError`` when it cannot be used; nothing is half done then.
    ``path``: the folder; a file ``<path>.db`` beside it is what was kept before. ``cap``: bytes
    beyond which nothing is added but what a batch counts on, for as long as it does.
    ``busy_timeout``: seconds to wait for others.
    """

    def __init__(
        self,
        path: Path,
        *,
        cap: int,
        allow_network_filesystem: bool = False,
        busy_timeout: float = _BUSY_SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.cap = cap
        self._now = now
        self.index = VectorIndex(
            path, busy_timeout=busy_timeout, allow_network_filesystem=allow_network_filesystem
        )
        self.old = OldVectors(
            path.with_name(f"{path.name}.db"),
            busy_timeout=busy_timeout,
            allow_network_filesystem=allow_network_filesystem,
        )
        self.database = self.index.database
        self.claims = Claims(self.database, now=now)
        self._lock = Lock()
        self._encoder = Encoder()
        self._hits = self._misses = 0

    @property
    def files(self) -> list[Path]:
        """The SQLite files of it that are there, the old one first."""
        both = [self.old.path, self.index.path]
        return [path for path in both if os.path.lexists(path)]

    def tables(self) -> list[VectorTable]:
        """What it consists of, the oldest first."""
        return [self.old, self.index] if self.has_old else [self.index]

    @property
    def has_old(self) -> bool:
        """Whether there is a file of what was kept before."""
        # Asked at every look-up.
        return os.path.exists(self.old.path)  # noqa: PTH110

    def in_old(self, ask: Callable[[], Answer], otherwise: Answer) -> Answer:
        """What ``ask`` finds in the old file, or ``otherwise`` where that is not there, or goes."""
        if not self.has_old:
            return otherwise
        try:
            return ask()
        except StorageError:
            # Its vectors have been moved meanwhile.
            if self.has_old:
                raise
            self.old.database.close()
            return otherwise

    def get(
        self,
        keys: Sequence[bytes],
        width: int | None,
        take: Take,
        *,
        room: Room | None = None,
        zeros: bool = False,
    ) -> int:
        """Give ``take`` what is there: places in ``keys``, ascending, and float32 (m, d).

        Called once for every few hundred keys, so that memory stays small. A row that is damaged
        or of another width is no hit and is deleted. Returns how many of those there were.
        ``room(places)``: an array that their vectors may be written to, or None. ``zeros``: also
        those that are all zeros.
        """
        damaged: list[Damaged] = []
        hits = 0
        for start, places, vectors, bad in self._chunks(keys, width, room, zeros=zeros):
            if places:
                take([start + place for place in places], vectors)
            hits += len(places)
            damaged += bad
        with self._lock:
            self._hits += hits
            self._misses += len(keys) - hits
        self.delete(damaged)
        return len(damaged)

    def look(self, keys: Sequence[bytes], width: int | None) -> Looked:
        """Which of these keys ``get`` would give a vector for. Changes nothing.

        Every vector is read and checked as ``get`` does it: a damaged one does not show otherwise.
        """
        there: set[int] = set()
        damaged: list[Damaged] = []
        if not self.files:
            return Looked(there=there, damaged=damaged)
        for start, places, _, bad in self._chunks(keys, width, None):
            there.update(start + place for place in places)
            damaged += bad
        return Looked(there=there, damaged=damaged)

    def _chunks(
        self,
        keys: Sequence[bytes],
        width: int | None,
        room: Room | None,
        *,
        zeros: bool = False,
    ) -> Iterator[tuple[int, list[int], Vectors, list[Damaged]]]:
        """A few hundred keys at a time: where they start, the places found, vectors, damaged rows.

        Where the width is not known, the first vector found decides it for all of them.
        """
        for start in range(0, len(keys), KEYS_PER_QUERY):
            chunk = keys[start : start + KEYS_PER_QUERY]
            places, vectors, bad = self._get(chunk, width, start, room)
            if places and width is None:
                width = vectors.shape[1]
            if places and not zeros and (useless := all_zero(vectors)).any():
                kept = (~useless).nonzero()[0]
                places, vectors = [places[one] for one in kept.tolist()], vectors[kept]
            yield start, places, vectors, bad

    def _get(
        self, keys: Sequence[bytes], width: int | None, start: int, room: Room | None
    ) -> Found:
        """From the segments, and what is not there from the old file."""

        def within(places: Sequence[int]) -> Vectors | None:
            return None if room is None else room([start + place for place in places])

        found = Found([], NOTHING, [])
        # Else to look something up would make it.
        if not self.has_old or self.index.exists:
            found = self.index.get(keys, width, within)
        if len(found.places) == len(keys) or not self.has_old:
            return found
        there = set(found.places)
        rest = [place for place in range(len(keys)) if place not in there]
        if there and width is None:
            width = found.vectors.shape[1]
        more = self.in_old(
            lambda: self.old.get(
                [keys[place] for place in rest],
                width,
                lambda places: None if there else within([rest[place] for place in places]),
            ),
            Found([], NOTHING, []),
        )
        return _together(found, more._replace(places=[rest[place] for place in more.places]))

    def put(
        self,
        keys: Sequence[bytes],
        vectors: Vectors,
        origin: Origin,
        *,
        keep_until: float = 0.0,
        zeros: bool = False,
        to_stay: bool = True,
    ) -> str | None:
        """Keep vector i under ``keys[i]``; what is there already stays as it is, but for zeros.

        ``keep_until``: seconds since 1970 before which ``prune`` leaves them alone: a batch counts
        on them, so that no cap keeps them out, only the disk. What would pass the cap, or is not
        ``to_stay``, is there until ``let_go``. ``zeros``: also keep those that are all zeros.
        Returns the model's name in earlier replies, if it was another one than now. Raises
        ``StorageFull`` when they would pass the cap, or the disk is full; none of them is kept
        then.
        """
        useless = all_zero(vectors)
        if not zeros and useless.any():
            kept = (~useless).nonzero()[0].tolist()
            keys, vectors, useless = [keys[one] for one in kept], vectors[kept], useless[kept]
        if not len(keys):
            return None
        said = [key for key, nothing in zip(keys, useless.tolist(), strict=True) if not nothing]
        known = self.in_old(lambda: self.old.known(keys, origin), Known(set(), set(), 0, ""))
        if known.vectors or known.zeros:
            kept = [
                place
                for place, key in enumerate(keys)
                if key not in known.vectors and not (useless[place] and key in known.zeros)
            ]
            keys, vectors, useless = [keys[one] for one in kept], vectors[kept], useless[kept]
        today, until = self.today(), int(keep_until // DAY_SECONDS)
        with self.database.transaction() as connection:
            # By one thread at a time, as the encoder must be used.
            stored = self._encoder.encode(vectors)
            more = known.used + stored.nbytes + len(keys) * _ROW_OVERHEAD
            used = self.index.capped_in(connection) + more
            if used > self.cap and not keep_until and len(keys):
                raise self._full(used)
            place, before = self._origin(connection, origin, known)
            self.index.add(
                connection,
                keys,
                stored,
                useless,
                origin=place,
                day=today,
                keep_until=until,
                beyond=used > self.cap or not to_stay,
            )
            self.claims.kept(connection, said)
            self._count(connection)
        self.claims.forget(said)
        for key in known.zeros.intersection(keys):
            self.in_old(partial(self.old.drop, key), None)
        return before

    def _full(self, used: int) -> StorageFull:
        return StorageFull(
            f"{self.path} would hold {used / 1e9:.2f} GB of at most {self.cap / 1e9:.2f} GB "
            "(cache_cap): raise the cap, or make room with `embedcore cache prune`"
        )

    def _origin(
        self, connection: sqlite3.Connection, origin: Origin, known: Known
    ) -> tuple[int, str | None]:
        """The number of an origin, and the name in earlier replies if it was another one."""
        place, before = self.index.origin(connection, origin)
        answered, before = origin.answered_as, known.answered_as if before is None else before
        if not answered or before == answered:
            return place, None
        connection.execute("UPDATE origin SET answered_as = ? WHERE id = ?", (answered, place))
        return place, before or None

    def keep(self, keys: Iterable[bytes], until: float) -> None:
        """Pin what is there of these keys: it is not pruned before ``until``, in seconds."""
        day, names = int(until // DAY_SECONDS), iter(keys)
        while chunk := list(islice(names, KEYS_PER_QUERY)):
            self.index.keep(chunk, day)
            self.in_old(partial(self.old.keep, chunk, day), None)

    def let_go(
        self,
        keys: Iterable[Sequence[bytes]],
        needed: Callable[[Sequence[bytes]], Collection[bytes]],
    ) -> int:
        """Delete what of these is kept beyond the cap, save what other batches ``needed``."""
        return let_go(self.index, keys, needed)

    def drop(self, key: bytes) -> None:
        """Delete one vector that must not be used."""
        self.index.drop(key)
        self.in_old(partial(self.old.drop, key), None)

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self.index.used + self.in_old(lambda: self.old.used, 0)

    @property
    def room(self) -> int:
        """Bytes that are left below the cap; negative where it was lowered."""
        with self.database.read() as connection:
            used = self.index.capped_in(connection)
        return self.cap - used - self.in_old(lambda: self.old.used, 0)

    def flush(self) -> None:
        """Write down the counts of hits and misses that are only in memory."""
        if self._hits or self._misses:
            with self.database.transaction() as connection:
                self._count(connection)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        # Statistics: not worth an error at the end.
        with contextlib.suppress(StorageError):
            self.flush()
        self.database.close()
        self.old.database.close()

    def _count(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            hits, misses, self._hits, self._misses = self._hits, self._misses, 0, 0
        if hits or misses:
            self.index.add_to_tally(connection, [(self.today(), hits, misses)])

    def delete(self, damaged: Sequence[Damaged]) -> None:
        """Delete rows that are damaged."""
        old = [row for row in damaged if row.is_old]
        if len(old) < len(damaged):
            self.index.delete([row for row in damaged if not row.is_old])
        if old:
            self.in_old(lambda: self.old.delete(old), None)

    def today(self) -> int:
        """Days since 1970, UTC."""
        return int(self._now() // DAY_SECONDS)


def _together(found: Found, more: Found) -> Found:
    """Both, in the order of their places."""
    damaged = found.damaged + more.damaged
    if not more.places or not found.places:
        return (more if more.places else found)._replace(damaged=damaged)
    import numpy as np

    places = np.array(found.places + more.places)
    order = places.argsort()
    vectors = np.concatenate([found.vectors, more.vectors])[order]
    return Found(places[order].tolist(), vectors, damaged)
