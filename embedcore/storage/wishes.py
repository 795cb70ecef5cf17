"""What batches wish for, counted and forgotten. Every function runs in the caller's transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedcore.storage import entries
from embedcore.storage.batchrecords import BatchRecord, Counts

if TYPE_CHECKING:
    import sqlite3


def counts_in(connection: sqlite3.Connection, batch: BatchRecord) -> Counts:
    """As ``Batches.counts``, inside a transaction."""
    row = connection.execute(
        "SELECT coalesce(sum(i.state = 'open' AND i.part IS NULL AND NOT i.stopped), 0), "
        "coalesce(sum(i.state = 'open' AND i.part IS NOT NULL), 0), "
        "coalesce(sum(i.state = 'stored'), 0), coalesce(sum(i.state IN ('failed', 'lost')), 0), "
        "coalesce(sum(i.state = 'open' AND i.part IS NULL AND i.stopped), 0) "
        "FROM wish w JOIN item i ON i.id = w.item WHERE w.batch = ?",
        (batch.id,),
    ).fetchone()
    return Counts(to_submit=row[0], in_flight=row[1], stored=row[2], failed=row[3], stopped=row[4])


def drop_batch(connection: sqlite3.Connection, identity: int) -> None:
    row = connection.execute("SELECT pool FROM batch WHERE id = ?", (identity,)).fetchone()
    if row is None:
        return
    release_money(connection, identity)
    connection.execute("DELETE FROM wish WHERE batch = ?", (identity,))
    # Another batch may get its number.
    connection.execute("UPDATE part SET batch = NULL WHERE batch = ?", (identity,))
    connection.execute("DELETE FROM batch WHERE id = ?", (identity,))
    drop_unwanted(connection, row[0])


def release_money(connection: sqlite3.Connection, identity: int) -> None:
    (grant,) = connection.execute('SELECT "grant" FROM batch WHERE id = ?', (identity,)).fetchone()
    if grant is not None:
        entries.close_grant(connection, grant)
        connection.execute('UPDATE batch SET "grant" = NULL WHERE id = ?', (identity,))


def drop_unwanted(connection: sqlite3.Connection, pool: int) -> None:
    connection.execute(
        "DELETE FROM item WHERE pool = ? AND part IS NULL "
        "AND NOT EXISTS (SELECT 1 FROM wish WHERE wish.item = item.id)",
        (pool,),
    )
