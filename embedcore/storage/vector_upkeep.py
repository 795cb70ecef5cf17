"""Pruning, compacting and checking the vector cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from embedcore.storage.vector_format import delete_rows, used_bytes
from embedcore.storage.vectors import DAY_SECONDS, VectorStore

if TYPE_CHECKING:
    import sqlite3


# No other process can write while these are deleted.
_ROWS_AT_ONCE: Final = 200
# Later than every day that is counted.
_NO_DAY: Final = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What is in a cache. ``used`` and ``cap`` in bytes; ``vectors``: model → how many.

    ``hits`` and ``misses``: texts looked up since the cache was made.
    """

    used: int = 0
    cap: int = 0
    vectors: Mapping[str, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0


def contents(store: VectorStore) -> Contents:
    """What is in it now, and how often it was asked."""
    store.flush()
    with store.database.read() as connection:
        models = connection.execute(
            "SELECT model, sum(vectors) FROM origin GROUP BY model ORDER BY model"
        ).fetchall()
        hits, misses = connection.execute(
            "SELECT coalesce(sum(hits), 0), coalesce(sum(misses), 0) FROM tally"
        ).fetchone()
        used = used_bytes(connection)
    return Contents(used=used, cap=store.cap, vectors=dict(models), hits=hits, misses=misses)


def prune(
    store: VectorStore,
    *,
    older_than: float = 0.0,
    model: str | None = None,
    down_to: int | None = None,
    even_needed: bool = False,
) -> int:
    """Delete vectors, the oldest first, and give their space back. Returns how many.

    ``older_than``: stored at least that many seconds ago, counted in whole days; ``model``: only
    those of that ``provider:model``; ``down_to``: no more than needed to use so many bytes. Pinned
    vectors stay, unless ``even_needed``. Others can read and write between its small transactions.
    """
    stored_by, pinned_by = _days(store, older_than, even_needed)
    deleted = 0
    while True:
        with store.database.transaction() as connection:
            # Else a vector can still be read where the file is free.
            connection.execute("PRAGMA secure_delete = ON").fetchall()
            if down_to is not None and used_bytes(connection) <= down_to:
                return deleted
            ids = _oldest(connection, stored_by, pinned_by, model)
            deleted += delete_rows(connection, ids)
            # Materialised: the pragma frees one page with each row that is fetched.
            connection.execute("PRAGMA incremental_vacuum").fetchall()
        if not ids:
            return deleted


def prunable(
    store: VectorStore,
    *,
    older_than: float = 0.0,
    model: str | None = None,
    down_to: int | None = None,
    even_needed: bool = False,
) -> dict[str, int]:
    """Model → how many vectors ``prune`` would delete now; with ``down_to`` about so many.

    Takes as long as reading the whole file.
    """
    stored_by, pinned_by = _days(store, older_than, even_needed)
    with store.database.read() as connection:
        excess = None if down_to is None else max(used_bytes(connection) - down_to, 0)
        found = connection.execute(
            "SELECT model, count(*) FROM ("
            "SELECT model, sum(length(data)) OVER (ORDER BY vector.id) - length(data) AS before "
            "FROM vector JOIN origin ON origin.id = vector.origin "
            "WHERE stored <= ?1 AND keep_until < ?2 AND (?3 IS NULL OR model = ?3)"
            ") WHERE ?4 IS NULL OR before < ?4 GROUP BY model ORDER BY model",
            (stored_by, pinned_by, model, excess),
        )
        return dict(found.fetchall())


def _days(store: VectorStore, older_than: float, even_needed: bool) -> tuple[int, int]:
    """Stored by which day, and pinned for no longer than which, a vector may go."""
    today = store.today()
    return today - int(older_than // DAY_SECONDS), _NO_DAY if even_needed else today


def _oldest(
    connection: sqlite3.Connection, stored_by: int, pinned_by: int, model: str | None
) -> list[int]:
    found = connection.execute(
        "SELECT vector.id FROM vector JOIN origin ON origin.id = vector.origin "
        "WHERE stored <= ?1 AND keep_until < ?2 AND (?3 IS NULL OR model = ?3) "
        "ORDER BY vector.id LIMIT ?4",
        (stored_by, pinned_by, model, _ROWS_AT_ONCE),
    )
    return [row[0] for row in found.fetchall()]


def verify(store: VectorStore) -> Iterator[tuple[int, int]]:
    """Read every vector; what is damaged is deleted. Yields how many were read and damaged."""
    from embedcore.storage.vector_format import is_intact

    last = seen = damaged = 0
    while True:
        with store.database.read() as connection:
            rows = connection.execute(
                "SELECT id, data, checksum, width, key FROM vector WHERE id > ? "
                "ORDER BY id LIMIT ?",
                (last, _ROWS_AT_ONCE),
            ).fetchall()
        if not rows:
            return
        bad = [place for place, *row in rows if not is_intact(*row)]
        store.delete(bad)
        last, seen, damaged = rows[-1][0], seen + len(rows), damaged + len(bad)
        yield seen, damaged
