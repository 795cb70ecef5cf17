"""Where do large bodies go? Into memory that is used again, outside of what each thread hoards.

What a thread allocates and frees, its part of the heap keeps: with sixteen threads, and bodies of
two megabytes in three forms each, that is a hundred megabytes for nothing. Fresh pages for every
body would cost as much time as reading it.
"""

from __future__ import annotations

import mmap
import threading
from typing import Final

_KEPT: Final = 4
_LARGEST_KEPT: Final = 8 << 20
_STEP: Final = 1 << 20


class Buffers:
    """Lends memory. Safe to use from several threads; a few buffers are kept for the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap:
        """At least ``size`` bytes, with anything in them."""
        with self._lock:
            for place, buffer in enumerate(self._free):
                if len(buffer) >= size:
                    return self._free.pop(place)
        return _pages(-(-max(size, 1) // _STEP) * _STEP)

    def give(self, buffer: mmap.mmap) -> None:
        """Take back what was lent: nobody may look at it any more."""
        with self._lock:
            if len(self._free) < _KEPT and len(buffer) <= _LARGEST_KEPT:
                self._free.append(buffer)


def _pages(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        # Not shared: after a fork parent and child read their own bodies.
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)
