"""The cache in segment files: an index in SQLite says where the vector of each key lies.

The vectors are down on the disk before the row that names them is: what is cut off at any moment
leaves bytes that no row names.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from embedcore.errors import StorageError
from embedcore.storage.database import VECTORS as CONTENTS, Database
from embedcore.storage.schema import VECTOR_INDEX
from embedcore.storage.segments import HEADER_BYTES, SEGMENT_BYTES, Segments, padded
from embedcore.storage.vector_format import checksums
from embedcore.storage.vector_table import (
    KEYS_PER_QUERY,
    NOTHING,
    ROWS_AT_ONCE,
    Damaged,
    Found,
    VectorTable,
    marks,
    of_types,
    pages_used,
)

if TYPE_CHECKING:
    import sqlite3

    from numpy.typing import NDArray

    from embedcore.storage.keys import Origin
    from embedcore.storage.vector_table import Room, Vectors

INDEX_FILE: Final = "index.db"
PAGE_BYTES: Final = 4096
_PLACE: Final = "id, key, segment, offset, width, itemsize, checksum"
_TYPES: Final = (int, bytes, int, int, int, int, int)
_KINDS: Final[dict[int, np.dtype[Any]]] = {2: np.dtype("<f2"), 4: np.dtype("<f4")}


class VectorIndex(VectorTable):
    """The index and the segments of one folder."""

    SIZE = "(width * itemsize + 7) / 8 * 8"

    def __init__(
        self, folder: Path, *, busy_timeout: float, allow_network_filesystem: bool = False
    ) -> None:
        self.path = folder / INDEX_FILE
        super().__init__(
            Database(
                self.path,
                VECTOR_INDEX,
                timeout=busy_timeout,
                allow_network_filesystem=allow_network_filesystem,
                # Pruning can then give the space back, a little at a time.
                at_creation=(f"page_size={PAGE_BYTES}", "auto_vacuum=INCREMENTAL"),
                contents=CONTENTS,
            )
        )
        # The program may change its directory later.
        self.segments = Segments(folder.absolute())

    @property
    def exists(self) -> bool:
        """Whether anything was ever kept in it."""
        return os.path.exists(self.path)  # noqa: PTH110 - asked at every look-up

    # Reading

    def get(self, keys: Sequence[bytes], width: int | None, room: Room | None) -> Found:
        found = self._read(keys, width, room)
        if not found.damaged:
            return found
        # Or was a segment compacted between the two steps? Then they lie elsewhere now.
        again = self._read(keys, width, None)
        return again._replace(damaged=[one for one in again.damaged if one in found.damaged])

    def _read(self, keys: Sequence[bytes], width: int | None, room: Room | None) -> Found:
        with self.database.read() as connection:
            rows = self.rows(connection, f"key IN ({marks(keys)})", keys)
        rows, damaged = _readable(rows)
        by_key = {row[1]: row for row in rows}
        places = [place for place, key in enumerate(keys) if key in by_key]
        if not places:
            return Found([], NOTHING, damaged)
        chosen = [by_key[keys[place]] for place in places]
        into = None
        if width is not None and room is not None:
            into = room(places)
        widths = [width] if width is not None else sorted({row[4] for row in chosen}, reverse=True)
        for one in widths:
            vectors, sound = self.vectors_of(chosen, one, into)
            if sound.all():
                return Found(places, vectors, damaged)
            if sound.any():
                break
        kept, bad = np.flatnonzero(sound), np.flatnonzero(~sound)
        damaged += [_damaged(chosen[place]) for place in bad.tolist()]
        return Found([places[place] for place in kept.tolist()], vectors[kept], damaged)

    def vectors_of(
        self, rows: Sequence[Any], width: int, into: Vectors | None = None
    ) -> tuple[Vectors, NDArray[np.bool_]]:
        """Vectors of shape (n, width), and which are as they were written, in that width.

        They are written to ``into`` where it is given and all of them are sound.
        """
        sound = np.zeros(len(rows), dtype=np.bool_)
        vectors = NOTHING
        *_, widths, sizes, sums = zip(*rows, strict=True)
        for itemsize, kind in _KINDS.items():
            # As nearly always: nothing is copied that need not be.
            every = widths.count(width) == sizes.count(itemsize) == len(rows)
            places = [
                place
                for place in range(0 if every else len(rows))
                if (widths[place], sizes[place]) == (width, itemsize)
            ]
            if not every and not places:
                continue
            chosen = rows if every else [rows[place] for place in places]
            direct = into if every and _as_in_file(into, itemsize) else None
            stored, fine = self.stored(chosen, width * itemsize, direct)
            if not fine.any():
                continue
            numbers: NDArray[Any] = stored[:, : width * itemsize].view(kind)
            expected = sums if every else [sums[place] for place in places]
            fine &= checksums(numbers, [row[1] for row in chosen]) == np.array(expected)
            if every:
                if into is not None and fine.all():
                    if direct is None:
                        np.copyto(into, numbers)
                    return into, fine
                return numbers.astype(np.float32, copy=False), fine
            if not vectors.size:
                vectors = np.zeros((len(rows), width), dtype=np.float32)
            vectors[places], sound[places] = numbers, fine
        return (vectors if vectors.size else np.zeros((len(rows), 0), dtype=np.float32)), sound

    def stored(
        self, rows: Sequence[Any], in_bytes: int, into: Vectors | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """What lies at the places of rows of one size, (n, bytes), and which could be read.

        ``into``: an array of rows of that size, as they lie in the file.
        """
        stride = padded(in_bytes)
        _, _, *places = zip(*rows, strict=True)
        segments, offsets = (np.array(column, dtype=np.int64) for column in places[:2])
        with self.segments.read() as reader:
            sizes = {number: reader.size(number) for number in set(segments.tolist())}
            ends = np.array([sizes[number] for number in segments.tolist()])
            # A damaged row may name any place, and any width: nothing is made that cannot be there.
            inside = (offsets >= HEADER_BYTES) & (offsets <= ends - stride)
            if not inside.all():
                return self._stored_singly(rows, in_bytes, inside)
            if into is None:
                raw = np.empty((len(rows), stride), dtype=np.uint8)
            else:
                raw = into.view(np.uint8)
            view = raw.data.cast("B")
            # Where they lie one after another they are read at once.
            breaks = (np.diff(offsets) != stride) | (np.diff(segments) != 0)
            starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
            for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
                reader.fill(rows[start][2], rows[start][3], view[start * stride : end * stride])
        return raw, inside

    def _stored_singly(
        self, rows: Sequence[Any], in_bytes: int, inside: NDArray[np.bool_]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The same where some cannot be read."""
        places = np.flatnonzero(inside)
        if not len(places):
            return np.empty((0, 0), dtype=np.uint8), inside
        some, fine = self.stored([rows[place] for place in places.tolist()], in_bytes)
        raw = np.zeros((len(rows), padded(in_bytes)), dtype=np.uint8)
        if len(some):
            raw[places] = some
        inside = inside.copy()
        inside[places] = fine
        return raw, inside

    # Writing

    def there(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """What it has of these keys: id, and whether it is all zeros."""
        found = {}
        for start in range(0, len(keys), KEYS_PER_QUERY):
            chunk = keys[start : start + KEYS_PER_QUERY]
            for key, *row in connection.execute(
                f"SELECT key, id, zeros FROM vector WHERE key IN ({marks(chunk)})", chunk
            ):
                found[key] = row
        return found

    def add(
        self,
        connection: sqlite3.Connection,
        keys: Sequence[bytes],
        stored: NDArray[Any],
        zeros: NDArray[np.bool_],
        *,
        origin: int,
        day: int,
        keep_until: int,
        beyond: bool = False,
    ) -> int:
        """Keep what ``Encoder`` returned, inside a transaction; returns how many are new.

        What is there stays as it is, but for zeros, which a vector that says something replaces.
        ``beyond``: as for ``append``.
        """
        known = self.there(connection, keys)
        new: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            before = zeros[new[key]] if key in new else known[key][1] if key in known else None
            if before is None or (before and not zeros[place]):
                new[key] = place
        self.delete_rows(connection, [known[key][0] for key in new if key in known])
        if not new:
            return 0
        places = list(new.values())
        if len(places) < len(keys):
            stored, zeros = stored[places], zeros[places]
        names = list(new)
        sums = checksums(stored, names).tolist()
        width, itemsize = stored.shape[1], stored.dtype.itemsize
        raw = _rows_of(stored)
        segment, offset = self.append(connection, raw, beyond=beyond)
        connection.executemany(
            "INSERT INTO vector (key, origin, segment, offset, width, itemsize, checksum, zeros, "
            "stored, keep_until) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (key, origin, segment, at, width, itemsize, one, zero, day, keep_until)
                for key, at, one, zero in zip(
                    names,
                    range(offset, offset + raw.nbytes, raw.shape[1]),
                    sums,
                    zeros.tolist(),
                    strict=True,
                )
            ],
        )
        connection.execute(
            "UPDATE origin SET vectors = vectors + ? WHERE id = ?", (len(names), origin)
        )
        return len(names)

    def append(
        self,
        connection: sqlite3.Connection,
        raw: NDArray[np.uint8],
        *,
        but: Collection[int] = (),
        beyond: bool = False,
    ) -> tuple[int, int]:
        """Write rows of bytes at the end, in no segment of ``but``; returns segment and offset.

        Inside a transaction: no other process writes there before it has ended. ``beyond``: in a
        segment of those that only batches count on, which the cap does not count.
        """
        last = connection.execute(
            "SELECT id, tail FROM segment WHERE beyond = ? ORDER BY id DESC LIMIT 1", (beyond,)
        ).fetchone()
        number, tail = (0, SEGMENT_BYTES) if last is None else last
        start = None
        if number not in but and tail < SEGMENT_BYTES:
            start = self.segments.append(number, tail, raw)
        if start is None:
            used = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'segment'")
            number = self.segments.create((used.fetchone() or (0,))[0])
            connection.execute(
                "INSERT INTO segment (id, tail, beyond) VALUES (?, ?, ?)",
                (number, HEADER_BYTES, beyond),
            )
            start = self.segments.append(number, HEADER_BYTES, raw)
            if start is None:
                raise StorageError(f"{self.segments.path(number)} was replaced while it was made")
        connection.execute("UPDATE segment SET tail = ? WHERE id = ?", (start + raw.nbytes, number))
        return number, start

    def origin(self, connection: sqlite3.Connection, origin: Origin) -> tuple[int, str | None]:
        """The number of an origin, made if it is not there: then no name was there before."""
        found = self.answered_as(connection, origin)
        if found is not None:
            return found
        name = (origin.model, origin.fingerprint, origin.input_type or "")
        number = connection.execute(
            "INSERT INTO origin (model, fingerprint, input_type, answered_as) VALUES (?, ?, ?, ?)",
            (*name, origin.answered_as or ""),
        ).lastrowid
        return int(number or 0), None

    # Upkeep

    def delete(self, damaged: Sequence[Damaged]) -> None:
        with self.database.transaction() as connection:
            self.delete_rows(
                connection,
                [
                    row.id
                    for row in damaged
                    if connection.execute(
                        "SELECT 1 FROM vector WHERE id = ? AND segment IS ? AND offset IS ?",
                        (row.id, row.segment, row.offset),
                    ).fetchone()
                ],
            )

    def checked(self) -> Iterator[tuple[int, list[Damaged]]]:
        last = 0
        while True:
            rows = self._after(last)
            if not rows:
                return
            bad = self.damaged_among(rows)
            if bad:
                # As in ``get``.
                again = self.damaged_among(self._after(last))
                bad = [one for one in again if one in bad]
            last = rows[-1][0]
            yield len(rows), bad

    def _after(self, last: int) -> list[Any]:
        with self.database.read() as connection:
            return self.rows(connection, "id > ? ORDER BY id LIMIT ?", (last, ROWS_AT_ONCE))

    def rows(
        self, connection: sqlite3.Connection, where: str, values: Sequence[object]
    ) -> list[Any]:
        """Id, key, segment, offset, width, itemsize and checksum of some rows."""
        # Materialised at once: a cursor left open would hold back the checkpoint.
        return connection.execute(f"SELECT {_PLACE} FROM vector WHERE {where}", values).fetchall()

    def damaged_among(self, rows: Sequence[Any]) -> list[Damaged]:
        """Those whose vectors are not as they were written, each in its own width."""
        rows, damaged = _readable(rows)
        for width in {row[4] for row in rows}:
            chosen = [row for row in rows if row[4] == width]
            _, sound = self.vectors_of(chosen, width)
            damaged += [_damaged(chosen[place]) for place in np.flatnonzero(~sound).tolist()]
        return damaged

    def tails(self, connection: sqlite3.Connection) -> dict[int, int]:
        """Segment → where it ends."""
        return dict(connection.execute("SELECT id, tail FROM segment").fetchall())

    def beyond(self, connection: sqlite3.Connection) -> dict[int, int]:
        """The same of those that the cap does not count."""
        return dict(connection.execute("SELECT id, tail FROM segment WHERE beyond").fetchall())

    def named(self, connection: sqlite3.Connection) -> dict[int, int]:
        """Segment → bytes of it that rows name. Takes as long as reading the whole index."""
        return dict(
            connection.execute(
                f"SELECT segment, sum({self.SIZE}) FROM vector GROUP BY segment"
            ).fetchall()
        )

    def outside(self, connection: sqlite3.Connection) -> int:
        return sum(self.named(connection).values()) + HEADER_BYTES * len(self.tails(connection))

    def used_in(self, connection: sqlite3.Connection) -> int:
        """Bytes in use on the disk: of the segments also what no row names any more."""
        return pages_used(connection) + sum(self.tails(connection).values())

    def capped_in(self, connection: sqlite3.Connection) -> int:
        """The same without what the cap does not count."""
        return self.used_in(connection) - sum(self.beyond(connection).values())

    @property
    def used(self) -> int:
        with self.database.read() as connection:
            return self.used_in(connection)


