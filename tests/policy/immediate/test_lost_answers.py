"""What an attempt is charged with whose answer was lost: its count, else the bound."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import EmbeddingError, InputTooLong, OutcomeUnknown, ProviderUnavailable
from embedcore.events import Settled
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeEmbedder, tokens_of
from embedcore.testing.fakes.embedder import FAKE_INFO, Outcome

ROWS = ["a quick brown fox jumps over the lazy dog", "字" * 20, "embedding " * 30, "x"]
IN_BYTES = sum(len(row.encode()) for row in ROWS)
SMALL = replace(FAKE_INFO, dimensions=8, max_texts_per_request=4, overhead_tokens_per_text=3)
# Each loses an answer after the work was done, in another place of the way back.
LOST = [
    ("reset_billed", {}),
    ("truncated", {}),
    ("short_chunk", {}),
    ("cut_json", {}),
    ("broken_json", {}),
    ("html", {}),
    ("raw", {"body": "upstream says no"}),
    *(("status", {"status": status, "body": "html"}) for status in (408, 409, 500, 502, 504)),
]


def by_call(client, rows):
    return client.embed(rows).vectors


def by_stream(client, rows):
    for _ in client.embed_iter(enumerate(rows)):
        pass


@pytest.mark.fault(24)
@pytest.mark.fault(25)
@pytest.mark.parametrize("embed", [by_call, by_stream])
@pytest.mark.parametrize(("mode", "options"), LOST, ids=lambda value: str(value)[:40])
def test_a_lost_answer_is_charged_by_its_count(server, connect, ledger, mode, options, embed):
    server.faults.push(mode, bills=True, **options)
    heard = []
    client = connect(observers=[heard.append])
    embed(client, ROWS)
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens == server.meter.billed_tokens < IN_BYTES
    lost = [event for event in heard if isinstance(event, Settled) and event.unconfirmed]
    assert lost
    assert all(event.exact for event in lost)


@pytest.mark.parametrize("embed", [by_call, by_stream])
def test_without_a_tokenizer_it_is_the_bound(server, connect, ledger, monkeypatch, embed):
    monkeypatch.setattr("embedcore_openai.models.counts_like_openai", lambda *_: False)
    server.faults.push("reset_billed")
    embed(connect(), ROWS)
    whole = server.meter.billed_tokens // 2
    assert ledger().spent.tokens == IN_BYTES + whole


def test_a_budget_that_counts_allow_is_not_used_up_by_bounds(server, connect, ledger):
    """Two lost answers leave room for the third; by their bounds they would not."""
    client = connect(daily=2 * IN_BYTES + 10)
    server.faults.push("reset_billed", times=2)
    assert client.embed(ROWS).ok.all()
    assert ledger().spent.tokens == server.meter.billed_tokens
    assert server.meter.requests == 3


def test_what_was_reserved_beyond_the_count_is_free_at_once(desk):
    """Before the next attempt is reserved, and not when the call ends."""
    seen = []

    def script(request, number):
        seen.append((one.used.held.tokens, one.spent))
        lost = ProviderUnavailable("gone", status=502)
        return Outcome(error=lost, bills=True) if number == 1 else None

    with desk(FakeEmbedder(info=SMALL, script=script)) as one:
        one.embed(["proves the settings"])
        before = one.spent
        one.embed(ROWS)
        counted = sum(map(tokens_of, ROWS)) + 3 * len(ROWS)
        bound = IN_BYTES + 3 * len(ROWS)
        assert seen[1:] == [(bound, before), (bound, before + counted)]


@settings(deadline=None)
@given(
    rows=st.lists(st.text(max_size=40).filter(str.strip), min_size=1, max_size=12, unique=True),
    fails=st.lists(st.sampled_from(["lost", "refused", "escaped", ""]), max_size=12),
    daily=st.sampled_from([None, 400, 4_000]),
    threads=st.sampled_from([1, 4]),
)
def test_the_ledger_never_says_less_than_the_bill_and_no_more_than_counts(
    desk, rows, fails, daily, threads
):
    """Whatever is lost was billed: then ledger and bill agree to the token."""
    errors = {
        "lost": lambda: OutcomeUnknown("lost"),
        "refused": lambda: ProviderUnavailable("no", status=500, billed="unknown"),
        "escaped": lambda: KeyError("k"),
    }

    def script(request, number):
        kind = fails[number] if number < len(fails) else ""
        return Outcome(error=errors[kind](), bills=True) if kind else None

    with desk(FakeEmbedder(info=SMALL, script=script), daily=daily, threads=threads) as one:
        with contextlib.suppress(EmbeddingError):
            one.embed(rows, on_error="keep")
        one.check()
        assert daily is None or one.spent <= daily
        for row in usage.audit(one.ledger):
            assert row["state"] in ("settled", "charged")
            assert row["actual_tokens"] <= row["tokens"]


class More(FakeEmbedder):
    """Bills more than its tokenizer counts, and less than bytes."""

    def embed(self, request):
        reply = super().embed(request)
        self.meter.bill(["more"] * len(request.texts), 2 * len(request.texts))
        return replace(reply, tokens=reply.tokens + 2 * len(request.texts))


def test_where_bills_are_higher_than_counts_it_is_the_bound_from_then_on(desk):
    gone = {1, 4}

    def script(request, number):
        lost = ProviderUnavailable("gone", status=502)
        return Outcome(error=lost, bills=True) if number in gone else None

    with desk(More(info=SMALL, script=script)) as one:
        charged = []
        for number in range(2):
            one.embed([f"{row} {number}" for row in ROWS])
            one.embed([f"{row} again {number}" for row in ROWS])
            charged.append(one.told(Settled)[-2])
        first, second = charged
        assert first.unconfirmed
        assert first.exact
        assert second.unconfirmed
        assert not second.exact


def test_a_beginning_of_a_text_that_is_lost_is_charged_by_its_own_count(desk):
    """It is none of the call's texts."""
    whole = "word " * 80
    info = replace(FAKE_INFO, dimensions=8, max_input_tokens=100)

    def script(request, number):
        (text,) = request.texts
        if text == whole:
            return Outcome(error=InputTooLong("too long", billed="no"))
        return Outcome(error=OutcomeUnknown("lost"), bills=True) if number == 1 else None

    with desk(FakeEmbedder(info=info, script=script)) as one:
        result = one.embed([whole])
        assert result.ok.all()
        assert 0 < result.usage.unconfirmed_tokens < tokens_of(whole)
        one.check()


def test_a_tokenizer_that_fails_leaves_the_bound(desk):
    class Broken(EstimatingTokenizer):
        exact = True

        def count(self, texts):
            raise OSError("no vocabulary")

    def script(request, number):
        return Outcome(error=OutcomeUnknown("lost"), bills=True) if number == 0 else None

    with desk(FakeEmbedder(info=SMALL, tokenizer=Broken(), script=script)) as one:
        assert one.embed(ROWS).ok.all()
        counted = sum(map(tokens_of, ROWS)) + 3 * len(ROWS)
        assert one.spent == IN_BYTES + 3 * len(ROWS) + counted
