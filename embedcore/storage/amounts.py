"""Amounts, limits, grants and attempts as values."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Literal, TypeAlias

from embedcore import money
from embedcore.errors import BudgetExceeded, ConfigurationError
from embedcore.storage.calendar import Period

Unit: TypeAlias = Literal["tokens", "cost"]
Lane: TypeAlias = Literal["all", "query"]

ALL_SCOPES: Final = "*"
# What SQLite's integers hold; a sum beyond it fails as a whole (STRICT columns take no float).
_LARGEST: Final = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """Tokens, and what they cost in picodollars."""

    tokens: int = 0
    cost: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.tokens <= _LARGEST and 0 <= self.cost <= _LARGEST):
            raise ConfigurationError(
                f"an amount of {self.tokens} tokens and {money.shown_exactly(self.cost)} cannot be "
                "right: check the texts' sizes and the model's price"
            )

    @property
    def dollars(self) -> Decimal:
        """The cost in US dollars."""
        return money.in_dollars(self.cost)

    def of(self, unit: Unit) -> int:
        return self.tokens if unit == "tokens" else self.cost

    def __add__(self, other: Amount) -> Amount:
        return Amount(tokens=self.tokens + other.tokens, cost=self.cost + other.cost)


def as_shown(unit: Unit, amount: int) -> int | Decimal:
    """An amount as users see it: tokens, or US dollars."""
    return amount if unit == "tokens" else money.in_dollars(amount)


def shown(unit: Unit, amount: int) -> str:
    """The same with its unit."""
    return f"{amount:,} tokens" if unit == "tokens" else money.shown(money.in_dollars(amount))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """No more than ``amount`` of ``unit`` in one ``period`` for ``scope`` (``*``: all scopes).

    ``reserved``: the part of it that only queries may use. A limit is a condition of the call that
    names it, never stored: lowering it takes effect at once.
    """

    scope: str
    period: Period
    unit: Unit
    amount: int
    reserved: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """What one call has reserved and not yet sent. Its amounts are in the file; this is the key.

    ``is_near``: with it a limit may near its end, or is near it: what becomes of it is written down
    at once, so that observers hear of the limit and others get what is free again.
    """

    id: int
    scope: str
    lane: Lane
    limits: tuple[Limit, ...]
    loose: bool
    is_near: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One request that was sent, or is about to be: its amount is committed as reserved.

    ``until``: the end of the day to which it is counted, in microseconds since 1970.
    """

    id: int
    grant: Grant
    amount: Amount
    until: int = _LARGEST


class TighterBoundNeeded(Exception):
    """A loose bound would take too much of what is left: count exactly and ask again."""


class HeldLoosely(Exception):
    """Refused only because others reserve more than they will need: worth waiting for.

    ``refusal`` is the error to raise when the wait is over.
    """

    def __init__(self, refusal: BudgetExceeded) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
