"""Is a reply understood alike with its vectors read apart and as a whole?"""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.provider import replies as module
from embedcore.provider.payloads import apart
from embedcore.provider.replies import BadReply, parse_reply

WIDTH = 24
FLOATS = st.floats(-2, 2, width=32)


def packed(vector) -> str:
    return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()


def body(items, **more) -> bytes:
    return json.dumps({"object": "list", "data": items, "model": "m", **more}).encode()


@st.composite
def replies(draw):
    """Bodies of every kind, right and wrong, and how many texts were sent."""
    count = draw(st.integers(1, 4))
    vector = st.lists(FLOATS, min_size=WIDTH, max_size=WIDTH)
    embedding = st.one_of(
        vector.map(packed),
        vector.map(packed),
        vector,
        st.sampled_from(["#0", "#1", "#", "", "x" * 64, "#0" * 40, packed([1.0]), None, 3]),
    )
    items = [
        {"object": "embedding", "index": index, "embedding": draw(embedding)}
        for index in draw(st.permutations(range(count)))
    ]
    more = draw(
        st.sampled_from(
            [{}, {"model": "m" * 70}, {"model": "#0"}, {"note": 'a "quoted" word'}, {"#1": "#0"}]
        )
    )
    raw = body(items, usage={"prompt_tokens": 3}, **more)
    if draw(st.booleans()) and draw(st.booleans()):
        place = draw(st.integers(0, len(raw) - 1))
        raw = (
            raw[:place]
            + draw(st.sampled_from([b'"', b"\\", b"#", b"}", b"", b"\xff"]))
            + raw[place:]
        )
    return raw, count


def read(raw, count):
    try:
        return parse_reply(raw, count=count, dimensions=WIDTH)
    except BadReply as bad:
        return bad.reason, bad.not_json


@settings(deadline=None, max_examples=4 * settings.default.max_examples)
@given(replies())
def test_read_apart_and_as_a_whole_it_is_the_same(reply):
    raw, count = reply
    found = read(raw, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "apart", lambda *_: None)
        whole = read(raw, count)
    if isinstance(whole, tuple):
        assert found == whole
    else:
        assert found.vectors.tobytes() == whole.vectors.tobytes()
        assert (found.tokens, found.model) == (whole.tokens, whole.model)


def test_vectors_are_read_apart():
    raw = body([{"index": 0, "embedding": packed([0.5] * WIDTH)}])
    skeleton, payloads = apart(raw, 100)
    assert json.loads(skeleton)["data"][0]["embedding"] == "#0"
    assert [bytes(one).decode() for one in payloads] == [packed([0.5] * WIDTH)]


def test_a_mark_in_a_reply_stands_for_nothing():
    long = packed([0.5] * WIDTH)
    items = [{"index": 0, "embedding": long}, {"index": 1, "embedding": "#0"}]
    with pytest.raises(BadReply):
        parse_reply(body(items), count=2, dimensions=WIDTH)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_vectors_are_written_where_they_are_wanted(order):
    vectors = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    items = [{"index": index, "embedding": packed(vectors[index])} for index in order]
    into = np.zeros_like(vectors)
    reply = parse_reply(body(items), count=2, dimensions=WIDTH, into=into)
    assert reply.vectors is into
    assert (into == vectors).all()


@pytest.mark.parametrize(
    "into",
    [
        np.zeros((1, WIDTH), dtype=np.float32),
        np.zeros((2, WIDTH), dtype=np.float64),
        np.zeros((2, WIDTH * 2), dtype=np.float32)[:, ::2],
        np.zeros((WIDTH, 2), dtype=np.float32).T,
    ],
)
def test_an_array_that_does_not_fit_is_left_alone(into):
    items = [{"index": index, "embedding": packed([1.0] * WIDTH)} for index in range(2)]
    reply = parse_reply(body(items), count=2, dimensions=WIDTH, into=into)
    assert reply.vectors.shape == (2, WIDTH)
    assert (reply.vectors == 1).all()
    assert (into == 0).all()
