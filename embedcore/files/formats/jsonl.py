"""The .jsonl output: one object per row, its vector as a list of numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedcore.files.cuts import characters_in, code_from, tokens_in
from embedcore.files.disk import opened_file
from embedcore.files.formats.base import Layout, RowWriter, finite_rows, not_ours
from embedcore.files.scan import BLOCK_CHARACTERS
from embedcore.files.sums import SUM, little_endian, row_sum, seed_of
from embedcore.files.types import (
    CUT_COLUMNS,
    RESERVED_COLUMNS,
    SIZE,
    Block,
    JsonValue,
    Origin,
    Row,
    StoredRow,
    as_digests,
    is_digest_of,
    parsed_digest,
)

if TYPE_CHECKING:
    from embedcore.files.types import Digests, Vectors


Fields: TypeAlias = dict[str, JsonValue]

_LINES_AT_ONCE = 1024
_NO_DIGEST: Final = bytes(SIZE)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class JsonlFormat:
    """See ``OutputFormat``. Every row names its origin; one of another origin is an error."""

    def paths(self, output: Path) -> tuple[Path, ...]:
        return (output,)

    def origin(self, output: Path) -> Origin | None:
        """That of the first row that can be believed, else of the first that says one."""
        return self._origin(output, _first_sum(output))

    def _origin(self, output: Path, first_sum: _FirstSum | None) -> Origin | None:
        number = 0
        said: Origin | None = None
        for number, fields in numbered_objects(output):
            row = None if fields is None else _read_row(number, fields, first_sum)
            if row is not None:
                said = said or row.origin
                if row.sound:
                    return row.origin
            if number >= _LINES_AT_ONCE:
                break
        if number and said is None:
            raise not_ours(output, f"none of its first {number} lines is a row of an output")
        return said

    def blocks(self, output: Path) -> Iterator[Block]:
        first_sum = _first_sum(output)
        origin = self._origin(output, first_sum)
        if origin is not None:
            for numbered in object_blocks(numbered_objects(output)):
                yield _block(numbered, origin, first_sum)

    def writer(self, files: Sequence[BinaryIO], layout: Layout) -> RowWriter:
        return _JsonlWriter(files[0], layout)


class _JsonlWriter:
    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self._file = file
        self._layout = layout

    def write(
        self, rows: Sequence[Row], digests: Digests, cuts: NDArray[np.uint32], vectors: Vectors
    ) -> None:
        origin = self._layout.origin
        seed = seed_of(origin)
        vectors = little_endian(vectors)
        for i, row in enumerate(rows):
            fields = head_fields(row, digests[i : i + 1], int(cuts[i]))
            fields |= {
                "model": origin.model,
                "fingerprint": origin.fingerprint,
                "input_type": origin.input_type,
                "vector": vectors[i].tolist(),
                SUM: sum_of(fields, seed, vectors[i]),
            }
            fields |= tail_fields(row, self._layout)
            self._file.write(json_line(fields))

    def finish(self) -> None:
        """Nothing follows the last row."""

    def abandon(self) -> None:
        """Nothing to let go."""


def head_fields(row: Row, digest: Digests, cut: int) -> Fields:
    """What a line begins with."""
    tokens = tokens_in(cut)
    fields: Fields = {"id": row.id, "text_sha256": digest.tobytes().hex(), "tokens_cut": tokens}
    return fields if tokens is not None else fields | {"characters_cut": characters_in(cut)}


def tail_fields(row: Row, layout: Layout) -> Fields:
    """What a line ends with: the kept columns and, unless left out, the text."""
    return dict(row.kept) | ({"text": row.text} if layout.keep_text else {})


def json_line(fields: Fields) -> bytes:
    """One object as one line of UTF-8."""
    return _ENCODER.encode(fields).encode() + b"\n"


def numbered_objects(path: Path) -> Iterator[tuple[int, Fields | None]]:
    """The numbers and objects of the lines that are not blank; None: it is no object."""
    for number, line in _numbered_lines(path):
        if not line.isspace():
            yield number, _parsed(line)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with opened_file(path) as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise not_ours(path, str(error.strerror or error)) from error


def _parsed(line: bytes) -> Fields | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def object_blocks(
    lines: Iterator[tuple[int, Fields | None]],
) -> Iterator[list[tuple[int, Fields | None]]]:
    """The same in lists, each bounded in lines and in text."""
    block: list[tuple[int, Fields | None]] = []
    characters = 0
    for number, fields in lines:
        block.append((number, fields))
        text = None if fields is None else fields.get("text")
        characters += len(text) if isinstance(text, str) else 0
        if len(block) >= _LINES_AT_ONCE or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def stored_row(fields: Fields | None) -> StoredRow | None:
    """The parts of a line that are the user's; None if its text is not the one it had."""
    if fields is None:
        return None
    text = fields.get("text")
    if isinstance(text, str) and not is_digest_of(parse_digest(fields), text):
        return None
    return StoredRow(
        id=str(fields.get("id", "")),
        text=text if isinstance(text, str) else None,
        kept={name: value for name, value in fields.items() if name not in RESERVED_COLUMNS},
    )


