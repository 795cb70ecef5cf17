"""The vector cache on disk: paid vectors under the keys that decide them.

A vector of zeros says nothing of its text, and the next answer may be better: it is kept only for
the batch that paid for it and reads it from here (``zeros=True``), and is no hit for other calls.

The file is no ledger: without it everything is only dearer. At its cap it takes no more but
for a batch, which has its vectors nowhere else; nothing is thrown out to make room, since that
would be to pay for it again one day.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from embedcore.errors import StorageError, StorageFull
from embedcore.forksafe import Lock
from embedcore.storage.database import VECTORS as CONTENTS, Database
from embedcore.storage.keys import Origin
from embedcore.storage.schema import VECTORS, VECTORS_VERSION
from embedcore.storage.vector_format import PAGE_BYTES, delete_rows, of_expected_types, used_bytes

if TYPE_CHECKING:
    import sqlite3

    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Take = Callable[[Sequence[int], Vectors], None]
    Room = Callable[[Sequence[int]], Vectors | None]

DAY_SECONDS: Final = 86_400
_KEYS_PER_QUERY: Final = 500
# A cache that stays locked must not keep a call that could go on without it.
_BUSY_SECONDS: Final = 10.0
_ROW_OVERHEAD: Final = 130


class Looked(NamedTuple):
    """``there``: places in the keys that have a sound vector. ``damaged``: ids of bad rows."""

    there: set[int]
    damaged: list[int]


class VectorStore:
    """One file of vectors by key. Safe to share between threads and processes.

    Every method raises ``StorageError`` when the file cannot be used; nothing is half done then.
    ``cap``: bytes beyond which nothing is added but what a batch counts on. ``busy_timeout``:
    seconds to wait for others.
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
        self.database = Database(
            path,
            VECTORS,
            version=VECTORS_VERSION,
            timeout=busy_timeout,
            allow_network_filesystem=allow_network_filesystem,
            # Pruning can then give the space back, a little at a time.
            at_creation=(f"page_size={PAGE_BYTES}", "auto_vacuum=INCREMENTAL"),
            contents=CONTENTS,
        )
        self._lock = Lock()
        self._hits = self._misses = 0

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
        damaged: list[int] = []
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
        damaged: list[int] = []
        if not self.path.exists():
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
    ) -> Iterator[tuple[int, list[int], Vectors, list[int]]]:
        """A few hundred keys at a time: where they start, the places found, vectors, damaged rows.

        Where the width is not known, the first vector found decides it for all of them.
        """
        from embedcore.storage.vector_format import all_zero

        for start in range(0, len(keys), _KEYS_PER_QUERY):
            chunk = keys[start : start + _KEYS_PER_QUERY]
            places, vectors, bad = self._get(chunk, width, start, room)
            if places and width is None:
                width = vectors.shape[1]
            if places and not zeros and (useless := all_zero(vectors)).any():
                kept = (~useless).nonzero()[0]
                places, vectors = [places[one] for one in kept.tolist()], vectors[kept]
            yield start, places, vectors, bad

    def _get(
        self, keys: Sequence[bytes], width: int | None, start: int, room: Room | None
    ) -> tuple[list[int], Vectors, list[int]]:
        import numpy as np

        from embedcore.storage.vector_format import decode, is_intact

        marks = ",".join("?" * len(keys))
        with self.database.read() as connection:
            # Materialised at once: a cursor left open would hold back the checkpoint.
            rows = connection.execute(
                f"SELECT id, data, checksum, width, key FROM vector WHERE key IN ({marks})", keys
            ).fetchall()
        if not rows:
            return [], np.empty((0, 0), dtype=np.float32), []
        bad: list[int] = []
        # One by one only where it must be: without a known width, a damaged row might decide it.
        if width is None or not of_expected_types(rows):
            bad = [place for place, *row in rows if not is_intact(*row)]
        by_key = {row[-1]: row for row in rows if row[0] not in bad}
        places = [place for place, key in enumerate(keys) if key in by_key]
        if not places:
            return [], np.empty((0, 0), dtype=np.float32), bad
        ids, blobs, sums, widths, found = zip(*(by_key[keys[one]] for one in places), strict=True)
        into = None
        if room is not None and width is not None:
            into = room([start + place for place in places])
        vectors, sound = decode(blobs, sums, widths, found, width=width or max(widths), into=into)
        if sound.all():
            return places, vectors, bad
        bad += [ids[place] for place in np.flatnonzero(~sound).tolist()]
        kept = np.flatnonzero(sound)
        return [places[place] for place in kept.tolist()], vectors[kept], bad

    def put(
        self,
        keys: Sequence[bytes],
        vectors: Vectors,
        origin: Origin,
        *,
        keep_until: float = 0.0,
        zeros: bool = False,
    ) -> str | None:
        """Keep vector i under ``keys[i]``; what is there already stays as it is, but for zeros.

        ``keep_until``: seconds since 1970 before which ``prune`` leaves them alone: a batch counts
        on them, so that no cap keeps them out, only the disk. ``zeros``: also keep those that are
        all zeros. Returns the model's name in earlier replies, if it was another one than now.
        Raises ``StorageFull`` when they would pass the cap, or the disk is full; none of them is
        kept then.
        """
        from embedcore.storage.vector_format import all_zero, checksums, encode

        if not zeros and (useless := all_zero(vectors)).any():
            kept = (~useless).nonzero()[0]
            keys, vectors = [keys[one] for one in kept.tolist()], vectors[kept]
        if not len(keys):
            return None
        stored = encode(vectors)
        sums = checksums(stored, keys).tolist()
        today, until = self.today(), int(keep_until // DAY_SECONDS)
        with self.database.transaction() as connection:
            if not keep_until:
                self._require_room(connection, stored.nbytes + len(keys) * _ROW_OVERHEAD)
            place, before = self._origin(connection, origin)
            changes = connection.total_changes
            connection.executemany(
                "INSERT INTO vector (key, origin, stored, keep_until, width, checksum, data) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    (key, place, today, until, vectors.shape[1], one, row)
                    for key, one, row in zip(keys, sums, stored, strict=True)
                ),
            )
            added = connection.total_changes - changes
            if added < len(keys):
                self._replace_zeros(connection, keys, sums, stored, vectors.shape[1])
            connection.execute(
                "UPDATE origin SET vectors = vectors + ? WHERE id = ?", (added, place)
            )
            self._count(connection)
        return before

    def _replace_zeros(
        self,
        connection: sqlite3.Connection,
        keys: Sequence[bytes],
        sums: Sequence[int],
        stored: NDArray[Any],
        width: int,
    ) -> None:
        """A vector that says something takes the place of zeros that are there under its key."""
        connection.executemany(
            "UPDATE vector SET width = ?, checksum = ?, data = ? WHERE key = ? "
            "AND data = zeroblob(length(data))",
            ((width, one, row, key) for key, one, row in zip(keys, sums, stored, strict=True)),
        )

    def _require_room(self, connection: sqlite3.Connection, more: int) -> None:
        used = used_bytes(connection)
        if used + more > self.cap:
            raise StorageFull(
                f"{self.path} holds {used / 1e9:.2f} GB of at most {self.cap / 1e9:.2f} GB "
                "(cache_cap): raise the cap, or make room with `embedcore cache prune`"
            )

    def _origin(self, connection: sqlite3.Connection, origin: Origin) -> tuple[int, str | None]:
        name = (origin.model, origin.fingerprint, origin.input_type or "")
        answered = origin.answered_as or ""
        found = connection.execute(
            "SELECT id, answered_as FROM origin "
            "WHERE model = ? AND fingerprint = ? AND input_type = ?",
            name,
        ).fetchone()
        if found is None:
            place = connection.execute(
                "INSERT INTO origin (model, fingerprint, input_type, answered_as) "
                "VALUES (?, ?, ?, ?)",
                (*name, answered),
            ).lastrowid
            return int(place or 0), None
        place, before = found
        if not answered or before == answered:
            return place, None
        connection.execute("UPDATE origin SET answered_as = ? WHERE id = ?", (answered, place))
        return place, before or None

    def keep(self, keys: Iterable[bytes], until: float) -> None:
        """Pin what is there of these keys: it is not pruned before ``until``, in seconds."""
        day, names = int(until // DAY_SECONDS), iter(keys)
        while chunk := list(islice(names, _KEYS_PER_QUERY)):
            marks = ",".join("?" * len(chunk))
            with self.database.transaction() as connection:
                connection.execute(
                    f"UPDATE vector SET keep_until = ? WHERE key IN ({marks}) AND keep_until < ?",
                    (day, *chunk, day),
                )

    def drop(self, key: bytes) -> None:
        """Delete one vector that must not be used."""
        with self.database.transaction() as connection:
            row = connection.execute("SELECT id FROM vector WHERE key = ?", (key,)).fetchone()
            if row is not None:
                delete_rows(connection, row)

    @property
    def used(self) -> int:
        """Bytes in use."""
        with self.database.read() as connection:
            return used_bytes(connection)

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

    def _count(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            hits, misses, self._hits, self._misses = self._hits, self._misses, 0, 0
        if hits or misses:
            connection.execute(
                "INSERT INTO tally (day, hits, misses) VALUES (?, ?, ?) ON CONFLICT (day) "
                "DO UPDATE SET hits = hits + excluded.hits, misses = misses + excluded.misses",
                (self.today(), hits, misses),
            )

    def delete(self, ids: Sequence[int]) -> None:
        """Delete rows by their ids."""
        if ids:
            with self.database.transaction() as connection:
                delete_rows(connection, ids)

    def today(self) -> int:
        """Days since 1970, UTC."""
        return int(self._now() // DAY_SECONDS)
