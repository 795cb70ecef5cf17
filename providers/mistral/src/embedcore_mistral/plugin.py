"""Mistral's ``POST /v1/embeddings``: the provider, its options and models, and one request."""

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

PROVIDER: Final = "mistral"
DEFAULT_MODEL: Final = "mistral-embed"

OTHER: Final = ModelInfo(
    provider=PROVIDER,
    max_texts_per_request=256,
    # A request may have 16,384 tokens. Counted as one for each byte that would be four times as
    # many requests as need be; what has more after all is refused for nothing, and divided.
    max_bytes_per_request=48_000,
    truncation="error",
)


def _mistral(model: str, price: str, *, dimensions: int, dated: str) -> ModelInfo:
    return replace(
        OTHER,
        model=model,
        dimensions=dimensions,
        max_input_tokens=8_190,
        reply_models=(dated,),
        price=Price(
            immediate=Decimal(price),
            batch=Decimal(price) / 2,
            as_of=date(2026, 11, 29),
            source="the price table of litellm 1.110.2",
        ),
    )


MODELS: Final = {
    info.model: info
    for info in (
        _mistral("mistral-embed", "0.10", dimensions=1024, dated="mistral-embed-2312"),
        _mistral("codestral-embed", "0.15", dimensions=1536, dated="codestral-embed-2505"),
    )
}


class MistralOptions(BatchOptions):
    """Options of ``mistral:<model>``: those of every provider over HTTP with batches."""

    keys_at: ClassVar[str] = "https://console.mistral.ai/api-keys"

    api_key: Annotated[Key, FromEnvironment("MISTRAL_API_KEY")] = None
    base_url: str = "https://api.mistral.ai/v1"


class MistralEmbedder(HttpEmbedder):
    """Implements ``Embedder``. The service makes no difference between kinds of texts."""

    path = "/embeddings"
    models = MODELS
    other = OTHER
    widths: ClassVar = {"codestral-embed": range(1, 3_073)}

    @property
    def batch(self) -> BatchStrategy:  # type: ignore[override]
        from embedcore_mistral.batch import MistralBatch

        return MistralBatch(self)

    def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
        """Lists of numbers are asked for, since those were recorded: base64 was not."""
        del input_type
        asked: dict[str, object] = {"model": self.info.model, "input": texts}
        if self.width is not None:
            asked["output_dimension"] = self.width
        return asked


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=MistralOptions,
        create=MistralEmbedder,
        models=MODELS,
        default_model=DEFAULT_MODEL,
    )
