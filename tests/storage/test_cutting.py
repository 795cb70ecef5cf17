"""Parts: cut exactly by texts, bytes and tokens, and never without their money."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import chain, pairwise

import pytest
from hypothesis import given, strategies as st

from embedcore.errors import TokenBudgetExceeded
from embedcore.storage import usage
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.batches import Batches, BatchRecord, Wanted
from embedcore.storage.cutting import Cut, Cutter, priced
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.parts import Part, Parts
from embedcore.storage.schema import STATE

Sizes = Sequence[tuple[int, int]]


def submitted(ledger: Ledger, sizes: Sizes, *, name: str = "") -> tuple[Batches, BatchRecord]:
    """A batch that wishes for one text for each (tokens, bytes)."""
    batches = Batches(ledger)
    pool = batches.pool(scope="s", model="m", fingerprint="f", endpoint="e", account="a")
    batch = batches.begin(pool, input_type=None, asked_as="m")
    wanted = [
        Wanted(key=key_of(f"{name}{number}"), tokens=tokens, in_bytes=in_bytes)
        for number, (tokens, in_bytes) in enumerate(sizes)
    ]
    batches.want(batch, wanted, rows=len(wanted), texts=len(wanted), reused=0)
    return batches, batch


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def cutter_of(batches: Batches, batch: BatchRecord, *limits: Limit) -> Cutter:
    return Cutter(batches.ledger, batches.pool_of(batch), limits)


def all_parts(cutter: Cutter, batch: BatchRecord, cut: Cut) -> list[Part]:
    parts, after = [], 0
    while True:
        part, after = cutter.plan(batch, cut, after=after)
        if part is None:
            return parts
        parts.append(part)


def held(ledger: Ledger) -> Amount:
    return usage.of_scope(ledger, "s", "total").held


def day_limit(tokens: int) -> Limit:
    return Limit(scope="s", period="day", unit="tokens", amount=tokens)


@pytest.mark.fault(73)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400)), min_size=1, max_size=40),
    items=st.integers(1, 12),
    in_bytes=st.none() | st.integers(1, 900),
    tokens=st.none() | st.integers(1, 90),
    overhead=st.integers(0, 3),
)
def test_parts_are_everything_in_order_and_each_within_its_limits(
    sizes: Sizes, items: int, in_bytes: int | None, tokens: int | None, overhead: int
) -> None:
    ledger = Ledger(Database(None, STATE))
    batches, batch = submitted(ledger, sizes)
    cutter, jobs = cutter_of(batches, batch), Parts(ledger)
    cut = Cut(
        items=items, in_bytes=in_bytes, tokens=tokens, overhead=overhead, price=Decimal("0.01")
    )
    cutter.hold(batch, cut)
    batches.complete(batch, b"")
    parts = all_parts(cutter, batch, cut)

    contents = [[key for _, _, key, _ in jobs.items(part)] for part in parts]
    assert list(chain.from_iterable(contents)) == [
        key_of(f"{number}") for number in range(len(sizes))
    ]
    by_key = {key_of(f"{number}"): size for number, size in enumerate(sizes)}

    def fits(keys: list[bytes]) -> bool:
        return (
            len(keys) <= items
            and (tokens is None or sum(by_key[key][0] + overhead for key in keys) <= tokens)
            and (in_bytes is None or sum(by_key[key][1] for key in keys) <= in_bytes)
        )

    for part, keys in zip(parts, contents, strict=True):
        assert fits(keys) or len(keys) == 1, "what is too large alone goes alone"
        assert part.items == len(keys)
        assert [ordinal for ordinal, *_ in jobs.items(part)] == list(range(len(keys)))
        assert part.tokens == sum(by_key[key][0] + overhead for key in keys)
        assert Amount(tokens=part.tokens, cost=part.cost) == priced(part.tokens, "0.01")
    for before, after in pairwise(contents):
        assert not fits([*before, after[0]]), "no part is smaller than it must be"

    # What was held for the batch as a whole is in its parts now, to the last token.
    assert held(ledger).tokens == sum(part.tokens for part in parts)
    assert held(ledger).cost == sum(part.cost for part in parts)
    assert batches.again(batch).grant is None


@given(
    tokens=st.integers(0, 10**9),
    price=st.decimals(min_value=0, max_value=1000, places=9, allow_nan=False),
)
def test_a_price_is_exact_and_rounded_up(tokens: int, price: Decimal) -> None:
    cost = priced(tokens, str(price)).cost
    exact = Fraction(price) * tokens * 10**6
    assert exact <= cost < exact + 1


def test_without_a_price_only_tokens_count() -> None:
    assert priced(7, None) == Amount(tokens=7)


@pytest.mark.fault(83)
def test_the_price_is_that_of_the_moment_it_was_held(ledger: Ledger) -> None:
    batches, batch = submitted(ledger, [(1000, 1)])
    batches.complete(batch, b"")
    (part,) = all_parts(cutter_of(batches, batch), batch, Cut(items=9, price=Decimal("0.065")))
    assert part.price == "0.065"
    assert part.cost == 65_000_000
    assert priced(500, Parts(ledger).again(part).price) == Amount(tokens=500, cost=32_500_000)


def test_what_does_not_fit_is_refused_as_a_whole(ledger: Ledger) -> None:
    batches, batch = submitted(ledger, [(4, 1)] * 3)
    cutter = cutter_of(batches, batch, day_limit(11))
    with pytest.raises(TokenBudgetExceeded) as refused:
        cutter.hold(batch, Cut(items=1))
    assert refused.value.asked == 12
    assert held(ledger) == Amount()
    assert batches.again(batch).grant is None
    cutter_of(batches, batch, day_limit(12)).hold(batch, Cut(items=1))
    assert held(ledger) == Amount(tokens=12)


def test_money_that_was_held_needs_no_room_in_a_limit_again(ledger: Ledger) -> None:
    batches, batch = submitted(ledger, [(4, 1)] * 3)
    cutter = cutter_of(batches, batch, day_limit(12))
    cutter.hold(batch, Cut(items=1))
    batches.complete(batch, b"")
    assert len(all_parts(cutter, batch, Cut(items=1))) == 3
    assert held(ledger) == Amount(tokens=12)


def test_without_money_set_aside_each_part_asks_the_limits(ledger: Ledger) -> None:
    batches, batch = submitted(ledger, [(4, 1)] * 3)
    batches.complete(batch, b"")
    cutter = cutter_of(batches, batch, day_limit(8))
    first, after = cutter.plan(batch, Cut(items=1))
    second, after = cutter.plan(batch, Cut(items=1), after=after)
    assert first is not None
    assert second is not None
    with pytest.raises(TokenBudgetExceeded):
        cutter.plan(batch, Cut(items=1), after=after)
    assert batches.counts(batch).to_submit == 1, "what was refused is in no part"
    assert held(ledger) == Amount(tokens=8)


def test_a_text_is_in_one_part_however_many_batches_wish_for_it(ledger: Ledger) -> None:
    batches, one = submitted(ledger, [(1, 1)] * 4)
    _, other = submitted(ledger, [(1, 1)] * 6)
    for batch in (one, other):
        batches.complete(batch, b"")
    first = all_parts(cutter_of(batches, one), one, Cut(items=10))
    second = all_parts(cutter_of(batches, other), other, Cut(items=10))
    assert [part.items for part in first + second] == [4, 2]
    assert batches.counts(other).in_flight == 6


def test_money_for_texts_that_another_batch_submitted_first_is_released(ledger: Ledger) -> None:
    batches, one = submitted(ledger, [(4, 1)] * 2)
    _, other = submitted(ledger, [(4, 1)] * 2)
    for batch in (one, other):
        cutter_of(batches, batch).hold(batch, Cut(items=9))
        batches.complete(batch, b"")
    assert held(ledger) == Amount(tokens=16)
    all_parts(cutter_of(batches, one), one, Cut(items=9))
    assert all_parts(cutter_of(batches, other), other, Cut(items=9)) == []
    assert held(ledger) == Amount(tokens=8)
