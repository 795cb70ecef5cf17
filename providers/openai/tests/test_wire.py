"""A reply is understood completely or refused."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest
from embedcore_openai.wire import BadReply, NotUnicode, parse_reply, request_body
from hypothesis import given, strategies as st

from embedcore.testing import vector_of

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def packed(vector: object) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def item(index: object, embedding: object) -> dict[str, object]:
    return {"object": "embedding", "index": index, "embedding": embedding}


def body(items: list[dict[str, object]], **rest: object) -> bytes:
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    return json.dumps(
        {"object": "list", "data": items, "model": "m", "usage": usage, **rest}
    ).encode()


def refused(raw: bytes, *, count: int = 1, dimensions: int | None = None) -> str:
    with pytest.raises(BadReply) as caught:
        parse_reply(raw, count=count, dimensions=dimensions)
    return caught.value.reason


@st.composite
def replies(draw: st.DrawFn) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Vectors, and honest items for them: any order, each as base64 or as a list."""
    count, width = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rows = draw(
        st.lists(st.lists(floats, min_size=width, max_size=width), min_size=count, max_size=count)
    )
    listed = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    items = [
        item(index, row if as_list else packed(row))
        for index, (row, as_list) in enumerate(zip(rows, listed, strict=True))
    ]
    return np.array(rows, dtype=np.float32), draw(st.permutations(items))


@pytest.mark.fault(38)
@given(replies())
def test_rows_follow_the_index_whatever_the_order(
    given_reply: tuple[np.ndarray, list[dict[str, object]]],
) -> None:
    expected, items = given_reply
    reply = parse_reply(body(items), count=len(items), dimensions=expected.shape[1])
    assert reply.vectors.dtype == np.float32
    assert reply.vectors.flags.c_contiguous
    assert reply.vectors.tobytes() == expected.tobytes()
    assert (reply.tokens, reply.model) == (8, "m")


@pytest.mark.fault(43)
@given(st.data())
def test_decoding_many_texts_at_once_is_decoding_each(data: st.DataObject) -> None:
    """Among rows whose base64 needs no padding, one that is damaged has the fate it has alone."""
    count, width = data.draw(st.integers(2, 70)), data.draw(st.sampled_from([3, 12, 15]))
    vectors = [vector_of(f"text {index}", width) for index in range(count)]
    texts = [packed(vector) for vector in vectors]
    bad, at = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 4 * width // 3))
    junk = data.draw(st.text(st.sampled_from("A/+=_- \n\x00é"), min_size=1, max_size=4))
    keep_length = data.draw(st.booleans())
    texts[bad] = texts[bad][:at] + junk + texts[bad][at + len(junk) * keep_length :]
    raw = body([item(index, text) for index, text in enumerate(texts)])
    try:
        decoded = np.frombuffer(base64.b64decode(texts[bad], validate=True), "<f4")
        understood = decoded.shape == (width,) and bool(np.isfinite(decoded).all())
    except ValueError:
        understood = False
    if not understood:
        refused(raw, count=count, dimensions=width)
        return
    vectors[bad] = decoded.tolist()
    reply = parse_reply(raw, count=count, dimensions=width)
    assert reply.vectors.tobytes() == np.array(vectors, dtype=np.float32).tobytes()


@pytest.mark.fault(43)
@pytest.mark.parametrize("at", [0, 31, 32, 39])
@pytest.mark.parametrize("width", [3, 12])
def test_padding_that_shortens_a_row_is_refused_wherever_it_is(width: int, at: int) -> None:
    texts = [packed(vector_of(str(index), width)) for index in range(40)]
    texts[at] = texts[at][:-4] + "AAA="
    raw = body([item(index, text) for index, text in enumerate(texts)])
    assert f"{4 * width - 1} bytes" in refused(raw, count=40, dimensions=width)


@pytest.mark.fault(55)
@pytest.mark.parametrize("first", [b"x", b"\\n"])
def test_a_repeated_key_behind_much_else_is_refused(first: bytes) -> None:
    """A backslash, and the reply is read in one piece."""
    document = b'{"data":[{"index":0,"embedding":[1.0]}],"a":"' + first + b'","b":1'
    assert "twice" in refused(document + b" " * 1_000_000 + b',"b":2}')


@pytest.mark.fault(43)
def test_base64_is_little_endian_whatever_this_machine_is() -> None:
    raw = body([item(0, base64.b64encode(b"\x00\x00\x80\x3f\x00\x00\x00\xc0").decode())])
    assert parse_reply(raw, count=1, dimensions=2).vectors.tolist() == [[1.0, -2.0]]


