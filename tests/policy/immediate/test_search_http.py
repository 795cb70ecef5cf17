"""One bad text, or too many of them, over a real socket: do the good ones get their vectors?"""

from __future__ import annotations

import json

import pytest

from embedcore.errors import (
    EmbeddingError,
    PermanentProviderError,
    PermissionDenied,
    ProviderUnavailable,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.embeddings import FakeModel

MODEL = "bge-m3"


@pytest.fixture
def server():
    """A server whose model no table has."""
    with FakeOpenAI(models={MODEL: FakeModel(dimensions=8)}) as server:
        yield server


@pytest.fixture
def client(connect):
    """``client(max_texts_per_request=…)``: of that model, which may cost what it likes."""

    def client(**options):
        settings = options.pop("settings", {})
        return connect(model=f"openai:{MODEL}", options=options, **settings)

    return client


def asked(request):
    return json.loads(request.body)["input"]


def numbered(count):
    return [f"text number {number}" for number in range(count)]


@pytest.mark.case("A1")
def test_texts_that_are_too_long_fail_alone_in_a_fresh_client(
    server, client, ledger, rows_are_right
):
    rows = ["a " * 2000, "fine", "b " * 2000]
    server.faults.when(
        lambda request: max(map(len, asked(request))) > 2000,
        mode="refusal",
        message="This model's maximum context length is 512 tokens.",
    )
    result = client().embed(rows, on_error="keep")
    assert result.ok.tolist() == [False, True, False]
    assert sorted(result.errors) == [0, 2]
    assert [error.position for _, error in sorted(result.errors.items())] == [0, 2]
    rows_are_right(result, rows, 8)
    assert ledger().held == Amount()
    assert ledger().spent.tokens == server.meter.billed_tokens


@pytest.mark.case("A1")
def test_two_bad_texts_in_each_of_many_requests_cost_no_other_row(
    server, client, ledger, rows_are_right
):
    rows = [f"text {number}" + " BAD" * (number % 32 in (5, 25)) for number in range(320)]
    server.faults.when(marker="BAD", mode="refusal", status=422, message="cannot be embedded")
    result = client().embed(rows, on_error="keep")
    assert [row for row in range(320) if "BAD" in rows[row]] == sorted(result.errors)
    for row, error in result.errors.items():
        assert isinstance(error, PermanentProviderError)
        assert error.position == row
    rows_are_right(result, rows, 8)
    assert ledger().spent.tokens >= server.meter.billed_tokens


@pytest.mark.case("A2")
def test_without_keep_the_first_row_at_fault_is_named(server, client):
    rows = [f"text {number}" + " BAD" * (number in (5, 25)) for number in range(30)]
    server.faults.when(marker="BAD", mode="bad_text")
    with pytest.raises(RequestRejected, match=r"^row 5: ") as caught:
        client().embed(rows)
    assert caught.value.position == 5


@pytest.mark.case("A3")
def test_a_text_that_makes_the_server_fail_every_time_fails_alone(
    server, client, ledger, rows_are_right
):
    rows = [f"text {number}" + " BAD" * (number == 7) for number in range(64)]
    server.faults.when(marker="BAD", mode="status", status=500)
    result = client().embed(rows, on_error="keep")
    assert sorted(result.errors) == [7]
    assert isinstance(result.errors[7], ProviderUnavailable)
    rows_are_right(result, rows, 8)
    assert server.meter.requests <= 1 + 3 + 2 * 5 + 3
    assert ledger().spent.tokens >= server.meter.billed_tokens


@pytest.mark.case("A4")
@pytest.mark.parametrize("kind", ["null", "empty", "nulls", "nan"])
def test_a_text_without_a_vector_costs_the_others_nothing(
    server, client, ledger, rows_are_right, kind
):
    rows = [f"text {number}" + " BAD" * (number == 41) for number in range(100)]
    server.faults.when(marker="BAD", mode="no_vector", kind=kind)
    one = client(encoding="float")
    result = one.embed(rows, on_error="keep")
    assert sorted(result.errors) == [41]
    assert result.errors[41].position == 41
    rows_are_right(result, rows, 8)
    assert ledger().spent.tokens >= server.meter.billed_tokens
    with pytest.raises(EmbeddingError, match=r"^row 41: "):
        one.embed(rows)


@pytest.mark.case("B1")
def test_a_server_that_numbers_no_vector_is_said_once_with_the_option(
    server, client, rows_are_right, caplog
):
    server.faults.always("missing_index")
    rows = numbered(50)
    one = client(encoding="float")
    for _ in range(2):
        rows_are_right(one.embed(rows), rows, 8)
        rows = [f"{row} again" for row in rows]
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "trust_order" in said


WORDINGS = [
    "250 instance(s) is allowed per prediction",
    "must be at most 10",
    "batch size limit is 10",
    "input数组最大不得超过10条",
    "List should have at most 10 items after validation, not 32",
    "expected maximum item count: 10",
    "less than or equal to 10",
    "zu viele Texte",
    "row 1 of 3 is above 2",
]


@pytest.mark.case("A6")
@pytest.mark.parametrize(
    ("wording", "status"),
    # Each wording with one status, and each status with three wordings; all of them in campaigns.
    [
        pytest.param(
            wording,
            status,
            marks=[] if row % 3 == column else pytest.mark.campaign(short=True),
        )
        for row, wording in enumerate(WORDINGS)
        for column, status in enumerate([400, 413, 422])
    ],
)
def test_a_server_that_takes_ten_texts_and_says_so_in_its_own_words(
    server, client, ledger, rows_are_right, wording, status
):
    rows = numbered(100)
    server.faults.when(
        lambda request: len(asked(request)) > 10, mode="refusal", status=status, message=wording
    )
    one = client(settings={"concurrency": 1})
    result = one.embed(rows)
    rows_are_right(result, rows, 8)
    assert server.meter.billed_twice == {}
    # It is known by now, to all clients of this endpoint and model in the process.
    for again in (one, client(settings={"concurrency": 1})):
        before = server.meter.requests
        again.embed([f"{row} again" for row in rows[:20]])
        assert server.meter.requests - before <= 5
    assert ledger().spent.tokens >= server.meter.billed_tokens


@pytest.mark.case("A7")
@pytest.mark.parametrize("on_error", ["keep", "raise"])
@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_a_request_at_fault_is_said_once_and_no_row_is_blamed(server, client, on_error, status):
    server.faults.always("refusal", status=status, message="Unrecognized request argument")
    with pytest.raises(EmbeddingError, match="no text's fault") as caught:
        client(settings={"concurrency": 1}).embed(numbered(100), on_error=on_error)
    assert caught.value.position is None
    assert "row" not in str(caught.value)
    # Three attempts, or one; two texts and our sentence, each alone, and other ways of asking for
    # them: two, and one.
    assert server.meter.requests <= (6 if status == 500 else 7)


@pytest.mark.case("A5")
@pytest.mark.campaign
def test_a_server_that_needs_its_time_for_each_text(server, client, ledger, rows_are_right):
    rows = numbered(64)
    server.faults.always("slow", seconds=0.05)
    one = client(settings={"retry": {"request_timeout": 1.0}})
    result = one.embed(rows)
    rows_are_right(result, rows, 8)
    before = server.meter.requests
    one.embed([f"{row} again" for row in rows])
    assert server.meter.requests - before == 4, "16 texts are known to be in time"
    assert ledger().spent.tokens >= server.meter.billed_tokens


def test_what_is_refused_for_its_size_alone_is_its_own_reason(server, client):
    rows = ["short", "x" * 5000, "short as well"]
    server.faults.when(
        lambda request: sum(map(len, asked(request))) > 4000, mode="refusal", status=413
    )
    result = client().embed(rows, on_error="keep")
    assert sorted(result.errors) == [1]
    assert isinstance(result.errors[1], RequestTooLarge)


FIREWALLS = [
    (403, "<html><title>Attention Required! | Cloudflare</title><p>Sorry, blocked</p></html>"),
    (403, ""),
    (403, "error code: 1020"),
    (403, "The requested URL was rejected. Your support ID is: 1234567890"),
    (405, "<html><title>405</title><p>potential threats to the server</p></html>"),
    (406, "<h1>Not Acceptable!</h1>An appropriate representation was not found. Mod_Security"),
    (418, "<html>blocked</html>"),
]


@pytest.mark.case("A1")
@pytest.mark.parametrize(("status", "body"), FIREWALLS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("bad", [{17}, {0, 63}])
def test_a_firewall_that_dislikes_a_text_costs_no_other_its_vector(
    server, client, ledger, rows_are_right, status, body, bad
):
    """Its page says nothing of the text, and its status is that of a key without permission."""
    rows = [f"1' OR {row}=1 --" if row in bad else text for row, text in enumerate(numbered(64))]
    server.faults.when(
        lambda request: any("OR" in text for text in asked(request)),
        mode="raw",
        status=status,
        body=body,
        content_type="text/html",
        bills=False,
    )
    result = client().embed(rows, on_error="keep")
    assert set(result.errors) == bad
    assert all(isinstance(error, RequestRejected) for error in result.errors.values())
    rows_are_right(result, rows, 8)
    assert server.meter.requests <= 2 * len(bad) * 5 + 8
    assert ledger().held == Amount()
    if status in (403, 405):
        assert ledger().spent.tokens == server.meter.billed_tokens


@pytest.mark.parametrize("body", [body for status, body in FIREWALLS if status == 403])
@pytest.mark.parametrize("on_error", ["keep", "raise"])
@pytest.mark.parametrize("per_request", [1, 32])
def test_a_firewall_that_lets_nothing_through_ends_the_call_soon(
    server, client, ledger, body, on_error, per_request
):
    """A wrong key, or an address that it does not serve."""
    server.faults.always("raw", status=403, body=body, content_type="text/html", bills=False)
    with pytest.raises(RequestRejected, match="firewall") as caught:
        client(max_texts_per_request=per_request).embed(numbered(640), on_error=on_error)
    if per_request > 1:
        assert caught.value.position is None
        assert "no text's fault" in str(caught.value)
    assert server.meter.requests <= 8 + 16
    assert ledger().spent == Amount()


@pytest.mark.parametrize(
    "body",
    [
        {"message": "this key has no permission"},
        {"error": {"message": "access denied", "code": None}},
        {"error": {"message": "no", "code": "permission_denied"}},
    ],
)
def test_an_error_of_the_api_that_is_about_permission_ends_the_call_at_once(server, client, body):
    server.faults.always("raw", status=403, body=json.dumps(body), bills=False)
    with pytest.raises(PermissionDenied):
        client().embed(numbered(64), on_error="keep")
    assert server.meter.requests <= 2


# Of gateways and guards, of a key or of a text.
TELLS_NOTHING = [
    {"message": "Forbidden"},
    {"error": "Forbidden"},
    {"detail": "Request blocked by guardrail"},
    {"error": {"message": "Request blocked: prompt injection detected"}},
    {"error": {"message": "Sensitive data detected in input", "type": "guard"}},
]


@pytest.mark.case("A1")
@pytest.mark.parametrize("body", TELLS_NOTHING, ids=str)
def test_a_403_that_does_not_say_whose_fault_it_is_costs_no_other_text(
    server, client, rows_are_right, body
):
    texts = [*numbered(40), "BAD"]
    server.faults.when(mode="raw", marker="BAD", status=403, body=json.dumps(body), bills=False)
    result = client().embed(texts, on_error="keep")
    assert list(result.errors) == [40]
    rows_are_right(result, texts, 8)


@pytest.mark.parametrize("body", TELLS_NOTHING, ids=str)
def test_where_it_is_said_of_everything_the_call_ends_soon(server, client, ledger, body):
    server.faults.always("raw", status=403, body=json.dumps(body), bills=False)
    with pytest.raises(RequestRejected, match="no text's fault"):
        client().embed(numbered(640), on_error="keep")
    assert server.meter.requests <= 8 + 16
    assert ledger().spent == Amount()
