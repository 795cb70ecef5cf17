"""What is taken as texts, and what is a table from which somebody must choose?

Frames here are doubles that iterate as the real ones do: ``test_tables.py`` has those.
"""

from __future__ import annotations

import collections
import email.message
import os
import sys
import tracemalloc
import types
from collections.abc import Mapping, MutableSet

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from embedcore.errors import InputRejected
from embedcore.policy import sources
from embedcore.policy.stream.rows import RowReader
from embedcore.policy.texts import take_in
from embedcore.storage.database import driver
from embedcore.testing.strategies import texts

pa = pytest.importorskip("pyarrow")
compute = pytest.importorskip("pyarrow.compute")


def taken(given, **how):
    """The texts, row by row; None for a row that was refused."""
    intake = take_in(given, **{"keep_empty": False, "keep": True} | how)
    assert [type(text) for text in intake.texts] == [str] * len(intake.texts)
    return [intake.texts[index] if index >= 0 else None for index in intake.rows]


def streamed(given, text=None):
    reader = RowReader(text=text, key=None)
    return [reader.row(item) for item in reader.elements(given)]


class Frame:
    """As pandas: it iterates over the names of its columns, and has ``keys``."""

    ndim = 2

    def __init__(self, **columns):
        self._columns = columns

    @property
    def columns(self):
        return list(self._columns)

    @property
    def shape(self):
        return len(next(iter(self._columns.values()), ())), len(self._columns)

    def keys(self):
        return self.columns

    def __getitem__(self, name):
        return self._columns[name]

    def __iter__(self):
        return iter(self._columns)


class ColumnFrame:
    """As polars: it iterates over its columns, each of which can be indexed by number."""

    def __init__(self, **columns):
        self.columns = list(columns)
        self._columns = columns

    def __iter__(self):
        return iter(self._columns.values())


class LazyFrame:
    """As polars: what it has must be looked up, it warns when asked for ``columns``, and it fails
    only when the first element is wanted."""

    @property
    def columns(self):
        raise RuntimeError("a look into the files")

    def collect_schema(self):
        return types.SimpleNamespace(names=lambda: ["id", "text"])

    def collect(self):
        raise AssertionError("runs the query")

    def __getitem__(self, item):
        raise TypeError("not subscriptable")


class RowTable:
    """As a data set of Hugging Face: named columns, and it iterates over rows."""

    column_names = ("id", "text")

    def __init__(self, *rows):
        self._rows = rows

    def __getitem__(self, name):
        return [row[name] for row in self._rows]

    def __iter__(self):
        return iter(self._rows)


class Headers:
    """A mapping that is registered nowhere."""

    def keys(self):
        return iter(["subject", "text"])

    def __getitem__(self, name):
        return name

    def __iter__(self):
        return self.keys()


class Everything:
    """Has every attribute that is asked for, as a node of some parsers; a list of texts."""

    def __getattr__(self, name):
        return None

    def __iter__(self):
        return iter(["a", "b"])


class Labelled:
    """As xarray: one dimension, whose elements are arrays without dimensions."""

    def __init__(self, values):
        self._values = np.array(values, dtype=object)

    @property
    def shape(self):
        return self._values.shape

    @property
    def ndim(self):
        return self._values.ndim

    def item(self):
        return self._values.item()

    def __array__(self, dtype=None, copy=None):
        return self._values

    def __iter__(self):
        return (type(self)(value) for value in self._values)


class Delayed(Labelled):
    """As dask: an element does not tell its value."""

    item = None


class Series:
    """As pandas: named labels that need not begin at 0, ``keys``, and attributes by label."""

    ndim = 1

    def __init__(self, values):
        self._values = values

    def keys(self):
        return [f"label {number}" for number in range(len(self._values))]

    def __getitem__(self, label):
        raise KeyError(label)

    def __getattr__(self, name):
        if name == "columns":
            return "the value under the label columns"
        raise AttributeError(name)

    def __iter__(self):
        return iter(self._values)


