"""The client itself has the shape that files are embedded with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcore import EmbeddingClient
from embedcore.errors import ProviderUnavailable
from embedcore.files.run import embed_files, plan_files
from embedcore.files.search import search
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price


class Embedder(BaseEmbedder):
    """Small requests, vectors by the text, and an outage after so many of them."""

    info = ModelInfo(
        provider="fake",
        model="fake",
        dimensions=6,
        max_texts_per_request=3,
        max_input_tokens=20,
        price=Price(),
        local=True,
    )

    def __init__(self, vector: Callable[..., Any]) -> None:
        self.vector = vector
        self.sent: list[str] = []
        self.left = 10**9

    def embed(self, request: EmbedRequest) -> EmbedReply:
        if self.left <= 0:
            raise ProviderUnavailable("down", billed="no")
        self.left -= 1
        self.sent += request.texts
        vectors = np.stack([self.vector(text) for text in request.texts])
        return EmbedReply(vectors=vectors, tokens=len(request.texts), model="fake")


@pytest.fixture
def embedder(vector: Callable[..., Any]) -> Embedder:
    return Embedder(vector)


@pytest.fixture
def real(
    embedder: Embedder, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EmbeddingClient]:
    monkeypatch.setenv("EMBEDCORE_HOME", str(tmp_path_factory.mktemp("home")))
    config = {"retry": {"attempts": 1}}
    with EmbeddingClient(embedder=embedder, config=config) as client:
        yield client


def test_stopped_and_resumed_with_the_real_client(
    output: Path, real: EmbeddingClient, embedder: Embedder, check_rows: Callable[..., None]
) -> None:
    texts = [f"text {i % 25}" for i in range(40)]
    embedder.left = 4
    with pytest.raises(ProviderUnavailable):
        embed_files(real, [iter(texts)], output, block=9)
    billed = len(embedder.sent)
    assert 9 <= billed <= 12
    embedder.left = 10**9
    plan = plan_files(real, [iter(texts)], output, block=9)
    assert (plan.reused, plan.to_embed, plan.duplicates) == (billed, 25 - billed, 15)
    report = embed_files(real, [iter(texts)], output, block=9)
    check_rows(output, texts)
    assert sorted(embedder.sent) == sorted(set(texts))
    assert (report.embedded, report.reused) == (25 - billed, billed)
    assert report.usage.requests == plan.requests
    (hits,) = search(real, ["text 7"], output, limit=2)
    assert [hit.text for hit in hits] == ["text 7", "text 7"]


class Counts(EstimatingTokenizer):
    """Of a model whose tokens are bytes."""

    exact = True


@pytest.mark.case("A9")
def test_texts_that_nobody_counts_go_whole_and_are_reported(
    output: Path, real: EmbeddingClient, embedder: Embedder, load: Any
) -> None:
    plan = plan_files(real, [iter(["x" * 33, "y"])], output)
    assert (plan.truncated, plan.perhaps_long) == (0, 1)
    report = embed_files(real, [iter(["x" * 33, "y"])], output)
    assert sorted(embedder.sent) == ["x" * 33, "y"]
    assert (report.truncated, report.perhaps_cut) == (0, 1)
    assert (report.tokens_cut, report.characters_cut) == (0, 0)
    assert [row["tokens_cut"] for row in load(output)] == [None, 0]


def test_cut_texts_are_reported(
    output: Path, real: EmbeddingClient, embedder: Embedder, load: Any
) -> None:
    embedder.tokenizer = Counts()
    report = embed_files(real, [iter(["x" * 33, "y"])], output)
    assert report.truncated == 1
    assert [row["tokens_cut"] for row in load(output)] == [13, 0]
