"""What the tests of a plugin author import.

``EmbedderContract``, ``BatchContract``, ``ProviderContract``: the tests every provider inherits.
``FakeEmbedder``: a provider in this process. ``FakeOpenAI``: an OpenAI server on a local port.
``vector_of``: the vector both give a text. Importing this package loads neither pytest nor
hypothesis nor numpy; using a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedcore.testing.contract import (
        BatchContract as BatchContract,
        EmbedderContract as EmbedderContract,
        ProviderContract as ProviderContract,
    )
    from embedcore.testing.fakes.embedder import (
        FakeClock as FakeClock,
        FakeEmbedder as FakeEmbedder,
        FakeTokenizer as FakeTokenizer,
    )
    from embedcore.testing.openai.server import FakeOpenAI as FakeOpenAI
    from embedcore.testing.vectors import (
        openai_tokens as openai_tokens,
        tokens_of as tokens_of,
        vector_of as vector_of,
        vectors_of as vectors_of,
    )

_HOMES = {
    "BatchContract": "contract",
    "EmbedderContract": "contract",
    "FakeClock": "fakes.embedder",
    "FakeEmbedder": "fakes.embedder",
    "FakeOpenAI": "openai.server",
    "FakeTokenizer": "fakes.embedder",
    "ProviderContract": "contract",
    "openai_tokens": "vectors",
    "tokens_of": "vectors",
    "vector_of": "vectors",
    "vectors_of": "vectors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
