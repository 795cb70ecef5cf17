"""The rows and pages of the file of bought vectors, inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import sqlite3

# Of the sizes that SQLite has, the one at which a vector of 1,536 wastes least: 6.6 kB for 6.1.
PAGE_BYTES: Final = 32_768


def of_expected_types(rows: Sequence[tuple[object, ...]]) -> bool:
    """A damaged file can hold what its columns forbid."""
    _, blobs, sums, widths, keys = zip(*rows, strict=True)
    numbers, texts = {*map(type, sums), *map(type, widths)}, {*map(type, blobs), *map(type, keys)}
    return numbers == {int} and texts == {bytes}


def used_bytes(connection: sqlite3.Connection) -> int:
    """What is in use of the file, without the pages that are free for reuse."""
    pages, free = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count")
    )
    return (pages - free) * PAGE_BYTES


def delete_rows(connection: sqlite3.Connection, ids: Sequence[int]) -> int:
    """Delete rows, inside a transaction, and count them off their origins."""
    gone = 0
    for one in ids:
        origin = connection.execute(
            "DELETE FROM vector WHERE id = ? RETURNING origin", (one,)
        ).fetchone()
        if origin is not None:
            gone += 1
            connection.execute(
                "UPDATE origin SET vectors = max(vectors - 1, 0) WHERE id = ?", origin
            )
    return gone
