"""Who is buying which vector at this moment? What one thread buys, no other buys as well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final, TypeAlias

from embedcore.forksafe import in_child

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors

# Never for ever: on Windows nothing interrupts a wait without an end.
_LOOK_SECONDS: Final = 0.25
_LAST_SECONDS: Final = 5.0

Receive: TypeAlias = "Callable[[Sequence[int], Vectors], None]"


class Follower:
    """What one call waits for while others buy it.

    ``receive(indices, vectors)`` gets what each request of theirs brings: vectors of its own.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._changed = threading.Condition()
        self._receiving = threading.Lock()
        self._waiting: set[int] = set()
        self._lost: list[int] = []
        self._error: BaseException | None = None
        self._closed = False

    def expect(self, indices: Sequence[int]) -> None:
        with self._changed:
            self._waiting.update(indices)

    def arrived(self, indices: Sequence[int], vectors: Vectors) -> None:
        """Called in a thread of the call that bought it, which must not suffer from what fails."""
        try:
            with self._receiving:
                if not self._closed:
                    self._receive(indices, vectors)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = self._error or error
        self._settle(indices, lost=False)

    def lost(self, indices: Sequence[int]) -> None:
        """Whoever was buying them ended without them."""
        self._settle(indices, lost=True)

    def wait(self, pause: Callable[[float], None]) -> list[int]:
        """Until every expected vector is here or lost; returns the lost ones, ascending.

        ``pause(0)`` is called now and then, and may raise to end the wait. Raises what ``receive``
        raised.
        """
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                if not self._waiting:
                    lost, self._lost = sorted(self._lost), []
                    return lost
                self._changed.wait(_LOOK_SECONDS)
            pause(0.0)

    def close(self) -> None:
        """Nothing more is received, save for what does not come to its end within seconds."""
        self._closed = True
        if self._receiving.acquire(timeout=_LAST_SECONDS):
            self._receiving.release()

    def _settle(self, indices: Sequence[int], *, lost: bool) -> None:
        with self._changed:
            ended = self._waiting.intersection(indices)
            self._waiting -= ended
            if lost:
                self._lost += ended
            self._changed.notify_all()


class Claims:
    """The keys that calls of this process are buying for one store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[bytes, Follower] = {}
        self._waiting: dict[bytes, list[tuple[Follower, int]]] = {}

    def take(self, keys: Sequence[bytes], indices: Sequence[int], caller: Follower) -> list[int]:
        """Claim ``keys[j]`` for text ``indices[j]``. Returns the indices that others have claimed:
        ``caller`` will hear of those."""
        theirs = []
        with self._lock:
            for key, index in zip(keys, indices, strict=True):
                if self._owners.setdefault(key, caller) is not caller:
                    self._waiting.setdefault(key, []).append((caller, index))
                    theirs.append(index)
            caller.expect(theirs)
        return theirs

    def fulfil(self, keys: Sequence[bytes], vectors: Vectors, caller: Follower) -> None:
        """Vector j is here for ``keys[j]``: whoever waits for it gets a copy."""
        for follower, (places, indices) in self._end(keys, caller).items():
            follower.arrived(indices, vectors[places])

    def release(self, keys: Sequence[bytes], caller: Follower) -> None:
        """These were not bought after all. What ``caller`` has not claimed stays as it is."""
        for follower, (_, indices) in self._end(keys, caller).items():
            follower.lost(indices)

    def _end(
        self, keys: Sequence[bytes], caller: Follower
    ) -> dict[Follower, tuple[list[int], list[int]]]:
        """Whoever waits for any of them: the places in ``keys``, and its own indices for them."""
        ended: dict[Follower, tuple[list[int], list[int]]] = {}
        with self._lock:
            for place, key in enumerate(keys):
                if self._owners.get(key) is caller:
                    del self._owners[key]
                    for follower, index in self._waiting.pop(key, ()):
                        places, indices = ended.setdefault(follower, ([], []))
                        places.append(place)
                        indices.append(index)
        return ended


@cache
def claims_for(store: str) -> Claims:  # noqa: ARG001 - the cache's key
    """What everything in this process claims of one store."""
    return Claims()


# The parent's calls do not go on in a child.
in_child(claims_for.cache_clear)
