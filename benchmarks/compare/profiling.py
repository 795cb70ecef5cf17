"""Where does a client's CPU time go? By function, over all of its threads.

The profiler itself costs time with each call, so small functions look worse than they are: read the
order, not the seconds. What C code does without calling back, such as decoding, is one line.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import sys
import threading
import time
from types import TracebackType
from typing import Final, Self

_LINES: Final = 30


class Profile:
    """Profiles the thread that enters it and all threads that start meanwhile."""

    def __init__(self) -> None:
        self._profiles: list[cProfile.Profile] = []

    def __enter__(self) -> Self:
        threading.setprofile(self._begin)
        self._begin()
        return self

    def _begin(self, *_: object) -> None:
        # The first call of a thread replaces this function by a profile of that thread's CPU.
        profile = cProfile.Profile(time.thread_time)
        self._profiles.append(profile)
        profile.enable()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._profiles[0].disable()
        threading.setprofile(None)

    def table(self) -> str:
        """The functions that took most by themselves, then with what they called."""
        text = io.StringIO()
        stats = pstats.Stats(stream=text)
        for profile in self._profiles:
            profile.create_stats()
            stats.add(profile)
        for order in ("tottime", "cumtime"):
            stats.sort_stats(order).print_stats(_LINES)
        lines = text.getvalue()
        for folder in sorted(map(str, (*sys.path, sys.base_prefix, sys.prefix)), key=len)[::-1]:
            lines = lines.replace(f"{folder}/", "") if len(folder) > 1 else lines
        return lines
