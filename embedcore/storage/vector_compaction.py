"""Giving back the space of segments whose vectors are gone.

Rows that are deleted leave their bytes in a segment. A segment that no row names goes. Of one that
is mostly such bytes the others are copied, and it goes. In the rest they are made zeros. Each step
is whole, and what a kill leaves is done by the next run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from embedcore.storage.segments import HEADER_BYTES, padded
from embedcore.storage.vector_table import ROWS_AT_ONCE, marks

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
    sparse = _sparse(index, down_to)
    if sparse:
        _move(index, sparse)
        _take_stock(index)
    _erase_gaps(index)


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


def _sparse(index: VectorIndex, down_to: int | None) -> set[int]:
    """The segments that are worth copying, those with the largest share of gaps first."""
    with index.database.read() as connection:
        named, tails = index.named(connection), index.tails(connection)
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
    return chosen


def _move(index: VectorIndex, sparse: Collection[int]) -> None:
    """Copy what lies in these to the end of others."""
    last: int | None = 0
    while last is not None:
        with index.database.transaction() as connection:
            last = _move_some(index, connection, sparse, last)


def _move_some(
    index: VectorIndex, connection: sqlite3.Connection, sparse: Collection[int], last: int
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
        segment, offset = index.append(connection, raw, but=sparse)
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
