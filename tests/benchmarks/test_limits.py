"""The limiter grants what was promised and not a token more, and says when to come again."""

from __future__ import annotations

from dataclasses import replace

from compare.limits import Limit, RateLimiter, go_duration
from hypothesis import given, strategies as st

LIMIT = Limit(tokens_per_minute=6000, burst_tokens=500, requests_per_minute=120, burst_requests=10)
STRICT = replace(LIMIT, refused_count=True)
STEPS = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 500)), min_size=1, max_size=60)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(STEPS)
def test_no_window_of_time_gets_more_than_burst_and_refill(
    steps: list[tuple[float, int]],
) -> None:
    clock = Clock()
    limiter = RateLimiter(LIMIT, clock)
    granted: list[tuple[float, int]] = []
    for pause, tokens in steps:
        clock.now += pause
        if limiter.take(tokens)[0] == 0:
            granted.append((clock.now, tokens))
    for first, (start, _) in enumerate(granted):
        for last in range(first, len(granted)):
            minutes = (granted[last][0] - start) / 60
            window = granted[first : last + 1]
            tokens_allowed = LIMIT.burst_tokens + minutes * LIMIT.tokens_per_minute
            requests_allowed = LIMIT.burst_requests + minutes * LIMIT.requests_per_minute
            assert sum(tokens for _, tokens in window) <= tokens_allowed + 1e-6
            assert len(window) <= requests_allowed + 1e-6


@given(STEPS)
def test_the_wait_that_is_named_is_just_long_enough(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    limiter = RateLimiter(LIMIT, clock)
    for pause, tokens in steps:
        clock.now += pause
        wait, _ = limiter.take(tokens)
        if wait > 0.01:
            clock.now += wait - 0.005
            assert limiter.take(tokens)[0] > 0
            clock.now += 0.006
            assert limiter.take(tokens)[0] == 0


@given(STEPS)
def test_where_refusals_count_the_named_wait_is_enough_and_an_early_request_prolongs_it(
    steps: list[tuple[float, int]],
) -> None:
    clock = Clock()
    limiter = RateLimiter(STRICT, clock)
    for pause, tokens in steps:
        clock.now += pause
        if limiter.take(tokens)[0] == 0:
            continue
        named, _ = limiter.take(tokens)
        clock.now += named / 2
        again, kind = limiter.take(tokens)
        assert again > 0
        assert kind == "tokens" or again > named / 2
        clock.now += again + 0.001
        assert limiter.take(tokens)[0] == 0


def test_who_asks_all_the_time_gets_nothing_where_refusals_count() -> None:
    granted = {}
    for limit in (LIMIT, STRICT):
        clock = Clock()
        limiter = RateLimiter(limit, clock)
        answers = []
        for _ in range(200):
            answers.append(limiter.take(1)[0])
            clock.now += 0.25
        granted[limit] = sum(wait == 0 for wait in answers)
    # 10 at once and two a second; a request every quarter of a second takes what half of one needs.
    assert granted[LIMIT] >= 105
    assert granted[STRICT] <= 20


def test_a_refusal_takes_nothing() -> None:
    clock = Clock()
    limiter = RateLimiter(LIMIT, clock)
    assert limiter.take(450)[0] == 0
    before = limiter.headers()
    wait, kind = limiter.take(51)
    assert (round(wait, 6), kind) == (0.01, "tokens")
    assert limiter.headers() == before
    assert limiter.take(50)[0] == 0


def test_requests_are_limited_too() -> None:
    limiter = RateLimiter(LIMIT, Clock())
    answers = [limiter.take(1) for _ in range(11)]
    assert [wait for wait, _ in answers[:10]] == [0.0] * 10
    assert answers[10] == (0.5, "requests")


def test_the_headers_are_the_six_of_openai() -> None:
    limiter = RateLimiter(LIMIT, Clock())
    limiter.take(400)
    assert limiter.headers().decode().splitlines() == [
        "x-ratelimit-limit-requests: 120",
        "x-ratelimit-remaining-requests: 9",
        "x-ratelimit-reset-requests: 500ms",
        "x-ratelimit-limit-tokens: 6000",
        "x-ratelimit-remaining-tokens: 100",
        "x-ratelimit-reset-tokens: 4s",
    ]


def test_durations_are_written_as_go_does() -> None:
    written = [go_duration(seconds) for seconds in (0, 0.012, 1, 1.5, 360, 1396.298)]
    assert written == ["0s", "12ms", "1s", "1.5s", "6m0s", "23m16.298s"]


def test_the_ideal_time_is_what_the_burst_does_not_cover() -> None:
    assert LIMIT.ideal_seconds(500) == 0
    assert LIMIT.ideal_seconds(6500) == 60
    assert LIMIT.ideal_seconds_of_requests(10) == 0
    assert LIMIT.ideal_seconds_of_requests(130) == 60
