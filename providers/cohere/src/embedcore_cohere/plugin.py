"""Cohere's ``POST /v2/embed``: the provider, its options and models, and one request."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import Annotated, ClassVar, Final

from embedcore.provider.hookspecs import FromEnvironment, Provider, hookimpl
from embedcore.provider.http_embedder import HttpEmbedder, HttpOptions, Key
from embedcore.provider.replies import Form
from embedcore.provider.types import ModelInfo, Price

PROVIDER: Final = "cohere"
DEFAULT_MODEL: Final = "embed-v4.0"

# The service has no word for "similarity".
WORDS: Final = {
    "query": "search_query",
    "document": "search_document",
    "classification": "classification",
    "clustering": "clustering",
}
_V4: Final = (256, 512, 1024, 1536)
_V5: Final = (256, 512, 768, 1024, 1536, 2048)

OTHER: Final = ModelInfo(
    provider=PROVIDER,
    max_texts_per_request=96,
    # Of trial and of production keys, as the page of rate limits had it in 2026.
    texts_per_minute=2_000,
    input_types=tuple(WORDS),
    default_input_type="document",
    truncation="error",
)


def _cohere(model: str, *, dimensions: int, longest: int, price: str) -> ModelInfo:
    return replace(
        OTHER,
        model=model,
        dimensions=dimensions,
        max_input_tokens=longest,
        price=Price(
            immediate=Decimal(price),
            as_of=date(2026, 11, 29),
            source="the price table of litellm 1.110.2",
        ),
    )


MODELS: Final = {
    info.model: info
    for info in (
        _cohere("embed-v4.0", dimensions=1536, longest=128_000, price="0.12"),
        _cohere("embed-v5.0-pro", dimensions=2048, longest=128_000, price="0.12"),
        _cohere("embed-v5.0-fast", dimensions=2048, longest=128_000, price="0.08"),
        _cohere("embed-english-v3.0", dimensions=1024, longest=512, price="0.10"),
        _cohere("embed-multilingual-v3.0", dimensions=1024, longest=512, price="0.10"),
        _cohere("embed-english-light-v3.0", dimensions=384, longest=512, price="0.10"),
        _cohere("embed-multilingual-light-v3.0", dimensions=384, longest=512, price="0.10"),
    )
}


class CohereOptions(HttpOptions):
    """Options of ``cohere:<model>``: those of every provider over HTTP."""

    keys_at: ClassVar[str] = "https://dashboard.cohere.com/api-keys"

    api_key: Annotated[Key, FromEnvironment("CO_API_KEY")] = None
    base_url: Annotated[str, FromEnvironment("CO_API_URL")] = "https://api.cohere.com"


class CohereEmbedder(HttpEmbedder):
    """Implements ``Embedder``."""

    path = "/v2/embed"
    form = Form(rows=("embeddings", "float"), vector=None, numbered=False)
    models = MODELS
    other = OTHER
    widths: ClassVar = {"embed-v4.0": _V4, "embed-v5.0-pro": _V5, "embed-v5.0-fast": _V5}
    words = WORDS

    def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
        """Without ``truncate`` the service would cut long texts and say nothing."""
        asked: dict[str, object] = {
            "model": self.info.model,
            "texts": texts,
            "input_type": input_type,
            "embedding_types": ["float"],
            "truncate": "NONE",
        }
        if self.width is not None:
            asked["output_dimension"] = self.width
        return asked


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=CohereOptions,
        create=CohereEmbedder,
        models=MODELS,
        default_model=DEFAULT_MODEL,
    )
