"""What the tests of replies and refusals share: recordings, and the table of cases."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedcore.provider import http, http_bodies, http_connections

# For `wires`, the server of the tests of the HTTP session.
if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"


@pytest.fixture
def recordings() -> Callable[[str], list[Any]]:
    """Exchanges with real servers that others recorded; skips where they are absent."""

    def load(name: str) -> list[Any]:
        path = FIXTURES / name
        if not path.is_file():
            pytest.skip(f"recording {name} is not beside the repository")
        document = json.loads(path.read_text(encoding="utf-8"))
        found: list[Any] = document.get("interactions") or document["items"]
        return found

    return load


class HeldClock:
    """Stands still until ``go``: what comes before takes no time, however slow the machine is."""

    def __init__(self) -> None:
        self._zero: float | None = None

    def go(self) -> None:
        if self._zero is None:
            self._zero = time.monotonic()

    def monotonic(self) -> float:
        return 0.0 if self._zero is None else time.monotonic() - self._zero


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HeldClock:
    """The clock of HTTP sessions."""
    held = HeldClock()
    for module in (http, http_bodies, http_connections):
        monkeypatch.setattr(module, "time", held)
    return held
