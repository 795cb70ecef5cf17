"""Voyage's provider: what it asks for, what it reads, and what each refusal means."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pybase64
import pytest
from embedcore_voyage.plugin import MODELS, VoyageEmbedder, VoyageOptions, embedcore_provider
from fake_voyage import FakeVoyage

from embedcore import EmbeddingClient, errors
from embedcore.provider.types import EmbedRequest
from embedcore.testing import ProviderContract
from embedcore.testing.service import Recorded, Refused, ServiceContract

KEY = "pa-CANARY0123456789abcdefXYZ"
# Replies of the real service that others recorded, beside the repository.
RECORDINGS = Path(__file__).parents[4] / "shared" / "fixtures" / "vendors"


@pytest.fixture
def server() -> Iterator[FakeVoyage]:
    with FakeVoyage(key=KEY) as fake:
        yield fake


def embedder(server: Any, model: str = "voyage-4", **options: Any) -> VoyageEmbedder:
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, **options}
    return VoyageEmbedder(model, VoyageOptions(**options))


class Contract(ServiceContract):
    secret = KEY
    model = "voyage-4"
    options: ClassVar[dict[str, Any]] = {}
    examples = 10

    def embedder_of(self, server: FakeVoyage) -> VoyageEmbedder:
        return embedder(server, self.model, **self.options)


class TestVoyage4(Contract):
    options: ClassVar = {"dimensions": 256}


class TestVoyageProvider(ProviderContract):
    provider = "voyage"


@pytest.mark.parametrize(
    "name",
    [
        "pydantic_ai.voyageai_documents",
        "pydantic_ai.voyageai_embed_error",
        "pydantic_ai.voyageai_query",
        "pydantic_ai.voyageai_query_voyage_4",
        "pydantic_ai.voyageai_query_with_truncate",
    ],
)
def test_a_recording(name: str) -> None:
    with Recorded(RECORDINGS / f"{name}.json") as real:
        told = real.question
        asker = embedder(real, told["model"])
        request = EmbedRequest(texts=told["input"], input_type=told["input_type"])
        if real.status != 200:
            with pytest.raises(errors.ModelNotFound) as caught:
                asker.embed(request)
            assert caught.value.billed == "no"
        else:
            reply = asker.embed(request)
            raw = [pybase64.b64decode(each["embedding"]) for each in real.answer_body["data"]]
            assert [row.tobytes() for row in reply.vectors] == raw
            # Two short texts came back with a usage of 0: that is no proof that they were free.
            assert reply.tokens == (real.answer_body["usage"]["total_tokens"] or None)
            assert reply.model == told["model"]
            if real.is_whole:
                assert np.linalg.norm(reply.vectors, axis=1) == pytest.approx(1, abs=1e-4)
        asker.close()
    (asked,) = real.seen
    # Of what the recording has as null nothing is sent, and cutting is never allowed.
    told = {name: value for name, value in told.items() if value is not None}
    assert asked == told | {"truncation": False}


def test_the_types_are_those_of_the_service(server: FakeVoyage) -> None:
    one = embedder(server)
    for kind in (None, *one.info.input_types):
        one.embed(EmbedRequest(texts=["a"], input_type=kind))
    assert [asked["input_type"] for asked in server.seen] == ["document", "query", "document"]


@pytest.mark.parametrize(("model", "width"), [("voyage-4", 768), ("voyage-law-2", 512)])
def test_a_width_that_the_model_cannot_give_is_refused_at_once(model: str, width: int) -> None:
    with pytest.raises(errors.ConfigurationError, match=rf"dimensions = {width}.*{model}"):
        VoyageEmbedder(model, VoyageOptions(dimensions=width))


def test_the_one_text_that_is_too_long_is_named(server: FakeVoyage) -> None:
    with pytest.raises(errors.InputTooLong) as caught:
        embedder(server, "voyage-law-2").embed(
            EmbedRequest(texts=["a", "b", "word " * 13_000, "c"])
        )
    assert (caught.value.position, caught.value.max_tokens) == (2, 16_000)
    assert caught.value.billed == "no"


def test_a_program_embeds_documents_and_questions(server: FakeVoyage, tmp_path: Path) -> None:
    with EmbeddingClient(
        "voyage:voyage-4",
        options={"base_url": f"{server.url}/v1", "api_key": KEY},
        config={"home": tmp_path, "cache": True},
    ) as client:
        texts = [f"text {number}" for number in range(300)] + ["long " * 27_000]
        result = client.embed(texts)
        assert result.ok.all()
        assert result.outcomes[300].cut == "yes"
        assert result.perhaps_cut == frozenset()
        assert result.usage.tokens == server.meter.billed_tokens
        assert result.usage.cost == Decimal("0.06") * result.usage.tokens / 1_000_000
        assert client.embed_query("text 1") != client.embed_documents(["text 1"])[0]
        assert client.embed(texts[:300], input_type="document").reused.all()
    assert server.meter.billed_texts["text 2"] == 1


def test_a_request_with_too_many_tokens_is_divided(server: FakeVoyage, tmp_path: Path) -> None:
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, "max_tokens_per_request": 9_000_000}
    with EmbeddingClient(
        "voyage:voyage-4-large", options=options, config={"home": tmp_path}
    ) as client:
        # 130,000 tokens at once, of 120,000 that go.
        result = client.embed([f"{number} {'word ' * 20_800}" for number in range(5)])
    assert result.ok.all()
    assert not result.cuts
    assert server.meter.billed_twice == {}


_PAYMENT = (
    "You have not yet added your payment method in the billing page and will have reduced rate "
    "limits of 3 RPM and 10K TPM."
)


@pytest.mark.parametrize(
    ("status", "detail", "kind"),
    [
        (401, "Provided API key is invalid.", errors.AuthenticationFailed),
        (403, "IP address is not allowed", errors.PermissionDenied),
        (429, _PAYMENT, errors.QuotaExhausted),
        (429, "Rate limit exceeded", errors.RateLimited),
        (500, "An unexpected error", errors.ProviderUnavailable),
        (502, "Bad gateway", errors.OutcomeUnknown),
        (503, "overloaded", errors.ProviderUnavailable),
    ],
)
def test_a_refusal(
    server: FakeVoyage, status: int, detail: str, kind: type[errors.ProviderError]
) -> None:
    server.next_refusals = [Refused(status, {"detail": detail})]
    with pytest.raises(kind) as caught:
        embedder(server).embed(EmbedRequest(texts=["a"]))
    assert caught.value.status == status
    assert server.meter.billed_requests == 0


def test_without_a_key_nothing_is_sent() -> None:
    with pytest.raises(errors.ConfigurationError, match="VOYAGE_API_KEY"):
        VoyageEmbedder("voyage-4", VoyageOptions()).embed(EmbedRequest(texts=["a"]))


def test_every_model_has_its_facts() -> None:
    assert embedcore_provider().models == MODELS
    for name, info in MODELS.items():
        assert info.price is not None
        assert info.max_tokens_per_request in (120_000, 320_000, 1_000_000)
        made = VoyageEmbedder(name, VoyageOptions()).info
        assert made.endpoint == "https://api.voyageai.com/v1"
        assert made.dimensions == 1024
