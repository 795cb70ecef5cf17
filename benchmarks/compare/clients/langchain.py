"""langchain-openai: ``OpenAIEmbeddings.embed_documents`` with its defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.clients.contract import KEY, MODEL, Client, Embed, Row, Setting

if TYPE_CHECKING:
    from langchain_openai import OpenAIEmbeddings


def _embeddings(setting: Setting) -> OpenAIEmbeddings:
    from langchain_openai import OpenAIEmbeddings
    from pydantic import SecretStr

    return OpenAIEmbeddings(model=MODEL, api_key=SecretStr(KEY), base_url=setting.base_url)


def _open(setting: Setting) -> Embed:
    return _embeddings(setting).embed_documents


def _cached(setting: Setting) -> Embed:
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_classic.storage import LocalFileStore

    return CacheBackedEmbeddings.from_bytes_store(
        _embeddings(setting),
        LocalFileStore(setting.folder),
        namespace=MODEL,
        key_encoder="blake2b",
    ).embed_documents


CLIENT = Client(
    name="langchain",
    packages=("langchain-openai", "langchain-classic", "numpy"),
    shown=("langchain-openai", "openai"),
    statement="import langchain_openai",
    ready=(
        "from langchain_openai import OpenAIEmbeddings; "
        f"OpenAIEmbeddings(model='{MODEL}', api_key='{KEY}')"
    ),
    rows=(
        Row(
            name="langchain",
            title="langchain-openai",
            label="langchain-openai",
            open=_open,
            reuse=_cached,
            reuse_how="CacheBackedEmbeddings on a LocalFileStore",
        ),
    ),
)
