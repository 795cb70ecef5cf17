"""The texts of batches that are bought at once instead of in a job. Each step is a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedcore.storage.batchrecords import BatchRecord
    from embedcore.storage.database import Database


class Drains:
    """What ``Batches`` adds to itself for them."""

    database: Database

    def drain(self, batch: BatchRecord) -> None:
        """From now on nothing of it is put into a job; its jobs are wanted by it no more."""
        with self.database.transaction() as connection:
            connection.execute("UPDATE batch SET draining = 1 WHERE id = ?", (batch.id,))

    def open_tokens(self, batch: BatchRecord) -> int:
        """Tokens of the texts that have no outcome yet, and wait for no person."""
        with self.database.read() as connection:
            row = connection.execute(
                "SELECT coalesce(sum(i.tokens), 0) FROM wish w JOIN item i ON i.id = w.item "
                "WHERE w.batch = ? AND i.state = 'open' AND NOT i.stopped",
                (batch.id,),
            ).fetchone()
        return int(row[0])

    def to_submit(
        self, batch: BatchRecord, most: int, *, after: int = 0, stopped: bool = False
    ) -> list[tuple[int, bytes]]:
        """Id and key of texts that are in no job and have no outcome, by ascending id.

        ``stopped``: those too that wait for a person.
        """
        with self.database.read() as connection:
            return connection.execute(
                "SELECT i.id, i.key FROM wish w JOIN item i ON i.id = w.item WHERE w.batch = ? "
                "AND w.item > ? AND i.state = 'open' AND i.part IS NULL AND i.stopped <= ? "
                "ORDER BY w.item LIMIT ?",
                (batch.id, after, stopped, most),
            ).fetchall()

    def settle_now(
        self,
        batch: BatchRecord,
        *,
        stored: Sequence[bytes] = (),
        failed: Sequence[tuple[bytes, str]] = (),
        most_tries: int = 1,
        tokens: int = 0,
        picodollars: int = 0,
    ) -> None:
        """These were bought outside of any job, or found; those could not be, and why."""
        mine = "WHERE pool = ? AND key = ? AND part IS NULL AND state = 'open'"
        with self.database.transaction() as connection:
            connection.executemany(
                f"UPDATE item SET state = 'stored', reason = NULL, stopped = 0 {mine}",
                [(batch.pool, key) for key in stored],
            )
            connection.executemany(
                "UPDATE item SET tries = tries + 1, reason = ?, "
                f"state = iif(tries + 1 >= ?, 'failed', 'open') {mine}",
                [(reason, most_tries, batch.pool, key) for key, reason in failed],
            )
            connection.execute(
                "UPDATE batch SET drained_tokens = drained_tokens + ?, "
                "drained_cost = drained_cost + ? WHERE id = ?",
                (tokens, picodollars, batch.id),
            )
