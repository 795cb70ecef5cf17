"""Each refusal becomes one typed error that says what it cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from embedcore_openai.errorbody import read_body
from embedcore_openai.errors import Context, from_answer, from_bad_reply
from embedcore_openai.transport import Answer
from embedcore_openai.wire import BadReply
from hypothesis import given, strategies as st

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    InputTooLong,
    InvalidResponse,
    ModelNotFound,
    OutcomeUnknown,
    PermanentProviderError,
    PermissionDenied,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    RequestRejected,
    RequestTooLarge,
    TransientProviderError,
)

KEY = "sk-CANARY7d1f0e5b9a4c48229be3"


def translate(
    status: int, body: object = None, *, texts: int = 2, billed: Any = "no", **headers: str
) -> EmbeddingError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    context = Context(
        model="m",
        endpoint="https://api.openai.com/v1",
        texts=[f"text number {number}" for number in range(texts)],
        secrets=[KEY],
        server_errors_billed=billed,
    )
    return from_answer(Answer(status=status, headers=named, body=raw), context)


def openai_body(message: str = "no", kind: str = "x", code: str | int | None = None) -> object:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


OWN = openai_body()
PAGE = b"<html><body>Bad gateway</body></html>"


@pytest.mark.parametrize(
    ("status", "own", "kind", "billed"),
    [
        pytest.param(400, True, RequestRejected, "no", marks=pytest.mark.fault(50)),
        (400, False, RequestRejected, "unknown"),
        pytest.param(401, True, AuthenticationFailed, "no", marks=pytest.mark.fault(48)),
        (401, False, AuthenticationFailed, "no"),
        (402, True, QuotaExhausted, "no"),
        (402, False, QuotaExhausted, "unknown"),
        pytest.param(403, True, PermissionDenied, "no", marks=pytest.mark.fault(48)),
        (403, False, PermissionDenied, "no"),
        pytest.param(404, True, ModelNotFound, "no", marks=pytest.mark.fault(48)),
        (404, False, ModelNotFound, "no"),
        (405, True, RequestRejected, "no"),
        (405, False, RequestRejected, "unknown"),
        pytest.param(408, True, OutcomeUnknown, "unknown", marks=pytest.mark.fault(25)),
        pytest.param(409, True, OutcomeUnknown, "unknown", marks=pytest.mark.fault(25)),
        pytest.param(413, True, RequestTooLarge, "no", marks=pytest.mark.fault(51)),
        (413, False, RequestTooLarge, "no"),
        pytest.param(422, True, RequestRejected, "no", marks=pytest.mark.fault(51)),
        (422, False, RequestRejected, "unknown"),
        (424, True, ProviderUnavailable, "no"),
        (424, False, ProviderUnavailable, "unknown"),
        pytest.param(429, True, RateLimited, "no", marks=pytest.mark.fault(21)),
        (429, False, RateLimited, "unknown"),
        pytest.param(500, True, ProviderUnavailable, "no", marks=pytest.mark.fault(24)),
        (500, False, ProviderUnavailable, "unknown"),
        (501, True, ProviderUnavailable, "unknown"),
        pytest.param(502, True, OutcomeUnknown, "unknown", marks=pytest.mark.fault(24)),
        pytest.param(503, True, ProviderUnavailable, "no", marks=pytest.mark.fault(24)),
        (503, False, ProviderUnavailable, "unknown"),
        pytest.param(504, True, OutcomeUnknown, "unknown", marks=pytest.mark.fault(24)),
        (520, False, ProviderUnavailable, "unknown"),
        pytest.param(529, True, ProviderUnavailable, "no", marks=pytest.mark.fault(24)),
    ],
)
def test_status_decides_kind_and_bill(status: int, own: bool, kind: type, billed: str) -> None:
    error = translate(status, OWN if own else PAGE, x_request_id="req_1")
    assert (type(error), error.billed) == (kind, billed)
    assert error.retryable == issubclass(kind, TransientProviderError)
    assert (error.status, error.request_id) == (status, "req_1")  # type: ignore[attr-defined]
    assert f"HTTP {status}" in str(error)


@pytest.mark.fault(24)
@pytest.mark.parametrize("status", [424, 500, 503, 529])
def test_that_server_errors_are_free_is_an_assumption_to_switch_off(status: int) -> None:
    assert translate(status, OWN, billed="unknown").billed == "unknown"


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("insufficient_quota", "insufficient_quota"),
        ("insufficient_quota", None),
        ("insufficient_quota", "credit_balance_exhausted"),
        ("x", "credit_balance_exhausted"),
        ("x", "organization_spend_limit_exceeded"),
        ("x", "project_spend_limit_exceeded"),
        ("x", "organization_usage_limit_exceeded"),
        ("x", "billing_hard_limit_reached"),
    ],
)
def test_no_money_left_is_permanent(kind: str, code: str | None) -> None:
    error = translate(429, openai_body(kind=kind, code=code), retry_after="5")
    assert type(error) is QuotaExhausted
    assert (error.billed, error.retryable) == ("no", False)


@pytest.mark.fault(20)
@pytest.mark.parametrize("code", ["rate_limit_exceeded", "slow_down", None])
def test_too_fast_carries_wait_and_limits(code: str | None) -> None:
    error = translate(
        429,
        openai_body("Rate limit reached for m on tokens per min", "tokens", code),
        retry_after="20",
        x_ratelimit_remaining_tokens="0",
        x_ratelimit_reset_tokens="6m0s",
    )
    assert isinstance(error, RateLimited)
    assert error.retry_after == 20
    assert error.limits is not None
    assert (error.limits.remaining_tokens, error.limits.reset_tokens) == (0, 360)


def test_one_request_above_the_limit_per_minute_can_never_pass() -> None:
    message = "Request too large for m on tokens per min (TPM): Limit 1000000, Requested 1003160."
    error = translate(429, openai_body(message, "tokens", "rate_limit_exceeded"))
    assert type(error) is RequestTooLarge


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (
            400,
            openai_body(
                "Requested 306153 tokens, max 300000 tokens per request",
                "max_tokens_per_request",
                "max_tokens_per_request",
            ),
        ),
        (400, openai_body("Invalid 'input': maximum request size is 300000 tokens per request.")),
        (400, openai_body("array length must be 2048 or less")),
        (400, openai_body("Invalid 'input': array too long.", code="array_above_max_length")),
        (
            422,
            {
                "message": "batch size 33 > maximum allowed batch size 32",
                "code": 422,
                "type": "Validation",
            },
        ),
        (
            400,
            {
                "object": "error",
                "message": "Too many inputs in request, split.",
                "type": "invalid_request_prompt",
                "param": None,
                "code": "3210",
            },
        ),
        (400, {"error": {"message": "at most 100 requests can be in one batch", "code": 400}}),
    ],
)
def test_too_much_in_one_request(status: int, body: object) -> None:
    error = translate(status, body)
    assert (type(error), error.billed) == (RequestTooLarge, "no")


@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("status", "body", "position"),
    [
        (400, openai_body("Invalid 'input[1]': maximum input length is 8192 tokens."), 1),
        (400, openai_body("Invalid 'input[7]': maximum input length is 8192 tokens."), None),
        (
            400,
            openai_body(
                "This model's maximum context length is 8192 tokens, however you "
                "requested 13028 tokens"
            ),
            None,
        ),
        (400, openai_body("whatever", code="context_length_exceeded"), None),
        (
            400,
            {"error": {"message": "x", "code": "string_above_max_length", "param": "input[1]"}},
            1,
        ),
        (
            422,
            {
                "message": "`inputs` must have less than 512 tokens. Given: 600",
                "code": 422,
                "type": "Validation",
            },
            None,
        ),
        (
            500,
            {
                "error": {
                    "message": "input is too large to process. increase the batch size",
                    "code": 500,
                    "type": "server_error",
                }
            },
            None,
        ),
    ],
)
def test_a_text_too_long_is_named(status: int, body: object, position: int | None) -> None:
    error = translate(status, body)
    assert isinstance(error, InputTooLong)
    assert (error.position, error.billed) == (position, "no")


def test_the_only_text_of_a_request_is_the_one_that_is_too_long() -> None:
    error = translate(400, openai_body(code="context_length_exceeded"), texts=1)
    assert isinstance(error, InputTooLong)
    assert error.position == 0


@pytest.mark.fault(36)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_name_the_target_only(status: int) -> None:
    error = translate(status, b"", location=f"https://evil.example/v1?key={KEY}")
    assert isinstance(error, ConfigurationError)
    assert "evil.example" in str(error)
    assert KEY not in str(error)


def test_a_redirect_without_a_readable_target_is_one_all_the_same() -> None:
    assert isinstance(translate(307, b"", location="http://[broken"), ConfigurationError)
    assert "api.openai.com" in str(translate(308, b"", location="/elsewhere"))


def test_a_proxy_that_wants_a_password_is_a_setting() -> None:
    assert isinstance(translate(407, PAGE), ConfigurationError)


@pytest.mark.fault(52)
@pytest.mark.parametrize(
    ("body", "own", "message", "code"),
    [
        ({"error": {"message": "m", "type": "t", "code": 400}}, True, "m", "400"),
        ({"error": "text", "error_type": "Validation"}, True, "text", ""),
        (
            {"object": "error", "message": "m", "type": "BadRequestError", "code": 400},
            True,
            "m",
            "400",
        ),
        ({"detail": "Not Found"}, True, "Not Found", ""),
        ({"detail": [{"msg": "too big", "input": "SECRET TEXT"}]}, True, "too big", ""),
        ({"error": {"message": {"nested": 1}, "code": True}}, True, "", ""),
        ({"error": {}}, False, "", ""),
        ({"error": None}, False, "", ""),
        ({"message": "Endpoint request timed out"}, False, "", ""),
        ([1], False, "", ""),
        (b"", False, "", ""),
        (b"\xff", False, "", ""),
        (b"[" * 10_000, False, "", ""),
    ],
)
def test_error_bodies_of_all_shapes(body: object, own: bool, message: str, code: str) -> None:
    found = read_body(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert (found.own, found.message, found.code) == (own, message, code)


@pytest.mark.fault(52)
@given(
    st.integers(300, 599),
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=30),
        lambda inner: (
            st.dictionaries(
                st.sampled_from(["error", "message", "type", "code", "detail", "msg", "param"]),
                inner,
            )
            | st.lists(inner, max_size=3)
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.dictionaries(
        st.sampled_from(["retry-after", "location", "date", "x-request-id"]), st.text(max_size=40)
    ),
)
def test_any_answer_becomes_a_short_typed_error(
    status: int, body: bytes, headers: dict[str, str]
) -> None:
    context = Context(model="m", endpoint="https://api.openai.com/v1", texts=["a"], secrets=[KEY])
    error = from_answer(Answer(status=status, headers=headers, body=body), context)
    assert isinstance(error, EmbeddingError)
    assert error.billed in ("no", "unknown")
    assert len(str(error)) < 600
    assert str(error).isprintable()
    assert error.retryable == isinstance(error, TransientProviderError)


@pytest.mark.fault(52)
def test_a_huge_message_is_clipped_and_terminal_codes_are_gone() -> None:
    error = translate(400, openai_body("\x1b[31mred\n" + "x" * 1_000_000))
    assert len(str(error)) < 400
    assert "\x1b" not in str(error)


@pytest.mark.fault(132)
def test_a_request_id_that_is_the_key_is_dropped() -> None:
    error = translate(400, OWN, x_request_id=f"req-{KEY}")
    assert isinstance(error, RequestRejected)
    assert error.request_id is None


@pytest.mark.fault(33)
def test_a_page_instead_of_json_is_shown_shortly() -> None:
    page = b"<html><head><title>Sign in</title></head>" + b"<p>" + KEY.encode() + b"x" * 5_000
    answer = Answer(status=200, headers={"content-type": "text/html"}, body=page)
    context = Context(model="m", endpoint="http://localhost/v1", secrets=[KEY])
    error = from_bad_reply(BadReply("it is not valid JSON", not_json=True), answer, context)
    assert isinstance(error, InvalidResponse)
    assert (error.billed, error.retryable) == ("yes", False)
    assert "text/html: <html><head><title>Sign in" in str(error)
    assert KEY[:8] not in str(error)
    assert len(str(error)) < 400


def test_a_success_that_is_an_error_says_so() -> None:
    answer = Answer(status=200, body=json.dumps(openai_body("no provider is up")).encode())
    context = Context(model="m", endpoint="http://localhost/v1")
    error = from_bad_reply(BadReply("it has no list of embeddings"), answer, context)
    assert "no provider is up" in str(error)


def test_errors_that_were_recorded_or_reported(recordings: Any) -> None:
    expected = {
        "input_too_long": InputTooLong,
        "input_too_long_old_wording": InputTooLong,
        "request_too_many_tokens_a": RequestTooLarge,
        "request_too_many_tokens_b": RequestTooLarge,
        "invalid_input_old": RequestRejected,
        "invalid_api_key": AuthenticationFailed,
        "insufficient_quota_old": QuotaExhausted,
        "rate_limit_tokens": RequestTooLarge,
        "mistral_too_many_inputs": RequestTooLarge,
        "vllm_no_matryoshka": RequestRejected,
    }
    reported = recordings("reported_error_bodies.json")
    assert {each["name"]: type(translate(each["status"], each["body"])) for each in reported} == (
        expected
    )
    for name in ("openai_embed_error_404.json", "openai_async_embeddings_error_handling.json"):
        for exchange in recordings(name):
            error = translate(exchange["status"], exchange["response_body"])
            assert isinstance(error, PermanentProviderError)
            assert (type(error), error.code) == (ModelNotFound, "model_not_found")
