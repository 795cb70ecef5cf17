"""Chroma's ``OpenAIEmbeddingFunction``, called with 100 texts at a time: it does not split."""

from __future__ import annotations

from compare.clients.contract import KEY, MODEL, Client, Embed, Row, Setting, in_batches


def _open(setting: Setting) -> Embed:
    from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

    return in_batches(
        OpenAIEmbeddingFunction(api_key=KEY, api_base=setting.base_url, model_name=MODEL)
    )


CLIENT = Client(
    name="chroma",
    packages=("chromadb", "openai", "numpy"),
    shown=("chromadb", "openai"),
    statement="import chromadb",
    ready=(
        "from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction; "
        f"OpenAIEmbeddingFunction(api_key='{KEY}', model_name='{MODEL}')"
    ),
    rows=(
        Row(
            name="chroma",
            title="chromadb, OpenAIEmbeddingFunction, loop of 100",
            label="chromadb",
            open=_open,
            missing={"reuse": "has no cache of its own: it is a database"},
        ),
    ),
)
