"""Grants and attempts: reserved money, its owner, and the check against the limits.

A number of a process says little: it is used again, and means another process in another container
or on another machine that has the same folder. On Linux an owner is named by what tells them apart:
the boot of the kernel, the namespaces of its numbers and of its clock, and when it started.
Elsewhere only host and number are known, and that proves nothing.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from embedcore.errors import StorageCorrupt, StorageError
from embedcore.forksafe import in_child
from embedcore.storage import counters
from embedcore.storage.amounts import (
    Amount,
    Attempt,
    Grant,
    HeldLoosely,
    Lane,
    Limit,
    TighterBoundNeeded,
)
from embedcore.storage.calendar import MICROSECONDS, PERIODS
from embedcore.storage.counters import Moment, Used

if TYPE_CHECKING:
    import sqlite3


_PROC: Final = Path("/proc")
_NAMESPACES: Final = ("pid", "time")
# After the name in /proc/PID/stat: the state, the number of threads, when it started.
_STATE, _THREADS, _STARTED = 0, 17, 19

_own: dict[int, str] = {}
# A child may get a number that its parent's parent had.
in_child(_own.clear)


class Owner(NamedTuple):
    """``name``: host and process. ``kernel``, ``namespaces`` and ``started``: empty if unknown."""

    name: str
    kernel: str = ""
    namespaces: str = ""
    started: str = ""

    @property
    def number(self) -> int | None:
        number = self.name.rpartition(":")[2]
        return int(number) if number.isascii() and number.isdigit() else None


class _Seen(NamedTuple):
    started: str
    is_over: bool


def myself() -> str:
    """This process, in the words by which others find out whether it has ended."""
    # Asked in transactions only: what was forked unseen was noticed there.
    here = os.getpid()
    known = _own.get(here)
    if known is None:
        known = _own[here] = " ".join(filter(None, _identity(here)))
    return known


def has_ended(owner: str) -> bool:
    """Whether it is proved that this process has ended. Never of one that cannot be seen from here:
    of another machine, another container or an earlier boot."""
    his, mine = _read(owner), _read(myself())
    if not his.started or (his.kernel, his.namespaces) != (mine.kernel, mine.namespaces):
        return False
    if his.number is None:
        return False
    if not _exists(his.number):
        return True
    seen = _look(his.number)
    return seen is not None and (seen.is_over or seen.started != his.started)


def is_free(owner: str | None, until: int | None, now: int) -> bool:
    """Whether what ``owner`` held ``until`` then may be taken: at the end of its lease, or once its
    process has ended.

    Where two machines have one host name a living owner may be taken for dead: what is owned must
    be safe against two owners, and is only quicker with one.
    """
    if owner is None or until is None or until < now:
        return True
    return has_ended(owner) or _is_missing_here(owner)


def clock_here() -> str:
    """What has the same monotonic clock as this process, as far as that is known."""
    mine = _read(myself())
    # Namespaces are those of _NAMESPACES, in their order.
    return f"{mine.kernel} {mine.namespaces.rpartition(',')[2]}" if mine.kernel else ""


def _is_missing_here(owner: str) -> bool:
    """Whether this host has no process of that number. No proof: there are hosts of one name."""
    his, mine = _read(owner), _read(myself())
    if his.name.rpartition(":")[0] != mine.name.rpartition(":")[0] or his.number is None:
        return False
    return not _exists(his.number)


def _identity(number: int) -> Owner:
    name = f"{socket.gethostname()}:{number}"
    try:
        # A /proc of another container would show other processes by these numbers.
        if _PROC.joinpath("self").readlink() != Path(str(number)):
            return Owner(name)
        kernel = _PROC.joinpath("sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        namespaces = ",".join(_namespace(kind) for kind in _NAMESPACES)
    except (OSError, ValueError):
        return Owner(name)
    seen = _look(number)
    if seen is None or not kernel or namespaces.startswith(","):
        return Owner(name)
    return Owner(name, kernel, namespaces, seen.started)


def _namespace(kind: str) -> str:
    try:
        return str(_PROC.joinpath("self/ns", kind).readlink())
    except FileNotFoundError:
        # A kernel without namespaces of that kind: there is only one.
        return ""


def _read(owner: str) -> Owner:
    parts = owner.split(" ")
    return Owner(*parts) if len(parts) == len(Owner._fields) else Owner(parts[0])


def _exists(number: int) -> bool:
    """Whether there is such a process; also where nothing can be found out."""
    if os.name != "posix" or number <= 0:
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # A process of another user.
        return True
    return True


def _look(number: int) -> _Seen | None:
    """What the system says of a process; None: nothing."""
    try:
        # Its name may hold anything, brackets as well.
        fields = _PROC.joinpath(f"{number}/stat").read_bytes().rpartition(b")")[2].split()
        state, threads, started = (fields[one] for one in (_STATE, _THREADS, _STARTED))
    except (OSError, IndexError):
        return None
    # Killed, and its parent has not asked yet. With other threads it lives on.
    is_over = state in (b"Z", b"X", b"x") and int(threads) <= 1
    return _Seen(started.decode(), is_over)


def new_grant(scope: str, lane: Lane, limits: Sequence[Limit], loose: bool) -> Grant:
    """The key to a grant that ``open_grant`` will write. Random: an id is never used again."""
    identity = secrets.randbits(62)
    return Grant(id=identity, scope=scope, lane=lane, limits=tuple(limits), loose=loose)


def open_grant(
    connection: sqlite3.Connection,
    grant: Grant,
    windows: str,
    left: Amount,
    moment: Moment,
    *,
    lease: int | None,
) -> None:
    """Write the grant; ``left`` is reserved in ``windows`` already and not yet sent."""
    columns = (grant.id, grant.scope, windows, left.tokens, left.cost)
    connection.execute(
        'INSERT INTO "grant" VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)',
        (*columns, grant.loose, lease, myself(), moment.now),
    )


def rest_of(connection: sqlite3.Connection, grant: Grant) -> tuple[str, Amount] | None:
    """The windows of a leased grant, and what is left of it; None if it is closed or a batch's."""
    row = connection.execute(
        'SELECT windows, tokens, cost FROM "grant" WHERE id = ? AND lease IS NOT NULL', (grant.id,)
    ).fetchone()
    if row is None:
        return None
    return row["windows"], Amount(tokens=row["tokens"], cost=row["cost"])


