"""A reply is understood completely or refused."""

from __future__ import annotations

import base64
import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import EmbeddingError, InputRejected, InvalidResponse, ReplyMismatch
from embedcore.provider.error_bodies import tokens_in
from embedcore.provider.refusals import Asked
from embedcore.provider.replies import BadReply, parse_reply, read, request_body
from embedcore.testing import vector_of

# As large as components of a vector are, and larger by far.
floats = st.floats(-(2.0**40), 2.0**40, width=32, allow_nan=False, allow_infinity=False)


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
        few = np.count_nonzero(np.abs(decoded) > 1e15) <= count * width / 16
        understood = decoded.shape == (width,) and bool(np.isfinite(decoded).all()) and few
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
@pytest.mark.parametrize("index", [-1, 2, "0", True, False, 0.0, 1.0, [0], 2**70, 1])
def test_an_index_that_is_not_its_own_is_refused(index: object) -> None:
    raw = body([item(index, packed([1.0])), item(1, packed([2.0]))])
    assert "index" in refused(raw, count=2)


@pytest.mark.case("B1")
@pytest.mark.fault(39)
@given(st.integers(1, 7), st.data())
def test_the_one_index_that_is_missing_is_the_one_that_is_left(
    count: int, data: st.DataObject
) -> None:
    """Whichever it is, wherever it stands, absent or null."""
    items = [item(index, packed([float(index)])) for index in range(count)]
    without = data.draw(st.integers(0, count - 1))
    if data.draw(st.booleans()):
        del items[without]["index"]
    else:
        items[without]["index"] = None
    raw = body(data.draw(st.permutations(items)))
    vectors = parse_reply(raw, count=count, dimensions=1).vectors
    assert vectors[:, 0].tolist() == list(range(count))


@pytest.mark.case("B1")
@pytest.mark.fault(39)
@given(st.integers(2, 6), st.data())
def test_several_missing_indexes_are_refused_unless_the_order_is_trusted(
    count: int, data: st.DataObject
) -> None:
    items = [item(index, packed([float(index)])) for index in range(count)]
    gone = data.draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=count))
    for index in gone:
        del items[index]["index"]
    raw = body(items)
    assert "trust_order" in refused(raw, count=count, dimensions=1)
    vectors = parse_reply(raw, count=count, dimensions=1, trust_order=True).vectors
    assert vectors[:, 0].tolist() == list(range(count))


@pytest.mark.case("B1")
@pytest.mark.fault(39)
def test_a_missing_index_among_others_that_are_wrong_is_refused() -> None:
    for indexes in ([None, 1, 1], [None, 0, 3], [None, -1, 0], [None, "1", 2]):
        items = [item(index, packed([1.0])) for index in indexes]
        assert "index" in refused(body(items), count=3)


