"""Haystack: ``OpenAIDocumentEmbedder.run`` with its defaults, which means batches of 32."""

from __future__ import annotations

from compare.clients.contract import KEY, MODEL, Client, Embed, Partly, Row, Setting, Vector


def _open(setting: Setting) -> Embed:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder
    from haystack.utils import Secret

    embedder = OpenAIDocumentEmbedder(
        api_key=Secret.from_token(KEY),
        model=MODEL,
        api_base_url=setting.base_url,
        progress_bar=False,
    )

    def embed(texts: list[str]) -> list[Vector | None]:
        documents = embedder.run(documents=[Document(content=text) for text in texts])
        found = [document.embedding for document in documents["documents"]]
        if None in found:
            raise Partly(found, f"{found.count(None)} documents came back without a vector")
        return found

    return embed


CLIENT = Client(
    name="haystack",
    packages=("haystack-ai", "numpy"),
    shown=("haystack-ai", "openai"),
    statement="import haystack.components.embedders",
    ready=(
        "from haystack.components.embedders import OpenAIDocumentEmbedder; "
        "from haystack.utils import Secret; "
        f"OpenAIDocumentEmbedder(api_key=Secret.from_token('{KEY}'), model='{MODEL}')"
    ),
    rows=(
        Row(
            name="haystack",
            title="haystack (batches of 32)",
            label="haystack",
            open=_open,
            slow=True,
            missing={"reuse": "has no cache of vectors"},
        ),
    ),
)
