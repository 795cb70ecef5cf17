"""What a request cost whose reply does not say it, and a refusal that does."""

from __future__ import annotations

import json

import pytest

from embedcore.storage.amounts import Amount

TEXTS = ["a quick brown fox", "字" * 20, "x" * 300]
# Left out, null, zero, nonsense, and a number that no account could pay.
UNSAID = [{}, {"value": "null"}, {"value": 0}, {"value": "many"}, {"value": -5}, {"value": 2**70}]


@pytest.fixture
def nobody_counts(monkeypatch):
    """The model is one whose tokenizer is not known."""
    monkeypatch.setattr("embedcore_openai.models.counts_like_openai", lambda *_: False)


@pytest.mark.case("B4")
@pytest.mark.fault(44)
@pytest.mark.parametrize("usage", UNSAID)
def test_the_count_of_an_exact_tokenizer_stands(server, connect, ledger, usage):
    server.faults.always("usage", **usage)
    result = connect(daily=100_000).embed(TEXTS)
    assert result.usage.tokens == server.meter.billed_tokens
    assert not result.usage.exact
    used = ledger()
    assert (used.spent.tokens, used.held) == (server.meter.billed_tokens, Amount())


@pytest.mark.case("B4")
@pytest.mark.fault(44)
@pytest.mark.parametrize("usage", UNSAID)
def test_without_one_the_bound_does(server, connect, ledger, nobody_counts, usage):
    server.faults.always("usage", **usage)
    client = connect(daily=100_000)
    result = client.embed(TEXTS)
    assert result.usage.tokens == sum(len(text.encode()) for text in TEXTS)
    assert ledger().spent.tokens == result.usage.tokens >= server.meter.billed_tokens


@pytest.mark.case("B4")
@pytest.mark.fault(44)
@pytest.mark.parametrize("form", [float, str, lambda value: f"{value}.0"])
def test_a_usage_in_another_form_is_what_was_billed(server, connect, ledger, nobody_counts, form):
    client = connect(daily=100_000)
    client.embed(TEXTS)
    billed = server.meter.billed_tokens
    server.faults.always("usage", value=form(billed))
    result = client.embed(TEXTS)
    assert result.usage.exact
    assert result.usage.tokens == billed
    assert ledger().spent.tokens == server.meter.billed_tokens == 2 * billed


@pytest.mark.case("B4")
def test_a_tokenizer_that_fails_costs_no_vectors(server, connect, ledger, monkeypatch):
    client = connect(daily=100_000)
    server.faults.always("usage")
    tokenizer = client._engine.tokenizer
    monkeypatch.setattr(tokenizer._inner, "count", lambda texts: [1, 2, 3, 4, 5])
    result = client.embed(TEXTS)
    assert result.ok.all()
    assert ledger().spent.tokens == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.case("C1")
@pytest.mark.parametrize(("status", "tokens"), [(400, 7), (422, 900), (429, 7)])
def test_a_refusal_that_says_what_it_cost_costs_that(server, connect, ledger, status, tokens):
    body = json.dumps({"error": {"message": "no"}, "usage": {"prompt_tokens": tokens}})
    server.faults.always("raw", status=status, body=body, bills=False)
    client = connect(daily=100_000, retry={"attempts": 1, "quota": 0})
    result = client.embed(["one"], on_error="keep")
    assert not result.ok.any()
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens == result.usage.tokens == tokens * result.usage.requests


@pytest.mark.case("C1")
@pytest.mark.parametrize(
    "body",
    [
        '{"statusCode":429,"message":"Rate limit is exceeded."}',
        "<html><title>429 Too Many Requests</title></html>",
        "",
        '{"message":"API rate limit exceeded"}',
        "[]",
        "error code: 1015",
    ],
)
def test_a_gateway_that_refuses_costs_nothing(server, connect, ledger, body):
    """Twice, then it is let through; the limit has room for the request alone."""
    server.faults.push("raw", status=429, body=body, times=2, bills=False)
    result = connect(daily=sum(len(text.encode()) for text in TEXTS)).embed(TEXTS)
    assert result.ok.all()
    assert server.meter.requests == 3
    used = result.usage
    assert ledger().spent.tokens == used.tokens == server.meter.billed_tokens
    # Without an error in it that can be read: what it would have cost had it been billed.
    times = 2 if body in ("", "[]") or "<" in body else 0
    assert used.free_by_status_requests == times
    assert used.free_by_status_tokens == times * used.tokens
    assert used.free_by_status_cost == times * used.cost


@pytest.mark.case("C1")
def test_a_refusal_with_an_error_in_it_is_free_by_more_than_its_status(server, connect, ledger):
    body = json.dumps({"error": {"message": "too fast", "type": "requests", "code": "rate"}})
    server.faults.push("raw", status=429, body=body, times=2, bills=False)
    result = connect(daily=100_000).embed(TEXTS)
    assert result.ok.all()
    assert ledger().spent.tokens == result.usage.tokens == server.meter.billed_tokens
    assert result.usage.free_by_status_requests == result.usage.free_by_status_tokens == 0