@pytest.mark.case("B1")
def test_with_the_order_trusted_a_complete_index_still_counts() -> None:
    items = [item(1, packed([1.0])), item(0, packed([0.0]))]
    reply = parse_reply(body(items), count=2, dimensions=1, trust_order=True)
    assert reply.vectors[:, 0].tolist() == [0.0, 1.0]
    restarts = [item(0, packed([0.0])), item(0, packed([1.0]))]
    reply = parse_reply(body(restarts), count=2, dimensions=1, trust_order=True)
    assert reply.vectors[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    "component",
    [
        "Infinity",
        "-Infinity",
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
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_base64_of_what_is_infinite_is_refused(value: float) -> None:
    both = [item(0, packed([1.0, value])), item(1, None)]
    assert "finite" in refused(body(both), count=2)
    assert "finite" in refused(body(both[:1]))


# Vectors that are not there, and all others are

NO_VECTORS = ["null", "[]", '""', "[null,null]", "[0.5,null]", "[NaN,NaN]", "[NaN,0.5]"]
NO_VECTORS += ['["NaN",0.5]', '["NaN","nan"]']
NO_VECTORS += [f'"{packed([math.nan, 1.0])}"', f'"{packed([math.nan, math.nan])}"']


@pytest.mark.case("A4")
@pytest.mark.fault(40)
@given(st.data())
def test_where_a_vector_is_none_the_others_stay(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6))
    listed, escaped = data.draw(st.booleans()), data.draw(st.booleans())
    bad = data.draw(st.dictionaries(st.integers(0, count - 1), st.sampled_from(NO_VECTORS)))
    vectors = np.array([vector_of(f"text {index}", 2) for index in range(count)], np.float32)
    parts = []
    for index in data.draw(st.permutations(range(count))):
        good = json.dumps(vectors[index].tolist() if listed else packed(vectors[index]))
        parts.append(f'{{"index":{index},"embedding":{bad.get(index, good)}}}')
    model = '"a\\"b"' if escaped else '"m"'
    raw = f'{{"data":[{",".join(parts)}],"model":{model}}}'.encode()
    width = data.draw(st.sampled_from([2, None]))
    if len(bad) == count:
        assert "none of its" in refused(raw, count=count, dimensions=width)
        return
    found = parse_reply(raw, count=count, dimensions=width).vectors
    kept = [index for index in range(count) if index not in bad]
    assert found[kept].tobytes() == vectors[kept].tobytes()
    assert np.isnan(found[sorted(bad)]).all()


@pytest.mark.case("A4")
@pytest.mark.parametrize("text", NO_VECTORS)
def test_a_reply_of_no_vector_at_all_is_refused(text: str) -> None:
    raw = f'{{"data":[{{"index":0,"embedding":{text}}}]}}'.encode()
    assert "none of its 1 embeddings is a vector" in refused(raw, dimensions=2)


@pytest.mark.fault(43)
@pytest.mark.parametrize("form", ["<i1", "<f8", ">f4", ">f8"])
def test_base64_of_other_numbers_than_float32_is_refused(form: str) -> None:
    """Where the width is not known nothing else would tell."""
    vectors = [vector_of(f"text {index}", 256) for index in range(4)]
    scale = 127 if form == "<i1" else 1
    texts = [
        base64.b64encode((scale * np.asarray(each)).astype(form).tobytes()).decode()
        for each in vectors
    ]
    raw = body([item(index, text) for index, text in enumerate(texts)])
    assert 'encoding = "float"' in refused(raw, count=4)


@pytest.mark.fault(40)
def test_an_entry_without_an_embedding_is_refused() -> None:
    both = [item(0, packed([1.0])), {"index": 1, "error": "no"}]
    assert "no 'embedding'" in refused(body(both), count=2)


@pytest.mark.case("A4")
def test_with_another_fault_beside_it_nothing_is_kept() -> None:
    good, none = item(0, packed([1.0])), item(1, None)
    for wrong in (
        [good, item(0, None)],
        [good, {**none, "index": 7}],
        [good, none, item(2, "****")],
        [good, none, item(2, packed([1.0, 2.0]))],
        [good, none, item(2, ["x"])],
    ):
        refused(body(wrong), count=len(wrong), dimensions=1)


@pytest.mark.case("A4")
def test_rows_without_a_vector_are_blank_where_they_are_wanted() -> None:
    into = np.zeros((2, 1), np.float32)
    raw = body([item(0, packed([1.0])), item(1, packed([math.nan]))])
    reply = parse_reply(raw, count=2, dimensions=1, into=into)
    assert reply.vectors is into
    assert np.isnan(into[:, 0]).tolist() == [False, True]


@pytest.mark.fault(42)
def test_widths_must_agree_with_each_other_and_the_model() -> None:
    both = [item(0, packed([1.0, 2.0])), item(1, packed([1.0]))]
    assert "mixes" in refused(body(both), count=2)
    assert "mixes" in refused(body(both), count=2, dimensions=1)
    assert "2 dimensions instead of 3" in refused(body([both[0]]), dimensions=3)
    assert "2 dimensions instead of 3" in refused(
        body([both[0], item(1, None)]), count=2, dimensions=3
    )


@pytest.mark.fault(42)
def test_another_width_than_that_of_the_settings_is_a_mismatch() -> None:
    asked = Asked(model="m", endpoint="https://x/v1", texts=["a", "b"])
    raw = body([item(0, packed([1.0, 2.0])), item(1, packed([1.0, 2.0]))])
    with pytest.raises(ReplyMismatch) as caught:
        read(200, {}, raw, asked, dimensions=3)
    assert (caught.value.billed, caught.value.retryable) == ("yes", False)
    mixed = body([item(0, packed([1.0, 2.0])), item(1, packed([1.0]))])
    with pytest.raises(InvalidResponse) as other:
        read(200, {}, mixed, asked, dimensions=3)
    assert type(other.value) is InvalidResponse


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


@pytest.mark.parametrize("embedding", [1, 1.5, True, {}])
def test_an_embedding_of_another_kind_is_refused(embedding: object) -> None:
    refused(body([item(0, embedding)]))


@pytest.mark.case("B4")
@pytest.mark.fault(44)
@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 5, "total_tokens": 5}, 5),
        ({"total_tokens": 7}, 7),
        ({"prompt_tokens": 0, "total_tokens": 7}, 7),
        ({"input_tokens": 7, "output_tokens": 0}, 7),
        ({"inputTokens": 7}, 7),
        ({"promptTokenCount": 7}, 7),
        ({"prompt_tokens": 5.0, "total_tokens": 5.0}, 5),
        ({"prompt_tokens": 5.2}, 6),
        ({"prompt_tokens": "5"}, 5),
        ({"prompt_tokens": " 5.0 "}, 5),
        ({"prompt_tokens": "1,234"}, 1234),
        ({"prompt_tokens": None, "total_tokens": 7}, 7),
        ({"prompt_tokens": "many", "total_tokens": 7}, 7),
        (8, 8),
        ("8", 8),
        ({"prompt_tokens": 0, "total_tokens": 0}, None),
        ({"prompt_tokens": -3}, None),
        ({"prompt_tokens": "-3"}, None),
        ({"prompt_tokens": 2**63}, None),
        ({"prompt_tokens": 1e30}, None),
        ({"prompt_tokens": 2**70}, None),
        ({"prompt_tokens": "9" * 30}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": None}, None),
        ({"prompt_tokens": [5]}, None),
        ({"cost": 0.001}, None),
        ({}, None),
        (None, None),
        ([], None),
        (True, None),
    ],
)
def test_usage_is_read_if_it_can_be(usage: object, tokens: int | None) -> None:
    assert (
        parse_reply(body([item(0, packed([1.0]))], usage=usage), count=1, dimensions=1).tokens
        == tokens
    )


