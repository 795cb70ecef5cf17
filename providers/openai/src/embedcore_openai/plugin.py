"""The entry point: imports neither the SDK nor the tokenizer nor numpy."""

from __future__ import annotations

from embedcore.provider.hookspecs import Provider, hookimpl
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.models import DEFAULT_MODEL, MODELS, PROVIDER
from embedcore_openai.options import OpenAIOptions


def create(model: str, options: OpenAIOptions) -> OpenAIEmbedder:
    """An embedder for one model. Needs no key and no network."""
    return OpenAIEmbedder(model, options)


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=OpenAIOptions,
        create=create,
        models=MODELS,
        default_model=DEFAULT_MODEL,
    )
