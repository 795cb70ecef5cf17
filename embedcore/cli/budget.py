"""``embedcore budget``: the limits, what is left of them, and when they reset."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from embedcore import money
from embedcore.cli.options import Group, model_option, talking
from embedcore.cli.screen import Screen
from embedcore.cli.session import set_by, state_ledger
from embedcore.cli.text import duration, facts, plural
from embedcore.config import Config
from embedcore.storage import usage
from embedcore.storage.amounts import ALL_SCOPES, as_shown
from embedcore.storage.calendar import MICROSECONDS

if TYPE_CHECKING:
    from embedcore.storage.amounts import Unit
    from embedcore.storage.counters import Used
    from embedcore.storage.crosscheck import Difference

# The ledger writes its clock down now and then: by so little it is not wrong yet.
CLOCK_TOLERANCE_SECONDS = 60.0
_HEADS = ("LIMIT", "OF", "SPENT", "RESERVED", "LEFT", "RESETS", "SET BY")


@click.group(cls=Group, name="budget", invoke_without_command=True)
@model_option
@click.option("--scope", metavar="NAME", help="The project to look at.")
@talking
@click.pass_context
def command(ctx: click.Context, model: str | None, scope: str | None) -> None:
    """The limits that a call must keep now, and which layer set each.

    Limits of all layers hold together: a lower one can only tighten them.
    """
    if ctx.invoked_subcommand is not None:
        return
    screen: Screen = ctx.obj
    config = Config.load()
    profile = config.profile(model)
    whose = scope or profile.scope or config.scope
    limits = config.limits(profile, whose)
    with state_ledger(config, limits) as ledger:
        found = usage.limits_now(ledger, whose, limits, "all")
        today = usage.of_scope(ledger, whose)
    screen.json({"scope": whose, "limits": [_fields(one, config) for one in found]})
    if not found:
        screen.result(
            f"no limit is set for scope {whose!r}; {today.spent.tokens:,} tokens "
            f"({money.shown(today.spent.dollars)}) were spent today.\n"
            "Set one with EMBEDCORE_DAILY_TOKEN_LIMIT=1000000, or in embedcore.toml:\n"
            "  [budget]\n  daily_cost_limit = 5.00"
        )
        return
    rows = [_row(one, config) for one in found]
    screen.table(_HEADS, rows, numbers={1, 2, 3, 4}, spare=("SET BY", "RESERVED"))


@command.command(name="clock")
@click.option("--repair", is_flag=True, help="Take the state file back to this computer's time.")
@talking
@click.pass_obj
def clock(screen: Screen, repair: bool) -> None:
    """The time of the state file beside that of this computer.

    The time of the state file never goes back. A computer whose clock was wrong once leaves them in
    the future: everything is then counted there, until --repair takes them back, on the record.
    """
    with state_ledger(Config.load()) as ledger:
        before = ledger.moment().now / MICROSECONDS
        real = time.time()
        if repair:
            before, real = ledger.repair_clock()
    ahead = max(before - real, 0.0)
    wrong = ahead > CLOCK_TOLERANCE_SECONDS
    screen.json(
        {
            "state_file": _utc(before),
            "computer": _utc(real),
            "ahead_seconds": ahead,
            "repaired": repair,
        }
    )
    screen.result(facts([("state file", _utc(before)), ("computer", _utc(real))]))
    if repair:
        screen.result(
            f"taken back by {duration(ahead)}" if ahead else "the clock was right already"
        )
    elif wrong:
        screen.result(
            f"the state file is {duration(ahead)} ahead. If this computer is right now: "
            "embedcore budget clock --repair"
        )


@command.command(name="recount")
@click.option("--repair", is_flag=True, help="Set the counters to what the entries add up to.")
@talking
@click.pass_obj
def recount(screen: Screen, repair: bool) -> int:
    """Every counter of the state file beside its entries' sum.

    They always agree, unless the file was damaged or altered. --repair believes the entries, on the
    record: that may free money as well as take it away, so look first. Ends with 1 if counters
    differ and are left as they are.
    """
    with state_ledger(Config.load(), compare=False) as ledger:
        found = ledger.recount() if repair else ledger.differences()
    screen.json({"differences": [_difference(one) for one in found], "repaired": repair})
    for one in found:
        screen.result(str(one))
    number = plural(len(found), "counter")
    if not found:
        screen.result("every counter is right")
    elif repair:
        screen.result(f"{number} set right")
    else:
        screen.result(f"{number} differ: embedcore budget recount --repair sets them right")
    return int(bool(found) and not repair)


def _difference(one: Difference) -> dict[str, Any]:
    unit: Unit = "cost" if one.counter.startswith("cost") else "tokens"
    numbers = {
        name: as_shown(unit, getattr(one, name)) for name in ("counted", "entered", "at_most")
    }
    return {**asdict(one), **numbers}


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat(sep=" ", timespec="seconds")


def _row(used: Used, config: Config) -> tuple[str, ...]:
    limit = used.limit
    whose = "all scopes" if limit.scope == ALL_SCOPES else limit.scope
    period = "in total" if limit.period == "total" else f"per {limit.period}"
    kept = f" ({_amount(limit.unit, used.reserved)} for queries)" if used.reserved else ""
    return (
        f"{limit.unit} {period}, {whose}",
        _amount(limit.unit, limit.amount),
        _amount(limit.unit, used.spent),
        _amount(limit.unit, used.held),
        f"{_amount(limit.unit, max(used.left, 0))}{kept}",
        f"{used.ends:%Y-%m-%d %H:%M} UTC" if used.ends else "never",
        set_by(limit, config),
    )


def _amount(unit: Unit, amount: int) -> str:
    return f"{amount:,}" if unit == "tokens" else money.shown(money.in_dollars(amount))


def _fields(used: Used, config: Config) -> dict[str, Any]:
    limit = used.limit
    return {
        "scope": limit.scope,
        "period": limit.period,
        "unit": limit.unit,
        "limit": as_shown(limit.unit, limit.amount),
        "spent": as_shown(limit.unit, used.spent),
        "reserved": as_shown(limit.unit, used.held),
        "kept_for_queries": as_shown(limit.unit, used.reserved),
        "left": as_shown(limit.unit, max(used.left, 0)),
        "resets_at": used.ends.isoformat() if used.ends else None,
        "set_by": set_by(limit, config),
    }