MAPPINGS = [
    {"id": [1], "text": ["a"]},
    collections.OrderedDict(id=1, text="a"),
    collections.UserDict(id=1, text="a"),
    collections.ChainMap({"text": "a"}, {"id": 1}),
    collections.Counter(["id", "text"]),
    types.MappingProxyType({"id": 1, "text": "a"}),
]
TABLES = [
    (Frame(id=[1], text=["a"]), 'df["text"]'),
    (Frame(text=["a"]), 'df["text"]'),
    (Frame(id=[], TEXT=[]), 'df["TEXT"]'),
    (Frame(**{"the title": ["a"], "n": [1]}), 'df["the title"]'),
    (ColumnFrame(id=[1], text=["a"]), 'df["text"]'),
    (LazyFrame(), 'df.collect()["text"]'),
    (pa.table({"id": [1], "text": ["a"]}), 'table["text"]'),
    (pa.RecordBatch.from_pydict({"id": [1], "text": ["a"]}), 'table["text"]'),
    (np.array([(1, "a")], dtype=[("id", int), ("text", "U1")]), 'table["text"]'),
    (np.rec.array([(1, "a")], dtype=[("id", int), ("text", "U1")]), 'table["text"]'),
    (RowTable({"id": 1, "text": "a"}), 'table["text"]'),
]


@pytest.mark.case("A10")
@pytest.mark.fault(4)
@pytest.mark.parametrize("given", MAPPINGS, ids=lambda given: type(given).__name__)
def test_a_mapping_is_no_list_of_its_keys(given):
    for refuse in (taken, streamed, lambda rows: streamed(rows, "text")):
        with pytest.raises(InputRejected) as caught:
            refuse(given)
        for part in ("'id'", "'text'", "list(d.values())", 'd["text"]', type(given).__name__):
            assert part in str(caught.value)
    assert taken(given.keys()) == list(given)


@pytest.mark.case("A10")
def test_the_environment_is_named_and_its_values_are_not(monkeypatch):
    monkeypatch.setattr(os, "environ", type(os.environ)({}, str, str, str, str))
    os.environ["A_TOKEN"] = "a-secret"
    with pytest.raises(InputRejected, match="'A_TOKEN'") as caught:
        taken(os.environ)
    assert "a-secret" not in str(caught.value)


@pytest.mark.case("A10")
@pytest.mark.parametrize("given", [Headers(), email.message.Message()], ids=type)
def test_what_has_keys_is_a_mapping_wherever_it_comes_from(given):
    for refuse in (taken, streamed):
        with pytest.raises(InputRejected, match="with the keys"):
            refuse(given)


@pytest.mark.case("A10")
@pytest.mark.parametrize(("given", "way"), TABLES, ids=lambda part: type(part).__name__)
def test_a_table_is_no_list_of_its_columns(given, way):
    for refuse in (taken, streamed):
        with pytest.raises(InputRejected) as caught:
            refuse(given)
        assert caught.value.position is None
        assert "with the columns '" in str(caught.value)
        assert way in str(caught.value)


@pytest.mark.case("A10")
@pytest.mark.parametrize("column", ["text", "id", 0])
@pytest.mark.parametrize("given", [given for given, _ in TABLES[:8]], ids=type)
def test_a_table_that_gives_columns_is_refused_where_a_column_is_named_too(given, column):
    with pytest.raises(InputRejected, match="with the columns"):
        streamed(given, column)


def test_a_table_that_gives_rows_is_taken_where_their_column_is_named():
    rows = [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]
    assert [row.text for row in streamed(RowTable(*rows), "text")] == ["a", "b"]
    assert streamed(RowTable(), "text") == []
    structured = np.array([(1, "a"), (2, "b")], dtype=[("id", int), ("text", "U1")])
    assert [row.text for row in streamed(structured, "text")] == ["a", "b"]
    assert [row.text for row in streamed(structured, 1)] == ["a", "b"]
    (row, _) = streamed(structured, "body")
    assert str(row.problem) == "row 0 has no 'body'; it has: id, text"
    structs = pa.array(rows)
    assert [row.text for row in streamed(structs, "text")] == ["a", "b"]
    assert [row.text for row in streamed(np.array([["x", "a"], ["y", "b"]]), 1)] == ["a", "b"]


@pytest.mark.case("A10")
def test_only_the_first_names_are_shown_and_none_is_long():
    many = {f"key {number} {'x' * 500}": number for number in range(100_000)}
    with pytest.raises(InputRejected) as caught:
        taken(many)
    assert len(str(caught.value)) < 1_500
    assert "…" in str(caught.value)
    odd = Frame(**{'a"b': [1]})
    with pytest.raises(InputRejected, match=r"""as in df\['a"b'\]"""):
        taken(odd)


