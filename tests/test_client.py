"""The front door: what a client is built from, what it answers, and how it is shared."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pydantic import SecretStr

from embedcore import (
    Config,
    ConfigurationError,
    EmbeddingClient,
    EmbeddingResult,
    InputRejected,
    RateLimited,
    RequestRejected,
    RowOutcome,
    StorageReadOnly,
    TokenBudgetExceeded,
    TokenTracker,
    UnknownProvider,
)
from embedcore.events import Progress, RequestFinished
from embedcore.money import in_dollars
from embedcore.provider.types import Price
from embedcore.testing import FakeEmbedder, FakeOpenAI, vector_of, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

MODEL = "text-embedding-3-small"
CALM = {"retry": {"first_wait": 0.0, "attempts": 2}}


def expected(texts, width=32):
    return vectors_of(texts, width).tolist()


@pytest.fixture
def fake():
    return FakeEmbedder()


@pytest.fixture
def client(fake):
    with EmbeddingClient(embedder=fake, config=CALM) as client:
        yield client


@pytest.fixture
def server(monkeypatch):
    """OpenAI as every client of this test finds it: by the environment."""
    with FakeOpenAI() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        yield server


# Building one


def test_the_defaults_need_no_key_and_no_network(monkeypatch, state_home):
    def no_network(*_):
        raise AssertionError("a client that is only built reaches for the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    client = EmbeddingClient()
    assert (client.provider, client.model, client.scope) == ("openai", MODEL, "default")
    assert client.dimensions == 1536
    assert client.info.price is not None
    assert len(client.fingerprint) == 32
    client.close()
    assert not EmbeddingClient().__dict__["_opened"].take(), "nothing is opened before it is used"


@pytest.mark.fault(130)
@pytest.mark.parametrize("key", [None, "", "   "])
def test_a_missing_key_is_a_clear_error_at_the_first_call(key, monkeypatch):
    client = EmbeddingClient(api_key=key)
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        client.embed_text("hello")
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        client.embed_texts(["hello"])
    assert TokenTracker().get_usage_today()["tokens_used"] == 0
    client.close()


@pytest.mark.fault(130)
@pytest.mark.parametrize("key", ["sk-a\n", "sk-a\r\nX-Other: 1", "sk a", "\x00"])
def test_a_key_that_would_inject_a_header_is_refused(server, key):
    with (
        EmbeddingClient(api_key=key) as client,
        pytest.raises(ConfigurationError, match="API key"),
    ):
        client.embed_text("hello")
    assert server.requests == []


@pytest.mark.parametrize(
    ("model", "provider", "name"),
    [
        (MODEL, "openai", MODEL),
        (f"openai:{MODEL}", "openai", MODEL),
        ("openai:my/model:0:latest", "openai", "my/model:0:latest"),
        ("hashing:64", "hashing", "64"),
        ("docs", "openai", "text-embedding-3-large"),
        (None, "hashing", "128"),
    ],
)
def test_the_forms_of_a_models_name(model, provider, name):
    config = {
        "model": "small",
        "profiles": {
            "small": {"model": "hashing:128"},
            "docs": {"model": "text-embedding-3-large"},
        },
    }
    client = EmbeddingClient(model, config=config)
    assert (client.provider, client.model) == (provider, name)
    bare = EmbeddingClient("64", config={"provider": "hashing"})
    assert (bare.provider, bare.model) == ("hashing", "64")


@pytest.mark.parametrize("model", ["", ":m", "openai:", "openai: ", 5])
def test_no_models_name(model):
    with pytest.raises(ConfigurationError, match="model"):
        EmbeddingClient(model)


def test_an_unknown_provider_names_no_package_that_may_be_anybodys():
    with pytest.raises(UnknownProvider, match="If you have its package, install it; or write one"):
        EmbeddingClient("acme:m")


@pytest.mark.fault(129)
def test_options_are_checked_when_a_client_is_built(tmp_path):
    with pytest.raises(ConfigurationError, match=r"Python.*timeuot.*'timeout'"):
        EmbeddingClient(options={"timeuot": 3})
    path = tmp_path / "e.toml"
    path.write_text("[options.openai]\ntimeout = -1\n")
    with pytest.raises(ConfigurationError) as caught:
        EmbeddingClient(config=path)
    assert str(path) in str(caught.value)
    assert "timeout" in str(caught.value)


@pytest.mark.fault(131)
def test_a_key_in_a_file_is_refused_with_the_file(tmp_path, canary):
    for table in ("options.openai", "profiles.p.options"):
        path = tmp_path / "e.toml"
        path.write_text(f'model = "p"\nprofiles.p.model = "m"\n[{table}]\napi_key = "{canary}"\n')
        with pytest.raises(ConfigurationError) as caught:
            EmbeddingClient(config=path)
        assert str(path) in str(caught.value)
        assert canary not in str(caught.value)


def test_a_key_by_reference_by_value_and_by_call(server, monkeypatch, tmp_path):
    monkeypatch.setenv("TEAM_KEY", server.api_key)
    path = tmp_path / "e.toml"
    path.write_text('[options.openai]\napi_key = "$TEAM_KEY"\n')
    texts = ["a"]
    for client in (
        EmbeddingClient(config=path),
        EmbeddingClient(api_key=server.api_key),
        EmbeddingClient(api_key=SecretStr(server.api_key)),
        EmbeddingClient(api_key=lambda: server.api_key),
        EmbeddingClient(options={"api_key": server.api_key}),
        EmbeddingClient(config={"options": {"openai": {"api_key": server.api_key}}}),
    ):
        with client:
            assert client.embed_texts(texts) == expected(texts, 1536)
    monkeypatch.setenv("TEAM_KEY", "")
    with (
        EmbeddingClient(config=path) as client,
        pytest.raises(ConfigurationError, match=r"\$TEAM_KEY"),
    ):
        client.embed_texts(texts)


def test_a_callable_key_is_asked_again_for_each_request(server):
    # Once more after a refusal, since it may have expired, and then not before the next request.
    given = iter(["sk-old-and-expired", "sk-expired-as-well", server.api_key])
    with EmbeddingClient(api_key=lambda: next(given), config=CALM) as client:
        with pytest.raises(Exception, match="key"):
            client.embed_text("a")
        assert client.embed_text("a")


@pytest.mark.parametrize("given", [{"model": "m"}, {"api_key": "k"}, {"options": {"a": 1}}])
def test_an_embedder_takes_no_settings_of_a_provider(fake, given):
    with pytest.raises(ConfigurationError, match="embedder="):
        EmbeddingClient(embedder=fake, **given)


# Texts in, vectors out


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)))
@settings(max_examples=40, deadline=None)
def test_row_i_is_the_vector_of_text_i(texts):
    fake = FakeEmbedder(info=replace(FAKE_INFO, max_texts_per_request=3))
    with EmbeddingClient(embedder=fake, config={"cache": False}) as client:
        assert client.embed_texts(texts) == expected(texts)
        assert client.embed_documents(iter(texts)) == expected(texts)
        result = client.embed(texts)
    assert np.array_equal(result.vectors, vectors_of(texts, 32))
    assert result.vectors.dtype == np.float32
    assert result.vectors.shape == (len(texts), 32)
    assert result.ok.dtype == np.bool_
    assert result.ok.all()
    first = [texts.index(text) == row for row, text in enumerate(texts)]
    assert [not reused for reused in result.reused] == first
    assert all(len(call.texts) <= 3 for call in fake.calls)


def test_one_text(client, fake):
    vector = client.embed_text("hello")
    assert vector == vector_of("hello", 32).tolist()
    assert all(type(component) is float for component in vector)
    assert type(client.embed_texts(["hello"])[0]) is list


def test_every_door_leads_to_the_same_vector(client):
    one = vector_of("hello", 32).tolist()

    async def awaited():
        return [
            await client.aembed_text("hello"),
            (await client.aembed_texts(["hello"]))[0],
            (await client.aembed_documents(["hello"]))[0],
            await client.aembed_query("hello"),
            (await client.aembed(["hello"])).vectors[0].tolist(),
        ]

    assert client.embed_query("hello") == one
    assert client.batch_embed_texts(["hello"]) == [one]
    assert asyncio.run(awaited()) == [one] * 5


def test_the_kind_of_text_is_told_to_models_that_know_it():
    fake = FakeEmbedder(info=replace(FAKE_INFO, input_types=("query", "document", "code")))
    with EmbeddingClient(embedder=fake) as client:
        client.embed_query("q")
        client.embed_documents(["d"])
        client.embed(["c"], input_type="code")
        client.embed_text("n")
        with pytest.raises(ConfigurationError, match="input_type"):
            client.embed(["x"], input_type="image")
    assert [call.input_type for call in fake.calls] == ["query", "document", "code", None]


def test_to_other_models_a_query_is_a_text(client, fake):
    client.embed_query("q")
    assert fake.calls[0].input_type is None


@pytest.mark.fault(18)
def test_no_texts_no_call(client, fake):
    assert client.embed_texts([]) == []
    assert client.batch_embed_texts([]) == []
    result = client.embed([])
    assert result.vectors.shape == (0, 32)
    assert len(result) == 0
    assert fake.calls == []
    assert TokenTracker().get_usage_today()["requests"] == 0


@pytest.mark.fault(4)
@pytest.mark.parametrize("texts", ["hello", b"hello"])
def test_one_text_is_no_list(client, fake, texts):
    for call in (client.embed_texts, client.embed, client.embed_documents, client.plan):
        with pytest.raises(InputRejected, match="list"):
            call(texts)
    assert fake.calls == []


@pytest.mark.fault(19)
def test_a_list_may_change_while_it_is_awaited(client):
    texts = [f"text {row}" for row in range(5)]
    before = expected(texts)

    async def main():
        call = asyncio.create_task(client.aembed_texts(texts))
        await asyncio.sleep(0)
        texts.clear()
        return await call

    assert asyncio.run(main()) == before


def test_what_became_of_every_row(fake):
    fake.info = replace(FAKE_INFO, max_input_tokens=4)
    with EmbeddingClient(embedder=fake, config={"on_empty": "keep"}) as client:
        result = client.embed(["short", "short", "", "a longer text than four tokens"])
    assert [outcome.state for outcome in result.outcomes] == ["ok", "reused", "failed", "ok"]
    assert list(result.ok) == [True, True, False, True]
    assert np.isnan(result.vectors[2]).all()
    assert np.array_equal(result.vectors[3], vector_of("a longer text th", 32))
    assert result.outcomes[3] == RowOutcome(tokens_cut=result.tokens_cut[3])
    assert result.tokens_cut[3] == 8 - 4
    assert isinstance(result.outcomes[2].error, InputRejected)
    assert result.outcomes[2].error is result.errors[2]
    assert result.outcomes[-1] == result.outcomes[3]
    assert len(result.outcomes[1:3]) == 2
    assert result.model == "fake:fake-embedding"
    assert result.fingerprint == client.fingerprint
    assert (result.usage.tokens, result.usage.requests) == (fake.billed_tokens, len(fake.calls))
    assert result.usage.cost == Decimal(fake.billed_tokens) * Decimal("0.02") / 10**6
    assert result.usage.exact
    assert result.usage.unconfirmed_tokens == 0
    assert "3 ok" in repr(result)
    assert "short" not in repr(result)


def test_keep_notes_what_is_wrong_with_a_row(client, fake):
    texts = ["good", None, "", "\ud800", "good too"]
    result = client.embed(texts, on_error="keep")
    assert list(result.ok) == [True, False, False, False, True]
    assert sorted(result.errors) == [1, 2, 3]
    assert np.array_equal(result.vectors[[0, 4]], vectors_of(["good", "good too"], 32))
    with pytest.raises(InputRejected) as caught:
        client.embed(texts)
    assert caught.value.position == 1
    assert len(fake.calls) == 1, "nothing is sent of a call that is refused"


def test_keep_notes_transient_errors_and_raises_what_concerns_every_row():
    info = replace(FAKE_INFO, max_texts_per_request=1, max_concurrency=1)

    def script(request, number):
        return RateLimited("too fast", retry_after=3600) if "slow" in request.texts[0] else None

    with EmbeddingClient(embedder=FakeEmbedder(info=info, script=script), config=CALM) as client:
        result = client.embed(["a", "slow", "b"], on_error="keep")
        assert list(result.ok) == [True, False, True]
        assert isinstance(result.errors[1], RateLimited)
        with pytest.raises(RateLimited) as caught:
            client.embed(["a", "slow", "b"])
    # It says which row it cost, and blames none: the rate is about no text.
    assert caught.value.message.startswith("row 1: ")
    assert caught.value.position is None
    assert isinstance(caught.value.partial, EmbeddingResult)
    assert caught.value.partial.ok[0]
    tight = {"budget": {"daily_token_limit": 1}}
    with (
        EmbeddingClient(embedder=FakeEmbedder(), config=tight) as client,
        pytest.raises(TokenBudgetExceeded) as refused,
    ):
        client.embed(["much longer than one token"], on_error="keep")
    assert not refused.value.partial.ok.any()


@pytest.mark.parametrize("value", ["ignore", None, True])
def test_on_error_has_two_values(client, value):
    with pytest.raises(ConfigurationError, match="on_error"):
        client.embed(["a"], on_error=value)


def test_check_budget_false_keeps_no_limit_and_still_records(fake):
    with EmbeddingClient(embedder=fake, config={"budget": {"daily_token_limit": 1}}) as client:
        with pytest.raises(TokenBudgetExceeded):
            client.embed_texts(["more than a token"])
        assert fake.calls == []
        assert client.embed_texts(["more than a token"], check_budget=False)
        assert client.embed_texts(["more than a token"], False)
    used = TokenTracker().get_usage_today()["tokens_used"]
    assert used == fake.billed_tokens > 1


def test_a_plan_sends_and_spends_nothing(client, fake):
    plan = client.plan(["a", "b", "a", ""], exact=True)
    assert (plan.rows, plan.unique, plan.rejected, plan.requests) == (4, 2, 1, 1)
    assert plan.exact
    assert plan.tokens == 2
    assert plan.cost == in_dollars(2 * 20_000)
    assert fake.calls == []
    assert TokenTracker().get_usage_today()["requests"] == 0


def test_progress_ends_with_every_row(fake):
    fake.info = replace(FAKE_INFO, max_texts_per_request=2)
    seen: list[Progress] = []
    with EmbeddingClient(embedder=fake) as client:
        client.embed([f"t{row}" for row in range(7)], progress=seen.append)
        assert client.embed_text("x")
    assert all(isinstance(event, Progress) for event in seen)
    assert max(event.done for event in seen) == 7
    assert {event.total for event in seen} == {7}
    assert max(event.tokens for event in seen) == fake.billed_tokens - 1


def test_progress_without_a_terminal_is_logged(client, caplog):
    with caplog.at_level(logging.INFO, logger="embedcore"):
        client.embed(["a", "b"], progress=True)
    assert any("2 of 2 texts" in record.getMessage() for record in caplog.records)


def test_a_broken_progress_does_no_harm(client, caplog):
    def broken(_):
        raise RuntimeError("my bar fell over")

    assert client.embed(["a"], progress=broken).ok.all()
    assert "my bar fell over" in caplog.text


def test_observers_hear_of_every_request(fake):
    seen = []

    def broken(_):
        raise RuntimeError("deaf")

    with EmbeddingClient(embedder=fake, observers=[broken, seen.append]) as client:
        client.embed_texts(["a", "b"])
    (finished,) = [event for event in seen if isinstance(event, RequestFinished)]
    assert (finished.inputs, finished.tokens, finished.reported) == (2, 2, True)


# A batch, before there are batches


def test_a_batch_warns_once_with_both_prices(client, fake, caplog):
    assert client.batch_embed_texts(["a"], 30) == expected(["a"])
    client.batch_embed_texts(["b"], poll_interval=1)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "$0.02" in warning.getMessage()
    assert "$0.01" in warning.getMessage()
    assert "fake:fake-embedding" in warning.getMessage()
    with pytest.raises(ConfigurationError, match=r"\$0\.02 per million tokens, and \$0\.01 in"):
        client.batch_embed_texts(["c"], fallback="error")
    assert len(fake.calls) == 2


@pytest.mark.parametrize(
    ("price", "words"),
    [(None, "not known"), (Price(), "costs nothing"), (Price(immediate=Decimal(3)), "$3 per")],
)
def test_a_batch_names_what_is_known_of_the_price(caplog, price, words):
    fake = FakeEmbedder(info=replace(FAKE_INFO, price=price))
    with EmbeddingClient(embedder=fake) as client:
        client.batch_embed_texts(["a"])
    assert words in caplog.text


@pytest.mark.parametrize("interval", [0, -1, float("nan")])
def test_a_batch_looks_again_after_some_time(client, fake, interval):
    with pytest.raises(ConfigurationError, match="poll_interval"):
        client.batch_embed_texts(["a"], interval)
    with pytest.raises(ConfigurationError, match="fallback"):
        client.batch_embed_texts(["a"], fallback="eror")
    assert fake.calls == []


# Sharing, closing, forking, pickling


def test_many_threads_share_a_client(fake):
    fake.info = replace(FAKE_INFO, max_texts_per_request=4)
    with EmbeddingClient(embedder=fake) as client, ThreadPoolExecutor(16) as pool:

        def work(number):
            texts = [f"thread {number} text {row}" for row in range(9)]
            return client.embed_texts(texts) == expected(texts)

        assert all(pool.map(work, range(32)))
    assert TokenTracker().get_usage_today()["tokens_used"] == fake.billed_tokens
    assert fake.meter.billed_twice == {}


def test_a_client_is_opened_once_for_all_threads(monkeypatch, fake):
    from embedcore import assembly

    built = []
    real = assembly.build

    def slow(*arguments):
        built.append(arguments)
        time.sleep(0.05)
        return real(*arguments)

    monkeypatch.setattr(assembly, "build", slow)
    with EmbeddingClient(embedder=fake) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(client.embed_text, "abcdefgh"))
    assert len(built) == 1


def test_a_closed_client_opens_again(client, fake):
    client.close()
    assert fake.times_closed == 0, "nothing was open"
    client.embed_text("a")
    client.close()
    client.close()
    assert fake.times_closed == 1
    assert client.embed_text("b") == vector_of("b", 32).tolist()
    with client as same:
        assert same is client
        same.embed_text("c")
    assert fake.times_closed == 2


def test_closing_ends_the_threads(fake):
    others = set(threading.enumerate())

    def ours():
        return [one for one in set(threading.enumerate()) - others if one.name == "embedcore"]

    fake.info = replace(FAKE_INFO, max_texts_per_request=1)
    with EmbeddingClient(embedder=fake) as client:
        client.embed_texts(list("abcdefgh"))
        assert ours()
    for thread in ours():
        thread.join(timeout=120)
    assert ours() == []


def test_a_client_that_is_dropped_leaves_nothing_behind(fake):
    others = set(threading.enumerate())
    client = EmbeddingClient(embedder=fake)
    client.embed_text("a")
    del client
    gc.collect()
    for thread in set(threading.enumerate()) - others:
        if thread.name == "embedcore":
            thread.join(timeout=120)
            assert not thread.is_alive()


def test_two_clients_with_one_state_share_a_budget(fake):
    config = {"budget": {"daily_token_limit": 10}}
    with (
        EmbeddingClient(embedder=fake, config=config) as one,
        EmbeddingClient(embedder=FakeEmbedder(), config=config) as other,
    ):
        one.embed_texts(["x" * 24])
        with pytest.raises(TokenBudgetExceeded) as caught:
            other.embed_texts(["y" * 20])
        assert (caught.value.limit, caught.value.spent, caught.value.asked) == (10, 6, 5)
        assert other.embed_texts(["y" * 16])


def test_scopes_have_budgets_of_their_own_beside_the_one_of_all():
    limit = {"daily_token_limit": 6, "all_scopes": {"daily_token_limit": 10}}

    def spend(scope, tokens):
        with EmbeddingClient(
            embedder=FakeEmbedder(), scope=scope, config={"budget": limit}
        ) as client:
            assert client.scope == scope
            client.embed_text("x" * 4 * tokens)

    spend("a", 6)
    with pytest.raises(TokenBudgetExceeded) as own:
        spend("a", 1)
    assert own.value.scope == "a"
    with pytest.raises(TokenBudgetExceeded) as over_all:
        spend("b", 5)
    assert over_all.value.scope == "*"
    spend("b", 4)
    assert TokenTracker(scope="a").get_usage_today()["tokens_used"] == 6
    assert TokenTracker(scope="b").get_usage_today()["tokens_used"] == 4
    assert TokenTracker().get_usage_today()["tokens_used"] == 0


def test_the_scope_of_a_profile():
    config = {"scope": "all", "profiles": {"p": {"model": "hashing:64", "scope": "of-p"}}}
    assert EmbeddingClient("p", config=config).scope == "of-p"
    assert EmbeddingClient("hashing:64", config=config).scope == "all"
    assert EmbeddingClient("p", config=config, scope="mine").scope == "mine"


def test_what_is_local_needs_no_budget_and_no_ledger(state_home):
    config = {"budget": {"daily_token_limit": 0, "daily_cost_limit": 0}}
    with EmbeddingClient("hashing:64", config=config) as client:
        assert len(client.embed_texts(["a", "b"])) == 2
    assert not state_home.exists()


@pytest.mark.fault(101)
def test_a_state_folder_that_cannot_be_written(fake, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    home = str(tmp_path / "file" / "below")
    with EmbeddingClient(embedder=fake, config={"home": home}) as client:
        assert client.embed_text("a")
    assert "usage is not recorded" in caplog.text
    limited = {"home": home, "budget": {"daily_token_limit": 100}}
    with (
        EmbeddingClient(embedder=fake, config=limited) as client,
        pytest.raises(StorageReadOnly, match="EMBEDCORE_HOME"),
    ):
        client.embed_text("b")
    assert len(fake.calls) == 1


KEYED = {
    "str": lambda key: {"api_key": key},
    "SecretStr": lambda key: {"api_key": SecretStr(key)},
    "option": lambda key: {"options": {"api_key": key}},
    "header": lambda key: {"options": {"headers": {"Authorization": f"Bearer {key}"}}},
    "mapping": lambda key: {"config": {"options": {"openai": {"api_key": key}}}},
    "config": lambda key: {"config": Config(options={"openai": {"api_key": SecretStr(key)}})},
    "other provider": lambda key: {"config": {"options": {"acme": {"token": key}}}},
    "profile": lambda key: {
        "config": {"model": "p", "profiles": {"p": {"model": MODEL, "options": {"api_key": key}}}}
    },
    "other profile": lambda key: {
        "config": {"profiles": {"q": {"model": "acme:m", "options": {"token": key}}}}
    },
}


@pytest.mark.fault(131)
@pytest.mark.parametrize("where", KEYED)
def test_a_client_pickles_without_its_key(where, canary, server, monkeypatch):
    client = EmbeddingClient(**KEYED[where](canary))
    pickled = pickle.dumps(client)
    assert canary.encode() not in pickled
    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
    with pickle.loads(pickled) as copy:
        assert (copy.provider, copy.model) == ("openai", MODEL)
        assert copy.embed_text("a") == vector_of("a", 1536).tolist()
    assert canary not in repr(client)
    assert canary not in repr(vars(client))
    assert canary not in repr(copy)
    client.close()


@pytest.mark.fault(131)
def test_a_callable_key_does_not_pickle_and_does_not_stop_pickling(canary, server, monkeypatch):
    client = EmbeddingClient(api_key=lambda: canary, options={"dimensions": 64})
    copy = pickle.loads(pickle.dumps(client))
    assert copy.dimensions == 64
    with pytest.raises(Exception, match="key"):
        copy.embed_text("a")
    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
    copy.close()
    assert len(copy.embed_text("a")) == 64
    copy.close()


def test_a_reference_survives_pickling(server, monkeypatch, tmp_path):
    monkeypatch.setenv("TEAM_KEY", server.api_key)
    path = tmp_path / "e.toml"
    path.write_text('[options.openai]\napi_key = "$TEAM_KEY"\nheaders = { X-Team = "$TEAM_KEY" }\n')
    with pickle.loads(pickle.dumps(EmbeddingClient(config=path))) as copy:
        assert copy.embed_text("a")


def test_a_client_with_an_embedder_pickles_with_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
    with EmbeddingClient() as client:
        by_hand = EmbeddingClient(embedder=client._engine.embedder)
        with pickle.loads(pickle.dumps(by_hand)) as copy:
            assert copy.embed_texts(["a"]) == expected(["a"], 1536)


PROGRAM = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from embedcore import EmbeddingClient

def work(arguments):
    client, number = arguments
    return client.embed_texts([f"text {number}"])

if __name__ == "__main__":
    client = EmbeddingClient(config={"budget": {"daily_token_limit": 1000}})
    with ProcessPoolExecutor(2, mp_context=get_context(sys.argv[1])) as pool:
        vectors = list(pool.map(work, [(client, number) for number in range(6)]))
    assert [v[0] for v in vectors] == client.embed_texts([f"text {n}" for n in range(6)])
    client.close()
"""


