"""Buckets that several processes take from: what may leave, and when, as functions of time.

Whatever is reserved gets the time at which it may leave, if need be in the future, one after the
other: so nothing is overtaken, and no transaction is needed when the time has come. Times are
seconds of a clock that never goes back and that all these processes have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

REQUESTS: Final = "requests"
TOKENS: Final = "tokens"
TEXTS: Final = "texts"
# While nothing is known of a server's limits: what leaves before it has answered anything. A slow
# server is sent a few more all the time.
TRIAL_REQUESTS: Final = 8.0
TRIAL_TOKENS: Final = 250_000.0
_TRIAL_PER_SECOND: Final = 1.0
# So many in flight at once, and no limit was named: there is nothing to share.
_FREE_REQUESTS: Final = 128.0
_FREE_TOKENS: Final = 16 * TRIAL_TOKENS
_TRIAL_FORGOTTEN: Final = 60.0
# Of requests that leave in turn, one may get there early, or late after what was seen remaining.
_EARLY: Final = 0.02
_SPARE: Final = {REQUESTS: 1.0, TOKENS: 0.25}
_MOST_SPARED: Final = 0.25
# What is seen too much of is late, rather than unused: it is taken for unused only by and by.
_GAIN_UP, _GAIN_DOWN = 0.15, 0.5
_CONFIGURED_SECONDS: Final = 1.0
_MINUTE: Final = 60.0


class Amounts(NamedTuple):
    """What is counted of requests. No server names a limit in texts: those are rates that were set
    only."""

    requests: int = 0
    tokens: int = 0
    texts: int = 0

    def of(self, kind: str) -> int:
        """What counts for a bucket of that kind."""
        found: int = getattr(self, kind.partition(":")[0])
        return found

    def and_more(self, other: Amounts) -> Amounts:
        return Amounts(
            self.requests + other.requests, self.tokens + other.tokens, self.texts + other.texts
        )


class Facts(NamedTuple):
    """What a limiter knows of one limit of the server: ``named`` per minute, ``rate`` per second,
    ``size`` of a full bucket, ``left`` of it now. ``window``: it fills all at once, after so many
    seconds and next at ``ends``; None: steadily."""

    named: float
    rate: float
    size: float
    left: float
    window: float | None = None
    ends: float | None = None


class Remaining(NamedTuple):
    """What a reply says that is left. ``left``: when its request left; ``mark``: how much had been
    reserved by then, by all processes, its own part included. ``refused``: it was a refusal."""

    left: float
    mark: float
    amount: float
    remaining: float
    refused: bool = False


@dataclass(kw_only=True, slots=True)
class RateBucket:
    """``level``: what is there at the time ``at``, without all that was ever reserved: below zero
    is what has its time in the future. ``granted``: the sum of what was reserved.

    ``kind``: requests or tokens, of the server (``named``: its limit per minute; None: not known,
    and found by trial), or a rate that was set, which may be one of texts too.
    """

    kind: str
    rate: float
    size: float
    level: float
    at: float
    named: float | None = None
    granted: float = 0.0
    window: float | None = None
    ends: float | None = None

    @property
    def is_set(self) -> bool:
        return self.kind not in _SPARE

    @property
    def is_trial(self) -> bool:
        return self.named is None and not self.is_set

    @property
    def is_sensible(self) -> bool:
        """Nothing in it is divided by zero, or never comes."""
        return self.rate > 0 and self.size > 0 and (self.window is None or self.window > 0)

    @property
    def counts_tokens(self) -> bool:
        return self.kind.startswith(TOKENS)

    @property
    def is_free(self) -> bool:
        """So much was taken without a word of a limit that it need not be shared."""
        most = _FREE_TOKENS if self.counts_tokens else _FREE_REQUESTS
        return self.is_trial and self.size >= most

    @property
    def per_minute(self) -> float:
        return self.rate * _MINUTE

    def facts(self, now: float) -> Facts:
        """What a limiter that knows nothing may start from. Not of a trial."""
        self.advance(now)
        return Facts(
            named=self.named or self.per_minute,
            rate=self.rate,
            size=self.size,
            left=self.level,
            window=self.window,
            ends=self.ends,
        )

    def advance(self, now: float) -> None:
        passed = now - self.at
        if passed <= 0:
            # Far ahead: it is of another start of a machine that does not tell them apart.
            self.at = now if passed < -_MINUTE else self.at
            return
        self.at = now
        if self.window is not None and self.ends is not None:
            self.ends = min(self.ends, now + self.window)
            if now >= self.ends:
                over = math.floor((now - self.ends) / self.window) + 1
                self.level = min(self.level + over * self.size, self.size)
                self.ends += over * self.window
            return
        if self.is_trial and passed >= _TRIAL_FORGOTTEN:
            self.level = self.size = TRIAL_TOKENS if self.counts_tokens else TRIAL_REQUESTS
        self.level = min(self.level + self.rate * passed, self.size)

    def due(self, now: float, amount: float) -> float:
        """When so much may leave, if it is reserved now."""
        self.advance(now)
        missing = self._needed(amount) - self.level
        if missing <= 1e-9:
            return now
        if self.window is not None and self.ends is not None:
            return self.ends + (math.ceil(missing / self.size) - 1) * self.window + _EARLY
        # Another process may have looked at the clock later, and been first.
        return max(now, self.at) + missing / self.rate

    def take(self, amount: float) -> float:
        """Reserve it. Returns how much was reserved by now, this included."""
        # What never fits leaves when the bucket is full, and empties it.
        self.level -= amount if self.is_set else min(amount, 2 * self.size)
        self.granted += amount
        return self.granted

    def correct(self, now: float, seen: Remaining) -> None:
        """What a server says is right in the end: others may send there, and not all that was
        reserved is sent. Only by and by, since it is not known what it had counted."""
        if self.named is None or seen.mark > self.granted:
            return
        self.advance(now)
        filled = seen.remaining
        if self.window is None:
            filled = min(filled + self.rate * max(now - seen.left, 0.0), self.size)
        elif self.ends is not None and seen.left < self.ends - self.window:
            return
        off = filled - (self.granted - seen.mark) - self.level
        gain = _GAIN_UP if off > 0 else 1.0 if seen.refused else _GAIN_DOWN
        self.level += off * gain
        self.level = min(self.level, self.size)

    def learn(self, now: float, facts: Facts, seen: Remaining | None) -> None:
        """The server named its limit."""
        self.advance(now)
        if facts.named == self.named:
            self.size, self.rate = max(self.size, facts.size), facts.rate
        else:
            # Of a salvo it is not known what was counted before: as if all others came too late.
            flying = max(self.size - self.level, 0.0) if self.is_trial else 0.0
            if seen is None:
                self.level = facts.left - flying
            else:
                self.level = seen.remaining - max(flying - seen.amount, 0.0)
            self.size, self.rate, self.named = facts.size, facts.rate, facts.named
        self.window, self.ends = facts.window, facts.ends
        self.level = min(self.level, self.size)

    def answered(self, amount: float, *, grows: bool) -> None:
        """Without a word of limits: it is no longer under way, and as much again may be."""
        if self.is_trial:
            self.size += amount if grows else 0.0
            self.level = min(self.level + (2 * amount if grows else amount), self.size)

    def _needed(self, amount: float) -> float:
        if self.is_set:
            # It is never held back for its own size: it delays what comes after it.
            return 0.0
        spare = 0.0
        if not self.is_trial and self.window is None:
            spare = min(amount * _SPARE[self.kind] + self.rate * _EARLY, self.size * _MOST_SPARED)
        return min(amount + spare, self.size)


def trial(kind: str, now: float, *, granted: float = 0.0) -> RateBucket:
    """For a server that has not yet named a limit, or does so no longer."""
    size = TRIAL_TOKENS if kind == TOKENS else TRIAL_REQUESTS
    rate = size * _TRIAL_PER_SECOND
    return RateBucket(kind=kind, rate=rate, size=size, level=size, at=now, granted=granted)


def set_rate(kind: str, now: float, *, is_full: bool) -> RateBucket:
    """For a rate that a caller set: ``kind`` is one of ``kind_set``."""
    rate = int(kind.rpartition(":")[2]) / _MINUTE
    size = rate * _CONFIGURED_SECONDS
    return RateBucket(kind=kind, rate=rate, size=size, level=size if is_full else 0.0, at=now)


def kind_set(kind: str, per_minute: int) -> str:
    """The kind of the bucket for a rate that a caller set."""
    return f"{kind}:{per_minute}"
