"""One rate for all processes of a state folder: the file in which they reserve their turns.

It is a file of its own beside the ledger's: what is lost of it is learned again within seconds, so
that nothing waits for the disk, and no step of money waits for this.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from embedcore.errors import StorageCorrupt
from embedcore.storage.database import Database
from embedcore.storage.filesystem import Contents
from embedcore.storage.grants import clock_here, has_ended, myself
from embedcore.storage.rate_buckets import (
    REQUESTS,
    TOKENS,
    Amounts,
    Facts,
    RateBucket,
    Remaining,
    set_rate,
    trial,
)
from embedcore.storage.schema import RATES

if TYPE_CHECKING:
    import sqlite3

RATES_FILE: Final = "rates.db"
_CONTENTS: Final = Contents("rate limits", "none learned", "forget what was learned")
# What another process does may take that long, were it stopped: then each is by itself.
_TIMEOUT: Final = 1.0
# Who did nothing for so long takes no part.
_ACTIVE: Final = 3.0
_SUSPECT: Final = 0.5
# A process that is alone says so often what it took.
_UNTOLD: Final = 0.2
# At least one request leaves in so many seconds: no reply would bring news otherwise.
_LONGEST_SILENCE: Final = 60.0
_LONGEST_CLOSING: Final = 330.0
_OLD: Final = 86_400.0
_KINDS: Final = (REQUESTS, TOKENS)
_NOTHING: Final = Amounts()
_COLUMNS: Final = 'kind, rate, size, level, at, named, granted, "window", ends'


class Wanted(NamedTuple):
    """A request of so many tokens and texts, for a caller that set the rates of these kinds."""

    tokens: int
    rates: Sequence[str] = ()
    texts: int = 1

    @property
    def amounts(self) -> Amounts:
        return Amounts(1, self.tokens, self.texts)


class Slot(NamedTuple):
    """When a request may leave, and how many requests and tokens were reserved by then."""

    due: float
    requests: float
    tokens: float
    serial: int = 0


@dataclass(kw_only=True, slots=True)
class News:
    """What a process has to say with its next step.

    - ``facts``: what its limiter knows, by kind of limit.
    - ``sent``: what left without a reservation.
    - ``seen``: of replies, by kind of limit.
    - ``more_tokens``: so many more than was reserved were billed.
    - ``closed_until``: nothing may leave before.
    """

    facts: dict[str, Facts] = field(default_factory=dict)
    sent: Amounts = _NOTHING
    seen: dict[str, Remaining] = field(default_factory=dict)
    more_tokens: int = 0
    closed_until: float = 0.0


class Standing(NamedTuple):
    """What a process learns: how many ``others`` take part, the buckets, and until when nothing
    may leave."""

    others: int
    buckets: dict[str, RateBucket]
    closed_until: float

    @property
    def is_unknown(self) -> bool:
        """The server named no limit so far."""
        return all(self.buckets[kind].is_trial for kind in _KINDS)

    @property
    def is_free(self) -> bool:
        """And much was sent to it at once: each process is by itself."""
        return self.is_unknown and any(one.is_free for one in self.buckets.values())


class RateShare:
    """The rates of one state folder. Every method is one transaction without any network, and
    raises ``StorageError``. ``now``: seconds of the monotonic clock, which all processes of this
    boot have in common; those that have another one have rows of their own. ``owner``: who this is.
    """

    def __init__(self, database: Database, *, owner: Callable[[], str] = myself) -> None:
        self._database, self._owner = database, owner
        self._is_used = False

    def look(self, key: Key, now: float, news: News) -> Standing:
        """Take part, say what is new, and see what the others said."""
        with self._line(key, now) as line:
            others = line.join()
            line.hear(news, is_alone=not others)
            return line.standing(others)

    def reserve(
        self, key: Key, now: float, wanted: Sequence[Wanted], news: News
    ) -> tuple[list[Slot], Standing]:
        """Turns for these requests, in this order; fewer while it is not known how much a server
        takes."""
        with self._line(key, now) as line:
            others = line.join()
            line.hear(news, is_alone=not others)
            line.set({kind for one in wanted for kind in one.rates}, is_alone=not others)
            standing = line.standing(others)
            tries = others > 0 and standing.is_unknown and not standing.is_free
            slots = []
            for one in wanted:
                slot = line.reserve(one, tries=tries)
                if slot is None:
                    break
                slots.append(slot)
            return slots, standing

    def returned(self, key: Key, now: float, slot: Slot, amounts: Amounts) -> None:
        """It will not be used. Free again if it was the last one; else only the headers of replies
        show that it was not, as those behind it have their times."""
        with self._line(key, now) as line:
            if slot.serial == line.serial:
                line.undo(slot, amounts)

    def answered(self, key: Key, now: float, tokens: int) -> Standing:
        """A request came back without a word of limits."""
        with self._line(key, now) as line:
            buckets = [line.buckets[kind] for kind in _KINDS]
            for bucket in buckets:
                bucket.advance(now)
            grows = any(one.level < one.size / 2 for one in buckets)
            for bucket, amount in zip(buckets, (1, tokens), strict=True):
                bucket.answered(amount, grows=grows)
            return line.standing(line.join())

    def forget(self, key: Key, now: float, kind: str) -> Standing:
        """The server names that limit no longer, for a minute now."""
        with self._line(key, now) as line:
            line.buckets[kind] = trial(kind, now, granted=line.buckets[kind].granted)
            return line.standing(line.join())

    def close(self) -> None:
        """This process takes no part any more, until the next step."""
        if self._is_used:
            self._is_used = False
            with self._database.transaction() as connection:
                connection.execute("DELETE FROM member WHERE owner = ?", (self._owner(),))
            self._database.close()

    def mend(self) -> None:
        """Delete a damaged file: nothing in it is worth keeping."""
        self._database.close()
        if self._database.path is not None:
            for end in ("", "-wal", "-shm", "-journal"):
                path = self._database.path
                path.with_name(path.name + end).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _line(self, key: Key, now: float) -> Iterator[_Line]:
        with self._database.transaction() as connection:
            if not self._is_used:
                _forget_old(connection, now)
                self._is_used = True
            line = _Line(connection, key.text, self._owner(), now)
            yield line
            line.save()


class Key(NamedTuple):
    """Whose limit it is."""

    endpoint: str
    account: str
    model: str

    @property
    def text(self) -> str:
        return json.dumps([clock_here(), *self])


class _Line:
    """All that is known of one key, in a transaction."""

    def __init__(self, connection: sqlite3.Connection, key: str, owner: str, now: float) -> None:
        self._connection, self._key, self._owner, self._now = connection, key, owner, now
        row = connection.execute(
            "SELECT closed_until, last_due, serial FROM line WHERE key = ?", (key,)
        ).fetchone()
        closed_until, last_due, serial = row or (0.0, now, 0)
        self.serial: int = serial
        # No matter what is in the file, nothing is closed for hours.
        self._closed_until = min(closed_until, now + _LONGEST_CLOSING)
        self._last_due = last_due
        rows = connection.execute(f"SELECT {_COLUMNS} FROM bucket WHERE key = ?", (key,))
        self.buckets = {one["kind"]: RateBucket(**dict(one)) for one in rows.fetchall()}
        for kind in _KINDS:
            self.buckets.setdefault(kind, trial(kind, now))
        if not all(one.is_sensible for one in self.buckets.values()):
            raise StorageCorrupt("rates.db is damaged: a rate in it is zero")

    def set(self, kinds: set[str], *, is_alone: bool) -> None:
        """Count these rates from now on; those that nothing is missing from are counted anew when
        they are asked for again."""
        for kind, bucket in list(self.buckets.items()):
            if bucket.is_set and kind not in kinds and bucket.level >= bucket.size:
                del self.buckets[kind]
        for kind in kinds:
            self.buckets.setdefault(kind, set_rate(kind, self._now, is_full=is_alone))

    def join(self) -> int:
        """How many others take part."""
        owner, since = self._owner, self._now - _ACTIVE
        members = self._connection.execute(
            "SELECT owner, seen, alone FROM member WHERE key = ? AND owner <> ?"
            " AND seen BETWEEN ? AND ?",
            (self._key, owner, since, self._now + _ACTIVE),
        ).fetchall()
        active = [
            one
            for one in members
            if one["seen"] > self._now - _SUSPECT or not has_ended(one["owner"])
        ]
        if any(one["alone"] and one["seen"] > self._now - _UNTOLD for one in active):
            # What it took since it last said so is not yet counted.
            for bucket in self.buckets.values():
                bucket.at = max(bucket.at, self._now)
        self._connection.execute(
            "INSERT INTO member (key, owner, seen, alone) VALUES (?1, ?2, ?3, ?4)"
            " ON CONFLICT DO UPDATE SET seen = ?3, alone = ?4",
            (self._key, owner, self._now, not active),
        )
        return len(active)

    def hear(self, news: News, *, is_alone: bool) -> None:
        now = self._now
        for bucket in self.buckets.values():
            bucket.advance(now)
            amount = news.sent.of(bucket.kind)
            bucket.granted += amount
            if bucket.is_trial:
                # Nothing says when it came back.
                bucket.level = max(bucket.level - amount, min(bucket.level, 0.0))
            else:
                bucket.level -= amount
            if bucket.is_set and bucket.counts_tokens:
                bucket.level -= news.more_tokens
        for kind, facts in news.facts.items():
            bucket = self.buckets[kind]
            bucket.learn(now, facts, news.seen.get(kind))
            if is_alone:
                bucket.level = min(facts.left, bucket.size)
        if not is_alone:
            for kind, one in news.seen.items():
                self.buckets[kind].correct(now, one)
        self._closed_until = max(self._closed_until, news.closed_until)

    def reserve(self, wanted: Wanted, *, tries: bool) -> Slot | None:
        """``tries``: keep to what is taken without knowing a limit; None: not yet."""
        now, due, least = self._now, self._now, self._closed_until
        amounts = wanted.amounts
        for bucket in self.buckets.values():
            if bucket.is_trial and not tries:
                continue
            at = bucket.due(now, amounts.of(bucket.kind))
            if bucket.is_trial and at > now:
                return None
            if not bucket.is_set:
                due = max(due, at)
            elif bucket.kind in wanted.rates and not self._is_slower(bucket):
                least = max(least, at)
        due = max(min(due, max(self._last_due, now) + _LONGEST_SILENCE), least)
        marks = {
            bucket.kind: bucket.take(amounts.of(bucket.kind)) for bucket in self.buckets.values()
        }
        self._last_due = due
        self.serial += 1
        return Slot(due, marks[REQUESTS], marks[TOKENS], self.serial)

    def _is_slower(self, bucket: RateBucket) -> bool:
        """Whether the server allows no more than that rate anyway."""
        server = self.buckets.get(bucket.kind.partition(":")[0])
        if server is None or server.is_trial:
            return False
        return server.per_minute <= bucket.per_minute

    def undo(self, slot: Slot, amounts: Amounts) -> None:
        self.serial += 1
        for bucket in self.buckets.values():
            amount = amounts.of(bucket.kind)
            bucket.advance(self._now)
            bucket.level = min(bucket.level + amount, bucket.size)
            bucket.granted -= amount
        self._last_due = min(self._last_due, slot.due)

    def standing(self, others: int) -> Standing:
        return Standing(others, self.buckets, self._closed_until)

    def save(self) -> None:
        self._connection.execute(
            "INSERT INTO line (key, closed_until, last_due, serial) VALUES (?1, ?2, ?3, ?4)"
            " ON CONFLICT DO UPDATE SET closed_until = ?2, last_due = ?3, serial = ?4",
            (self._key, self._closed_until, self._last_due, self.serial),
        )
        self._connection.execute("DELETE FROM bucket WHERE key = ?", (self._key,))
        self._connection.executemany(
            f"INSERT INTO bucket (key, {_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)",
            [
                (
                    self._key,
                    one.kind,
                    one.rate,
                    one.size,
                    one.level,
                    one.at,
                    one.named,
                    one.granted,
                    one.window,
                    one.ends,
                )
                for one in self.buckets.values()
            ],
        )


def _forget_old(connection: sqlite3.Connection, now: float) -> None:
    """What was before the machine started, and what nothing was sent to for a day."""
    connection.execute("DELETE FROM member WHERE seen < ?", (now - _OLD,))
    connection.execute(
        "DELETE FROM line WHERE last_due < ? OR json_extract(key, '$[0]') <> ?",
        (now - _OLD, clock_here()),
    )
    for table in ("member", "bucket"):
        connection.execute(f"DELETE FROM {table} WHERE key NOT IN (SELECT key FROM line)")


def file_in(folder: Path) -> Database:
    """The file of that state folder."""
    return Database(
        folder / RATES_FILE, RATES, timeout=_TIMEOUT, contents=_CONTENTS, is_durable=False
    )


@cache
def share_for(folder: Path) -> RateShare:
    """What everything in this process shares that has this state folder."""
    return RateShare(file_in(folder))
