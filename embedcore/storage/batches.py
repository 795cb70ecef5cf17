"""Batches and the texts they wish for: what is stored, in flight, or still to be submitted.

A text is there once for each pool, however many batches wish for it: so two batches with the same
text share one job. Every method is one transaction.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from embedcore.errors import StorageCorrupt
from embedcore.storage.batchrecords import (
    ENDED,
    BatchPhase,
    BatchRecord,
    Counts,
    Pool,
    Wanted,
)
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.drains import Drains
from embedcore.storage.ownership import is_free, myself
from embedcore.storage.pools import Pools
from embedcore.storage.wishes import counts_in, drop_batch, drop_unwanted, release_money

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.ledger import Ledger

_PREPARING_SECONDS: Final = 86_400
_KEYS_PER_QUERY: Final = 500
_FLAGS: Final = ("resubmits_lost", "draining")
_COLUMNS: Final = (
    "id, name, pool, input_type, asked_as, state, rows, texts, reused, stored, failed, "
    'resubmits_lost, deadline, draining, "grant", blocked, retry, created, ended'
)


class Batches(Pools, Drains):
    """What was asked for, over the tables ``pool``, ``batch``, ``item`` and ``wish``."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.database = ledger.database

    def begin(
        self,
        pool: Pool,
        *,
        input_type: str | None,
        asked_as: str,
        resubmits_lost: bool = False,
        deadline: float | None = None,
        waiting: float | None = None,
    ) -> BatchRecord:
        """A new batch without rows.

        ``deadline``: seconds from now. ``waiting``: seconds after which, or with its process, a
        batch that nobody asks for by its name may be taken over; None: somebody will ask for it.
        """
        with self.database.transaction() as connection:
            now = self.ledger.moment_in(connection).now
            name = (
                f"{datetime.fromtimestamp(now / MICROSECONDS, UTC):%Y%m%d}-{secrets.token_hex(4)}"
            )
            until = None if waiting is None else now + round(waiting * MICROSECONDS)
            due = None if deadline is None else now + round(deadline * MICROSECONDS)
            identity = connection.execute(
                "INSERT INTO batch (name, pool, input_type, asked_as, state, resubmits_lost, "
                "deadline, retry, waiter, waiter_until, created) "
                "VALUES (?, ?, ?, ?, 'preparing', ?, ?, ?, ?, ?, ?)",
                (
                    name,
                    pool.id,
                    input_type or "",
                    asked_as,
                    resubmits_lost,
                    due,
                    now + _PREPARING_SECONDS * MICROSECONDS,
                    myself(),
                    until,
                    now,
                ),
            ).lastrowid
            return self._read(connection, "id = ?", identity)[0]

    def unfinished(self) -> list[BatchRecord]:
        """Batches whose process ended while it wrote their rows down."""
        now = self.ledger.moment().now
        with self.database.read() as connection:
            owners = connection.execute(
                "SELECT id, waiter, retry FROM batch WHERE state = 'preparing'"
            ).fetchall()
            left = [one for one, owner, until in owners if is_free(owner, until, now)]
            return [record for one in left for record in self._read(connection, "id = ?", one)]

    def ended_before(self, moment: int) -> list[BatchRecord]:
        """Batches that ended before a time of the books."""
        with self.database.read() as connection:
            return self._read(connection, "ended < ?", moment)

    def is_known(self, name: str) -> bool:
        """Whether there is a batch of that name, be it unfinished."""
        with self.database.read() as connection:
            return bool(self._read(connection, "name = ?", name))

    def want(
        self, batch: BatchRecord, wanted: Sequence[Wanted], *, rows: int, texts: int, reused: int
    ) -> None:
        """Add to what a batch wishes for. Texts that failed or vanished before are tried again.

        What was paid for and lost is only tried again by a batch that says so.
        ``rows``, ``texts``, ``reused``: so many more of each.
        """
        with self.database.transaction() as connection:
            now = self.ledger.moment_in(connection).now
            known = connection.execute(
                "UPDATE batch SET rows = rows + ?, texts = texts + ?, reused = reused + ?, "
                "retry = ? WHERE id = ? AND state = 'preparing'",
                (rows, texts, reused, now + _PREPARING_SECONDS * MICROSECONDS, batch.id),
            )
            if not known.rowcount:
                raise StorageCorrupt(f"batch {batch.name} is not in the state file any more")
            connection.executemany(
                "INSERT INTO item (pool, key, state, tokens, bytes) VALUES (?, ?, 'open', ?, ?) "
                "ON CONFLICT DO NOTHING",
                [(batch.pool, one.key, one.tokens, one.in_bytes) for one in wanted],
            )
            revived = "'stored', 'failed'" + (", 'lost'" if batch.resubmits_lost else "")
            for start in range(0, len(wanted), _KEYS_PER_QUERY):
                keys = [one.key for one in wanted[start : start + _KEYS_PER_QUERY]]
                these = f"pool = ? AND key IN ({','.join('?' * len(keys))})"
                connection.execute(
                    "INSERT INTO wish (batch, item) "
                    f"SELECT ?, id FROM item WHERE {these} ON CONFLICT DO NOTHING",
                    (batch.id, batch.pool, *keys),
                )
                connection.execute(
                    "UPDATE item SET state = 'open', tries = 0, reason = NULL, stopped = 0 "
                    f"WHERE {these} AND part IS NULL AND state IN ({revived})",
                    (batch.pool, *keys),
                )

    def in_flight(self, pool: Pool, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these texts are in a job of another batch, so that a new one would join it."""
        found: set[bytes] = set()
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            with self.database.read() as connection:
                rows = connection.execute(
                    "SELECT key FROM item WHERE pool = ? AND state = 'open' AND part IS NOT NULL "
                    f"AND key IN ({','.join('?' * len(some))})",
                    (pool.id, *some),
                ).fetchall()
            found.update(key for (key,) in rows)
        return found

    def take_over(self, batch: BatchRecord, digest: bytes) -> BatchRecord | None:
        """A batch of the same rows whose caller is gone, and waited for it in one call.

        Nobody else knows of it: it becomes that of this call, with its money and its jobs, and
        ``batch`` is forgotten. None if there is none.
        """
        with self.database.transaction() as connection:
            now = self.ledger.moment_in(connection).now
            mine = connection.execute(
                "SELECT waiter, waiter_until FROM batch WHERE id = ?", (batch.id,)
            ).fetchone()
            same = connection.execute(
                "SELECT id, waiter, waiter_until FROM batch WHERE pool = ? AND digest = ? "
                "AND state = 'open' AND waiter_until IS NOT NULL ORDER BY id",
                (batch.pool, digest),
            ).fetchall()
            for identity, owner, until in same:
                if mine[1] is not None and is_free(owner, until, now):
                    connection.execute(
                        "UPDATE batch SET waiter = ?, waiter_until = ? WHERE id = ?",
                        (*mine, identity),
                    )
                    drop_batch(connection, batch.id)
                    return self._read(connection, "id = ?", identity)[0]
        return None

    def complete(self, batch: BatchRecord, digest: bytes) -> None:
        """All rows are there: from now on it is a batch for everybody."""
        with self.database.transaction() as connection:
            connection.execute(
                "UPDATE batch SET state = 'open', digest = ?, retry = 0 WHERE id = ?",
                (digest, batch.id),
            )

    def still_waiting(self, batch: BatchRecord, seconds: float) -> None:
        """The call that waits for it is alive."""
        with self.database.transaction() as connection:
            now = self.ledger.moment_in(connection).now
            connection.execute(
                "UPDATE batch SET waiter = ?, waiter_until = ? "
                "WHERE id = ? AND waiter_until IS NOT NULL",
                (myself(), now + round(seconds * MICROSECONDS), batch.id),
            )

    def drop(self, batch: BatchRecord) -> None:
        """Forget a batch, with its money that is not in a part. Jobs of others go on."""
        with self.database.transaction() as connection:
            drop_batch(connection, batch.id)

    def numbered(self, identity: int) -> BatchRecord | None:
        with self.database.read() as connection:
            found = self._read(connection, "id = ?", identity)
        return found[0] if found else None

    def named(self, name: str) -> BatchRecord | None:
        with self.database.read() as connection:
            found = self._read(connection, "name = ? AND state <> 'preparing'", name)
        return found[0] if found else None

    def all(self, pool: Pool | None = None) -> list[BatchRecord]:
        """Every batch, or those of one pool; oldest first."""
        with self.database.read() as connection:
            if pool is None:
                return self._read(connection, "state <> 'preparing'")
            return self._read(connection, "state <> 'preparing' AND pool = ?", pool.id)

    def again(self, batch: BatchRecord) -> BatchRecord:
        """The batch as it is now."""
        with self.database.read() as connection:
            found = self._read(connection, "id = ?", batch.id)
        if not found:
            raise StorageCorrupt(f"batch {batch.name} is not in the state file any more")
        return found[0]

    def counts(self, batch: BatchRecord) -> Counts:
        """What has become of its texts that were to be bought."""
        with self.database.read() as connection:
            return counts_in(connection, batch)

    def reasons(self, batch: BatchRecord) -> dict[bytes, str]:
        """Key → reason, of the texts that will get no vector."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT i.key, i.reason FROM wish w JOIN item i ON i.id = w.item "
                "WHERE w.batch = ? AND i.state IN ('failed', 'lost')",
                (batch.id,),
            ).fetchall()
        return {key: reason or "no reason was given" for key, reason in rows}

    def open_keys(self, batch: BatchRecord) -> Iterator[bytes]:
        """Keys of the texts that have no outcome yet."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT i.key FROM wish w JOIN item i ON i.id = w.item "
                "WHERE w.batch = ? AND i.state = 'open'",
                (batch.id,),
            ).fetchall()
        return (key for (key,) in rows)

    def set_state(self, batch: BatchRecord, state: BatchPhase) -> None:
        """The batch ended, or is to end. At an end it keeps only the reasons of what failed."""
        with self.database.transaction() as connection:
            now = self.ledger.moment_in(connection).now
            if state not in ENDED:
                connection.execute("UPDATE batch SET state = ? WHERE id = ?", (state, batch.id))
                return
            stored = batch.reused + counts_in(connection, batch).stored
            connection.execute(
                "UPDATE batch SET state = ?1, stored = ?2, failed = texts - ?2, blocked = NULL, "
                "ended = ?3 WHERE id = ?4 AND ended IS NULL",
                (state, stored, now, batch.id),
            )
            release_money(connection, batch.id)
            connection.execute(
                "DELETE FROM wish WHERE batch = ? AND item NOT IN "
                "(SELECT id FROM item WHERE state IN ('failed', 'lost'))",
                (batch.id,),
            )
            drop_unwanted(connection, batch.pool)

    def block(self, batch: BatchRecord, why: str | None, *, until: int = 0) -> None:
        """Write down why nothing new is sent for it, or that nothing stands in the way."""
        with self.database.transaction() as connection:
            connection.execute(
                "UPDATE batch SET blocked = ?, retry = ? WHERE id = ?", (why, until, batch.id)
            )

    def resubmit_lost(self, batch: BatchRecord) -> int:
        """Buy again what was paid for and lost. Returns how many texts that are."""
        with self.database.transaction() as connection:
            connection.execute("UPDATE batch SET resubmits_lost = 1 WHERE id = ?", (batch.id,))
            return connection.execute(
                "UPDATE item SET state = 'open', tries = 0, reason = NULL WHERE state = 'lost' "
                "AND part IS NULL AND id IN (SELECT item FROM wish WHERE batch = ?)",
                (batch.id,),
            ).rowcount

    def resubmit_cancelled(self, batch: BatchRecord) -> int:
        """Send again what was in jobs that somebody else cancelled. Returns how many texts."""
        with self.database.transaction() as connection:
            return connection.execute(
                "UPDATE item SET stopped = 0, tries = 0, reason = NULL WHERE stopped "
                "AND id IN (SELECT item FROM wish WHERE batch = ?)",
                (batch.id,),
            ).rowcount

    def _read(
        self, connection: sqlite3.Connection, condition: str, *values: object
    ) -> list[BatchRecord]:
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM batch WHERE {condition} ORDER BY id", values
        ).fetchall()
        names = [name.strip(' "') for name in _COLUMNS.split(",")]
        records = [dict(zip(names, row, strict=True)) for row in rows]
        return [
            BatchRecord(**{**one, **{name: bool(one[name]) for name in _FLAGS}}) for one in records
        ]
