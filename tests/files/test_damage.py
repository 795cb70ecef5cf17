"""A damaged output costs what was damaged in it, and never gives a wrong vector."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import ConfigurationError
from embedcore.files.formats import output_format
from embedcore.files.run import embed_files, plan_files
from embedcore.files.search import search
from embedcore.files.types import Row

pytestmark = pytest.mark.case("F2")

TEXTS = [f"text {i}" for i in range(12)]
SUFFIXES = ["jsonl", "npy", "parquet"]


def sources(texts: list[str] = TEXTS) -> list[Any]:
    return [iter([Row(id=f"é{i}", text=text, kept={"n": [i]}) for i, text in enumerate(texts)])]


class Damaged:
    """One output of each format as it was written, for damage to be done to."""

    def __init__(self, folder: Path, new_client: Any, load: Any) -> None:
        self.folder, self.new_client, self.load = folder, new_client, load
        self.written: dict[str, dict[Path, bytes]] = {}
        self.rows: dict[str, Any] = {}
        for suffix in SUFFIXES:
            output = folder / f"v.{suffix}"
            embed_files(new_client(longest=6), sources(), output, keep=["n"])
            paths = output_format(output).paths(output)
            self.written[suffix] = {path: path.read_bytes() for path in paths}
            self.rows[suffix] = load(output)

    @contextmanager
    def naming(self, output: Path) -> Iterator[None]:
        """What goes wrong in the block is an error of ours that names the file."""
        try:
            yield
        except ConfigurationError as error:
            if output.name not in str(error):
                raise

    def check(self, suffix: str, changed: dict[Path, bytes], missing: int = 0) -> int | None:
        """Search and run again after a change. What was billed, None for an error that says why.

        ``missing``: how many rows may be gone without a trace."""
        output = self.folder / f"v.{suffix}"
        for path, content in {**self.written[suffix], **changed}.items():
            path.write_bytes(content)
        with self.naming(output):
            (hits,) = search(self.new_client(), [TEXTS[3]], output, limit=99)
            assert all(hit.text in (None, TEXTS[int(hit.id[1:])]) for hit in hits)
            assert len({hit.id for hit in hits}) == len(hits)
        report, client = None, self.new_client(longest=6)
        with self.naming(output):
            report = embed_files(client, sources(), output, keep=["n"])
        if report is None:
            assert not client.billed
            return None
        assert self.load(output) == self.rows[suffix]
        assert len(set(client.billed)) == len(client.billed)
        # Where a line feed is damaged, two rows are one line.
        assert len(client.billed) <= 2 * report.damaged + missing
        return len(client.billed)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, new_client: Any, load: Any) -> Damaged:
    return Damaged(tmp_path_factory.mktemp("damage"), new_client, load)


FLIPS = [1 << bit for bit in range(8)]


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=st.data())
def test_after_any_damage_the_output_is_as_a_fresh_one_or_the_file_is_named(
    damaged: Damaged, suffix: str, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(sorted(damaged.written[suffix])))
    content = bytearray(damaged.written[suffix][path])
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 8]))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.one_of(st.sampled_from(FLIPS), st.integers(1, 255)))
    damaged.check(suffix, {path: bytes(content)})


@pytest.mark.campaign
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_after_any_flip_it_is_so(damaged: Damaged, suffix: str) -> None:
    chance = random.Random(suffix)
    for path, intact in damaged.written[suffix].items():
        for at in range(len(intact)):
            content = bytearray(intact)
            content[at] ^= chance.choice(FLIPS)
            damaged.check(suffix, {path: bytes(content)})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_left_of_a_file_that_was_cut_off_is_used(damaged: Damaged, suffix: str) -> None:
    for path, intact in damaged.written[suffix].items():
        for size in range(0, len(intact), max(len(intact) // 20, 1)):
            damaged.check(suffix, {path: intact[:size]}, missing=len(TEXTS))


def test_a_line_that_is_damaged_costs_one_text_whatever_it_is(damaged: Damaged) -> None:
    """And two that became one, or one that became two, cost two texts and one."""
    for suffix, place in (("jsonl", 0), ("npy", 1)):
        path = sorted(damaged.written[suffix])[place]
        intact = damaged.written[suffix][path]
        start = len(b"".join(intact.splitlines(keepends=True)[:5]))
        end = intact.index(b"\n", start)
        billed = damaged.check(suffix, {path: intact[:start] + b"#" + intact[start + 1 :]})
        assert billed == 1
        assert damaged.check(suffix, {path: intact[:end] + b"#" + intact[end + 1 :]}) == 2
        middle = start + 20
        assert damaged.check(suffix, {path: intact[:middle] + b"\n" + intact[middle:]}) == 1


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def altered(row: dict[str, Any]) -> None:
    row["vector"][2] += 0.5


def with_a_nan(row: dict[str, Any]) -> None:
    row["vector"][2] = float("nan")


def too_short(row: dict[str, Any]) -> None:
    del row["vector"][2]


def of_another_id(row: dict[str, Any]) -> None:
    row["id"] = "another"


def of_another_text(row: dict[str, Any]) -> None:
    row["text_sha256"] = "0" * 64


def cut_more(row: dict[str, Any]) -> None:
    row["tokens_cut"] += 1


def with_another_sum(row: dict[str, Any]) -> None:
    row["vector_crc32"] ^= 1


def without_a_vector(row: dict[str, Any]) -> None:
    row["vector"] = None


def of_words(row: dict[str, Any]) -> None:
    row["vector"] = [str(number) for number in row["vector"]]


def of_lists(row: dict[str, Any]) -> None:
    row["vector"][2] = [row["vector"][2]]


CHANGES = [
    altered,
    with_a_nan,
    too_short,
    of_another_id,
    of_another_text,
    cut_more,
    with_another_sum,
    without_a_vector,
    of_words,
    of_lists,
]


@pytest.mark.parametrize("place", [0, 11])
@pytest.mark.parametrize("change", CHANGES)
def test_only_the_row_that_was_changed_is_billed_again(
    tmp_path: Path,
    new_client: Any,
    check_rows: Callable[..., None],
    change: Callable[..., None],
    place: int,
) -> None:
    output = tmp_path / "v.jsonl"
    embed_files(new_client(), sources(), output)
    rows = lines_of(output)
    change(rows[place])
    write_lines(output, rows)
    plan = plan_files(new_client(), sources(), output)
    assert (plan.damaged, plan.to_embed) == (1, 1)
    (hits,) = found = search(new_client(), ["text 1"], output, limit=99)
    assert found.damaged == 1
    assert TEXTS[place] not in {hit.text for hit in hits}
    client = new_client()
    report = embed_files(client, sources(), output)
    assert (report.damaged, client.billed) == (1, [TEXTS[place]])
    check_rows(output, TEXTS)


def changed_in_parquet(path: Path, column: str, place: int, value: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    values[place] = value(values[place])
    at = table.column_names.index(column)
    field = table.schema.field(column)
    pq.write_table(table.set_column(at, field, pa.array(values, field.type)), path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("vector", lambda vector: [vector[0] + 0.5, *vector[1:]]),
        ("vector", lambda vector: [float("inf"), *vector[1:]]),
        ("id", lambda name: f"{name}x"),
        ("text_sha256", lambda _: "0" * 64),
        ("text_sha256", lambda _: "no digest"),
        ("tokens_cut", lambda cut: cut + 1),
        ("vector_crc32", lambda number: number ^ 1),
    ],
)
def test_so_it_is_in_parquet(
    tmp_path: Path, new_client: Any, check_rows: Callable[..., None], column: str, value: Any
) -> None:
    output = tmp_path / "v.parquet"
    embed_files(new_client(), sources(), output)
    changed_in_parquet(output, column, 7, value)
    client = new_client()
    report = embed_files(client, sources(), output)
    assert (report.damaged, client.billed) == (1, [TEXTS[7]])
    check_rows(output, TEXTS)


def test_a_row_group_that_cannot_be_read_costs_its_rows_alone(
    tmp_path: Path, new_client: Any, check_rows: Callable[..., None]
) -> None:
    import pyarrow.parquet as pq

    output, texts = tmp_path / "v.parquet", [f"text {i}" for i in range(2500)]
    embed_files(new_client(), sources(texts), output)
    group = pq.read_metadata(output).row_group(1)
    columns = [group.column(i) for i in range(group.num_columns)]
    (column,) = (one for one in columns if "vector." in one.path_in_schema)
    content = bytearray(output.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 8] = b"\xff" * 8
    output.write_bytes(content)
    client = new_client()
    assert embed_files(client, sources(texts), output).damaged == group.num_rows < len(texts)
    assert client.billed == texts[2048 : 2048 + group.num_rows]
    check_rows(output, texts)


def test_vectors_that_changed_places_are_found_out(
    output: Path, new_client: Any, load: Any, check_rows: Callable[..., None]
) -> None:
    """Within a file, and to the same row of a file of another input type."""
    embed_files(new_client(), sources(), output)
    other = output.with_name(f"other{output.suffix}")
    embed_files(new_client(model="other"), sources(), other)
    if output.suffix == ".npy":
        matrix, theirs = np.load(output), np.load(other)
        matrix[[2, 3]] = matrix[[3, 2]]
        matrix[5] = theirs[5]
        np.save(output, matrix)
    elif output.suffix == ".jsonl":
        rows, theirs = lines_of(output), lines_of(other)
        for name in ("vector", "vector_crc32"):
            rows[2][name], rows[3][name] = rows[3][name], rows[2][name]
            rows[5][name] = theirs[5][name]
        write_lines(output, rows)
    else:
        theirs = load(other)
        for name in ("vector", "vector_crc32"):
            two, three = (load(output)[place][name] for place in (2, 3))
            for place, value in ((2, three), (3, two), (5, theirs[5][name])):
                changed_in_parquet(output, name, place, lambda _, value=value: value)
    client = new_client()
    report = embed_files(client, sources(), output)
    assert (report.damaged, client.billed) == (3, [TEXTS[2], TEXTS[3], TEXTS[5]])
    check_rows(output, TEXTS)


def test_rows_of_another_model_in_the_same_file_are_no_damage(
    tmp_path: Path, new_client: Any
) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    embed_files(new_client(), sources(), one)
    embed_files(new_client(model="other"), sources(["else"]), other)
    one.write_bytes(one.read_bytes() + other.read_bytes())
    client = new_client()
    with pytest.raises(ConfigurationError, match=r"line 13 is of another model.*overwrite=True"):
        embed_files(client, sources(), one)
    assert not client.calls
    assert search(client, ["text 1"], one, limit=99).damaged == 1


def without_sums(output: Path) -> None:
    """As the versions before wrote it."""
    if output.suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.write_table(pq.read_table(output).drop_columns(["vector_crc32"]), output)
    elif output.suffix == ".jsonl":
        write_lines(
            output,
            [{k: v for k, v in row.items() if k != "vector_crc32"} for row in lines_of(output)],
        )
    else:
        sidecar = output.with_name(f"{output.name}.rows.jsonl")
        header, *rows = lines_of(sidecar)
        sums = [{"vector_crc32": zlib.crc32(vector)} for vector in np.load(output)]
        write_lines(sidecar, [header, *(row | one for row, one in zip(rows, sums, strict=True))])


def test_an_output_without_sums_is_believed_and_has_them_afterwards(
    output: Path, new_client: Any, load: Any, check_rows: Callable[..., None]
) -> None:
    embed_files(new_client(), sources(), output)
    written = load(output)
    without_sums(output)
    assert load(output) != written
    client = new_client()
    assert search(client, ["text 1"], output).damaged == 0
    report = embed_files(new_client(), sources(), output)
    assert (report.embedded, report.damaged) == (0, 0)
    assert load(output) == written
    check_rows(output, TEXTS)


def renamed_sum(output: Path, place: int, name: str) -> None:
    """The sum of one row keeps its value and loses its name; in Parquet those of all rows do."""
    if output.suffix == ".parquet":
        content = output.read_bytes().replace(b"vector_crc32", name.encode())
        output.write_bytes(content)
        return
    path = output_format(output).paths(output)[-1]
    rows = lines_of(path)
    place += output.suffix == ".npy"
    rows[place] = {name if key == "vector_crc32" else key: v for key, v in rows[place].items()}
    write_lines(path, rows)


@pytest.mark.parametrize("place", [0, 11])
@pytest.mark.parametrize("name", ["vector_crc33", "Vector_crc32", "x"])
def test_a_sum_without_its_name_lets_no_altered_vector_through(
    output: Path, new_client: Any, check_rows: Callable[..., None], place: int, name: str
) -> None:
    if output.suffix == ".parquet":
        name = "vector_crc33"
    embed_files(new_client(), sources(), output, keep=["n"])
    if output.suffix == ".jsonl":
        rows = lines_of(output)
        altered(rows[place])
        write_lines(output, rows)
    elif output.suffix == ".npy":
        matrix = np.load(output)
        matrix[place, 2] += 0.5
        np.save(output, matrix)
    else:
        content = bytearray(output.read_bytes())
        (vector,) = load_vectors(output)[place : place + 1]
        content[content.index(vector.tobytes()) + 9] ^= 1
        output.write_bytes(content)
    renamed_sum(output, place, name)
    assert search(new_client(), ["text 1"], output).damaged == 1
    client = new_client()
    report = embed_files(client, sources(), output, keep=["n"])
    assert (report.damaged, client.billed) == (1, [TEXTS[place]])
    check_rows(output, TEXTS)


def load_vectors(output: Path) -> Any:
    import pyarrow.parquet as pq

    return np.stack(pq.read_table(output).column("vector").to_numpy())


def test_rows_older_than_sums_are_believed_before_rows_that_have_them(
    tmp_path: Path, new_client: Any, check_rows: Callable[..., None]
) -> None:
    older, output = tmp_path / "older.jsonl", tmp_path / "v.jsonl"
    embed_files(new_client(), sources(TEXTS[:5]), older)
    without_sums(older)
    embed_files(new_client(), sources(TEXTS[5:]), output)
    newer = output.read_bytes()
    output.write_bytes(older.read_bytes() + newer)
    assert search(new_client(), ["text 1"], output).damaged == 0
    assert plan_files(new_client(), sources(), output).to_embed == 0
    output.write_bytes(newer + older.read_bytes())
    client = new_client()
    assert embed_files(client, sources(), output).damaged == 5
    assert client.billed == TEXTS[:5]
    check_rows(output, TEXTS)


def test_a_column_of_another_program_is_no_sum(
    tmp_path: Path, new_client: Any, check_rows: Callable[..., None]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    output = tmp_path / "v.parquet"
    embed_files(new_client(), sources(), output)
    without_sums(output)
    table = pq.read_table(output)
    years = pa.array(range(len(table)), pa.uint32())
    pq.write_table(table.append_column("year", years), output)
    assert embed_files(new_client(), sources(), output).damaged == 0
    check_rows(output, TEXTS)


@pytest.mark.case("E5")
def test_vectors_under_a_former_fingerprint_of_the_same_settings_go_on(
    output: Path, new_client: Any, load: Any, check_rows: Callable[..., None]
) -> None:
    embed_files(new_client(fingerprint="e" * 32), sources(), output)
    client = new_client(former=("e" * 32,))
    assert search(client, ["text 1"], output)[0][0].text == "text 1"
    report = embed_files(client, sources([*TEXTS, "new"]), output)
    assert (report.embedded, report.reused, report.damaged) == (1, 12, 0)
    check_rows(output, [*TEXTS, "new"])
    assert embed_files(new_client(), sources([*TEXTS, "new"]), output).embedded == 0


@pytest.mark.case("C12")
def test_a_vector_of_zeros_is_asked_for_again(
    output: Path, new_client: Any, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    embed = type(new_client()).embed

    def zeros(self: Any, texts: Any, **options: Any) -> Any:
        options["on_arrival"] = None
        result = embed(self, texts, **options)
        result.vectors[[i for i, text in enumerate(texts) if text == "text 4"]] = 0
        return result

    with monkeypatch.context() as patch:
        patch.setattr(type(new_client()), "embed", zeros)
        embed_files(new_client(), sources(), output)
    assert load(output)[4]["vector"] == [0] * 6
    client = new_client()
    report = embed_files(client, sources(), output)
    assert (client.billed, report.damaged) == (["text 4"], 0)
    assert any(load(output)[4]["vector"])


def test_a_damaged_text_is_no_hit_and_costs_nothing(
    output: Path, new_client: Any, check_rows: Callable[..., None]
) -> None:
    embed_files(new_client(), sources(), output)
    if output.suffix == ".parquet":
        changed_in_parquet(output, "text", 3, lambda _: "another text")
    else:
        path = output_format(output).paths(output)[-1]
        path.write_text(path.read_text().replace('"text 3"', '"text ³"'))
    client = new_client()
    (hits,) = found = search(client, ["text 3"], output, limit=99)
    assert found.damaged == 1
    assert {hit.text for hit in hits} == set(TEXTS) - {"text 3"}
    client = new_client()
    embed_files(client, sources(), output)
    assert not client.billed
    check_rows(output, TEXTS)
