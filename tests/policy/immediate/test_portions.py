"""A call that a limit ends midway: what fits is embedded, the rest is named."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, strategies as st
from waiting import until

from embedcore import EmbeddingClient
from embedcore.errors import (
    BudgetExceeded,
    ConfigurationError,
    InputRejected,
    ProviderUnavailable,
    TokenBudgetExceeded,
)
from embedcore.events import BudgetWait, Progress, Refused
from embedcore.policy.cache import Follower
from embedcore.policy.engine import Stop
from embedcore.policy.immediate import recipe as portions
from embedcore.policy.immediate.reuse import keys_of
from embedcore.policy.threads import Stopped
from embedcore.storage.amounts import Limit
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import FakeClock, FakeEmbedder, tokens_of, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

WIDTH = 8
INFO = replace(FAKE_INFO, dimensions=WIDTH, max_texts_per_request=3)


def fitting(texts, budget):
    """How many of the first different texts the budget allows."""
    spent = 0
    for number, text in enumerate(texts):
        spent += tokens_of(text)
        if spent > budget:
            return number
    return len(texts)


def check(result, rows, done):
    """Exactly the rows with a text of ``done`` have its vector; the others say which limit."""
    assert result.ok.tolist() == [row in done for row in rows]
    right = vectors_of(rows, WIDTH)
    assert (result.vectors[result.ok] == right[result.ok]).all()
    assert np.isnan(result.vectors[~result.ok]).all()
    left = np.flatnonzero(~result.ok).tolist()
    assert sorted(result.errors) == left
    assert all(isinstance(error, BudgetExceeded) for error in result.errors.values())
    assert {result.outcomes[row].state for row in left} <= {"not_done"}
    if left:
        assert result.stopped_at.position == result.stopped_at.key == left[0]
        assert result.stopped_at.error is result.errors[left[0]]
    else:
        assert result.stopped_at is None


ROWS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), min_size=1, max_size=30)


@pytest.mark.case("C11")
@given(ROWS, st.data(), st.sampled_from(["raise", "keep"]))
def test_what_fits_is_embedded_in_order_and_the_rest_is_named(desk, given_rows, data, on_error):
    lengths = dict(given_rows)
    rows = [f"{number:03}".ljust(lengths[number], "x") for number, _ in given_rows]
    texts = list(dict.fromkeys(rows))
    budget = data.draw(st.integers(0, sum(map(tokens_of, texts)) + 1))
    most = fitting(texts, budget)
    with desk(FakeEmbedder(info=INFO), daily=budget) as one:
        result = one.embed(rows, on_error=on_error, on_budget="stop")
        check(result, rows, texts[:most])
        assert one.embedder.meter.billed_tokens == sum(map(tokens_of, texts[:most])) <= budget
        assert result.usage.tokens == one.embedder.meter.billed_tokens
        assert len(one.told(Refused)) == (most < len(texts))
        one.check()
        # The limit is raised: the rest is billed from there, and nothing twice.
        one.limited(10_000)
        if result.stopped_at is not None:
            rest = rows[result.stopped_at.position :]
            again = one.embed([row for row in rest if row not in texts[:most]], on_budget="stop")
            assert again.ok.all()
        assert one.embedder.meter.billed_twice == {}
        one.check()


@pytest.mark.case("C11")
def test_by_default_a_call_is_refused_as_a_whole(desk):
    with desk(FakeEmbedder(info=INFO), daily=3) as one:
        with pytest.raises(TokenBudgetExceeded):
            one.embed(["a", "b", "c", "d"])
        assert one.embedder.meter.requests == 0
        with pytest.raises(ConfigurationError, match="on_budget"):
            portions.check_on_budget("maybe")


@pytest.mark.case("C11")
def test_kept_errors_stay_apart_from_what_was_not_done(desk):
    with desk(FakeEmbedder(info=INFO), daily=2) as one:
        result = one.embed(["a", "", "b", "c", ""], on_error="keep", on_budget="stop")
        states = [outcome.state for outcome in result.outcomes]
        assert states == ["ok", "failed", "ok", "not_done", "failed"]
        assert isinstance(result.errors[1], InputRejected)
        assert result.stopped_at.position == 3
        one.check()


@pytest.mark.case("C11")
def test_a_retry_that_the_budget_refuses_stops_the_call(desk):
    """The first attempt is charged without vectors; what was billed beside it is given."""
    down = ProviderUnavailable("down", billed="unknown")
    embedder = FakeEmbedder(
        info=replace(INFO, max_texts_per_request=1, max_concurrency=1), script=[None, down]
    )
    with desk(embedder, daily=3, threads=1) as one:
        result = one.embed(["a", "b", "c"], on_error="keep", on_budget="stop")
        assert result.ok[0]
        assert not result.ok.all()
        assert set(result.errors) == {row for row in range(3) if not result.ok[row]}
        assert one.embedder.meter.billed_tokens <= one.spent <= 3
        one.check(certain=False)


@pytest.mark.case("C11")
def test_progress_counts_and_arrivals_come_as_in_any_call(desk):
    arrived = []
    rows = [f"{number:04}" for number in range(10)]
    with desk(FakeEmbedder(info=INFO), daily=6) as one:
        result = one.embed(rows, on_budget="stop", on_arrival=arrived.append)
        check(result, rows, rows[:6])
        assert sorted(row for one in arrived for row in one.rows.tolist()) == list(range(6))
        progress = one.told(Progress)
        assert (max(event.done for event in progress), progress[0].total) == (6, 10)


@pytest.fixture
def shop(home):
    opened = []

    def open_one(**config):
        client = EmbeddingClient(
            embedder=FakeEmbedder(info=INFO), config={"home": home, "cache": True, **config}
        )
        opened.append(client)
        return client

    yield open_one
    for client in opened:
        client.close()


@pytest.mark.case("C11")
def test_what_is_cached_is_done_also_behind_the_end_of_the_budget(shop):
    rows = [f"{number:04}" for number in range(8)]
    shop().embed(rows[5:])
    client = shop(scope="another", budget={"total_token_limit": 2})
    result = client.embed(rows, on_budget="stop")
    check(result, rows, [*rows[:2], *rows[5:]])
    assert result.reused.tolist() == [False] * 5 + [True] * 3
    assert client._engine.cache.in_flight._owners == {}
    assert client.embed_texts(rows, on_budget="stop") == vectors_of(rows[:2], WIDTH).tolist()


@pytest.mark.case("C11")
def test_lists_end_where_the_budget_does_and_the_awaited_forms_alike(shop):
    rows = [f"{number:04}" for number in range(6)]

    async def awaited(client):
        whole = await client.aembed(rows, on_budget="stop")
        return whole, await client.aembed_texts(rows, on_budget="stop")

    client = shop(budget={"total_token_limit": 4})
    result, vectors = asyncio.run(awaited(client))
    check(result, rows, rows[:4])
    assert vectors == client.embed_texts(rows, on_budget="stop") == result.vectors[:4].tolist()
    with pytest.raises(BudgetExceeded):
        client.embed_texts(rows)
    with pytest.raises(ConfigurationError, match="on_budget"):
        client.embed(rows, on_budget="no")


@pytest.mark.case("C11")
def test_what_a_stopped_call_does_not_buy_others_may(shop):
    """It lets go of its texts before it waits for those that another call is buying."""
    client = shop(budget={"total_token_limit": 0})
    claims = client._engine.cache.in_flight
    mine, theirs = keys_of(client._engine, None).of(["mine", "theirs"])
    other = Follower(lambda *_: None)
    claims.take([theirs], [0], other)
    ended = []
    call = threading.Thread(
        target=lambda: ended.append(client.embed(["mine", "theirs"], on_budget="stop"))
    )
    call.start()
    until(lambda: theirs in claims._waiting and mine not in claims._owners, 60.0)
    claims.fulfil([theirs], vectors_of(["theirs"], WIDTH), other)
    call.join(60)
    check(ended[0], ["mine", "theirs"], ["theirs"])


# Waiting


@pytest.fixture
def clock(monkeypatch):
    """Simulated, for the ledger and for what is said of the end of its windows."""
    made = FakeClock()

    class Now(datetime):
        @classmethod
        def now(cls, zone=None):
            return made.now()

    monkeypatch.setattr(portions, "datetime", Now)
    return made


def waiting(clock, seen):
    """What the engine waits by: the clock goes on instead."""

    def wait_for(ended, seconds):
        seen.append(seconds)
        clock.advance(seconds)
        return ended.is_set()

    return wait_for


@pytest.mark.case("C11")
def test_a_call_that_waits_goes_on_when_the_window_ends(desk, clock, monkeypatch):
    most = portions._LOOK_SECONDS
    assert most <= 30.0, "a limit that was raised is noticed before its window ends"
    monkeypatch.setattr(portions, "_LOOK_SECONDS", 1_800.0)
    ledger = Ledger(Database(None, STATE), clock=clock.time)
    rows, waits = [f"{number:04}" for number in range(25)], []
    how = {"ledger": ledger, "wait_for": waiting(clock, waits)}
    with desk(FakeEmbedder(info=INFO), daily=10, **how) as one:
        result = one.embed(rows, on_budget="wait")
        check(result, rows, rows)
        assert one.embedder.meter.billed_twice == {}
        assert one.told(BudgetWait)[0].until == datetime(2026, 1, 16, tzinfo=UTC)
        assert max(waits) == 1_800.0
        assert one.told(Refused) == []
        one.check()


@pytest.mark.case("C11")
def test_a_call_that_waits_can_be_stopped_and_loses_nothing(desk, clock):
    ledger = Ledger(Database(None, STATE), clock=clock.time)
    rows, stop = [f"{number:04}" for number in range(9)], Stop()

    def wait_for(ended, seconds):
        stop.set()
        return ended.is_set()

    how = {"ledger": ledger, "wait_for": wait_for}
    with desk(FakeEmbedder(info=INFO), daily=4, **how) as one:
        with pytest.raises(Stopped) as stopped:
            one.embed(rows, on_budget="wait", stop=stop)
        assert stopped.value.partial.ok.tolist() == [True] * 4 + [False] * 5
        one.check()


@pytest.mark.case("C11")
@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (Limit(scope="default", period="day", unit="tokens", amount=10), "x" * 44),
        (Limit(scope="default", period="total", unit="tokens", amount=2), "word"),
    ],
)
def test_what_waiting_cannot_help_is_raised_with_what_was_done(desk, limit, text):
    with desk(FakeEmbedder(info=INFO)) as one:
        one.engine = replace(one.engine, account=replace(one.engine.account, limits=(limit,)))
        with pytest.raises(TokenBudgetExceeded) as refused:
            one.embed(["a", "b", text, "c"], on_budget="wait")
        assert refused.value.never_fits or refused.value.resets_at is None
        assert refused.value.partial.ok.tolist() == [True, True, False, False]
        assert len(one.told(Refused)) == 1
        one.check()


@pytest.mark.case("C11")
def test_a_deadline_ends_the_wait(desk, clock):
    ledger = Ledger(Database(None, STATE), clock=clock.time)
    how = {
        "ledger": ledger,
        "wait_for": waiting(clock, []),
        "monotonic": clock.monotonic,
        "retry": desk().engine.retry.model_copy(update={"deadline": 100.0}),
    }
    with desk(FakeEmbedder(info=INFO), daily=2, **how) as one:
        with pytest.raises(TokenBudgetExceeded) as refused:
            one.embed(["a", "b", "c"], on_budget="wait")
        assert refused.value.partial.ok.tolist() == [True, True, False]
        one.check()
