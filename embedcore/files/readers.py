"""Which rows does a file hold? One reader for each of .txt, .jsonl and .csv, all streaming.

A record is (line, id or None, text, kept). Whatever cannot be read raises ``InputRejected`` naming
file and line, before anything is sent.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from typing import Final, NoReturn, TypeAlias

from embedcore.errors import ConfigurationError, InputRejected
from embedcore.files.types import Columns, InputFormat, JsonValue

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
            f"{name}: a .txt file has one text per line and no columns to choose. Leave out the "
            "text, id and keep columns, or use .jsonl or .csv"
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
        text = _present(row, columns.text, where, "text_column, --text")
        if not isinstance(text, str):
            _reject(where, f"{columns.text!r} must be a string, not {_kind(text)}")
        kept = {column: row.get(column) for column in columns.keep}
        yield number, _json_id(row, columns.id, where), text, kept
    if never_seen and names:
        _no_column(min(never_seen), sorted(names), name, "keep, --keep")


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
    value = _present(row, column, where, "id_column, --id")
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

    text_at = place(columns.text, "text_column, --text")
    id_column = columns.id or ("id" if "id" in header else None)
    id_at = None if id_column is None else place(id_column, "id_column, --id")
    return text_at, id_at, {column: place(column, "keep, --keep") for column in columns.keep}


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
