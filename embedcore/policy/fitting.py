"""How much of a text does a server take that has refused the whole? Found in few requests.

Nothing here sends anything, and no unit of the server's is known: only what passed and what did
not. The rules: ``docs/decisions/0019-cut-by-counts.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from embedcore.provider.tokens import utf8_length, utf8_prefix

# What is kept must be so much of something that was refused, in characters and in bytes. A little
# above the 80 % that are promised: tokens are spread unevenly.
_ENOUGH: Final = 0.83
_MOST_TRIES: Final = 20
_MOST_SUGGESTED: Final = 2
# What is tried above something that passed, to see it refused, is so much longer.
_ABOVE: Final = 1.18
_JUST_ABOVE: Final = 1.02
_JUST_BELOW: Final = 0.97


class Fitting:
    """Tries prefixes of one text until the longest that passed is nearly as long as the shortest
    that was refused.

    ``kept``: the longest prefix that passed; None: none yet. ``trusted``: of the last prefix it is
    known otherwise that hardly more would fit.
    """

    def __init__(
        self,
        text: str,
        *,
        start: str | None,
        step: float,
        floor: int,
        snap: Callable[[str, str], str] = lambda prefix, _: prefix,
    ) -> None:
        """``text`` was refused. ``start``: the prefix to try first, None: one ``step`` (a factor
        below 1) shorter. ``floor``: UTF-8 bytes; no shorter prefix is tried, unless suggested.
        ``snap(prefix, refused)``: what is tried instead of a prefix of what was refused."""
        self.kept: str | None = None
        self._refused = text
        self._step = step
        self._floor = max(floor, 1)
        self._snap = snap
        self._next = start
        self._steps = 1
        self._tries = 0
        self._suggested = 0
        self._has_grown = False
        self._is_over = False

    def next(self) -> str | None:
        """The prefix to try now; None: it is over."""
        if self._is_over or self._tries >= _MOST_TRIES:
            return None
        suggestion, self._next = self._next, None
        candidate = self._between(suggestion) if suggestion else None
        candidate = candidate or (self._shorter() if self.kept is None else self._longer())
        if candidate is None:
            return None
        self._tries += 1
        return candidate

    def refused(self, prefix: str, suggestion: str | None = None) -> None:
        """It is too long as well. ``suggestion``: what the refusal says that would fit."""
        self._refused = prefix
        if suggestion and self.kept is None and self._suggested < _MOST_SUGGESTED:
            self._suggested += 1
            self._next = suggestion

    def passed(self, prefix: str, *, room: float | None = None, trusted: bool = False) -> None:
        """The server took it. ``room``: how many times its length would probably fit; None: nobody
        knows. ``trusted``: so much is known to fit, and hardly more."""
        self.kept = prefix
        self._is_over = trusted or self._is_enough()
        if self._is_over or room is None:
            return
        size = utf8_length(prefix) * room
        near = utf8_length(prefix) / _ENOUGH
        # Either just above what is expected to fit, to see it refused, or as much as will do.
        wanted = size * _JUST_ABOVE if size * _JUST_ABOVE < near else size * _JUST_BELOW
        self._next = utf8_prefix(self._refused, int(wanted))

    def _is_enough(self) -> bool:
        if self.kept is None:
            return False
        enough_bytes = utf8_length(self.kept) >= _ENOUGH * utf8_length(self._refused)
        return enough_bytes and len(self.kept) >= _ENOUGH * len(self._refused)

    def _between(self, prefix: str) -> str | None:
        shortest = 0 if self.kept is None else len(self.kept)
        if not shortest < len(prefix) < len(self._refused):
            return None
        prefix = self._snap(prefix, self._refused)
        return prefix if shortest < len(prefix) < len(self._refused) else None

    def _shorter(self) -> str | None:
        """Ever larger steps down: what is far too long must not take many requests."""
        size = utf8_length(self._refused)
        if size <= self._floor:
            return None
        wanted = max(int(size * self._step**self._steps), self._floor)
        self._steps *= 2
        return self._between(self._at_most(wanted))

    def _longer(self) -> str | None:
        """Between what passed and what did not, once steps were too large."""
        if self.kept is None or self._is_enough():
            return None
        low, high = len(self.kept), len(self._refused)
        middle = round((low * high) ** 0.5)
        if not self._has_grown:
            # Most often it began near the end: just far enough above to know it, once refused.
            middle = min(int(low * _ABOVE), middle)
        self._has_grown = True
        middle = min(max(middle, low + 1), high - 1)
        return self._between(self._refused[:middle])

    def _at_most(self, in_bytes: int) -> str:
        prefix = utf8_prefix(self._refused, in_bytes)
        if len(prefix) == len(self._refused):
            prefix = prefix[:-1]
        # At the least one character, however many bytes it has.
        return prefix or self._refused[:1]
