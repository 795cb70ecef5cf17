"""Does a set rate hold at all times, and does a rate found by trial find its way back?"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings, strategies as st

from embedcore.policy.ratelimit.pace import Configured, Pace, Rates, Steady
from embedcore.storage.rate_buckets import Amounts


def never(per_minute: float) -> bool:
    return False


@given(
    st.integers(1, 10**7),
    st.lists(st.tuples(st.floats(0, 90), st.integers(1, 400_000)), min_size=1, max_size=40),
)
@settings(deadline=None)
def test_no_stretch_of_time_has_more_than_its_rate_one_second_and_one_request(per_minute, asked):
    steady, now, left = Steady(per_minute), 0.0, []
    for passed, amount in asked:
        now += passed
        now += steady.delay(now, 0)
        steady.leave(now, amount)
        left.append((now, amount))
    for first in range(len(left)):
        for last in range(first, len(left)):
            # The last may be as large as it likes; what comes after it waits for that.
            amount = sum(amount for _, amount in left[first:last])
            time = left[last][0] - left[first][0]
            assert amount <= per_minute / 60 * (time + 1) * (1 + 1e-6) + 1e-6


def test_a_rate_that_is_set_is_reached():
    steady, now = Steady(600), 0.0
    for _ in range(600):
        now += steady.delay(now, 0)
        steady.leave(now, 1)
    assert now == pytest.approx(59, abs=0.2)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
@example(100, 150)
def test_what_was_billed_counts_not_what_was_guessed(guessed, billed):
    corrected, right = Steady(60_000), Steady(60_000)
    corrected.leave(10.0, guessed)
    corrected.correct(billed - guessed)
    right.leave(10.0, billed)
    assert corrected.delay(10.0, 5) == pytest.approx(right.delay(10.0, 5))


@pytest.mark.parametrize("rate", [0, -1])
@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute", "texts_per_minute"])
def test_a_rate_is_positive(name, rate):
    with pytest.raises(ValueError, match="positive"):
        Rates(**{name: rate})


def test_clients_with_different_rates_count_what_all_of_them_send():
    configured = Configured()
    slow, fast = Rates(requests_per_minute=60), Rates(requests_per_minute=6000)
    free = {"requests": never, "tokens": never}
    for rates in (slow, fast):
        assert configured.delay(0.0, rates, Amounts(), free) == 0
    for _ in range(3):
        configured.leave(0.0, Amounts(1, 10, 1))
    assert configured.delay(0.0, slow, Amounts(), free) == pytest.approx(2)
    assert configured.delay(0.0, fast, Amounts(), free) == 0
    assert configured.delay(0.0, Rates(), Amounts(), free) == 0
    assert configured.rates == (slow, fast)


def test_where_the_server_allows_no_more_only_the_server_counts():
    configured, rates = Configured(), Rates(tokens_per_minute=6000)
    assert configured.delay(0.0, rates, Amounts(), {"tokens": never}) == 0
    configured.leave(0.0, Amounts(1, 60_000, 1))
    assert configured.delay(0.0, rates, Amounts(), {"tokens": never}) > 500
    assert configured.delay(0.0, rates, Amounts(), {"tokens": lambda per_minute: True}) == 0


def test_a_pace_holds_nothing_back_until_something_was_refused():
    pace = Pace()
    for second in range(100):
        pace.accepted(second, 1e9)
        pace.leave(second, 1e9)
        assert pace.rate(second) is None
        assert pace.delay(second, 1e9) == 0


def test_between_two_refusals_a_pace_measures_the_rate_of_the_server():
    pace = Pace()
    pace.accepted(0.0, 1_000_000)
    pace.refused(1.0, 50_000, 0, 1.0)
    at_first = pace.rate(1.0)
    assert at_first is not None
    for second in range(2, 12):
        pace.accepted(second, 100_000)
    pace.refused(11.0, 50_000, 0, 11.0)
    assert pace.rate(11.0) == pytest.approx(95_000)


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 10**6)), max_size=30))
def test_a_pace_goes_down_at_a_refusal_and_up_after_it_until_it_is_forgotten(refusals):
    pace, now = Pace(), 0.0
    for passed, amount in refusals:
        now += passed
        before = pace.rate(now)
        pace.refused(now, amount, 0, now)
        after = pace.rate(now)
        assert after is not None
        if before is not None:
            assert after <= max(before, amount / pace.longest_delay / 10)
        later = [pace.rate(now + second) for second in range(0, 60, 5)]
        assert later == sorted(later)
    assert pace.rate(now + 60.001) is None
    assert pace.delay(now + 60.001, 10**9) == 0


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=20))
def test_nobody_waits_longer_than_the_longest_delay_for_a_pace(amounts):
    pace, now = Pace(), 0.0
    pace.refused(now, 1, 0, now)
    for amount in amounts:
        waited = 0.0
        while (seconds := pace.delay(now, 0)) > 0:
            now += seconds
            waited += seconds
        assert waited <= pace.longest_delay + 1e-6
        pace.leave(now, amount)
