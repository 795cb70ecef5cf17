"""The hits are those that sorting every cosine would give, for any of the outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import ConfigurationError
from embedcore.files.formats import output_format
from embedcore.files.run import embed_files
from embedcore.files.search import nearest, search
from embedcore.files.types import Row


def cosine(one: Any, other: Any) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@given(
    numbers=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    limit=st.integers(1, 70),
    suffix=st.sampled_from(["jsonl", "npy", "parquet"]),
    lines=st.integers(1, 20),
)
def test_hits_are_those_of_sorting_everything(
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[int],
    limit: int,
    suffix: str,
    lines: int,
    new_client: Any,
    vector: Any,
) -> None:
    output = tmp_path_factory.mktemp("search") / f"v.{suffix}"
    rows = [Row(id=f"r{i}", text=f"t{n}", kept={"n": n}) for i, n in enumerate(numbers)]
    with pytest.MonkeyPatch.context() as patch:
        # Many small blocks, so that the best are gathered over their borders.
        patch.setattr("embedcore.files.formats.jsonl._LINES_AT_ONCE", lines)
        patch.setattr("embedcore.files.output._ROWS_AT_ONCE", lines)
        client = new_client()
        embed_files(client, [iter(rows)], output, keep=["n"])
        found = search(client, ["question", "t1"], output, limit=limit)
    for question, hits in zip(["question", "t1"], found, strict=True):
        scores = [cosine(vector(question), vector(f"t{n}")) for n in numbers]
        best = sorted(scores, reverse=True)[:limit]
        assert [hit.score for hit in hits] == pytest.approx(best, abs=1e-5)
        assert len({hit.position for hit in hits}) == len(hits) == min(limit, len(numbers))
        for hit in hits:
            n = numbers[hit.position]
            assert (hit.id, hit.text, hit.kept) == (f"r{hit.position}", f"t{n}", {"n": n})
            assert hit.score == pytest.approx(scores[hit.position], abs=1e-5)


def test_ties_come_in_the_order_of_the_rows(output: Path, client: Any) -> None:
    embed_files(client, [iter(["a"] * 9)], output)
    (hits,) = search(client, ["a"], output, limit=4)
    assert [hit.position for hit in hits] == [0, 1, 2, 3]
    assert hits[0].score == pytest.approx(1.0)


def test_texts_may_have_been_left_out(output: Path, client: Any) -> None:
    embed_files(client, [iter(["a"])], output, keep_text=False)
    ((hit,),) = search(client, ["a"], output)
    assert hit.text is None


@pytest.mark.parametrize("change", [{"model": "m"}, {"fingerprint": "e" * 32}, {"dimensions": 9}])
def test_a_file_of_another_model_is_refused_before_anything_is_sent(
    output: Path, client: Any, new_client: Any, change: dict[str, Any]
) -> None:
    embed_files(client, [iter(["a"])], output)
    other = new_client(**change)
    with pytest.raises(ConfigurationError) as caught:
        search(other, ["a"], output)
    assert "fake:fake" in str(caught.value)
    assert f"fake:{other.model} (fingerprint {other.fingerprint[:12]}" in str(caught.value)
    assert not other.calls


def test_questions_may_be_of_another_input_type(output: Path, client: Any) -> None:
    embed_files(client, [iter(["a"])], output, input_type="document")
    assert search(client, ["a"], output, input_type="query")[0][0].text == "a"
    assert client.input_types == {"document", "query"}


@pytest.mark.case("F7")
def test_no_rows_no_hits_and_nothing_is_paid(output: Path, new_client: Any) -> None:
    bad = new_client(bad=frozenset("a"))
    embed_files(bad, [iter(["a"])], output, on_error="keep")
    client = new_client()
    assert search(client, ["a", "b"], output) == [[], []]
    assert search(client, [], output) == []
    assert not client.calls


@pytest.mark.case("F7")
def test_where_all_rows_are_damaged_nothing_is_paid(output: Path, new_client: Any) -> None:
    embed_files(new_client(), [iter(["a", "b"])], output)
    written = output_format(output)
    path = written.paths(output)[-1]
    content = path.read_bytes()
    if output.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(output)
        sums = [one + 1 for one in table.column("vector_crc32").to_pylist()]
        at = table.column_names.index("vector_crc32")
        field = table.schema.field(at)
        pq.write_table(table.set_column(at, field, pa.array(sums, field.type)), output)
    else:
        path.write_bytes(content.replace(b'"vector_crc32": ', b'"vector_crc32": 1'))
    client = new_client()
    with pytest.raises(ConfigurationError, match="all of its 2 rows are damaged"):
        search(client, ["a"], output)
    assert not client.calls


def test_what_cannot_be_searched_is_named(tmp_path: Path, client: Any) -> None:
    with pytest.raises(ConfigurationError, match="no such file"):
        search(client, ["a"], tmp_path / "a.npy")
    with pytest.raises(ConfigurationError, match="one text"):
        search(client, "a", tmp_path / "a.npy")
    embed_files(client, [iter(["a", "b"])], tmp_path / "a.npy")
    with pytest.raises(ConfigurationError, match="at least 1"):
        search(client, ["a"], tmp_path / "a.npy", limit=0)
    matrix = np.load(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", matrix[::-1].copy())
    with pytest.raises(ConfigurationError, match="all of its 2 rows are damaged"):
        search(client, ["a"], tmp_path / "a.npy")


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_beyond_the_squares_of_float32(tmp_path: Path, client: Any, scale: float) -> None:
    output = tmp_path / "a.npy"
    embed_files(client, [iter(["a", "b", "c"])], output)
    stored = next(iter(output_format(output).blocks(output))).vectors
    (hits,) = nearest(stored[:1] * np.float32(scale), output, limit=3)
    expected = sorted((cosine(stored[0], other) for other in stored), reverse=True)
    assert [hit.score for hit in hits] == pytest.approx(expected, abs=1e-6)
