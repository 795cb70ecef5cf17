"""``embedcore usage``: what was spent, by scope and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from embedcore import money
from embedcore.cli.options import talking
from embedcore.cli.screen import Screen
from embedcore.cli.session import state_ledger
from embedcore.cli.text import plural
from embedcore.config import Config
from embedcore.storage import usage
from embedcore.storage.amounts import ALL_SCOPES

if TYPE_CHECKING:
    from embedcore.storage.amounts import Amount
    from embedcore.storage.usage import ModelUsage, Usage

_PERIODS = {"day": "today", "month": "this month", "total": "in total"}
_AUDIT_HEADS = (
    "SENT (UTC)",
    "STATE",
    "MODEL",
    "SCOPE",
    "INPUTS",
    "TOKENS",
    "COST",
    "REQUEST",
    "NOTE",
)


@click.command(name="usage")
@click.option("--scope", metavar="NAME", help="Only this project.")
@click.option("--audit", is_flag=True, help="Every attempt that was sent, oldest first.")
@click.option(
    "--last", metavar="N", type=click.IntRange(min=1), help="With --audit: only the last N."
)
@talking
@click.pass_obj
def command(screen: Screen, scope: str | None, audit: bool, last: int | None) -> None:
    """What was spent today, this month and in total: per scope and per model.

    Unconfirmed is what was charged without proof that the provider billed it; estimated, what was
    settled at the amount reserved because the provider named no figure. Both count as spent. Free
    by status does not: of these requests only the status of the answer, say 429 from a gateway,
    says that they were not billed. Each has a column where there is any.
    """
    if last is not None and not audit:
        raise click.UsageError("--last belongs to --audit")
    with state_ledger(Config.load()) as ledger:
        if audit:
            attempts = usage.audit(ledger, last=last)
            _show_audit(screen, [row for row in attempts if scope in (None, row["scope"])])
            return
        windows = usage.windows_now(ledger, scope)
        models = usage.by_model(ledger) if scope is None else []
        zone = ledger.moment().zone
    screen.json(
        {
            "timezone": zone,
            "scopes": [_window_fields(one) for one in windows],
            "models": [_model_fields(one) for one in models],
        }
    )
    _show_windows(screen, windows, zone)
    if models:
        screen.result("")
        _show_models(screen, models)


def _show_windows(screen: Screen, windows: Sequence[Usage], zone: str) -> None:
    if not any(one.requests or one.spent.tokens or one.held.tokens for one in windows):
        screen.result("nothing was spent yet")
        return
    heads = ("WHEN", "SCOPE", "TOKENS", "COST", "REQUESTS", "RESERVED")
    rows = [
        (
            _PERIODS[one.period],
            "all scopes" if one.scope == ALL_SCOPES else one.scope,
            f"{one.spent.tokens:,}",
            money.shown(one.spent.dollars),
            f"{one.requests:,}",
            _both(one.held),
        )
        for one in windows
    ]
    screen.table(heads, rows, numbers={2, 3, 4, 5}, spare=("RESERVED", "REQUESTS"))
    screen.result(f"days and months begin at midnight in {zone}")


def _show_models(screen: Screen, models: Sequence[ModelUsage]) -> None:
    marked = {
        "UNCONFIRMED": [_both(one.unconfirmed) for one in models],
        "ESTIMATED": [_both(one.estimated) for one in models],
        "FREE BY STATUS": [_free(one) for one in models],
    }
    # Mostly there is nothing to say there, and the table fits a terminal of 80 columns.
    said = {head: cells for head, cells in marked.items() if set(cells) != {"-"}}
    heads = ("WHEN", "MODEL", "TOKENS", "COST", "REQUESTS", *said)
    rows = [
        (
            _PERIODS[one.period],
            one.model or "(recorded by hand)",
            f"{one.spent.tokens:,}",
            money.shown(one.spent.dollars),
            f"{one.requests:,}",
            *(cells[number] for cells in said.values()),
        )
        for number, one in enumerate(models)
    ]
    screen.table(heads, rows, numbers=range(2, len(heads)), spare=("REQUESTS",))


def _both(amount: Amount) -> str:
    return (
        f"{amount.tokens:,} ({money.shown(amount.dollars)})"
        if amount.tokens or amount.cost
        else "-"
    )


def _free(one: ModelUsage) -> str:
    number = one.free_by_status_requests
    return f"{plural(number, 'request')}, {_both(one.free_by_status)}" if number else "-"


def _show_audit(screen: Screen, attempts: Sequence[dict[str, Any]]) -> None:
    screen.json({"attempts": [_attempt_fields(row) for row in attempts]})
    rows = [
        (
            (row["sent"] or "")[:19].replace("T", " "),
            row["state"],
            row["model"] or "-",
            row["scope"],
            f"{row['inputs']:,}",
            f"{_actual(row, 'tokens'):,}",
            money.shown(money.in_dollars(_actual(row, "cost"))),
            row["request_id"] or "-",
            row["note"] or "",
        )
        for row in attempts
    ]
    if not rows:
        screen.result("nothing was sent yet")
        return
    # What is the same in all rows, or in none, says least.
    spare = [
        *(("SCOPE",) if len({row[3] for row in rows}) == 1 else ()),
        *(("NOTE",) if not any(row[8] for row in rows) else ()),
        "REQUEST",
        "INPUTS",
    ]
    screen.table(_AUDIT_HEADS, rows, numbers={4, 5, 6}, spare=spare)


def _attempt_fields(row: dict[str, Any]) -> dict[str, Any]:
    costs = {name: row[name] for name in ("cost", "actual_cost")}
    return row | {
        name: None if cost is None else money.in_dollars(cost) for name, cost in costs.items()
    }


def _actual(row: dict[str, Any], what: str) -> int:
    """What it cost; while it is under way, what is reserved for it."""
    actual = row[f"actual_{what}"]
    return int(row[what] if actual is None else actual)


def _window_fields(one: Usage) -> dict[str, Any]:
    return {
        "scope": one.scope,
        "period": one.period,
        "start": one.start or None,
        "requests": one.requests,
        **_money("spent", one.spent),
        **_money("reserved", one.held),
    }


def _model_fields(one: ModelUsage) -> dict[str, Any]:
    return {
        "model": one.model,
        "period": one.period,
        "requests": one.requests,
        **_money("spent", one.spent),
        **_money("unconfirmed", one.unconfirmed),
        **_money("estimated", one.estimated),
        **_money("free_by_status", one.free_by_status),
        "free_by_status_requests": one.free_by_status_requests,
    }


def _money(name: str, amount: Amount) -> dict[str, Any]:
    return {f"{name}_tokens": amount.tokens, f"{name}_cost": amount.dollars}