@pytest.mark.case("A10")
def test_a_row_that_is_a_mapping_or_a_table_is_told_what_it_has():
    connection = driver().connect(":memory:")
    connection.row_factory = driver().Row
    found = connection.execute("SELECT 7 AS id, 'a' AS text").fetchall()
    connection.close()
    for row in ({"id": 7, "text": "a"}, found[0], Headers()):
        with pytest.raises(
            InputRejected, match=r'as in \[row\["text"\] for row in rows\]'
        ) as caught:
            taken(["fine", row], keep=False)
        assert caught.value.position == 1
        assert "say which column is the text" in str(streamed(["fine", row])[1].problem)
    with pytest.raises(InputRejected, match=r'DataFrame|Frame.*df\["text"\]'):
        taken([Frame(text=["a"])], keep=False)
    with pytest.raises(InputRejected, match="list of texts"):
        taken(found[0])


@pytest.mark.case("A10")
def test_an_array_of_two_dimensions_is_refused_with_its_shape():
    for given, size in (
        (np.array([["a", "b"], ["c", "d"]]), "(2, 2)"),
        (np.array([["a"]]), "(1, 1)"),
        (Labelled([["a"]]), "(1, 1)"),
        (types.SimpleNamespace(ndim=3), "3 dimensions"),
    ):
        for refuse in (taken, streamed):
            with pytest.raises(InputRejected) as caught:
                refuse(given)
            assert size in str(caught.value)


class Ordered(MutableSet):
    """A set that keeps the order in which it was filled."""

    def __init__(self, *values):
        self._values = dict.fromkeys(values)

    def __contains__(self, value):
        return value in self._values

    def __iter__(self):
        return iter(self._values)

    def __reversed__(self):
        return reversed(self._values)

    def __len__(self):
        return len(self._values)

    def add(self, value):
        self._values[value] = None

    def discard(self, value):
        self._values.pop(value, None)


def test_what_has_an_order_is_taken():
    mapping = {"a": "x", "b": "y"}
    for given in (
        ["a", "b"],
        ("a", "b"),
        iter(["a", "b"]),
        (text for text in "ab"),
        collections.deque("ab"),
        mapping.keys(),
        collections.UserDict(mapping).keys(),
        types.MappingProxyType({"x": "a", "y": "b"}).values(),
        Ordered("a", "b"),
        Everything(),
        Series(["a", "b"]),
        Labelled(["a", "b"]),
        Delayed(["a", "b"]),
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
    ):
        rows = list(given) if isinstance(given, collections.abc.Iterator) else given
        assert taken(rows) == ["a", "b"], type(given)
        assert [row.text for row in streamed(rows)] == ["a", "b"]
    assert [row[:2] for row in streamed(mapping.items())] == list(mapping.items())
    for unordered in ({"a"}, frozenset("a"), mapping.keys() & {"a"}):
        with pytest.raises(InputRejected, match="no order"):
            taken(unordered)


@pytest.mark.case("A10")
@pytest.mark.fault(3)
@pytest.mark.parametrize(
    ("missing", "kind"), [(None, "NoneType"), (float("nan"), "float"), (b"bytes", "bytes")]
)
def test_what_is_missing_is_a_row_that_failed(missing, kind):
    for given in (["a", missing], Series(["a", missing]), Labelled(["a", missing])):
        intake = take_in(given, keep_empty=False, keep=True)
        assert intake.rows == [0, -1]
        assert intake.rejected[1].position == 1
        assert kind in str(intake.rejected[1])


STRING_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


