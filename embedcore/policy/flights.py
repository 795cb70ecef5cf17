"""What is under way when a call ends, and how its threads get to know."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedcore.storage.amounts import Attempt


class Stopped(Exception):
    """The call has ended; whatever has not been sent stays unsent."""


@dataclass(kw_only=True, slots=True, eq=False)
class Flight:
    """One attempt that a thread is waiting for."""

    attempt: Attempt | None
    indices: Sequence[int]
    started: float
    given_up: bool = False


class Flights:
    """The attempts under way, so that a call that ends early can account for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: set[Flight] = set()

    def start(self, flight: Flight) -> None:
        with self._lock:
            self._flights.add(flight)

    def land(self, flight: Flight) -> bool:
        """The reply, or an error, is here. False: too late, the call has given the flight up."""
        with self._lock:
            self._flights.discard(flight)
            return not flight.given_up

    @property
    def under_way(self) -> int:
        with self._lock:
            return len(self._flights)

    def give_up(self, *, started_before: float) -> list[Flight]:
        """Take the attempts that began before then out of their threads' hands."""
        with self._lock:
            lost = [flight for flight in self._flights if flight.started <= started_before]
            for flight in lost:
                flight.given_up = True
                self._flights.discard(flight)
            return lost


class Pause:
    """Sleeps for a call, and wakes up when it ends.

    Called with 0 it only looks whether the call has ended. Raises ``Stopped`` then.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()

    def end(self) -> None:
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def __call__(self, seconds: float) -> None:
        if self._ended.wait(seconds) if seconds > 0 else self._ended.is_set():
            raise Stopped
