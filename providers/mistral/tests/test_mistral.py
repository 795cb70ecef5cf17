"""Mistral's provider: what it asks for, what it reads, and what each refusal means."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedcore_mistral.plugin import MODELS, MistralEmbedder, MistralOptions, embedcore_provider
from fake_mistral import FakeMistral

from embedcore import EmbeddingClient, errors
from embedcore.provider.types import EmbedRequest, RateLimits
from embedcore.testing import ProviderContract
from embedcore.testing.service import Recorded, Refused, ServiceContract

KEY = "mistral-CANARY0123456789abcde"
# Replies of the real service that others recorded, beside the repository.
RECORDINGS = Path(__file__).parents[4] / "shared" / "fixtures" / "vendors"


@pytest.fixture
def server() -> Iterator[FakeMistral]:
    with FakeMistral(key=KEY) as fake:
        yield fake


def embedder(server: Any, model: str = "mistral-embed", **options: Any) -> MistralEmbedder:
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, **options}
    return MistralEmbedder(model, MistralOptions(**options))


class TestMistral(ServiceContract):
    secret = KEY
    examples = 10

    def embedder_of(self, server: FakeMistral) -> MistralEmbedder:
        return embedder(server)


class TestMistralProvider(ProviderContract):
    provider = "mistral"


@pytest.mark.parametrize(
    "name",
    [
        "openllmetry.mistral_embeddings",
        "ruby_llm.mistral_mistral-embed_can_handle_a_single_text",
        "ruby_llm.mistral_mistral-embed_can_handle_multiple_texts",
    ],
)
def test_a_recording(name: str) -> None:
    with Recorded(RECORDINGS / f"{name}.json") as real:
        told = real.question
        texts = [told["input"]] if isinstance(told["input"], str) else told["input"]
        reply = embedder(real, told["model"]).embed(EmbedRequest(texts=texts))
        rows = [each["embedding"] for each in real.answer_body["data"]]
    assert (reply.vectors == np.array(rows, dtype=np.float32)).all()
    assert (reply.tokens, reply.model) == (real.answer_body["usage"]["total_tokens"], told["model"])
    assert reply.limits is not None
    assert reply.limits.limit_requests == 360
    assert reply.request_id is not None
    if real.is_whole:
        assert np.linalg.norm(reply.vectors, axis=1) == pytest.approx(1, abs=1e-3)
    assert real.seen == [{**told, "input": texts}]


def test_what_the_headers_say_is_told(server: FakeMistral) -> None:
    reply = embedder(server).embed(EmbedRequest(texts=["a"]))
    assert reply.limits == RateLimits(limit_requests=360, remaining_requests=354)
    assert reply.request_id == "01a01a71-df7d-7f75-9ff4-414194d0a6c9"


def test_a_width_is_sent_only_where_the_model_has_several(server: FakeMistral) -> None:
    for width in (None, 1536, 3072, 100):
        reply = embedder(server, "codestral-embed", dimensions=width).embed(
            EmbedRequest(texts=["a"])
        )
        assert reply.vectors.shape == (1, width or 1536)
    assert [asked.get("output_dimension") for asked in server.seen] == [None, None, 3072, 100]
    for model, width in (("mistral-embed", 512), ("codestral-embed", 3073)):
        with pytest.raises(errors.ConfigurationError, match=f"dimensions = {width}"):
            embedder(server, model, dimensions=width)


def test_a_program_pays_for_each_text_once(server: FakeMistral, tmp_path: Path) -> None:
    with EmbeddingClient(
        "mistral:mistral-embed",
        options={"base_url": f"{server.url}/v1", "api_key": KEY},
        config={"home": tmp_path, "cache": True},
    ) as client:
        # One that is too long, and so many that a request of them has too many tokens.
        texts = [f"{number} {'日本' * 500}" for number in range(40)] + ["long " * 9_000]
        result = client.embed(texts)
        assert result.ok.all()
        assert result.outcomes[40].cut == "yes"
        assert len(result.cuts) == 1
        assert result.perhaps_cut == frozenset()
        assert result.usage.tokens == server.meter.billed_tokens
        assert result.usage.cost == Decimal("0.10") * result.usage.tokens / 1_000_000
        assert client.embed(texts[:40], input_type="document").reused.all()
    assert all(server.meter.billed_texts[text] == 1 for text in texts[:40])


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"detail": "Unauthorized"}, errors.AuthenticationFailed),
        (400, {"message": "Invalid model: x", "type": "invalid_model"}, errors.ModelNotFound),
        (429, {"message": "Requests rate limit exceeded"}, errors.RateLimited),
        (
            422,
            {"detail": [{"type": "missing", "loc": ["body", "input"], "msg": "Field required"}]},
            errors.RequestRejected,
        ),
        (500, {"object": "error", "message": "x", "type": "server_error"}, None),
        (503, {"object": "error", "message": "x", "type": "server_error"}, None),
    ],
)
def test_a_refusal(
    server: FakeMistral, status: int, body: object, kind: type[errors.EmbeddingError] | None
) -> None:
    server.next_refusals = [Refused(status, body, {"retry-after": "7"})]
    with pytest.raises(kind or errors.ProviderUnavailable) as caught:
        embedder(server).embed(EmbedRequest(texts=["a"]))
    assert getattr(caught.value, "retry_after", 7.0) == 7.0
    assert caught.value.billed == "no"


def test_without_a_key_nothing_is_sent() -> None:
    with pytest.raises(errors.ConfigurationError, match="MISTRAL_API_KEY"):
        MistralEmbedder("mistral-embed", MistralOptions()).embed(EmbedRequest(texts=["a"]))


def test_every_model_has_its_facts() -> None:
    assert embedcore_provider().models == MODELS
    for name, info in MODELS.items():
        assert info.price is not None
        assert MistralEmbedder(name, MistralOptions()).info.endpoint == "https://api.mistral.ai/v1"
