"""Are prices exact, and can values that cross the border neither be changed nor mixed up?"""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, strategies as st

from embedcore.provider import types
from embedcore.provider.types import ModelInfo, Price

rates = st.decimals(0, 1000, places=9, allow_nan=False, allow_infinity=False)
VALUES = [
    kind
    for kind in vars(types).values()
    if inspect.isclass(kind) and kind.__module__ == types.__name__
]


def exact(rate: Decimal, tokens: int) -> int:
    return math.ceil(Fraction(rate) * tokens * 10**12 / 10**6)


@pytest.mark.fault(99)
@given(rates, st.integers(0, 10**13))
def test_a_price_is_exact_and_rounded_up(rate: Decimal, tokens: int) -> None:
    assert Price(immediate=rate).picodollars(tokens) == exact(rate, tokens)


@pytest.mark.fault(99)
@given(rates, st.lists(st.integers(0, 300_000), max_size=50))
def test_many_requests_cost_what_they_cost_together_but_for_the_rounding(
    rate: Decimal, requests: list[int]
) -> None:
    price = Price(immediate=rate)
    total = sum(price.picodollars(tokens) for tokens in requests)
    assert 0 <= total - price.picodollars(sum(requests)) <= len(requests)


@given(rates, rates, st.integers(0, 10**9))
def test_a_batch_has_its_own_price_where_there_is_one(
    immediate: Decimal, batch: Decimal, tokens: int
) -> None:
    assert Price(immediate=immediate, batch=batch).picodollars(tokens, batch=True) == exact(
        batch, tokens
    )
    assert Price(immediate=immediate).picodollars(tokens, batch=True) == exact(immediate, tokens)


def test_what_openai_asks_for_a_million_tokens() -> None:
    price = Price(immediate=Decimal("0.02"), batch=Decimal("0.01"))
    assert price.picodollars(1_000_000) == 2 * 10**10
    assert price.picodollars(1) == 20_000
    assert price.picodollars(1, batch=True) == 10_000


def test_a_price_may_be_written_as_any_number() -> None:
    as_text: Any = "0.02"
    as_float: Any = 0.1
    assert Price(immediate=as_text).picodollars(3) == 60_000
    assert Price(immediate=as_float).picodollars(10**6) == 10**11


@pytest.mark.parametrize("wrong", ["-0.01", "NaN", "Infinity"])
@pytest.mark.parametrize("field", ["immediate", "batch"])
def test_a_price_is_a_finite_amount(field: str, wrong: str) -> None:
    arguments: Any = {field: Decimal(wrong)}
    with pytest.raises(ValueError, match=f"price {field}"):
        Price(**arguments)


@pytest.mark.parametrize(
    ("price", "free"),
    [
        (Price(), True),
        (Price(batch=Decimal(0)), True),
        (Price(immediate=Decimal("0.01")), False),
        (Price(batch=Decimal("0.01")), False),
    ],
)
def test_free_means_that_nothing_costs_anything(price: Price, free: bool) -> None:
    assert price.free is free


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_values_are_frozen_and_take_keywords_with_defaults(kind: Any) -> None:
    parameters = inspect.signature(kind).parameters.values()
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    needed = [one.name for one in parameters if one.default is inspect.Parameter.empty]
    # A factory's default shows as one, too: only the vectors of a reply have none.
    assert needed == (["vectors"] if kind.__name__ == "EmbedReply" else [])
    value = kind(**dict.fromkeys(needed))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, next(iter(dataclasses.fields(value))).name, None)
    assert pickle.loads(pickle.dumps(value)) == value


def test_an_unknown_price_is_not_a_free_model() -> None:
    assert ModelInfo().price is None


def test_importing_the_contract_loads_neither_numpy_nor_an_sdk() -> None:
    code = (
        "import sys, embedcore.provider.types, embedcore.provider.protocol, embedcore.errors\n"
        "print(*{'numpy', 'pydantic', 'pluggy', 'openai', 'sqlite3', 'pysqlite3'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
