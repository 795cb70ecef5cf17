"""The rows of the ledger: grants and attempts. Every function runs in the caller's transaction."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedcore.errors import StorageCorrupt, StorageError
from embedcore.storage import windows as counters
from embedcore.storage.amounts import Amount, Attempt, Grant, Lane, Limit
from embedcore.storage.ownership import has_ended, myself
from embedcore.storage.windows import Moment

if TYPE_CHECKING:
    import sqlite3


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
    """Write the grant; ``left`` is held in ``windows`` already and not yet sent."""
    books = (grant.id, grant.scope, windows, left.tokens, left.cost)
    connection.execute(
        'INSERT INTO "grant" VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)',
        (*books, grant.loose, lease, myself(), moment.now),
    )


def rest_of(connection: sqlite3.Connection, grant: Grant) -> tuple[str, Amount] | None:
    """The windows of a leased grant, and what is left of it; None if it is closed or a batch's."""
    row = connection.execute(
        'SELECT windows, tokens, cost FROM "grant" WHERE id = ? AND lease IS NOT NULL', (grant.id,)
    ).fetchone()
    return None if row is None else (row[0], Amount(tokens=row[1], cost=row[2]))


def move(connection: sqlite3.Connection, grant: Grant, windows: str) -> None:
    """From now on the grant's money is that of ``windows``, where it is held already."""
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
    on with what its parent held, and outlive it."""
    connection.execute(
        'UPDATE "grant" SET lease = ?, owner = ? WHERE id = ? AND lease IS NOT NULL',
        (lease, myself(), grant.id),
    )


def close_grant(connection: sqlite3.Connection, identity: int) -> None:
    """Release what is left of a grant and forget it; nothing if that was done before."""
    row = connection.execute(
        'DELETE FROM "grant" WHERE id = ? RETURNING windows, tokens, cost', (identity,)
    ).fetchone()
    if row is not None and (row[1] or row[2]):
        counters.release(connection, row[0], Amount(tokens=row[1], cost=row[2]))


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
    """Write the attempt; its amount is held, and its request counted, in ``windows`` already."""
    held = (grant.id, grant.scope, windows, amount.tokens, amount.cost)
    # A batch's belongs to nobody: any process may find out what became of it.
    owner = None if lease is None else myself()
    cursor = connection.execute(
        'INSERT INTO attempt ("grant", scope, windows, state, tokens, cost, loose, lease,'
        " model, inputs, sent, owner) VALUES (?, ?, ?, 'sent', ?, ?, ?, ?, ?, ?, ?, ?)",
        (*held, grant.loose, lease, model, inputs, moment.now, owner),
    )
    if cursor.lastrowid is None:
        raise StorageError("SQLite gave no row id for an attempt: nothing was sent")
    return Attempt(id=cursor.lastrowid, grant=grant, amount=amount)


def state(connection: sqlite3.Connection, attempt: Attempt) -> tuple[str, str, int]:
    """An attempt's state, its windows, and the generation of its day when it was charged."""
    row = connection.execute(
        "SELECT state, windows, generation FROM attempt WHERE id = ?", (attempt.id,)
    ).fetchone()
    if row is None:
        raise StorageCorrupt(f"attempt {attempt.id} is not in the ledger: was the file replaced?")
    return row[0], row[1], row[2]


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
    note: str,
    request_id: str | None = None,
) -> None:
    """The whole amount of a sent attempt becomes spent, for want of proof."""
    counters.settle(connection, windows, amount, amount)
    generation = counters.generation_of(connection, windows)
    connection.execute(
        "UPDATE attempt SET state = 'charged', actual_tokens = tokens, actual_cost = cost,"
        " note = ?, request_id = ?, generation = ?, counted = ?, ended = ?, owner = NULL"
        " WHERE id = ?",
        (_storable(note), _storable(request_id), generation, generation, moment.now, identity),
    )


def give_back(connection: sqlite3.Connection, attempt: Attempt, windows: str) -> bool:
    """Return a sent attempt's amount to its grant, or to the windows if that is closed or of
    another day by now. Returns whether the grant has it."""
    # A grant of another day must not get it: it is held in this attempt's windows.
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
        charge(connection, identity, windows, amount, moment, note=note)
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
