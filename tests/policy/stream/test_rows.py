"""What counts as a row of a stream, and what is its key?"""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import ConfigurationError, EmbeddingError, InputRejected
from embedcore.policy.result import Spending
from embedcore.policy.stream.rows import Block, Row, RowReader, name_rows
from embedcore.storage.database import driver

Doc = namedtuple("Doc", "id body")
KEYS = st.integers() | st.text(max_size=5) | st.none() | st.tuples(st.integers())


def read(items, *, text=None, key=None):
    reader = RowReader(text=text, key=key)
    return [reader.row(item) for item in items]


@given(st.lists(st.text(max_size=5)))
def test_a_text_has_its_number_as_its_key(texts):
    rows = read(texts)
    assert [row.key for row in rows] == list(range(len(texts)))
    assert [row.text for row in rows] == [row.item for row in rows] == texts


@given(st.lists(st.tuples(KEYS, st.text(max_size=5))))
def test_a_pair_is_a_key_and_a_text(pairs):
    rows = read(pairs)
    assert [(row.key, row.text) for row in rows] == [row.item for row in rows] == pairs


@given(st.lists(st.tuples(KEYS, st.text(max_size=5))), st.booleans())
def test_all_forms_of_a_table_are_the_same(pairs, keyed):
    class Lazy(Mapping):
        def __init__(self, pair):
            self.pair = pair

        def __getitem__(self, name):
            return self.pair[("id", "body").index(name)] if name in ("id", "body") else {}[name]

        def __iter__(self):
            return iter(("id", "body"))

        def __len__(self):
            return 2

    key = "id" if keyed else None
    forms = [
        [{"id": key, "body": text} for key, text in pairs],
        [OrderedDict(body=text, id=key) for key, text in pairs],
        [Lazy(pair) for pair in pairs],
        [Doc(*pair) for pair in pairs],
    ]
    for form in forms:
        rows = read(form, text="body", key=key)
        assert [row.text for row in rows] == [text for _, text in pairs]
        expected = [key for key, _ in pairs] if keyed else list(range(len(pairs)))
        assert [row.key for row in rows] == expected
        assert [row.item for row in rows] == form
        assert [row.problem for row in rows] == [None] * len(pairs)
    for form in ([list(pair) for pair in pairs], pairs, [Doc(*pair) for pair in pairs]):
        rows = read(form, text=1, key=0 if keyed else None)
        assert [row.text for row in rows] == [text for _, text in pairs]


def test_a_row_of_a_database_is_a_row():
    connection = driver().connect(":memory:")
    connection.row_factory = driver().Row
    found = connection.execute("SELECT 7 AS id, 'a' AS body").fetchall()
    (row,) = read(found, text="body", key="id")
    assert (row.key, row.text, row.item) == (7, "a", found[0])
    (row,) = read(found, text="bdy", key="id")
    assert str(row.problem) == "row with key 7 has no 'bdy'; it has: id, body"
    assert row.key == 7
    connection.close()


@pytest.mark.parametrize(
    ("item", "text", "key", "message"),
    [
        ({"id": 1}, "body", "id", "row 1 has no 'body'; it has: id"),
        ({"body": "a"}, "body", "id", "row 1 has no 'id'; it has: body"),
        (Doc(1, "a"), "text", None, "row 1 has no 'text'; it has: id, body"),
        (("a",), 1, None, "row 1 has no 1; it has: tuple"),
        # One character of a text is not a column.
        ("abc", 0, None, "row 1 has no 0; it has: str"),
        (None, "body", None, "row 1 has no 'body'; it has: NoneType"),
        ({"body": "a"}, None, None, "row 1 is a mapping with the keys 'body': say which column"),
    ],
)
def test_a_row_without_its_text_or_key_says_what_it_has(item, text, key, message):
    reader = RowReader(text=text, key=key)
    reader.row("whatever")
    row = reader.row(item)
    assert isinstance(row.problem, InputRejected)
    assert str(row.problem).startswith(message)
    assert row.problem.position == 1
    assert row.text is None
    assert row.item is item


def test_a_key_alone_is_refused():
    with pytest.raises(ConfigurationError, match="name that of the text"):
        RowReader(text=None, key="id")


@pytest.mark.parametrize("rows", ["text", b"text", {"a"}, frozenset("a"), {"a": 1}, 7, None])
def test_what_is_no_iterable_of_rows_is_refused(rows):
    with pytest.raises(InputRejected, match="an iterable of rows is expected, not"):
        RowReader(text=None, key=None).elements(rows)


def test_a_block_gives_its_keys_with_their_vectors():
    vectors = np.array([[1, 2], [np.nan, np.nan]], dtype=np.float32)
    ok = np.array([True, False])
    block = Block(
        keys=["a", "b"], rows=["x", "y"], first=4, vectors=vectors, ok=ok, reused=np.zeros(2, bool)
    )
    (one, vector), (two, none) = block
    assert (one, two, none) == ("a", "b", None)
    assert vector.tolist() == [1, 2]
    assert len(block) == 2
    assert repr(block) == "Block(rows 4 to 5, 1 ok, tokens=0, cost=$0)"
    # A sum of many requests has the zeros of the longest of them.
    paid = replace(block, usage=Spending(tokens=4000, cost=Decimal("0.00008000")))
    assert repr(paid) == "Block(rows 4 to 5, 1 ok, tokens=4000, cost=$0.00008)"


@pytest.mark.case("H8")
@given(st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=9), st.data())
def test_a_message_names_a_row_as_its_caller_does(keys, data):
    """What was left out before it came to us counts for the caller, and not for us."""
    first = data.draw(st.integers(0, 50))
    rows = [Row(key, "a", {"id": key}) for key in keys]
    at = data.draw(st.integers(0, len(keys) - 1))
    error = EmbeddingError(f"row {first + at} is an empty text")
    name_rows(error, rows, first)
    numbered = keys[at] == first + at and type(keys[at]) is int
    name = f"row {first + at}" if numbered else f"row with key {keys[at]!r}"
    assert str(error) == f"{name} is an empty text"
    # Once is enough, and what is not about a row of these stays as it is.
    name_rows(error, rows, first)
    assert str(error) == f"{name} is an empty text"
    for message in ("the server is down", f"row {first + len(keys)}: refused", "rows of another"):
        error = EmbeddingError(message)
        name_rows(error, rows, first)
        assert str(error) == message


@pytest.mark.case("H8")
def test_several_rows_are_named_by_their_keys():
    rows = [Row(key, "a", None) for key in ("x", "y", "z" * 500)]
    error = EmbeddingError("rows 4 to 5: no answer")
    name_rows(error, rows, 4)
    assert str(error) == "rows with keys 'x' to 'y': no answer"
    error = EmbeddingError("row 6: no answer")
    name_rows(error, rows, 4)
    assert len(str(error)) < 120
