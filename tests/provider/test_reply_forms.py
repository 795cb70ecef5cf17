"""Replies of services that write their vectors elsewhere than OpenAI does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import InputTooLong, InvalidResponse
from embedcore.provider import replies
from embedcore.provider.refusals import Asked
from embedcore.provider.replies import BadReply, Form, parse_reply

# As Cohere, Gemini and Ollama write them.
NESTED = Form(rows=("embeddings", "float"), vector=None, numbered=False)
VALUES = Form(rows=("embeddings",), vector="values", numbered=False)
BARE = Form(rows=("embeddings",), vector=None, numbered=False)
FORMS = [NESTED, VALUES, BARE, Form(rows=("a", "b", "c"), vector="v")]

floats = st.floats(-(2.0**40), 2.0**40, width=32, allow_nan=False)


def document(form: Form, rows: list[Any], **beside: object) -> dict[str, Any]:
    entries = rows if form.vector is None else [{form.vector: row} for row in rows]
    if form.numbered:
        entries = [{**entry, "index": place} for place, entry in enumerate(entries)]
    found: Any = entries
    for name in reversed(form.rows):
        found = {name: found}
    return {**found, **beside}


@given(
    st.sampled_from(FORMS),
    st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.text(max_size=90), max_size=3),
)
def test_every_row_is_read_whatever_stands_beside(
    form: Form, rows: list[list[float]], echoed: list[str]
) -> None:
    raw = json.dumps(document(form, rows, texts=echoed, id="7")).encode()
    reply = parse_reply(raw, count=len(rows), dimensions=3, form=form)
    assert reply.vectors.tobytes() == np.array(rows, dtype=np.float32).tobytes()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("rows", "count", "reason"),
    [
        ([[1.0, 2.0]], 2, "1 embeddings for 2 texts"),
        ([[1.0, 2.0], [1.0]], 2, "mixes"),
        ([[1.0, "x"]], 1, "not numbers"),
        ([None], 1, "none of its 1"),
        ([7], 1, "neither"),
    ],
)
def test_what_is_no_vector_is_refused(form: Form, rows: list[Any], count: int, reason: str) -> None:
    with pytest.raises(BadReply, match=reason):
        parse_reply(
            json.dumps(document(form, rows)).encode(), count=count, dimensions=None, form=form
        )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_without_a_vector_leaves_the_others(form: Form) -> None:
    raw = json.dumps(document(form, [[1.0, 2.0], None, []])).encode()
    reply = parse_reply(raw, count=3, dimensions=2, form=form)
    assert np.isnan(reply.vectors).all(axis=1).tolist() == [False, True, True]


@pytest.mark.parametrize("wrong", [{}, {"embeddings": None}, {"embeddings": {"int8": [[1]]}}])
def test_a_list_that_is_elsewhere_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadReply, match=r"embeddings\.float"):
        parse_reply(json.dumps(wrong).encode(), count=1, dimensions=None, form=NESTED)


def test_a_repeated_key_is_refused_at_every_depth() -> None:
    for raw in (
        b'{"embeddings": {"float": [[1.0]], "float": [[2.0]]}}',
        b'{"embeddings": {"float": [[1.0]]}, "embeddings": {"float": [[2.0]]}}',
    ):
        with pytest.raises(BadReply, match="twice"):
            parse_reply(raw, count=1, dimensions=1, form=NESTED)
    with pytest.raises(BadReply, match="twice"):
        parse_reply(
            b'{"embeddings": [{"values": [1.0], "values": [2.0]}]}',
            count=1,
            dimensions=1,
            form=VALUES,
        )


@pytest.mark.parametrize(
    ("beside", "tokens"),
    [
        ({"meta": {"billed_units": {"input_tokens": 4, "image_tokens": 0}}}, 4),
        ({"usageMetadata": {"promptTokenCount": 11, "promptTokenDetails": []}}, 11),
        ({"prompt_eval_count": 8, "total_duration": 14_143_917, "load_duration": 1_019_500}, 8),
        ({"usage": {"total_tokens": 0}}, None),
    ],
)
def test_what_was_billed_is_found_where_each_service_says_it(
    beside: dict[str, Any], tokens: int | None
) -> None:
    raw = json.dumps(document(BARE, [[1.0]], **beside)).encode()
    assert parse_reply(raw, count=1, dimensions=1, form=BARE).tokens == tokens


def test_a_whole_answer_is_read_in_any_form() -> None:
    asked = Asked(model="m", endpoint="https://api.example", texts=["a"])
    raw = json.dumps(document(NESTED, [[1.0, 0.0]])).encode()
    assert replies.read(200, {}, raw, asked, form=NESTED).vectors.tolist() == [[1.0, 0.0]]
    with pytest.raises(InvalidResponse, match=r"embeddings\.float"):
        replies.read(200, {}, b"{}", asked, form=NESTED)
    with pytest.raises(InputTooLong):
        said = b'{"error": "the input length exceeds the context length"}'
        replies.read(400, {}, said, asked, form=NESTED)
