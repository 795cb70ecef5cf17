"""Asks a fake service with its vendor's own client: a script for another environment.

``clients.py NAME URL KEY TEXTS``: prints the vectors as JSON, or the status that it was refused
with.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def cohere(url: str, key: str, texts: list[str]) -> Any:
    import cohere

    client = cohere.ClientV2(api_key=key, base_url=url)
    reply = client.embed(
        model="embed-v4.0",
        texts=texts,
        input_type="search_document",
        embedding_types=["float"],
        truncate="NONE",
        request_options={"max_retries": 0},
    )
    return reply.embeddings.float_


def voyage(url: str, key: str, texts: list[str]) -> Any:
    import voyageai

    client = voyageai.Client(api_key=key, base_url=f"{url}/v1", max_retries=0)
    reply = client.embed(texts, model="voyage-4", input_type="document", truncation=False)
    return reply.embeddings


def ollama(url: str, key: str, texts: list[str]) -> Any:
    import ollama

    headers = {"Authorization": f"Bearer {key}"}
    reply = ollama.Client(host=url, headers=headers).embed(
        model="all-minilm", input=texts, truncate=False
    )
    return [list(row) for row in reply.embeddings]


def mistral(url: str, key: str, texts: list[str]) -> Any:
    from mistralai.client import Mistral

    reply = Mistral(api_key=key, server_url=url).embeddings.create(
        model="mistral-embed", inputs=texts
    )
    return [each.embedding for each in reply.data]


def gemini(url: str, key: str, texts: list[str]) -> Any:
    from google import genai
    from google.genai import types

    options = types.HttpOptions(base_url=url, api_version="v1beta")
    # Kept: a client that nothing refers to closes itself before it has asked.
    client = genai.Client(api_key=key, http_options=options)
    reply = client.models.embed_content(
        model="gemini-embedding-001",
        contents=texts,
        config=types.EmbedContentConfig(task_type="RETRIEVAL_DOCUMENT"),
    )
    return [each.values for each in reply.embeddings]


def status_of(error: Exception) -> int | None:
    """By whatever name the client has it."""
    for name in ("status_code", "code", "http_status"):
        found = getattr(error, name, None)
        if isinstance(found, int):
            return found
    return None


def main() -> None:
    name, url, key, texts = sys.argv[1:]
    ask = {
        "cohere": cohere,
        "gemini": gemini,
        "mistral": mistral,
        "ollama": ollama,
        "voyage": voyage,
    }[name]
    try:
        said: dict[str, Any] = {"vectors": ask(url, key, json.loads(texts))}
    except Exception as error:  # noqa: BLE001 - each client has its own
        said = {"error": type(error).__name__, "status": status_of(error)}
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