def _readable(rows: Sequence[Any]) -> tuple[list[Any], list[Damaged]]:
    """A damaged file can hold what its columns forbid."""
    columns = list(zip(*rows, strict=True))
    if all(
        {*map(type, column)} == {kind} for column, kind in zip(columns, _TYPES, strict=bool(rows))
    ) and (not rows or (min(columns[4]) > 0 and _KINDS.keys() >= {*columns[5]})):
        return list(rows), []
    bad = [row for row in rows if not _is_row(row)]
    return [row for row in rows if _is_row(row)], list(map(_damaged, bad))


def _is_row(row: Sequence[Any]) -> bool:
    return of_types(row, _TYPES) and row[4] > 0 and row[5] in _KINDS


def _as_in_file(into: Vectors | None, itemsize: int) -> bool:
    """Whether the rows of an array have the form of those of a segment."""
    return (
        into is not None
        and itemsize == into.itemsize
        and into.flags.c_contiguous
        and padded(into.shape[1] * itemsize) == into.shape[1] * itemsize
    )


def _damaged(row: Any) -> Damaged:
    return Damaged(False, row[0], row[2], row[3])


def _rows_of(stored: NDArray[Any]) -> NDArray[np.uint8]:
    """As bytes, each row as long as it lies in the file."""
    raw = stored.view(np.uint8).reshape(len(stored), -1)
    rest = padded(raw.shape[1]) - raw.shape[1]
    return np.pad(raw, ((0, 0), (0, rest))) if rest else raw
