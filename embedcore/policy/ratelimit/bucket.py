"""A token bucket, fitted to what a server's headers say is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from embedcore.storage.rate_buckets import Facts

_MINUTE: Final = 60.0
# No real limit is larger; what is cannot be distinguished from nonsense.
_LARGEST: Final = 10**12
_AFTER_OTHERS: Final = 0.01
_ROUNDED: Final = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the headers of a reply say of one thing, and what of ours they may not know yet.

    ``left``: when the reply's request left; ``own``: its amount if it was taken. ``first``: no
    reply to a request that left at about that time was seen before. Of several, the one with the
    least remaining was counted last: ``before`` left in time to be counted in it, ``after`` may
    have come too late.
    """

    left: float
    limit: float | None
    remaining: float | None
    reset: float | None
    own: float
    before: float
    after: float
    first: bool


class Bucket:
    """What the server has left of one thing, between what its headers say.

    A server refills steadily, up to a size that may be far below its limit per minute, or all at
    once at the end of a window; which of both, the size and the rate are inferred. What other
    processes take shows as less being left than expected, and lowers the refill that is counted
    on. Nothing is known, and nothing held back, until a reply names a limit and what remains.
    """

    _others_time: Final = 2.0
    _others_forgotten: Final = 4.0
    # Two requests do not take equally long to get there.
    _early: Final = 0.02

    def __init__(self) -> None:
        self.limit: float | None = None
        self._fastest = 0.0
        self._rate = 0.0
        self._capacity = 0.0
        self._level = 0.0
        self._shadow = 0.0
        self._at = -math.inf
        self._seen_at = self._named_at = -math.inf
        self._others = 0.0
        self._margin = 0.0
        self._lowest = math.inf
        self._lowest_at = 0.0
        self._ends: float | None = None
        self._window = 0.0
        self._votes = 0
        self._voted = (math.inf, math.inf)
        self._groups = 0

    @property
    def known(self) -> bool:
        return self.limit is not None

    def slower_than(self, per_minute: float) -> bool:
        """Whether it was never seen to allow more than that."""
        return self.limit is not None and self._fastest <= per_minute

    @property
    def windowed(self) -> bool:
        """It is believed to fill all at once, not steadily."""
        return self._votes >= 2

    def left_at(self, now: float) -> float:
        self._advance(now)
        return self._level

    @property
    def whole_limit(self) -> int | None:
        return None if self.limit is None else round(self.limit)

    def whole_left(self, now: float) -> int | None:
        """What may leave now, or None if that is not known."""
        return None if self.limit is None else max(int(self.left_at(now)), 0)

    def facts(self, now: float) -> Facts | None:
        """What is known, for other processes; None: nothing."""
        if self.limit is None:
            return None
        self._advance(now)
        window = self._window if self.windowed and self._window > 0 else None
        return Facts(
            named=self.limit,
            rate=self._rate,
            size=max(self._capacity, 1.0),
            left=self._level,
            window=window,
            ends=None if window is None else self._ends,
        )

    def start_from(self, now: float, facts: Facts) -> None:
        """What another process knows, before any reply to this one."""
        self.limit, self._rate, self._capacity = facts.named, facts.rate, facts.size
        self._fastest = facts.rate * _MINUTE
        self._at = self._seen_at = self._named_at = now
        self._level = self._shadow = max(facts.left, -facts.size)
        if facts.window is not None:
            self._window, self._ends, self._votes = facts.window, facts.ends, 2

    def delay(self, now: float, amount: float, ahead: float) -> float:
        """Seconds until ``amount`` should be there, after ``ahead`` was taken by others of ours.

        An amount larger than the bucket waits for a full one, and is not overtaken meanwhile.
        """
        if self.limit is None:
            return 0.0
        self._advance(now)
        margin = 0.0 if self.windowed else self._margin + self._rate * self._early
        needed = amount + ahead + margin
        missing = min(needed, self._capacity) - self._level
        if missing <= 1e-9:
            # Together they never fit: who comes first must have left.
            return _AFTER_OTHERS if ahead and needed > self._capacity else 0.0
        if self.windowed and self._ends is not None:
            return max(self._ends + self._early - now, 0.001)
        return max(missing / self._refill(now), 0.001)

    def leave(self, now: float, amount: float) -> None:
        if self.limit is not None:
            self._advance(now)
            self._take(amount)

    def give_back(self, now: float, amount: float) -> None:
        """That much left, and the server did not take it."""
        if self.limit is not None:
            self._advance(now)
            self._take(-amount)

    def refused(self, step: float) -> None:
        """It was too early by a little: keep a wider distance."""
        self._margin = min(self._margin + step, self._capacity / 2)

    def accepted(self, amount: float) -> None:
        self._margin = max(self._margin - amount / 100, 0.0)

    def forget_if_old(self, now: float) -> None:
        """The server no longer says anything: what it said a minute ago holds no longer."""
        if self.limit is not None and now - self._named_at >= _MINUTE:
            self.limit, self._groups, self._margin, self._votes = None, 0, 0.0, 0

    def too_small(self, amount: float) -> None:
        """A refused amount may be larger than all that was ever seen to be left."""
        if self.limit is not None:
            self._capacity = max(self._capacity, min(amount, self.limit))

    def observe(self, now: float, seen: Seen) -> None:
        """Learn from a reply's headers; what makes no sense in them is passed over."""
        limit, remaining, reset = seen.limit, seen.remaining, seen.reset
        if limit is None or remaining is None or not (0 < limit <= _LARGEST and remaining >= 0):
            return
        remaining = min(remaining, limit)
        reset = reset if reset is not None and 0 <= reset < math.inf else None
        self._learn_size(limit, remaining, reset, seen.own)
        if reset is not None:
            self._vote(remaining, reset)
        self._named_at = now
        if self._groups and seen.first:
            self._advance(now)
            self._notice_others(now)
            self._shadow = self._level
        if seen.first or not self._groups:
            self._groups += 1
            self._seen_at = now
        if not self._choose(now, seen, remaining, reset):
            return
        level = self._lowest
        if not self.windowed:
            level += self._rate * max(now - self._lowest_at, 0.0)
        self._at = now
        # Full before the others left: what would have come in meanwhile was lost.
        self._level = max(min(level, self._capacity) - seen.after, -self._capacity)
        if self._groups == 1:
            self._shadow = self._level
            self._guess_others(seen.before)

    def _learn_size(self, limit: float, remaining: float, reset: float | None, own: float) -> None:
        if limit != self.limit:
            self._capacity, self._others, self._votes, self._window = 0.0, 0.0, 0, 0.0
        self.limit = limit
        self._capacity = min(max(self._capacity, remaining + own), limit)
        by_limit = limit / _MINUTE
        rate = by_limit
        if reset:
            # Full in ``reset`` seconds: from here to the limit at most, to what was seen at least.
            full = min(limit, remaining + by_limit * reset)
            self._capacity = max(self._capacity, full) if reset > 0.05 else self._capacity
            if remaining <= self._capacity * 0.9 and reset > 0.05:
                # What remains was rounded down to a whole one, and the times are rounded too.
                seen = (self._capacity - remaining - 1) / reset
                rate = seen if seen > by_limit * _ROUNDED else by_limit
            if remaining < limit / 2:
                rate = min(rate, (limit - remaining) / reset)
        self._rate = rate
        self._fastest = max(self._fastest, rate * _MINUTE)

    def _choose(self, now: float, seen: Seen, remaining: float, reset: float | None) -> bool:
        """Of replies to requests that left together, believe the one that was counted last.

        False: what it says is of a window that is over.
        """
        newest = seen.first
        if reset is not None:
            ends = seen.left + reset
            self._window = max(self._window, reset)
            if self.windowed:
                if ends + self._early < now:
                    return False
                newest = newest or abs(ends - (self._ends or ends)) > self._window / 4
            # It was counted some time after it left: the latest of these ends is right.
            self._ends = ends if newest else max(self._ends or ends, ends)
        filled = 0.0 if self.windowed else self._rate * (seen.left - self._lowest_at)
        if newest or remaining < self._lowest + filled:
            self._lowest, self._lowest_at = remaining, seen.left
        return True

    def _vote(self, remaining: float, reset: float) -> None:
        """A bucket is full the sooner the more is left in it; a window ends when it ends."""
        more, longer = remaining - self._voted[0], reset - self._voted[1]
        if abs(longer) < 0.02 or remaining == self._voted[0] == 0:
            return
        if self._voted[0] < math.inf:
            self._votes += 1 if more * longer >= 0 else -1
        self._voted = remaining, reset
        self._votes = min(max(self._votes, -4), 4)

    def _notice_others(self, now: float) -> None:
        if self.windowed or self._level >= self._capacity * 0.98:
            return
        surprise = self._level - self._shadow
        passed = max(now - self._seen_at, self._others_time)
        lower = self._others_now(now) - surprise / passed
        self._others = min(max(lower, 0.0), self._rate * 0.95)

    def _guess_others(self, ours: float) -> None:
        """At first: those who took the rest of what is missing go on in the same proportion."""
        missing = self._capacity - self._lowest
        if missing > 0:
            self._others = self._rate * min(max(1.0 - ours / missing, 0.0), 0.9)

    def _others_now(self, now: float) -> float:
        return self._others * math.exp(-max(now - self._seen_at, 0.0) / self._others_forgotten)

    def _refill(self, now: float) -> float:
        return max(self._rate - self._others_now(now), self._rate * 0.05)

    def _advance(self, now: float) -> None:
        passed = now - self._at
        if passed <= 0:
            return
        self._at = now
        if self.windowed:
            ended = now - self._early - (math.inf if self._ends is None else self._ends)
            if ended >= 0 and self._ends is not None:
                self._level = self._shadow = self._lowest = self._capacity
                window = max(self._window, self._early)
                self._ends += window * (math.floor(ended / window) + 1)
            return
        filled = self._refill(now) * passed
        self._level = min(self._level + filled, self._capacity)
        self._shadow = min(self._shadow + filled, self._capacity)

    def _take(self, amount: float) -> None:
        self._level = max(self._level - amount, -self._capacity)
        self._shadow = max(self._shadow - amount, -self._capacity)