@pytest.mark.fault(37)
@given(st.integers(0, 5), st.integers(0, 5))
def test_another_number_of_embeddings_is_refused(sent: int, came: int) -> None:
    raw = body([item(index, packed([1.0])) for index in range(came)])
    if sent == came:
        assert len(parse_reply(raw, count=sent, dimensions=1).vectors) == sent
    else:
        assert f"{came} embeddings for {sent} texts" in refused(raw, count=sent, dimensions=1)


@pytest.mark.fault(39)
@pytest.mark.parametrize("index", [-1, 2, "0", True, False, 0.0, 1.0, None, [0], 2**70, 1])
def test_an_index_that_is_not_its_own_is_refused(index: object) -> None:
    raw = body([item(index, packed([1.0])), item(1, packed([2.0]))])
    assert "index" in refused(raw, count=2)


@pytest.mark.fault(39)
def test_a_missing_index_is_refused() -> None:
    assert "index" in refused(body([{"embedding": packed([1.0])}]))


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    "component",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "null",
        "1e999",
        "1e39",
        "-1e300",
        '"0.5"',
        "true",
        "[1]",
        "{}",
        "1" + "0" * 400,
    ],
)
@pytest.mark.parametrize("escaped", [False, True])
def test_components_that_are_not_finite_numbers_are_refused(component: str, escaped: bool) -> None:
    # An escaped quotation mark sends the reply through the slow parser as well.
    model = '"a\\"b"' if escaped else '"m"'
    raw = f'{{"data":[{{"index":0,"embedding":[0.5,{component}]}}],"model":{model}}}'
    refused(raw.encode(), dimensions=2)


@pytest.mark.fault(40)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_base64_of_what_is_not_finite_is_refused(value: float) -> None:
    assert "finite" in refused(body([item(0, packed([1.0, value]))]))


@pytest.mark.fault(42)
def test_widths_must_agree_with_each_other_and_the_model() -> None:
    both = [item(0, packed([1.0, 2.0])), item(1, packed([1.0]))]
    assert "mixes" in refused(body(both), count=2)
    assert "2 dimensions instead of 3" in refused(body([both[0]]), dimensions=3)


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "AAAA",
        "AAAAAA",
        "AAAAAAA=",
        "AAAA AA==",
        "****",
        "AACAPw",
        "_-CAPw==",
        "AACAPw==\n",
        "ÄACAPw==",
    ],
)
def test_payloads_that_are_not_base64_of_float32_are_refused(text: str) -> None:
    refused(body([item(0, text)]))


@pytest.mark.parametrize("embedding", [None, 1, 1.5, True, {}, []])
def test_an_embedding_of_another_kind_is_refused(embedding: object) -> None:
    refused(body([item(0, embedding)]))


@pytest.mark.fault(44)
@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 5, "total_tokens": 5}, 5),
        ({"total_tokens": 7}, 7),
        ({"prompt_tokens": 0, "total_tokens": 7}, 7),
        ({"prompt_tokens": 0, "total_tokens": 0}, None),
        ({"prompt_tokens": -3}, None),
        ({"prompt_tokens": 5.0}, None),
        ({"prompt_tokens": 2**63}, None),
        ({"prompt_tokens": 2**70}, None),
        ({"prompt_tokens": "5"}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": None}, None),
        ({}, None),
        (None, None),
        ([], None),
        ("8", None),
    ],
)
def test_usage_is_a_positive_number_or_unknown(usage: object, tokens: int | None) -> None:
    assert (
        parse_reply(body([item(0, packed([1.0]))], usage=usage), count=1, dimensions=1).tokens
        == tokens
    )


def test_usage_and_model_may_be_missing() -> None:
    raw = json.dumps({"data": [item(0, [1.0])]}).encode()
    reply = parse_reply(raw, count=1, dimensions=None)
    assert (reply.tokens, reply.model, reply.vectors.tolist()) == (None, None, [[1.0]])


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    "raw",
    [
        '{"data":[{"index":0,"index":0,"embedding":[1.0]}]}',
        '{"data":[{"index":0,"\\u0069ndex":0,"embedding":[1.0]}]}',
        '{"data":[{"index":0,"embedding":[2.0],"embedding":[1.0]}]}',
        '{"data":[],"data":[{"index":0,"embedding":[1.0]}]}',
        '{"data":[{"index":0,"embedding":[1.0]}],"usage":{"total_tokens":1,"total_tokens":2}}',
        '{"model":"a","data":[{"index":0,"embedding":[1.0]}],"model":"b"}',
        '{"data":[{"index":0,"embedding":[1.0],"more":{"a":[{"b":1,"b":2}]}}]}',
        '{"data":[{"index":0,"embedding":[1.0],"x":"\\"","x":"\\""}]}',
    ],
)
def test_repeated_keys_are_refused_anywhere(raw: str) -> None:
    assert "twice" in refused(raw.encode())


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=12,
    )
)
def test_unknown_fields_with_any_content_do_not_matter(extra: object) -> None:
    first = {**item(0, packed([1.0])), "extra": extra}
    for ascii_only in (True, False):
        document = {"data": [first], "provider": extra}
        raw = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "replace")
        assert parse_reply(raw, count=1, dimensions=1).vectors.tolist() == [[1.0]]


