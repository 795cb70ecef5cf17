"""The .jsonl output: one object per row, its vector as a list of numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedcore.files.digests import SIZE, as_digests
from embedcore.files.formats import Layout, RowWriter, finite_rows, not_ours
from embedcore.files.scan import BLOCK_CHARACTERS
from embedcore.files.types import RESERVED_COLUMNS, Block, JsonValue, Origin, Row, StoredRow

if TYPE_CHECKING:
    from embedcore.files.types import Digests, Vectors

Fields: TypeAlias = dict[str, JsonValue]

_LINES_AT_ONCE = 1024
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class JsonlFormat:
    """See ``OutputFormat``. Every row names its origin; one of another origin is an error."""

    def paths(self, output: Path) -> tuple[Path, ...]:
        return (output,)

    def origin(self, output: Path) -> Origin | None:
        first = next(numbered_objects(output), None)
        return None if first is None else _origin_of(first[1], output, first[0])

    def blocks(self, output: Path, *, vectors: bool = True) -> Iterator[Block]:
        origin = self.origin(output)
        for numbered in object_blocks(numbered_objects(output)):
            yield _block(numbered, output, origin, vectors)

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
        for i, row in enumerate(rows):
            fields = head_fields(row, digests[i : i + 1], int(cuts[i]))
            fields |= {
                "model": origin.model,
                "fingerprint": origin.fingerprint,
                "input_type": origin.input_type,
                "vector": vectors[i].tolist(),
            }
            fields |= tail_fields(row, self._layout)
            self._file.write(json_line(fields))

    def finish(self) -> None:
        """Nothing follows the last row."""

    def abandon(self) -> None:
        """Nothing to let go."""


def head_fields(row: Row, digest: Digests, cut: int) -> Fields:
    """What a line begins with."""
    return {"id": row.id, "text_sha256": digest.tobytes().hex(), "tokens_cut": cut}


def tail_fields(row: Row, layout: Layout) -> Fields:
    """What a line ends with: the kept columns and, unless left out, the text."""
    return dict(row.kept) | ({"text": row.text} if layout.keep_text else {})


def json_line(fields: Fields) -> bytes:
    """One object as one line of UTF-8."""
    return _ENCODER.encode(fields).encode() + b"\n"


def numbered_objects(path: Path) -> Iterator[tuple[int, Fields]]:
    """The line numbers and objects of a file that this package wrote."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise not_ours(path, f"line {number} is not an object")
                yield number, fields
    except (ValueError, RecursionError) as error:
        raise not_ours(path, f"a line is not JSON ({error})") from None
    except OSError as error:
        raise not_ours(path, str(error.strerror or error)) from error


def object_blocks(lines: Iterator[tuple[int, Fields]]) -> Iterator[list[tuple[int, Fields]]]:
    """The same in lists, each bounded in lines and in text."""
    block: list[tuple[int, Fields]] = []
    characters = 0
    for number, fields in lines:
        block.append((number, fields))
        text = fields.get("text")
        characters += len(text) if isinstance(text, str) else 0
        if len(block) >= _LINES_AT_ONCE or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def stored_row(fields: Fields) -> StoredRow:
    """The parts of a line that are the user's."""
    text = fields.get("text")
    return StoredRow(
        id=str(fields.get("id", "")),
        text=text if isinstance(text, str) else None,
        kept={name: value for name, value in fields.items() if name not in RESERVED_COLUMNS},
    )


def parse_digest(fields: Fields, path: Path, number: int) -> bytes:
    """The digest in a line."""
    text = fields.get("text_sha256")
    try:
        digest = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        digest = b""
    if len(digest) != SIZE:
        raise not_ours(path, f"line {number} has no valid text_sha256")
    return digest


def parse_cut(fields: Fields) -> int:
    """The tokens cut, 0 where the line does not say."""
    cut = fields.get("tokens_cut")
    return cut if isinstance(cut, int) and 0 <= cut < 2**32 else 0


def _origin_of(fields: Fields, path: Path, number: int) -> Origin:
    model, fingerprint = fields.get("model"), fields.get("fingerprint")
    input_type, vector = fields.get("input_type"), fields.get("vector")
    if (
        not isinstance(model, str)
        or not isinstance(fingerprint, str)
        or not isinstance(input_type, str | None)
        or not isinstance(vector, list)
    ):
        raise not_ours(path, f"line {number} does not name its model, fingerprint and vector")
    return Origin(
        model=model, fingerprint=fingerprint, input_type=input_type, dimensions=len(vector)
    )


def _block(
    numbered: list[tuple[int, Fields]], path: Path, origin: Origin | None, with_vectors: bool
) -> Block:
    width = (origin.dimensions if origin else None) or 0
    digests = bytearray()
    vectors = np.zeros((len(numbered), width), dtype=np.float32) if with_vectors else None
    for i, (number, fields) in enumerate(numbered):
        if _origin_of(fields, path, number) != origin:
            raise not_ours(path, f"line {number} is of another model or width than line 1")
        digests += parse_digest(fields, path, number)
        if vectors is not None:
            vectors[i] = _parse_vector(fields["vector"], path, number)
    return Block(
        digests=as_digests(digests),
        cuts=np.array([parse_cut(fields) for _, fields in numbered], dtype=np.uint32),
        vectors=vectors,
        sound=np.ones(len(numbered), dtype=bool) if vectors is None else finite_rows(vectors),
        row=lambda i: stored_row(numbered[i][1]),
    )


def _parse_vector(vector: JsonValue, path: Path, number: int) -> NDArray[np.float64]:
    if not isinstance(vector, list) or not all(type(value) in (float, int) for value in vector):
        raise not_ours(path, f"line {number}: the vector is not a list of numbers")
    return np.array(vector, dtype=np.float64)