def test_a_pool_of_spawned_processes_rebuilds_the_client(server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    subprocess.run([sys.executable, program, "spawn"], check=True, timeout=60)
    # What the others billed is reused here, and sent by nobody.
    assert server.meter.billed_requests == 6
    assert TokenTracker().get_usage_today()["requests"] == 6
    assert TokenTracker().get_usage_today()["tokens_used"] == server.meter.billed_tokens


def forked(work) -> int:
    """The exit code of a child that does ``work`` and nothing else; 77 when it hangs."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, lambda *_: os._exit(77))
            signal.alarm(15)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
ignore_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@needs_fork
@ignore_fork
@pytest.mark.fault(112)
@pytest.mark.fault(147)
def test_a_client_works_on_both_sides_of_a_fork(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
    with EmbeddingClient(config={"budget": {"daily_token_limit": 100}}) as client:
        client.embed_text("before")

        def child():
            assert client.embed_text("child") == vector_of("child", 1536).tolist()
            client.close()
            assert client.embed_text("again")

        assert forked(child) == 0
        assert client.embed_text("after") == vector_of("after", 1536).tolist()
    assert TokenTracker().get_usage_today()["requests"] == 4
    assert server.meter.billed_requests == 4


@needs_fork
@ignore_fork
@pytest.mark.fault(112)
@pytest.mark.fault(147)
def test_a_fork_while_a_thread_opens_the_client(monkeypatch):
    """The child has that thread's lock and not that thread."""
    from embedcore import assembly, forksafe

    # It is waited for, though not for ever.
    monkeypatch.setattr(forksafe, "WAIT_SECONDS", 0.05)
    opening, go_on = threading.Event(), threading.Event()
    real = assembly.build

    def slow(*arguments):
        if threading.current_thread() is not threading.main_thread():
            opening.set()
            go_on.wait(10)
        return real(*arguments)

    monkeypatch.setattr(assembly, "build", slow)
    client = EmbeddingClient(embedder=FakeEmbedder())
    thread = threading.Thread(target=client.embed_text, args=["parent"])
    thread.start()
    assert opening.wait(10)
    try:
        assert forked(lambda: client.embed_text("child")) == 0
        assert forked(client.close) == 0
    finally:
        go_on.set()
        thread.join()
    client.close()


@needs_fork
@ignore_fork
@pytest.mark.fault(112)
def test_a_tracker_works_on_both_sides_of_a_fork():
    tracker = TokenTracker(daily_limit=100)
    tracker.record_usage(1)

    def child():
        tracker.record_usage(2)
        tracker.close()
        tracker.record_usage(3)

    assert forked(child) == 0
    assert tracker.get_usage_today()["tokens_used"] == 6
    tracker.close()


# Awaiting


@pytest.mark.fault(148)
def test_a_cancelled_task_sends_nothing_more_and_keeps_nothing_held():
    fake = FakeEmbedder(
        info=replace(FAKE_INFO, max_texts_per_request=1, max_concurrency=1), latency=0.05
    )
    config = {"budget": {"daily_token_limit": 1000}}
    with EmbeddingClient(embedder=fake, config=config) as client:

        async def main():
            call = asyncio.create_task(client.aembed_texts([f"text {n}" for n in range(50)]))
            while not fake.calls:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        asyncio.run(main())
        sent = len(fake.calls)
        assert sent < 50
        time.sleep(0.2)
        assert len(fake.calls) <= sent + 1
    today = TokenTracker(daily_limit=1000).get_usage_today()
    assert today["tokens_used"] >= fake.billed_tokens
    assert today["remaining"] == 1000 - today["tokens_used"], "nothing stays held"


def test_tasks_share_the_event_loop():
    asked, go = [], threading.Event()

    class Held(FakeEmbedder):
        def embed(self, request):
            asked.append(request)
            assert go.wait(120)
            return super().embed(request)

    with EmbeddingClient(embedder=Held()) as client:

        async def main():
            calls = asyncio.gather(*(client.aembed_text(f"text {n}") for n in range(4)))
            # Nobody is answered before the loop has seen that all of them ask.
            while len(asked) < 4:
                await asyncio.sleep(0.01)
            go.set()
            return await calls

        vectors = asyncio.run(main())
    assert vectors == expected([f"text {n}" for n in range(4)])


# Files of settings and the wire


def test_the_rules_of_a_profile_go_over_those_of_the_configuration(server):
    config = {
        "overlong": "reject",
        "concurrency": 3,
        "retry": {"attempts": 9, "deadline": 60},
        "options": {"openai": {"api_key": server.api_key, "dimensions": 16}},
        "profiles": {
            "own": {
                "model": MODEL,
                "overlong": "truncate",
                "concurrency": 2,
                "retry": {"attempts": 1},
                "options": {"dimensions": 8},
                "budget": {"wait": 0.5},
            },
            "plain": {"model": MODEL},
        },
    }
    with EmbeddingClient("own", config=config) as client:
        assert client.dimensions == 8
        assert client._engine.overlong == "truncate"
        assert (client._engine.retry.attempts, client._engine.retry.deadline) == (1, 60)
        assert client._engine.account.wait == 0.5
        assert len(client.embed_text("a")) == 8
    with EmbeddingClient("plain", config=config, options={"dimensions": 4}) as client:
        assert client.dimensions == 4
        assert client._engine.overlong == "reject"
        assert client._engine.retry.attempts == 9


def test_a_fingerprint_names_what_decides_the_vectors(server):
    def name(**given):
        with EmbeddingClient(api_key="k", **given) as client:
            return client.fingerprint

    assert name() == name(options={"timeout": 3.0}) == name(scope="other")
    assert len({name(), name(options={"dimensions": 8}), name(model="openai:other")}) == 3


def test_a_rejected_request_is_split_until_the_culprit_is_named(server):
    texts = [f"text {row}" for row in range(8)]
    texts[5] = "the poisoned one"
    server.faults.when(mode="bad_text", marker="poisoned")
    with EmbeddingClient(api_key=server.api_key, config=CALM) as client:
        with pytest.raises((RequestRejected, InputRejected)) as caught:
            client.embed_texts(texts)
        assert caught.value.position == 5
        result = client.embed(texts, on_error="keep")
    assert [row for row, ok in enumerate(result.ok) if not ok] == [5]
    good = [row for row in range(8) if row != 5]
    assert np.array_equal(result.vectors[good], vectors_of([texts[row] for row in good], 1536))


# Money, at the front door


@pytest.mark.fault(45)
def test_what_was_held_and_not_billed_is_there_again():
    fake = FakeEmbedder()
    with EmbeddingClient(embedder=fake, config={"budget": {"daily_token_limit": 100}}) as client:
        result = client.embed(["x" * 40])
        assert result.usage.tokens == fake.billed_tokens == 10, "forty bytes were held"
        tracker = TokenTracker(daily_limit=100)
        assert tracker.get_usage_today()["remaining"] == 90
        client.embed_texts(["y" * 4 * 90])
        assert tracker.get_usage_today()["remaining"] == 0
        tracker.close()


@pytest.mark.fault(98)
def test_a_limit_in_money_refuses_a_model_without_a_price():
    fake = FakeEmbedder(info=replace(FAKE_INFO, price=None))
    with (
        EmbeddingClient(embedder=fake, config={"budget": {"daily_cost_limit": 5}}) as client,
        pytest.raises(ConfigurationError, match="price of fake:fake-embedding is not known"),
    ):
        client.embed_texts(["a"])
    assert fake.calls == []
    with EmbeddingClient(embedder=fake, config={"budget": {"daily_token_limit": 5}}) as client:
        result = client.embed(["a"])
    assert (result.usage.tokens, result.usage.cost) == (1, 0)


@pytest.mark.fault(126)
@pytest.mark.parametrize("step", ["hold", "hold_and_send", "send"])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), StorageReadOnly("gone")])
def test_when_the_ledger_fail_nothing_is_sent(monkeypatch, step, error):
    from embedcore.storage.ledger import Ledger

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(Ledger, step, broken)
    info = replace(FAKE_INFO, max_texts_per_request=1 if step != "hold_and_send" else 9)
    fake = FakeEmbedder(info=info)
    with (
        EmbeddingClient(embedder=fake, config={"budget": {"daily_token_limit": 99}}) as client,
        pytest.raises(type(error)),
    ):
        client.embed_texts(["a", "b"])
    assert fake.calls == []


