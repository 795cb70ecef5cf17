"""An embedcore client as LangChain's ``Embeddings``: for vector stores, retrievers and caches.

Needs LangChain: ``pip install langchain-core``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedcore import Config, ConfigurationError, EmbeddingClient
from embedcore.events import Observer

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "langchain_core":
        raise
    raise ModuleNotFoundError(
        "embedcore.adapters.langchain needs LangChain: pip install langchain-core",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from pydantic import SecretStr


class EmbedcoreEmbeddings(Embeddings):
    """Embeddings inside a budget: ``EmbedcoreEmbeddings("openai:text-embedding-3-small")``.

    Takes what ``EmbeddingClient`` takes, or a ``client`` that is there already. Documents are
    embedded with ``input_type="document"``, questions with ``"query"``, which may use the share of
    the budget that is kept for them. A failure raises an ``embedcore.EmbeddingError``, whatever the
    settings: never a wrong or a missing vector. What was embedded before it is in its ``.partial``.

    It may be shared between threads and pickles as its client does, without keys.
    """

    def __init__(
        self,
        model: str | None = None,
        api_key: str | SecretStr | Callable[[], str] | None = None,
        *,
        client: EmbeddingClient | None = None,
        config: Config | Mapping[str, Any] | Path | str | None = None,
        scope: str | None = None,
        options: Mapping[str, Any] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        settings = (model, api_key, config, scope, options)
        by_hand = any(setting is not None for setting in settings) or bool(observers)
        try:
            if client is None:
                client = EmbeddingClient(
                    model,
                    api_key,
                    config=config,
                    scope=scope,
                    options=options,
                    observers=observers,
                )
            elif by_hand:
                raise ConfigurationError(
                    "client= is ready to use: give model, scope, options, … to that client instead"
                )
        finally:
            # What is raised must not carry a key among the variables of this frame.
            api_key = options = config = None
            del settings
        self.client = client

    @property
    def model(self) -> str:
        """The model's name, without its provider. As a cache's namespace ``client.fingerprint``
        is better: it changes with whatever changes the vectors."""
        return self.client.model

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """The vectors of texts that are to be found, in their order."""
        return self.client.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        return self.client.embed_query(text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """``embed_documents`` without blocking the event loop; cancelling it sends no more."""
        return await self.client.aembed_documents(texts)

    async def aembed_query(self, text: str) -> list[float]:
        """``embed_query`` without blocking the event loop."""
        return await self.client.aembed_query(text)

    def close(self) -> None:
        """Close the client's connections and threads. The next call opens them again."""
        self.client.close()

    def __repr__(self) -> str:
        client = self.client
        return f"EmbedcoreEmbeddings({client.provider}:{client.model}, scope={client.scope!r})"
