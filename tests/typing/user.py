"""Checked by mypy, never run: what a program that uses embedcore may rely on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import assert_type

import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

import embedcore
from embedcore import (
    AsyncEmbeddingStream,
    Block,
    BudgetExceeded,
    Config,
    CostBudgetExceeded,
    EmbeddingClient,
    EmbeddingError,
    EmbeddingResult,
    EmbeddingStream,
    Plan,
    RateLimited,
    RowOutcome,
    Spending,
    StoppedAt,
    TokenBudgetExceeded,
    TokenTracker,
)
from embedcore.events import Event, Progress


def now(client: EmbeddingClient, texts: list[str]) -> None:
    assert_type(client.model, str)
    assert_type(client.provider, str)
    assert_type(client.dimensions, int | None)
    assert_type(client.embed_text("a"), list[float])
    assert_type(client.embed_texts(texts), list[list[float]])
    assert_type(client.embed_texts((text for text in texts), check_budget=False), list[list[float]])
    assert_type(client.embed_documents(texts), list[list[float]])
    assert_type(client.embed_query("a"), list[float])
    assert_type(client.batch_embed_texts(texts, 60, fallback="error"), list[list[float]])
    assert_type(client.plan(texts), Plan)


def result(client: EmbeddingClient) -> EmbeddingResult:
    found = client.embed(["a"], input_type="query", on_error="keep", progress=True)
    assert_type(found.vectors, NDArray[np.float32])
    assert_type(found.ok, NDArray[np.bool_])
    assert_type(found.outcomes, Sequence[RowOutcome])
    assert_type(found.outcomes[0], RowOutcome)
    assert_type(found.outcomes[0].error, EmbeddingError | None)
    assert_type(found.usage, Spending)
    assert_type(found.usage.cost, Decimal)
    assert_type(found.fingerprint, str)
    return found


async def awaited(client: EmbeddingClient) -> None:
    assert_type(await client.aembed_text("a"), list[float])
    assert_type(await client.aembed_texts(["a"]), list[list[float]])
    assert_type(await client.aembed_documents(["a"]), list[list[float]])
    assert_type(await client.aembed_query("a"), list[float])
    assert_type(await client.aembed(["a"]), EmbeddingResult)


def streamed(client: EmbeddingClient, rows: list[dict[str, str]]) -> None:
    with client.embed_iter(rows, text="body", key="id", on_budget="stop", block_size=8) as stream:
        assert_type(stream, EmbeddingStream)
        for block in stream:
            assert_type(block, Block)
            assert_type(block.vectors, NDArray[np.float32])
            assert_type(block.ok, NDArray[np.bool_])
            assert_type(block.first, int)
            assert_type(block.usage, Spending)
            for _, vector in block:
                assert_type(vector, NDArray[np.float32] | None)
        assert_type(stream.stopped_at, StoppedAt | None)
        assert_type(stream.salvaged, list[Block])
        assert_type(stream.usage, Spending)


async def streamed_and_awaited(client: EmbeddingClient) -> None:
    async with client.aembed_iter(("key", "text") for _ in range(2)) as stream:
        assert_type(stream, AsyncEmbeddingStream)
        async for block in stream:
            assert_type(block, Block)


def show(progress: Progress) -> None:
    assert_type(progress.done, int)


def hear(event: Event) -> None:
    del event


def ways_to_build(path: Path, config: Config) -> None:
    with EmbeddingClient() as client:
        client.embed(["a"], progress=show)
    EmbeddingClient("docs", "key")
    EmbeddingClient("openai:m", SecretStr("key"), config=path)
    EmbeddingClient(api_key=lambda: "key", config={"scope": "s"}, observers=[hear])
    EmbeddingClient(config=config, scope="s", options={"dimensions": 8})
    assert_type(Config.load(), Config)


def tracked() -> None:
    tracker = TokenTracker(daily_limit=1000, scope="s")
    today = tracker.get_usage_today()
    assert_type(today["tokens_used"], int)
    assert_type(today["requests"], int)
    assert_type(today["remaining"], int | None)
    assert_type(today["limit"], int | None)
    assert_type(tracker.check_budget(5), bool)
    tracker.record_usage(5)
    tracker.reset()


def functions() -> None:
    assert_type(embedcore.embed_texts(["a"]), list[list[float]])
    assert_type(embedcore.batch_embed_texts(["a"]), list[list[float]])
    assert_type(embedcore.check_daily_limit(5), bool)
    assert_type(embedcore.estimate_tokens(["a"]), int)
    embedcore.record_usage(5)


def failures(client: EmbeddingClient) -> None:
    try:
        client.embed_texts(["a"])
    except TokenBudgetExceeded as error:
        assert_type(error.limit, int)
    except CostBudgetExceeded as error:
        assert_type(error.limit, Decimal)
    except BudgetExceeded as error:
        assert_type(error.limit, int | Decimal)
        assert_type(error.resets_at, datetime | None)
    except RateLimited as error:
        assert_type(error.retry_after, float | None)
    except EmbeddingError as error:
        assert_type(error.retryable, bool)
        assert_type(error.position, int | None)
        assert_type(error.partial, EmbeddingResult | None)


def refused_by_the_checker(client: EmbeddingClient) -> None:
    client.embed_texts([b"bytes"])  # type: ignore[list-item]
    client.embed(["a"], on_error="ignore")  # type: ignore[arg-type]
    client.embed_iter(["a"], on_budget="pause")  # type: ignore[arg-type]
    client.embed(["a"], None)  # type: ignore[call-arg,misc,unused-ignore]
    EmbeddingClient(embeder=None)  # type: ignore[call-arg]
