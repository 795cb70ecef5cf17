"""The entry point: imports neither the SDK nor the tokenizer nor numpy."""

from __future__ import annotations

from typing import Any

from embedcore.provider.hookspecs import Probing, Provider, hookimpl
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.models import DEFAULT_MODEL, MODELS, PROVIDER
from embedcore_openai.options import OpenAIOptions


def create(model: str, options: OpenAIOptions) -> OpenAIEmbedder:
    """An embedder for one model. Needs no key and no network."""
    return OpenAIEmbedder(model, options)


def probe(url: str, **given: Any) -> Probing:
    """Finds the options for a server; sends nothing yet."""
    from embedcore_openai.probe import Probe

    return Probe(url, **given)


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=OpenAIOptions,
        create=create,
        models=MODELS,
        default_model=DEFAULT_MODEL,
        probe=probe,
    )
