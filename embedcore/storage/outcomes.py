"""What became of an attempt: settled, given back or charged.

Every function runs in the caller's transaction, so that whoever has more to write down about the
same outcome commits both at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedcore.storage import entries, windows as counters
from embedcore.storage.amounts import Amount, Attempt

if TYPE_CHECKING:
    import sqlite3

    from embedcore.events import LimitNear
    from embedcore.storage.windows import Moment


def settle(
    connection: sqlite3.Connection,
    attempt: Attempt,
    actual: Amount,
    moment: Moment,
    *,
    reported: bool,
    request_id: str | None = None,
) -> list[LimitNear]:
    """The attempt cost ``actual``; corrects one that was charged, and is otherwise done once."""
    state, windows, generation = entries.state(connection, attempt)
    counted = None
    if state == "sent":
        counters.settle(connection, windows, attempt.amount, actual)
        counted = counters.generation_of(connection, windows)
    elif state == "charged":
        counters.correct(connection, windows, attempt.amount, actual, generation)
    if state in ("sent", "charged"):
        entries.mark(
            connection,
            attempt,
            "settled",
            actual,
            moment,
            reported=reported,
            request_id=request_id,
            counted=counted,
        )
    return counters.newly_near(connection, windows, attempt.grant, moment)


def give_back(
    connection: sqlite3.Connection,
    attempt: Attempt,
    moment: Moment,
    *,
    note: str = "",
    request_id: str | None = None,
    by_status: bool = False,
) -> bool:
    """Nothing was billed: the amount returns to the grant, or to the windows if that is closed.

    ``by_status``: only the status of the answer says so. Returns whether the grant has it again.
    """
    state, windows, generation = entries.state(connection, attempt)
    has_it = False
    if state == "sent":
        has_it = entries.give_back(connection, attempt, windows)
    elif state == "charged":
        counters.correct(connection, windows, attempt.amount, Amount(), generation)
    else:
        return False
    entries.mark(
        connection,
        attempt,
        "returned",
        Amount(),
        moment,
        request_id=request_id,
        note=note,
        by_status=by_status,
    )
    return has_it


def charge(
    connection: sqlite3.Connection,
    attempt: Attempt,
    moment: Moment,
    *,
    note: str = "",
    request_id: str | None = None,
) -> list[LimitNear]:
    """Nobody can say whether it was billed: the whole amount counts as spent."""
    state, windows, _ = entries.state(connection, attempt)
    if state == "sent":
        entries.charge(
            connection,
            attempt.id,
            windows,
            attempt.amount,
            moment,
            note=note,
            request_id=request_id,
        )
    return counters.newly_near(connection, windows, attempt.grant, moment)
