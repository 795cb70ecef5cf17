"""The pytest plugin: fixtures for who tests a provider, or a program that embeds.

pytest loads this module in every run of an environment that has embedcore, so it imports nothing
but pytest; a fixture imports what it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from embedcore.testing.fakes.embedder import FakeEmbedder
    from embedcore.testing.openai.server import FakeOpenAI


@pytest.fixture
def embedcore_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of state for this test alone: nothing spent, nothing cached, no limit.

    No setting of this machine holds: variables named ``EMBEDCORE_…`` are taken away, and the user's
    configuration folder is an empty one. ``embedcore.toml`` beside the folder is the settings file,
    empty, and may be written to before a client is made.
    """
    for name in [name for name in os.environ if name.startswith("EMBEDCORE_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "embedcore"
    home, settings, policy = folder / "home", folder / "embedcore.toml", folder / "policy.toml"
    home.mkdir(parents=True)
    settings.touch()
    policy.touch()
    monkeypatch.setenv("EMBEDCORE_HOME", str(home))
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(settings))
    monkeypatch.setenv("EMBEDCORE_POLICY", str(policy))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    _forget_defaults()
    yield home
    _forget_defaults()


def _forget_defaults() -> None:
    """The functions of ``embedcore`` share one client, which has its settings from elsewhere."""
    import sys

    functions = sys.modules.get("embedcore.functions")
    for name in ("default_client", "default_tracker"):
        made = getattr(functions, name, None)
        if made is None or not made.cache_info().currsize:
            continue
        shared = made()
        if name == "default_client":
            shared.close()
        made.cache_clear()


@pytest.fixture
def fake_embedder(embedcore_home: Path) -> FakeEmbedder:  # noqa: ARG001
    """A model in this process, for ``EmbeddingClient(embedder=fake_embedder)``.

    A vector is a function of its text (``embedcore.testing.vector_of``), ``calls`` has the requests
    that were made, and ``meter`` the bill.
    """
    from embedcore.testing.fakes.embedder import FakeEmbedder

    return FakeEmbedder()


@pytest.fixture
def fake_openai(embedcore_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:  # noqa: ARG001
    """A server with OpenAI's API on a local port, to which every client of OpenAI's goes:
    ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY`` name it. It needs the package embedcore-openai.
    """
    from embedcore.testing.openai.server import FakeOpenAI

    with FakeOpenAI() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", server.api_key or "")
        for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            monkeypatch.delenv(name, raising=False)
        yield server
