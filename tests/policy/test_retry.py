"""Is it tried again when that may help, after the right time, and never too often?"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from embedcore.errors import (
    AuthenticationFailed,
    InvalidResponse,
    ModelNotFound,
    OutcomeUnknown,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    RequestRejected,
    TransientProviderError,
)
from embedcore.policy.retry import Retrier, RetryQuota
from embedcore.settings import RetrySettings
from embedcore.testing import FakeClock

SETTINGS = st.builds(
    RetrySettings,
    attempts=st.integers(1, 100),
    first_wait=st.floats(0, 60),
    longest_wait=st.floats(0, 60),
    longest_named_wait=st.floats(0, 1000),
    deadline=st.none() | st.floats(0.1, 1000),
)
ENDLESS = 10_000.0


def quota(most=ENDLESS, ratio=1.0):
    return RetryQuota(most, ratio)


def failing(
    error,
    settings,
    *,
    quota_of=None,
    clock=None,
    deadline=None,
    jitter=random.uniform,
    served=lambda: 0,
):
    """Runs an attempt that always fails: how often it was tried, and the waits between."""
    clock = clock or FakeClock()
    tries, told = [], []

    def attempt():
        tries.append(clock.monotonic())
        raise error() if callable(error) else error

    def before_sleep(failed, wait):
        told.append(wait)

    retrier = Retrier(
        settings,
        quota_of or quota(),
        deadline=deadline,
        served=served,
        monotonic=clock.monotonic,
        jitter=jitter,
    )
    with pytest.raises(Exception) as caught:
        retrier.run(attempt, sleep=clock.sleep, before_sleep=before_sleep)
    if isinstance(caught.value, TransientProviderError) and retrier.wait is None:
        told.append(None)
    return len(tries), clock.sleeps, told, caught.value


@pytest.mark.fault(21)
@hypothesis_settings(deadline=None)
@given(SETTINGS, st.randoms())
def test_without_a_named_time_the_attempts_bound_the_tries(settings, chance):
    tries, waits, told, error = failing(
        OutcomeUnknown("?"), settings, jitter=lambda low, high: chance.uniform(low, high)
    )
    assert tries == settings.attempts
    assert isinstance(error, OutcomeUnknown)
    assert told == [*waits, None]
    for number, wait in enumerate(waits):
        assert 0 <= wait <= min(settings.first_wait * 2**number, settings.longest_wait)


@pytest.mark.fault(21)
def test_too_fast_without_a_time_is_left_to_the_gate_and_ends_at_last():
    tries, waits, told, error = failing(RateLimited("too fast"), RetrySettings(attempts=2))
    assert isinstance(error, RateLimited)
    assert tries == 10
    assert waits == [0.0] * 9
    assert told == [*waits, None]


@pytest.mark.case("B2")
@pytest.mark.fault(21)
@pytest.mark.parametrize("named", [None, 0.5])
def test_too_fast_that_may_have_been_billed_is_not_paid_for_again_and_again(named):
    """An error inside a success costs what it costs each time."""
    error = RateLimited("too fast", retry_after=named, billed="unknown")
    assert failing(error, RetrySettings(attempts=2))[0] == 4


@pytest.mark.fault(21)
def test_too_fast_for_one_is_no_failure_while_others_get_through():
    served = itertools.count()
    tries, waits, *_ = failing(
        RateLimited("too fast"), RetrySettings(attempts=2), served=lambda: next(served)
    )
    assert (tries, len(waits)) == (21, 20)


@pytest.mark.fault(21)
def test_full_jitter_spreads_over_the_whole_exponential_wait():
    settings = RetrySettings(attempts=4, first_wait=1, longest_wait=3)
    assert failing(OutcomeUnknown("?"), settings, jitter=lambda low, high: high)[1] == [1, 2, 3]
    assert failing(OutcomeUnknown("?"), settings, jitter=lambda low, high: low)[1] == [0, 0, 0]


@pytest.mark.fault(20)
@hypothesis_settings(deadline=None)
@given(st.floats(0.001, 300), st.integers(1, 5))
def test_a_named_time_is_waited_out_and_uses_no_attempts(seconds, attempts):
    errors = [RateLimited("too fast", retry_after=seconds) for _ in range(7)]
    clock, left = FakeClock(), iter(errors)

    def attempt():
        error = next(left, None)
        if error is not None:
            raise error
        return "vectors"

    retrier = Retrier(RetrySettings(attempts=attempts), quota(0), monotonic=clock.monotonic)
    assert retrier.run(attempt, sleep=clock.sleep, before_sleep=lambda *_: None) == "vectors"
    assert len(clock.sleeps) == 7
    for wait in clock.sleeps:
        assert seconds <= wait <= seconds + min(seconds * 0.1, 1.0)


def test_a_server_that_names_a_time_every_time_ends_the_call_at_last():
    tries, _waits, _, error = failing(
        lambda: RateLimited("too fast", retry_after=0.5), RetrySettings(attempts=1)
    )
    assert 5 < tries < 50
    assert isinstance(error, RateLimited)


@pytest.mark.fault(22)
@hypothesis_settings(deadline=None)
@given(
    st.one_of(
        st.floats(),
        st.integers(),
        st.just(10**400),
        st.sampled_from(["5", "", None, True, b"5", [5], datetime(2026, 1, 1, tzinfo=UTC)]),
    ),
    SETTINGS,
)
def test_any_named_time_is_obeyed_ignored_or_too_long(seconds, settings):
    error = RateLimited("too fast")
    error.retry_after = seconds
    tries, waits, _, raised = failing(error, settings)
    assert raised is error
    usable = (
        isinstance(seconds, int | float)
        and not isinstance(seconds, bool)
        and not (isinstance(seconds, float) and not math.isfinite(seconds))
        and seconds > 0
    )
    if not usable:
        assert tries == min(5 * settings.attempts, 21)
        assert error.retry_at is None
    elif seconds > settings.longest_named_wait:
        assert (tries, waits) == (1, [])
        assert error.retry_at is not None
    else:
        assert min(waits) >= seconds


@pytest.mark.fault(22)
def test_a_time_above_the_cap_is_an_error_at_once_that_says_when():
    error = RateLimited("too fast", retry_after=1000)
    before = datetime.now(UTC)
    tries, waits, told, _ = failing(error, RetrySettings(longest_named_wait=300))
    assert (tries, waits, told) == (1, [], [None])
    assert timedelta(0) <= error.retry_at - before - timedelta(seconds=1000) < timedelta(seconds=60)


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    "error",
    [
        QuotaExhausted("no money"),
        AuthenticationFailed("no"),
        ModelNotFound("no"),
        RequestRejected("no"),
        InvalidResponse("nonsense"),
        KeyError("bug"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_trying_again_cannot_mend_is_tried_once(error):
    tries = []

    def attempt():
        tries.append(1)
        raise error

    told = []
    with pytest.raises(type(error)):
        Retrier(RetrySettings(), quota()).run(
            attempt, sleep=lambda _: None, before_sleep=lambda *each: told.append(each)
        )
    assert (len(tries), told) == (1, [])


def test_what_the_budget_blocks_is_not_tried_again():
    error = OutcomeUnknown("no answer")
    error.budget_blocked = True
    assert failing(error, RetrySettings())[0] == 1


@hypothesis_settings(deadline=None)
@given(SETTINGS, st.floats(0.1, 100), st.none() | st.floats(0.01, 50))
def test_no_wait_reaches_beyond_the_deadline(settings, seconds, named):
    clock = FakeClock()
    deadline = clock.monotonic() + seconds
    failing(
        lambda: RateLimited("too fast", retry_after=named),
        settings,
        clock=clock,
        deadline=deadline,
    )
    assert clock.monotonic() < deadline


@pytest.mark.fault(26)
@hypothesis_settings(deadline=None, max_examples=30)
@given(st.integers(1, 500), st.integers(0, 50), st.floats(0, 1), st.randoms())
def test_retries_never_outnumber_the_quota_and_its_share_of_successes(calls, most, ratio, chance):
    shared, requests, successes = RetryQuota(float(most), ratio), 0, 0

    def attempt():
        nonlocal requests, successes
        requests += 1
        if chance.random() < 0.7:
            raise ProviderUnavailable("overloaded", billed="no")
        successes += 1

    for _ in range(calls):
        with contextlib.suppress(TransientProviderError):
            Retrier(RetrySettings(attempts=5), shared, jitter=lambda *_: 0.0).run(
                attempt, sleep=lambda _: None, before_sleep=lambda *_: None
            )
    assert requests - calls <= most + ratio * successes + 1e-6


@pytest.mark.fault(26)
def test_a_named_wait_of_an_overloaded_server_costs_quota_and_that_of_a_gate_does_not():
    for error, tries in ((RateLimited, 3), (ProviderUnavailable, 1)):
        left = iter([error("wait", retry_after=0.1)] * 2)

        def attempt(left=left):
            failure = next(left, None)
            if failure is not None:
                raise failure

        done = []
        retrier = Retrier(RetrySettings(), quota(0.0))
        with contextlib.suppress(TransientProviderError):
            retrier.run(
                attempt, sleep=lambda _: None, before_sleep=lambda *each, d=done: d.append(each)
            )
        assert len(done) == tries - 1


# What is sent again in another way is no retry


def asked_otherwise(*ways, error=RequestRejected, **more):
    """Errors one after the other, each of which says how the provider would ask next."""
    left = iter(ways)

    def make():
        failure = error("no", billed="no", **more)
        failure.again = next(left, None)
        return failure

    return make


@pytest.mark.case("B3")
@pytest.mark.case("B10")
@pytest.mark.parametrize("error", [RequestRejected, AuthenticationFailed, ProviderUnavailable])
def test_each_new_way_of_asking_is_tried_once_and_at_once(error):
    settings = RetrySettings(attempts=1)
    for ways, tries in (
        (["a"], 2),
        (["a", "b"], 3),
        (["a", "a", "a"], 2),
        (["a", "b", "a"], 3),
        ([None], 1),
    ):
        count, sleeps, told, caught = failing(
            asked_otherwise(*ways, error=error), settings, quota_of=quota(0.0)
        )
        assert (count, set(sleeps) - {0.0}) == (tries, set())
        assert type(caught) is error
        # Only a transient error is told of, and only the last one: the others were no failures.
        assert told == ([None] if error is ProviderUnavailable else [])


def test_a_provider_that_always_finds_another_way_is_not_believed():
    endless = asked_otherwise(*map(str, range(1000)))
    count, *_ = failing(endless, RetrySettings(attempts=1), quota_of=quota(0.0))
    assert count == 5


def test_another_way_of_asking_leaves_the_attempts_as_they_were():
    """A time-out after it is tried again as often as any."""
    ways = iter([RequestRejected("no", billed="no"), OutcomeUnknown("a"), OutcomeUnknown("b")])

    def make():
        failure = next(ways, None) or OutcomeUnknown("c")
        failure.again = "key" if isinstance(failure, RequestRejected) else None
        return failure

    count, *_ = failing(make, RetrySettings(attempts=3))
    assert count == 1 + 3
