"""LlamaIndex: ``OpenAIEmbedding.get_text_embedding_batch`` in its default batches of 100.

Its cache belongs to the ingestion pipeline, which keeps its nodes with their vectors in one file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.clients.contract import BATCH, KEY, MODEL, Client, Embed, Row, Setting, Vector

if TYPE_CHECKING:
    from llama_index.embeddings.openai import OpenAIEmbedding


def _embedding(setting: Setting) -> OpenAIEmbedding:
    from llama_index.embeddings.openai import OpenAIEmbedding

    return OpenAIEmbedding(
        model=MODEL, api_key=KEY, api_base=setting.base_url, embed_batch_size=BATCH
    )


def _open(setting: Setting) -> Embed:
    return _embedding(setting).get_text_embedding_batch


def _cached(setting: Setting) -> Embed:
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.schema import TextNode

    def embed(texts: list[str]) -> list[Vector | None]:
        pipeline = IngestionPipeline(transformations=[_embedding(setting)])
        if any(setting.folder.iterdir()):
            pipeline.load(str(setting.folder))
            before = True
        else:
            before = False
        # The key of its cache has the nodes' ids in it: only fixed ones are found again.
        nodes = [TextNode(text=text, id_=str(place)) for place, text in enumerate(texts)]
        done = pipeline.run(nodes=nodes)
        if not before:
            pipeline.persist(str(setting.folder))
        return [node.embedding for node in done]

    return embed


CLIENT = Client(
    name="llama_index",
    packages=("llama-index-embeddings-openai", "numpy"),
    shown=("llama-index-embeddings-openai", "llama-index-core", "openai"),
    statement="import llama_index.embeddings.openai",
    ready=(
        "from llama_index.embeddings.openai import OpenAIEmbedding; "
        f"OpenAIEmbedding(model='{MODEL}', api_key='{KEY}')"
    ),
    rows=(
        Row(
            name="llama-index",
            title="llama-index",
            label="llama-index",
            open=_open,
            reuse=_cached,
            reuse_how="its IngestionPipeline's cache, loaded from its file",
        ),
    ),
)
