"""embedcore itself: its OpenAI provider alone, and the whole product with and without its store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compare.clients.contract import (
    KEY,
    MODEL,
    THREADS,
    WIDTH,
    Array,
    Block,
    Client,
    Embed,
    NotThere,
    Partly,
    Row,
    Setting,
)

if TYPE_CHECKING:
    from embedcore import EmbeddingClient

_TEXTS: Final = 244


def _provider(setting: Setting) -> Embed:
    from embedcore_openai.embedder import OpenAIEmbedder
    from embedcore_openai.options import OpenAIOptions

    from embedcore.provider.types import EmbedRequest

    options = OpenAIOptions(api_key=KEY, base_url=setting.base_url)  # type: ignore[arg-type]
    embedder = OpenAIEmbedder(MODEL, options)

    def embed(texts: list[str]) -> Array:
        found = np.empty((len(texts), WIDTH), dtype=np.float32)

        def part(start: int) -> None:
            request = EmbedRequest(texts=tuple(texts[start : start + _TEXTS]))
            found[start : start + _TEXTS] = embedder.embed(request).vectors

        starts = range(0, len(texts), _TEXTS)
        if setting.purpose == "throughput":
            with ThreadPoolExecutor(THREADS) as executor:
                list(executor.map(part, starts))
        else:
            for start in starts:
                part(start)
        return found

    return embed


def _client(setting: Setting, *, store: bool) -> EmbeddingClient:
    from embedcore import Config, EmbeddingClient

    config: dict[str, Any] = {
        "home": setting.folder / "home",
        "options": {"openai": {"base_url": setting.base_url}},
    }
    if "cache" in Config.model_fields:
        config["cache"] = store
    elif store:
        raise NotThere("this version has no store of bought vectors")
    return EmbeddingClient(f"openai:{MODEL}", api_key=KEY, config=config)


def _whole(setting: Setting, *, store: bool) -> Embed:
    from embedcore.errors import EmbeddingError

    client = _client(setting, store=store)

    def embed(texts: list[str]) -> Array:
        try:
            return client.embed(texts).vectors
        except EmbeddingError as error:
            if error.partial is None:
                raise
            # Rows without a vector are NaN there.
            raise Partly(error.partial.vectors, f"{type(error).__name__}: {error}") from error

    return embed


def _stream(setting: Setting, texts: Iterable[str], *, store: bool) -> Iterator[Block]:
    client = _client(setting, store=store)
    if not hasattr(client, "embed_iter"):
        raise NotThere("this version has no embed_iter")
    # The key is the text itself: so a block can be checked without keeping the corpus.
    for block in client.embed_iter((text, text) for text in texts):
        yield block.keys, block.vectors


CLIENT = Client(
    name="embedcore",
    packages=(".", "providers/openai", "providers/hashing"),
    shown=("embedcore", "embedcore-openai", "openai", "numpy"),
    statement="import embedcore",
    ready=f"import embedcore; embedcore.EmbeddingClient('openai:{MODEL}', api_key='{KEY}')",
    rows=(
        Row(
            name="embedcore-provider",
            title="embedcore, its OpenAI provider alone",
            open=_provider,
            missing={
                "goodput": "does not retry by itself",
                "reuse": "keeps nothing by itself",
            },
        ),
        Row(
            name="embedcore",
            title="embedcore, store off",
            label="embedcore, store off",
            open=lambda setting: _whole(setting, store=False),
            stream=lambda setting, texts: _stream(setting, texts, store=False),
            missing={"reuse": "the store is off"},
        ),
        Row(
            name="embedcore-store",
            title="embedcore, store on",
            label="embedcore",
            open=lambda setting: _whole(setting, store=True),
            reuse=lambda setting: _whole(setting, store=True),
            reuse_how="its store of bought vectors",
            stream=lambda setting, texts: _stream(setting, texts, store=True),
        ),
        Row(
            name="embedcore-processes",
            title="embedcore, four processes sharing the rate limit",
            open=lambda setting: _whole(setting, store=False),
            processes=4,
        ),
    ),
)
