"""Reports of what was spent and what is reserved; rate limits that providers named.

What a crash left open is closed before anything is read: it would be shown as reserved, though
it will never be sent. What ended in this process is written down before, and in others within a
second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from embedcore.storage import counters
from embedcore.storage.amounts import Amount, Grant, Lane, Limit
from embedcore.storage.calendar import MICROSECONDS, PERIODS, Period, window_start, zone_named
from embedcore.storage.spool import flush_all

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.counters import Moment, Used
    from embedcore.storage.database import Database
    from embedcore.storage.ledger import Ledger


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """One window: what is spent and reserved in it. Costs are in picodollars."""

    scope: str
    period: Period
    start: str
    spent: Amount
    held: Amount
    requests: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelUsage:
    """One model within one period. ``unconfirmed``: charged without proof that it was billed.

    ``estimated``: settled at the amount reserved, because the provider named no figure.
    ``free_by_status``: not charged, though nothing but the status of the answer says that it was
    not billed; so many ``free_by_status_requests`` were answered like that.
    """

    model: str
    period: Period
    spent: Amount
    unconfirmed: Amount
    estimated: Amount
    free_by_status: Amount
    requests: int
    free_by_status_requests: int


def windows_now(ledger: Ledger, scope: str | None = None) -> list[Usage]:
    """Today, this month and in total: of ``scope``, or of every scope and all of them together."""
    moment = ledger.close_abandoned()
    where, values = ("", []) if scope is None else (" AND scope = ?", [scope])
    found = []
    with ledger.database.read() as connection:
        for period in PERIODS:
            start = window_start(period, moment.now, moment.zone)
            rows = connection.execute(
                "SELECT scope, tokens_spent, cost_spent, tokens_held, cost_held, requests"
                f" FROM window WHERE lane = 'all' AND period = ? AND start = ?{where}"
                " ORDER BY scope",
                [period, start, *values],
            )
            found += [_usage(period, start, row) for row in rows]
    return found


def of_scope(ledger: Ledger, scope: str, period: Period = "day") -> Usage:
    """One scope's current window; all zero if nothing was spent in it."""
    found = [usage for usage in windows_now(ledger, scope) if usage.period == period]
    if found:
        return found[0]
    moment = ledger.moment()
    start = window_start(period, moment.now, moment.zone)
    return Usage(scope=scope, period=period, start=start, spent=Amount(), held=Amount(), requests=0)


def by_model(ledger: Ledger) -> list[ModelUsage]:
    """Every model that was asked today, this month and in total, over all scopes."""
    moment = ledger.close_abandoned()
    with ledger.database.read() as connection:
        return [
            _model_usage(period, row)
            for period in PERIODS
            for row in connection.execute(_BY_MODEL, (_since(period, moment),))
        ]


_BY_MODEL = """
SELECT model, sum(actual_tokens) AS spent_tokens, sum(actual_cost) AS spent_cost,
       sum(iif(state = 'charged', actual_tokens, 0)) AS charged_tokens,
       sum(iif(state = 'charged', actual_cost, 0)) AS charged_cost,
       sum(iif(state = 'settled' AND NOT reported, actual_tokens, 0)) AS estimated_tokens,
       sum(iif(state = 'settled' AND NOT reported, actual_cost, 0)) AS estimated_cost,
       sum(iif(by_status, tokens, 0)) AS free_tokens, sum(iif(by_status, cost, 0)) AS free_cost,
       count(*) AS requests, sum(by_status) AS free_requests
FROM attempt
WHERE sent >= ? AND state IN ('sent', 'settled', 'charged', 'returned', 'recorded')
GROUP BY model ORDER BY model"""


def cost_of_texts(ledger: Ledger) -> dict[str, int]:
    """Model → what one text cost on average until now, in picodollars, where it is known."""
    flush_all()
    with ledger.database.read() as connection:
        return dict(
            connection.execute(
                "SELECT model, sum(actual_cost) / sum(inputs) FROM attempt "
                "WHERE state = 'settled' AND inputs > 0 GROUP BY model"
            ).fetchall()
        )


def limits_now(ledger: Ledger, scope: str, limits: Sequence[Limit], lane: Lane) -> list[Used]:
    """Each limit beside what its window holds now."""
    moment = ledger.close_abandoned()
    with ledger.database.transaction() as connection:
        windows = counters.ids(connection, scope, lane, moment)
        grant = Grant(id=0, scope=scope, lane=lane, limits=tuple(limits), loose=False)
        return counters.used(connection, windows, grant, moment)


def audit(ledger: Ledger, *, last: int | None = None) -> list[dict[str, Any]]:
    """Every attempt and every adjustment, oldest first: the rows of the table, times as UTC."""
    ledger.close_abandoned()
    with ledger.database.read() as connection:
        table = ledger.database.utilities(connection)["attempt"]
        rows = list(table.rows_where(order_by="id desc", limit=last))
        for row in rows:
            for name in ("sent", "ended"):
                row[name] = _utc(row[name])
    return rows[::-1]


def _usage(period: Period, start: str, row: sqlite3.Row) -> Usage:
    return Usage(
        scope=row["scope"],
        period=period,
        start=start,
        spent=Amount(tokens=row["tokens_spent"], cost=row["cost_spent"]),
        held=Amount(tokens=row["tokens_held"], cost=row["cost_held"]),
        requests=row["requests"],
    )


def _model_usage(period: Period, row: sqlite3.Row) -> ModelUsage:
    return ModelUsage(
        model=row["model"],
        period=period,
        spent=Amount(tokens=row["spent_tokens"] or 0, cost=row["spent_cost"] or 0),
        unconfirmed=Amount(tokens=row["charged_tokens"], cost=row["charged_cost"]),
        estimated=Amount(tokens=row["estimated_tokens"] or 0, cost=row["estimated_cost"] or 0),
        free_by_status=Amount(tokens=row["free_tokens"], cost=row["free_cost"]),
        requests=row["requests"],
        free_by_status_requests=row["free_requests"],
    )


def _since(period: Period, moment: Moment) -> int:
    start = window_start(period, moment.now, moment.zone)
    if period == "total":
        return 0
    first = datetime.fromisoformat(start if period == "day" else f"{start}-01")
    return round(first.replace(tzinfo=zone_named(moment.zone)).timestamp()) * MICROSECONDS


def _utc(microseconds: int | None) -> str | None:
    if microseconds is None:
        return None
    try:
        return datetime.fromtimestamp(microseconds / MICROSECONDS, tz=UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{microseconds} microseconds"


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedRates:
    """Requests and tokens per minute; None: no such limit was named. ``named``: seconds since
    1970 when they were."""

    endpoint: str
    model: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    named: float


def note(database: Database, rates: NamedRates) -> None:
    """Put these in the place of what the same endpoint named before for the same model."""
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO rate (endpoint, model, requests, tokens, named) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET requests = excluded.requests, tokens = excluded.tokens, "
            "named = excluded.named",
            (
                rates.endpoint,
                rates.model,
                rates.requests_per_minute,
                rates.tokens_per_minute,
                int(rates.named * MICROSECONDS),
            ),
        )


def named_rates(database: Database) -> list[NamedRates]:
    """All that were ever named, by endpoint and model."""
    with database.read() as connection:
        rows = connection.execute(
            "SELECT endpoint, model, requests, tokens, named FROM rate ORDER BY endpoint, model"
        ).fetchall()
    return [
        NamedRates(
            endpoint=endpoint,
            model=model,
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            named=named / MICROSECONDS,
        )
        for endpoint, model, requests, tokens, named in rows
    ]
