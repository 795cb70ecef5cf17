"""The vectors of each request, handed over while the call goes on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import StorageFull
from embedcore.provider.types import ModelInfo, Price
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeEmbedder, vectors_of

SMALL = ModelInfo(
    provider="fake",
    model="fake-embedding",
    dimensions=8,
    max_input_tokens=4,
    max_texts_per_request=3,
    max_concurrency=4,
    price=Price(),
)
TEXTS = st.lists(st.text("abcdef ", min_size=1, max_size=30), max_size=20)


@given(texts=TEXTS)
def test_every_row_arrives_once_with_its_own_vector_and_cut(desk, texts):
    arrived: dict[int, tuple[np.ndarray, int]] = {}

    def receive(arrival):
        for row, vector in zip(arrival.rows.tolist(), arrival.vectors, strict=True):
            assert row not in arrived
            arrived[row] = (vector, arrival.tokens_cut.get(row, 0))

    with desk(FakeEmbedder(info=SMALL)) as one:
        result = one.embed(texts, on_arrival=receive)
    assert arrived.keys() == set(range(len(texts)))
    for row, (vector, cut) in arrived.items():
        assert (vector == result.vectors[row]).all()
        assert cut == result.tokens_cut.get(row, 0)
        if not cut:
            assert (vector == vectors_of([texts[row]], 8)[0]).all()


def test_arrivals_come_one_at_a_time_and_before_the_call_ends(desk):
    inside, returned = 0, False

    def receive(_):
        nonlocal inside
        inside += 1
        assert inside == 1
        assert not returned
        inside -= 1

    with desk(FakeEmbedder(info=SMALL, latency=0.001)) as one:
        one.embed([f"text {number}" for number in range(60)], on_arrival=receive)
        returned = True


@pytest.mark.fault(103)
@pytest.mark.parametrize("on_error", ["raise", "keep"])
def test_an_error_in_the_receiver_ends_the_call_and_loses_nothing(desk, on_error):
    def full(_):
        raise StorageFull("no room")

    texts = [f"text {number}" for number in range(30)]
    with desk(FakeEmbedder(info=SMALL), threads=1) as one:
        with pytest.raises(StorageFull, match="no room") as caught:
            one.embed(texts, on_error=on_error, on_arrival=full)
        assert caught.value.partial.ok.sum() == 3
        one.right(caught.value.partial, texts)
        assert one.used.held == Amount()
        one.check()
