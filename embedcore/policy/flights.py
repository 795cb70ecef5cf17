"""What is under way when a call ends, and how its threads get to know."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    thread: threading.Thread = field(default_factory=threading.current_thread)
    landed: bool = False
    given_up: bool = False


class Flights:
    """The attempts under way, so that a call that ends early can account for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: set[Flight] = set()
        self._closed = False

    def start(self, flight: Flight) -> bool:
        """Just before it is sent. False: the call has ended, and it must not be sent."""
        with self._lock:
            if not self._closed:
                self._flights.add(flight)
            return not self._closed

    def land(self, flight: Flight) -> bool:
        """The reply, or an error, is here. False: too late, the call has given the flight up."""
        with self._lock:
            flight.landed = True
            return not flight.given_up

    def finish(self, flight: Flight) -> None:
        """What the flight brought is kept, and booked."""
        with self._lock:
            self._flights.discard(flight)

    @property
    def under_way(self) -> int:
        """Flights that have not landed, or whose vectors are not yet kept and booked."""
        with self._lock:
            return len(self._flights)

    def close(self) -> None:
        """Nothing starts any more."""
        with self._lock:
            self._closed = True

    def give_up(self) -> list[Flight]:
        """Take what has not landed out of its threads' hands; nothing starts any more."""
        with self._lock:
            self._closed = True
            lost = [flight for flight in self._flights if not flight.landed]
            for flight in lost:
                flight.given_up = True
                self._flights.discard(flight)
            return lost


class Pause:
    """Sleeps for a call, and wakes up when it ends.

    Called with 0 it only looks whether the call has ended. Raises ``Stopped`` then. ``ended`` may
    be set by someone outside the call as well. ``wait_for``: of the engine.
    """

    def __init__(
        self,
        ended: threading.Event | None = None,
        wait_for: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._ended = ended if ended is not None else threading.Event()
        self._wait_for = wait_for

    def end(self) -> None:
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def __call__(self, seconds: float) -> None:
        if self._wait_for(self._ended, seconds) if seconds > 0 else self._ended.is_set():
            raise Stopped
