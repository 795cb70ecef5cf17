"""The whole way: a client, a real socket, and a server that does what servers do."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from embedcore import EmbeddingClient
from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    InputTooLong,
    ModelNotFound,
    PermissionDenied,
    QuotaExhausted,
    RateLimited,
    ReplyMismatch,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.events import BoundViolated
from embedcore.provider.base import WrapperEmbedder
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeClock, vectors_of
from embedcore.testing.openai.modes import MODES

ROWS = ["one text", "two words", "three more words", "four of them", "five is the last"]

# Options that keep a test short; the modes that need none are tried as they are.
OPTIONS = {
    "hang": {"seconds": 60},
    "late": {"seconds": 60},
    "slow": {"seconds": 0.001},
    "drip": {"interval": 0.05},
    "endless": {"limit": 1 << 23},
    "gzip_bomb": {"size": 1 << 24},
    "raw": {"body": '{"object": "list"'},
    "rate_limited": {"retry_after_ms": 20},
    "usage": {"value": 0},
}
# One fault and then the truth: what becomes of the call, and is the bill known to the token?
SURVIVED = {
    "ok", "shuffled", "float_list", "usage", "close_after", "leading_space", "wrong_type",
    "zero_vector", "big_endian",
    "rate_limited", "status", "reset", "reset_billed", "reset_unread", "close_silent", "hang",
    "late", "drip", "truncated", "short_chunk", "context_length", "request_too_large", "bad_text",
    "over_rate", "refusal",
    # Asked for again, in parts.
    "bad_base64", "broken_json", "component", "cut_json", "duplicate_index", "duplicate_keys",
    "endless", "fewer", "gzip_bomb", "html", "index_value", "missing_index", "mixed_width",
    "more", "no_vector", "raw", "slow",
}  # fmt: skip
CERTAIN = {
    "ok", "shuffled", "float_list", "leading_space", "wrong_type", "zero_vector",
    "rate_limited", "quota_exhausted", "status", "echo_key", "bad_text",
    "context_length", "request_too_large", "over_rate", "redirect", "component", "refusal",
    "slow",
}  # fmt: skip
# The next request may go to a connection before its end is seen there: nobody reads that one, and
# it is charged by its count as any that is not answered.
MAY_MEET_AN_END = {"close_after"}
# What does not come in time is asked for again, as often as a slow machine makes it late.
SLOW = {mode: {"request_timeout": 1.0, "attempts": 10} for mode in ("hang", "late", "drip")}


def call(client, rows=ROWS, on_error="keep"):
    """The result, or that which an error carries, and the error."""
    try:
        return client.embed(rows, on_error=on_error), None
    except EmbeddingError as error:
        return error.partial, error


@pytest.mark.fault(24)
@pytest.mark.fault(25)
@pytest.mark.fault(31)
@pytest.mark.fault(35)
@pytest.mark.fault(39)
@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_after_any_fault_rows_are_right_and_the_bill_is_covered(
    server, connect, ledger, rows_are_right, mode
):
    client = connect(retry=SLOW.get(mode), options={"max_texts_per_request": 3})
    server.faults.push(mode, **OPTIONS.get(mode, {}))
    result, error = call(client)
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens >= server.meter.billed_tokens
    # What was billed and lost is charged by its count.
    uncertain = SLOW.keys() | MAY_MEET_AN_END
    if mode in CERTAIN - {"component"} or (MODES[mode].bills and mode not in uncertain):
        assert used.spent.tokens == server.meter.billed_tokens
    assert used.spent.tokens == result.usage.tokens
    if mode in ("big_endian", "zero_vector"):
        return  # the numbers are wrong, and nothing in the reply gives that away
    rows_are_right(result, [row[: len(row)] for row in as_cut(result)], 8)
    assert (error is None and result.ok.all()) == (mode in SURVIVED)
    for row in range(len(ROWS)):
        assert error is not None or result.ok[row] or row in result.errors
    server.faults.clear()
    again, error = call(client)
    assert error is None
    rows_are_right(again, ROWS, 8)


def as_cut(result):
    """A row that the server called too long was halved: its text as it was sent."""
    from embedcore_openai.tokenizer import Cl100kTokenizer

    tokenizer = Cl100kTokenizer()
    return [
        tokenizer.prefix(text, tokenizer.count([text])[0] - result.tokens_cut.get(row, 0))
        for row, text in enumerate(ROWS)
    ]


QUICK_MODES = sorted(
    set(MODES) - {"hang", "late", "drip", "endless", "gzip_bomb", "big_endian", "zero_vector"}
    - {"context_length", "echo_key", "redirect", "quota_exhausted"}
)  # fmt: skip
FAULTS = st.lists(
    st.tuples(
        st.sampled_from(QUICK_MODES),
        st.sampled_from([{}, {"status": 500}, {"status": 502}, {"status": 408}]),
    ),
    max_size=14,
)


@settings(
    max_examples=settings.default.max_examples // 2,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(FAULTS, st.integers(1, 14), st.sampled_from(["keep", "raise"]))
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_any_mixture_of_faults(server, connect, ledger, rows_are_right, faults, count, on_error):
    client = connect(
        options={"max_texts_per_request": 3}, concurrency=3, retry={"longest_named_wait": 0.1}
    )
    rows = [f"text number {number}" for number in range(count)]
    server.faults.clear()
    before, bill_before = ledger().spent.tokens, server.meter.billed_tokens
    for mode, options in faults:
        options = OPTIONS.get(mode, options if mode == "status" else {})
        server.faults.push(mode, **options)
    result, _ = call(client, rows, on_error)
    rows_are_right(result, rows, 8)
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens - before == result.usage.tokens
    assert result.usage.tokens >= server.meter.billed_tokens - bill_before
    client.close()


# Waiting


@pytest.mark.fault(20)
@pytest.mark.fault(22)
@pytest.mark.parametrize(
    "named",
    [{"retry_after": 1}, {"retry_after_ms": 400}, {"retry_after": 0.4}, {"retry_after_date": 250}],
    ids=str,
)
def test_a_429_that_names_a_time_is_obeyed(server, connect, ledger, by_clock, named):
    clock = FakeClock()
    client = by_clock(connect(retry={"attempts": 1}), clock)
    server.faults.push("rate_limited", **named)
    began = clock.monotonic()
    result = client.embed(ROWS)
    # A date is seconds away from now, less what it took to get here.
    least, most = (100, 252) if "retry_after_date" in named else (0.4, 2.2)
    assert least <= clock.monotonic() - began < most
    assert result.usage.requests == 2
    assert ledger().spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(22)
def test_a_429_that_names_too_long_a_time_is_an_error_at_once(server, connect):
    client = connect(retry={"longest_named_wait": 5})
    server.faults.push("rate_limited", retry_after=3600)
    with pytest.raises(RateLimited) as caught:
        client.embed(ROWS)
    assert caught.value.retry_at is not None
    assert server.meter.requests == 1


@pytest.mark.fault(20)
@pytest.mark.fault(21)
def test_waiting_for_a_turn_uses_no_attempts_and_other_waits_do(server, connect, ledger, by_clock):
    client = by_clock(connect(retry={"attempts": 2}), FakeClock())
    server.faults.push("rate_limited", times=6, retry_after_ms=10)
    assert client.embed(ROWS).usage.requests == 7
    server.faults.push("rate_limited", times=2)
    assert client.embed(ROWS).usage.requests == 3
    server.faults.push("rate_limited", times=10)
    with pytest.raises(RateLimited):
        client.embed(ROWS)
    assert server.meter.requests == 7 + 3 + 10
    assert ledger().spent.tokens == server.meter.billed_tokens


@pytest.mark.case("B7")
@pytest.mark.fault(22)
def test_a_503_that_names_too_long_a_time_is_about_no_text(server, connect):
    """A model that is being loaded, for instance, with the time that it takes."""
    server.faults.always("status", status=503, retry_after=1200)
    result = connect().embed(ROWS, on_error="keep")
    assert server.meter.requests == 1
    assert all("asks to wait 1,200 s" in str(error) for error in result.errors.values())
    assert len(result.errors) == len(ROWS)


@pytest.mark.case("C1")
@pytest.mark.fault(21)
def test_a_minute_of_429_without_a_time_is_waited_out_for_free(server, connect, ledger, by_clock):
    clock = FakeClock()
    client = by_clock(connect(budget={"daily_token_limit": 200}), clock)
    began = clock.monotonic()
    server.faults.when(lambda _: clock.monotonic() < began + 35, mode="rate_limited")
    assert client.embed(ROWS).ok.all()
    assert server.meter.rejected_requests > 6
    assert ledger().spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(20)
def test_when_the_server_closes_the_gate_all_threads_wait(server, connect):
    arrivals = []
    client = connect(options={"max_texts_per_request": 1}, concurrency=8)
    server.faults.push("rate_limited", times=8, retry_after_ms=500)
    server.faults.when(lambda request: arrivals.append(time.monotonic()), mode="ok")
    began = time.monotonic()
    client.embed([f"row {number}" for number in range(40)])
    assert min(arrivals) - began >= 0.5
    assert server.meter.rejected_requests <= 8


# What no retry mends


@pytest.mark.fault(23)
@pytest.mark.fault(48)
@pytest.mark.parametrize(
    ("mode", "options", "kind"),
    [
        ("quota_exhausted", {}, QuotaExhausted),
        ("status", {"status": 401}, AuthenticationFailed),
        ("status", {"status": 403}, PermissionDenied),
        ("status", {"status": 404}, ModelNotFound),
        ("redirect", {}, ConfigurationError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("on_error", ["keep", "raise"])
def test_what_concerns_the_account_is_raised_at_once(
    server, connect, ledger, rows_are_right, mode, options, kind, on_error
):
    client = connect(options={"max_texts_per_request": 2}, concurrency=1)
    server.faults.push("ok")
    server.faults.push(mode, **options)
    with pytest.raises(kind) as caught:
        client.embed(ROWS, on_error=on_error)
    assert server.meter.requests == 2
    rows_are_right(caught.value.partial, ROWS, 8)
    assert caught.value.partial.ok.tolist() == [True, True, False, False, False]
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(42)
@pytest.mark.fault(47)
@pytest.mark.parametrize("mode", ["other_model", "wrong_width"])
@pytest.mark.parametrize("on_error", ["keep", "raise"])
def test_a_reply_of_other_settings_is_not_asked_for_again(server, connect, ledger, mode, on_error):
    client = connect(options={"max_texts_per_request": 3}, concurrency=1)
    server.faults.push(mode)
    with pytest.raises(ReplyMismatch) as caught:
        client.embed(ROWS, on_error=on_error)
    assert caught.value.billed == "yes"
    assert server.meter.requests == 1
    assert not caught.value.partial.ok.any()
    assert ledger().spent.tokens >= server.meter.billed_tokens


# One bad text, one that is too long, too many


@pytest.mark.fault(50)
@pytest.mark.parametrize("place", [0, 777, 2047])
def test_one_bad_text_among_2048(server, connect, ledger, rows_are_right, place):
    client = connect()
    rows = [f"text number {number}" for number in range(2048)]
    rows[place] += " BAD"
    server.faults.when(marker="BAD", mode="bad_text")
    with pytest.raises(RequestRejected, match=f"row {place}: ") as caught:
        client.embed(rows)
    partial = caught.value.partial
    rows_are_right(partial, rows, 8)
    assert [row for row in range(2048) if not partial.ok[row]] == [place]
    assert server.meter.requests <= 2 + 22
    assert server.meter.billed_twice == {}
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(49)
@pytest.mark.parametrize("wording", ["new", "old"])
def test_a_text_that_the_server_finds_too_long(server, connect, ledger, wording):
    rows = [f"text number {number}" for number in range(20)]
    rows[13] = "LONG " + "word " * 40
    server.faults.when(marker="word word word word " * 6, mode="context_length", wording=wording)
    result = connect().embed(rows)
    assert result.ok.all()
    assert set(result.tokens_cut) == {13}
    assert server.meter.billed_twice == {}
    rejecting = connect(overlong="reject")
    with pytest.raises(InputTooLong, match="row 13: "):
        rejecting.embed(rows)
    kept = rejecting.embed(rows, on_error="keep")
    assert set(kept.errors) == {13}
    assert ledger().spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(51)
def test_requests_that_are_too_large_get_smaller(server, connect, ledger, rows_are_right):
    import json

    client = connect()
    server.faults.when(
        lambda request: len(json.loads(request.body)["input"]) > 100, mode="request_too_large"
    )
    rows = [f"text number {number}" for number in range(1000)]
    rows_are_right(client.embed(rows), rows, 8)
    assert ledger().spent.tokens == server.meter.billed_tokens
    server.faults.clear()
    server.faults.always("status", status=413)
    before = server.meter.requests
    with pytest.raises(RequestTooLarge):
        client.embed(rows, on_error="keep")
    assert server.meter.requests - before <= 64 + 32
    assert ledger().held == Amount()


@pytest.mark.fault(46)
def test_a_bill_above_what_was_held_is_recorded_and_told(server, connect, ledger):
    told = []
    client = connect(observers=[told.append])
    server.faults.always("usage", factor=9)
    # Only what the reply says can be known here: the meter bills the true tokens.
    client.embed(["word"])
    client.embed(["words"])
    violations = [event for event in told if isinstance(event, BoundViolated)]
    assert [(event.reserved, event.billed) for event in violations] == [(4, 9)]
    assert ledger().spent.tokens == 18


def test_what_arrived_stays_as_it_was_when_the_call_ends(connect):
    """The provider writes into the call's own array, and that is moved at the end."""
    # The second row moves all the others by one.
    texts = ["text 0", "text 0", *(f"text {number}" for number in range(1, 39))]
    kept = []
    client = connect(options={"max_texts_per_request": 5, "dimensions": 64})
    result = client.embed(texts, on_arrival=kept.append)
    assert (result.vectors == vectors_of(texts, 64)).all()
    for arrival in kept:
        expected = vectors_of([texts[row] for row in arrival.rows.tolist()], 64)
        assert (arrival.vectors == expected).all()
    assert sum(len(arrival.rows) for arrival in kept) == len(texts)


def test_a_provider_wrapped_by_hand_may_keep_its_replies(connect):
    inner = connect(options={"dimensions": 64})._engine.embedder
    replies = []

    class Keeping(WrapperEmbedder):
        def embed(self, request):
            assert request.into is None
            replies.append((request.texts, super().embed(request)))
            return replies[-1][1]

    texts = ["a", "b", "a", "c", "b"]
    with EmbeddingClient(embedder=Keeping(inner), config={"cache": False}) as client:
        assert (client.embed(texts).vectors == vectors_of(texts, 64)).all()
    for sent, reply in replies:
        assert (reply.vectors == vectors_of(sent, 64)).all()
