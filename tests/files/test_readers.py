"""Every row of a file arrives as it was written, and what cannot be read names file and line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import string
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from embedcore.errors import ConfigurationError, EmbeddingError, InputRejected
from embedcore.files.inputs import INPUT_SUFFIXES, Inputs, _parts
from embedcore.files.types import Columns, Row

# Any text that UTF-8 can carry, among them NUL, line ends of every kind, quotes and signs.
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from("\0\r\n\t\",'=+-@\u2028\u0085\x0b\x0c\ufeffé日🏳"),
    ),
    max_size=30,
)


def rows_of(*paths: object, stdin: io.BytesIO | None = None, **options: object) -> list[Row]:
    input_format = options.pop("input_format", None)
    columns = Columns(**options)  # type: ignore[arg-type]
    with Inputs(list(paths), columns=columns, input_format=input_format, stdin=stdin) as inputs:
        first = list(inputs.rows())
        assert list(inputs.rows()) == first
    return first


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rejection(path: object, **options: object) -> InputRejected:
    with pytest.raises(InputRejected) as caught:
        rows_of(path, **options)
    return caught.value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.mark.fault(2)
@pytest.mark.fault(6)
@pytest.mark.fault(13)
@given(texts=st.lists(TEXTS, max_size=8), bom=st.booleans(), kept=st.lists(TEXTS, max_size=8))
def test_jsonl_arrives_as_written(
    folder: Path, texts: list[str], bom: bool, kept: list[str]
) -> None:
    kept = (kept + texts)[: len(texts)]
    lines = [
        json.dumps({"id": i, "text": text, "k": k}, ensure_ascii=bom)
        for i, (text, k) in enumerate(zip(texts, kept, strict=True))
    ]
    content = ("\ufeff" if bom else "") + "\n".join(lines)
    rows = rows_of(written(folder, "a.jsonl", content), keep=("k",))
    assert [row.text for row in rows] == texts
    assert [row.kept for row in rows] == [{"k": k} for k in kept]
    assert [row.id for row in rows] == [str(i) for i in range(len(texts))]


@pytest.mark.fault(6)
@pytest.mark.fault(13)
@given(texts=st.lists(TEXTS, max_size=8), line_end=st.sampled_from(["\n", "\r\n"]))
def test_csv_arrives_as_written(folder: Path, texts: list[str], line_end: str) -> None:
    buffer = io.StringIO(newline="")
    table = csv.writer(buffer, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    table.writerow(["text", "id", "k"])
    table.writerows([text, f"id{i}", text[::-1]] for i, text in enumerate(texts))
    rows = rows_of(written(folder, "a.csv", buffer.getvalue()), keep=("k",))
    assert [row.text for row in rows] == texts
    assert [row.id for row in rows] == [f"id{i}" for i in range(len(texts))]
    assert [row.kept["k"] for row in rows] == [text[::-1] for text in texts]


@pytest.mark.fault(2)
@pytest.mark.fault(6)
@pytest.mark.fault(13)
@given(
    texts=st.lists(TEXTS.map(lambda text: text.replace("\n", "").rstrip("\r")), max_size=8),
    line_end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_txt_is_one_text_per_line(
    folder: Path, texts: list[str], line_end: str, last: bool
) -> None:
    last = last or not texts or not texts[-1]
    content = "".join(text + line_end for text in texts)
    content = content if last else content.removesuffix(line_end)
    # A leading BOM in the file is not part of the text: the one written here is.
    rows = rows_of(written(folder, "a.txt", "\ufeff" + content))
    assert [row.text for row in rows] == texts
    assert [row.position for row in rows] == list(range(len(texts)))


@pytest.mark.fault(7)
def test_a_text_of_five_megabytes(tmp_path: Path) -> None:
    text = 'é\n",' * 1_250_000
    jsonl = written(tmp_path, "a.jsonl", json.dumps({"text": text}))
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["text"], [text]])
    table = written(tmp_path, "a.csv", buffer.getvalue())
    assert [row.text for row in rows_of(jsonl, table)] == [text, text]


def test_several_files_are_one_sequence(tmp_path: Path) -> None:
    one = written(tmp_path, "1.txt", "a\nb\n")
    two = written(tmp_path, "2.jsonl", '\n{"text": "c", "id": "x"}\n\n{"text": "d"}\n')
    three = written(tmp_path, "3.csv", "n,text\n7,e\n\n8,f\n")
    rows = rows_of(one, two, three)
    assert [(row.id, row.text, row.position) for row in rows] == [
        ("0", "a", 0),
        ("1", "b", 1),
        ("x", "c", 2),
        ("3", "d", 3),
        ("4", "e", 4),
        ("5", "f", 5),
    ]
    assert [row.where.rpartition("/")[2] for row in rows] == [
        "1.txt:1",
        "1.txt:2",
        "2.jsonl:2",
        "2.jsonl:4",
        "3.csv:2",
        "3.csv:4",
    ]


def test_standard_input_and_iterables_are_read_twice() -> None:
    rows = rows_of("-", iter(["x", Row(id="k", text="y", kept={})]), stdin=io.BytesIO(b"a\nb\n"))
    assert [(row.id, row.text) for row in rows] == [("0", "a"), ("1", "b"), ("2", "x"), ("k", "y")]
    (row,) = rows_of("-", stdin=io.BytesIO(b'{"t": "a"}'), input_format="jsonl", text="t")
    assert row.text == "a"
    with pytest.raises(ConfigurationError, match="only once"):
        rows_of("-", "-", stdin=io.BytesIO(b""))


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_a_pipe_is_read_twice(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=pipe.write_bytes, args=(b"a\nb\n",))
    feeder.start()
    assert [row.text for row in rows_of(pipe)] == ["a", "b"]
    feeder.join()


@pytest.mark.case("D7")
def test_temporary_copies_have_no_name_and_are_read_by_several_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    texts = [f"text {i}" for i in range(20_000)]
    with Inputs([iter(texts)], columns=Columns()) as inputs:
        assert list(tmp_path.iterdir()) == []
        assert inputs.paths == []
        one, other = inputs.rows(), inputs.rows()
        assert next(one).text == "text 0"
        assert [row.text for row in other] == texts
        assert [row.text for row in one] == texts[1:]
    with pytest.raises(ValueError, match="closed"):
        next(inputs.rows())


@given(
    before=st.lists(st.text(string.ascii_letters, max_size=5), max_size=5),
    bad=st.sampled_from([b"\xe9t\xe9", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80abc"]),
    bom=st.booleans(),
    suffix=st.sampled_from(sorted(INPUT_SUFFIXES)),
)
def test_bytes_that_are_not_utf8_are_named(
    folder: Path, before: list[str], bad: bytes, bom: bool, suffix: str
) -> None:
    if suffix == ".csv":
        lines = ["text", *(f"x{text}" for text in before)]
    elif suffix == ".txt":
        lines = before
    else:
        lines = [json.dumps({"text": text}) for text in before]
    head = b"".join(line.encode() + b"\n" for line in lines)
    head = (b"\xef\xbb\xbf" if bom else b"") + head
    error = rejection(written(folder, f"a{suffix}", head + b"ok" + bad + b"\n"))
    assert f"a{suffix}:{len(lines) + 1}: byte {len(head) + 2} " in str(error)
    assert error.position == len(before)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_unicode_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-32-be" else ""
    content = (mark + "plain western text of one line\nand another").encode(encoding)
    message = str(rejection(written(tmp_path, "a.txt", content)))
    assert f"a.txt:1: byte 0: the file is {encoding[:6].upper()}" in message
    assert "iconv" in message


@pytest.mark.fault(3)
@pytest.mark.parametrize("value", ["null", "1", "1.5", "true", '["a"]', '{"a": 1}'])
def test_what_is_not_a_text_is_refused(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, "a.jsonl", f'{{"text": "a"}}\n{{"text": {value}}}\n')
    error = rejection(path)
    assert "a.jsonl:2: 'text' must be a string, not" in str(error)
    assert error.position == 1


@pytest.mark.fault(3)
@pytest.mark.parametrize("value", [None, 1, b"a", 1.5, ["a"], Row(text=None)])  # type: ignore[arg-type]
def test_what_is_not_a_text_in_an_iterable_is_refused(value: object) -> None:
    error = rejection(iter(["a", value]))
    assert "<rows>:2" in str(error)
    assert error.position == 1


@pytest.mark.fault(5)
@pytest.mark.parametrize("part", ["text", "id", "k"])
@given(surrogate=st.integers(0xD800, 0xDFFF), before=st.text(string.printable, max_size=5))
def test_lone_surrogates_are_refused(folder: Path, part: str, surrogate: int, before: str) -> None:
    fields = {"text": "a", "id": "b", "k": "c"} | {part: before + chr(surrogate)}
    path = written(folder, "a.jsonl", json.dumps({"text": "t", "k": 1}) + "\n" + json.dumps(fields))
    error = rejection(path, keep=("k",))
    assert "a.jsonl:2: " in str(error)
    assert "lone surrogate" in str(error)
    assert error.position == 1
    error = rejection(iter([Row(id=fields["id"], text=fields["text"], kept=fields)]), keep=("k",))
    assert "lone surrogate" in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"', "2: not valid JSON"),
        ("[1]", "2: every line must be a JSON object, not a list"),
        ('{"text": "a", "k": NaN}', "NaN is not JSON"),
        ('{"text": "a", "k": 1e999}', "beyond the range of a double"),
        ('{"text": "a", "id": 1.5}', "'id' must be a string or a whole number, not a number"),
        ('{"text": "a", "id": true}', "not a boolean"),
        ('{"text": "a", "id": null}', "not null"),
        ('{"texts": "a"}', "2: there is no column 'text'; did you mean 'texts'?"),
        ('{"zzz": "a", "yyy": 1}', "there are 'zzz', 'yyy'"),
        ("[" * 100_000, "2: not valid JSON"),
        (f'{{"text": "a", "k": {"9" * 5000}}}', "2: not valid JSON"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path: Path, content: str, says: str) -> None:
    error = rejection(
        written(tmp_path, "a.jsonl", '{"text": "a", "k": 0}\n' + content), keep=("k",)
    )
    assert says in str(error)
    assert "a.jsonl:2" in str(error)
    assert error.position == 1


def test_a_kept_key_may_lack_in_a_row_but_not_in_all(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "a", "title": 1}\n{"text": "b"}\n')
    assert [row.kept for row in rows_of(path, keep=("title",))] == [{"title": 1}, {"title": None}]
    assert "no column 'titel'; did you mean 'title'?" in str(rejection(path, keep=("titel",)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("txet\na\n", "a.csv:1: there is no column 'text'; did you mean 'txet'?"),
        ("a;text\n1;x\n", "a.csv:1: there is no column 'text'; did you mean 'a;text'?"),
        ("text,text\na,b\n", "a.csv:1: 2 columns are named 'text'"),
        ("id,text\n1,Hello, world\n", "a.csv:2: the row has 3 fields and the header 2"),
        ('id,text\n1,"a\nb"\n2\n', "a.csv:4: the row has 1 fields and the header 2"),
        ('text\na\n"b\nc\n', "a.csv:3: not valid CSV"),
        ('text\n"b"c\n', "a.csv:2: not valid CSV"),
    ],
)
def test_broken_csv_names_the_line(tmp_path: Path, content: str, says: str) -> None:
    assert says in str(rejection(written(tmp_path, "a.csv", content)))


def test_id_and_keep_columns_must_exist(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,Key\na,b\n")
    assert "did you mean 'Key'" in str(rejection(path, id="key"))
    assert "did you mean 'Key'" in str(rejection(path, keep=("key",)))
    (row,) = rows_of(path, id="Key", keep=("Key",))
    assert (row.id, row.kept) == ("b", {"Key": "b"})


@pytest.mark.parametrize(
    ("name", "says"),
    [("missing.txt", "no such file"), ("folder", "is a folder"), ("a.pdf", "'.pdf'|.pdf says")],
)
def test_what_is_no_input_is_a_configuration_error(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    written(tmp_path, "a.pdf", "x")
    with pytest.raises(ConfigurationError, match=says):
        rows_of(tmp_path / name)


def test_columns_make_no_sense_for_txt(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no columns to choose"):
        rows_of(written(tmp_path, "a.txt", "x\n"), keep=("k",))


def test_one_path_instead_of_a_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\[path\]"):
        Inputs(str(tmp_path / "a.txt"), columns=Columns())


class Slow(io.RawIOBase):
    """A pipe whose writer takes its time. ``asked``: how often more was asked for."""

    asked = 0

    def readable(self) -> bool:
        return True

    def readinto(self, room: bytearray) -> int:  # type: ignore[override]
        self.asked += 1
        piece = b"" if self.asked == 3 else b"a\n"
        room[: len(piece)] = piece
        return len(piece)


def test_a_piece_is_given_before_more_is_waited_for() -> None:
    """A Ctrl-C that comes with a piece is heard between the two, or only with the next one."""
    pipe = Slow()
    parts = _parts(io.BufferedReader(pipe))
    assert (next(parts), pipe.asked) == (b"a\n", 1)
    assert (list(parts), pipe.asked) == ([b"a\n"], 3)


@given(content=st.binary(max_size=200), suffix=st.sampled_from(sorted(INPUT_SUFFIXES)))
def test_no_bytes_escape_as_anything_but_our_errors(
    folder: Path, content: bytes, suffix: str
) -> None:
    path = written(folder, f"fuzz{suffix}", content)
    # Anything but an EmbeddingError would pass through and fail the test.
    with contextlib.suppress(EmbeddingError):
        assert all(row.text.encode().decode() == row.text for row in rows_of(path))
