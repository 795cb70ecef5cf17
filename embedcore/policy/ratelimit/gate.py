"""The rate limiter of one endpoint and model for all threads: waits until a request may leave."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Final

from embedcore.forksafe import in_child
from embedcore.policy.ratelimit.pace import GateState, Permit, Rates
from embedcore.policy.ratelimit.queue import BACKOFF, RateLimiter
from embedcore.provider.types import RateLimits

# News from other requests may shorten a wait, but not that of a closing.
_LOOK_AGAIN: Final = 0.1
_SLICE_SECONDS: Final = 15.0
_LEASE_SECONDS: Final = 5.0
_SHORTEST_PAUSE: Final = 0.0005
_NO_RATES: Final = Rates()


class Gate:
    """Lets requests leave in about the order they came, as fast as the provider takes them.

    Nothing is held back while nothing is known, but that a first salvo of ``FIRST_SALVO`` tokens
    must bring one answer before more leaves. Then what the headers say, a time the provider asks
    to wait, or its refusals slow all threads down together. How much may leave at most, see
    ``embedcore.policy.ratelimit.queue``.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
        backoff: tuple[float, float] = BACKOFF,
    ) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._limiter = RateLimiter(jitter=jitter, backoff=backoff)

    def admit(
        self,
        tokens: int,
        pause: Callable[[float], None],
        *,
        meanwhile: Callable[[], None],
        rates: Rates = _NO_RATES,
    ) -> Permit:
        """Return when one request, estimated at ``tokens``, may leave.

        Its pass must come back with one of ``answered``, ``refused`` and ``lost``. ``pause`` sleeps
        and raises when the call was stopped. ``meanwhile`` is called every few seconds, to keep a
        lease alive. ``rates``: the caller's own limits, for all that passes this gate.
        """
        with self._lock:
            one = self._limiter.arrive(tokens, rates)
            try:
                seconds = self._limiter.delay(self._monotonic(), one)
            except BaseException:
                self._limiter.give_up(one)
                raise
        if seconds > 0:
            self._stand_in_line(one, seconds, pause, meanwhile)
        return one

    def _stand_in_line(
        self,
        one: Permit,
        seconds: float,
        pause: Callable[[float], None],
        meanwhile: Callable[[], None],
    ) -> None:
        renewed = self._monotonic()
        try:
            while seconds > 0:
                longest = min(max(self.closed_for, _LOOK_AGAIN), _SLICE_SECONDS)
                pause(max(min(seconds, longest), _SHORTEST_PAUSE))
                now = self._monotonic()
                if now - renewed >= _LEASE_SECONDS:
                    meanwhile()
                    renewed = now
                with self._lock:
                    seconds = self._limiter.delay(self._monotonic(), one)
        except BaseException:
            with self._lock:
                if one.left is None:
                    self._limiter.give_up(one)
                else:
                    self._limiter.lost(self._monotonic(), one)
            raise

    def answered(self, one: Permit, limits: RateLimits | None, *, tokens: int | None) -> None:
        """It was served, and billed at ``tokens`` if the provider said so."""
        with self._lock:
            self._limiter.answered(self._monotonic(), one, limits, tokens=tokens)

    def refused(self, one: Permit, seconds: float | None, limits: RateLimits | None) -> None:
        """The provider said "too fast"; ``seconds``: the wait that it named, if it did.

        A wait longer than five minutes closes nothing: the next request is refused with it.
        """
        with self._lock:
            self._limiter.refused(self._monotonic(), one, seconds, limits)

    def lost(self, one: Permit) -> None:
        """It was never sent, or ended in an error that says nothing of the rate."""
        with self._lock:
            self._limiter.lost(self._monotonic(), one)

    def close(self, seconds: float) -> None:
        """Nothing more leaves for that long; an earlier closing that lasts longer stays."""
        with self._lock:
            self._limiter.close(self._monotonic(), seconds)

    @property
    def closed_for(self) -> float:
        """Seconds until it opens; 0 when it is open."""
        with self._lock:
            return self._limiter.closed_for(self._monotonic())

    def state(self) -> GateState:
        """What is known of the limits, and what is under way."""
        with self._lock:
            return self._limiter.state(self._monotonic())


@cache
def gate_for(endpoint: str, model: str = "") -> Gate:  # noqa: ARG001 - the cache's key
    """The rate limiter that everything in this process shares for one endpoint and model."""
    return Gate()


in_child(gate_for.cache_clear)