def parse_digest(fields: Fields) -> bytes:
    """The digest in a line; zeros if there is none."""
    return parsed_digest(fields.get("text_sha256")) or _NO_DIGEST


def parse_cut(fields: Fields) -> int:
    """What was cut, 0 where the line does not say."""
    return code_from(
        fields.get("tokens_cut"), fields.get("characters_cut"), stated="tokens_cut" in fields
    )


def sum_of(fields: Fields, seed: int, vector: Vectors) -> int | None:
    """The sum that a line with this vector has; None if it lacks what is summed."""
    row_id, digest = fields.get("id"), parsed_digest(fields.get("text_sha256"))
    cuts = {name: fields.get(name) for name in CUT_COLUMNS}
    if not isinstance(row_id, str) or digest is None:
        return None
    return row_sum(seed, row_id.encode("utf-8", "surrogatepass"), digest, cuts, vector)


@dataclass(frozen=True, kw_only=True, slots=True)
class _FirstSum:
    """The first line of a file that has a sum: its number and its columns."""

    number: int
    names: frozenset[str]

    def excuses(self, number: int, fields: Fields) -> bool:
        """Whether a line without a sum may be older than sums.

        A version writes a sum for every row or for none, and what is older stands before what was
        added to it. A column that no line with a sum has may be a sum that has lost its name.
        """
        return number < self.number and fields.keys() <= self.names


def _first_sum(path: Path) -> _FirstSum | None:
    """None: all lines are older than sums."""
    quoted = f'"{SUM}"'.encode()
    for number, line in _numbered_lines(path):
        fields = _parsed(line) if quoted in line else None
        if fields is not None and SUM in fields:
            return _FirstSum(number=number, names=frozenset(fields))
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _ReadRow:
    """A line that has all that a row needs. ``sound``: its sum fits, or it is older than sums."""

    origin: Origin
    digest: bytes
    vector: Vectors
    sound: bool


def _read_row(number: int, fields: Fields, first_sum: _FirstSum | None) -> _ReadRow | None:
    model, fingerprint = fields.get("model"), fields.get("fingerprint")
    input_type, vector = fields.get("input_type"), _parse_vector(fields.get("vector"))
    digest = parsed_digest(fields.get("text_sha256"))
    if (
        not isinstance(model, str)
        or not isinstance(fingerprint, str)
        or not isinstance(input_type, str | None)
        or vector is None
        or digest is None
    ):
        return None
    origin = Origin(
        model=model, fingerprint=fingerprint, input_type=input_type, dimensions=len(vector)
    )
    if SUM in fields:
        expected = sum_of(fields, seed_of(origin), vector)
        sound = expected is not None and fields[SUM] == expected
    else:
        sound = first_sum is None or first_sum.excuses(number, fields)
    return _ReadRow(origin=origin, digest=digest, vector=vector, sound=sound)


def _block(
    numbered: list[tuple[int, Fields | None]], origin: Origin, first_sum: _FirstSum | None
) -> Block:
    digests = bytearray(SIZE * len(numbered))
    vectors = np.zeros((len(numbered), origin.dimensions or 0), dtype="<f4")
    sound = np.zeros(len(numbered), dtype=bool)
    foreign = ""
    for i, (number, fields) in enumerate(numbered):
        row = None if fields is None else _read_row(number, fields, first_sum)
        if row is None or not row.sound:
            continue
        if row.origin == origin:
            digests[i * SIZE : (i + 1) * SIZE] = row.digest
            vectors[i], sound[i] = row.vector, True
        elif SUM in (fields or {}) or row.origin.dimensions == origin.dimensions:
            foreign = foreign or f"line {number} is of another model or width than its first row"
    return Block(
        digests=as_digests(digests),
        cuts=np.array([parse_cut(fields or {}) for _, fields in numbered], dtype=np.uint32),
        vectors=vectors,
        sound=sound & finite_rows(vectors),
        row=lambda i: stored_row(numbered[i][1]),
        foreign=foreign,
    )


def _parse_vector(vector: JsonValue) -> Vectors | None:
    """As float32; None if it is no list of numbers. One beyond their range becomes infinite."""
    if not isinstance(vector, list):
        return None
    try:
        numbers = np.array(vector)
    except ValueError:
        return None
    if numbers.ndim != 1 or numbers.dtype.kind not in "fiu":
        return None
    with np.errstate(over="ignore"):
        return little_endian(numbers)
