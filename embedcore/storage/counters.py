"""Counters of budget windows.

A call's money is counted in six windows at once (day, month and total, for its scope and for all
scopes), a query's in three more. Every function runs inside the caller's transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from embedcore.errors import (
    BudgetExceeded,
    CostBudgetExceeded,
    TokenBudgetExceeded,
)
from embedcore.events import LimitNear
from embedcore.storage.amounts import (
    ALL_SCOPES,
    Amount,
    Grant,
    Lane,
    Limit,
    as_shown,
    shown,
)
from embedcore.storage.calendar import PERIODS, window_end, window_start

if TYPE_CHECKING:
    import sqlite3
    from datetime import datetime


_WARN_PERCENT: Final = 90


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """The time that the ledger goes by: microseconds since 1970, and the zone of its days."""

    now: int
    zone: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """One limit beside its window.

    ``reserved``: what this call must leave to queries now. ``most``: what it could get of a window
    in which nothing is spent yet.
    """

    limit: Limit
    window: int
    spent: int
    held: int
    reserved: int
    most: int
    moment: Moment

    @property
    def left(self) -> int:
        return self.limit.amount - self.spent - self.held - self.reserved

    @property
    def ends(self) -> datetime | None:
        return window_end(self.limit.period, self.moment.now, self.moment.zone)

    def would_near(self, amount: Amount) -> bool:
        """Whether the limit would near its end if this and all that is reserved were spent."""
        together = self.spent + self.held + amount.of(self.limit.unit)
        return together * 100 >= self.limit.amount * _WARN_PERCENT

    def refusal(self, amount: Amount, *, is_bound: bool = False) -> BudgetExceeded:
        """``is_bound``: what it costs was not counted, and it may be less."""
        limit, asked = self.limit, amount.of(self.limit.unit)
        unit = limit.unit
        kind = TokenBudgetExceeded if limit.unit == "tokens" else CostBudgetExceeded
        return kind(
            self._message(asked, "up to " if is_bound else ""),
            limit=as_shown(unit, limit.amount),
            spent=as_shown(unit, self.spent),
            held=as_shown(unit, self.held),
            asked=as_shown(unit, asked),
            resets_at=self.ends,
            never_fits=asked > self.most,
            period=limit.period,
            scope=limit.scope,
        )

    def _message(self, asked: int, up_to: str) -> str:
        limit = self.limit

        def show(amount: int) -> str:
            return shown(limit.unit, amount)

        whom = "all scopes" if limit.scope == ALL_SCOPES else f"scope {limit.scope!r}"
        period = "in total" if limit.period == "total" else f"per {limit.period}"
        kept = f", {show(self.reserved)} kept for queries" if self.reserved else ""
        ends = self.ends
        when = f"it resets at {ends:%Y-%m-%d %H:%M} UTC" if ends else "it never resets"
        return (
            f"not sent: {up_to}{show(asked)} would be needed, and of {show(limit.amount)} {period} "
            f"for {whom} {show(max(self.left, 0))} are left ({show(self.spent)} spent, "
            f"{show(self.held)} reserved{kept}); {when}. Send less, wait, or raise the limit"
        )


def ids(connection: sqlite3.Connection, scope: str, lane: Lane, moment: Moment) -> str:
    """The windows that a call of this scope and lane counts in, created where new.

    In this order: day, month, total of the scope, of all scopes and, for a query, of the scope's
    queries.
    """
    starts = [window_start(period, moment.now, moment.zone) for period in PERIODS]
    keys = (scope, ALL_SCOPES, *starts)
    found = connection.execute(_FIND[lane], keys).fetchone()
    if None in found:
        connection.execute(_CREATE[lane], keys)
        found = connection.execute(_FIND[lane], keys).fetchone()
    return ",".join(map(str, found))


# Parameters: 1 the scope, 2 all scopes, 3 to 5 the starts of the day, the month and the total.
_KEYS: Final = {
    lane: [
        f"?{owner}, '{of_lane}', '{period}', ?{start}"
        for owner, of_lane in owners
        for start, period in enumerate(PERIODS, 3)
    ]
    for lane, owners in (
        ("all", ((1, "all"), (2, "all"))),
        ("query", ((1, "all"), (2, "all"), (1, "query"))),
    )
}
_FIND: Final = {
    lane: "SELECT "
    + ", ".join(
        f"(SELECT id FROM window WHERE (scope, lane, period, start) = ({key}))" for key in keys
    )
    for lane, keys in _KEYS.items()
}
_CREATE: Final = {
    lane: "INSERT INTO window (scope, lane, period, start) VALUES "
    + ", ".join(f"({key})" for key in keys)
    + " ON CONFLICT DO NOTHING"
    for lane, keys in _KEYS.items()
}


def hold(
    connection: sqlite3.Connection, windows: str, amount: Amount, *, requests: int = 0
) -> None:
    connection.execute(
        "UPDATE window SET tokens_held = tokens_held + ?, cost_held = cost_held + ?,"
        f" requests = requests + ? WHERE id IN ({windows})",
        (amount.tokens, amount.cost, requests),
    )


def release(connection: sqlite3.Connection, windows: str, held: Amount) -> None:
    connection.execute(
        "UPDATE window SET tokens_held = tokens_held - ?, cost_held = cost_held - ?"
        f" WHERE id IN ({windows})",
        (held.tokens, held.cost),
    )


def settle(connection: sqlite3.Connection, windows: str, held: Amount, spent: Amount) -> None:
    """What was reserved becomes what was spent."""
    connection.execute(
        "UPDATE window SET tokens_held = tokens_held - ?, cost_held = cost_held - ?,"
        " tokens_spent = tokens_spent + ?, cost_spent = cost_spent + ?"
        f" WHERE id IN ({windows})",
        (held.tokens, held.cost, spent.tokens, spent.cost),
    )


def count_request(connection: sqlite3.Connection, windows: str) -> None:
    hold(connection, windows, Amount(), requests=1)


def spend(connection: sqlite3.Connection, windows: str, amount: Amount) -> None:
    settle(connection, windows, Amount(), amount)


def correct(
    connection: sqlite3.Connection, windows: str, charged: Amount, actual: Amount, generation: int
) -> None:
    """Replace what was charged by what it really cost.

    A day that was reset since then has forgotten the charge: its tokens are left alone.
    """
    connection.execute(
        "UPDATE window SET cost_spent = cost_spent + ?,"
        " tokens_spent = tokens_spent + iif(generation > ?, 0, ?)"
        f" WHERE id IN ({windows})",
        (actual.cost - charged.cost, generation, actual.tokens - charged.tokens),
    )


def changed_limits(grant: Grant, before: str, now: str) -> Grant:
    """The grant with only those of its limits whose windows are others now."""
    old, new = before.split(","), now.split(",")
    return replace(
        grant,
        limits=tuple(limit for limit in grant.limits if old[_place(limit)] != new[_place(limit)]),
    )


def _place(limit: Limit) -> int:
    """Where a limit's window is among those of a call, as ``ids`` gives them."""
    return (len(PERIODS) if limit.scope == ALL_SCOPES else 0) + PERIODS.index(limit.period)


