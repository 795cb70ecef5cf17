"""How is something opened once for all threads, closed, opened again, and survived by a fork?"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Thing = TypeVar("Thing")

_every: weakref.WeakSet[Opened[Any]] = weakref.WeakSet()
_inherited: list[object] = []


class Opened(Generic[Thing]):
    """Holds a thing that the first thread to need it opens, until it is closed.

    After a fork the child has none and opens its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thing: Thing | None = None
        _every.add(self)

    def get(self, make: Callable[[], Thing]) -> Thing:
        """What is open; ``make`` opens it if nothing is."""
        thing = self._thing
        if thing is None:
            with self._lock:
                thing = self._thing
                if thing is None:
                    thing = self._thing = make()
        return thing

    def take(self) -> Thing | None:
        """What was open, for the caller to close. The next ``get`` opens anew."""
        with self._lock:
            thing, self._thing = self._thing, None
        return thing

    def leave_to_parent(self) -> None:
        """Called in a child: connections must be neither used nor closed across a fork, so that
        they are kept, untouched, for ever; a thread that does not exist here may hold the lock.
        """
        _inherited.append(self._thing)
        self._thing = None
        self._lock = threading.Lock()


def _forked() -> None:
    for opened in list(_every):
        opened.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
