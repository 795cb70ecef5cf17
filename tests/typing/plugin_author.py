"""Checked by mypy, never run: what the author of a provider may rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, assert_type

import numpy as np
from pydantic import BaseModel, ConfigDict, SecretStr

from embedcore import AuthenticationFailed, EmbeddingClient, RateLimited, TransientProviderError
from embedcore.events import Event
from embedcore.provider.base import BaseEmbedder, WrapperEmbedder
from embedcore.provider.hookspecs import FromEnvironment, KeepsVectors, Provider, hookimpl
from embedcore.provider.protocol import BatchStrategy, Embedder, Tokenizer
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import (
    BatchItem,
    BatchLimits,
    BatchOutcome,
    BatchStatus,
    EmbedReply,
    EmbedRequest,
    FoundJob,
    ModelInfo,
    Price,
    RateLimits,
)


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    api_key: Annotated[SecretStr | Callable[[], str] | None, FromEnvironment("ACME_KEY")] = None
    timeout: Annotated[float, KeepsVectors()] = 60.0


class Small(BaseEmbedder):
    """What a small provider is: ``info`` and ``embed``."""

    info = ModelInfo(provider="acme", model="v1", dimensions=8, price=Price(immediate=Decimal(1)))

    def embed(self, request: EmbedRequest) -> EmbedReply:
        assert_type(request.texts, Sequence[str])
        assert_type(request.timeout, float | None)
        vectors = np.zeros((len(request.texts), 8), dtype=np.float32)
        return EmbedReply(vectors=vectors, tokens=3, limits=RateLimits(remaining_tokens=5))


class Words:
    """A tokenizer without any of our classes."""

    exact = True

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def prefix(self, text: str, max_tokens: int) -> str:
        return " ".join(text.split()[:max_tokens])


class Jobs:
    """A batch strategy without any of our classes."""

    limits = BatchLimits(max_items=10, window=86400.0)

    def sizes(self, items: Sequence[BatchItem]) -> list[int]:
        return [len(item.text.encode()) for item in items]

    def upload(self, items: Iterable[BatchItem], *, key: str) -> str:
        return "input"

    def create(self, input_ref: str, *, key: str) -> str:
        return "job"

    def find(self, *, key: str, input_ref: str, since: datetime) -> list[FoundJob]:
        return [FoundJob(id="job", created_at=since, state="running")]

    def discard(self, input_ref: str) -> None:
        return None

    def orphans(self, *, before: datetime) -> Iterator[str]:
        yield "input"

    def poll(self, job_id: str) -> BatchStatus:
        return BatchStatus(state="completed")

    def results(self, job_id: str) -> Iterator[BatchOutcome]:
        yield BatchOutcome(id="0", error="lost", retryable=True)

    def cancel(self, job_id: str) -> None:
        return None


class ByHand:
    """An embedder without any of our classes, with plain attributes and with properties."""

    tokenizer = Words()
    batch = Jobs()

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(price=Price(as_of=date(2026, 11, 1)), local=True)

    def embed(self, request: EmbedRequest) -> EmbedReply:
        if request.input_type == "query":
            raise RateLimited("slow down", retry_after=2.0, limits=RateLimits())
        raise TransientProviderError("lost", billed="unknown", status=502)

    def close(self) -> None:
        return None


class Prefixed(WrapperEmbedder):
    """Forwards everything and overrides one thing."""

    def embed(self, request: EmbedRequest) -> EmbedReply:
        texts = [f"passage: {text}" for text in request.texts]
        return self.inner.embed(EmbedRequest(texts=texts, timeout=request.timeout))


def create(model: str, options: Options) -> Embedder:
    if options.api_key is None:
        raise AuthenticationFailed(f"no key for {model}")
    return Prefixed(ByHand())


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(name="acme", options=Options, create=create, models={"v1": Small.info})


@hookimpl
def embedcore_observe(event: Event) -> None:
    del event


def fits() -> None:
    embedders: list[Embedder] = [Small(), ByHand(), Prefixed(Small())]
    tokenizers: list[Tokenizer] = [Words(), EstimatingTokenizer()]
    batches: list[BatchStrategy] = [Jobs()]
    for embedder in embedders:
        EmbeddingClient(embedder=embedder)
    assert_type(embedders[0].batch, BatchStrategy | None)
    assert_type(tokenizers[0].count(["a"]), list[int])
    assert_type(batches[0].limits, BatchLimits)


class NoEmbedder:
    info = ModelInfo()


def refused_by_the_checker() -> None:
    EmbeddingClient(embedder=NoEmbedder())  # type: ignore[arg-type]
    ModelInfo("acme")  # type: ignore[call-arg,misc,unused-ignore]
    RateLimited("slow down", 2.0)  # type: ignore[call-arg,misc,unused-ignore]
    Price(immediate="1")  # type: ignore[arg-type]
