"""Waiting for what other threads do, and holding it back, for the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from embedcore.testing import FakeEmbedder
from embedcore.testing.fakes.embedder import FAKE_INFO

# For what takes as long as the machine takes, and does happen.
SECONDS = 120.0
# One text in each request.
SINGLE = replace(FAKE_INFO, dimensions=8, max_texts_per_request=1)


def until(true: Callable[[], object], seconds: float = SECONDS) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.002)


class Gated(FakeEmbedder):
    """Holds requests with the word in them back until it is let go, then does as scripted."""

    def __init__(self, word: str = "GATE", **options: Any) -> None:
        super().__init__(info=options.pop("info", SINGLE), **options)
        self.word, self.go, self.inside = word, threading.Event(), threading.Event()

    def embed(self, request: Any) -> Any:
        if any(self.word in text for text in request.texts):
            self.inside.set()
            assert self.go.wait(SECONDS)
        return super().embed(request)
