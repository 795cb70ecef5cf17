"""Each refusal becomes one typed error that says what it cost, however its body is written."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    InputTooLong,
    InvalidResponse,
    ModelNotFound,
    ProviderError,
    QuotaExhausted,
    RateLimited,
    RequestRejected,
    RequestTooLarge,
    TransientProviderError,
)
from embedcore.provider import replies
from embedcore.provider.error_bodies import error_in, read_body
from embedcore.provider.refusals import (
    FREE_BY_STATUS,
    FREE_WITH_ERROR,
    Asked,
    error_within,
    translate,
)

KEY = "sk-CANARY7d1f0e5b9a4c48229be3"
TABLE = Path(__file__).parent / "cases" / "errors.json"
_CASES: dict[str, list[dict[str, Any]]] = json.loads(TABLE.read_text(encoding="utf-8"))
REFUSALS, WITHIN = _CASES["refusals"], _CASES["within"]
CASES = REFUSALS + WITHIN
# Whatever stands beside empty fields makes an error of them.
IN_JSON = [each for each in CASES if not each.get("text") and "empty fields" not in each["name"]]
NUMBERS = ("retry_after", "max_texts", "max_tokens", "tokens", "position", "billed_tokens")
# What these cost depends on who wrote the body, and so on its shape.
BY_SHAPE = {424, 500, 503, 529}


def asked(case: dict[str, Any] | None = None, **more: Any) -> Asked:
    case = case or {}
    words = " word" * case.get("words", 0)
    texts = [f"text number {number}{words}" for number in range(case.get("texts", 2))]
    return Asked(
        model=case.get("model", "m"),
        endpoint="https://api.example/v1",
        texts=texts,
        secrets=[KEY],
        **more,
    )


def judged(case: dict[str, Any], raw: bytes) -> EmbeddingError:
    """As the answer to a request is."""
    with pytest.raises(EmbeddingError) as caught:
        replies.read(case["status"], case.get("headers", {}), raw, asked(case))
    return caught.value


def written(case: dict[str, Any]) -> bytes:
    body = case["body"]
    return (body if case.get("text") else json.dumps(body, ensure_ascii=False)).encode()


def openai_body(message: str = "no", kind: str = "x", code: str | int | None = None) -> object:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


@pytest.mark.case("B6")
@pytest.mark.case("B7")
@pytest.mark.case("C1")
@pytest.mark.fault(20)
@pytest.mark.fault(21)
@pytest.mark.fault(23)
@pytest.mark.fault(24)
@pytest.mark.fault(25)
@pytest.mark.fault(48)
@pytest.mark.fault(49)
@pytest.mark.fault(51)
@pytest.mark.parametrize("case", REFUSALS, ids=[case["name"] for case in REFUSALS])
def test_a_refusal(case: dict[str, Any]) -> None:
    holds(case, judged(case, written(case)))


@pytest.mark.case("B2")
@pytest.mark.parametrize("case", WITHIN, ids=[case["name"] for case in WITHIN])
def test_an_error_inside_a_success(case: dict[str, Any]) -> None:
    holds(case, judged(case, written(case)))


def holds(case: dict[str, Any], error: EmbeddingError) -> None:
    assert (type(error).__name__, error.billed) == (case["type"], case["billed"]), str(error)
    assert {name: getattr(error, name, None) for name in NUMBERS} == {
        name: case.get(name) for name in NUMBERS
    }
    assert getattr(error, "free_by_status", False) == case.get("free_by_status", False)
    assert error.retryable == isinstance(error, TransientProviderError)
    if isinstance(error, ProviderError):
        assert error.status == case["status"]
    assert f"HTTP {case['status']}" in str(error) or isinstance(error, InvalidResponse)
    assert case.get("says", "") in str(error)


# Mutations: what a body is called, where it stands and what stands beside it changes nothing.


def shuffled(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, shuffled(each, chance)) for key, each in value.items()]
        chance.shuffle(items)
        return dict(items)
    return [shuffled(each, chance) for each in value] if isinstance(value, list) else value


def respelled(value: Any, spell: Any) -> Any:
    if isinstance(value, dict):
        return {spell(key): respelled(each, spell) for key, each in value.items()}
    return [respelled(each, spell) for each in value] if isinstance(value, list) else value


def words_of(key: str) -> list[str]:
    apart = "".join(f"_{each}" if each.isupper() else each for each in key)
    return [word for word in apart.replace("-", "_").lower().split("_") if word]


SPELLINGS = {
    "as it is": lambda key: key,
    "upper": str.upper,
    "snake": lambda key: "_".join(words_of(key)),
    "kebab": lambda key: "-".join(words_of(key)),
    "pascal": lambda key: "".join(word.capitalize() for word in words_of(key)),
}
WRAPPINGS = {
    "as it is": lambda body: body,
    "error": lambda body: {"error": body},
    "list": lambda body: [body],
    "errors": lambda body: {"errors": [body]},
    "detail": lambda body: {"detail": body},
    "response": lambda body: {"Response": {"Error": body}},
    "fault": lambda body: {"fault": body, "ok": False},
}
EXTRA = {
    "request_id": "0af7651916cd43dd8448eb211c80319c",
    "timestamp": 1796000000,
    "path": "/v1/embeddings",
    "success": False,
    "documentation_url": "https://docs.example/errors#429",
    "traceId": "00-0af7-00",
    "version": "1.0",
    "object": "error",
    "hint": None,
    "meta": {"region": "eu-west-1", "took": 3, "tags": []},
}


def with_extras(value: Any, names: list[str]) -> Any:
    if not isinstance(value, dict):
        return value
    added = {name: EXTRA[name] for name in names if name not in value}
    return {**added, **{key: with_extras(each, names[:2]) for key, each in value.items()}}


def numbers_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: numbers_as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [numbers_as_text(each) for each in value]
    return str(value) if type(value) is int else value


@pytest.mark.case("B2")
@pytest.mark.case("B5")
@pytest.mark.case("B6")
@settings(max_examples=3 * settings.default.max_examples)
@given(data=st.data())
def test_other_spellings_of_a_body_mean_the_same(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(IN_JSON))
    body = case["body"]
    plain = judged(case, written(case))
    charged = isinstance(body, dict) and body.keys() & {"usage", "data"}
    body = with_extras(body, data.draw(st.lists(st.sampled_from(sorted(EXTRA)), unique=True)))
    body = numbers_as_text(body) if data.draw(st.booleans()) else body
    wrapping = "as it is" if charged else data.draw(st.sampled_from(sorted(WRAPPINGS)))
    body = WRAPPINGS[wrapping](body)
    if not charged:
        body = respelled(body, SPELLINGS[data.draw(st.sampled_from(sorted(SPELLINGS)))])
    body = shuffled(body, random.Random(data.draw(st.integers(0, 99))))
    indent, ascii_only = data.draw(st.sampled_from([None, 3])), data.draw(st.booleans())
    text = json.dumps(body, indent=indent, ensure_ascii=ascii_only)
    before = data.draw(st.sampled_from(["", "\n \t", "\ufeff", "\ufeff\r\n", " \ufeff"]))
    error = judged(case, (before + text + data.draw(st.sampled_from(["", "\n", "  "]))).encode())
    assert type(error) is type(plain), str(error)
    if case["status"] not in BY_SHAPE and not (plain.billed == "yes" and charged):
        assert error.billed == plain.billed
    for name in NUMBERS:
        assert getattr(error, name, None) == getattr(plain, name, None)


FIELDS = ["error", "message", "type", "code", "detail", "msg", "param", "loc", "status", "errors"]
FIELDS += ["retryDelay", "usage", "data", "input"]


@pytest.mark.fault(52)
@given(
    st.integers(300, 599),
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: (
            st.dictionaries(
                st.sampled_from(FIELDS),
                inner,
            )
            | st.lists(inner, max_size=3)
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.dictionaries(
        st.sampled_from(
            ["retry-after", "location", "date", "x-request-id", "x-ratelimit-reset", "RateLimit"]
        ),
        st.text(max_size=40),
    ),
)
def test_any_answer_becomes_a_short_typed_error(
    status: int, body: bytes, headers: dict[str, str]
) -> None:
    request = Asked(model="m", endpoint="https://api.openai.com/v1", texts=["a"], secrets=[KEY])
    error = translate(status, headers, body, request)
    assert isinstance(error, EmbeddingError)
    assert error.billed in ("no", "unknown", "yes")
    assert len(str(error)) < 600
    assert str(error).isprintable()
    assert error.retryable == isinstance(error, TransientProviderError)
    wait = getattr(error, "retry_after", None)
    assert wait is None or wait > 0
    within = error_within(200, headers, body, request)
    assert within is None or within.billed == "unknown"


# Money


@pytest.mark.case("C1")
@pytest.mark.parametrize("status", sorted(FREE_BY_STATUS | FREE_WITH_ERROR))
def test_that_refusals_are_free_is_an_assumption_to_switch_off(status: int) -> None:
    body = json.dumps(openai_body()).encode()
    error = translate(status, {}, body, asked(refusals_billed="unknown"))
    assert error.billed == "unknown"
    assert not getattr(error, "free_by_status", False)


@pytest.mark.fault(24)
@pytest.mark.parametrize("status", [424, 500, 503, 529])
def test_that_server_errors_are_free_is_an_assumption_to_switch_off(status: int) -> None:
    body = json.dumps(openai_body()).encode()
    assert translate(status, {}, body, asked()).billed == "no"
    assert translate(status, {}, body, asked(server_errors_billed="unknown")).billed == "unknown"


# A text of the caller that is quoted back


@pytest.mark.case("A1")
@pytest.mark.parametrize(
    "text",
    ["my API key is not valid", "API key", "the rate limit: HTTP 429, retry after 99 seconds"],
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_text_that_is_quoted_decides_nothing(text: str, status: int) -> None:
    body = json.dumps(openai_body(f"could not embed: {text}")).encode()
    request = Asked(model="m", endpoint="https://x/v1", texts=["good", text, "better"])
    assert type(translate(status, {}, body, request)) is RequestRejected


# What is shown


def test_the_limits_of_the_headers_come_with_a_refusal() -> None:
    headers = {
        "Retry-After": "20",
        "X-RateLimit-Remaining-Tokens": "0",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    error = translate(429, headers, json.dumps(openai_body()).encode(), asked())
    assert isinstance(error, RateLimited)
    assert error.retry_after == 20
    assert error.limits is not None
    assert (error.limits.remaining_tokens, error.limits.reset_tokens) == (0, 360)


@pytest.mark.fault(36)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_name_the_target_only(status: int) -> None:
    error = translate(status, {"Location": f"https://evil.example/v1?key={KEY}"}, b"", asked())
    assert isinstance(error, ConfigurationError)
    assert "https://evil.example/v1." in str(error)
    assert KEY not in str(error)


def test_a_redirect_without_a_readable_target_is_one_all_the_same() -> None:
    broken = translate(307, {"location": "http://[broken"}, b"", asked())
    assert isinstance(broken, ConfigurationError)
    slash = translate(307, {"location": "/v1/embeddings/"}, b"", asked())
    assert "https://api.example/v1/embeddings/." in str(slash)


def test_a_proxy_that_wants_a_password_is_a_setting() -> None:
    assert isinstance(translate(407, {}, b"<html>", asked()), ConfigurationError)


@pytest.mark.fault(52)
def test_a_huge_message_is_clipped_and_terminal_codes_are_gone() -> None:
    body = json.dumps(openai_body("\x1b[31mred\n" + "x" * 1_000_000)).encode()
    error = translate(400, {}, body, asked())
    assert len(str(error)) < 400
    assert "\x1b" not in str(error)


@pytest.mark.fault(132)
def test_a_request_id_that_is_the_key_is_dropped() -> None:
    body = json.dumps(openai_body()).encode()
    error = translate(400, {"x-request-id": f"req-{KEY}"}, body, asked())
    assert isinstance(error, RequestRejected)
    assert error.request_id is None
    named = translate(400, {"X-Request-Id": "req_1"}, body, asked())
    assert isinstance(named, RequestRejected)
    assert named.request_id == "req_1"


@pytest.mark.fault(52)
@pytest.mark.parametrize(
    ("body", "own", "known", "message", "code"),
    [
        ({"error": {"message": "m", "type": "t", "code": 400}}, True, True, "m", "400"),
        ({"error": "text", "error_type": "Validation"}, True, True, "text", ""),
        ({"object": "error", "message": "m", "type": "T", "code": 400}, True, True, "m", "400"),
        ({"detail": "Not Found"}, True, True, "Not Found", ""),
        ({"detail": [{"msg": "too big", "input": "SECRET"}]}, True, True, "too big", ""),
        ({"error": {"message": {"nested": 1}, "code": True}}, True, True, "", ""),
        ({"error": {}}, False, False, "", ""),
        ({"error": None}, False, False, "", ""),
        ({"error": {"message": "", "code": ""}}, False, False, "", ""),
        ({"message": "Endpoint request timed out"}, False, True, "Endpoint request timed out", ""),
        ({"object": "list", "model": "m"}, False, False, "", ""),
        ([1], False, False, "", ""),
        (b"", False, False, "", ""),
        (b"\xff", False, False, "", ""),
        (b"[" * 10_000, False, False, "", ""),
        (b"[" + b"[]," * 300_000 + b"[]]", False, False, "", ""),
    ],
)
def test_what_is_found_in_a_body(
    body: object, own: bool, known: bool, message: str, code: str
) -> None:
    found = read_body(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert (found.own, found.known) == (own, known)
    assert (found.message, found.code) == (message, code)


@pytest.mark.case("D6")
@pytest.mark.fault(52)
@pytest.mark.parametrize(
    "part", ["<", "<title", "<!--", "{", "[", '"', "\\", "{}", "1s ", "é", "a "]
)
@pytest.mark.parametrize("before", ["", '{"error":"', '{"message":"HTTP 429 {'])
@pytest.mark.parametrize("status", [400, 429])
def test_a_body_of_a_megabyte_of_anything_is_read_quickly(
    part: str, before: str, status: int
) -> None:
    """Each would take hours if any step took a time with the square of its length."""
    raw = (before + part * (1_000_000 // len(part))).encode()[:1_000_000]
    error = translate(status, {}, raw, asked())
    assert len(str(error)) < 600
    error_within(200, {}, raw, asked())


def test_a_body_in_another_unicode_encoding_is_read() -> None:
    raw = json.dumps(openai_body("naïve", code="invalid_api_key")).encode("utf-16")
    assert (read_body(raw).message, read_body(raw).code) == ("naïve", "invalid_api_key")


@given(
    st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.just({}), max_leaves=9)
)
def test_any_document_is_looked_through(document: object) -> None:
    error_in(document)
    error_in({"error": document, "detail": document})


# Bodies that nobody here wrote


def test_errors_of_openai_and_servers_like_it_that_were_reported(recordings: Any) -> None:
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
    found = {}
    for each in recordings("reported_error_bodies.json"):
        error = translate(each["status"], {}, json.dumps(each["body"]).encode(), asked())
        assert error.billed == "no"
        found[each["name"]] = type(error)
    assert found == expected


VENDORS = {
    401: AuthenticationFailed,
    402: QuotaExhausted,
    403: QuotaExhausted,
    404: ModelNotFound,
    429: RateLimited,
}
VENDORS_OTHERWISE = {
    "API key not valid": AuthenticationFailed,
    "payment method in the billing": QuotaExhausted,
    "must have less than": InputTooLong,
    "Too many input tokens": InputTooLong,
    "expected maxLength": InputTooLong,
    "is too large to process": InputTooLong,
    "exceeds the context length": InputTooLong,
    "does not fit into the model": InputTooLong,
    "exceed n_ctx": InputTooLong,
    "max allowed tokens per submitted batch": RequestTooLarge,
    "at most 96": RequestTooLarge,
    "Too many tokens in batch": RequestTooLarge,
    "at most 512 items": RequestTooLarge,
    "payload size exceeds": RequestTooLarge,
    "batch size": RequestTooLarge,
    "最大不得超过": RequestTooLarge,
    "too many instances": RequestTooLarge,
    "is allowed per prediction": RequestTooLarge,
}


def test_errors_of_vendors_that_were_reported(recordings: Any) -> None:
    for vendor, status, body, _ in recordings("vendors/reported_error_bodies.vendors.json"):
        raw = json.dumps(body, ensure_ascii=False)
        request = asked({"texts": 600, "words": 20})
        request = replace(request, texts=[*request.texts, "word " * 9000])
        if status == 200:
            within = error_within(status, {}, raw.encode(), request)
            assert isinstance(within, RateLimited), vendor
            continue
        error = translate(status, {}, raw.encode(), request)
        by_words = (kind for words, kind in VENDORS_OTHERWISE.items() if words in raw)
        kind = next(by_words, VENDORS.get(status, RequestRejected))
        if status == 529:
            assert error.retryable, vendor
        else:
            assert type(error) is kind, (vendor, raw)
        assert error.billed == "no"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("openai_embed_error_404.json", ModelNotFound),
        ("openai_async_embeddings_error_handling.json", ModelNotFound),
        ("vendors/pydantic_ai.cohere_embed_error.json", ModelNotFound),
        ("vendors/pydantic_ai.voyageai_embed_error.json", ModelNotFound),
        ("vendors/pydantic_ai.google_embed_error.json", ModelNotFound),
        ("vendors/pydantic_ai.google_count_tokens_error.json", ModelNotFound),
        ("vendors/openllmetry.azure_openai_classic_embeddings.json", AuthenticationFailed),
    ],
)
def test_recorded_errors(name: str, kind: type, recordings: Any) -> None:
    seen = 0
    for exchange in recordings(name):
        if exchange["status"] < 400:
            continue
        sent = exchange.get("request", {}).get("body") or exchange.get("request_body") or {}
        model = sent.get("model", "m") if isinstance(sent, dict) else "m"
        body = exchange.get("response_body") or exchange.get("body")
        request = Asked(model=model, endpoint="https://x/v1", texts=["a"])
        error = translate(exchange["status"], {}, json.dumps(body).encode(), request)
        assert (type(error), error.billed) == (kind, "no")
        seen += 1
    assert seen