SLEEPER = """
import sys
from pathlib import Path
from embedcore.assembly import STATE_FILE
from embedcore.errors import BudgetExceeded
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE

database = Database(Path(sys.argv[1]) / STATE_FILE, STATE)
ledger = Ledger(database, lease=0.3)
limit = Limit(scope="default", period="day", unit="tokens", amount=100)
grant = ledger.hold("default", Amount(tokens=80), [limit])
print("held", flush=True)
sys.stdin.readline()
try:
    ledger.send(grant, Amount(tokens=80))
    print("sent", flush=True)
except BudgetExceeded:
    print("refused", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop a process")
@pytest.mark.fault(146)
@pytest.mark.parametrize("meanwhile", [True, False])
def test_who_slept_past_its_lease_holds_anew_before_it_sends(meanwhile, state_home, forks):
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with forks(SLEEPER, state_home, **streams) as sleeper:
        assert sleeper.stdout.readline() == "held\n"
        sleeper.stop()
        try:
            time.sleep(0.5)
            if meanwhile:
                # What it held is given up, since it has gone quiet, and somebody else spends it.
                fake = FakeEmbedder()
                limit = {"budget": {"daily_token_limit": 100}}
                with EmbeddingClient(embedder=fake, config=limit) as client:
                    client.embed_text("x" * 4 * 80)
        finally:
            sleeper.send_signal(signal.SIGCONT)
        answer, _ = sleeper.communicate("go\n", timeout=120)
    assert answer == ("refused\n" if meanwhile else "sent\n")
