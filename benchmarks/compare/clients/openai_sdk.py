"""The openai SDK, as its users write it: loops and threads of 100 texts, and questions."""

from __future__ import annotations

from collections.abc import Callable

from compare.clients.contract import (
    KEY,
    MODEL,
    Ask,
    AskAsync,
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


def _query(setting: Setting) -> Ask:
    embed = _batch(setting)
    return lambda text: embed([text])[0]


def _aquery(setting: Setting) -> AskAsync:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key=KEY, base_url=setting.base_url)

    async def ask(text: str) -> list[float]:
        reply = await client.embeddings.create(model=MODEL, input=text)
        return reply.data[0].embedding

    return ask


CLIENT = Client(
    name="openai_sdk",
    packages=("openai", "numpy"),
    shown=("openai", "numpy"),
    statement="import openai",
    ready=f"import openai; openai.OpenAI(api_key='{KEY}')",
    first=(
        "import openai; "
        f"vector = openai.OpenAI().embeddings.create(model='{MODEL}', input=text).data[0].embedding"
    ),
    rows=(
        Row(
            name="openai",
            label="openai SDK, loop",
            title="openai SDK, loop of 100; its AsyncOpenAI for questions",
            open=_loop,
            query=_query,
            aquery=_aquery,
        ),
        Row(
            name="openai-threads",
            label="openai SDK, 16 threads",
            title="openai SDK, 16 threads of 100",
            open=_threads,
        ),
    ),
)
