"""What is written is what is read, in every format, also with the format's own tools."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore import TextCut
from embedcore.errors import ConfigurationError
from embedcore.files.cuts import tally
from embedcore.files.formats import output_format
from embedcore.files.run import embed_files
from embedcore.files.types import Origin, Row, content_digest

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from("\0\r\n\",'=é日🏳\u2028")),
    min_size=1,
    max_size=20,
)
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXTS,
    "int": st.integers(-(2**53), 2**53),
    "wide": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
    "huge": st.integers(),
    "number": st.one_of(
        st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False)
    ),
    "mixed": st.one_of(st.integers(), st.booleans(), st.none(), TEXTS, st.lists(st.integers())),
    "nested": st.dictionaries(TEXTS, st.lists(st.booleans(), max_size=2), max_size=2),
}


def _plain(kept: Mapping[str, Any]) -> dict[str, tuple[bool, Any]]:
    """Values to compare: 1 and 1.0 are one number, True is none."""
    return {name: (isinstance(value, bool), value) for name, value in kept.items()}


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[dict[str, object]]]:
    """Texts, and for each the values of columns "a" and "b", of any mixture of kinds."""
    texts = draw(st.lists(TEXTS, max_size=6))
    columns = {
        name: [draw(st.one_of(st.none(), SCALARS[kind])) for _ in texts]
        for name, kind in (
            ("a", draw(st.sampled_from(sorted(SCALARS)))),
            ("b é", draw(st.sampled_from(sorted(SCALARS)))),
        )
    }
    return texts, [{name: columns[name][i] for name in columns} for i in range(len(texts))]


@pytest.fixture(scope="module", params=["parquet", "jsonl", "npy"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out put?#é") / f"a?b#c é日 .{request.param}"


@pytest.mark.fault(6)
@pytest.mark.fault(13)
@pytest.mark.fault(149)
@settings(max_examples=settings.default.max_examples // 2)
@given(table=tables(), keep_text=st.booleans())
def test_rows_come_back_as_they_were(
    target: Path,
    table: tuple[list[str], list[dict[str, object]]],
    keep_text: bool,
    vector: Any,
    new_client: Any,
    load: Any,
) -> None:
    texts, kept = table
    rows = [Row(id=f"é{i}", text=text, kept=kept[i]) for i, text in enumerate(texts)]
    client = new_client(longest=10)
    embed_files(
        client, [iter(rows)], target, keep=["a", "b é"], keep_text=keep_text, overwrite=True
    )
    if not texts:
        return
    written = output_format(target)
    assert written.origin(target) == Origin(
        model="fake:fake", fingerprint=client.fingerprint, dimensions=6
    )
    read, vectors, cuts = [], [], []
    for block in written.blocks(target):
        assert block.sound.all()
        read += [block.row(i) for i in range(len(block.sound))]
        vectors += list(block.vectors)
        cuts += block.cuts.tolist()
    assert [row.text for row in read] == [text if keep_text else None for text in texts]
    assert [row.id for row in read] == [row.id for row in rows]
    assert [_plain(row.kept) for row in read] == [_plain(values) for values in kept]
    assert cuts == [max(len(text) - 10, 0) for text in texts]
    for found, text in zip(vectors, texts, strict=True):
        assert np.array_equal(found, vector(text))
    for row, text in zip(load(target), texts, strict=True):
        assert np.array_equal(np.array(row["vector"], np.float32), vector(text))


CUTS = {
    1: TextCut(tokens=1),
    2: TextCut(characters=2),
    3: TextCut(),
    4: TextCut(tokens=2**40),
    5: TextCut(characters=2**40),
    6: TextCut(tokens=0, characters=7),
}


@pytest.mark.case("A9")
def test_a_cut_is_told_in_tokens_only_if_they_were_counted(
    output: Path, new_client: Any, load: Any
) -> None:
    """As it is written, read, carried over into the next output, and put into a report."""
    texts = ["x" * (10 + rest) for rest in range(7)]
    client = new_client(longest=10, cut=CUTS.__getitem__)
    most = 2**31 - 2
    tokens = [0, 1, None, None, most, None, 0]
    characters = [None, None, 2, None, None, most, None]
    for more in ([], ["short"]):
        report = embed_files(client, [iter([*texts, *more])], output)
        rows = load(output)[:7]
        assert [row["tokens_cut"] for row in rows] == tokens
        assert [row.get("characters_cut") for row in rows] == characters
        (block,) = output_format(output).blocks(output)
        found = tally(block.cuts)
        assert (found.rows, found.unknown) == (4, 1) == (report.truncated, report.perhaps_cut)
        assert (found.tokens, found.characters) == (1 + most, 2 + most)
    assert client.billed == [*texts, "short"]


@pytest.mark.fault(7)
def test_a_text_of_five_megabytes(
    output: Path, client: Any, check_rows: Callable[..., None]
) -> None:
    texts = ['é\n",' * 1_250_000, "short", "\0" * 500_000]
    embed_files(client, [iter(texts)], output)
    check_rows(output, texts)


def test_parquet_says_what_it_is(tmp_path: Path, client: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    output = tmp_path / "a.parquet"
    embed_files(client, [iter(["a", "b"])], output, input_type="document")
    schema = pq.read_schema(output)
    assert schema.field("vector").type == pa.list_(pa.float32(), 6)
    metadata = {key: value for key, value in schema.metadata.items() if key.startswith(b"embed")}
    assert metadata[b"embedcore.model"] == b"fake:fake"
    assert metadata[b"embedcore.fingerprint"] == client.fingerprint.encode()
    assert metadata[b"embedcore.dimensions"] == b"6"
    assert metadata[b"embedcore.input_type"] == b"document"
    assert metadata[b"embedcore.version"]


def test_parquet_is_written_in_row_groups(tmp_path: Path, client: Any) -> None:
    import pyarrow.parquet as pq

    output = tmp_path / "a.parquet"
    embed_files(client, [(str(i) for i in range(5000))], output)
    sizes = [pq.read_metadata(output).row_group(i).num_rows for i in range(3)]
    assert max(sizes) < 4097


def test_the_matrix_is_plain(tmp_path: Path, client: Any, vector: Any) -> None:
    output = tmp_path / "a.npy"
    embed_files(client, [iter(["a", "b", "a"])], output)
    matrix = np.load(output, mmap_mode="r")
    assert np.array_equal(matrix, np.stack([vector("a"), vector("b"), vector("a")]))


def test_other_suffixes_are_refused(tmp_path: Path, client: Any) -> None:
    for name in ("a.csv", "a", "a.parquet.gz"):
        with pytest.raises(ConfigurationError, match=r"\.parquet, \.jsonl, \.npy"):
            embed_files(client, [iter(["a"])], tmp_path / name)
    assert not client.calls


def test_without_pyarrow_the_install_command_is_named(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "embedcore.files.formats.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigurationError) as caught:
        embed_files(client, [iter(["a"])], tmp_path / "a.parquet")
    assert "pip install pyarrow" in str(caught.value)
    assert not client.calls


@pytest.mark.parametrize("column", ["id", "text", "vector", "text_sha256", "model"])
def test_columns_whose_name_is_taken_cannot_be_kept(
    tmp_path: Path, client: Any, column: str
) -> None:
    with pytest.raises(ConfigurationError, match="rename it"):
        embed_files(client, [iter(["a"])], tmp_path / "a.jsonl", keep=[column])


def test_a_matrix_and_a_sidecar_of_two_runs_are_found_out(
    tmp_path: Path, client: Any, new_client: Any, check_rows: Callable[..., None]
) -> None:
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    embed_files(client, [iter(["a", "b", "c"])], one)
    embed_files(client, [iter(["b", "a", "c", "d"])], two)
    one.write_bytes(two.read_bytes())
    (block,) = output_format(one).blocks(one)
    assert block.sound.tolist() == [False, False, True]
    # Such rows are billed again rather than believed.
    again = new_client()
    embed_files(again, [iter(["a", "b", "c"])], one)
    assert sorted(again.billed) == ["a", "b"]
    check_rows(one, ["a", "b", "c"])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "npy"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b'{"a": 1}\n', b"PAR1 not really PAR1", b"\x93NUMPY\x01\x00", b"[]\n"],
)
def test_files_that_are_not_ours_are_never_replaced(
    tmp_path: Path, client: Any, suffix: str, content: bytes, check_rows: Callable[..., None]
) -> None:
    output = tmp_path / f"a.{suffix}"
    output.write_bytes(content)
    if content or suffix != "jsonl":
        with pytest.raises(ConfigurationError, match="overwrite=True") as caught:
            embed_files(client, [iter(["a"])], output)
        assert str(output) in str(caught.value)
        assert output.read_bytes() == content
        assert not client.calls
    embed_files(client, [iter(["a"])], output, overwrite=True)
    check_rows(output, ["a"])


@pytest.mark.parametrize("part", [0, 1])
def test_a_flipped_byte_never_attaches_a_vector_to_another_text(
    tmp_path: Path, part: int, client: Any, vector: Any
) -> None:
    """Every row of a damaged .npy pair is right, or not sound, or the file is refused."""
    texts = ["a", "b", "c"]
    by_digest = {content_digest(text): vector(text) for text in texts}
    output = tmp_path / "a.npy"
    embed_files(client, [iter(texts)], output)
    written = output_format(output)
    path = written.paths(output)[part]
    intact = path.read_bytes()
    refused = doubted = 0
    for at in range(len(intact)):
        damaged = bytearray(intact)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            blocks = list(written.blocks(output))
        except ConfigurationError:
            refused += 1
            continue
        for block in blocks:
            doubted += int(np.sum(~block.sound))
            for i in np.flatnonzero(block.sound):
                digest = block.digests[i : i + 1].tobytes()
                assert np.array_equal(block.vectors[i], by_digest.get(digest, block.vectors[i]))
    assert refused
    assert doubted