def generation_of(connection: sqlite3.Connection, windows: str) -> int:
    """The number of the latest reset that touched one of these windows."""
    row = connection.execute(f"SELECT max(generation) FROM window WHERE id IN ({windows})")
    return int(row.fetchone()[0])


def reset_day(connection: sqlite3.Connection, windows: str) -> int:
    """Take the day's tokens of a scope, and of its queries, off again; returns how many."""
    every = windows.split(",")
    day, of_queries = every[0], every[6]
    spent = connection.execute("SELECT tokens_spent FROM window WHERE id = ?", (day,)).fetchone()
    connection.execute(
        "UPDATE window SET tokens_spent = 0, requests = 0,"
        " generation = (SELECT max(generation) + 1 FROM window) WHERE id IN (?, ?)",
        (day, of_queries),
    )
    connection.execute(
        "DELETE FROM warning WHERE unit = 'tokens' AND window IN (?, ?)", (day, of_queries)
    )
    return int(spent[0])


def used(connection: sqlite3.Connection, windows: str, grant: Grant, moment: Moment) -> list[Used]:
    """Each limit of the grant beside what its window holds."""
    if not grant.limits:
        return []
    rows = {
        row["id"]: row
        for row in connection.execute(
            "SELECT id, tokens_spent, tokens_held, cost_spent, cost_held FROM window"
            f" WHERE id IN ({windows})"
        )
    }
    every = [int(window) for window in windows.split(",")]
    found = []
    for limit in grant.limits:
        window = every[_place(limit)]
        spent, held = rows[window][f"{limit.unit}_spent"], rows[window][f"{limit.unit}_held"]
        bulk = grant.lane != "query"
        found.append(
            Used(
                limit=limit,
                window=window,
                spent=spent,
                held=held,
                reserved=_reserved(connection, limit, moment) if bulk else 0,
                most=limit.amount - (limit.reserved if bulk else 0),
                moment=moment,
            )
        )
    return found


def _reserved(connection: sqlite3.Connection, limit: Limit, moment: Moment) -> int:
    """What queries have not yet used of their share."""
    if not limit.reserved:
        return 0
    start = window_start(limit.period, moment.now, moment.zone)
    whose = "?1 = ?1" if limit.scope == ALL_SCOPES else "scope = ?1"
    row = connection.execute(
        f"SELECT coalesce(sum({limit.unit}_spent + {limit.unit}_held), 0) FROM window"
        f" WHERE {whose} AND lane = 'query' AND period = ?2 AND start = ?3",
        (limit.scope, limit.period, start),
    ).fetchone()
    return max(limit.reserved - int(row[0]), 0)


def newly_near(
    connection: sqlite3.Connection, windows: str, grant: Grant, moment: Moment
) -> list[LimitNear]:
    """The limits that are 90 % spent and were not announced yet, in any process."""
    near = []
    for found in used(connection, windows, grant, moment):
        limit = found.limit
        if found.spent * 100 < limit.amount * _WARN_PERCENT:
            continue
        first = connection.execute(
            "INSERT OR IGNORE INTO warning VALUES (?, ?, ?)",
            (found.window, limit.unit, limit.amount),
        ).rowcount
        if first == 1:
            near.append(
                LimitNear(
                    scope=limit.scope,
                    period=limit.period,
                    unit=limit.unit,
                    used=as_shown(limit.unit, found.spent),
                    limit=as_shown(limit.unit, limit.amount),
                )
            )
    return near
