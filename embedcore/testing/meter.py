"""The meter of a fake: what it really billed, to compare a ledger with."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Meter:
    """Counts what a fake billed, whatever it answered. Callable from several threads.

    - ``requests``: all that arrived; each is either billed or rejected.
    - ``billed_requests``, ``billed_tokens``: what the customer pays.
    - ``rejected_requests``: what cost nothing.
    - ``billed_texts``: text → how often it was billed.
    - ``in_flight``, ``max_in_flight``: requests at once, now and at the most.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._billed_texts: Counter[str] = Counter()
        self.billed_requests = 0
        self.billed_tokens = 0
        self.rejected_requests = 0
        self.in_flight = 0
        self.max_in_flight = 0

    @property
    def requests(self) -> int:
        with self._lock:
            return self.billed_requests + self.rejected_requests

    @property
    def billed_texts(self) -> Counter[str]:
        """A copy: text → how often it was billed."""
        with self._lock:
            return Counter(self._billed_texts)

    @property
    def billed_twice(self) -> dict[str, int]:
        """Texts billed more than once, and how often. Empty is what "never pay twice" means."""
        return {text: times for text, times in self.billed_texts.items() if times > 1}

    def bill(self, texts: Sequence[str], tokens: int) -> None:
        with self._lock:
            self.billed_requests += 1
            self.billed_tokens += tokens
            self._billed_texts.update(texts)

    def reject(self) -> None:
        with self._lock:
            self.rejected_requests += 1

    @contextmanager
    def one_request(self) -> Iterator[None]:
        """Counts one request as in flight while the block runs."""
        with self._lock:
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1

    def snapshot(self) -> dict[str, int]:
        """All figures at one moment, for another process."""
        with self._lock:
            return {
                "requests": self.billed_requests + self.rejected_requests,
                "billed_requests": self.billed_requests,
                "billed_tokens": self.billed_tokens,
                "rejected_requests": self.rejected_requests,
                "billed_texts": self._billed_texts.total(),
                "distinct_texts": len(self._billed_texts),
                "max_in_flight": self.max_in_flight,
            }
