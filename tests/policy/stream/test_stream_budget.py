"""When the budget ends a stream, is exactly as much embedded as it allows, and what happens then?

The fake's bill is the truth.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from waiting import until

from embedcore.errors import CostBudgetExceeded, TokenBudgetExceeded
from embedcore.events import BudgetWait, Refused
from embedcore.policy.immediate import recipe as portions
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import FakeClock, FakeEmbedder, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO, FakeTokenizer
from embedcore.testing.vectors import tokens_of

NARROW = replace(FAKE_INFO, dimensions=8, max_texts_per_request=4)


def drain(stream):
    blocks = []
    try:
        for block in stream:
            blocks.append(block)  # noqa: PERF402 - what came before an error counts
    except TokenBudgetExceeded as error:
        return blocks, error
    return blocks, None


def fitting(texts, budget):
    """How many of the first texts the budget allows."""
    spent = 0
    for number, text in enumerate(texts):
        spent += tokens_of(text)
        if spent > budget:
            return number
    return len(texts)


def rights(blocks, texts):
    at = 0
    for block in blocks:
        assert block.first == at
        assert list(block.rows) == texts[at : at + len(block)]
        assert (block.vectors == vectors_of(list(block.rows), 8)).all()
        at += len(block)
    return at


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(LENGTHS, st.data(), st.sampled_from(["raise", "stop"]), st.integers(1, 12))
def test_the_longest_prefix_that_fits_is_embedded_and_no_row_more(
    desk, lengths, data, on_budget, size
):
    # Different texts of different prices: nothing is saved by being equal.
    texts = [f"{number:03}".ljust(length, "x") for number, length in enumerate(lengths)]
    total = sum(map(tokens_of, texts))
    budget = data.draw(st.integers(0, total + 1))
    most = fitting(texts, budget)
    with desk(FakeEmbedder(info=NARROW), daily=budget) as one:
        stream = one.stream(texts, block_size=size, on_budget=on_budget)
        blocks, error = drain(stream)
        assert rights(blocks, texts) == most
        billed = one.embedder.meter.billed_tokens
        assert billed == sum(map(tokens_of, texts[:most])) <= budget
        assert stream.salvaged == []
        if most == len(texts):
            assert error is None
            assert stream.stopped_at is None
        elif on_budget == "raise":
            assert error.limit == budget
            assert stream.stopped_at is None
        else:
            assert error is None
            assert (stream.stopped_at.key, stream.stopped_at.position) == (most, most)
            assert stream.stopped_at.error.limit == budget
        # One refusal is told, and none of the attempts to find out how much fits.
        assert len(one.told(Refused)) == (most < len(texts))
        one.check()
        # The limit is raised: the rest is billed, and nothing twice.
        one.limited(total)
        assert rights(one.stream(texts[most:], block_size=size), texts[most:]) == len(texts) - most
        assert one.embedder.meter.billed_twice == {}
        one.check()


@settings(max_examples=20, deadline=None)
@given(LENGTHS, st.data())
def test_a_tokenizer_that_only_bounds_never_passes_the_limit(desk, lengths, data):
    texts = [f"{number:03}".ljust(length, "x") for number, length in enumerate(lengths)]
    budget = data.draw(st.integers(0, 4 * sum(map(tokens_of, texts))))
    embedder = FakeEmbedder(info=NARROW, tokenizer=FakeTokenizer(exact=False))
    with desk(embedder, daily=budget) as one:
        stream = one.stream(texts, block_size=6, on_budget="stop")
        done = rights(list(stream), texts)
        spent = embedder.meter.billed_tokens
        assert spent <= budget
        if done < len(texts):
            # The bound of the next row did not fit, once what came before was settled.
            assert stream.stopped_at.position == done
            assert spent + len(texts[done]) > budget
        one.check()


def test_it_stops_at_the_key_of_the_first_row_that_was_not_embedded(desk):
    rows = [{"id": f"doc-{n}", "body": "word " * 4} for n in range(20)]
    with desk(FakeEmbedder(info=NARROW), daily=5) as one:
        stream = one.stream(rows, text="body", key="id", block_size=3, on_budget="stop")
        assert [key for block in stream for key in block.keys] == ["doc-0", "doc-1", "doc-2"]
        # Equal texts of one block are one purchase; the next block buys its own.
        assert stream.stopped_at.key == "doc-3"
        assert stream.stopped_at.position == 3


def test_a_limit_in_money_stops_a_stream_as_well(desk):
    limit = Limit(scope="default", period="day", unit="cost", amount=NARROW.price.picodollars(10))
    with desk(FakeEmbedder(info=NARROW)) as one:
        account = replace(one.engine.account, limits=(limit,))
        one.engine = replace(one.engine, account=account)
        stream = one.stream([f"{n:04}" for n in range(30)], block_size=4, on_budget="stop")
        assert sum(map(len, stream)) == 10
        assert isinstance(stream.stopped_at.error, CostBudgetExceeded)


# Waiting


@pytest.fixture
def looking_often(monkeypatch):
    monkeypatch.setattr(portions, "_LOOK_SECONDS", 0.02)


def test_a_stream_that_waits_gives_what_it_has_and_goes_on_when_the_window_ends(
    desk, looking_often, monkeypatch
):
    clock = FakeClock()

    class Now(datetime):
        @classmethod
        def now(cls, zone=None):
            return clock.now()

    monkeypatch.setattr(portions, "datetime", Now)
    database = Database(None, STATE)
    ledger = Ledger(database, clock=clock.time)
    texts = [f"{n:04}" for n in range(25)]
    with desk(FakeEmbedder(info=NARROW), daily=10, ledger=ledger) as one:
        stream = one.stream(texts, block_size=8, on_budget="wait")
        blocks = [next(stream), next(stream)]
        # Eight of the first block, and two of the second that have not to wait for midnight.
        assert [len(block) for block in blocks] == [8, 2]
        until(lambda: one.told(BudgetWait))
        assert one.told(BudgetWait)[0].until == datetime(2026, 1, 16, tzinfo=UTC)
        assert one.embedder.meter.billed_tokens == 10
        for day in (20, 25):
            clock.advance(24 * 3600)
            while sum(map(len, blocks)) < day:
                blocks.append(next(stream))
            assert one.embedder.meter.billed_tokens == day
        assert list(stream) == []
        assert rights(blocks, texts) == 25
        assert one.embedder.meter.billed_twice == {}
        assert one.told(Refused) == []
        one.check()


def test_what_another_gives_back_ends_the_wait(desk, looking_often):
    limits = (Limit(scope="default", period="day", unit="tokens", amount=10),)
    with desk(FakeEmbedder(info=NARROW), daily=10) as one:
        grant = one.ledger.hold("default", Amount(tokens=7), limits)
        stream = one.stream([f"{n:04}" for n in range(9)], block_size=4, on_budget="wait")
        assert len(next(stream)) == 3
        until(lambda: one.told(BudgetWait))
        one.ledger.close(grant)
        assert sum(map(len, stream)) == 6
        one.check()


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (Limit(scope="default", period="day", unit="tokens", amount=10), "x" * 44),
        (Limit(scope="default", period="total", unit="tokens", amount=2), "word"),
    ],
)
def test_what_waiting_cannot_help_is_raised(desk, limit, text):
    with desk(FakeEmbedder(info=NARROW)) as one:
        one.engine = replace(one.engine, account=replace(one.engine.account, limits=(limit,)))
        blocks, error = drain(one.stream(["a", "b", text, "c"], on_budget="wait"))
        assert sum(map(len, blocks)) == 2
        assert isinstance(error, TokenBudgetExceeded)
        assert error.never_fits or error.resets_at is None
        one.check()


def test_a_stream_that_waits_can_be_closed(desk):
    with desk(FakeEmbedder(info=NARROW), daily=10) as one:
        stream = one.stream([f"{n:04}" for n in range(30)], block_size=8, on_budget="wait")
        assert [len(next(stream)), len(next(stream))] == [8, 2]
        until(lambda: one.told(BudgetWait))
        # The window ends at midnight.
        stream.close()
        assert stream.salvaged == []
        one.check()


def test_what_was_billed_before_a_retry_was_refused_is_salvaged(desk):
    # The first attempt is charged without vectors, and the budget does not allow another.
    from embedcore.errors import ProviderUnavailable

    def script(request, number):
        return ProviderUnavailable("gone", billed="yes") if "0005" in request.texts else None

    with desk(FakeEmbedder(info=NARROW, script=script), daily=9, threads=1) as one:
        stream = one.stream([f"{n:04}" for n in range(8)], block_size=8, on_budget="stop")
        with pytest.raises(ProviderUnavailable) as caught:
            list(stream)
        assert caught.value.budget_blocked
        (block,) = stream.salvaged
        assert block.ok.tolist() == [True] * 4 + [False] * 4
        assert np.isnan(block.vectors[4:]).all()
        assert one.embedder.meter.billed_tokens <= 9
        one.check()
