"""Amounts are converted exactly, and never shown as nothing."""

from __future__ import annotations

import math
import re
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import reduce
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import embedcore
from embedcore import money

PACKAGE = Path(embedcore.__file__).parent
amounts = st.integers(-(2**63), 2**63)


@given(amounts)
def test_dollars_and_back_is_the_same_amount(picodollars):
    assert money.in_picodollars(money.in_dollars(picodollars)) == picodollars
    assert Fraction(money.in_dollars(picodollars)) == Fraction(picodollars, 10**12)


@given(amounts, st.lists(amounts, max_size=5))
def test_the_precision_of_the_program_changes_no_amount(picodollars, others):
    with localcontext() as context:
        context.prec = 3
        assert money.in_picodollars(money.in_dollars(picodollars)) == picodollars
        assert money.cost_of(123_456, Decimal("0.013")) == 123_456 * 13_000
        total = reduce(money.added, map(money.in_dollars, others), Decimal(0))
    assert total == money.in_dollars(sum(others))


@given(st.integers(0, 10**12), st.decimals(0, 10**4, places=6))
def test_a_cost_is_rounded_up(tokens, price):
    assert money.cost_of(tokens, price) == math.ceil(Fraction(price) * tokens * 10**6)


@given(st.integers(0, 10**18))
def test_dollars_are_never_shown_as_nothing(picodollars):
    exact = money.in_dollars(picodollars)
    shown = Decimal(money.shown(exact).removeprefix("$").replace(",", ""))
    assert (shown == 0) == (picodollars == 0)
    assert abs(shown - exact) <= max(exact * Decimal("0.05"), Decimal("1e-14")) or exact >= 1
    assert abs(shown - exact) <= Decimal("0.005") or exact < 1


@pytest.mark.parametrize(
    ("dollars", "shown"),
    [
        ("0", "$0"),
        ("1234.56", "$1,234.56"),
        ("0.0247", "$0.025"),
        ("0.00099598", "$0.0010"),
        ("0.000000000001", "$0.0000000000010"),
        ("0.999", "$1.00"),
    ],
)
def test_how_dollars_are_shown(dollars, shown):
    assert money.shown(Decimal(dollars)) == shown


def test_a_price_that_is_not_known_is_said_to_be():
    assert "not known" in money.shown(None)


@given(amounts, amounts)
def test_amounts_that_differ_are_shown_differently_where_every_digit_counts(one, other):
    assert (money.shown_exactly(one) == money.shown_exactly(other)) == (one == other)


def test_no_other_module_converts():
    other = {"money.py", "policy/ratelimit/bucket.py"}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"10 ?[*][*] ?12", path.read_text(encoding="utf-8"))
    }
    assert found <= other