def move(connection: sqlite3.Connection, grant: Grant, windows: str) -> None:
    """From now on the grant's money is that of ``windows``, where it is reserved already."""
    connection.execute('UPDATE "grant" SET windows = ? WHERE id = ?', (windows, grant.id))


def forget(connection: sqlite3.Connection, grant: Grant) -> None:
    """The grant is closed; what was left of it is released already."""
    connection.execute('DELETE FROM "grant" WHERE id = ?', (grant.id,))


def take(
    connection: sqlite3.Connection, grant: Grant, amount: Amount, lease: int | None
) -> str | None:
    """The grant's windows if it still had the amount, which now belongs to the caller."""
    row = connection.execute(
        'UPDATE "grant" SET tokens = tokens - ?1, cost = cost - ?2,'
        " lease = iif(lease IS NULL, NULL, ?3)"
        " WHERE id = ?4 AND tokens >= ?1 AND cost >= ?2 RETURNING windows",
        (amount.tokens, amount.cost, lease, grant.id),
    ).fetchone()
    return None if row is None else str(row[0])


def renew(connection: sqlite3.Connection, grant: Grant, lease: int) -> None:
    """Prolong the lease. The grant is from now on that of the process which does so: a child may go
    on with what its parent reserved, and outlive it."""
    connection.execute(
        'UPDATE "grant" SET lease = ?, owner = ? WHERE id = ? AND lease IS NOT NULL',
        (lease, myself(), grant.id),
    )


