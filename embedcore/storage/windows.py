"""The counters: what was spent and is held, per scope, lane and period.

A call's money is counted in six windows at once (day, month and total, for its scope and for all
scopes), a query's in three more. Every function runs inside the caller's transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from embedcore.errors import BudgetExceeded, CostBudgetExceeded, TokenBudgetExceeded
from embedcore.events import LimitNear
from embedcore.storage.amounts import ALL_SCOPES, Amount, Grant, Lane, Limit
from embedcore.storage.calendar import PERIODS, window_end, window_start

if TYPE_CHECKING:
    import sqlite3

_WARN_PERCENT: Final = 90
_PER_DOLLAR: Final = 10**12
_NEVER: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """The time by which the books are kept: microseconds since 1970, and the zone of its days."""

    now: int
    zone: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """One limit beside its window. ``reserved``: what bulk work must leave to queries."""

    limit: Limit
    window: int
    spent: int
    held: int
    reserved: int
    ends: datetime | None

    @property
    def left(self) -> int:
        return self.limit.amount - self.spent - self.held - self.reserved

    @property
    def ends_last(self) -> datetime:
        return self.ends or _NEVER

    def refusal(self, amount: Amount) -> BudgetExceeded:
        limit, asked = self.limit, amount.of(self.limit.unit)
        kind = TokenBudgetExceeded if limit.unit == "tokens" else CostBudgetExceeded
        return kind(
            self._message(asked),
            limit=limit.amount,
            spent=self.spent,
            held=self.held,
            asked=asked,
            resets_at=self.ends,
            never_fits=asked > limit.amount - self.reserved_at_most,
            period=limit.period,
            scope=limit.scope,
        )

    @property
    def reserved_at_most(self) -> int:
        return self.limit.reserved if self.reserved else 0

    def _message(self, asked: int) -> str:
        limit, show = self.limit, _shown[self.limit.unit]
        whom = "all scopes" if limit.scope == ALL_SCOPES else f"scope {limit.scope!r}"
        period = "in total" if limit.period == "total" else f"per {limit.period}"
        kept = f", {show(self.reserved)} reserved for queries" if self.reserved else ""
        ends = f"it resets at {self.ends:%Y-%m-%d %H:%M} UTC" if self.ends else "it never resets"
        return (
            f"nothing was sent: the call needs {show(asked)}, and of {show(limit.amount)} {period} "
            f"for {whom} {show(max(self.left, 0))} are left ({show(self.spent)} spent, "
            f"{show(self.held)} held{kept}); {ends}. Send less, wait, or raise the limit"
        )


def show_tokens(tokens: int) -> str:
    return f"{tokens:,} tokens"


def show_cost(picodollars: int) -> str:
    """US dollars with enough digits to tell small amounts from nothing."""
    dollars = picodollars / _PER_DOLLAR
    return f"${dollars:,.2f}" if dollars >= 1 or not picodollars else f"${dollars:.6f}"


_shown = {"tokens": show_tokens, "cost": show_cost}


def ids(connection: sqlite3.Connection, scope: str, lane: Lane, moment: Moment) -> str:
    """The windows that a call of this scope and lane counts in, created where new.

    In this order: day, month, total of the scope, of all scopes and, for a query, of the scope's
    queries.
    """
    lanes = [(scope, "all"), (ALL_SCOPES, "all")]
    if lane == "query":
        lanes.append((scope, "query"))
    starts = [(period, window_start(period, moment.now, moment.zone)) for period in PERIODS]
    found = []
    for owner, of_lane in lanes:
        for period, start in starts:
            key = (owner, of_lane, period, start)
            row = connection.execute(_FIND, key).fetchone()
            if row is None:
                row = connection.execute(_CREATE, key).fetchone()
            found.append(str(row[0]))
    return ",".join(found)


_FIND = "SELECT id FROM window WHERE scope = ? AND lane = ? AND period = ? AND start = ?"
_CREATE = "INSERT INTO window (scope, lane, period, start) VALUES (?, ?, ?, ?) RETURNING id"


def hold(connection: sqlite3.Connection, windows: str, amount: Amount) -> None:
    connection.execute(
        "UPDATE window SET tokens_held = tokens_held + ?, cost_held = cost_held + ?"
        f" WHERE id IN ({windows})",
        (amount.tokens, amount.cost),
    )


def release(connection: sqlite3.Connection, windows: str, held: Amount) -> None:
    connection.execute(
        "UPDATE window SET tokens_held = tokens_held - ?, cost_held = cost_held - ?"
        f" WHERE id IN ({windows})",
        (held.tokens, held.cost),
    )


def settle(connection: sqlite3.Connection, windows: str, held: Amount, spent: Amount) -> None:
    """What was held becomes what was spent."""
    connection.execute(
        "UPDATE window SET tokens_held = tokens_held - ?, cost_held = cost_held - ?,"
        " tokens_spent = tokens_spent + ?, cost_spent = cost_spent + ?"
        f" WHERE id IN ({windows})",
        (held.tokens, held.cost, spent.tokens, spent.cost),
    )


def count_request(connection: sqlite3.Connection, windows: str) -> None:
    connection.execute(f"UPDATE window SET requests = requests + 1 WHERE id IN ({windows})")


def spend(connection: sqlite3.Connection, windows: str, amount: Amount) -> None:
    settle(connection, windows, Amount(), amount)


def correct(
    connection: sqlite3.Connection, windows: str, charged: Amount, actual: Amount, generation: int
) -> None:
    """Replace what was charged by what it really cost.

    A day that was reset since then has forgotten the charge: its tokens are left alone.
    """
    tokens, cost = actual.tokens - charged.tokens, actual.cost - charged.cost
    reset_since = generation_of(connection, windows) != generation
    days = ",".join(_reset_days(windows)) if reset_since else ""
    connection.execute(
        "UPDATE window SET cost_spent = cost_spent + ?,"
        f" tokens_spent = tokens_spent + iif(id IN ({days}), 0, ?)"
        f" WHERE id IN ({windows})",
        (cost, tokens),
    )


def generation_of(connection: sqlite3.Connection, windows: str) -> int:
    day = windows.partition(",")[0]
    row = connection.execute("SELECT generation FROM window WHERE id = ?", (day,)).fetchone()
    return int(row[0])


def reset_day(connection: sqlite3.Connection, windows: str) -> int:
    """Take the day's tokens of a scope off again; returns how many there were."""
    days = _reset_days(windows)
    spent = connection.execute("SELECT tokens_spent FROM window WHERE id = ?", days[:1]).fetchone()
    connection.execute(
        "UPDATE window SET tokens_spent = 0, requests = 0, generation = generation + 1"
        f" WHERE id IN ({','.join(days)})"
    )
    connection.execute(
        f"DELETE FROM warning WHERE unit = 'tokens' AND window IN ({','.join(days)})"
    )
    return int(spent[0])


