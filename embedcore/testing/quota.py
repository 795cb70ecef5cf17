"""What do the fake's rate-limit headers say, and when does it answer 429 by itself?"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MINUTE = 60.0


def go_duration(seconds: float) -> str:
    """As the ``x-ratelimit-reset-*`` headers are written: 12ms, 1s, 6m0s, 23m16.298s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(seconds, _MINUTE)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{text}s" if minutes else f"{text}s"


class Quota:
    """Requests and tokens per minute, refilled steadily, as the real limits are.

    With ``enforced=False`` the headers count down and nothing is ever refused.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int = 5000,
        tokens_per_minute: int = 1_000_000,
        enforced: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size = {"requests": float(requests_per_minute), "tokens": float(tokens_per_minute)}
        self._left = dict(self._size)
        self._enforced = enforced
        self._clock = clock
        self._seen = clock()
        self._lock = threading.Lock()

    def take(self, tokens: int) -> tuple[float, str]:
        """Use one request and ``tokens``: seconds to wait (0: granted), and for which of both."""
        with self._lock:
            self._refill()
            asked = {"requests": 1.0, "tokens": float(tokens)}
            waits = {
                kind: max(0.0, amount - self._left[kind]) / self._size[kind] * _MINUTE
                for kind, amount in asked.items()
            }
            kind = max(waits, key=lambda name: waits[name])
            if self._enforced and waits[kind] > 0:
                return waits[kind], kind
            for name, amount in asked.items():
                self._left[name] = max(0.0, self._left[name] - amount)
            return 0.0, kind

    def headers(self) -> dict[str, str]:
        with self._lock:
            self._refill()
            headers = {}
            for kind, size in self._size.items():
                left = self._left[kind]
                headers[f"x-ratelimit-limit-{kind}"] = str(int(size))
                headers[f"x-ratelimit-remaining-{kind}"] = str(int(left))
                reset = (size - left) / size * _MINUTE
                headers[f"x-ratelimit-reset-{kind}"] = go_duration(reset)
            return headers

    def limit(self, kind: str) -> int:
        return int(self._size[kind])

    def _refill(self) -> None:
        now = self._clock()
        passed, self._seen = now - self._seen, now
        for kind, size in self._size.items():
            self._left[kind] = min(size, self._left[kind] + size * passed / _MINUTE)
