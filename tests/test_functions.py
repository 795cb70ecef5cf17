"""The plain functions: one client and one tracker behind all of them."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, strategies as st

import embedcore
from embedcore import (
    ConfigurationError,
    EmbeddingClient,
    TokenBudgetExceeded,
    TokenTracker,
    batch_embed_texts,
    check_daily_limit,
    embed_texts,
    estimate_tokens,
    functions,
    record_usage,
)
from embedcore.testing import FakeOpenAI, vectors_of


@pytest.fixture
def server(monkeypatch):
    tokenizer = pytest.importorskip("embedcore_openai.tokenizer").Cl100kTokenizer()
    with FakeOpenAI(count=tokenizer.count) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
        yield server


def test_texts_in_vectors_out(server):
    texts = ["a", "b", "a"]
    assert embed_texts(texts) == vectors_of(texts, 1536).tolist()
    assert batch_embed_texts(texts, poll_interval=30) == vectors_of(texts, 1536).tolist()
    assert TokenTracker().get_usage_today()["tokens_used"] == server.meter.billed_tokens


def test_one_client_and_one_tracker_are_behind_them(server):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: embed_texts([f"text {n}"]), range(16)))
    assert functions.default_client() is functions.default_client()
    assert functions.default_tracker() is functions.default_tracker()
    assert server.meter.billed_requests == 16


def test_the_limit_of_the_environment_holds(server, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "10")
    assert check_daily_limit(10)
    assert not check_daily_limit(11)
    record_usage(8)
    assert check_daily_limit(2)
    assert not check_daily_limit(3)
    with pytest.raises(TokenBudgetExceeded):
        embed_texts(["one two three four"])
    assert embed_texts(["one two three four"], check_budget=False)
    assert not check_daily_limit(1)
    assert server.meter.billed_requests == 1


def test_without_a_limit_everything_fits():
    assert check_daily_limit(10**15)
    record_usage(10**9)
    assert check_daily_limit(10**15)


def test_a_missing_key_is_told_by_the_function_and_not_kept(monkeypatch):
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        embed_texts(["a"])
    monkeypatch.setenv("EMBEDCORE_MODEL", "hashing:64")
    functions.default_client.cache_clear()
    assert len(embed_texts(["a"])[0]) == 64


@pytest.mark.parametrize(
    ("texts", "tokens"),
    [
        (["hello world"], 3),
        ("hello world", 3),
        ([], 0),
        ([""], 0),
        (["a"], 1),
        (["abcd", "abcde"], 1 + 2),
        (["日本語の文"], 2),
    ],
)
def test_the_estimate(texts, tokens):
    assert estimate_tokens(texts) == tokens


@given(st.lists(st.text()))
def test_the_estimate_is_four_characters_to_a_token_rounded_up_per_text(texts):
    assert estimate_tokens(texts) == sum((len(text) + 3) // 4 for text in texts)
    assert estimate_tokens(iter(texts)) == estimate_tokens(texts)


def test_signatures_are_those_that_were_promised():
    def form(function):
        return [
            (name, parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and name != "self"
        ]

    none = inspect.Parameter.empty
    assert form(embed_texts) == [("texts", none), ("check_budget", True)]
    assert form(batch_embed_texts) == [("texts", none), ("poll_interval", 30)]
    assert form(TokenTracker) == [("daily_limit", None)]
    assert form(TokenTracker.check_budget) == [("estimated_tokens", none)]
    assert form(TokenTracker.record_usage) == [("tokens", none)]
    assert form(EmbeddingClient) == [("model", None), ("api_key", None)]
    assert form(EmbeddingClient.embed_text) == [("text", none)]
    assert form(EmbeddingClient.embed_texts) == form(embed_texts)
    assert form(EmbeddingClient.batch_embed_texts) == form(batch_embed_texts)
    assert form(EmbeddingClient.embed) == [("texts", none)]
    assert embedcore.embed_texts is embed_texts
