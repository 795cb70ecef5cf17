"""Do requests flow again whatever was said, and never faster than the limits that were learned?"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given, settings, strategies as st

from embedcore.policy.ratelimit.pace import Rates
from embedcore.policy.ratelimit.queue import FIRST_SALVO, LONGEST_CLOSING, RateLimiter
from embedcore.policy.ratelimit.share import Permit
from embedcore.provider.types import RateLimits

FREE = Rates()


def limiter(luck: float = 0.5) -> RateLimiter:
    return RateLimiter(jitter=lambda low, high: low + (high - low) * luck)


def leave(
    one: RateLimiter, now: float, tokens: int = 1000, longest: float = 1000.0
) -> tuple[Permit, float]:
    """A request that waits for its turn; with the time when it left."""
    request, started = one.arrive(tokens, FREE), now
    while (seconds := one.delay(now, request)) > 0:
        assert math.isfinite(seconds)
        now += min(max(seconds, 0.001), 15.0)
        assert now - started <= longest, "it waits for ever"
    return request, now


def said(limit: int, left: int, reset: float | None = None) -> RateLimits:
    """Of tokens; requests are plenty."""
    return RateLimits(limit_tokens=limit, remaining_tokens=left, reset_tokens=reset)


# Liveness

numbers = st.none() | st.sampled_from([0, 1, -5, 10**6, 10**18, -(10**18)]) | st.integers(0, 10**7)
times = (
    st.none()
    | st.sampled_from([0.0, -3.0, 1e-9, 60.0, 1e9, 1e300, math.inf, -math.inf, math.nan])
    | st.floats(0, 3600)
)
headers = st.none() | st.builds(
    RateLimits,
    limit_requests=numbers,
    remaining_requests=numbers,
    reset_requests=times,
    limit_tokens=numbers,
    remaining_tokens=numbers,
    reset_tokens=times,
)
endings = st.tuples(
    st.sampled_from(["answered", "refused", "lost", "flying"]), headers, times, numbers
)
steps = st.lists(
    st.tuples(st.integers(0, 10**6), st.floats(0, 5), endings), min_size=1, max_size=40
)


def end(one: RateLimiter, now: float, request: Permit, how: str, limits, seconds, tokens) -> None:
    if how == "answered":
        one.answered(now, request, limits, tokens=tokens)
    elif how == "refused":
        one.refused(now, request, seconds, limits)
    elif how == "lost":
        one.lost(now, request)


@settings(deadline=None, max_examples=2 * settings.default.max_examples)
@given(steps, st.floats(0, 1))
def test_requests_flow_again_whatever_a_server_says(steps, luck):
    one, now, flying = limiter(luck), 0.0, []
    for tokens, passed, (how, limits, seconds, billed) in steps:
        request, left = leave(one, now, tokens, longest=LONGEST_CLOSING + 1 + 66)
        now = left + passed
        flying.append(request)
        if how == "flying" and len(flying) < 4:
            continue
        # The oldest, so that replies come out of order as well.
        end(one, now, flying.pop(0), how, limits, seconds, billed)
        if how == "flying":
            one.lost(now, request)
            flying = [each for each in flying if each is not request]
        for each in flying:
            one.lost(now, each)
        flying = []
    # The server is well again, and says nothing of limits any more.
    started = now
    for _ in range(20):
        request, now = leave(one, now, 1000, longest=LONGEST_CLOSING + 1 + 66)
        one.answered(now + 0.1, request, None, tokens=None)
    assert now - started <= LONGEST_CLOSING + 200
    for _ in range(10):
        request, left = leave(one, now + 60, 1000)
        now = left
        one.answered(now, request, None, tokens=None)
    _, left = leave(one, now + 1, 1000)
    assert left == now + 1


@pytest.mark.parametrize("wait", [None, 0.0, -1.0, math.nan, math.inf, 1e9, 0.001, 60.0, 300.0])
@pytest.mark.parametrize("limits", [None, said(0, 0), said(1, 0, 1e9), said(6_000_000, 0, 0.0)])
def test_a_thousand_refusals_and_then_all_is_well(wait, limits):
    one, now = limiter(), 0.0
    for _ in range(1000):
        request, now = leave(one, now, 50_000, longest=400)
        one.refused(now + 0.01, request, wait, limits)
    for _ in range(200):
        request, now = leave(one, now, 50_000, longest=400)
        one.answered(now + 0.1, request, None, tokens=50_000)
    started = now
    for _ in range(100):
        request, now = leave(one, now, 50_000)
        one.answered(now, request, None, tokens=50_000)
    assert now == started


def test_a_request_larger_than_the_bucket_leaves_when_it_is_full():
    one = limiter()
    request, now = leave(one, 0.0)
    one.answered(0.1, request, said(6_000, 0, 60.0), tokens=1000)
    _, now = leave(one, 0.1, 1_000_000)
    assert 59 <= now <= 61


def test_after_a_minute_of_silence_one_goes_and_asks():
    one = limiter()
    request, now = leave(one, 0.0)
    one.answered(0.1, request, said(14_400, 0, 86_400.0), tokens=1000)
    first, now = leave(one, 0.1, 14_000)
    assert now == pytest.approx(60, abs=1)
    second = one.arrive(14_000, FREE)
    assert one.delay(now + 59, second) > 0
    assert one.delay(now + 61, second) == 0
    one.lost(now + 61, first)


def test_who_gives_up_makes_room():
    one = limiter()
    request, _ = leave(one, 0.0)
    one.answered(0.1, request, said(6_000_000, 100_000, 59.0), tokens=1000)
    large, small = one.arrive(3_000_000, FREE), one.arrive(1000, FREE)
    assert one.delay(0.1, large) > 10
    assert one.delay(0.1, small) > 10
    one.give_up(large)
    assert one.delay(0.1, small) == 0


# The limits

sizes = st.lists(st.integers(1, 400_000), min_size=20, max_size=80)


@given(
    sizes,
    st.integers(1, 16),
    st.integers(600_000, 30_000_000),
    st.integers(FIRST_SALVO + 200_000, 3_000_000),
    st.integers(20, 3000),
    st.tuples(st.floats(0.0, 0.5), st.floats(0.0, 1.0)),
    st.integers(0, 10**6),
)
@example([50_000] * 60, 16, 6_000_000, 500_000, 3000, (0.1, 0.5), 1)
# What fills while others fly, and is lost in a full bucket; a refill larger than a request.
@example([1] * 14 + [50_075, 400_000] + [1] * 4, 2, 600_000, 450_000, 20, (0.5, 0.0), 0)
@example(
    [1] * 11 + [797, 49_371, 400_000, 1, 86, 1, 42, 1, 6], 1, 600_000, 450_000, 20, (0, 0), 219
)
def test_alone_and_told_the_truth_nothing_is_ever_refused(
    simulation, sizes, threads, tpm, burst, rpm, latency, seed
):
    """Every refusal would be a request beyond the limit; the first salvo fits into the bucket."""
    server = simulation.bucket(tpm=tpm, burst=min(burst, tpm), rpm=rpm, rburst=max(rpm // 4, 16))
    quickest, more = latency
    world = simulation.World(
        server, latency=(quickest, quickest + more), way=(0.0, 0.01), seed=seed
    )
    world.process(sizes, threads=threads)
    world.run()
    assert server.refusals == 0


@given(
    st.lists(st.integers(1, 100_000), min_size=2, max_size=60),
    st.integers(60, 100_000_000),
    st.randoms(use_true_random=False),
)
def test_what_is_in_flight_is_subtracted_from_what_remains(sizes, limit, luck):
    """Without time passing no more leaves than the reply said, replies in any order."""
    one, remaining = limiter(), limit
    request, _ = leave(one, 0.0, 1)
    one.answered(0.2, request, said(limit, remaining, 0.0), tokens=1)
    flying, sent, now = [], 0, 0.2
    for tokens in sizes:
        request = one.arrive(tokens, FREE)
        if one.delay(now, request) == 0:
            sent += tokens
            remaining = max(remaining - tokens, 0)
            flying.append((request, remaining))
        else:
            one.give_up(request)
        if flying and luck.random() < 0.5:
            request, left = flying.pop(luck.randrange(len(flying)))
            one.answered(now, request, said(limit, left, None), tokens=request.tokens)
    assert sent <= max(limit, sizes[0])


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 10**5)), min_size=1, max_size=40))
def test_a_clock_that_goes_back_only_stands_still(moves):
    one, now, latest = limiter(), 100.0, 100.0
    request, _ = leave(one, now)
    one.answered(now, request, said(600_000, 300_000, 30.0), tokens=1000)
    sent = 0
    for moved, tokens in moves:
        now += moved
        latest = max(latest, now)
        request = one.arrive(tokens, FREE)
        if one.delay(now, request) == 0:
            sent += tokens
            one.lost(now, request)
        else:
            one.give_up(request)
    assert sent <= 300_000 + 10_000 * (latest - 100.0) + 1
    one.close(latest, 10.0)
    assert one.closed_for(latest - 5.0) == pytest.approx(10.0)


def test_the_first_salvo_waits_for_one_answer_and_then_all_may_go():
    one, flying = limiter(), []
    for _ in range(16):
        request = one.arrive(50_000, FREE)
        if one.delay(0.0, request) == 0:
            flying.append(request)
    assert sum(request.tokens for request in flying) == FIRST_SALVO
    one.answered(0.1, flying[0], None, tokens=50_000)
    for waiting in list(one._waiting):
        assert one.delay(0.1, waiting) == 0


# Closing


def test_a_named_wait_closes_for_everybody():
    one = limiter(luck=0.0)
    first, second = leave(one, 0.0)[0], leave(one, 0.0)[0]
    one.refused(1.0, first, 20.0, None)
    assert one.closed_for(1.0) == 20
    waiting = one.arrive(1, FREE)
    assert one.delay(20.9, waiting) > 0
    assert one.delay(21.0 + 5.0, waiting) == 0
    one.answered(22.0, second, None, tokens=1)


def test_what_left_before_the_closing_does_not_close_again():
    one = limiter(luck=0.0)
    flying = [leave(one, 0.0)[0] for _ in range(16)]
    one.refused(1.0, flying[0], 10.0, None)
    pace = one.state(1.0).paced
    for request in flying[1:]:
        one.refused(1.5, request, 200.0, None)
    assert one.closed_for(1.5) == pytest.approx(9.5)
    assert one.state(1.0).paced == pytest.approx(pace, rel=0.05)
    later, now = leave(one, 1.5)
    one.refused(now, later, 30.0, None)
    assert one.closed_for(now) == 30


def test_after_a_closing_they_leave_one_by_one():
    one = limiter(luck=0.0)
    flying = [leave(one, 0.0, 10_000)[0] for _ in range(16)]
    for request in flying[:10]:
        one.answered(0.5, request, None, tokens=10_000)
    for request in flying[10:]:
        one.refused(0.6, request, 2.0, None)
    waiting = [one.arrive(10_000, FREE) for _ in range(16)]
    gone = [one.delay(2.7, request) == 0 for request in waiting]
    assert gone.count(True) <= 3


def test_a_wait_that_is_too_long_closes_nothing():
    one = limiter()
    request, _ = leave(one, 0.0)
    one.refused(0.1, request, LONGEST_CLOSING + 1, None)
    assert one.closed_for(0.1) < 1


def test_the_end_of_a_request_counts_once():
    one = limiter()
    request, _ = leave(one, 0.0)
    one.refused(0.1, request, 10.0, None)
    before = one.state(0.1)
    one.refused(0.1, request, 20.0, None)
    one.answered(0.1, request, said(1, 0), tokens=5)
    one.lost(0.1, request)
    assert one.state(0.1) == before


def test_a_late_reply_does_not_hide_what_a_newer_one_said():
    one = limiter()
    slow, _ = leave(one, 0.0, 1000)
    fresh, _ = leave(one, 1.0, 1000)
    one.answered(1.2, fresh, said(6_000_000, 50_000, 59.5), tokens=1000)
    one.answered(1.3, slow, said(6_000_000, 5_000_000, 10.0), tokens=1000)
    left = one.state(1.3).tokens_left
    assert left is not None
    assert left <= 50_000 + 0.3 * 100_000


def test_a_late_reply_does_not_take_away_what_came_in_since():
    one = limiter()
    slow, _ = leave(one, 0.0, 1000)
    fresh, _ = leave(one, 1.0, 1000)
    one.answered(1.2, fresh, said(6_000_000, 400_000, 1.0), tokens=1000)
    one.answered(1.3, slow, said(6_000_000, 0, 5.0), tokens=1000)
    left = one.state(1.3).tokens_left
    assert left is not None
    assert left >= 400_000


def test_what_was_refused_was_not_taken():
    one = limiter()
    first, _ = leave(one, 0.0, 1000)
    one.answered(0.0, first, said(6_000, 3_000, 30.0), tokens=1000)
    second, _ = leave(one, 0.0, 2000)
    assert one.state(0.0).tokens_left == 1000
    one.refused(0.0, second, 1.0, None)
    assert one.state(0.0).tokens_left == 3000


def test_what_others_take_is_not_counted_on():
    """100,000 tokens come in each second; of them we take 10,000, and others the rest or none."""

    def waits(remaining: int, steps: int) -> float:
        one, now = limiter(), 0.0
        for step in range(steps):
            request, now = leave(one, now + 1.0, 10_000)
            left = 100_000 + remaining * step
            one.answered(now, request, said(6_000_000, left, (500_000 - left) / 100_000), tokens=1)
        return one.delay(now, one.arrive(450_000, FREE))

    assert waits(0, 12) >= 2 * (450_000 - 100_000) / 100_000
    assert waits(90_000, 4) <= 1.2 * (450_000 - 370_000) / 100_000


def test_of_replies_to_one_salvo_the_least_remaining_is_right_in_any_order():
    for seed in range(20):
        one, luck = limiter(), random.Random(seed)
        flying = [leave(one, 0.0, 10_000)[0] for _ in range(16)]
        counted = list(range(16))
        luck.shuffle(counted)
        replies = list(zip(flying, counted, strict=True))
        luck.shuffle(replies)
        for request, place in replies:
            left = 500_000 - 10_000 * (place + 1)
            one.answered(0.2, request, said(6_000_000, left, 55.0), tokens=10_000)
        assert one.state(0.2).tokens_left == pytest.approx(340_000 + 20_000, abs=1)


def test_the_state_says_what_is_known():
    one = limiter()
    empty = one.state(0.0)
    assert (empty.tokens_limit, empty.tokens_left, empty.paced) == (None, None, None)
    request = one.arrive(500, Rates(tokens_per_minute=10**6))
    assert one.delay(0.0, request) == 0
    one.answered(
        0.0,
        request,
        RateLimits(
            limit_requests=3000,
            remaining_requests=2999,
            reset_requests=0.02,
            limit_tokens=6_000_000,
            remaining_tokens=5_000_000,
            reset_tokens=10.0,
        ),
        tokens=500,
    )
    leave(one, 0.0, 70)
    one.arrive(1, FREE)
    state = one.state(0.0)
    assert (state.requests_limit, state.tokens_limit) == (3000, 6_000_000)
    assert (state.requests_left, state.tokens_left) == (2998, 4_999_930)
    assert (state.in_flight, state.tokens_in_flight, state.waiting) == (1, 70, 1)
    assert state.configured == (Rates(tokens_per_minute=10**6),)
    assert (state.sent, state.refusals, state.closed_for) == (2, 0, 0)
