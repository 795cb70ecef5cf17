"""Ollama's provider: what it asks for, what it reads, and what each refusal means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from embedcore_ollama.plugin import MODELS, OllamaEmbedder, OllamaOptions, embedcore_provider
from fake_ollama import FakeOllama

from embedcore import EmbeddingClient, errors
from embedcore.provider import refusals, replies
from embedcore.provider.options import options_fingerprint
from embedcore.provider.types import EmbedRequest
from embedcore.testing import ProviderContract
from embedcore.testing.service import Refused, ServiceContract

KEY = "ollama-CANARY0123456789abcdef"
# What others recorded and specified, beside the repository.
VENDORS = Path(__file__).parents[4] / "shared" / "fixtures" / "vendors"


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as fake:
        yield fake


def embedder(server: Any, model: str = "all-minilm", **options: Any) -> OllamaEmbedder:
    return OllamaEmbedder(model, OllamaOptions(base_url=server.url, **options))


class Contract(ServiceContract):
    secret = KEY
    model = "all-minilm"
    options: ClassVar[dict[str, Any]] = {"api_key": KEY}
    examples = 10

    def embedder_of(self, server: FakeOllama) -> OllamaEmbedder:
        return embedder(server, self.model, **self.options)


class TestPlain(Contract):
    # This model wants nothing before a text.
    option_values: ClassVar = {"prefixes": None}


class TestWithPrefixes(Contract):
    model = "nomic-embed-text"


class TestOllamaProvider(ProviderContract):
    provider = "ollama"


def test_the_example_of_the_specification_is_read() -> None:
    file = VENDORS / "specs" / "ollama.openapi.json"
    if not file.is_file():
        pytest.skip("the specification is not beside the repository")
    document = json.loads(file.read_text(encoding="utf-8"))
    answers = document["paths"]["/api/embed"]["post"]["responses"]
    example = answers["200"]["content"]["application/json"]["example"]
    asked = refusals.Asked(model="embeddinggemma", endpoint="http://localhost", texts=["a"])
    raw = json.dumps(example).encode()
    reply = replies.read(200, {}, raw, asked, form=OllamaEmbedder.form)
    assert (reply.vectors == np.array(example["embeddings"], dtype=np.float32)).all()
    assert (reply.tokens, reply.model) == (8, "embeddinggemma")


def test_the_old_endpoint_is_not_used(server: FakeOllama) -> None:
    """Its vectors were recorded with length 143."""
    embedder(server).embed(EmbedRequest(texts=["a"]))
    assert server.paths == ["/api/embed"]
    assert server.seen == [{"model": "all-minilm", "input": ["a"], "truncate": False}]


def test_what_a_model_was_trained_with_stands_before_each_text(server: FakeOllama) -> None:
    one = embedder(server, "nomic-embed-text")
    for kind in (None, *one.info.input_types):
        one.embed(EmbedRequest(texts=["a", "b"], input_type=kind))
    assert [asked["input"] for asked in server.seen] == [
        ["search_document: a", "search_document: b"],
        ["search_query: a", "search_query: b"],
        ["search_document: a", "search_document: b"],
        ["classification: a", "classification: b"],
        ["clustering: a", "clustering: b"],
    ]
    plain = embedder(server, "nomic-embed-text", prefixes=False)
    plain.embed(EmbedRequest(texts=["a"]))
    assert server.seen[-1]["input"] == ["a"]
    assert plain.info.input_types == ()


def test_with_and_without_prefixes_are_two_sets_of_vectors() -> None:
    names = {
        options_fingerprint("ollama", model, options, OllamaEmbedder(model, options).info)
        for model in ("nomic-embed-text", "all-minilm")
        for options in (OllamaOptions(), OllamaOptions(prefixes=False))
    }
    assert len(names) == 4


def test_a_model_by_another_tag_is_the_same_model(server: FakeOllama) -> None:
    info = embedder(server, "hf.co/nomic-ai/nomic-embed-text-v1.5-GGUF:Q8_0").info
    assert info.input_types == ("query", "document", "classification", "clustering")
    latest = embedder(server, "all-minilm:latest").embed(EmbedRequest(texts=["a"]))
    assert latest.model == "all-minilm:latest"
    assert "all-minilm:latest" in embedder(server).info.reply_models


def test_a_width_is_sent_only_where_it_is_not_the_models_own(server: FakeOllama) -> None:
    for width in (None, 384, 100):
        reply = embedder(server, dimensions=width).embed(EmbedRequest(texts=["a"]))
        assert reply.vectors.shape == (1, width or 384)
        assert np.linalg.norm(reply.vectors) == pytest.approx(1, abs=1e-6)
    assert [asked.get("dimensions") for asked in server.seen] == [None, None, 100]
    with pytest.raises(errors.ConfigurationError, match="1 to 384"):
        embedder(server, dimensions=385)


def test_a_text_that_is_too_long_is_refused_and_then_cut_by_us(
    server: FakeOllama, tmp_path: Path
) -> None:
    for model, long in (("all-minilm", "word " * 600), ("nomic-embed-text", "word " * 3_000)):
        with pytest.raises(errors.InputTooLong) as caught:
            embedder(server, model).embed(EmbedRequest(texts=[long]))
        assert caught.value.billed == "no"
        with EmbeddingClient(
            f"ollama:{model}", options={"base_url": server.url}, config={"home": tmp_path / model}
        ) as client:
            result = client.embed(["short", long, "word " * 200])
        assert result.ok.all()
        assert [row.cut for row in result.outcomes] == ["no", "yes", "no"]


def test_a_program_embeds_without_money(server: FakeOllama, tmp_path: Path) -> None:
    config = {"home": tmp_path, "cache": True, "budget": {"daily_cost_limit": 0}}
    with EmbeddingClient(
        "ollama:nomic-embed-text", options={"base_url": server.url}, config=config
    ) as client:
        result = client.embed([f"text {number}" for number in range(100)])
        assert result.usage.cost == 0
        assert result.usage.tokens == server.meter.billed_tokens
        assert client.embed_query("text 1") != client.embed_documents(["text 1"])[0]
        assert client.embed(["text 1"], input_type="document").reused.all()
    assert max(len(asked["input"]) for asked in server.seen) <= 64


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (404, 'model "x" not found, try pulling it first', errors.ModelNotFound),
        (400, "the input length exceeds the context length", errors.InputTooLong),
        (500, "llama runner process has terminated", errors.ProviderUnavailable),
        (503, "server busy, please try again. maximum pending requests exceeded", None),
    ],
)
def test_a_refusal(
    server: FakeOllama, status: int, said: str, kind: type[errors.EmbeddingError] | None
) -> None:
    server.next_refusals = [Refused(status, {"error": said})]
    with pytest.raises(kind or errors.ProviderUnavailable):
        embedder(server).embed(EmbedRequest(texts=["a"]))
    assert server.meter.billed_requests == 0


def test_a_server_on_this_machine_needs_no_key_and_another_does(server: FakeOllama) -> None:
    assert embedder(server).embed(EmbedRequest(texts=["a"])).tokens == 1
    far = OllamaEmbedder("all-minilm", OllamaOptions(base_url="https://ollama.com"))
    with pytest.raises(errors.ConfigurationError, match="OLLAMA_API_KEY"):
        far.embed(EmbedRequest(texts=["a"]))


def test_every_model_has_its_facts() -> None:
    assert embedcore_provider().models == MODELS
    for name, info in MODELS.items():
        made = OllamaEmbedder(name, OllamaOptions()).info
        assert (made.dimensions, made.input_types) == (info.dimensions, info.input_types)
        assert (made.max_input_tokens, made.variant) == (info.max_input_tokens, info.variant)
