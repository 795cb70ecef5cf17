"""What became of requests that were sent, and how it is written into the ledger.

The functions are steps in the caller's transaction, for a caller who has more to write down about
the same outcome and commits both at once. Each is done once, however often it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from embedcore.errors import StorageCorrupt
from embedcore.storage import counters, grants
from embedcore.storage.amounts import Amount, Attempt, Grant
from embedcore.storage.counters import Moment

if TYPE_CHECKING:
    import sqlite3

    from embedcore.events import LimitNear


What: TypeAlias = Literal["settled", "returned", "charged", "closed"]


def _unheard(_: LimitNear) -> None:
    """There is no observer."""


@dataclass(kw_only=True, slots=True, eq=False)
class Outcome:
    """What became of an attempt or a grant, on its way into the ledger.

    - ``what``: "settled" at ``actual``; "returned", since nothing was billed; "charged" at
      ``actual``, or in full, since it is not known; "closed": nothing more is sent of the grant.
    - ``closes``: the grant is closed with it. The others are as for the steps of the ledger.
    - ``at``: when, in microseconds since 1970; None: when it is written.
    - ``tell``: hears of the limits that it brought near their ends.

    Once it is written there are ``near``, those limits; ``has_it``, whether the grant has again
    what was returned; and ``unknown``, the error if there is no such attempt.
    """

    what: What
    grant: Grant
    attempt: Attempt | None = None
    actual: Amount | None = None
    reported: bool = False
    request_id: str | None = None
    note: str = ""
    by_status: bool = False
    closes: bool = False
    at: int | None = None
    tell: Callable[[LimitNear], None] = _unheard
    near: Sequence[LimitNear] = ()
    has_it: bool = True
    unknown: StorageCorrupt | None = None


def write(connection: sqlite3.Connection, outcome: Outcome, moment: Moment) -> None:
    """Write it into the ledger. What the ledger does not know changes nothing in it."""
    if outcome.at is not None and outcome.at < moment.now:
        moment = replace(moment, now=outcome.at)
    try:
        if outcome.attempt is not None:
            _write(connection, outcome, outcome.attempt, moment)
    except StorageCorrupt as error:
        # It must not keep all others from being written.
        outcome.unknown = error
    if outcome.closes or outcome.what == "closed":
        grants.close_grant(connection, outcome.grant.id)


def _write(
    connection: sqlite3.Connection, outcome: Outcome, attempt: Attempt, moment: Moment
) -> None:
    actual, request_id = outcome.actual, outcome.request_id
    if outcome.what == "returned":
        outcome.has_it = give_back(
            connection,
            attempt,
            moment,
            note=outcome.note,
            request_id=request_id,
            by_status=outcome.by_status,
        )
    elif outcome.what == "settled" and actual is not None:
        outcome.near = settle(
            connection, attempt, actual, moment, reported=outcome.reported, request_id=request_id
        )
    else:
        outcome.near = charge(
            connection, attempt, moment, actual=actual, note=outcome.note, request_id=request_id
        )


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
    state, windows, generation, charged = grants.entered(connection, attempt)
    counted = None
    if state == "sent":
        counters.settle(connection, windows, attempt.amount, actual)
        counted = counters.generation_of(connection, windows)
    elif state == "charged":
        counters.correct(connection, windows, charged, actual, generation)
    if state in ("sent", "charged"):
        grants.mark(
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
    state, windows, generation, charged = grants.entered(connection, attempt)
    has_it = False
    if state == "sent":
        has_it = grants.give_back(connection, attempt, windows)
    elif state == "charged":
        counters.correct(connection, windows, charged, Amount(), generation)
    else:
        return False
    grants.mark(
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
    actual: Amount | None = None,
    note: str = "",
    request_id: str | None = None,
) -> list[LimitNear]:
    """It is not known whether it was billed: it counts as spent.

    ``actual``: what it would have cost, where that is known; None: the whole amount.
    """
    state, windows, *_ = grants.entered(connection, attempt)
    if state == "sent":
        grants.charge(
            connection,
            attempt.id,
            windows,
            attempt.amount,
            moment,
            actual=attempt.amount if actual is None else actual,
            note=note,
            request_id=request_id,
        )
    return counters.newly_near(connection, windows, attempt.grant, moment)
