"""The price shown before a run, and the question about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from embedcore import money
from embedcore.cli.session import state_ledger
from embedcore.cli.text import facts, plural
from embedcore.errors import TokenBudgetExceeded
from embedcore.provider.registry import meant
from embedcore.storage import usage
from embedcore.storage.amounts import ALL_SCOPES, Amount

if TYPE_CHECKING:
    from embedcore.cli.screen import Screen
    from embedcore.cli.session import Session
    from embedcore.errors import BudgetExceeded
    from embedcore.files.types import FilePlan, OnBudget
    from embedcore.storage.amounts import Lane


class NotConfirmed(click.ClickException):
    """A person has to agree, and none did."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A plan, and the limits that it passes. ``on_budget``: what happens then."""

    plan: FilePlan
    refusals: tuple[BudgetExceeded, ...] = ()
    on_budget: OnBudget = "raise"

    @property
    def is_refused(self) -> bool:
        """Whether a limit will certainly refuse a part of it."""
        return bool(self.refusals) and self.plan.exact and self.on_budget == "raise"

    def fields(self, opened: Session) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "model": opened.name,
            "fingerprint": opened.client.fingerprint,
            **asdict(self.plan),
            "limits_in_the_way": [str(refusal) for refusal in self.refusals],
        }

    def text(self, opened: Session, *, brief: bool = False) -> str:
        """For a person. ``brief``: an error or a report will say in full what a limit refuses."""
        plan = self.plan
        pairs = [("model", opened.name), ("rows", rows_text(plan))]
        if plan.damaged:
            pairs.append(("damaged", damaged_text(plan.damaged)))
        if plan.to_embed and opened.client.info.local:
            work = f"{plural(plan.to_embed, 'text')}, computed here for nothing"
            pairs.append(("to embed", work))
        elif plan.to_embed:
            pairs += [("to embed", _work(plan)), ("cost", _cost(plan, opened))]
        else:
            why = "every text was embedded before" if plan.rows else "there are no rows"
            pairs += [("to embed", f"nothing: {why}"), ("cost", "$0")]
        verb = "will" if plan.exact else "may"
        then = {"raise": "refuse", "stop": "end it early", "wait": "make it wait"}
        for refusal in self.refusals:
            what = f"{verb} {then[self.on_budget]}"
            pairs.append(("limit", f"{what}: {limit_text(refusal, brief=brief)}"))
        return facts(pairs)


def estimated(
    opened: Session, plan: FilePlan, *, lane: Lane = "all", on_budget: OnBudget = "raise"
) -> Estimate:
    """The plan beside the limits as they are now."""
    if not opened.limits or not plan.to_embed:
        return Estimate(plan=plan)
    amount = Amount(tokens=plan.tokens, cost=money.in_picodollars(plan.cost or Decimal(0)))
    with state_ledger(opened.config, opened.limits) as ledger:
        found = usage.limits_now(ledger, opened.client.scope, opened.limits, lane)
    tight = [used for used in found if amount.of(used.limit.unit) > used.left]
    refusals = tuple(used.refusal(amount) for used in tight)
    return Estimate(plan=plan, refusals=refusals, on_budget=on_budget)


def agree(
    screen: Screen,
    opened: Session,
    estimate: Estimate,
    *,
    yes: bool,
    ask_above: Decimal,
    batch: bool = False,
) -> bool:
    """Whether to go on. Asks on a terminal; elsewhere what needs an answer is an error.

    ``ask_above``: US dollars. Asked as well: at a price that is not known, and where a limit will
    end the run before its end.
    """
    reason = _reason(opened, estimate, ask_above, batch=batch)
    if yes or reason is None or not estimate.plan.to_embed:
        return True
    if screen.interactive:
        return screen.ask(f"{reason} Go on?")
    if estimate.is_refused:
        refusal = estimate.refusals[0]
        refusal.add_note(
            "--on-budget stop embeds what the limit allows, and a later run the rest. With --yes "
            "it starts anyway, and is refused at the first block of rows that does not fit."
        )
        raise refusal
    raise NotConfirmed(f"{reason} Nothing was sent; say --yes to go on.")


