"""The contract that every provider keeps, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from embedcore_openai.tokenizer import Cl100kTokenizer

from embedcore.provider.protocol import Embedder
from embedcore.testing import EmbedderContract, FakeOpenAI, ProviderContract
from embedcore.testing.openai.embeddings import FakeModel


class TestOpenAI(EmbedderContract):
    secret = "sk-CANARY7d1f0e5b9a4c48229be3"

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with FakeOpenAI(api_key=self.secret, count=Cl100kTokenizer().count) as self._fake:
            yield

    def make_embedder(self) -> Embedder:
        return create(
            "text-embedding-3-small",
            OpenAIOptions(base_url=self._fake.base_url, api_key=self.secret),
        )

    def make_broken_embedder(self) -> Embedder:
        # The fake repeats the key in its reply, in several spellings.
        self._fake.faults.always("echo_key")
        return self.make_embedder()

    def make_limited_embedder(self) -> Embedder:
        self._fake.faults.always("rate_limited", retry_after=7)
        return self.make_embedder()

    def server_bill(self) -> int:
        return self._fake.meter.billed_tokens

    def server_requests(self) -> int:
        return self._fake.meter.requests


class TestOwnServer(EmbedderContract):
    """A model without a table, shorter vectors, lists of floats; the secret is in a header."""

    secret = "gateway-CANARY-55d0c1e7a2f94b"

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with FakeOpenAI(api_key=None, models={"acme/tiny": FakeModel(dimensions=24)}) as self._fake:
            yield

    def make_embedder(self) -> Embedder:
        return self._embedder(self._fake.base_url)

    def make_broken_embedder(self) -> Embedder:
        return self._embedder("http://127.0.0.1:9/v1")

    def server_bill(self) -> int:
        return self._fake.meter.billed_tokens

    def server_requests(self) -> int:
        return self._fake.meter.requests

    def _embedder(self, base_url: str) -> Embedder:
        headers = {"X-Gateway-Key": self.secret}
        options = OpenAIOptions(base_url=base_url, price=0, encoding="float", headers=headers)
        return create("acme/tiny", options)


class TestOpenAIProvider(ProviderContract):
    provider = "openai"
