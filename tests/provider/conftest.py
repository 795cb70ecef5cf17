"""What the tests of replies and refusals share: recordings, and the table of cases."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
