"""Retries: whether and when a failed attempt is repeated. The only module that knows tenacity."""

from __future__ import annotations

import math
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from numbers import Real
from typing import Final, TypeVar

import tenacity

from embedcore.errors import (
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    TimedOut,
    TransientProviderError,
)

Reply = TypeVar("Reply")

# A provider that names a time every time and never serves must end a call at last.
_MOST_NAMED_WAITS: Final = 20
# Beyond that a provider that always finds another way to ask is not believed.
_MOST_WAYS: Final = 4
# Times the attempts. Most limits are of a minute, many servers do not say when it is over, and a
# refusal costs nothing; others share the limit, and take what becomes free in turns with us.
_PATIENCE: Final = 5
# Times the attempts, where it may have been billed: an error inside a success.
_PATIENCE_THAT_COSTS: Final = 2
_LONGEST_JITTER: Final = 1.0
_JITTER_SHARE: Final = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrySettings:
    """See ``embedcore.config.Retry``. Times in seconds."""

    attempts: int = 3
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_named_wait: float = 300.0
    request_timeout: float = 120.0
    deadline: float | None = None
    quota: float = 35.0
    quota_ratio: float = 0.1


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
    after the wait its error is raised, and the next attempt is the caller's, in parts. So it is
    with one that ``run`` is to go on with, if its first attempt was charged.
    ``served``: how many requests to the same place were answered so far. ``asked``: the ways in
    which the provider has asked otherwise for these texts. ``taken``: what its waits took from the
    quota.
    """

    def __init__(
        self,
        settings: RetrySettings,
        quota: RetryQuota,
        *,
        once: bool = False,
        divisible: bool = False,
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
        self._deadline = deadline
        self._monotonic = monotonic
        self._jitter = jitter
        self._served = served
        self._served_before = served()
        self._unserved = 0
        self._tries = 0
        self._named_waits = 0
        self._charged = 0
        self._asked = set[str]() if asked is None else asked
        self.taken = 0

    def run(
        self,
        attempt: Callable[[], Reply],
        *,
        pause: Callable[[float], None],
        on_failure: Callable[[TransientProviderError, float | None], None],
        failed: TransientProviderError | None = None,
    ) -> Reply:
        """Call ``attempt`` until it succeeds, or raise its last error.

        ``on_failure`` hears of each transient error with the seconds until the next try, or None.
        An error whose ``again`` is new is followed by an attempt at once, which is no retry.
        ``failed``: the error of a first attempt that was made, and told of, before.
        """
        wait: float | None = None
        first = failed

        def again(error: BaseException) -> bool:
            nonlocal wait
            if self._is_asked_otherwise(error):
                wait = 0.0
                return True
            if not isinstance(error, TransientProviderError):
                return False
            charged = error is failed and error.billed != "no"
            in_parts = self._divisible and (charged or isinstance(error, TimedOut))
            # The parts are paid for with the quota one by one, by who sends them.
            wait = self.next_wait(error, free=in_parts)
            if error is not failed:
                on_failure(error, wait)
            if in_parts and wait is not None:
                pause(wait)
            return wait is not None and not in_parts

        def next_attempt() -> Reply:
            nonlocal first
            if first is not None:
                error, first = first, None
                raise error
            return attempt()

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(again),
            wait=lambda _: wait or 0.0,
            stop=tenacity.stop_never,
            sleep=pause,
            reraise=True,
        )
        try:
            reply = retrying(next_attempt)
        finally:
            # It refers to itself, and through ``again`` to all the vectors of the call: without
            # this they would stay in memory until the garbage collector comes by.
            vars(retrying).clear()
        self._quota.earn()
        return reply

    def _is_asked_otherwise(self, error: BaseException) -> bool:
        """Would the provider ask for the same texts in a way that was not tried for them yet?"""
        how = error.again if isinstance(error, ProviderError) else None
        if how is None or how in self._asked or len(self._asked) >= _MOST_WAYS:
            return False
        self._asked.add(how)
        return True

    def next_wait(self, error: TransientProviderError, *, free: bool = False) -> float | None:
        """Seconds until the next try, or None: this was the last one.

        ``free``: the next try takes nothing from the quota.
        """
        if error.budget_blocked or (self._once and not is_about_the_moment(error)):
            return None
        named = named_wait(error)
        if isinstance(error, RateLimited) and self._costs_too_much(error):
            return None
        if named is not None:
            wait = self._named_wait(error, named)
        elif isinstance(error, RateLimited):
            wait = self._gate_wait()
        else:
            wait = self._own_wait()
        if wait is None:
            return None
        if self._deadline is not None and self._monotonic() + wait >= self._deadline:
            return None
        # Waiting at a gate that the provider closed adds no load, and so costs no quota.
        if free or isinstance(error, RateLimited):
            return wait
        taken = self._quota.take()
        self.taken += taken
        return wait if taken else None

    def _costs_too_much(self, error: RateLimited) -> bool:
        self._charged += error.billed != "no"
        return self._charged >= self._settings.attempts * _PATIENCE_THAT_COSTS

    def _gate_wait(self) -> float | None:
        """Too fast, and no time was named: the gate finds a pace at which it goes on.

        It counts as a try only while no other request gets through either.
        """
        self._named_waits += 1
        served = self._served()
        self._unserved = 1 if served != self._served_before else self._unserved + 1
        self._served_before = served
        hopeless = self._unserved >= self._settings.attempts * _PATIENCE
        return None if hopeless or self._named_waits > _MOST_NAMED_WAITS else 0.0

    def _named_wait(self, error: TransientProviderError, named: float) -> float | None:
        if named > self._settings.longest_named_wait:
            error.retry_at = _later(named)
            return None
        self._named_waits += 1
        if self._named_waits > _MOST_NAMED_WAITS:
            return None
        return named + self._jitter(0.0, min(named * _JITTER_SHARE, _LONGEST_JITTER))

    def _own_wait(self) -> float | None:
        self._tries += 1
        if self._tries >= self._settings.attempts:
            return None
        longest = min(
            self._settings.first_wait * 2 ** (self._tries - 1), self._settings.longest_wait
        )
        return self._jitter(0.0, longest)


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