def close_grant(connection: sqlite3.Connection, identity: int) -> None:
    """Release what is left of a grant and forget it; nothing if that was done before."""
    row = connection.execute(
        'DELETE FROM "grant" WHERE id = ? RETURNING windows, tokens, cost', (identity,)
    ).fetchone()
    if row is not None and (row["tokens"] or row["cost"]):
        left = Amount(tokens=row["tokens"], cost=row["cost"])
        counters.release(connection, row["windows"], left)


def open_attempt(
    connection: sqlite3.Connection,
    grant: Grant,
    windows: str,
    amount: Amount,
    moment: Moment,
    *,
    lease: int | None,
    model: str,
    inputs: int,
) -> Attempt:
    """Write the attempt; its amount and its request are counted in ``windows`` already."""
    held = (grant.id, grant.scope, windows, amount.tokens, amount.cost)
    # A batch's belongs to no process: any process may find out what became of it.
    owner = None if lease is None else myself()
    cursor = connection.execute(
        'INSERT INTO attempt ("grant", scope, windows, state, tokens, cost, loose, lease,'
        " model, inputs, sent, owner) VALUES (?, ?, ?, 'sent', ?, ?, ?, ?, ?, ?, ?, ?)",
        (*held, grant.loose, lease, model, inputs, moment.now, owner),
    )
    if cursor.lastrowid is None:
        raise StorageError("SQLite gave no row id for an attempt: nothing was sent")
    return Attempt(id=cursor.lastrowid, grant=grant, amount=amount)


class Entered(NamedTuple):
    """An attempt as it is in the file. ``generation``: of its day when it was charged, and
    ``actual`` what was charged; both are zero before."""

    state: str
    windows: str
    generation: int
    actual: Amount


def entered(connection: sqlite3.Connection, attempt: Attempt) -> Entered:
    row = connection.execute(
        "SELECT state, windows, generation, coalesce(actual_tokens, 0) AS tokens,"
        ' coalesce(actual_cost, 0) AS cost, lease, "grant" FROM attempt WHERE id = ?',
        (attempt.id,),
    ).fetchone()
    # In another file that number is another attempt's. The job of a batch may get another grant.
    if row is None or (row["lease"] is not None and row["grant"] != attempt.grant.id):
        raise StorageCorrupt(f"attempt {attempt.id} is not in the ledger: was the file replaced?")
    amount = Amount(tokens=row["tokens"], cost=row["cost"])
    return Entered(row["state"], row["windows"], row["generation"], amount)


def mark(
    connection: sqlite3.Connection,
    attempt: Attempt,
    new_state: str,
    actual: Amount,
    moment: Moment,
    *,
    reported: bool = False,
    request_id: str | None = None,
    note: str | None = None,
    counted: int | None = None,
    by_status: bool = False,
) -> None:
    """End an attempt on the record.

    ``counted``: the generation of its windows in which it counts; None: as it was charged.
    ``by_status``: it was free by the status of the answer alone.
    """
    outcome = (new_state, actual.tokens, actual.cost)
    said = (_storable(request_id), _storable(note))
    connection.execute(
        "UPDATE attempt SET state = ?, actual_tokens = ?, actual_cost = ?, reported = ?,"
        " request_id = ?, note = ?, ended = ?, counted = coalesce(?, counted), by_status = ?,"
        " owner = NULL WHERE id = ?",
        (*outcome, reported, *said, moment.now, counted, by_status, attempt.id),
    )


