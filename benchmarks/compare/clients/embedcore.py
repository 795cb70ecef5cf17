"""embedcore itself: its OpenAI provider alone, and the whole product with and without its cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compare.clients.contract import (
    KEY,
    MODEL,
    THREADS,
    WIDTH,
    Array,
    Ask,
    AskAsync,
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


def _client(setting: Setting, *, cache: bool) -> EmbeddingClient:
    from embedcore import Config, EmbeddingClient

    config: dict[str, Any] = {
        "home": setting.folder / "home",
        "options": {"openai": {"base_url": setting.base_url}},
    }
    if "cache" in Config.model_fields:
        config["cache"] = cache
    elif cache:
        raise NotThere("this version has no cache of vectors")
    return EmbeddingClient(f"openai:{MODEL}", api_key=KEY, config=config)


def _whole(setting: Setting, *, cache: bool) -> Embed:
    from embedcore.errors import EmbeddingError

    client = _client(setting, cache=cache)

    def embed(texts: list[str]) -> Array:
        try:
            return client.embed(texts).vectors
        except EmbeddingError as error:
            if error.partial is None:
                raise
            # Rows without a vector are NaN there.
            raise Partly(error.partial.vectors, f"{type(error).__name__}: {error}") from error

    return embed


def _stream(setting: Setting, texts: Iterable[str], *, cache: bool) -> Iterator[Block]:
    client = _client(setting, cache=cache)
    if not hasattr(client, "embed_iter"):
        raise NotThere("this version has no embed_iter")
    # The key is the text itself: so a block can be checked without keeping the corpus.
    for block in client.embed_iter((text, text) for text in texts):
        yield block.keys, block.vectors


def _query(setting: Setting, *, cache: bool) -> Ask:
    return _client(setting, cache=cache).embed_query


def _aquery(setting: Setting, *, cache: bool) -> AskAsync:
    return _client(setting, cache=cache).aembed_query


class _Cache:
    """The folder of the cache by itself."""

    def __init__(self, setting: Setting) -> None:
        from embedcore.storage.keys import Origin
        from embedcore.storage.vectors import VectorStore

        self._store = VectorStore(setting.folder / "vectors", cap=1 << 60)
        self._origin = Origin(model=MODEL, fingerprint="benchmark")

    def put(self, keys: Sequence[bytes], vectors: Array) -> None:
        self._store.put(keys, vectors, self._origin)

    def get(self, keys: Sequence[bytes]) -> Array:
        found = np.full((len(keys), WIDTH), np.nan, dtype=np.float32)

        def take(places: Sequence[int], vectors: Array) -> None:
            found[places] = vectors

        self._store.get(keys, WIDTH, take)
        return found


CLIENT = Client(
    name="embedcore",
    packages=(".", "providers/openai", "providers/hashing"),
    shown=("embedcore", "embedcore-openai", "openai", "numpy"),
    statement="import embedcore",
    ready=f"import embedcore; embedcore.EmbeddingClient('openai:{MODEL}', api_key='{KEY}')",
    first=(
        "import embedcore; "
        f"vector = embedcore.EmbeddingClient('openai:{MODEL}', api_key='{KEY}').embed([text])"
    ),
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
            title="embedcore, cache off",
            label="embedcore, cache off",
            open=lambda setting: _whole(setting, cache=False),
            stream=lambda setting, texts: _stream(setting, texts, cache=False),
            query=lambda setting: _query(setting, cache=False),
            aquery=lambda setting: _aquery(setting, cache=False),
            strict=True,
            missing={"reuse": "the cache is off"},
        ),
        Row(
            name="embedcore-cache",
            title="embedcore, cache on",
            label="embedcore",
            open=lambda setting: _whole(setting, cache=True),
            reuse=lambda setting: _whole(setting, cache=True),
            reuse_how="its cache",
            stream=lambda setting, texts: _stream(setting, texts, cache=True),
            query=lambda setting: _query(setting, cache=True),
            aquery=lambda setting: _aquery(setting, cache=True),
            cache=_Cache,
        ),
        Row(
            name="embedcore-tls",
            title="embedcore over TLS, cache off",
            open=lambda setting: _whole(setting, cache=False),
            tls=True,
            only=("cpu",),
        ),
        Row(
            name="embedcore-processes",
            title="embedcore, four processes sharing the rate limit",
            open=lambda setting: _whole(setting, cache=False),
            processes=4,
            only=("goodput",),
        ),
        Row(
            name="embedcore-eight",
            title="embedcore, eight processes sharing a state folder",
            open=lambda setting: _whole(setting, cache=False),
            processes=8,
            strict=True,
            only=("strict",),
        ),
    ),
)