@pytest.mark.case("A11")
@hypothesis.given(
    st.lists(st.none() | texts(), max_size=9),
    st.sampled_from(STRING_TYPES),
    st.integers(0, 9),
    st.integers(1, 4),
)
def test_arrow_arrays_are_taken_whatever_their_type(values, arrow_type, cut, block):
    array = pa.array(values, arrow_type)
    chunked = pa.chunked_array([array[:cut], array[cut:]], arrow_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_ARROW_ROWS", block)
        for given in (array, chunked, list(array), (each for each in chunked)):
            rows = list(given)
            assert taken(rows) == values
            assert [row.text for row in streamed(rows)] == values
        for given in (array, chunked):
            assert taken(given) == values
            assert [row.text for row in streamed(given)] == values
            assert [type(row.item) for row in streamed(given)] == [type(value) for value in values]
    for row, value in enumerate(values):
        if value is None:
            with pytest.raises(InputRejected, match="NoneType") as caught:
                taken(array, keep=False)
            assert caught.value.position == row
            break


@pytest.mark.case("A11")
def test_arrow_arrays_that_repeat_or_extend_and_empty_ones_are_taken():
    assert taken(compute.run_end_encode(pa.array(["a", "a", "b"]))) == ["a", "a", "b"]
    if hasattr(pa, "json_"):
        assert taken(pa.array(["{}"], pa.json_())) == ["{}"]
    assert taken(pa.array([])) == []
    assert taken(pa.chunked_array([], pa.string())) == []
    assert taken(pa.array([None, None])) == [None, None]


@pytest.mark.case("A11")
@pytest.mark.parametrize(
    "array",
    [
        pa.array([1]),
        pa.array([], pa.int64()),
        pa.array([b"a"]),
        pa.array([["a"]]),
        pa.array([{"text": "a"}]),
        pa.array([1]).dictionary_encode(),
        pa.chunked_array([[1.5]]),
    ],
    ids=lambda array: str(array.type),
)
def test_an_arrow_array_of_anything_else_names_its_type(array):
    for refuse in (taken, streamed):
        with pytest.raises(InputRejected) as caught:
            refuse(array)
        assert str(array.type) in str(caught.value)


@pytest.mark.case("A11")
def test_arrow_scalars_are_taken_where_a_text_is():
    scalars = [pa.scalar("a"), pa.scalar("b", pa.large_string()), pa.array(["c"])[0]]
    assert taken(scalars) == ["a", "b", "c"]
    assert taken([pa.scalar("", pa.string()), "a"], keep=False, keep_empty=True) == [None, "a"]
    for missing in (pa.scalar(None, pa.string()), pa.scalar(None)):
        with pytest.raises(InputRejected, match="row 1 is of type NoneType") as caught:
            taken(["a", missing], keep=False)
        assert caught.value.position == 1
    with pytest.raises(InputRejected, match="row 0 is of type int"):
        taken([pa.scalar(1)], keep=False)
    with pytest.raises(InputRejected, match="StringScalar: use embed_text"):
        taken(pa.scalar("a"))
    rows = [row.text for row in streamed([(1, pa.scalar("a")), (2, "b")])]
    assert taken(rows) == ["a", "b"]
    table = pa.table({"id": [1], "text": ["a"]})
    assert taken([row.text for row in streamed(zip(*table.columns, strict=True))]) == ["a"]


@pytest.mark.case("A11")
def test_arrow_text_that_is_no_utf8_is_a_row_that_failed():
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], dtype=np.int32))
    array = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffb"))
    assert taken(array) == ["a", None, "b"]
    with pytest.raises(InputRejected, match="row 1 is a StringScalar that cannot") as caught:
        taken(array, keep=False)
    assert caught.value.position == 1


def test_arrays_of_other_makers_are_taken_by_what_they_have():
    class Maker:
        """``slice`` fails beyond the end, and the type has a name of its own."""

        type = "Utf8"

        def __init__(self, values):
            self._values = values

        def __len__(self):
            return len(self._values)

        def slice(self, offset, length):
            assert offset + length <= len(self)
            return Maker(self._values[offset : offset + length])

        def to_pylist(self):
            return list(self._values)

    class Sliceless:
        def to_pylist(self):
            return ["a", None]

        def __iter__(self):
            raise NotImplementedError

    assert taken(Maker(["a", None])) == ["a", None]
    assert taken(Sliceless()) == ["a", None]


@pytest.mark.case("A11")
def test_a_large_arrow_array_is_converted_block_by_block():
    array = pa.array(["a text of some length, " * 4] * 200_000)
    reader = RowReader(text=None, key=None)
    sum(1 for _ in reader.elements(array[:10]))
    tracemalloc.start()
    assert sum(len(text) for text in reader.elements(array)) == 200_000 * 92
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All of them at once are 28 MB.
    assert peak < 5_000_000


@pytest.mark.case("A10")
def test_nothing_is_imported_to_tell():
    class Book(Mapping):
        def __getitem__(self, name):
            raise AssertionError("no value is read")

        def __iter__(self):
            return iter(["text"])

        def __len__(self):
            return 1

    before = set(sys.modules)
    for given in (Book(), Frame(text=["a"]), LazyFrame()):
        with pytest.raises(InputRejected):
            taken(given)
    assert not {"pandas", "polars", "xarray"} & (set(sys.modules) - before)
