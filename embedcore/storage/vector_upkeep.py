"""Pruning and checking the vector cache, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from embedcore.storage.vector_compaction import compact
from embedcore.storage.vector_table import ROWS_AT_ONCE, VectorTable, pages_used
from embedcore.storage.vectors import DAY_SECONDS, VectorStore

if TYPE_CHECKING:
    import sqlite3


# Later than every day that is counted.
_NO_DAY: Final = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What is in a cache. ``used`` and ``cap`` in bytes; ``vectors``: model → how many.

    ``hits`` and ``misses``: texts looked up since the cache was made. ``not_moved``: vectors that
    are in the old file; None: there is no such file.
    """

    used: int = 0
    cap: int = 0
    vectors: Mapping[str, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    not_moved: int | None = None


def contents(store: VectorStore) -> Contents:
    """What is in it now, and how often it was asked."""
    store.flush()
    vectors: Counter[str] = Counter()
    used = hits = misses = 0
    not_moved = None
    for table in store.tables():
        models, (found, missed) = table.models(), table.tally()
        vectors.update(models)
        used, hits, misses = used + table.used, hits + found, misses + missed
        if table is store.old:
            not_moved = sum(models.values())
    return Contents(
        used=used,
        cap=store.cap,
        vectors=dict(sorted(vectors.items())),
        hits=hits,
        misses=misses,
        not_moved=not_moved,
    )


class _Rule(NamedTuple):
    """Which vectors may go: stored by a day, pinned for no longer than another, of a model."""

    stored_by: int
    pinned_by: int
    model: str | None


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
    rule = _rule(store, older_than, model, even_needed)
    deleted = 0
    for table in store.tables():
        others = sum(other.needed for other in store.tables() if other is not table)
        deleted += _prune(table, rule, None if down_to is None else down_to - others)
    compact(store.index, None if down_to is None else down_to - store.used + store.index.used)
    return deleted


def _prune(table: VectorTable, rule: _Rule, down_to: int | None) -> int:
    deleted = outside = 0
    if down_to is not None:
        with table.database.read() as connection:
            outside = table.outside(connection)
    while True:
        with table.database.transaction() as connection:
            # Else a vector can still be read where the file is free.
            connection.execute("PRAGMA secure_delete = ON").fetchall()
            if down_to is not None and pages_used(connection) + outside <= down_to:
                return deleted
            ids = _oldest(connection, rule)
            count, freed = table.delete_rows(connection, ids)
            deleted, outside = deleted + count, max(outside - freed, 0)
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
    rule = _rule(store, older_than, model, even_needed)
    tables = store.tables()
    excess = None
    if down_to is not None:
        excess = max(sum(table.needed for table in tables) - down_to, 0)
    going: Counter[str] = Counter()
    for table in tables:
        with table.database.read() as connection:
            found = connection.execute(
                "SELECT model, count(*), sum(size) FROM ("
                "SELECT model, size, sum(size) OVER (ORDER BY id) - size AS before FROM ("
                f"SELECT model, vector.id AS id, {table.SIZE} AS size "
                "FROM vector JOIN origin ON origin.id = vector.origin "
                "WHERE stored <= ?1 AND keep_until < ?2 AND (?3 IS NULL OR model = ?3)"
                ")) WHERE ?4 IS NULL OR before < ?4 GROUP BY model",
                (*rule, excess),
            ).fetchall()
        for name, count, size in found:
            going[name] += count
            excess = None if excess is None else max(excess - size, 0)
    return dict(sorted(going.items()))


def _rule(store: VectorStore, older_than: float, model: str | None, even_needed: bool) -> _Rule:
    today = store.today()
    return _Rule(today - int(older_than // DAY_SECONDS), _NO_DAY if even_needed else today, model)


def _oldest(connection: sqlite3.Connection, rule: _Rule) -> list[int]:
    found = connection.execute(
        "SELECT vector.id FROM vector JOIN origin ON origin.id = vector.origin "
        "WHERE stored <= ?1 AND keep_until < ?2 AND (?3 IS NULL OR model = ?3) "
        "ORDER BY vector.id LIMIT ?4",
        (*rule, ROWS_AT_ONCE),
    )
    return [row[0] for row in found.fetchall()]


def verify(store: VectorStore) -> Iterator[tuple[int, int]]:
    """Read every vector; what is damaged is deleted. Yields how many were read and damaged."""
    seen = damaged = 0
    for table in store.tables():
        for count, bad in table.checked():
            store.delete(bad)
            seen, damaged = seen + count, damaged + len(bad)
            yield seen, damaged
