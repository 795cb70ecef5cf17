"""Retries: whether and when a failed attempt is repeated, as conditions of tenacity."""

from __future__ import annotations

import math
import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from numbers import Real
from typing import Final, TypeVar, cast

import tenacity

from embedcore.errors import (
    AuthenticationFailed,
    EmbeddingError,
    InputRejected,
    ModelNotFound,
    PermissionDenied,
    ProviderError,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    RemoteGone,
    ReplyMismatch,
    TimedOut,
    TransientProviderError,
)
from embedcore.settings import RetrySettings

Reply = TypeVar("Reply")

# A provider that names a time every time and never serves must end a call at last.
_MOST_NAMED_WAITS: Final = 20
# Beyond that a provider that always finds another way to ask is not believed.
_MOST_WAYS: Final = 4
# Times the attempts. Most limits are of a minute, many servers do not say when it is over, and a
# refusal costs nothing; others share the limit, and take what becomes free in turns with us.
_MOST_UNSERVED: Final = 5
# Times the attempts, where it may have been billed: an error inside a success.
_MOST_CHARGED: Final = 2
_LONGEST_JITTER: Final = 1.0
_JITTER_SHARE: Final = 0.1
# Far beyond the longest wait.
_MOST_DOUBLINGS: Final = 64


class RetryQuota:
    """How many retries a client may still make: an outage must not be answered with more load.

    Each retry takes one; each success gives a fraction back.
    """

    def __init__(self, most: float, ratio: float) -> None:
        self._most, self._ratio, self._left = most, ratio, most
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def give_back(self, retries: int) -> None:
        """These were no answer to an outage."""
        with self._lock:
            self._left = min(self._left + retries, self._most)

    def earn(self) -> None:
        with self._lock:
            self._left = min(self._left + self._ratio, self._most)


