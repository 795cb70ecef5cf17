"""Gemini's provider: what it asks for, what it reads, and what each refusal means."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from embedcore_gemini.plugin import MODELS, GeminiEmbedder, GeminiOptions, embedcore_provider
from fake_gemini import FakeGemini, refused

from embedcore import EmbeddingClient, errors
from embedcore.provider.options import options_fingerprint
from embedcore.provider.types import EmbedRequest
from embedcore.testing import FakeClock, ProviderContract
from embedcore.testing.service import Recorded, Refused, ServiceContract, TextQuota

KEY = "AIza-CANARY0123456789abcdefXYZ"
# Replies of the real service that others recorded, beside the repository.
RECORDINGS = Path(__file__).parents[4] / "shared" / "fixtures" / "vendors"
ONE, TWO = "gemini-embedding-001", "gemini-embedding-2"


@pytest.fixture
def server() -> Iterator[FakeGemini]:
    with FakeGemini(key=KEY) as fake:
        yield fake


def embedder(server: Any, model: str = ONE, **options: Any) -> GeminiEmbedder:
    options = {"base_url": f"{server.url}/v1beta", "api_key": KEY, **options}
    return GeminiEmbedder(model, GeminiOptions(**options))


class Contract(ServiceContract):
    secret = KEY
    model = ONE
    examples = 5
    options: ClassVar[dict[str, Any]] = {"dimensions": 64}

    def embedder_of(self, server: FakeGemini) -> GeminiEmbedder:
        return embedder(server, self.model, **self.options)


class TestOne(Contract):
    pass


class TestTwo(Contract):
    model = TWO
    # Its vectors have length 1 at every width.
    option_values: ClassVar = {"normalize": None}


class TestGeminiProvider(ProviderContract):
    provider = "gemini"


@pytest.mark.parametrize(
    "name",
    [
        "pydantic_ai.google_documents",
        "pydantic_ai.google_embed_error",
        "pydantic_ai.google_query_with_dimensions",
        "pydantic_ai.google_query_with_task_type",
        "pydantic_ai.google_task_prefix_asymmetric-document-with-title",
        "pydantic_ai.google_task_prefix_asymmetric-query",
        "pydantic_ai.google_task_prefix_task-type-ignored-on-embedding-2",
        "ruby_llm.embedding_multimodal_embeddings_gemini_gemini-embedding-2_embeds_text_with_custom_dimensions",
        "ruby_llm.gemini_gemini-embedding-001_can_handle_a_single_text",
        "ruby_llm.gemini_gemini-embedding-001_can_handle_multiple_texts_with_custom_dimensions",
    ],
)
def test_a_recording(name: str) -> None:
    with Recorded(RECORDINGS / f"{name}.json") as real:
        told = real.question["requests"]
        texts = [entry["content"]["parts"][0]["text"] for entry in told]
        model = told[0]["model"].removeprefix("models/")
        width = told[0].get("outputDimensionality")
        asker = embedder(real, model, dimensions=width)
        if real.status != 200:
            with pytest.raises(errors.ModelNotFound, match="nonexistent-model") as caught:
                asker.embed(EmbedRequest(texts=texts))
            assert caught.value.billed == "no"
        else:
            reply = asker.embed(EmbedRequest(texts=texts))
            rows = np.array([each["values"] for each in real.answer_body["embeddings"]])
            if asker.normalises:
                rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            assert np.allclose(reply.vectors, rows, atol=1e-7)
            if real.is_whole:
                assert np.linalg.norm(reply.vectors, axis=1) == pytest.approx(1, abs=1e-4)
            usage = real.answer_body.get("usageMetadata", {})
            assert reply.tokens == usage.get("promptTokenCount")
    assert real.paths == [f"/v1beta/models/{model}:batchEmbedContents"]
    for asked, entry in zip(real.seen[0]["requests"], told, strict=True):
        words = "title: none | text: " if model.startswith(TWO) else ""
        text = words + entry["content"]["parts"][0]["text"]
        task = {} if words else {"taskType": "RETRIEVAL_DOCUMENT"}
        sent = {name: value for name, value in entry.items() if name != "taskType"}
        assert asked == {**sent, **task, "content": {"parts": [{"text": text}]}}


def test_each_text_has_an_entry_of_its_own(server: FakeGemini) -> None:
    """Of one entry with several parts the service makes a single vector."""
    for model in (ONE, TWO):
        embedder(server, model).embed(EmbedRequest(texts=["a", "b", "c"]))
        entries = server.seen[-1]["requests"]
        assert [len(entry["content"]["parts"]) for entry in entries] == [1, 1, 1]


def test_types_are_tasks_for_the_one_and_words_for_the_other(server: FakeGemini) -> None:
    for model in (ONE, TWO):
        one = embedder(server, model)
        assert one.info.input_types == (
            "query",
            "document",
            "classification",
            "clustering",
            "similarity",
        )
        for kind in (None, *one.info.input_types):
            one.embed(EmbedRequest(texts=["a"], input_type=kind))
    entries = [asked["requests"][0] for asked in server.seen]
    assert [entry["taskType"] for entry in entries[:6]] == [
        "RETRIEVAL_DOCUMENT",
        "RETRIEVAL_QUERY",
        "RETRIEVAL_DOCUMENT",
        "CLASSIFICATION",
        "CLUSTERING",
        "SEMANTIC_SIMILARITY",
    ]
    assert [entry["content"]["parts"][0]["text"] for entry in entries[6:]] == [
        "title: none | text: a",
        "task: search result | query: a",
        "title: none | text: a",
        "task: classification | query: a",
        "task: clustering | query: a",
        "task: sentence similarity | query: a",
    ]
    assert not any("taskType" in entry for entry in entries[6:])


@pytest.mark.parametrize("model", [ONE, TWO])
@pytest.mark.parametrize("width", [None, 3072, 768, 8])
def test_every_width_has_vectors_of_length_one(
    server: FakeGemini, model: str, width: int | None
) -> None:
    reply = embedder(server, model, dimensions=width).embed(EmbedRequest(texts=["a", "b"]))
    assert reply.vectors.shape == (2, width or 3072)
    assert np.linalg.norm(reply.vectors, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_length_that_is_left_as_it_is_is_another_set_of_vectors(server: FakeGemini) -> None:
    options = GeminiOptions(dimensions=768, normalize=False)
    raw = embedder(server, dimensions=768, normalize=False).embed(EmbedRequest(texts=["a"]))
    assert np.linalg.norm(raw.vectors) == pytest.approx(0.579, abs=1e-3)
    info = GeminiEmbedder(ONE, options).info
    usual = options_fingerprint("gemini", ONE, GeminiOptions(dimensions=768), info)
    assert options_fingerprint("gemini", ONE, options, info) != usual


def test_a_program_embeds_documents_and_questions(server: FakeGemini, tmp_path: Path) -> None:
    with EmbeddingClient(
        f"gemini:{TWO}",
        options={"base_url": f"{server.url}/v1beta", "api_key": KEY, "dimensions": 64},
        config={"home": tmp_path, "cache": True},
    ) as client:
        texts = [f"text {number}" for number in range(250)]
        result = client.embed(texts)
        assert result.usage.tokens == server.meter.billed_tokens
        assert result.usage.cost == Decimal("0.20") * result.usage.tokens / 1_000_000
        assert client.embed_query("text 1") != client.embed_documents(["text 1"])[0]
        assert client.embed(texts, input_type="document").reused.all()
    assert max(len(asked["requests"]) for asked in server.seen) <= 100


def test_what_may_have_been_cut_is_said(server: FakeGemini, tmp_path: Path) -> None:
    """Whether the service refuses or cuts long texts is not known, so that nothing is promised."""
    with EmbeddingClient(
        f"gemini:{ONE}",
        options={"base_url": f"{server.url}/v1beta", "api_key": KEY, "dimensions": 8},
        config={"home": tmp_path},
    ) as client:
        result = client.embed(["short", "long " * 3_000])
    assert result.perhaps_cut == {1}


def test_a_request_stays_within_four_megabytes(server: FakeGemini, tmp_path: Path) -> None:
    with EmbeddingClient(
        f"gemini:{TWO}",
        options={"base_url": f"{server.url}/v1beta", "api_key": KEY, "dimensions": 8},
        config={"home": tmp_path},
    ) as client:
        assert client.embed([f"{number}" + '"' * 60_000 for number in range(100)]).ok.all()
    assert server.meter.rejected_requests == 0


_RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}


@pytest.mark.parametrize(
    ("refusal", "kind", "wait"),
    [
        (
            refused(400, "API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT"),
            errors.AuthenticationFailed,
            None,
        ),
        (refused(404, "models/x is not found", "NOT_FOUND"), errors.ModelNotFound, None),
        (
            refused(429, "Quota exceeded", "RESOURCE_EXHAUSTED", details=[_RETRY]),
            errors.RateLimited,
            7.0,
        ),
        (
            refused(429, "Please retry in 45.578569677s.", "RESOURCE_EXHAUSTED"),
            errors.RateLimited,
            pytest.approx(45.58, abs=0.01),
        ),
        (
            refused(400, "at most 100 requests can be in one batch", "INVALID_ARGUMENT"),
            errors.RequestTooLarge,
            None,
        ),
        (refused(503, "The model is overloaded.", "UNAVAILABLE"), errors.ProviderUnavailable, None),
    ],
)
def test_a_refusal(
    server: FakeGemini, refusal: Refused, kind: type[errors.EmbeddingError], wait: float | None
) -> None:
    server.next_refusals = [refusal]
    texts = [f"text {number}" for number in range(101)]
    with pytest.raises(kind) as caught:
        embedder(server).embed(EmbedRequest(texts=texts))
    assert getattr(caught.value, "retry_after", None) == wait
    assert caught.value.billed == "no"


def test_without_a_key_nothing_is_sent(server: FakeGemini) -> None:
    with pytest.raises(errors.ConfigurationError, match="GEMINI_API_KEY"):
        GeminiEmbedder(ONE, GeminiOptions()).embed(EmbedRequest(texts=["a"]))
    with pytest.raises(errors.AuthenticationFailed, match="GEMINI_API_KEY"):
        embedder(server, api_key="another").embed(EmbedRequest(texts=["a"]))


def test_every_model_has_its_facts() -> None:
    assert embedcore_provider().models == MODELS
    for name, info in MODELS.items():
        made = GeminiEmbedder(name, GeminiOptions()).info
        assert info.price is not None
        assert (made.input_types, made.variant, made.max_input_tokens) == (
            info.input_types,
            info.variant,
            info.max_input_tokens,
        )


def test_the_free_tier_counts_texts(server: FakeGemini) -> None:
    clock = FakeClock()
    server.quota = TextQuota(100, clock=clock.monotonic)
    one = embedder(server)
    one.embed(EmbedRequest(texts=[f"text {number}" for number in range(100)]))
    with pytest.raises(errors.RateLimited):
        one.embed(EmbedRequest(texts=["one more"]))
    clock.advance(0.6)
    assert len(one.embed(EmbedRequest(texts=["one more"])).vectors) == 1
