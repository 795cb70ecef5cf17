"""Inputs: files, folders and standard input, read and decoded to rows.

A record is (line, id or None, text, kept). Whatever cannot be read raises ``InputRejected`` naming
file and line, before anything is sent.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NoReturn, Self, TypeAlias

from embedcore.errors import ConfigurationError, InputRejected
from embedcore.files.disk import Spool, display
from embedcore.files.types import Columns, InputFormat, JsonValue, Row, Source

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_FOREIGN_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_PROBE = 32


def decoded_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a UTF-8 stream, cut after each line feed, which stays. A leading BOM is dropped.

    Raises ``InputRejected`` naming the line and the offset of the first byte that is not UTF-8.
    """
    offset = 0
    for number, line in enumerate(stream, 1):
        content = line
        if number == 1:
            _refuse_other_encodings(line, name)
            content = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            start = offset + len(line) - len(content) + error.start
            raise _not_utf8(name, number, start, content[error.start]) from None
        if text:
            yield text
        offset += len(line)


def _refuse_other_encodings(first_line: bytes, name: str) -> None:
    for mark, encoding in _FOREIGN_MARKS:
        if first_line.startswith(mark):
            raise _other_encoding(name, encoding)
    # Western text in UTF-16 without a mark is valid UTF-8 with a NUL beside every letter.
    probe = first_line[:_PROBE]
    halves = probe[0::2], probe[1::2]
    if len(probe) == _PROBE and {any(half) for half in halves} == {True, False}:
        filled = next(half for half in halves if any(half))
        if 0 not in filled:
            raise _other_encoding(name, "UTF-16")


def _other_encoding(name: str, encoding: str) -> InputRejected:
    return InputRejected(
        f"{name}:1: byte 0: the file is {encoding}, and only UTF-8 is read. "
        f"Convert it, for instance with: iconv -f {encoding} -t UTF-8",
        reason=f"encoded as {encoding}",
    )


def _not_utf8(name: str, line: int, offset: int, byte: int) -> InputRejected:
    return InputRejected(
        f"{name}:{line}: byte {offset} (0x{byte:02X}) is not UTF-8. If the file is Latin-1 or "
        "Windows-1252, convert it first: iconv -f WINDOWS-1252 -t UTF-8",
        reason="not UTF-8",
    )


Record: TypeAlias = tuple[int, str | None, str, dict[str, JsonValue]]
Lines: TypeAlias = Iterator[str]

INPUT_SUFFIXES: Final[dict[str, InputFormat]] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}
# The largest that a C long holds on every system; the csv module's own limit is 128 KiB.
_CSV_FIELD_LIMIT = 2**31 - 1
_NAMES_LISTED = 50


def read_records(
    lines: Lines, name: str, columns: Columns, input_format: InputFormat
) -> Iterator[Record]:
    """The records of one file. ``name`` is how messages call it."""
    readers: dict[InputFormat, Callable[[Lines, str, Columns], Iterator[Record]]] = {
        "txt": _txt_records,
        "jsonl": _jsonl_records,
        "csv": _csv_records,
    }
    for record in readers[input_format](lines, name, columns):
        _require_unicode(record, name)
        yield record


def _txt_records(lines: Lines, name: str, columns: Columns) -> Iterator[Record]:
    if columns != Columns():
        raise ConfigurationError(
            f"{name}: a .txt file has one text per line and no columns to choose. Leave out "
            "text_column=…, id_column=… and keep=…, or use .jsonl or .csv"
        )
    for number, line in enumerate(lines, 1):
        yield number, None, line.removesuffix("\n").removesuffix("\r"), {}


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


def _jsonl_records(lines: Lines, name: str, columns: Columns) -> Iterator[Record]:
    never_seen = set(columns.keep)
    names: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        row = _parsed(line, where)
        never_seen.difference_update(row)
        if never_seen and len(names) < _NAMES_LISTED:
            names.update(row)
        text = _present(row, columns.text, where, "text_column=…")
        if not isinstance(text, str):
            _reject(where, f"{columns.text!r} must be a string, not {_kind(text)}")
        kept = {column: row.get(column) for column in columns.keep}
        yield number, _json_id(row, columns.id, where), text, kept
    if never_seen and names:
        _no_column(min(never_seen), sorted(names), name, "keep=…")


def _parsed(line: str, where: str) -> dict[str, JsonValue]:
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        _reject(where, f"not valid JSON ({detail}); every line must be one JSON object")
    if not isinstance(row, dict):
        _reject(where, f"every line must be a JSON object, not {_kind(row)}")
    return row


def _json_id(row: dict[str, JsonValue], column: str | None, where: str) -> str | None:
    if column is None:
        if "id" not in row:
            return None
        column = "id"
    value = _present(row, column, where, "id_column=…")
    if not isinstance(value, str | int) or isinstance(value, bool):
        _reject(where, f"the id {column!r} must be a string or a whole number, not {_kind(value)}")
    return str(value)


