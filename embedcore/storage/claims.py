"""Claims of the processes that share a cache: which texts another one is embedding right now.

They lie in the index of the cache. A claim means nothing once the vector is there, so vectors are
kept first, and no process ever sees neither.

It costs at most money to be wrong here. A claim ends with its process, where it is proved or likely
that this has ended, and else with its lease; then two processes may pay for the same text.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from embedcore.errors import StorageError
from embedcore.forksafe import Lazy
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.grants import is_free, myself
from embedcore.storage.vector_table import KEYS_PER_QUERY, marks

if TYPE_CHECKING:
    import sqlite3

    from numpy.typing import NDArray

    from embedcore.storage.database import Changes, Database

LEASE_SECONDS: Final = 20.0
_BEATS_PER_LEASE: Final = 4
# One row for each key would cost a fifth of all the CPU of a call, and each row that goes writes a
# page. So one row has many, and only the beginning of each: two keys that begin alike only wait.
_KEYS_PER_ROW: Final = 4096
_BEGINNING: Final = np.dtype("<u8")
_WORDS_PER_KEY: Final = 4

Beginnings: TypeAlias = "NDArray[np.uint64]"


class Taken(NamedTuple):
    """Keys that were not claimed: another process has them, or their vectors came meanwhile."""

    elsewhere: frozenset[bytes] = frozenset()
    there: frozenset[bytes] = frozenset()


class _Row:
    """One row of claims of this process. ``open``: its keys that may yet be paid for.

    ``numbers``: those that it may have in the file: after a commit that was interrupted, two.
    ``is_done``: it went with the last of its vectors.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.open = set(keys)
        self.numbers: set[int] = set()
        self.is_done = False

    def write(self, connection: sqlite3.Connection, claimant: int) -> None:
        # Random: what others read of a row stays true of its number.
        number = secrets.randbits(62)
        self.numbers.add(number)
        keys = np.sort(_beginnings(list(self.open))).tobytes()
        connection.execute(
            "INSERT INTO claim (id, claimant, keys) VALUES (?, ?, ?)", (number, claimant, keys)
        )

    def delete(self, connection: sqlite3.Connection) -> bool:
        """Returns whether it was there."""
        gone = [
            connection.execute("DELETE FROM claim WHERE id = ?", (number,)).rowcount
            for number in list(self.numbers)
        ]
        return any(gone)


class _Own:
    """What this process has claimed, and what it read of others. Not that of a child of a fork.

    - ``rows``: by the keys that are open. ``stale``: rows that say more than is open.
    - ``renewed``: when the lease was, in microseconds. ``read``: rows of others by their numbers.
    - ``writing``: by one thread at a time, which may be interrupted by a signal handler that does.
    """

    # What threads share is changed in single steps.

    def __init__(self) -> None:
        self.id = secrets.randbits(62)
        self.writing = threading.RLock()
        self.rows: dict[bytes, _Row] = {}
        self.stale: set[_Row] = set()
        self.renewed = 0
        self.read: dict[int, Beginnings] = {}


