"""The client's methods as plain functions, over one client and one tracker made at first use."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from embedcore.client import EmbeddingClient
from embedcore.tracker import TokenTracker


@cache
def default_client() -> EmbeddingClient:
    """The client that the functions share: model and budget from the configuration."""
    return EmbeddingClient()


@cache
def default_tracker() -> TokenTracker:
    """The tracker that the functions share."""
    return TokenTracker()


def embed_texts(texts: Iterable[str], check_budget: bool = True) -> list[list[float]]:
    """See ``EmbeddingClient.embed_texts``."""
    return default_client().embed_texts(texts, check_budget)


def batch_embed_texts(texts: Iterable[str], poll_interval: float = 30) -> list[list[float]]:
    """See ``EmbeddingClient.batch_embed_texts``."""
    return default_client().batch_embed_texts(texts, poll_interval)


def check_daily_limit(estimated_tokens: int) -> bool:
    """See ``TokenTracker.check_budget``."""
    return default_tracker().check_budget(estimated_tokens)


def record_usage(tokens: int) -> None:
    """See ``TokenTracker.record_usage``."""
    default_tracker().record_usage(tokens)