def _present(row: dict[str, JsonValue], column: str, where: str, option: str) -> JsonValue:
    if column not in row:
        _no_column(column, row, where, option)
    return row[column]


def _csv_records(lines: Lines, name: str, columns: Columns) -> Iterator[Record]:
    if csv.field_size_limit() < _CSV_FIELD_LIMIT:
        csv.field_size_limit(_CSV_FIELD_LIMIT)
    # Strict: an open quote would otherwise swallow the rest of the file as one text.
    reader = csv.reader(lines, strict=True)
    rows = _csv_rows(reader, name)
    header = next(rows, None)
    if header is None:
        return
    text_at, id_at, kept_at = _csv_places(header[1], columns, f"{name}:{header[0]}")
    for number, cells in rows:
        if len(cells) != len(header[1]):
            _reject(
                f"{name}:{number}",
                f"the row has {len(cells)} fields and the header {len(header[1])}; "
                'put "quotes" around a field that holds a comma or a line break',
            )
        row_id = None if id_at is None else cells[id_at]
        kept: dict[str, JsonValue] = {column: cells[at] for column, at in kept_at.items()}
        yield number, row_id, cells[text_at], kept


def _csv_rows(reader: Iterator[list[str]], name: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which the row begins, its fields) for every row that is not blank."""
    while True:
        number = reader.line_num + 1  # type: ignore[attr-defined]
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            _reject(f"{name}:{number}", f"not valid CSV ({error}); check the quotes of this row")
        if cells:
            yield number, cells


def _csv_places(
    header: list[str], columns: Columns, where: str
) -> tuple[int, int | None, dict[str, int]]:
    def place(column: str, option: str) -> int:
        if header.count(column) > 1:
            _reject(
                where, f"{header.count(column)} columns are named {column!r}; rename all but one"
            )
        if column not in header:
            _no_column(column, header, where, option)
        return header.index(column)

    text_at = place(columns.text, "text_column=…")
    id_column = columns.id or ("id" if "id" in header else None)
    id_at = None if id_column is None else place(id_column, "id_column=…")
    return text_at, id_at, {column: place(column, "keep=…") for column in columns.keep}


def _require_unicode(record: Record, name: str) -> None:
    number, row_id, text, kept = record
    where = f"{name}:{number}"
    _check_encodable(text, "the text", where)
    _check_encodable(row_id or "", "the id", where)
    for column, value in kept.items():
        if isinstance(value, str):
            _check_encodable(value, repr(column), where)
        elif value is not None:
            _check_json(value, repr(column), where)


def _check_encodable(value: str, part: str, where: str) -> None:
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        _reject(
            where,
            f"character {error.start} of {part} is a lone surrogate "
            f"(U+{ord(value[error.start]):04X}), half of a character; repair it at its source",
        )


def _check_json(value: JsonValue, part: str, where: str) -> None:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _reject(where, f"{part} holds a lone surrogate, half of a character")
    except (ValueError, RecursionError):
        _reject(
            where, f"{part} is nested too deeply or holds a number beyond the range of a double"
        )


def _no_column(column: str, names: Collection[str], where: str, option: str) -> NoReturn:
    near = get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, names))}"
    _reject(where, f"there is no column {column!r}; {hint} (choose it with {option})")


def _kind(value: JsonValue) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _reject(where: str, reason: str) -> NoReturn:
    raise InputRejected(f"{where}: {reason}", reason=reason)


STDIN = "-"
_PART = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Input:
    """``path``: None if it can be read only once, and was copied."""

    path: Path | None = None
    opened: Callable[[], BinaryIO]
    name: str
    columns: Columns
    input_format: InputFormat


class Inputs:
    """Every row of the sources, in order, as often as asked. Use as a context manager.

    A source is a path, "-" for standard input, or an iterable of ``Row`` or of texts. What can be
    read only once (standard input, a pipe, an iterable) is copied to a temporary file first, which
    has no name. Files whose suffix is not known, and standard input, need or take ``input_format``.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        columns: Columns,
        input_format: InputFormat | None = None,
        stdin: BinaryIO | None = None,
    ) -> None:
        if isinstance(sources, str | os.PathLike):
            raise ConfigurationError("inputs must be a list of files, not one path: use [path]")
        self._sources = list(sources)
        self._columns = columns
        self._input_format = input_format
        self._stdin = stdin
        self._temporary = ExitStack()
        self._inputs: list[_Input] = []

    @property
    def paths(self) -> list[Path]:
        """The files that are read again and again."""
        return [source.path for source in self._inputs if source.path is not None]

    @property
    def keep(self) -> tuple[str, ...]:
        """The columns that every row keeps."""
        return self._columns.keep

    def __enter__(self) -> Self:
        if sum(source == STDIN for source in self._sources) > 1:
            raise ConfigurationError("standard input (-) can be read only once; name it once")
        with self._temporary as cleanup_on_error:
            self._inputs = [self._prepared(source) for source in self._sources]
            self._temporary = cleanup_on_error.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.close()

    def rows(self) -> Iterator[Row]:
        """Read everything again from the start.

        Raises ``InputRejected`` naming file and line; its ``position`` is that of the row.
        """
        position = 0
        for source in self._inputs:
            try:
                for number, row_id, text, kept in _records(source):
                    yield Row(
                        id=str(position) if row_id is None else row_id,
                        text=text,
                        kept=kept,
                        position=position,
                        where=f"{source.name}:{number}",
                    )
                    position += 1
            except InputRejected as error:
                if error.position is None:
                    error.position = position
                raise

    def are_empty(self) -> bool:
        """Whether there is not a single row. Blank lines alone are none in any format, though one
        beside texts is an empty text in a .txt file."""
        try:
            return not any(
                text or source.input_format != "txt"
                for source in self._inputs
                for _, _, text, _ in _records(source)
            )
        except InputRejected:
            # There is something, and what reads it will say where it is.
            return False

    def _prepared(self, source: Source) -> _Input:
        if source == STDIN:
            stream = self._stdin if self._stdin is not None else _standard_input()
            copy = self._spooled(_parts(stream))
            _require_bytes(copy, "standard input")
            return self._described(copy.reader, "<stdin>", self._input_format or "txt")
        if isinstance(source, str | os.PathLike):
            return self._file(Path(source))
        columns = Columns(keep=self._columns.keep)
        lines = (_spooled_row(row, at, columns.keep) for at, row in enumerate(source))
        copy = self._spooled(lines)
        return _Input(opened=copy.reader, name="<rows>", columns=columns, input_format="jsonl")

    def _file(self, path: Path) -> _Input:
        name = display(path)
        if not path.exists():
            raise ConfigurationError(f"{name}: there is no such file")
        if path.is_dir():
            raise ConfigurationError(f"{name} is a folder: name the files in it")
        input_format = self._input_format or INPUT_SUFFIXES.get(path.suffix.lower())
        if input_format is None:
            raise ConfigurationError(
                f"{name}: {path.suffix or 'no suffix'} says nothing about the format; readable are "
                f"{', '.join(INPUT_SUFFIXES)}, or name the format with input_format=…"
            )
        if path.is_file():
            opened = partial(_opened, path, name)
            return self._described(opened, name, input_format, path=path)
        with _opened(path, name) as stream:
            copy = self._spooled(_parts(stream))
            if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
                _require_bytes(copy, name)
        return self._described(copy.reader, name, input_format)

    def _described(
        self,
        opened: Callable[[], BinaryIO],
        name: str,
        input_format: InputFormat,
        *,
        path: Path | None = None,
    ) -> _Input:
        return _Input(
            path=path, opened=opened, name=name, columns=self._columns, input_format=input_format
        )

    def _spooled(self, parts: Iterable[bytes]) -> Spool:
        spool = Spool()
        self._temporary.callback(spool.close)
        spool.fill(parts)
        return spool