def _reason(opened: Session, estimate: Estimate, ask_above: Decimal, *, batch: bool) -> str | None:
    plan = estimate.plan
    if estimate.is_refused:
        needed = limit_text(estimate.refusals[0], brief=False)
        if batch:
            return f"A limit will refuse it: {needed}."
        return (
            "A limit will refuse this run, at the first block of rows that does not fit: "
            f"{needed}. --on-budget stop embeds what fits."
        )
    if plan.cost is None:
        return (
            f"The price of {opened.name} is not known{perhaps(opened)} (embedcore models lists "
            "those that are known; price = … in its options says it, 0 for a server of your own)."
        )
    if plan.cost > ask_above:
        up_to = "" if plan.exact else "up to "
        return f"This costs {up_to}{money.shown(plan.cost)}."
    known = opened.price_without_found
    listed = Decimal(0)
    if known is not None:
        listed = money.in_dollars(known.picodollars(plan.tokens, batch=batch))
    if listed > max(ask_above, plan.cost):
        return (
            f"This costs {money.shown(listed)} by the provider's own price; {opened.config.file}, "
            "which is not trusted, sets another one (embedcore trust)."
        )
    return None


def rows_text(plan: FilePlan) -> str:
    """How many rows there are, and which of them cost nothing."""
    parts = [
        plural(plan.duplicates, "duplicate") if plan.duplicates else "",
        f"{plan.reused:,} embedded before" if plan.reused else "",
        f"{plan.cached:,} cached" if plan.cached else "",
        f"{plan.in_flight:,} under way in another batch" if plan.in_flight else "",
        f"{plan.empty:,} empty" if plan.empty else "",
        f"{plan.rejected:,} that cannot be sent" if plan.rejected else "",
    ]
    details = ", ".join(filter(None, parts))
    return f"{plan.rows:,}" + (f" ({details})" if details else "")


def damaged_text(rows: int) -> str:
    """Rows of an output that are not as they were written."""
    return f"{plural(rows, 'row')} of the output: what the input has of them is embedded anew"


def will_be_cut(plan: FilePlan) -> str:
    """How many texts are too long for the model, or may be; nothing if none is."""
    parts = [
        f"{plan.truncated:,} will be cut to fit the model" if plan.truncated else "",
        f"{plan.perhaps_long:,} may be too long, and will be cut only if the server refuses them"
        if plan.perhaps_long
        else "",
    ]
    return "".join(f"; {part}" for part in parts if part)


def _work(plan: FilePlan) -> str:
    bound = "" if plan.exact else "at most "
    cut = will_be_cut(plan)
    return (
        f"{plural(plan.to_embed, 'text')}, {bound}{plural(plan.tokens, 'token')}, "
        f"{plural(plan.requests, 'request')}{cut}"
    )


def _cost(plan: FilePlan, opened: Session) -> str:
    if plan.cost is None:
        return f"not known: the price of this model is not{perhaps(opened)}"
    bound = "" if plan.exact or not plan.cost else "at most "
    price = opened.client.info.price
    each = f" (${price.immediate:f} per million tokens)" if price and not price.free else ""
    return f"{bound}{money.shown(plan.cost)}{each}"


def perhaps(opened: Session) -> str:
    """After "not known": another model that may be meant."""
    name = meant(opened.client.provider, opened.client.model)
    return "" if name is None else f": did you mean {name}?"


def limit_text(refusal: BudgetExceeded, *, brief: bool) -> str:
    """Which limit it is, and unless ``brief`` what is left of it."""
    if not brief:
        return str(refusal).removeprefix("not sent: ").partition(". Send less")[0]
    if isinstance(refusal, TokenBudgetExceeded):
        limit = plural(refusal.limit, "token")
    else:
        limit = money.shown(Decimal(refusal.limit))
    period = "in total" if refusal.period == "total" else f"per {refusal.period}"
    whom = "all scopes" if refusal.scope == ALL_SCOPES else f"scope {refusal.scope!r}"
    return f"{limit} {period} for {whom}"
