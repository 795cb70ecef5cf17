"""Giving back the space of segments whose vectors are gone.

Rows that are deleted leave their bytes in a segment. A segment that no row names goes. Of one that
is mostly such bytes the others are copied, and it goes. In the rest they are made zeros. Each step
is whole, and what a kill leaves is done by the next run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from embedcore.storage.segments import HEADER_BYTES, padded
from embedcore.storage.vector_table import KEYS_PER_QUERY, ROWS_AT_ONCE, marks

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.vector_index import VectorIndex

# With less than that share of it in use, a segment is copied.
_SPARSE: Final = 0.5


def compact(index: VectorIndex, down_to: int | None = None) -> None:
    """Give back what no row names. ``down_to``: bytes, for which also fuller segments are copied.

    Readers and writers go on meanwhile, save for the length of one transaction.
    """
    _take_stock(index)
    sparse, beyond = _sparse(index, down_to)
    if sparse:
        _move(index, sparse - beyond, beyond=False)
        _move(index, sparse & beyond, beyond=True)
        _take_stock(index)
    _erase_gaps(index)


def let_go(
    index: VectorIndex,
    keys: Iterable[Sequence[bytes]],
    needed: Callable[[Sequence[bytes]], Collection[bytes]],
) -> int:
    """Delete what of these lies in segments beyond the cap, save what is ``needed``; returns how
    many vectors. Segments of which nothing is left go.

    ``needed`` is asked while nothing can be written: who counts on a vector says so, pins it, and
    looks whether it is there, in this order.
    """
    deleted = 0
    with index.database.read() as connection:
        if not index.beyond(connection):
            return 0
    for some in keys:
        for start in range(0, len(some), KEYS_PER_QUERY):
            deleted += _let_go_some(index, some[start : start + KEYS_PER_QUERY], needed)
    if deleted:
        _take_stock(index)
    return deleted


def _let_go_some(
    index: VectorIndex,
    keys: Sequence[bytes],
    needed: Callable[[Sequence[bytes]], Collection[bytes]],
) -> int:
    with index.database.transaction() as connection:
        rows = connection.execute(
            "SELECT v.id, v.key FROM vector v JOIN segment s ON s.id = v.segment "
            f"WHERE s.beyond AND v.key IN ({marks(keys)})",
            keys,
        ).fetchall()
        if not rows:
            return 0
        others = needed([key for _, key in rows])
        connection.execute("PRAGMA secure_delete = ON").fetchall()
        count, _ = index.delete_rows(connection, [one for one, key in rows if key not in others])
        connection.execute("PRAGMA incremental_vacuum").fetchall()
    return count


def _take_stock(index: VectorIndex) -> None:
    """Forget segments that no row names, and count what was cut off behind the tails of others.

    Files are deleted after the commit: until then one of a process that was killed can come back
    and name them. What is behind a tail from then on is of a later one, and stays.
    """
    with index.database.transaction() as connection:
        named = index.named(connection)
        known = index.tails(connection)
        for number, tail in list(known.items()):
            if number in named:
                end = max(tail, padded(index.segments.size(number)))
                connection.execute("UPDATE segment SET tail = ? WHERE id = ?", (end, number))
            else:
                connection.execute("DELETE FROM segment WHERE id = ?", (number,))
                del known[number]
        unknown = index.segments.others(known)
        if unknown:
            # A commit that changes nothing is none.
            connection.execute("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'segment'")
    index.segments.remove(unknown)


def _sparse(index: VectorIndex, down_to: int | None) -> tuple[set[int], set[int]]:
    """The segments that are worth copying, and those that the cap does not count."""
    with index.database.read() as connection:
        named, tails = index.named(connection), index.tails(connection)
        beyond = set(index.beyond(connection))
        used = index.used_in(connection)
        shares = sorted(
            (named.get(number, 0) / max(tail - HEADER_BYTES, 1), number)
            for number, tail in tails.items()
        )
    chosen = set()
    for share, number in shares:
        gaps = tails[number] - HEADER_BYTES - named.get(number, 0)
        if share < _SPARSE or (down_to is not None and used > down_to and gaps > 0):
            chosen.add(number)
            used -= gaps
    return chosen, beyond


def _move(index: VectorIndex, sparse: Collection[int], *, beyond: bool) -> None:
    """Copy what lies in these to the end of others of their kind."""
    last: int | None = 0 if sparse else None
    while last is not None:
        with index.database.transaction() as connection:
            last = _move_some(index, connection, sparse, last, beyond=beyond)


def _move_some(
    index: VectorIndex,
    connection: sqlite3.Connection,
    sparse: Collection[int],
    last: int,
    *,
    beyond: bool,
) -> int | None:
    """Copy the next rows; returns the last of them, or None if there were none."""
    rows = index.rows(
        connection,
        f"segment IN ({marks(list(sparse))}) AND id > ? ORDER BY id LIMIT {ROWS_AT_ONCE}",
        (*sparse, last),
    )
    if not rows:
        return None
    bad = {one.id for one in index.damaged_among(rows)}
    index.delete_rows(connection, list(bad))
    sound = [row for row in rows if row[0] not in bad]
    for in_bytes, group in groupby(sound, key=_bytes_of):
        chosen = list(group)
        raw, _ = index.stored(chosen, in_bytes)
        segment, offset = index.append(connection, raw, but=sparse, beyond=beyond)
        connection.executemany(
            "UPDATE vector SET segment = ?, offset = ? WHERE id = ?",
            [(segment, offset + at * raw.shape[1], row[0]) for at, row in enumerate(chosen)],
        )
    return int(rows[-1][0])


def _bytes_of(row: Any) -> int:
    return int(row[4] * row[5])


def _erase_gaps(index: VectorIndex) -> None:
    """What no row names is not to be read in a file that stays."""
    with index.database.read() as connection:
        named, tails = index.named(connection), index.tails(connection)
    for number, tail in tails.items():
        # A new row never lies before the tail, so that no lock is needed.
        if named.get(number, 0) < tail - HEADER_BYTES:
            index.segments.erase(number, _gaps(index, number, tail))


def _gaps(index: VectorIndex, number: int, tail: int) -> Iterator[tuple[int, int]]:
    """Between the rows of a segment: from where to where, up to its tail."""
    with index.database.read() as connection:
        rows = connection.execute(
            f"SELECT offset, {index.SIZE} FROM vector WHERE segment = ?", (number,)
        ).fetchall()
        places = np.array(rows, dtype=np.int64).reshape(-1, 2)
    places = places[places[:, 0].argsort()]
    ends = np.maximum.accumulate(np.concatenate([[HEADER_BYTES], places.sum(axis=1)]))
    starts = np.concatenate([places[:, 0], [tail]])
    for gap in np.flatnonzero(starts > ends).tolist():
        yield int(ends[gap]), int(starts[gap])