@pytest.mark.case("B4")
@pytest.mark.fault(44)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.dictionaries(st.sampled_from(["prompt_tokens", "total_tokens", "x"]), inner)
            | st.lists(inner, max_size=2)
        ),
    )
)
def test_any_usage_is_a_positive_number_or_none(usage: object) -> None:
    tokens = tokens_in(usage)
    assert tokens is None or (type(tokens) is int and 0 < tokens < 2**63)


@pytest.mark.case("B4")
@pytest.mark.parametrize(
    "where",
    [
        {"usageMetadata": {"promptTokenCount": 9, "promptTokenDetails": [{"tokenCount": 9}]}},
        {"usage_metadata": {"total_token_count": "9"}},
        {"meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 9}}},
        {"total_tokens": 9.0, "base_resp": {"status_code": 0}},
        {"usage": None, "usageMetadata": {"promptTokenCount": 9}},
        {"usage": {"prompt_tokens": 0}, "total_tokens": 9},
    ],
)
def test_usage_is_read_where_servers_of_others_have_it(where: dict[str, object]) -> None:
    raw = json.dumps({"data": [item(0, [1.0])], **where}).encode()
    assert parse_reply(raw, count=1, dimensions=1).tokens == 9


@pytest.mark.parametrize("where", [{"usageMetadata": 9}, {"meta": {"x": 9}}, {"meta": [9]}, {}])
def test_what_is_no_usage_is_none(where: dict[str, object]) -> None:
    raw = json.dumps({"data": [item(0, [1.0])], "created": 9, **where}).encode()
    assert parse_reply(raw, count=1, dimensions=1).tokens is None


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


@pytest.mark.case("B5")
@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "before", [b" \n\r\t" * 40, b"\xef\xbb\xbf", b"\n\xef\xbb\xbf", b"\xef\xbb\xbf \r\n"]
)
@pytest.mark.parametrize("width", [1, 64])
def test_white_space_and_a_byte_order_mark_before_a_reply(before: bytes, width: int) -> None:
    raw = before + body([item(0, packed([1.0] * width))])
    for each in (raw, memoryview(raw)):
        assert parse_reply(each, count=1, dimensions=width).vectors.tolist() == [[1.0] * width]


