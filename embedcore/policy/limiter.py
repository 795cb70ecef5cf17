"""When may the next request leave? One gate per endpoint, for all threads of a process."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Final

_SLICE_SECONDS: Final = 15.0
_LONGEST_JITTER: Final = 1.0
_JITTER_SHARE: Final = 0.1


class Gate:
    """Closed for everybody when the provider says "too fast" to anybody.

    Clients that each obey a 429 on their own come back all at once, and are all refused again.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._monotonic = monotonic
        self._jitter = jitter
        self._lock = threading.Lock()
        self._open_at = 0.0

    def close(self, seconds: float) -> None:
        """Nothing more leaves for that long; an earlier closing that lasts longer stays."""
        with self._lock:
            self._open_at = max(self._open_at, self._monotonic() + seconds)

    @property
    def closed_for(self) -> float:
        """Seconds until it opens; 0 when it is open."""
        with self._lock:
            return max(self._open_at - self._monotonic(), 0.0)

    def wait(self, pause: Callable[[float], None], *, meanwhile: Callable[[], None]) -> None:
        """Return when the gate is open, a little later for some than for others.

        ``pause`` sleeps and raises when the call was stopped. ``meanwhile`` is called every few
        seconds, to keep a lease alive.
        """
        waited = False
        while (seconds := self.closed_for) > 0:
            if waited:
                meanwhile()
            pause(min(seconds, _SLICE_SECONDS))
            if seconds <= _SLICE_SECONDS and not self.closed_for:
                spread = min(seconds * _JITTER_SHARE, _LONGEST_JITTER)
                pause(self._jitter(0.0, spread))
            waited = True


@cache
def gate_for(endpoint: str) -> Gate:  # noqa: ARG001 - the cache's key
    """The gate that everything in this process shares for one endpoint."""
    return Gate()


if hasattr(os, "register_at_fork"):
    # A child must not inherit a lock that a thread of the parent was holding.
    os.register_at_fork(after_in_child=gate_for.cache_clear)
