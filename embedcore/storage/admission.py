"""May this amount be held? The one place where limits are compared with the counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from embedcore.storage import windows as counters
from embedcore.storage.amounts import Amount, Grant, HeldLoosely, TighterBoundNeeded
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.windows import Moment, Used

if TYPE_CHECKING:
    import sqlite3

# While it lasts nobody may hold a loose bound: otherwise a steady stream of small loose calls
# could keep a large exact one waiting for ever.
_TIGHT_SECONDS: Final = 5


def check(
    connection: sqlite3.Connection,
    grant: Grant,
    amount: Amount,
    moment: Moment,
    *,
    final: bool,
    waits: bool = True,
) -> Exception | None:
    """What forbids the amount; None if nothing does.

    Returned rather than raised, so that the transaction commits what it found out on the way.
    """
    if not grant.limits:
        return None
    windows = counters.ids(connection, grant.scope, grant.lane, moment)
    used = counters.used(connection, windows, grant, moment)
    if grant.loose and not final and _takes_too_much(connection, used, amount, moment):
        return TighterBoundNeeded()
    failing = [one for one in used if amount.of(one.limit.unit) > one.left]
    if not failing:
        return None
    # The window that ends last is the one that binds: the others will be open again before it.
    refusal = max(failing, key=lambda one: one.ends_last).refusal(amount)
    if waits and all(_fits_when_settled(connection, one, amount) for one in failing):
        until = moment.now + _TIGHT_SECONDS * MICROSECONDS
        connection.execute("UPDATE book SET tight_until = ?", (until,))
        return HeldLoosely(refusal)
    return refusal


def _takes_too_much(
    connection: sqlite3.Connection, used: list[Used], amount: Amount, moment: Moment
) -> bool:
    tight = connection.execute("SELECT tight_until > ? FROM book", (moment.now,)).fetchone()[0]
    return bool(tight) or any(2 * amount.of(one.limit.unit) > one.left for one in used)


def _fits_when_settled(connection: sqlite3.Connection, used: Used, amount: Amount) -> bool:
    return amount.of(used.limit.unit) <= used.left + counters.held_loosely(connection, used)
