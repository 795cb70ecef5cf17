"""Frames, series and labelled arrays as pandas, polars and xarray make them today.

``test_sources.py`` holds their doubles to the same, wherever the libraries are absent.
"""

from __future__ import annotations

import numpy as np
import pytest

from embedcore.errors import InputRejected
from embedcore.policy.stream.rows import RowReader
from embedcore.policy.texts import take_in

WHY = "needs the extra integrations: make test-integrations"
pd = pytest.importorskip("pandas", reason=WHY)
pl = pytest.importorskip("polars", reason=WHY)
xr = pytest.importorskip("xarray", reason=WHY)
pa = pytest.importorskip("pyarrow", reason=WHY)

COLUMNS = {"id": [1, 2, 3], "text": ["c", "a", "b"]}
PANDAS, POLARS = pd.DataFrame(COLUMNS), pl.DataFrame(COLUMNS)
TABLES = {
    "pandas": (PANDAS, 'df["text"]'),
    "pandas of one column": (PANDAS[["text"]], 'df["text"]'),
    "pandas without rows": (PANDAS.head(0), 'df["text"]'),
    "pandas with an index": (PANDAS.set_index("id"), 'df["text"]'),
    "pandas with two headings": (pd.DataFrame({("a", "b"): ["x"]}), "df[('a', 'b')]"),
    "polars": (POLARS, 'df["text"]'),
    "polars of one column": (POLARS.select("text"), 'df["text"]'),
    "polars, lazy": (POLARS.lazy(), 'df.collect()["text"]'),
    "arrow": (pa.Table.from_pandas(PANDAS), 'table["text"]'),
    "xarray": (xr.Dataset({"text": ("x", ["a"])}), 'd["text"]'),
}
COLUMN_KINDS = {
    "pandas": lambda values: pd.Series(values),
    "pandas, objects": lambda values: pd.Series(values, dtype=object),
    "pandas, string": lambda values: pd.Series(values, dtype="string"),
    "pandas, python": lambda values: pd.Series(values, dtype=pd.StringDtype("python")),
    "pandas, pyarrow": lambda values: pd.Series(values, dtype=pd.StringDtype("pyarrow")),
    "pandas, arrow": lambda values: pd.Series(values, dtype=pd.ArrowDtype(pa.large_string())),
    "pandas, category": lambda values: pd.Series(values, dtype="category"),
    "pandas, labels": lambda values: pd.Series(values, index=range(7, 7 - len(values), -1)),
    "pandas, names": lambda values: pd.Series(
        values, index=[f"n{at}" for at in range(len(values))]
    ),
    "pandas, array": lambda values: pd.array(values, dtype="string"),
    "polars": lambda values: pl.Series(values, dtype=pl.String),
    "polars, category": lambda values: pl.Series(values, dtype=pl.Categorical),
    "xarray": lambda values: xr.DataArray(np.array(values, dtype=object)),
    "xarray, labels": lambda values: xr.DataArray(
        np.array(values, dtype=object), coords={"x": [f"n{at}" for at in range(len(values))]}
    ),
}


def rows_of(given, text=None):
    reader = RowReader(text=text, key=None)
    return [reader.row(item) for item in reader.elements(given)]


@pytest.mark.case("A10")
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.filterwarnings("error")
def test_a_frame_is_refused_with_its_columns(name):
    given, way = TABLES[name]
    refusals = [lambda: take_in(given, keep_empty=False, keep=True)]
    refusals += [lambda column=column: rows_of(given, column) for column in (None, "text", 0)]
    for refuse in refusals:
        with pytest.raises(InputRejected) as caught:
            refuse()
        assert way in str(caught.value)


@pytest.mark.case("A10")
def test_groups_are_no_texts():
    for groups in (PANDAS.groupby("id"), PANDAS.groupby("id")["text"], POLARS.group_by("id")):
        with pytest.raises(InputRejected):
            take_in(groups, keep_empty=False, keep=False)
    for frame in (PANDAS, POLARS):
        with pytest.raises(InputRejected, match=r'row 1 is of type DataFrame.*df\["text"\]'):
            take_in(["a", frame], keep_empty=False, keep=False)


@pytest.mark.case("A10")
def test_a_labelled_array_of_two_dimensions_names_its_shape():
    for given in (xr.DataArray([["a", "b"]]), PANDAS.to_numpy(), POLARS.to_numpy()):
        with pytest.raises(InputRejected, match=r"shape \(\d, 2\)"):
            take_in(given, keep_empty=False, keep=False)


@pytest.mark.case("A11")
@pytest.mark.parametrize("name", COLUMN_KINDS)
def test_a_column_is_taken_by_position(name):
    values = ["c", "a", "b", "a"]
    given = COLUMN_KINDS[name](values)
    taken = take_in(given, keep_empty=False, keep=False)
    assert [taken.texts[index] for index in taken.rows] == values
    assert {type(text) for text in taken.texts} == {str}
    assert [row.text for row in rows_of(given)] == values
    backwards = take_in(given[::-1], keep_empty=False, keep=False)
    assert [backwards.texts[index] for index in backwards.rows] == values[::-1]


@pytest.mark.case("A11")
@pytest.mark.parametrize("name", COLUMN_KINDS)
def test_a_missing_value_is_refused_by_its_position(name):
    given = COLUMN_KINDS[name](["a", None, "b"])
    with pytest.raises(InputRejected, match="row 1 is of type") as caught:
        take_in(given, keep_empty=False, keep=False)
    assert caught.value.position == 1
    kept = take_in(given, keep_empty=False, keep=True)
    assert kept.rows == [0, -1, 1]


@pytest.mark.case("A11")
def test_an_index_is_a_column():
    taken = take_in(pd.Index(["b", "a"]), keep_empty=False, keep=False)
    assert taken.texts == ["b", "a"]
    pairs = PANDAS.set_index(["id", "text"]).index
    assert [row[:2] for row in rows_of(pairs)] == [(1, "c"), (2, "a"), (3, "b")]
    zipped = zip(PANDAS["id"], PANDAS["text"], strict=True)
    assert [row[:2] for row in rows_of(zipped)] == [(1, "c"), (2, "a"), (3, "b")]
    records = rows_of(PANDAS.to_dict("records"), "text")
    assert [row.text for row in records] == ["c", "a", "b"]