def charge(
    connection: sqlite3.Connection,
    identity: int,
    windows: str,
    amount: Amount,
    moment: Moment,
    *,
    actual: Amount,
    note: str,
    request_id: str | None = None,
) -> None:
    """A sent attempt, for which ``amount`` is reserved, becomes spent for want of proof; it counts
    as ``actual``, and what was reserved beyond that is released."""
    counters.settle(connection, windows, amount, actual)
    generation = counters.generation_of(connection, windows)
    outcome = (actual.tokens, actual.cost, _storable(note), _storable(request_id))
    connection.execute(
        "UPDATE attempt SET state = 'charged', actual_tokens = ?, actual_cost = ?,"
        " note = ?, request_id = ?, generation = ?, counted = ?, ended = ?, owner = NULL"
        " WHERE id = ?",
        (*outcome, generation, generation, moment.now, identity),
    )


def give_back(connection: sqlite3.Connection, attempt: Attempt, windows: str) -> bool:
    """Return a sent attempt's amount to its grant, or to the windows if that is closed or of
    another day by now. Returns whether the grant has it."""
    # A grant of another day must not get it: it is reserved in this attempt's windows.
    returned = connection.execute(
        'UPDATE "grant" SET tokens = tokens + ?, cost = cost + ? WHERE id = ? AND windows = ?',
        (attempt.amount.tokens, attempt.amount.cost, attempt.grant.id, windows),
    )
    if not returned.rowcount:
        counters.release(connection, windows, attempt.amount)
    return bool(returned.rowcount)


def end_expired(connection: sqlite3.Connection, moment: Moment) -> None:
    """Close what a crash left open: attempts are charged, grants released."""
    _end(connection, "lease < ?", moment.now, moment, note="never answered")


def end_ownerless(connection: sqlite3.Connection, moment: Moment) -> bool:
    """The same for what processes left that have ended, as is proved; whether there was any.

    Never what has no lease: any process goes on with a batch.
    """
    owners = connection.execute(
        'SELECT owner FROM "grant" WHERE lease IS NOT NULL UNION '
        "SELECT owner FROM attempt WHERE state = 'sent' AND lease IS NOT NULL AND owner IS NOT NULL"
    ).fetchall()
    gone = [owner for (owner,) in owners if owner != myself() and has_ended(owner)]
    for owner in gone:
        mine = "lease IS NOT NULL AND owner = ?"
        _end(connection, mine, owner, moment, note="never answered: its process ended")
    return bool(gone)


def _end(
    connection: sqlite3.Connection, which: str, value: object, moment: Moment, *, note: str
) -> None:
    attempts = connection.execute(
        f"SELECT id, windows, tokens, cost FROM attempt WHERE state = 'sent' AND {which}", (value,)
    ).fetchall()
    for identity, windows, tokens, cost in attempts:
        amount = Amount(tokens=tokens, cost=cost)
        # The texts are not in the file: they cannot be counted.
        charge(connection, identity, windows, amount, moment, actual=amount, note=note)
    grants = connection.execute(f'SELECT id FROM "grant" WHERE {which}', (value,)).fetchall()
    for (identity,) in grants:
        close_grant(connection, identity)


def log(
    connection: sqlite3.Connection,
    scope: str,
    windows: str,
    what: str,
    amount: Amount,
    moment: Moment,
    *,
    model: str = "",
    note: str = "",
) -> None:
    """Put something on the record that is not a request of ours."""
    connection.execute(
        "INSERT INTO attempt (scope, windows, state, tokens, cost, actual_tokens, actual_cost,"
        " model, note, sent, ended) VALUES (?1, ?2, ?3, ?4, ?5, ?4, ?5, ?6, ?7, ?8, ?8)",
        (scope, windows, what, amount.tokens, amount.cost, model, note, moment.now),
    )


def _storable(text: str | None) -> str | None:
    """Text from the remote side, which may hold half a surrogate pair: nothing may fail for it."""
    return text and text.encode("utf-8", "backslashreplace").decode()


# While it lasts no call may reserve a loose bound: otherwise a steady stream of small loose calls
# could keep a large exact one waiting for ever.
_TIGHT_SECONDS: Final = 5
_NEVER: Final = datetime.max.replace(tzinfo=UTC)


