"""Parts of batches: records, leases and steps (what follows on which state: ``PartWorker``).

Every step is one immediate transaction that is committed before the next remote call, together with
the money it moves; and every one but the first carries the number of its owner (the epoch), so that
a process that lost the part to another changes nothing any more.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.grants import is_free, myself
from embedcore.storage.manifest import Sent, sent_in

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.batches import BatchAccount, BatchRecord
    from embedcore.storage.counters import Moment
    from embedcore.storage.ledger import Ledger
    from embedcore.storage.manifest import Sent


PartPhase: TypeAlias = Literal[
    "planned", "creating", "fenced", "lost", "stray", "submitted", "collecting", "done"
]
IdForm: TypeAlias = Literal["ordinal", "key"]
ACTIVE: Final = ("creating", "fenced", "submitted", "collecting", "stray")

# Of a part's key, in the ids of its items: 60 random bits, and every line is a little shorter.
_KEY_LENGTH: Final = 16
_LONGEST_ORDINAL: Final = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part as it is written down. Times are microseconds since 1970.

    - ``key``: marks its remote job as ours. ``batch``: whose file has its texts; None: no more.
    - ``tokens``, ``cost``: reserved for it. ``price``: dollars per million tokens at that time.
    - ``input``, ``job``: the provider's names. ``jobs``: further jobs, comma-separated.
    - ``asked``: when the job was to be created; ``looks``: how often none was found long after.
    - ``tries``: errors in a row. ``next``: nothing is due before. ``trouble``: for a person.
    - ``status``, ``completed``, ``failed``, ``total``: as the provider last said.
    - ``ids``: the form of the ids of its items. ``since``: when the wait for something of the
      provider began that should be there already; None: it waits for nothing of that kind.
    - ``cancelled``: embedcore asked its provider to stop it.
    - ``missing``: since when the provider knows no such job; None: it does.
    - ``not_before``: the provider asked to be left alone until then, so that even who asks for it
      waits, which ``next`` is not for.
    """

    id: int
    key: str
    pool: int
    batch: int | None
    state: PartPhase
    input_type: str
    items: int
    tokens: int
    cost: int
    price: str | None
    grant: int
    attempt: int | None
    input: str | None
    job: str | None
    jobs: str
    asked: int | None
    looks: int
    tries: int
    next: int
    status: str
    completed: int | None
    failed: int | None
    total: int | None
    trouble: str | None
    epoch: int
    created: int
    ended: int | None
    ids: IdForm = "key"
    since: int | None = None
    cancelled: bool = False
    not_before: int = 0
    missing: int | None = None

    @property
    def needs_a_person(self) -> bool:
        """Whether its trouble is none that waiting alone mends."""
        return self.trouble is not None and self.tries > 0 and self.next == 0

    def item_id(self, ordinal: int) -> str:
        """What the item at this place is called in the part's input, and so in its results.

        It names the part as well: a line of any other job belongs to no part.
        """
        return str(ordinal) if self.ids == "ordinal" else f"{self.key[:_KEY_LENGTH]}-{ordinal}"

    def ordinal_of(self, item: object) -> int | None:
        """The place that an id names; None for one that no item of this part can have."""
        if not isinstance(item, str):
            return None
        ordinal = ordinal_in(item.rpartition("-")[2])
        return ordinal if ordinal is not None and item == self.item_id(ordinal) else None


def ordinal_in(text: str) -> int | None:
    """A place written as a number, in the one way in which that is done: "07" is none."""
    if not (text.isascii() and text.isdigit() and len(text) < _LONGEST_ORDINAL):
        return None
    return int(text) if str(int(text)) == text else None


def longest_id(items: int) -> str:
    """As long as any id in a part of so many items."""
    return f"{'9' * _KEY_LENGTH}-{'9' * len(str(items))}"


