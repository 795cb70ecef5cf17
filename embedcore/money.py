"""Money: picodollars, in which it is counted, dollars, in which it is given, and how it is shown.

Inside, an amount is a whole number of picodollars (10⁻¹² US dollars), so that sums are exact in
SQLite and in Python. The public API and all output have US dollars as ``Decimal``.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal
from typing import Final

_PER_DOLLAR: Final = 10**12
_TOKENS_OF_A_PRICE: Final = 10**6
_DIGITS_OF_CENTS: Final = 2
# The program's own context may have fewer digits than an amount.
_EXACT: Final = Context(prec=60)

# The exact sum of two amounts.
added: Final = _EXACT.add


def in_dollars(picodollars: int) -> Decimal:
    """An amount of ours in US dollars, exactly."""
    return _EXACT.divide(Decimal(picodollars), Decimal(_PER_DOLLAR))


def in_picodollars(dollars: Decimal) -> int:
    """An amount in US dollars as ours; what is smaller than a picodollar is left out."""
    return int(_EXACT.multiply(dollars, Decimal(_PER_DOLLAR)))


def cost_of(tokens: int, price: Decimal) -> int:
    """What tokens cost in picodollars, rounded up. ``price``: US dollars for a million of them."""
    return math.ceil(_EXACT.multiply(price, Decimal(tokens * (_PER_DOLLAR // _TOKENS_OF_A_PRICE))))


def shown(dollars: Decimal | None) -> str:
    """US dollars for people: cents from one dollar on, below it enough digits to tell it from
    nothing. None: the price is not known."""
    if dollars is None:
        return "at a price that is not known"
    if not dollars:
        return "$0"
    if abs(dollars) >= 1:
        return f"${dollars:,.2f}"
    # Rounded first: 0.000996 has the digits of 0.0010, not of 0.00100.
    rounded = round(dollars, _places(dollars))
    return f"${rounded:.{_places(rounded)}f}"


def shown_exactly(picodollars: int) -> str:
    """Every digit of an amount of ours, where amounts that differ a little are compared."""
    return f"${in_dollars(picodollars):,f}"


def exact(dollars: Decimal) -> str:
    """Every digit and no sign, for programs: ``0.00068``."""
    return f"{_EXACT.normalize(dollars):f}"


def _places(amount: Decimal) -> int:
    return max(-amount.adjusted() + 1, _DIGITS_OF_CENTS)