class Retrier:
    """Runs the attempts of one request. Make one for each request.

    ``once``: an error that may lie in the texts is not tried again; what never does (the rate, no
    connection) is, as always. ``divisible``: a request that timed out is not sent again as it is:
    its error is raised with ``wait`` set, and the next attempt is the caller's, in parts, after so
    many seconds. So it is with ``failed``, if it was charged.
    ``failed``: the error of a first attempt that was made before. ``served``: the last request to
    the same place that was answered so far. ``asked``: the ways in which the provider has asked
    otherwise for these texts.

    - ``wait``: seconds from the last error to the next attempt; None: there is none.
    - ``taken``: what its waits took from the quota.
    """

    def __init__(
        self,
        settings: RetrySettings,
        quota: RetryQuota,
        *,
        once: bool = False,
        divisible: bool = False,
        failed: TransientProviderError | None = None,
        asked: set[str] | None = None,
        deadline: float | None = None,
        served: Callable[[], int] = lambda: 0,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._settings = settings
        self._quota = quota
        self._once = once
        self._divisible = divisible
        self._failed = failed
        self._asked = set[str]() if asked is None else asked
        self._deadline = deadline
        self._served = served
        self._served_before = served()
        self._monotonic = monotonic
        self._jitter = jitter
        self._unserved = 0
        self._tries = 0
        self._named_waits = 0
        self._charged = 0
        self._in_another_way = False
        self.wait: float | None = None
        self.taken = 0

    def run(
        self,
        attempt: Callable[[], Reply],
        *,
        sleep: Callable[[float], None],
        before_sleep: Callable[[TransientProviderError, float], None],
    ) -> Reply:
        """Call ``attempt`` until it succeeds, or raise its last error.

        ``before_sleep`` hears of each transient error that is followed by another attempt, but for
        ``failed``. An error whose ``again`` is new is followed by one at once, which is no retry.
        """
        first = self._failed

        def next_attempt() -> Reply:
            nonlocal first
            if first is not None:
                error, first = first, None
                raise error
            return attempt()

        def tell(state: tenacity.RetryCallState) -> None:
            error = _error_of(state)
            if not self._in_another_way and error is not self._failed:
                before_sleep(error, state.upcoming_sleep)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._is_worth_it),
            wait=self._next_wait,
            stop=self._ends,
            before_sleep=tell,
            sleep=sleep,
            reraise=True,
        )
        try:
            reply = retrying(next_attempt)
        finally:
            # It refers to itself, and through ``attempt`` to all the vectors of the call: without
            # this they would stay in memory until the garbage collector comes by.
            vars(retrying).clear()
        self._quota.earn()
        return reply

    def _is_worth_it(self, error: BaseException) -> bool:
        """Whether the same texts may be embedded by another attempt. ``error.again`` is noted."""
        self.wait = None
        how = error.again if isinstance(error, ProviderError) else None
        self._in_another_way = (
            how is not None and how not in self._asked and len(self._asked) < _MOST_WAYS
        )
        if how is not None and self._in_another_way:
            self._asked.add(how)
        return self._in_another_way or isinstance(error, TransientProviderError)

    def _next_wait(self, state: tenacity.RetryCallState) -> float:
        """The time that the provider names; none for its rate limit, which the gate waits for; else
        a random one below an exponential bound."""
        if self._in_another_way:
            return 0.0
        error = _error_of(state)
        named = named_wait(error)
        if named is not None:
            self._named_waits += 1
            return named + self._jitter(0.0, min(named * _JITTER_SHARE, _LONGEST_JITTER))
        if isinstance(error, RateLimited):
            self._named_waits += 1
            return 0.0
        self._tries += 1
        longest = min(
            self._settings.first_wait * 2 ** min(self._tries - 1, _MOST_DOUBLINGS),
            self._settings.longest_wait,
        )
        return self._jitter(0.0, longest)

    def _ends(self, state: tenacity.RetryCallState) -> bool:
        """Whether this was the last attempt. ``wait`` is set where there is another."""
        if self._in_another_way:
            return False
        error, wait = _error_of(state), state.upcoming_sleep
        if self._is_refused(error) or self._is_last(error) or self._is_too_late(wait):
            return True
        in_parts = self._is_in_parts(error)
        # Waiting for a rate limit adds no load. The parts take from the quota one by one, from
        # who sends them.
        if not (in_parts or isinstance(error, RateLimited)):
            if not self._quota.take():
                return True
            self.taken += 1
        self.wait = wait
        return in_parts

    def _is_refused(self, error: TransientProviderError) -> bool:
        """For want of money, or because it would cost too much, or end the same."""
        if error.budget_blocked or (self._once and not is_about_the_moment(error)):
            return True
        if isinstance(error, RateLimited):
            self._charged += error.billed != "no"
            return self._charged >= self._settings.attempts * _MOST_CHARGED
        return False

    def _is_last(self, error: TransientProviderError) -> bool:
        """Whether it was tried, or waited for, as often and as long as it may be."""
        named = named_wait(error)
        if named is not None and named > self._settings.longest_named_wait:
            error.retry_at = _later(named)
            return True
        if named is not None:
            return self._named_waits > _MOST_NAMED_WAITS
        if isinstance(error, RateLimited):
            return self._is_hopeless()
        return self._tries >= self._settings.attempts

    def _is_hopeless(self) -> bool:
        """Too fast, and no time was named: the rate limiter finds a pace at which it goes on.

        It counts as a try only while no other request gets through either.
        """
        served = self._served()
        self._unserved = 1 if served != self._served_before else self._unserved + 1
        self._served_before = served
        hopeless = self._unserved >= self._settings.attempts * _MOST_UNSERVED
        return hopeless or self._named_waits > _MOST_NAMED_WAITS

    def _is_too_late(self, wait: float) -> bool:
        return self._deadline is not None and self._monotonic() + wait >= self._deadline

    def _is_in_parts(self, error: TransientProviderError) -> bool:
        charged = error is self._failed and error.billed != "no"
        return self._divisible and (charged or isinstance(error, TimedOut))


def _error_of(state: tenacity.RetryCallState) -> TransientProviderError:
    """The transient error of the attempt that just ended; only such are waited for."""
    error = state.outcome.exception() if state.outcome is not None else None
    return cast(TransientProviderError, error)


def _later(seconds: float) -> datetime:
    try:
        return datetime.now(UTC) + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def is_about_the_moment(error: TransientProviderError) -> bool:
    """Too fast, no connection, or longer to wait than is waited for: no text can be the reason."""
    if error.retry_at is not None:
        return True
    if isinstance(error, ProviderUnavailable):
        return error.status is None and error.billed == "no"
    return isinstance(error, RateLimited)


def named_wait(error: TransientProviderError) -> float | None:
    """The time that the provider asked for, if it makes sense."""
    seconds: object = error.retry_after
    if isinstance(seconds, bool) or not isinstance(seconds, Real):
        return None
    try:
        named = float(seconds)
    except OverflowError:
        named = sys.float_info.max
    return named if math.isfinite(named) and named > 0 else None


def is_about_no_text(error: EmbeddingError) -> bool:
    """Whether neither a text nor the size of a request can be the reason."""
    if isinstance(error, TransientProviderError):
        return is_about_the_moment(error)
    settings = (
        AuthenticationFailed,
        PermissionDenied,
        ModelNotFound,
        QuotaExhausted,
        RemoteGone,
        ReplyMismatch,
    )
    return isinstance(error, settings) or not isinstance(error, (ProviderError, InputRejected))


def may_be_kept(error: EmbeddingError) -> bool:
    """Whether ``on_error="keep"`` may turn this into failed rows instead of raising it."""
    return isinstance(error, TransientProviderError) or not is_about_no_text(error)
