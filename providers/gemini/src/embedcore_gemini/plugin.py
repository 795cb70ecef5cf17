"""Gemini's ``POST /models/…:batchEmbedContents``: the provider, its options and one request.

An entry of its own for each text: of one entry with several the service makes one vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

from embedcore.provider.batch_options import BatchOptions
from embedcore.provider.hookspecs import FromEnvironment, Provider, hookimpl
from embedcore.provider.http_embedder import HttpEmbedder, Key
from embedcore.provider.prefixes import prefixed, prefixes_of
from embedcore.provider.replies import Form
from embedcore.provider.types import ModelInfo, Price

if TYPE_CHECKING:
    from embedcore.provider.protocol import BatchStrategy

PROVIDER: Final = "gemini"
DEFAULT_MODEL: Final = "gemini-embedding-001"

# Of models before gemini-embedding-2, which ignores them and wants words before the text.
TASKS: Final = {
    "query": "RETRIEVAL_QUERY",
    "document": "RETRIEVAL_DOCUMENT",
    "classification": "CLASSIFICATION",
    "clustering": "CLUSTERING",
    "similarity": "SEMANTIC_SIMILARITY",
}
_FULL: Final = 3072

OTHER: Final = ModelInfo(
    provider=PROVIDER,
    max_texts_per_request=100,
    # The service takes 4 MB of JSON, in which some signs have two.
    max_bytes_per_request=2_000_000,
    input_types=tuple(TASKS),
    default_input_type="document",
)


def _gemini(model: str, price: str, *, longest: int) -> ModelInfo:
    return replace(
        OTHER,
        model=model,
        dimensions=_FULL,
        max_input_tokens=longest,
        price=Price(
            immediate=Decimal(price),
            batch=Decimal(price) / 2,
            as_of=date(2026, 11, 29),
            source="the price table of litellm 1.110.2",
        ),
    )


_PLAIN: Final = {
    info.model: info
    for info in (
        _gemini("gemini-embedding-001", "0.15", longest=2_048),
        _gemini("gemini-embedding-2", "0.20", longest=8_192),
    )
}
MODELS: Final = {name: prefixed(info, prefixes_of(name)) for name, info in _PLAIN.items()}


class GeminiOptions(BatchOptions):
    """Options of ``gemini:<model>``: those of every provider over HTTP with batches, and
    ``normalize``.

    ``normalize``: give vectors length 1 that the service leaves shorter, those of
    ``gemini-embedding-001`` with fewer than 3,072 dimensions.
    """

    keys_at: ClassVar[str] = "https://aistudio.google.com/apikey"

    api_key: Annotated[Key, FromEnvironment("GEMINI_API_KEY")] = None
    base_url: str = "https://generativelanguage.googleapis.com/v1beta"
    normalize: bool = True


class GeminiEmbedder(HttpEmbedder):
    """Implements ``Embedder``."""

    form = Form(rows=("embeddings",), vector="values", numbered=False)
    models = _PLAIN
    other = OTHER
    widths: ClassVar = {name: range(1, _FULL + 1) for name in MODELS}

    def __init__(self, model: str, options: GeminiOptions) -> None:
        super().__init__(model, options)
        self.path = f"/models/{model}:batchEmbedContents"
        self._prefixes = prefixes_of(model)
        self.words = self._prefixes or TASKS
        self.info = prefixed(self.info, self._prefixes)
        self.normalises = options.normalize and self.width is not None and not self._prefixes

    @property
    def batch(self) -> BatchStrategy:  # type: ignore[override]
        from embedcore_gemini.batch import GeminiBatch

        return GeminiBatch(self)

    def headers(self, key: str) -> Mapping[str, str]:
        return {"x-goog-api-key": key}

    def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
        """``input_type``: a task, or what stands before each text."""
        before = input_type or "" if self._prefixes else ""
        beside: dict[str, object] = {"model": f"models/{self.info.model}"}
        if not self._prefixes:
            beside["taskType"] = input_type
        if self.width is not None:
            beside["outputDimensionality"] = self.width
        return {
            "requests": [
                {**beside, "content": {"parts": [{"text": before + text}]}} for text in texts
            ]
        }


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=GeminiOptions,
        create=GeminiEmbedder,
        models=MODELS,
        default_model=DEFAULT_MODEL,
    )