class Claims:
    """The claims in one index of vectors. Safe to share between threads, processes and forks.

    The threads of this process must not claim the same key at the same time. What touches the file
    raises ``StorageError``; then nothing is claimed that was not before. ``lease``: seconds for
    which claims stand without ``renew``.
    """

    def __init__(
        self,
        database: Database,
        *,
        now: Callable[[], float] = time.time,
        lease: float = LEASE_SECONDS,
    ) -> None:
        self.lease = lease
        self._database = database
        self._now = now
        self._own: Lazy[_Own] = Lazy()

    def changes(self) -> Changes:
        """For ``take``: to be asked before the keys are looked up."""
        with self._database.read() as connection:
            return self._database.changes(connection)

    def take(self, keys: Sequence[bytes], since: Changes | None = None) -> Taken:
        """Claim these for this process, save for those that are named in the answer.

        What another process claimed that has ended, or let its lease expire, is taken over.
        ``since``: when none of these keys had a vector.
        """
        own = self._own.get(_Own)
        new: list[_Row] = []
        try:
            with self._transaction(own) as connection:
                taken = self._not_free(connection, own, keys, since)
                mine = [one for one in keys if not (one in taken.elsewhere or one in taken.there)]
                for chunk in _chunks(mine, _KEYS_PER_ROW):
                    row = _Row(chunk)
                    new.append(row)
                    # Noted first: an interrupt after the commit must leave none without an owner.
                    own.rows.update(dict.fromkeys(chunk, row))
                    row.write(connection, own.id)
        except StorageError:
            for row in new:
                _remove(own, row.open)
            raise
        return taken

    def _not_free(
        self,
        connection: sqlite3.Connection,
        own: _Own,
        keys: Sequence[bytes],
        since: Changes | None,
    ) -> Taken:
        there: set[bytes] = set()
        if self._database.changes(connection) != since:
            there = _there(connection, keys)
        elsewhere, ended = self._elsewhere(connection, own, keys)
        for number in ended:
            connection.execute("DELETE FROM claim WHERE claimant = ?", (number,))
            connection.execute("DELETE FROM claimant WHERE id = ?", (number,))
        return Taken(frozenset(elsewhere - there), frozenset(there))

    def gone(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these keys no other process is paying for any more. Changes nothing.

        Where the vector is not there by now, the process ended without it.
        """
        own = self._own.get(_Own)
        with self._database.read() as connection:
            elsewhere, _ = self._elsewhere(connection, own, keys)
            return (set(keys) - elsewhere) | _there(connection, list(elsewhere))

    def kept(self, connection: sqlite3.Connection, keys: Collection[bytes]) -> None:
        """Their vectors are kept in this transaction: rows that are done with go."""
        own = self._own.get(_Own)
        if own.rows:
            done = set(keys)
            for row in {row for key in keys if (row := own.rows.get(key)) is not None}:
                if row.open <= done:
                    row.delete(connection)
                    row.is_done = True

    def forget(self, keys: Collection[bytes]) -> None:
        """The transaction of ``kept`` was committed."""
        own = self._own.get(_Own)
        # Two threads that kept the last ones at the same time each saw that there were others.
        own.stale |= {row for row in _remove(own, keys) if not (row.open or row.is_done)}

    def give_up(self, keys: Collection[bytes]) -> bool:
        """This process will not pay for them. Others know after ``write_down``; False: none of them
        was claimed, and there is nothing to write."""
        own = self._own.get(_Own)
        rows = _remove(own, keys)
        own.stale |= rows
        return bool(rows)

    def write_down(self) -> None:
        """Others know from now on what was given up."""
        own = self._own.get(_Own)
        if own.stale:
            with self._transaction(own):
                pass

    def renew(self) -> None:
        """Prolong the lease of what is claimed, if it is time to. To be called often."""
        own, now = self._own.get(_Own), self._time()
        beat = self._lease // _BEATS_PER_LEASE
        if not own.rows or own.renewed <= now < own.renewed + beat:
            return
        # Before it is done: other threads leave it to this one, and what fails waits for the next.
        own.renewed = now
        with self._transaction(own):
            pass

    @contextlib.contextmanager
    def _transaction(self, own: _Own) -> Iterator[sqlite3.Connection]:
        """Renews the lease, and writes down what was given up."""
        with own.writing:
            stale = {row: row.numbers.copy() for row in list(own.stale)}
            try:
                # After a power failure no process is left whose claims would matter.
                with self._database.transaction(durable=False) as connection:
                    now = self._time()
                    connection.execute(
                        "INSERT INTO claimant (id, identity, until) VALUES (?, ?, ?)"
                        " ON CONFLICT (id) DO UPDATE SET until = excluded.until",
                        (own.id, myself(), now + self._lease),
                    )
                    # What is given up from now on makes its row stale again.
                    own.stale.difference_update(stale)
                    for row in stale:
                        # What others took over at the end of a lease is theirs.
                        if row.delete(connection) and row.open:
                            row.write(connection, own.id)
                    yield connection
            except BaseException:
                own.stale.update(stale)
                raise
            own.renewed = now
            for row, numbers in stale.items():
                row.numbers -= numbers

    def _elsewhere(
        self, connection: sqlite3.Connection, own: _Own, keys: Sequence[bytes]
    ) -> tuple[set[bytes], set[int]]:
        """Those of the keys that another process has; and the numbers of claimants, of those who
        claimed any of them or whose lease is over, that have ended."""
        now = self._time()
        found = connection.execute(
            "SELECT id, identity, until FROM claimant WHERE id <> ?", (own.id,)
        ).fetchall()
        # A lease that ends later than any can was written before the clock was set back.
        ended = {one for one, _, until in found if not now <= until <= now + 2 * self._lease}
        others = {one: (identity, until) for one, identity, until in found if one not in ended}
        claimed = np.zeros(len(keys), dtype=np.bool_)
        wanted = _beginnings(keys)
        for claimant, theirs in _rows_of(connection, own, others):
            hits = _is_in(theirs, wanted)
            # Asked only of those it matters of: the system has to be asked.
            if claimant not in ended and hits.any() and is_free(*others[claimant], now):
                ended.add(claimant)
            if claimant not in ended:
                claimed |= hits
        return {keys[place] for place in np.flatnonzero(claimed).tolist()}, ended

    @property
    def _lease(self) -> int:
        return round(self.lease * MICROSECONDS)

    def _time(self) -> int:
        return round(self._now() * MICROSECONDS)


def _remove(own: _Own, keys: Collection[bytes]) -> set[_Row]:
    """These are open no more. Returns the rows that they were in."""
    rows = {row for key in keys if (row := own.rows.pop(key, None)) is not None}
    for row in rows:
        row.open.difference_update(keys)
    return rows


def _there(connection: sqlite3.Connection, keys: Sequence[bytes]) -> set[bytes]:
    """Those that have a vector. Zeros are kept for a batch, and are no hit for others."""
    return {
        key
        for chunk in _chunks(keys, KEYS_PER_QUERY)
        for (key,) in connection.execute(
            f"SELECT key FROM vector WHERE key IN ({marks(chunk)}) AND zeros = 0", chunk
        )
    }


def _rows_of(
    connection: sqlite3.Connection, own: _Own, claimants: Collection[int]
) -> list[tuple[int, Beginnings]]:
    """Claimant and keys of each of their rows."""
    if not claimants:
        return []
    rows = connection.execute("SELECT id, claimant FROM claim").fetchall()
    known = own.read
    own.read = {
        number: known[number] if number in known else _read(connection, number)
        for number, claimant in rows
        if claimant in claimants
    }
    return [(claimant, own.read[number]) for number, claimant in rows if claimant in claimants]


def _read(connection: sqlite3.Connection, number: int) -> Beginnings:
    (keys,) = connection.execute("SELECT keys FROM claim WHERE id = ?", (number,)).fetchone()
    return np.frombuffer(keys, dtype=_BEGINNING)


def _is_in(theirs: Beginnings, wanted: Beginnings) -> NDArray[np.bool_]:
    """``theirs``: ascending."""
    if not len(theirs):
        return np.zeros(len(wanted), dtype=np.bool_)
    places = np.minimum(np.searchsorted(theirs, wanted), len(theirs) - 1)
    found: NDArray[np.bool_] = theirs[places] == wanted
    return found


def _beginnings(keys: Sequence[bytes]) -> Beginnings:
    whole: NDArray[Any] = np.frombuffer(b"".join(keys), dtype=_BEGINNING)
    return whole[::_WORDS_PER_KEY]


def _chunks(keys: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