# More parts than any reply has


FLOODS = {
    "lists": b'{"data":[' + b"[]," * 1_000_000 + b"[]]}",
    "objects": b'{"data":[' + b"{}," * 1_000_000 + b"{}]}",
    "texts": b'{"data":[' + b'"ab",' * 600_000 + b'""]}',
    "numbers": b'{"data":[' + b"1," * 500_000 + b"1]}",
    "keys": b"{" + b'"a":1,' * 500_000 + b'"b":1}',
    "elsewhere": b'{"data":[],"x":[' + b"[]," * 1_000_000 + b"[]]}",
    "in an error": b'{"error":[' + b"[]," * 1_000_000 + b"[]]}",
    "quotation marks": b'"' * 2_000_000,
    "depth": b"[" * 2_000_000,
    "NaN": b'{"data":[{"index":0,"embedding":[' + b"NaN," * 500_000 + b"1]}]}",
    "behind a byte order mark": b'\xef\xbb\xbf{"data":[' + b"[]," * 1_000_000 + b"[]]}",
}


@pytest.mark.case("D6")
@pytest.mark.fault(35)
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_parts_is_refused_before_they_become_objects(name: str) -> None:
    raw = FLOODS[name]
    asked = Asked(model="m", endpoint="https://x/v1", texts=["a"] * 16)
    tracemalloc.start()
    with pytest.raises(EmbeddingError) as caught:
        read(200, {}, memoryview(raw), asked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(caught.value) is InvalidResponse
    assert "far more parts" in str(caught.value)
    assert peak < 32_000_000, f"{peak:,} bytes for {len(raw):,}"


@pytest.mark.case("D6")
def test_brackets_in_texts_that_a_server_repeats_are_no_flood() -> None:
    echo = ["[[[{,,," * 40_000, 'a "quoted" [' * 1_000]
    raw = json.dumps({"data": [item(0, [1.0])], "texts": echo}).encode()
    assert parse_reply(raw, count=1, dimensions=1).vectors.tolist() == [[1.0]]


@pytest.mark.case("D6")
def test_what_honest_servers_add_to_each_vector_is_no_flood() -> None:
    more = {"tokens": list(range(500)), "meta": [{"a": [1, 2]}] * 30, "words": ["w"] * 100}
    items = [{**item(index, [0.5] * 64), **more} for index in range(200)]
    reply = parse_reply(body(items), count=200, dimensions=64)
    assert reply.vectors.shape == (200, 64)


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
@given(st.lists(st.text(), min_size=1, max_size=4), st.none() | st.integers(1, 9), st.booleans())
def test_requests_carry_texts_unchanged(
    texts: list[str], dimensions: int | None, encoded: bool
) -> None:
    encoding = "base64" if encoded else None
    more = {"user": "u", "nested": {"a": [1]}}
    raw = request_body("m", texts, encoding=encoding, dimensions=dimensions, more=more)
    sent = json.loads(raw)
    assert sent.pop("input") == texts
    assert sent.pop("dimensions", None) == dimensions
    assert sent.pop("encoding_format", None) == encoding
    assert sent == {"model": "m", **more}


@pytest.mark.fault(5)
def test_a_lone_surrogate_is_named_by_its_position() -> None:
    with pytest.raises(InputRejected) as caught:
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
