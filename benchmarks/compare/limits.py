"""Which requests does the fake server refuse, and what do its headers say about it?

Two buckets that refill steadily, one of tokens and one of requests, as the real limits are. Unless
the limit says ``refused_count``, a refused request takes nothing from either, which is kinder than
OpenAI: there it counts as a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_MINUTE: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Requests and tokens per minute; ``burst_…`` is what a full bucket holds. ``refused_count``: a
    refused request takes one from the bucket of requests, or what is left in it."""

    tokens_per_minute: float = 6_000_000
    burst_tokens: float = 500_000
    requests_per_minute: float = 3_000
    burst_requests: float = 250
    refused_count: bool = False

    def ideal_seconds(self, tokens: int) -> float:
        """How long this many tokens take if the bucket never overflows."""
        return max(0.0, tokens - self.burst_tokens) / self.tokens_per_minute * _MINUTE

    def ideal_seconds_of_requests(self, requests: float) -> float:
        """The same for a number of requests, where the tokens are no limit."""
        return max(0.0, requests - self.burst_requests) / self.requests_per_minute * _MINUTE


class Bucket:
    def __init__(
        self, size: float, per_minute: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_minute = per_minute
        self._size = size
        self._clock = clock
        self._level = size
        self._seen = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._seen) * self.per_minute / _MINUTE)
        self._seen = now
        return self._level

    def wait(self, amount: float) -> float:
        """Seconds until ``amount`` is there; 0 if it is."""
        return max(0.0, amount - self.level) * _MINUTE / self.per_minute

    def take(self, amount: float) -> None:
        self._level = self.level - amount

    @property
    def full_in(self) -> float:
        """Seconds until the bucket is full again."""
        return self.wait(self._size)


class RateLimiter:
    """Grants or refuses whole requests, and writes the headers of both answers."""

    def __init__(self, limit: Limit, clock: Callable[[], float] = time.monotonic) -> None:
        self._refused_count = limit.refused_count
        self._tokens = Bucket(limit.burst_tokens, limit.tokens_per_minute, clock)
        self._requests = Bucket(limit.burst_requests, limit.requests_per_minute, clock)

    def take(self, tokens: int) -> tuple[float, str]:
        """Seconds to wait, 0 if granted, and which of the two buckets says so."""
        wait, scarce = self._wait(tokens)
        if wait > 0:
            if self._refused_count:
                self._requests.take(min(1.0, self._requests.level))
                wait, scarce = self._wait(tokens)
            return wait, scarce
        self._tokens.take(tokens)
        self._requests.take(1)
        return 0.0, scarce

    def _wait(self, tokens: int) -> tuple[float, str]:
        waits = {"tokens": self._tokens.wait(tokens), "requests": self._requests.wait(1)}
        scarce = max(waits, key=lambda kind: waits[kind])
        return waits[scarce], scarce

    def headers(self) -> bytes:
        """The six headers that OpenAI sends with every answer of this endpoint."""
        lines = [
            f"x-ratelimit-{what}-{kind}: {value}\r\n"
            for kind, bucket in (("requests", self._requests), ("tokens", self._tokens))
            for what, value in (
                ("limit", int(bucket.per_minute)),
                ("remaining", int(bucket.level)),
                ("reset", go_duration(bucket.full_in)),
            )
        ]
        return "".join(lines).encode()


def go_duration(seconds: float) -> str:
    """As the ``reset`` headers are written: 12ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(seconds, _MINUTE)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{text}s" if minutes else f"{text}s"
