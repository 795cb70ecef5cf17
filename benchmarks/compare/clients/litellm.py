"""LiteLLM: ``litellm.embedding`` in a loop of 100; for reuse with its cache on disk."""

from __future__ import annotations

import asyncio

from compare.clients.contract import (
    BATCH,
    KEY,
    MODEL,
    Client,
    Embed,
    Row,
    Setting,
    Vector,
    in_batches,
)


def _open(setting: Setting) -> Embed:
    import litellm

    def embed(texts: list[str]) -> list[list[float]]:
        reply = litellm.embedding(
            model=f"openai/{MODEL}", input=texts, api_key=KEY, api_base=setting.base_url
        )
        return [item["embedding"] for item in reply.data]

    return in_batches(embed)


def _cached(setting: Setting) -> Embed:
    """``aembedding``: a hit of the call that waits fails for want of the proxy's packages."""
    import litellm
    from litellm.caching.caching import Cache, LiteLLMCacheType

    litellm.cache = Cache(type=LiteLLMCacheType.DISK, disk_cache_dir=str(setting.folder))

    async def embed_all(texts: list[str]) -> list[Vector | None]:
        found: list[Vector | None] = []
        for start in range(0, len(texts), BATCH):
            reply = await litellm.aembedding(
                model=f"openai/{MODEL}",
                input=texts[start : start + BATCH],
                api_key=KEY,
                api_base=setting.base_url,
                caching=True,
            )
            found.extend(item["embedding"] for item in reply.data)
            # What it writes to its cache it writes behind the caller's back.
            await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(others, timeout=10) if others else None
        return found

    return lambda texts: asyncio.run(embed_all(texts))


CLIENT = Client(
    name="litellm",
    packages=("litellm[caching]", "numpy"),
    shown=("litellm", "openai"),
    statement="import litellm",
    ready="import litellm; litellm.embedding",
    rows=(
        Row(
            name="litellm",
            title="litellm, loop of 100",
            label="litellm",
            open=_open,
            reuse=_cached,
            reuse_how="its cache on disk, by aembedding: with embedding a hit fails for want of "
            "its proxy's packages",
            slow=True,
        ),
    ),
)
