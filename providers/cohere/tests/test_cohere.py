"""Cohere's provider: what it asks for, what it reads, and what each refusal means."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from embedcore_cohere.plugin import MODELS, CohereEmbedder, CohereOptions, embedcore_provider
from fake_cohere import FakeCohere
from pydantic import ValidationError

from embedcore import EmbeddingClient, errors
from embedcore.provider.types import EmbedRequest
from embedcore.testing import FakeClock, ProviderContract
from embedcore.testing.service import Recorded, Refused, ServiceContract, TextQuota

KEY = "co-CANARY0123456789abcdefXYZ"
# Replies of the real service that others recorded, beside the repository.
RECORDINGS = Path(__file__).parents[4] / "shared" / "fixtures" / "vendors"
WORDS = {word: core for core, word in CohereEmbedder.words.items()}


@pytest.fixture
def server() -> Iterator[FakeCohere]:
    with FakeCohere(key=KEY) as fake:
        yield fake


def embedder(server: Any, model: str = "embed-v4.0", **options: Any) -> CohereEmbedder:
    return CohereEmbedder(model, CohereOptions(base_url=server.url, api_key=KEY, **options))


class Contract(ServiceContract):
    secret = KEY
    model = "embed-v4.0"
    options: ClassVar[dict[str, Any]] = {}
    examples = 10

    def embedder_of(self, server: FakeCohere) -> CohereEmbedder:
        return embedder(server, self.model, **self.options)


class TestV4(Contract):
    options: ClassVar = {"dimensions": 256}


class TestV3(Contract):
    model = "embed-english-v3.0"


class TestCohereProvider(ProviderContract):
    provider = "cohere"


@pytest.mark.parametrize(
    "name",
    [
        "openllmetry.cohere_v2_embed",
        "pydantic_ai.cohere_documents",
        "pydantic_ai.cohere_embed_error",
        "pydantic_ai.cohere_query",
        "pydantic_ai.cohere_query_with_truncate",
        "ruby_llm.cohere_embed-v4_0_can_handle_multiple_texts_with_custom_dimensions",
    ],
)
def test_a_recording(name: str) -> None:
    with Recorded(RECORDINGS / f"{name}.json") as real:
        told = real.question
        asker = embedder(real, told["model"], dimensions=told.get("output_dimension"))
        request = EmbedRequest(texts=told["texts"], input_type=WORDS[told["input_type"]])
        if real.status != 200:
            with pytest.raises(errors.ModelNotFound, match="nonexistent") as caught:
                asker.embed(request)
            assert caught.value.billed == "no"
        else:
            reply = asker.embed(request)
            rows = real.answer_body["embeddings"]["float"]
            assert (reply.vectors == np.array(rows, dtype=np.float32)).all()
            if real.is_whole:
                assert np.linalg.norm(reply.vectors, axis=1) == pytest.approx(1, abs=1e-4)
            assert reply.tokens == real.answer_body["meta"]["billed_units"]["input_tokens"]
        asker.close()
    (asked,) = real.seen
    # Of what the recording left out or has as null, this provider sends what forbids cutting.
    told = {name: value for name, value in told.items() if value is not None}
    told |= {"truncate": "NONE", "embedding_types": ["float"]}
    assert asked == told


def test_the_types_are_those_of_the_service(server: FakeCohere) -> None:
    one = embedder(server)
    for kind in (None, *one.info.input_types):
        one.embed(EmbedRequest(texts=["a"], input_type=kind))
    assert [asked["input_type"] for asked in server.seen] == [
        "search_document",
        "search_query",
        "search_document",
        "classification",
        "clustering",
    ]


def test_a_width_is_sent_only_where_it_is_not_the_models_own(server: FakeCohere) -> None:
    for width in (None, 1536, 512):
        reply = embedder(server, dimensions=width).embed(EmbedRequest(texts=["a"]))
        assert reply.vectors.shape == (1, width or 1536)
    assert [asked.get("output_dimension") for asked in server.seen] == [None, None, 512]


@pytest.mark.parametrize(("model", "width"), [("embed-v4.0", 768), ("embed-english-v3.0", 512)])
def test_a_width_that_the_model_cannot_give_is_refused_at_once(model: str, width: int) -> None:
    with pytest.raises(errors.ConfigurationError, match=rf"dimensions = {width}.*{model}"):
        CohereEmbedder(model, CohereOptions(dimensions=width))


def test_a_text_that_is_too_long_is_refused_and_then_cut_by_us(
    server: FakeCohere, tmp_path: Path
) -> None:
    long = "word " * 1_000  # 1,250 tokens of the fake, and v3 takes 512
    with pytest.raises(errors.InputTooLong) as caught:
        embedder(server, "embed-english-v3.0").embed(EmbedRequest(texts=[long]))
    assert caught.value.billed == "no"
    with EmbeddingClient(
        "cohere:embed-english-v3.0",
        options={"base_url": server.url, "api_key": KEY},
        config={"home": tmp_path},
    ) as client:
        result = client.embed(["short", long])
    assert result.ok.all()
    assert result.outcomes[1].cut == "yes"
    assert result.perhaps_cut == frozenset()


def test_a_program_embeds_documents_and_questions(server: FakeCohere, tmp_path: Path) -> None:
    options = {"base_url": server.url, "api_key": KEY}
    config = {"home": tmp_path, "cache": True}
    with EmbeddingClient("cohere:embed-v4.0", options=options, config=config) as client:
        texts = [f"text {number}" for number in range(200)]
        result = client.embed(texts)
        assert result.usage.tokens == server.meter.billed_tokens
        assert result.usage.cost == Decimal("0.12") * result.usage.tokens / 1_000_000
        assert client.embed_query("text 1") != client.embed_documents(["text 1"])[0]
        assert client.embed(texts, input_type="document").reused.all()
    assert {len(asked["texts"]) for asked in server.seen} <= set(range(1, 97))
    assert server.meter.billed_texts["text 2"] == 1


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (401, "invalid api token", errors.AuthenticationFailed),
        (402, "Please add or update your payment method", errors.QuotaExhausted),
        (404, "model 'xyz' not found", errors.ModelNotFound),
        (422, "unprocessable", errors.RequestRejected),
        (429, "You are using a Trial key, which is limited to 100 calls", errors.RateLimited),
        (498, "blocked", errors.RequestRejected),
        (499, "request cancelled", errors.OutcomeUnknown),
        (503, "overloaded", errors.ProviderUnavailable),
    ],
)
def test_a_refusal(
    server: FakeCohere, status: int, message: str, kind: type[errors.ProviderError]
) -> None:
    server.next_refusals = [Refused(status, {"id": "0", "message": message})]
    with pytest.raises(kind, match=message.replace("(", r"\(")) as caught:
        embedder(server).embed(EmbedRequest(texts=["a"]))
    assert caught.value.status == status
    assert server.meter.billed_requests == 0


def test_the_key_is_asked_for_and_nothing_is_sent_without_one(server: FakeCohere) -> None:
    keys = iter(["wrong", KEY])
    one = CohereEmbedder(
        "embed-v4.0", CohereOptions(base_url=server.url, api_key=lambda: next(keys))
    )
    with pytest.raises(errors.AuthenticationFailed, match="CO_API_KEY") as caught:
        one.embed(EmbedRequest(texts=["a"]))
    assert caught.value.again == "key"
    assert one.embed(EmbedRequest(texts=["a"])).tokens == 1
    with pytest.raises(errors.ConfigurationError, match="CO_API_KEY"):
        CohereEmbedder("embed-v4.0", CohereOptions()).embed(EmbedRequest(texts=["a"]))


def test_options_are_strict_and_pickle_without_the_key() -> None:
    options = CohereOptions(api_key=KEY, dimensions=256)
    assert KEY.encode() not in pickle.dumps(options)
    assert pickle.loads(pickle.dumps(options)).dimensions == 256
    assert KEY not in repr(options)
    with pytest.raises(ValidationError):
        CohereOptions(output_dimension=256)
    with pytest.raises(errors.ConfigurationError, match="allow_plaintext"):
        CohereOptions(base_url="http://api.cohere.com")


def test_the_service_counts_texts_and_so_does_the_client(
    server: FakeCohere, tmp_path: Path
) -> None:
    clock = FakeClock()
    server.quota = TextQuota(100, clock=clock.monotonic)
    one, texts = embedder(server), [f"text {number}" for number in range(96)]
    one.embed(EmbedRequest(texts=texts))
    with pytest.raises(errors.RateLimited) as caught:
        one.embed(EmbedRequest(texts=texts[:5]))
    assert caught.value.billed == "no"
    one.embed(EmbedRequest(texts=texts[:4]))
    clock.advance(60)
    assert len(one.embed(EmbedRequest(texts=texts)).vectors) == 96
    assert one.info.texts_per_minute == 2_000
    options = {"base_url": server.url, "api_key": KEY}
    for own, expected in ((None, 2_000), (10_000, 10_000)):
        config = {"home": tmp_path, "texts_per_minute": own}
        with EmbeddingClient("cohere:embed-v4.0", options=options, config=config) as client:
            assert client._engine.rates.texts_per_minute == expected


def test_every_model_has_its_facts() -> None:
    assert embedcore_provider().models == MODELS
    for name, info in MODELS.items():
        assert info.dimensions
        assert info.max_input_tokens
        assert info.price is not None
        assert info.price.as_of is not None
        assert CohereEmbedder(name, CohereOptions()).info.endpoint == "https://api.cohere.com"
    own = CohereEmbedder("a-new-model", CohereOptions(dimensions=99, price=1)).info
    assert (own.dimensions, own.price.immediate if own.price else None) == (99, 1)
