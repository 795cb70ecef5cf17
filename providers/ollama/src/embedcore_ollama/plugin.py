"""Ollama's native ``POST /api/embed``: the provider, its options and models, and one request."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Final

from embedcore.provider.hookspecs import FromEnvironment, Provider, hookimpl
from embedcore.provider.http_embedder import HttpEmbedder, HttpOptions, Key
from embedcore.provider.prefixes import prefixed, prefixes_of
from embedcore.provider.replies import Form
from embedcore.provider.types import ModelInfo, Price

PROVIDER: Final = "ollama"
DEFAULT_MODEL: Final = "nomic-embed-text"

OTHER: Final = ModelInfo(
    provider=PROVIDER,
    max_texts_per_request=64,
    max_concurrency=4,
    price=Price(),
    truncation="error",
)


def _ollama(model: str, dimensions: int, longest: int) -> ModelInfo:
    return replace(OTHER, model=model, dimensions=dimensions, max_input_tokens=longest)


_PLAIN: Final = {
    info.model: info
    for info in (
        _ollama("nomic-embed-text", 768, 2_048),
        _ollama("mxbai-embed-large", 1024, 512),
        _ollama("all-minilm", 384, 256),
        _ollama("bge-m3", 1024, 8_192),
        _ollama("embeddinggemma", 768, 2_048),
    )
}
MODELS: Final = {name: prefixed(info, prefixes_of(name)) for name, info in _PLAIN.items()}


class OllamaOptions(HttpOptions):
    """Options of ``ollama:<model>``: those of every provider over HTTP, and ``prefixes``.

    ``prefixes``: put what the model was trained with before each text, by its name. False for
    texts that have it already, and for a model that goes by another's name.
    """

    keys_at: ClassVar[str] = "https://ollama.com/settings/keys"

    api_key: Annotated[Key, FromEnvironment("OLLAMA_API_KEY")] = None
    base_url: str = "http://localhost:11434"
    prefixes: bool = True


class OllamaEmbedder(HttpEmbedder):
    """Implements ``Embedder``."""

    path = "/api/embed"
    form = Form(rows=("embeddings",), vector=None, numbered=False)
    models = _PLAIN
    other = OTHER
    # What is beyond the width is left out by the server, whatever the model.
    widths: ClassVar = {name: range(1, (info.dimensions or 0) + 1) for name, info in MODELS.items()}

    def __init__(self, model: str, options: OllamaOptions) -> None:
        super().__init__(model, options)
        self.words = prefixes_of(model) if options.prefixes else {}
        self.info = replace(prefixed(self.info, self.words), reply_models=(f"{model}:latest",))

    def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
        """``input_type``: what stands before each text. Without ``truncate`` the server would cut
        long texts and say nothing."""
        asked: dict[str, object] = {
            "model": self.info.model,
            "input": [f"{input_type or ''}{text}" for text in texts],
            "truncate": False,
        }
        if self.width is not None:
            asked["dimensions"] = self.width
        return asked


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=OllamaOptions,
        create=OllamaEmbedder,
        models=MODELS,
        default_model=DEFAULT_MODEL,
    )
