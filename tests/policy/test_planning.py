"""Are all texts packed, in order, within every limit of the model?"""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import example, given, settings, strategies as st

from embedcore.policy.planning import Size, Sizes, chosen, in_waves, plan_requests, priced
from embedcore.provider.types import ModelInfo, Price

LIMITS = st.builds(
    ModelInfo,
    max_texts_per_request=st.integers(1, 6),
    max_tokens_per_request=st.none() | st.integers(1, 60),
    max_bytes_per_request=st.none() | st.integers(1, 120),
    request_bytes_per_token=st.none() | st.integers(1, 5),
    overhead_tokens_per_text=st.integers(0, 3),
    price=st.none() | st.just(Price(immediate="0.13")),
)
TEXTS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), max_size=40)


def sizes_of(texts):
    return Sizes(in_bytes=[one for one, _ in texts], tokens=[one for _, one in texts])


def load(group, texts, info):
    in_bytes = sum(texts[index][0] for index in group)
    tokens = sum(texts[index][1] for index in group) + info.overhead_tokens_per_text * len(group)
    return tokens, in_bytes


def fits(group, texts, info):
    tokens, in_bytes = load(group, texts, info)
    gauge = -(-in_bytes // info.request_bytes_per_token) if info.request_bytes_per_token else 0
    return (
        len(group) <= info.max_texts_per_request
        and (info.max_bytes_per_request is None or in_bytes <= info.max_bytes_per_request)
        and (
            info.max_tokens_per_request is None or max(tokens, gauge) <= info.max_tokens_per_request
        )
    )


def is_one_limit(info):
    """Only the number of texts can end a request."""
    return info.max_tokens_per_request is None and info.max_bytes_per_request is None


@pytest.mark.fault(16)
@settings(deadline=None)
@given(st.lists(st.integers(0, 9)))
@example([3, 4, 5])
@example([0, 2, 1, 3])
def test_what_is_chosen_is_at_those_places_in_their_order(indices):
    assert list(chosen(range(100, 110), indices)) == [100 + index for index in indices]


@given(TEXTS, LIMITS)
def test_nothing_is_lost_or_reordered_and_every_limit_is_kept(texts, info):
    requests = plan_requests(range(len(texts)), sizes_of(texts), info)
    groups = [request.indices for request in requests]
    assert list(chain(*groups)) == list(range(len(texts)))
    for group in groups:
        assert fits(group, texts, info) or len(group) == 1
    fewest = -(-len(texts) // info.max_texts_per_request) or 1
    equal = -(-len(texts) // fewest)
    for group, following in pairwise(groups):
        # The next text would not have fitted, or would have made the requests unequal.
        assert len(group) == equal or not fits((*group, following[0]), texts, info)
    if all(fits(group, texts, info) for group in groups) and is_one_limit(info):
        assert len(groups) <= fewest


@given(st.integers(0, 3000), st.integers(1, 40), st.none() | st.integers(1, 60))
def test_requests_are_as_few_as_they_can_be_and_of_one_size(count, most, best):
    info = ModelInfo(max_texts_per_request=most, best_texts_per_request=best)
    requests = plan_requests(range(count), sizes_of([(1, 1)] * count), info)
    lengths = [len(request) for request in requests]
    limit = min(most, best or most)
    assert len(lengths) == -(-count // limit)
    assert max(lengths, default=0) <= limit
    assert all(length == lengths[0] for length in lengths[:-1])
    assert lengths == sorted(lengths, reverse=True)


@given(st.integers(1, 100), st.integers(1, 40))
def test_a_size_that_is_asked_for_goes_before_the_best_one(count, asked):
    info = ModelInfo(max_texts_per_request=30, best_texts_per_request=2)
    requests = plan_requests(range(count), sizes_of([(1, 1)] * count), info, texts=asked)
    assert len(requests) == -(-count // min(asked, 30))


@given(st.integers(1, 200_000), st.integers(1, 300), st.integers(1, 64))
def test_requests_are_as_large_as_saves_a_wave_and_no_larger(count, best, slots):
    size = in_waves(count, best, slots)
    assert best <= size <= 3 * best
    waves = -(-count // (size * slots))
    assert waves == -(-count // (3 * best * slots))
    # One text less in each would take another wave, or more requests of less than is cheapest.
    assert size == best or -(-count // ((size - 1) * slots)) > waves


@settings(deadline=None)
@given(TEXTS, LIMITS, st.sampled_from([1.0, 1.5, 3.0]))
def test_each_request_carries_what_it_can_cost(texts, info, scale):
    for request in plan_requests(range(len(texts)), sizes_of(texts), info, scale=scale):
        tokens = -(-load(request.indices, texts, info)[0] * scale // 1)
        assert request.amount.tokens == tokens
        cost = info.price.picodollars(int(tokens)) if info.price else 0
        assert request.amount.cost == cost


def test_a_quarter_of_the_bytes_counts_where_the_server_gauges_so():
    info = ModelInfo(
        max_texts_per_request=2048, max_tokens_per_request=300_000, request_bytes_per_token=4
    )
    texts = [(40_000, 500)] * 60
    requests = plan_requests(range(60), sizes_of(texts), info)
    assert [len(request) for request in requests] == [30, 30]


def test_a_subset_is_planned_in_the_order_it_is_given():
    info = ModelInfo(max_texts_per_request=2)
    requests = plan_requests([1, 4, 5], sizes_of([(1, 1)] * 6), info)
    assert [request.indices for request in requests] == [(1, 4), (5,)]


def test_a_scale_never_rounds_down():
    assert priced(3, None, 1.1).tokens == 4
    assert priced(10, Price(immediate=1), 1.0).cost == 10 * 10**6


@settings(deadline=None)
@given(TEXTS, LIMITS, st.integers(1, 8), st.integers(1, 300))
def test_a_learned_size_is_kept_in_texts_or_in_bytes(texts, info, most, most_bytes):
    size = Size(texts=most, in_bytes=most_bytes)
    groups = [
        request.indices
        for request in plan_requests(range(len(texts)), sizes_of(texts), info, size=size)
    ]
    assert list(chain(*groups)) == list(range(len(texts)))
    for group in groups:
        assert fits(group, texts, info) or len(group) == 1
        assert len(group) <= most or load(group, texts, info)[1] <= most_bytes


@settings(deadline=None)
@given(st.integers(1, 10**6), st.floats(1, 50), st.floats(1, 50))
def test_a_request_grows_to_the_scale_that_was_learned_since(tokens, scale, later):
    price = Price(immediate="0.13")
    sizes = Sizes(in_bytes=[tokens], tokens=[tokens])
    (request,) = plan_requests([0], sizes, ModelInfo(price=price), scale=scale)
    grown = request.at_scale(later, price)
    assert grown.amount.tokens >= max(request.amount.tokens, int(tokens * later))
    assert grown.amount.tokens <= max(request.amount.tokens, tokens * later + later / scale + 1)
    assert grown.amount.cost == price.picodollars(grown.amount.tokens)
    assert grown.at_scale(1.0, price) is grown
