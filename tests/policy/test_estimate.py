"""A plan says what a call would send, and what is in the cache is free in it."""

from __future__ import annotations

import itertools
import sqlite3
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from embedcore import EmbeddingClient
from embedcore.errors import BudgetExceeded, ConfigurationError
from embedcore.events import CacheProblem
from embedcore.provider.types import Price
from embedcore.storage.keys import Keys
from embedcore.testing import FakeEmbedder
from embedcore.testing.fakes.embedder import FAKE_INFO, FakeTokenizer

WIDTH = 8
INFO = replace(FAKE_INFO, dimensions=WIDTH, max_texts_per_request=4, max_input_tokens=8)
TEXTS = [f"text {number}" for number in range(12)]


@pytest.fixture
def shop(home):
    """``shop(embedder, …)``: a client of an embedder in this process, over one home."""
    opened = []

    def open_one(embedder=None, *, observers=(), scope=None, **config):
        embedder = embedder or FakeEmbedder(info=INFO)
        config = {"home": home, "cache": True, **config}
        opened.append(
            EmbeddingClient(embedder=embedder, config=config, scope=scope, observers=observers)
        )
        return opened[-1]

    yield open_one
    for client in opened:
        client.close()


@pytest.fixture
def two_kinds(shop):
    """A client whose model tells questions from other texts, and a number for each example."""
    return shop(FakeEmbedder(info=replace(INFO, input_types=("query",)))), itertools.count()


def key_of(client, text, input_type=None):
    keys = Keys(
        provider=client.provider,
        model=client.model,
        fingerprint=client.fingerprint,
        input_type=input_type,
    )
    return keys.of([text])[0]


def folder_of(client):
    """Of its cache, which is closed: others may change it."""
    client.close()
    return client._engine.cache.store.path


def in_file(client, statement, *values):
    """Change the cache behind its back."""
    connection = sqlite3.connect(folder_of(client) / "index.db")
    with connection:
        changed = connection.execute(statement, values).rowcount
    connection.close()
    return changed


def sent_by(client, texts, **how):
    before = client._engine.embedder.meter.billed_texts
    client.embed(texts, on_error="keep", **how)
    return (client._engine.embedder.meter.billed_texts - before).total()


@pytest.mark.case("C9")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_the_plan_is_what_the_call_then_sends(two_kinds, flip_vectors, data):
    client, number = two_kinds
    prefix = f"{next(number)}: "
    some = st.lists(st.sampled_from([prefix + text for text in TEXTS]), max_size=8)
    first, kind = data.draw(some), data.draw(st.sampled_from([None, "query"]))
    client.embed(first, input_type=kind)
    damaged = data.draw(st.lists(st.sampled_from(first), unique=True)) if first else []
    for text in damaged:
        if kind is None:
            flip_vectors(folder_of(client), "key = ?", key_of(client, text))
    gone = data.draw(st.lists(st.sampled_from(first), unique=True)) if first else []
    for text in gone:
        in_file(client, "DELETE FROM vector WHERE key = ?", key_of(client, text, kind))
    rows, asked = data.draw(some), data.draw(st.sampled_from([None, "query"]))
    cache = data.draw(st.booleans())
    meter = client._engine.embedder.meter
    spent, sent = meter.billed_tokens, meter.requests
    plan = client.plan(rows, input_type=asked, cache=cache)
    assert meter.requests == sent
    assert plan.to_embed == sent_by(client, rows, input_type=asked, cache=cache)
    assert plan.tokens == meter.billed_tokens - spent
    assert plan.unique == plan.cached + plan.to_embed == len(set(rows))
    assert (plan.cost == 0) == (plan.requests == 0) == (plan.to_embed == 0)


def all_bytes(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.case("C9")
def test_a_plan_changes_nothing_and_claims_nothing(shop, home, flip_vectors):
    client = shop()
    assert client.plan(TEXTS).to_embed == len(TEXTS)
    assert not (home / "vectors").exists(), "looked up where nothing is"
    client.embed(TEXTS[:4])
    flip_vectors(folder_of(client), "key = ?", key_of(client, TEXTS[0]))
    client.close()
    before = all_bytes(home / "vectors")
    plan = client.plan(TEXTS)
    assert (plan.cached, plan.to_embed) == (3, 9)
    assert client._engine.cache.in_flight._owners == {}
    client.close()
    assert all_bytes(home / "vectors") == before


@pytest.mark.case("C9")
def test_what_is_stored_is_free_in_every_scope_and_only_where_it_is_the_same(shop):
    shop(scope="one").embed(TEXTS)
    assert shop(scope="two").plan(TEXTS).to_embed == 0
    other = shop(FakeEmbedder(info=INFO, salt="another model"))
    assert other.plan(TEXTS).to_embed == len(TEXTS)
    assert shop(cache=False).plan(TEXTS).to_embed == len(TEXTS)
    assert shop().plan(TEXTS, cache=False).to_embed == len(TEXTS)


@pytest.mark.case("C9")
def test_a_text_is_looked_up_as_it_will_be_sent(shop):
    client = shop(FakeEmbedder(info=INFO, tokenizer=FakeTokenizer()))
    client.embed(["x" * 100])
    plan = client.plan(["x" * 90, "x" * 32, "y" * 100])
    assert (plan.cached, plan.to_embed, plan.truncated) == (1, 1, 2)


@pytest.mark.case("C9")
def test_a_width_that_is_not_known_yet_is_that_of_what_is_there(shop):
    shop(FakeEmbedder(info=INFO)).embed(TEXTS)
    fresh = shop(FakeEmbedder(info=INFO))
    unknown = replace(fresh._engine.embedder.info, dimensions=None)
    fresh._engine.embedder.info = unknown
    assert fresh.plan(TEXTS).to_embed == 0
    assert fresh._engine.learned.width is None, "a plan teaches nothing"


@pytest.mark.case("C9")
def test_no_limit_refuses_what_costs_nothing(shop):
    shop().embed(TEXTS)
    spent = shop(budget={"total_token_limit": 1, "daily_cost_limit": 0})
    assert spent.embed(TEXTS).ok.all()
    with pytest.raises(BudgetExceeded):
        spent.embed([*TEXTS, "one more"])
    unpriced = shop(FakeEmbedder(info=replace(INFO, price=None)), budget={"daily_cost_limit": 1})
    assert unpriced.embed(TEXTS).ok.all(), "nothing is sent, so that no price is needed"
    with pytest.raises(ConfigurationError, match="price"):
        unpriced.embed(["one more"])
    assert unpriced.plan(TEXTS).cost == 0
    assert unpriced.plan(["one more"]).cost is None


@pytest.mark.case("C9")
def test_a_cache_that_cannot_be_read_makes_nothing_free(shop, home):
    first = shop()
    first.embed(TEXTS)
    first.close()
    (home / "vectors" / "index.db").write_bytes(b"not a database" * 1_000)
    told = []
    client = shop(observers=[told.append])
    assert client.plan(TEXTS).to_embed == len(TEXTS)
    assert [event for event in told if isinstance(event, CacheProblem)]


@pytest.mark.case("C9")
def test_a_plan_of_a_model_that_costs_nothing_is_not_more_than_a_plan(shop):
    free = FakeEmbedder(info=replace(INFO, price=Price()))
    assert shop(free).plan(TEXTS).cost == 0
