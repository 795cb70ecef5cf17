"""May this amount be held? The one place where limits are compared with the counters."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from embedcore.storage import entries, windows as counters
from embedcore.storage.amounts import Amount, Grant, HeldLoosely, TighterBoundNeeded
from embedcore.storage.calendar import MICROSECONDS, PERIODS
from embedcore.storage.windows import Moment, Used

if TYPE_CHECKING:
    import sqlite3

# While it lasts nobody may hold a loose bound: otherwise a steady stream of small loose calls
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
    """What forbids the amount; None if nothing does. ``is_bound``: nobody counted what it costs.

    What processes left that have ended is closed first, before it forbids anything. Returned rather
    than raised, so that the transaction commits what it found out on the way.
    """
    used = counters.used(connection, windows, grant, moment)
    if not used:
        return None
    wants_less = grant.loose and not final and _takes_too_much(connection, used, amount, moment)
    # What costs nothing fits a limit that is overdrawn as well.
    failing = [one for one in used if amount.of(one.limit.unit) > max(one.left, 0)]
    if not wants_less and not failing:
        return None
    if entries.end_ownerless(connection, moment):
        return check(
            connection, grant, windows, amount, moment, final=final, waits=waits, is_bound=is_bound
        )
    if wants_less:
        return TighterBoundNeeded()
    refusal = _binding(failing, amount).refusal(amount, is_bound=is_bound or grant.loose)
    if waits and all(_fits_when_settled(connection, one, amount) for one in failing):
        until = moment.now + _TIGHT_SECONDS * MICROSECONDS
        connection.execute("UPDATE book SET tight_until = ?", (until,))
        return HeldLoosely(refusal)
    return refusal


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
