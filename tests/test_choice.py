"""Which provider and model does a name mean?"""

from __future__ import annotations

import pytest

from embedcore import EmbeddingClient
from embedcore.provider.types import ModelInfo, Price
from embedcore.testing import FakeEmbedder


def test_a_provider_alone_means_its_own_default_model():
    client = EmbeddingClient(config={"provider": "hashing"})
    assert (client.provider, client.model) == ("hashing", "512")
    named = EmbeddingClient(config={"provider": "hashing", "model": "64"})
    assert (named.provider, named.model) == ("hashing", "64")


def test_a_providers_name_is_its_default_model():
    client = EmbeddingClient("hashing")
    assert (client.provider, client.model) == ("hashing", "512")


class FiveForEach:
    """Bills five units for each character, and says so."""

    exact = True

    def count(self, texts):
        return [5 * len(text) for text in texts]

    def prefix(self, text, max_tokens):
        return text[: max(max_tokens, 0) // 5]


def client_of(limit: int, tokens_per_byte: int) -> tuple[EmbeddingClient, FakeEmbedder]:
    def billed(request, number):
        from embedcore.provider.types import EmbedReply
        from embedcore.testing import vectors_of

        tokens = sum(FiveForEach().count(request.texts))
        return EmbedReply(vectors=vectors_of(request.texts, 8), tokens=tokens)

    info = ModelInfo(
        provider="units",
        model="u1",
        dimensions=8,
        price=Price(),
        tokens_per_byte=tokens_per_byte,
    )
    embedder = FakeEmbedder(info=info, tokenizer=FiveForEach(), script=billed)
    return EmbeddingClient(embedder=embedder, config={"budget": {"daily_token_limit": limit}}), (
        embedder
    )


@pytest.mark.fault(46)
def test_units_smaller_than_bytes_keep_the_budget_when_they_are_declared():
    client, embedder = client_of(50, tokens_per_byte=5)
    with client, pytest.raises(Exception, match="not sent: 75 tokens would be needed"):
        client.embed_text("fifteen letters")
    assert embedder.calls == []


@pytest.mark.fault(46)
def test_where_only_the_bound_was_wrong_the_exact_count_is_held_from_then_on():
    client, _ = client_of(1_000, tokens_per_byte=1)
    with client:
        client.embed_text("fifteen letters")
        for number in range(9, 21):
            client.embed_text(f"{number:>15}")
        with pytest.raises(Exception, match="not sent: 75 tokens would be needed"):
            client.embed_text("fifteen LETTERS")