def _reset_days(windows: str) -> list[str]:
    """The day of the scope and of its queries: what ``reset`` touches."""
    every = windows.split(",")
    return every[0:1] + every[6:7]


def used(connection: sqlite3.Connection, windows: str, grant: Grant, moment: Moment) -> list[Used]:
    """Each limit of the grant beside what its window holds."""
    if not grant.limits:
        return []
    rows = {
        row[0]: row
        for row in connection.execute(
            "SELECT id, tokens_spent, tokens_held, cost_spent, cost_held FROM window"
            f" WHERE id IN ({windows})"
        )
    }
    every = [int(window) for window in windows.split(",")]
    found = []
    for limit in grant.limits:
        window = every[(3 if limit.scope == ALL_SCOPES else 0) + PERIODS.index(limit.period)]
        first = 1 if limit.unit == "tokens" else 3
        spent, held = rows[window][first : first + 2]
        reserved = 0 if grant.lane == "query" else _reserved(connection, limit, moment)
        ends = window_end(limit.period, moment.now, moment.zone)
        found.append(
            Used(limit=limit, window=window, spent=spent, held=held, reserved=reserved, ends=ends)
        )
    return found


def _reserved(connection: sqlite3.Connection, limit: Limit, moment: Moment) -> int:
    """What queries have not yet used of their share."""
    if not limit.reserved:
        return 0
    start = window_start(limit.period, moment.now, moment.zone)
    row = connection.execute(
        f"SELECT {limit.unit}_spent + {limit.unit}_held FROM window"
        " WHERE scope = ? AND lane = 'query' AND period = ? AND start = ?",
        (limit.scope, limit.period, start),
    ).fetchone()
    return max(limit.reserved - (row[0] if row else 0), 0)


def held_loosely(connection: sqlite3.Connection, used: Used) -> int:
    """How much of what the window holds is a bound that may turn out far too high."""
    mine = f"instr(',' || windows || ',', ',{used.window},') > 0"
    unit = used.limit.unit
    row = connection.execute(
        f'SELECT (SELECT coalesce(sum({unit}), 0) FROM "grant" WHERE loose AND {mine})'
        f" + (SELECT coalesce(sum({unit}), 0) FROM attempt"
        f" WHERE state = 'sent' AND loose AND {mine})"
    ).fetchone()
    return int(row[0])


def newly_near(
    connection: sqlite3.Connection, windows: str, grant: Grant, moment: Moment
) -> list[LimitNear]:
    """The limits that are 90 % spent and of which nobody was told yet, in any process."""
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
                    used=found.spent,
                    limit=limit.amount,
                )
            )
    return near
