"""The provider is found by its entry point, and costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from embedcore.errors import ConfigurationError
from embedcore.provider import registry
from embedcore.testing import FakeOpenAI

PROBE = """
import sys
from embedcore.provider import registry
embedder = registry.create("openai", "text-embedding-3-small", {})
assert embedder.info.dimensions == 1536
assert embedder.tokenizer.exact
heavy = {"openai", "httpx", "httpx2", "urllib3", "tiktoken", "numpy", "orjson", "regex"}
heavy |= {"http.client", "ssl"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""


def test_building_an_embedder_loads_no_sdk_no_tokenizer_and_no_numpy() -> None:
    subprocess.run([sys.executable, "-c", PROBE], check=True, timeout=60)


VECTORS = """
import sys
from embedcore.provider import registry
from embedcore.provider.types import EmbedRequest
options = {"base_url": sys.argv[1], "api_key": "k"}
embedder = registry.create("openai", "text-embedding-3-small", options)
assert embedder.embed(EmbedRequest(texts=["a"])).vectors.shape == (1, 1536)
heavy = {"openai", "httpx", "httpx2"} & set(sys.modules)
assert not heavy, heavy
embedder.close()
"""


def test_vectors_need_no_sdk() -> None:
    with FakeOpenAI(api_key="k") as server:
        program = [sys.executable, "-c", VECTORS, server.base_url]
        subprocess.run(program, check=True, timeout=60)


def test_the_registry_finds_it() -> None:
    provider = registry.load("openai")
    assert provider.name == "openai"
    assert provider.default_model == "text-embedding-3-small"
    assert set(provider.models) == {
        "text-embedding-3-small",
        "text-embedding-3-large",
        "text-embedding-ada-002",
    }


@pytest.mark.fault(129)
def test_an_unknown_option_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigurationError, match="dimension: unknown key; did you mean 'dimens"):
        registry.create("openai", "text-embedding-3-small", {"dimension": 256})


@pytest.mark.fault(133)
def test_a_refused_address_comes_through_as_it_is() -> None:
    with pytest.raises(ConfigurationError, match="allow_plaintext"):
        registry.create("openai", "m", {"base_url": "http://api.example.com/v1"})