@pytest.mark.fault(32)
@given(st.data())
def test_bytes_that_were_damaged_never_give_other_vectors(data: st.DataObject) -> None:
    """Any cut or change of bytes outside the payload is refused or changes no vector."""
    vectors = [vector_of(text, 4) for text in ("a", "b")]
    honest = body([item(index, packed(vector)) for index, vector in enumerate(vectors)])
    cut = data.draw(st.integers(0, len(honest) - 1))
    refused(honest[:cut], count=2)
    junk = data.draw(st.binary(min_size=1, max_size=3))
    raw = honest[:cut] + junk + honest[cut:]
    try:
        reply = parse_reply(raw, count=2, dimensions=4)
    except BadReply:
        return
    within = any(
        packed(vector).encode() not in raw for vector in vectors
    )  # then the payload itself was changed, which no one can notice
    assert within or np.array_equal(reply.vectors, np.array(vectors))


@given(st.binary(max_size=200) | st.text().map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_refused_or_understood(raw: bytes) -> None:
    refused(raw)


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"[" * 100_000,
        b'{"data":' + b"[" * 100_000,
        b"{}",
        b'{"data":{}}',
        b'{"data":[1]}',
        b'{"data":["x"]}',
        b"\xff\xfe",
        b'{"error":{"message":"x"}}',
    ],
)
def test_bodies_of_another_shape_are_refused(raw: bytes) -> None:
    refused(raw)


@pytest.mark.fault(34)
def test_leading_white_space_is_understood() -> None:
    raw = b" \n\r\t" * 40 + body([item(0, packed([1.0]))])
    assert parse_reply(raw, count=1, dimensions=1).vectors.tolist() == [[1.0]]


@pytest.mark.parametrize(
    "name",
    [
        "openai_embeddings_with_dimensions.json",
        "openai_embeddings_sync_768d_x3_2026-08.json",
        "openai_embeddings_with_encoding_format.json",
        "openai_test_documents_b64.json",
        "openai_test_instrumentation_b64.json",
    ],
)
def test_recorded_replies_are_understood(name: str, recordings: object) -> None:
    for exchange in recordings(name):  # type: ignore[operator]
        asked, answered = exchange["request_body"], exchange["response_body"]
        count = 1 if isinstance(asked["input"], str) else len(asked["input"])
        width = asked.get("dimensions", 1536)
        reply = parse_reply(json.dumps(answered).encode(), count=count, dimensions=width)
        assert reply.tokens == answered["usage"]["prompt_tokens"]
        assert reply.model == "text-embedding-3-small"
        # The recordings of 2026 are exact in float16, and then only about of length 1.
        assert np.allclose(np.linalg.norm(reply.vectors, axis=1), 1, atol=2e-3)


@pytest.mark.fault(6)
@given(st.lists(st.text(), min_size=1, max_size=4), st.none() | st.integers(1, 9))
def test_requests_carry_texts_unchanged(texts: list[str], dimensions: int | None) -> None:
    sent = json.loads(request_body("m", texts, encoding="base64", dimensions=dimensions))
    assert sent["input"] == texts
    assert ("dimensions" in sent) == (dimensions is not None)
    assert sent["encoding_format"] == "base64"


@pytest.mark.fault(5)
def test_a_lone_surrogate_is_named_by_its_position() -> None:
    with pytest.raises(NotUnicode) as caught:
        request_body("m", ["fine", "\ud800"], encoding="base64", dimensions=None)
    assert caught.value.position == 1


def test_a_body_nested_too_deeply_is_refused() -> None:
    for depth in (900, 1000, 1020, 5000):
        raw = b'{"data":[{"index":0,"embedding":[1.0]}],"x":' + b"[" * depth + b"]" * depth + b"}"
        try:
            parse_reply(raw, count=1, dimensions=1)
        except BadReply:
            continue
        assert depth < 1000