def check(
    connection: sqlite3.Connection,
    grant: Grant,
    windows: str,
    amount: Amount,
    moment: Moment,
    *,
    final: bool,
    waits: bool = True,
    is_bound: bool = False,
) -> Exception | None:
    """What forbids the amount; None if nothing does. As ``look``."""
    found = look(
        connection,
        grant,
        windows,
        amount,
        moment,
        final=final,
        waits=waits,
        is_bound=is_bound,
    )
    return found.refusal


class Look(NamedTuple):
    """What forbids an amount, or the grant for it, which knows whether a limit nears its end."""

    grant: Grant
    refusal: Exception | None = None


def look(
    connection: sqlite3.Connection,
    grant: Grant,
    windows: str,
    amount: Amount,
    moment: Moment,
    *,
    final: bool,
    waits: bool = True,
    is_bound: bool = False,
) -> Look:
    """What the limits say to the amount. ``is_bound``: what it costs was not counted.

    What processes left that have ended is closed first, before it forbids anything. Returned rather
    than raised, so that the transaction commits what it found out on the way.
    """
    limits_used = counters.used(connection, windows, grant, moment)
    if not limits_used:
        return Look(grant)
    wants_less = (
        grant.loose and not final and _takes_too_much(connection, limits_used, amount, moment)
    )
    # What costs nothing fits a limit that is overdrawn as well.
    failing = [one for one in limits_used if amount.of(one.limit.unit) > max(one.left, 0)]
    if not wants_less and not failing:
        is_near = any(one.would_near(amount) for one in limits_used)
        return Look(replace(grant, is_near=True) if is_near else grant)
    if end_ownerless(connection, moment):
        return look(
            connection, grant, windows, amount, moment, final=final, waits=waits, is_bound=is_bound
        )
    if wants_less:
        return Look(grant, TighterBoundNeeded())
    refusal = _binding(failing, amount).refusal(amount, is_bound=is_bound or grant.loose)
    if waits and all(_fits_when_settled(connection, one, amount) for one in failing):
        until = moment.now + _TIGHT_SECONDS * MICROSECONDS
        connection.execute("UPDATE book SET tight_until = ?", (until,))
        return Look(grant, HeldLoosely(refusal))
    return Look(grant, refusal)


def _binding(failing: list[Used], amount: Amount) -> Used:
    """The limit that waiting cannot help; else the one whose window ends last: the others will be
    open again before it."""
    return max(
        failing,
        key=lambda one: (
            amount.of(one.limit.unit) > one.most,
            one.ends or _NEVER,
            PERIODS.index(one.limit.period),
        ),
    )


def _takes_too_much(
    connection: sqlite3.Connection, used: list[Used], amount: Amount, moment: Moment
) -> bool:
    tight = connection.execute("SELECT tight_until > ? FROM book", (moment.now,)).fetchone()[0]
    return bool(tight) or any(2 * amount.of(one.limit.unit) > one.left for one in used)


def _fits_when_settled(connection: sqlite3.Connection, used: Used, amount: Amount) -> bool:
    asked = amount.of(used.limit.unit)
    # Queries that settle for less may get their share back: bulk work cannot count on it.
    return asked <= used.most and asked <= used.left + _held_loosely(connection, used)


def _held_loosely(connection: sqlite3.Connection, used: Used) -> int:
    """How much of what the window holds is a bound that may turn out far too high."""
    mine = f"instr(',' || windows || ',', ',{used.window},') > 0"
    unit = used.limit.unit
    row = connection.execute(
        f'SELECT (SELECT coalesce(sum({unit}), 0) FROM "grant" WHERE loose AND {mine})'
        f" + (SELECT coalesce(sum({unit}), 0) FROM attempt"
        f" WHERE state = 'sent' AND loose AND {mine})"
    ).fetchone()
    return int(row[0])
