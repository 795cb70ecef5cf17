"""The openai SDK, as its users write it: a loop of 100 texts, and 16 threads of 100."""

from __future__ import annotations

from collections.abc import Callable

from compare.clients.contract import (
    KEY,
    MODEL,
    Client,
    Embed,
    Row,
    Setting,
    in_batches,
    in_threads,
)


def _batch(setting: Setting) -> Callable[[list[str]], list[list[float]]]:
    from openai import OpenAI

    client = OpenAI(api_key=KEY, base_url=setting.base_url)

    def embed(texts: list[str]) -> list[list[float]]:
        reply = client.embeddings.create(model=MODEL, input=texts)
        return [item.embedding for item in reply.data]

    return embed


def _loop(setting: Setting) -> Embed:
    return in_batches(_batch(setting))


def _threads(setting: Setting) -> Embed:
    return in_threads(_batch(setting))


CLIENT = Client(
    name="openai_sdk",
    packages=("openai", "numpy"),
    shown=("openai", "numpy"),
    statement="import openai",
    ready=f"import openai; openai.OpenAI(api_key='{KEY}')",
    rows=(
        Row(name="openai", label="openai SDK, loop", title="openai SDK, loop of 100", open=_loop),
        Row(
            name="openai-threads",
            label="openai SDK, 16 threads",
            title="openai SDK, 16 threads of 100",
            open=_threads,
        ),
    ),
)
