"""What the tests of the adapters share: an OpenAI on a local port, found by the environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embedcore.testing import FakeOpenAI


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, canary: str) -> Iterator[FakeOpenAI]:
    with FakeOpenAI(api_key=canary) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", canary)
        yield server