def _parts(stream: BinaryIO) -> Iterator[bytes]:
    """As they come. ``read`` would wait for the whole of a part inside Python, and not hear a
    Ctrl-C that came together with a piece of it; a terminal would need Ctrl-D twice."""
    read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
    while part := read(_PART):
        yield part


def _standard_input() -> BinaryIO:
    # A program without a console has none, and a shell can close it.
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigurationError("standard input is closed: there is nothing to read from it")
    return sys.stdin.buffer


def _require_bytes(copy: Spool, name: str) -> None:
    """A program that fails at once writes nothing into its pipe; only this error tells of it."""
    if not copy.size:
        reason = "it ended without a single byte"
        raise InputRejected(
            f"{name}: {reason}: what should have written to it has failed, or had nothing to say. "
            "Nothing was changed",
            reason=reason,
        )


def _spooled_row(given: object, position: int, keep: tuple[str, ...]) -> bytes:
    row = Row(text=given) if isinstance(given, str) else given
    if not isinstance(row, Row):
        reason = f"a row must be a text or a Row, not {type(given).__name__}"
        raise InputRejected(f"<rows>:{position + 1}: {reason}", position=position, reason=reason)
    fields: dict[str, JsonValue] = {column: row.kept.get(column) for column in keep}
    fields |= {"text": row.text} | ({"id": row.id} if row.id else {})
    try:
        # ASCII escapes carry a lone surrogate to the reader, which names it like in any other file.
        return json.dumps(fields, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InputRejected(
            f"<rows>:{position + 1}: a kept value is not JSON ({error})", position=position
        ) from None


def _opened(path: Path, name: str) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigurationError(f"{name} cannot be read: {error.strerror or error}") from error


def _records(source: _Input) -> Iterator[Record]:
    with source.opened() as stream:
        lines = decoded_lines(stream, source.name)
        try:
            yield from read_records(lines, source.name, source.columns, source.input_format)
        except OSError as error:
            raise ConfigurationError(
                f"{source.name} cannot be read: {error.strerror or error}"
            ) from error
