"""Voyage's ``POST /v1/embeddings``: the provider, its options and models, and one request."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

from embedcore.provider.batch_options import BatchOptions
from embedcore.provider.hookspecs import FromEnvironment, Provider, hookimpl
from embedcore.provider.http_embedder import HttpEmbedder, Key
from embedcore.provider.types import ModelInfo, Price

if TYPE_CHECKING:
    from embedcore.provider.protocol import BatchStrategy

PROVIDER: Final = "voyage"
DEFAULT_MODEL: Final = "voyage-4"

# The service puts a sentence of its own before the text, and has none for the other types.
WORDS: Final = {"query": "query", "document": "document"}
# A job costs a third less.
_BATCH: Final = Decimal("0.67")
_BATCH_MODELS: Final = frozenset(
    {
        "voyage-4-large",
        "voyage-4",
        "voyage-4-lite",
        "voyage-3-large",
        "voyage-3.5",
        "voyage-3.5-lite",
        "voyage-code-3",
    }
)
_WIDTHS: Final = (256, 512, 1024, 2048)
_LARGE, _MIDDLE, _LITE = 120_000, 320_000, 1_000_000

OTHER: Final = ModelInfo(
    provider=PROVIDER,
    max_texts_per_request=1_000,
    max_tokens_per_request=_LARGE,
    # Vectors travel as base64: more than that at once makes nothing cheaper.
    best_texts_per_request=250,
    input_types=tuple(WORDS),
    default_input_type="document",
    truncation="error",
)


def _voyage(
    model: str, price: str, *, request: int, dimensions: int = 1024, longest: int = 32_000
) -> ModelInfo:
    return replace(
        OTHER,
        model=model,
        dimensions=dimensions,
        max_input_tokens=longest,
        max_tokens_per_request=request,
        price=Price(
            immediate=Decimal(price),
            batch=Decimal(price) * _BATCH if model in _BATCH_MODELS else None,
            as_of=date(2026, 11, 29),
            source="the price table of litellm 1.110.2",
        ),
    )


MODELS: Final = {
    info.model: info
    for info in (
        _voyage("voyage-4-large", "0.12", request=_LARGE),
        _voyage("voyage-4", "0.06", request=_MIDDLE),
        _voyage("voyage-4-lite", "0.02", request=_LITE),
        _voyage("voyage-code-4", "0.12", request=_LARGE),
        _voyage("voyage-3-large", "0.18", request=_LARGE),
        _voyage("voyage-3.5", "0.06", request=_MIDDLE),
        _voyage("voyage-3.5-lite", "0.02", request=_LITE),
        _voyage("voyage-code-3", "0.18", request=_LARGE),
        _voyage("voyage-finance-2", "0.12", request=_LARGE),
        _voyage("voyage-law-2", "0.12", request=_LARGE, longest=16_000),
        _voyage("voyage-multilingual-2", "0.12", request=_LARGE),
    )
}


class VoyageOptions(BatchOptions):
    """Options of ``voyage:<model>``: those of every provider over HTTP with batches."""

    keys_at: ClassVar[str] = "https://dash.voyageai.com"

    api_key: Annotated[Key, FromEnvironment("VOYAGE_API_KEY")] = None
    base_url: Annotated[str, FromEnvironment("VOYAGE_BASE_URL")] = "https://api.voyageai.com/v1"


class VoyageEmbedder(HttpEmbedder):
    """Implements ``Embedder``."""

    path = "/embeddings"
    models = MODELS
    other = OTHER
    widths: ClassVar = {name: _WIDTHS for name in MODELS if not name.endswith("-2")}
    words = WORDS

    @property
    def batch(self) -> BatchStrategy | None:  # type: ignore[override]
        """None for the models of which the service takes no batches."""
        if self.info.model in MODELS and self.info.model not in _BATCH_MODELS:
            return None
        from embedcore_voyage.batch import VoyageBatch

        return VoyageBatch(self)

    def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
        """Without ``truncation`` the service would cut long texts and say nothing."""
        asked: dict[str, object] = {
            "model": self.info.model,
            "input": texts,
            "input_type": input_type,
            "truncation": False,
            "encoding_format": "base64",
        }
        if self.width is not None:
            asked["output_dimension"] = self.width
        return asked


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=VoyageOptions,
        create=VoyageEmbedder,
        models=MODELS,
        default_model=DEFAULT_MODEL,
    )
