"""What one line of results means: a vector, or a reason; never a wrong vector, never a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pybase64
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from embedcore.provider import batch_lines as outcomes
from embedcore.provider.batch_lines import LineReader
from embedcore.provider.types import BatchOutcome

READER = LineReader(shown=str, errors_billed="no")
FLOATS = arrays.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def success(embedding: object, /, *, item: object = "3", **body: object) -> dict[str, Any]:
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "embedding": embedding, "index": 0}],
        "model": "text-embedding-3-small",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
        **body,
    }
    response = {"status_code": 200, "request_id": "r", "body": answer}
    return {"id": "batch_req_1", "custom_id": item, "response": response, "error": None}


def read(document: object) -> BatchOutcome:
    return READER.read(document if isinstance(document, bytes) else json.dumps(document).encode())


def digits(vector: Any) -> str:
    return pybase64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


@pytest.mark.parametrize("encode", [digits, lambda vector: vector.tolist()])
@pytest.mark.parametrize("compact", [True, False])
@given(vector=FLOATS)
def test_both_encodings_give_the_vector(
    encode: Callable[[Any], object], compact: bool, vector: Any
) -> None:
    document = success(encode(vector))
    outcome = read(json.dumps(document, separators=(",", ":") if compact else None).encode())
    assert (outcome.id, outcome.tokens, outcome.error) == ("3", 6, None)
    assert outcome.model == "text-embedding-3-small"
    assert outcome.vector is not None
    assert outcome.vector.dtype == np.float32
    assert np.array_equal(outcome.vector, vector)


@given(vector=FLOATS, as_digits=st.booleans())
def test_the_fast_way_and_the_whole_way_agree(vector: Any, as_digits: bool) -> None:
    document = success(digits(vector) if as_digits else vector.tolist())
    line = json.dumps(document).encode()
    fast = outcomes._apart(line)
    assert fast is not None
    whole = outcomes._vector(outcomes._body(outcomes._document(line)["response"]))
    assert np.array_equal(fast[1], whole)


def test_a_body_as_a_string_of_json_is_read() -> None:
    document = success([0.25, -1.5])
    document["response"]["body"] = json.dumps(document["response"]["body"])
    outcome = read(document)
    assert outcome.vector is not None
    assert outcome.vector.tolist() == [0.25, -1.5]
    assert (outcome.tokens, outcome.model) == (6, "text-embedding-3-small")


def test_the_recorded_output_is_read() -> None:
    path = Path(__file__).parents[4] / "shared" / "fixtures" / "openai_embedding_batch_output.jsonl"
    if not path.is_file():
        pytest.skip("the recording is not here")
    found = [read(line) for line in path.read_bytes().splitlines()]
    assert [(each.id, each.tokens, each.error) for each in found] == [
        ("0", 6, None),
        ("1", 7, None),
    ]
    assert [each.vector.shape for each in found if each.vector is not None] == [(1536,), (256,)]


EMPTY_ERRORS = [
    {"code": "", "message": ""},
    {"code": None, "message": None, "param": None, "type": None},
    {"code": 0, "message": " "},
    {"data": [], "object": ""},
    {},
    [],
    [{}],
    "",
    "  ",
    False,
    {"error": {"message": ""}},
    "null",
    " None ",
    {"code": "null", "message": "null"},
]


@pytest.mark.case("E8")
@pytest.mark.parametrize("error", EMPTY_ERRORS, ids=repr)
@pytest.mark.parametrize("encode", [digits, lambda vector: vector])
def test_an_error_that_says_nothing_is_none(error: object, encode: Callable[[Any], Any]) -> None:
    document = {**success(encode([0.5, -1.0])), "error": error}
    outcome = read(document)
    assert outcome.vector is not None, outcome.error
    assert outcome.vector.tolist() == [0.5, -1.0]
    assert (outcome.id, outcome.tokens, outcome.error) == ("3", 6, None)


@pytest.mark.case("E8")
@pytest.mark.parametrize(
    "error",
    [{"code": "x", "message": ""}, {"code": "", "message": "no"}, {"code": 1}, "no", [{"code": 5}]],
    ids=repr,
)
def test_an_error_that_says_anything_is_one(error: object) -> None:
    outcome = read({**success([0.5]), "error": error})
    assert outcome.vector is None
    assert outcome.error


@pytest.mark.parametrize("status", ["200", 200, 201, None])
def test_a_status_may_be_written_as_text(status: object) -> None:
    document = success([0.5])
    document["response"]["status_code"] = status
    assert read(document).vector is not None
    document["response"]["status_code"] = "400"
    assert read(document).vector is None


@pytest.mark.case("E8")
def test_a_failed_line_with_an_empty_error_beside_it_keeps_its_reason() -> None:
    document = success([0.5])
    document["response"] = {"status_code": 400, "body": {"error": {"message": "too odd"}}}
    outcome = read({**document, "error": {"code": "", "message": ""}})
    assert (outcome.vector, outcome.error) == (None, "too odd (HTTP 400)")


@pytest.mark.parametrize("index", [None, "absent"])
def test_an_index_may_be_missing(index: object) -> None:
    document = success([1.0])
    if index is None:
        document["response"]["body"]["data"][0]["index"] = None
    else:
        del document["response"]["body"]["data"][0]["index"]
    assert read(document).vector is not None


def dressed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = success([1.0, 2.0])
    change(document["response"]["body"])
    return document


NO_VECTOR = {
    "echo": lambda body: (body.clear(), body.update(model="m", input="a")),
    "no data": lambda body: body.update(data=[]),
    "two entries": lambda body: body["data"].append(dict(body["data"][0])),
    "another index": lambda body: body["data"][0].update(index=1),
    "true index": lambda body: body["data"][0].update(index=False),
    "null": lambda body: body["data"][0].update(embedding=None),
    "empty list": lambda body: body["data"][0].update(embedding=[]),
    "empty text": lambda body: body["data"][0].update(embedding=""),
    "not base64": lambda body: body["data"][0].update(embedding="$$$$"),
    "half a number": lambda body: body["data"][0].update(embedding="AAAA"),
    "a boolean": lambda body: body["data"][0].update(embedding=[1.0, True]),
    "a null": lambda body: body["data"][0].update(embedding=[1.0, None]),
    "a text": lambda body: body["data"][0].update(embedding=[1.0, "2"]),
    "a list": lambda body: body["data"][0].update(embedding=[[1.0], [2.0]]),
    "an object": lambda body: body["data"][0].update(embedding={"0": 1.0}),
    "huge": lambda body: body["data"][0].update(embedding=[1, 10**400]),
    "no object": lambda body: body.update(data=[3]),
    "no list": lambda body: body.update(data={"embedding": [1.0]}),
}


@pytest.mark.parametrize("change", NO_VECTOR.values(), ids=NO_VECTOR.keys())
def test_a_success_without_a_vector_is_the_error_of_its_item(change: Any) -> None:
    outcome = read(dressed(change))
    assert outcome.id in ("3", "")
    assert outcome.vector is None
    assert outcome.error
    assert not outcome.retryable
    assert outcome.billed == "unknown"


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(success([1.0])).replace('"index"', '"embedding": [2.0], "index"'),
        json.dumps(success([1.0])).replace('"index"', '"embedding": "AACAPw==", "index"'),
        json.dumps(success(digits([1.0]))).replace('"index"', '"embedding": "AAAAQA==", "index"'),
        json.dumps(success([1.0])).replace('"custom_id"', '"custom_id": "4", "custom_id"'),
        json.dumps(success([1.0])).replace('"error"', '"response": null, "error"'),
        json.dumps(success([1.0])).replace('"error"', '"id": "x", "error"'),
        json.dumps(success([1.0])).replace('"total', '"prompt_tokens": 1, "total'),
        json.dumps(success([1.0])).replace('"object": "list"', '"object": 1, "object": "list"'),
        json.dumps(success([1.0])).replace('"status', '"x": {"a": 1, "a": 2}, "status'),
    ],
)
def test_a_repeated_key_is_never_a_vector(line: str) -> None:
    outcome = read(line.encode())
    assert outcome.vector is None
    assert "twice" in (outcome.error or "")
    assert outcome.id == ("" if line.count("custom_id") > 1 else "3")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json_is_no_vector(number: str) -> None:
    line = json.dumps(success([1.5])).replace("1.5", number)
    outcome = read(line.encode())
    assert (outcome.vector, outcome.id) == (None, "3"), "it is known whose it is"


def test_a_mark_elsewhere_is_not_mistaken_for_the_vector() -> None:
    document = success("#", embedding=[9.0])
    assert read(document).vector is None
    assert read({"note": {"embedding": [7.0]}, **success("#")}).vector is None
    document = success([1.0], embedding=[9.0])
    outcome = read({**document, "note": {"embedding": [7.0]}})
    assert outcome.vector is not None
    assert outcome.vector.tolist() == [1.0]


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[]",
        b"null",
        b"{}",
        b'{"embedding":',
        b'"embedding":',
        b"[" * 5000 + b"]" * 5000,
        b'{"custom_id": 3, "x": ' + b"[" * 1010 + b"]" * 1010 + b"}",
        json.dumps(success([1.0], item=3)).encode(),
        json.dumps(success([1.0], item=None)).encode(),
        b"\xff\xfe",
    ],
)
def test_a_line_of_nobody_is_an_error_without_an_id(line: bytes) -> None:
    outcome = read(line)
    assert outcome.id == ""
    assert outcome.error
    assert outcome.vector is None


@given(st.binary(max_size=80) | st.text(max_size=40).map(str.encode))
def test_no_line_crashes_the_reader(line: bytes) -> None:
    assert read(line).vector is None


@given(st.data())
def test_no_damage_to_a_line_gives_another_vector(data: st.DataObject) -> None:
    """A byte changed outside the numbers gives the same vector for the same item, or none."""
    document = success([1.0, 2.0])
    line = bytearray(json.dumps(document).encode())
    begin, end = line.index(b"[1.0"), line.index(b"]", line.index(b"[1.0"))
    place = data.draw(st.integers(0, len(line) - 1).filter(lambda at: not begin <= at <= end))
    line[place] = data.draw(st.integers(0, 255))
    outcome = read(bytes(line))
    if outcome.vector is not None:
        assert outcome.vector.tolist() == [1.0, 2.0]


def failed(
    status: object, error: object = None, said: object = None, **body: object
) -> dict[str, Any]:
    """``error``: of the line itself. ``said``: the error in the body of the response."""
    body = body if said is None else {**body, "error": said}
    response = None if status is None else {"status_code": status, "request_id": "r", "body": body}
    return {"id": "batch_req_1", "custom_id": "5", "response": response, "error": error}


TOLD = {"message": "no", "type": "invalid_request_error", "param": None, "code": "bad_input"}


@pytest.mark.fault(66)
@pytest.mark.parametrize(
    ("line", "code", "retryable"),
    [
        (failed(400, said=TOLD), "bad_input", False),
        (failed(404, said={**TOLD, "code": "model_not_found"}), "model_not_found", False),
        (failed(429, said={**TOLD, "code": "rate_limit_exceeded"}), "rate_limit_exceeded", True),
        (failed(429, said={**TOLD, "code": "insufficient_quota"}), "insufficient_quota", False),
        (failed(500, said={**TOLD, "code": None, "type": "server_error"}), "server_error", True),
        (failed(503), None, True),
        (failed(408), None, True),
        (failed(None, {"code": "batch_expired", "message": "too late"}), "batch_expired", True),
        (failed(None, {"code": "batch_cancelled", "message": "stopped"}), "batch_cancelled", True),
        (
            failed(None, {"type": "invalid_request_error", "message": "x"}),
            "invalid_request_error",
            False,
        ),
        (failed(None, {"code": "500", "message": "x"}), "500", True),
        (failed(None, {"code": 400, "message": "x"}), "400", False),
        (failed(None, "just a text"), None, False),
        (failed(None), None, False),
        (
            failed(200, {"code": "odd", "message": "x"}, **success([1.0])["response"]["body"]),
            "odd",
            False,
        ),
        (failed(200, said=TOLD), "bad_input", False),
        (failed("OK"), None, False),
    ],
)
def test_a_failed_line_says_why_and_whether_again(
    line: dict[str, Any], code: str | None, retryable: bool
) -> None:
    outcome = read(line)
    assert outcome.id == "5"
    assert outcome.vector is None
    assert outcome.error
    assert (outcome.code, outcome.retryable) == (code, retryable)
    assert outcome.billed == "no"


@pytest.mark.fault(66)
def test_what_failed_lines_cost_is_a_setting_and_what_never_ran_is_free() -> None:
    reader = LineReader(shown=str, errors_billed="unknown")
    told = json.dumps(failed(400, said=TOLD)).encode()
    late = json.dumps(failed(None, {"code": "batch_expired", "message": "m"})).encode()
    assert reader.read(told).billed == "unknown"
    assert reader.read(late).billed == "no"


def test_what_is_shown_is_cleaned_once_per_reason() -> None:
    asked: list[str] = []

    def shown(message: str) -> str:
        asked.append(message)
        return "[hidden]" if "sk-" in message else message

    reader = LineReader(shown=shown, errors_billed="no")
    line = json.dumps(failed(400, said={**TOLD, "message": "key sk-1"})).encode()
    for _ in range(100):
        assert "sk-1" not in repr(reader.read(line))
    assert len(asked) <= 3