_NAMES: Final = tuple(one.name for one in fields(Part))
COLUMNS: Final = ", ".join(f'"{name}"' for name in _NAMES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """``limit``: tokens that may be enqueued, learned; ``until``: nothing is enqueued before."""

    limit: int | None
    until: int
    refusals: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """Of a planned part: the account's ``queue``, whether a batch still waits for it
    (``is_wanted``), whether the batch that planned it goes on and so ``has_texts``, the parts and
    tokens that are ``in_flight``, and the time of the ledger, in microseconds since 1970."""

    queue: Queue
    is_wanted: bool
    has_texts: bool
    in_flight: tuple[int, int]
    now: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A text of a part that was refused: its item, its key, the jobs that it was in before, and
    how much of it was not sent (None: all was), with the reason of then."""

    item: int
    key: bytes
    tries: int
    characters_cut: int | None
    reason: str | None


class Unread(NamedTuple):
    """A text of a part that has no vector of it. ``sent_key``: of what was sent, if that was not
    all; ``characters_cut`` and ``tokens_cut`` as in ``Sent``, where they are still known."""

    ordinal: int
    key: bytes
    sent_key: bytes | None
    characters_cut: int | None
    tokens_cut: int | None


class Superseded(Exception):
    """Another process owns the part by now: this one leaves it alone."""


def read_part(row: sqlite3.Row) -> Part:
    return Part(**{**dict(row), "cancelled": bool(row["cancelled"])})


LEASE_SECONDS: Final = 120.0
_AWAITING: Final = (
    "FROM item i JOIN wish w ON w.item = i.id JOIN batch b ON b.id = w.batch "
    "WHERE i.part = ? AND i.state = 'open' AND b.state = 'open'"
)
_WAITING: Final = f"{_AWAITING} AND NOT b.draining"
# Accounts grow: what was learned of a queue is forgotten after a day.
_LEARNED: Final = 86_400 * MICROSECONDS


class Parts:
    """The table ``part``. ``owner`` names who takes parts; ``lease``: seconds until others may."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        owner: Callable[[], str] = myself,
        lease: float = LEASE_SECONDS,
    ) -> None:
        self.ledger = ledger
        self.database = ledger.database
        self.owner = owner
        self._lease = round(lease * MICROSECONDS)

    def now(self) -> int:
        """The time of the ledger, in microseconds since 1970."""
        with self.database.read() as connection:
            return self.ledger.now_in(connection)

    def of_batch(self, batch: BatchRecord) -> list[Part]:
        """The parts in which texts of this batch are, and those that it planned."""
        with self.database.read() as connection:
            return parts_of(connection, batch)

    def live(self, pool: BatchAccount) -> list[Part]:
        """The parts of a pool that have not ended, oldest first."""
        with self.database.read() as connection:
            return live_parts(connection, pool.id)

    def again(self, part: Part) -> Part:
        """The part as it is now."""
        with self.database.read() as connection:
            row = connection.execute(
                f"SELECT {COLUMNS} FROM part WHERE id = ?", (part.id,)
            ).fetchone()
        if row is None:
            raise Superseded
        return read_part(row)

    def take(self, part: Part) -> Part | None:
        """Own the part, or None: another process is at work on it."""
        with self.database.transaction() as connection:
            now = self.ledger.moment_in(connection).now
            row = connection.execute(
                "SELECT owner, lease FROM part WHERE id = ? AND state <> 'done'", (part.id,)
            ).fetchone()
            if row is None or not is_free(row["owner"], row["lease"], now):
                return None
            row = connection.execute(
                "UPDATE part SET owner = ?, lease = ?, epoch = epoch + 1 WHERE id = ? "
                f"RETURNING {COLUMNS}",
                (self.owner(), now + self._lease, part.id),
            ).fetchone()
        return read_part(row)

    def leave(self, part: Part) -> None:
        """Let others have it at once. Harmless for a process that does not own it any more."""
        with self.database.transaction() as connection:
            connection.execute(
                "UPDATE part SET owner = NULL, lease = NULL WHERE id = ? AND epoch = ?",
                (part.id, part.epoch),
            )

    def renew(self, part: Part) -> None:
        """Stay the owner while something takes long. Raises ``Superseded``."""
        with self.step(part):
            pass

    @contextmanager
    def step(self, part: Part) -> Iterator[tuple[sqlite3.Connection, Moment]]:
        """A transaction of the part's owner, who stays it. Raises ``Superseded``."""
        with self.database.transaction() as connection:
            moment = self.ledger.moment_in(connection)
            owned = connection.execute(
                "UPDATE part SET lease = ? WHERE id = ? AND epoch = ? AND state <> 'done'",
                (moment.now + self._lease, part.id, part.epoch),
            )
            if not owned.rowcount:
                raise Superseded
            yield connection, moment

    def note(self, part: Part, **changes: object) -> Part:
        """Write down what was learned of a part; its columns by name."""
        with self.step(part) as (connection, _):
            return change(connection, part, **changes)

    def items(self, part: Part) -> list[tuple[int, int, bytes, int]]:
        """Ordinal, id, key and tokens of the texts in a part, by ordinal."""
        with self.database.read() as connection:
            return _items(connection, part)

    def contents(self, part: Part) -> tuple[list[tuple[int, int, bytes, int]], dict[int, Sent]]:
        """``items``, and those of them, by their ids, of which not all is sent."""
        with self.database.read() as connection:
            items = _items(connection, part)
            rows = connection.execute(
                "SELECT id, characters_cut, sent_key, tokens_cut FROM item "
                "WHERE part = ? AND characters_cut IS NOT NULL",
                (part.id,),
            ).fetchall()
        return items, {row["id"]: sent_in(row) for row in rows}

    def refused(self, part: Part, ids: Sequence[int]) -> list[Refused]:
        """What is known of these texts of a part."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT id, key, tries, characters_cut, reason FROM item "
                "WHERE part = ? AND state = 'open' "
                "AND id IN (SELECT value FROM json_each(?)) ORDER BY id",
                (part.id, json.dumps(list(ids))),
            ).fetchall()
        return [
            Refused(
                item=row["id"],
                key=row["key"],
                tries=row["tries"],
                characters_cut=row["characters_cut"],
                reason=row["reason"],
            )
            for row in rows
        ]

    def batches_of(self, pool: int, key: bytes) -> list[int]:
        """The batches that wish for a text of a pool, ended ones with them."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT w.batch FROM item i JOIN wish w ON w.item = i.id "
                "WHERE i.pool = ? AND i.key = ? ORDER BY w.batch",
                (pool, key),
            ).fetchall()
        return [identity for (identity,) in rows]

    def stored(self, part: Part) -> frozenset[int]:
        """The ids of its texts that have their vector already."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT id FROM item WHERE part = ? AND state = 'stored'", (part.id,)
            ).fetchall()
        return frozenset(identity for (identity,) in rows)

    def store(self, part: Part, ids: Sequence[int]) -> None:
        """The vectors of these texts are in the cache, for good."""
        with self.step(part) as (connection, _):
            connection.executemany(
                "UPDATE item SET state = 'stored', reason = NULL, paid = 0 "
                "WHERE id = ? AND part = ? AND state = 'open'",
                [(one, part.id) for one in ids],
            )

    def fail(self, part: Part, reasons: Sequence[tuple[int, str]], state: str = "failed") -> None:
        """These texts will get no vector, and why."""
        with self.step(part) as (connection, _):
            connection.executemany(
                "UPDATE item SET state = ?, reason = ? WHERE id = ? AND part = ?",
                [(state, reason, one, part.id) for one, reason in reasons],
            )

    def is_wanted(self, part: Part) -> bool:
        """Whether a batch still waits for a text of this part."""
        with self.database.read() as connection:
            row = connection.execute(f"SELECT EXISTS (SELECT 1 {_WAITING})", (part.id,)).fetchone()
        return bool(row[0])

    def is_awaited(self, part: Part) -> bool:
        """Whether a batch will take what comes for a text of this part, though it may be embedding
        the rest at once."""
        with self.database.read() as connection:
            row = connection.execute(f"SELECT EXISTS (SELECT 1 {_AWAITING})", (part.id,)).fetchone()
        return bool(row[0])

    def wanted_by(self, part: Part) -> list[int]:
        """The batches, by their ids, that still wait for a text of this part."""
        with self.database.read() as connection:
            rows = connection.execute(f"SELECT DISTINCT w.batch {_WAITING}", (part.id,)).fetchall()
        return [identity for (identity,) in rows]

    def may_be_paid_again(self, part: Part) -> bool:
        """Whether a batch that waits for it pays again for what was paid for and lost."""
        with self.database.read() as connection:
            row = connection.execute(
                f"SELECT EXISTS (SELECT 1 {_WAITING} AND b.resubmits_lost)", (part.id,)
            ).fetchone()
        return bool(row[0])

    def in_flight(self, pool: BatchAccount) -> tuple[int, int]:
        """Parts and tokens that are, or may be, at work for this pool's model and account."""
        with self.database.read() as connection:
            return in_flight(connection, pool)

    def queue(self, pool: BatchAccount, now: int) -> Queue:
        """What is known of the account's queue for this model, at a time of the ledger."""
        with self.database.read() as connection:
            return _queue(connection, pool, now)

    def prospect(self, part: Part, pool: BatchAccount) -> Prospect:
        """What decides whether a planned part is sent now."""
        with self.database.read() as connection:
            now = self.ledger.now_in(connection)
            row = connection.execute(
                f"SELECT EXISTS (SELECT 1 {_WAITING}), EXISTS (SELECT 1 FROM batch "
                "WHERE id = ? AND state = 'open' AND NOT draining)",
                (part.id, part.batch),
            ).fetchone()
            return Prospect(
                queue=_queue(connection, pool, now),
                is_wanted=bool(row[0]),
                has_texts=bool(row[1]),
                in_flight=in_flight(connection, pool),
                now=now,
            )

    def queue_refused(self, pool: BatchAccount, *, limit: int | None, until: int) -> None:
        """A job was refused because too much was enqueued. ``limit``: what is allowed, if known."""
        with self.database.transaction() as connection:
            connection.execute(
                "UPDATE pool SET queue = coalesce(?, queue), queue_until = ?, "
                "refusals = refusals + 1 WHERE id = ?",
                (limit, until, pool.id),
            )

    def queue_took(self, pool: BatchAccount) -> None:
        """A job was taken: the queue is open."""
        with self.database.transaction() as connection:
            now = self.ledger.moment_in(connection).now
            connection.execute(
                "UPDATE pool SET queue_until = min(queue_until, ?), refusals = 0 "
                "WHERE model = ? AND endpoint = ? AND account = ? AND refusals > 0",
                (now, pool.model, pool.endpoint, pool.account),
            )

    def unread(self, batch: BatchRecord, *, lost: bool = False) -> list[Part]:
        """The parts that ended without a vector for a text of this batch that was paid for.

        ``lost``: only those whose results were not to be had, and not those that were not believed.
        """
        with self.database.read() as connection:
            rows = connection.execute(
                f"SELECT {COLUMNS} FROM part WHERE job IS NOT NULL AND id IN (SELECT u.part "
                "FROM unread u JOIN part p ON p.id = u.part "
                "JOIN item i ON i.pool = p.pool AND i.key = u.key AND (i.state = 'lost' OR NOT ?) "
                "JOIN wish w ON w.item = i.id AND w.batch = ?) ORDER BY id",
                (lost, batch.id),
            ).fetchall()
        return [read_part(row) for row in rows]

    def unread_items(self, part: Part) -> list[Unread]:
        """Such texts of a part, by ordinal."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT u.ordinal, u.key, u.sent_key, i.characters_cut, i.tokens_cut "
                "FROM unread u "
                "LEFT JOIN item i ON i.pool = ? AND i.key = u.key AND i.sent_key = u.sent_key "
                "WHERE u.part = ? ORDER BY u.ordinal",
                (part.pool, part.id),
            ).fetchall()
        return [Unread(*row) for row in rows]

    def was_read(self, part: Part, ordinals: Sequence[int]) -> None:
        """The vectors of these came after all, and are in the cache. Batches that ended without
        them have them now."""
        with self.database.transaction() as connection:
            for ordinal in ordinals:
                row = connection.execute(
                    "DELETE FROM unread WHERE part = ? AND ordinal = ? RETURNING key",
                    (part.id, ordinal),
                ).fetchone()
                if row is None:
                    continue
                found = connection.execute(
                    "UPDATE item SET state = 'stored', reason = NULL, stopped = 0, paid = 0 "
                    "WHERE pool = ? AND key = ? AND part IS NULL AND state <> 'stored' "
                    "RETURNING id",
                    (part.pool, *row),
                ).fetchone()
                if found is not None:
                    connection.execute(
                        "UPDATE batch SET stored = stored + 1, failed = failed - 1 "
                        "WHERE ended IS NOT NULL AND failed > 0 "
                        "AND id IN (SELECT batch FROM wish WHERE item = ?)",
                        found,
                    )

    def forget(self, before: int) -> int:
        """Drop the parts that ended before then; returns how many."""
        with self.database.transaction() as connection:
            gone = connection.execute(
                "DELETE FROM part WHERE state = 'done' AND ended < ?", (before,)
            ).rowcount
            connection.execute("DELETE FROM unread WHERE part NOT IN (SELECT id FROM part)")
        return gone


def parts_of(connection: sqlite3.Connection, batch: BatchRecord) -> list[Part]:
    """As ``Parts.of_batch``, inside a transaction."""
    rows = connection.execute(
        f"SELECT {COLUMNS} FROM part WHERE batch = ?1 OR (pool = ?2 AND state <> 'done' "
        "AND EXISTS (SELECT 1 FROM item i JOIN wish w ON w.item = i.id AND w.batch = ?1 "
        "WHERE i.part = part.id)) ORDER BY id",
        (batch.id, batch.pool),
    ).fetchall()
    return [read_part(row) for row in rows]


def live_parts(connection: sqlite3.Connection, pool: int) -> list[Part]:
    """As ``Parts.live``, inside a transaction."""
    rows = connection.execute(
        f"SELECT {COLUMNS} FROM part WHERE pool = ? AND state <> 'done' ORDER BY id", (pool,)
    ).fetchall()
    return [read_part(row) for row in rows]


def _items(connection: sqlite3.Connection, part: Part) -> list[tuple[int, int, bytes, int]]:
    return connection.execute(
        "SELECT ordinal, id, key, tokens FROM item WHERE part = ? ORDER BY ordinal", (part.id,)
    ).fetchall()


def _queue(connection: sqlite3.Connection, pool: BatchAccount, now: int) -> Queue:
    row = connection.execute(
        "SELECT min(iif(queue_until + ? > ?, queue, NULL)) AS tokens, "
        "max(queue_until) AS until, max(refusals) AS refusals FROM pool "
        "WHERE model = ? AND endpoint = ? AND account = ?",
        (_LEARNED, now, pool.model, pool.endpoint, pool.account),
    ).fetchone()
    return Queue(limit=row["tokens"], until=row["until"] or 0, refusals=row["refusals"] or 0)


def in_flight(connection: sqlite3.Connection, pool: BatchAccount) -> tuple[int, int]:
    """As ``Parts.in_flight``, inside a transaction."""
    # Scopes share what the provider allows; so do the ways to make vectors with one model.
    row = connection.execute(
        "SELECT count(*) AS parts, coalesce(sum(p.tokens), 0) AS tokens FROM part p "
        "JOIN pool q ON q.id = p.pool "
        "WHERE q.model = ? AND q.endpoint = ? AND q.account = ? "
        f"AND p.state IN ({','.join('?' * len(ACTIVE))})",
        (pool.model, pool.endpoint, pool.account, *ACTIVE),
    ).fetchone()
    return row["parts"], row["tokens"]


def change(connection: sqlite3.Connection, part: Part, **changes: object) -> Part:
    """Set columns of a part, inside its owner's transaction."""
    settings = ", ".join(f'"{name}" = ?' for name in changes)
    row = connection.execute(
        f"UPDATE part SET {settings} WHERE id = ? RETURNING {COLUMNS}",
        (*changes.values(), part.id),
    ).fetchone()
    return read_part(row)


def new_key() -> str:
    """A name that no other job in the world has."""
    return uuid.uuid4().hex
