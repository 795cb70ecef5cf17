"""Batches: rows of the state file, the texts they wait for, and their accounts.

A text is there once for each pool, however many batches wish for it: so two batches with the same
text share one job. Every method is one transaction.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from embedcore.errors import StorageCorrupt
from embedcore.storage import grants
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.grants import is_free, myself
from embedcore.storage.manifest import Sent, sent_in

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.ledger import Ledger


BatchPhase: TypeAlias = Literal["preparing", "open", "cancelling", "done", "cancelled", "abandoned"]
ENDED: Final = ("done", "cancelled", "abandoned")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchAccount:
    """What batches share: one scope, one model, one way to make vectors, one account."""

    id: int
    scope: str
    model: str
    fingerprint: str
    endpoint: str
    account: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRecord:
    """One batch as it is written down. Times are microseconds since 1970.

    - ``rows``, ``texts``: of the caller, and different ones. ``reused``: texts that were cached.
    - ``stored``, ``failed``: texts with a vector and without, once it has ended.
    - ``deadline``: when everything should be there; ``draining``: the rest is embedded at once.
    - ``delivered``: its output is complete, and it counts on no vector beyond the cap any more.
    - ``blocked``: why nothing new is sent; not before ``retry`` that may change.
    """

    id: int
    name: str
    pool: int
    input_type: str
    asked_as: str
    state: BatchPhase
    rows: int
    texts: int
    reused: int
    stored: int
    failed: int
    resubmits_lost: bool
    deadline: int | None
    draining: bool
    delivered: bool
    grant: int | None
    blocked: str | None
    retry: int
    created: int
    ended: int | None
    has_ended: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A text that is to be embedded: its key, its tokens, and its bytes in the job's input."""

    key: bytes
    tokens: int
    in_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Texts of a batch by what became of them.

    ``stopped``: their job was cancelled at the provider by hand, and they are not sent
    again until a person says so.
    """

    to_submit: int = 0
    in_flight: int = 0
    stored: int = 0
    failed: int = 0
    stopped: int = 0

    @property
    def open(self) -> int:
        return self.to_submit + self.in_flight + self.stopped


def record_again(connection: sqlite3.Connection, batch: BatchRecord) -> BatchRecord:
    """As ``Batches.again``, inside a transaction."""
    found = _records(connection, "id = ?", batch.id)
    if not found:
        raise StorageCorrupt(f"batch {batch.name} is not in the state file any more")
    return found[0]


def _records(connection: sqlite3.Connection, condition: str, *values: object) -> list[BatchRecord]:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM batch WHERE {condition} ORDER BY id", values
    ).fetchall()
    return [
        BatchRecord(**{**dict(row), **{name: bool(row[name]) for name in _FLAGS}}) for row in rows
    ]


def counts_in(connection: sqlite3.Connection, batch: BatchRecord) -> Counts:
    """As ``Batches.counts``, inside a transaction."""
    row = connection.execute(
        "SELECT coalesce(sum(i.state = 'open' AND i.part IS NULL AND NOT i.stopped), 0) "
        "AS to_submit, coalesce(sum(i.state = 'open' AND i.part IS NOT NULL), 0) AS in_flight, "
        "coalesce(sum(i.state = 'stored'), 0) AS stored, "
        "coalesce(sum(i.state IN ('failed', 'lost')), 0) AS failed, "
        "coalesce(sum(i.state = 'open' AND i.part IS NULL AND i.stopped), 0) AS stopped "
        "FROM wish w JOIN item i ON i.id = w.item WHERE w.batch = ?",
        (batch.id,),
    ).fetchone()
    return Counts(**dict(row))


def drop_batch(connection: sqlite3.Connection, identity: int) -> None:
    row = connection.execute("SELECT pool FROM batch WHERE id = ?", (identity,)).fetchone()
    if row is None:
        return
    release_money(connection, identity)
    connection.execute("DELETE FROM wish WHERE batch = ?", (identity,))
    # Another batch may get its number.
    connection.execute("UPDATE part SET batch = NULL WHERE batch = ?", (identity,))
    connection.execute("DELETE FROM batch WHERE id = ?", (identity,))
    drop_unwanted(connection, row["pool"])


def release_money(connection: sqlite3.Connection, identity: int) -> None:
    (grant,) = connection.execute('SELECT "grant" FROM batch WHERE id = ?', (identity,)).fetchone()
    if grant is not None:
        grants.close_grant(connection, grant)
        connection.execute('UPDATE batch SET "grant" = NULL WHERE id = ?', (identity,))


def drop_unwanted(connection: sqlite3.Connection, pool: int) -> None:
    """Forget the texts that no batch knows of, and try those no more that only ended ones do."""
    connection.execute(
        "DELETE FROM item WHERE pool = ? AND part IS NULL "
        "AND NOT EXISTS (SELECT 1 FROM wish WHERE wish.item = item.id)",
        (pool,),
    )
    close_unwanted(connection, "pool = ? AND part IS NULL", pool)


def close_unwanted(connection: sqlite3.Connection, these: str, value: int) -> None:
    """Texts that had an outcome, were to be tried again, and are not after all, have it again.

    Batches that ended with it still give its reason; and what was paid for and lost must not look
    like something new, which any call may pay for.
    """
    connection.execute(
        "UPDATE item SET stopped = 0, state = CASE WHEN paid THEN 'lost' "
        # Only a vector takes away a reason: it was there, and is not in the cache any more.
        "WHEN reason IS NULL THEN 'stored' ELSE 'failed' END "
        f"WHERE {these} AND state = 'open' "
        "AND EXISTS (SELECT 1 FROM wish WHERE wish.item = item.id) "
        "AND NOT EXISTS (SELECT 1 FROM wish w JOIN batch b ON b.id = w.batch "
        "WHERE w.item = item.id AND b.ended IS NULL)",
        (value,),
    )
    # Others that wait for such a text did not say that it may be paid for twice.
    connection.execute(
        f"UPDATE item SET state = 'lost' WHERE {these} AND state = 'open' AND paid "
        "AND NOT EXISTS (SELECT 1 FROM wish w JOIN batch b ON b.id = w.batch "
        "WHERE w.item = item.id AND b.ended IS NULL AND b.resubmits_lost)",
        (value,),
    )


_PREPARING_SECONDS: Final = 86_400
_KEYS_PER_QUERY: Final = 500
_FLAGS: Final = ("resubmits_lost", "draining", "delivered", "has_ended")
_COLUMNS: Final = (
    "id, name, pool, input_type, asked_as, state, rows, texts, reused, stored, failed, "
    'resubmits_lost, deadline, draining, delivered, "grant", blocked, retry, created, ended, '
    f"state IN {ENDED} AS has_ended"
)


class Batches:
    """What was asked for, over the tables ``pool``, ``batch``, ``item`` and ``wish``."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.database = ledger.database

    def pool(
        self, *, scope: str, model: str, fingerprint: str, endpoint: str, account: str
    ) -> BatchAccount:
        """The pool of that description, made if need be."""
        name = (scope, model, fingerprint, endpoint, account)
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO pool (scope, model, fingerprint, endpoint, account) "
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                name,
            )
            row = connection.execute(
                "SELECT id, scope, model, fingerprint, endpoint, account FROM pool WHERE "
                "scope = ? AND model = ? AND fingerprint = ? AND endpoint = ? AND account = ?",
                name,
            ).fetchone()
        return BatchAccount(**dict(row))

    def pool_of(self, batch: BatchRecord) -> BatchAccount:
        with self.database.read() as connection:
            row = connection.execute(
                "SELECT id, scope, model, fingerprint, endpoint, account FROM pool WHERE id = ?",
                (batch.pool,),
            ).fetchone()
        if row is None:
            raise StorageCorrupt(f"the pool of batch {batch.name} is not in the state file")
        return BatchAccount(**dict(row))

    def begin(
        self,
        pool: BatchAccount,
        *,
        input_type: str | None,
        asked_as: str,
        resubmits_lost: bool = False,
        deadline: float | None = None,
        waiting: float | None = None,
    ) -> BatchRecord:
        """A new batch without rows.

        ``deadline``: seconds from now. ``waiting``: seconds after which, or with its process, a
        batch may be taken over that no caller asks for by its name; None: a caller will ask for it.
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
            return _records(connection, "id = ?", identity)[0]

    def over(self, keep: int) -> tuple[list[BatchRecord], int]:
        """Batches whose process ended while it wrote their rows down, and those that ended so many
        microseconds ago; and when that was, by the ledger's clock."""
        with self.database.read() as connection:
            now = self.ledger.now_in(connection)
            owners = connection.execute(
                "SELECT id, waiter, retry FROM batch WHERE state = 'preparing'"
            ).fetchall()
            left = [one for one, owner, until in owners if is_free(owner, until, now)]
            records = [record for one in left for record in _records(connection, "id = ?", one)]
            return records + _records(connection, "ended < ?", now - keep), now - keep

    def is_known(self, name: str) -> bool:
        """Whether there is a batch of that name, be it unfinished."""
        with self.database.read() as connection:
            return bool(_records(connection, "name = ?", name))

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
            revived = "'stored', 'failed'" + (", 'lost'" if batch.resubmits_lost else "")
            # What was sent shortened is tried whole again: the server may take more by now.
            connection.executemany(
                "INSERT INTO item (pool, key, state, tokens, bytes) VALUES (?, ?, 'open', ?, ?) "
                "ON CONFLICT DO UPDATE SET tokens = excluded.tokens, bytes = excluded.bytes, "
                "characters_cut = NULL, sent_key = NULL, tokens_cut = NULL "
                f"WHERE characters_cut IS NOT NULL AND part IS NULL AND state IN ({revived})",
                [(batch.pool, one.key, one.tokens, one.in_bytes) for one in wanted],
            )
            for start in range(0, len(wanted), _KEYS_PER_QUERY):
                keys = [one.key for one in wanted[start : start + _KEYS_PER_QUERY]]
                these = f"pool = ? AND key IN ({','.join('?' * len(keys))})"
                connection.execute(
                    "INSERT INTO wish (batch, item) "
                    f"SELECT ?, id FROM item WHERE {these} ON CONFLICT DO NOTHING",
                    (batch.id, batch.pool, *keys),
                )
                connection.execute(
                    "UPDATE item SET state = 'open', tries = 0, stopped = 0 "
                    f"WHERE {these} AND part IS NULL AND state IN ({revived})",
                    (batch.pool, *keys),
                )

    def in_flight(self, pool: BatchAccount, keys: Sequence[bytes]) -> set[bytes]:
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

        No other caller knows of it: it becomes that of this call, with its money and its jobs, and
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
                    return _records(connection, "id = ?", identity)[0]
        return None

    def complete(self, batch: BatchRecord, digest: bytes) -> None:
        """All rows are there: from now on it is a batch for every process."""
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
        """Forget a batch, with its money that is not in a part. Parts of others go on."""
        with self.database.transaction() as connection:
            drop_batch(connection, batch.id)

    def numbered(self, identity: int) -> BatchRecord | None:
        with self.database.read() as connection:
            found = _records(connection, "id = ?", identity)
        return found[0] if found else None

    def named(self, name: str) -> BatchRecord | None:
        with self.database.read() as connection:
            found = _records(connection, "name = ? AND state <> 'preparing'", name)
        return found[0] if found else None

    def all(self, pool: BatchAccount | None = None) -> list[BatchRecord]:
        """Every batch, or those of one pool; oldest first."""
        with self.database.read() as connection:
            if pool is None:
                return _records(connection, "state <> 'preparing'")
            return _records(connection, "state <> 'preparing' AND pool = ?", pool.id)

    def deliver(self, batch: BatchRecord) -> None:
        """Its output is complete."""
        with self.database.transaction() as connection:
            connection.execute("UPDATE batch SET delivered = 1 WHERE id = ?", (batch.id,))

    def counting(self, batch: BatchRecord) -> list[str]:
        """The names of the other batches that count on their vectors, be they unfinished."""
        with self.database.read() as connection:
            found = connection.execute(
                "SELECT name FROM batch WHERE id <> ? AND NOT delivered ORDER BY id", (batch.id,)
            ).fetchall()
        return [name for (name,) in found]

    def again(self, batch: BatchRecord) -> BatchRecord:
        """The batch as it is now."""
        with self.database.read() as connection:
            return record_again(connection, batch)

    def counts(self, batch: BatchRecord) -> Counts:
        """What has become of its texts that were to be embedded."""
        with self.database.read() as connection:
            return counts_in(connection, batch)

    def reasons(self, batch: BatchRecord) -> dict[bytes, str]:
        """Key → reason, of the texts that will get no vector.

        A batch that has ended keeps them while another one tries such a text again.
        """
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT i.key, i.reason FROM wish w JOIN item i ON i.id = w.item "
                "JOIN batch b ON b.id = w.batch "
                "WHERE w.batch = ? AND (i.state IN ('failed', 'lost') "
                "OR (b.ended IS NOT NULL AND i.state = 'open' AND i.reason IS NOT NULL))",
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
                "(SELECT id FROM item WHERE state IN ('failed', 'lost') OR paid)",
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
        """Pay again for what was paid for and lost. Returns how many texts that are."""
        with self.database.transaction() as connection:
            connection.execute("UPDATE batch SET resubmits_lost = 1 WHERE id = ?", (batch.id,))
            return connection.execute(
                "UPDATE item SET state = 'open', tries = 0 WHERE state = 'lost' "
                "AND part IS NULL AND id IN (SELECT item FROM wish WHERE batch = ?)",
                (batch.id,),
            ).rowcount

    def resubmit_cancelled(self, batch: BatchRecord) -> int:
        """Send again what was in jobs that were cancelled by hand. Returns how many texts."""
        with self.database.transaction() as connection:
            return connection.execute(
                "UPDATE item SET stopped = 0, tries = 0 WHERE stopped "
                "AND id IN (SELECT item FROM wish WHERE batch = ?)",
                (batch.id,),
            ).rowcount

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

    def shortened(self, batch: BatchRecord) -> list[tuple[bytes, Sent]]:
        """Of the texts that ``to_submit`` gives, those of which not all is sent."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT i.key, i.characters_cut, i.sent_key, i.tokens_cut FROM wish w "
                "JOIN item i ON i.id = w.item WHERE w.batch = ? AND i.state = 'open' "
                "AND i.part IS NULL AND i.characters_cut IS NOT NULL ORDER BY w.item",
                (batch.id,),
            ).fetchall()
        return [(row["key"], sent_in(row)) for row in rows]

    def settle_now(
        self,
        batch: BatchRecord,
        *,
        stored: Sequence[bytes] = (),
        failed: Sequence[tuple[bytes, str]] = (),
        most_tries: int = 1,
        tokens: int = 0,
        cost: int = 0,
    ) -> None:
        """These were embedded outside of any job, or found; those could not be, and why."""
        mine = "WHERE pool = ? AND key = ? AND part IS NULL AND state = 'open'"
        with self.database.transaction() as connection:
            connection.executemany(
                f"UPDATE item SET state = 'stored', reason = NULL, stopped = 0, paid = 0 {mine}",
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
                (tokens, cost, batch.id),
            )
