"""The .npy output: a plain (n, d) float32 matrix, and ``<name>.npy.rows.jsonl`` beside it.

The sidecar's first line is a header, then comes one line for each row of the matrix. Two files
cannot be replaced in one step: by the sum that every line has, a matrix and a sidecar that do not
belong together are found out. Older sidecars have the CRC-32 of the vector alone.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embedcore.files.disk import beside, opened_file
from embedcore.files.formats.base import Layout, RowWriter, finite_rows, not_ours, own_version
from embedcore.files.formats.jsonl import (
    Fields,
    head_fields,
    json_line,
    numbered_objects,
    object_blocks,
    parse_cut,
    parse_digest,
    stored_row,
    sum_of,
    tail_fields,
)
from embedcore.files.sums import SUM, little_endian, seed_of
from embedcore.files.types import Block, Origin, Row, as_digests

if TYPE_CHECKING:
    from embedcore.files.types import Digests, Vectors


SIDECAR = ".rows.jsonl"

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?s:..)"
    rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,18}), (\d{1,9})\), \} *\n"
)
_MAX_HEADER = 4096
_FLOAT_SIZE = 4


class NpyFormat:
    """See ``OutputFormat``."""

    def paths(self, output: Path) -> tuple[Path, ...]:
        return output, beside(output, SIDECAR)

    def origin(self, output: Path) -> Origin | None:
        sidecar = self.paths(output)[1]
        if not sidecar.exists():
            raise not_ours(output, f"{sidecar.name}, which names its rows, is not beside it")
        header = next((fields for _, fields in numbered_objects(sidecar)), None) or {}
        model, fingerprint = header.get("model"), header.get("fingerprint")
        input_type, width = header.get("input_type"), header.get("dimensions")
        if (
            not isinstance(model, str)
            or not isinstance(fingerprint, str)
            or not isinstance(input_type, str | None)
            or not isinstance(width, int)
        ):
            raise not_ours(sidecar, "its first line is not a header")
        return Origin(model=model, fingerprint=fingerprint, input_type=input_type, dimensions=width)

    def blocks(self, output: Path) -> Iterator[Block]:
        origin = self.origin(output)
        sidecar = self.paths(output)[1]
        lines = numbered_objects(sidecar)
        next(lines, None)
        with _opened_matrix(output) as matrix:
            pairing = _Pairing(matrix, seed_of(origin or Origin()))
            for numbered in object_blocks(lines):
                yield pairing.block([fields for _, fields in numbered])

    def writer(self, files: Sequence[BinaryIO], layout: Layout) -> RowWriter:
        return _NpyWriter(files[0], files[1], layout)


class _NpyWriter:
    def __init__(self, matrix: BinaryIO, sidecar: BinaryIO, layout: Layout) -> None:
        self._matrix, self._sidecar, self._layout = matrix, sidecar, layout
        origin = layout.origin
        shape = (layout.rows, origin.dimensions or 0)
        np.lib.format.write_array_header_1_0(
            matrix, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        header: Fields = {
            "embedcore": own_version(),
            "model": origin.model,
            "fingerprint": origin.fingerprint,
            "input_type": origin.input_type,
            "dimensions": shape[1],
            "rows": layout.rows,
        }
        sidecar.write(json_line(header))

    def write(
        self, rows: Sequence[Row], digests: Digests, cuts: NDArray[np.uint32], vectors: Vectors
    ) -> None:
        matrix = little_endian(vectors)
        self._matrix.write(matrix.tobytes())
        seed = seed_of(self._layout.origin)
        for i, row in enumerate(rows):
            fields = head_fields(row, digests[i : i + 1], int(cuts[i]))
            fields[SUM] = sum_of(fields, seed, matrix[i])
            self._sidecar.write(json_line(fields | tail_fields(row, self._layout)))

    def finish(self) -> None:
        """Nothing follows the last row."""

    def abandon(self) -> None:
        """Nothing to let go."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrix:
    file: BinaryIO
    start: int
    rows: int
    width: int

    def read(self, first: int, count: int) -> Vectors:
        """So many rows from ``first`` on; zeros where it has none."""
        part = np.zeros((count, self.width), dtype="<f4")
        low, high = max(first, 0), min(first + count, self.rows)
        if low < high and self.width:
            size = self.width * _FLOAT_SIZE
            self.file.seek(self.start + low * size)
            raw = self.file.read((high - low) * size)
            part[low - first : high - first] = np.frombuffer(raw, "<f4").reshape(-1, self.width)
        return part


@contextmanager
def _opened_matrix(output: Path) -> Iterator[_Matrix]:
    """The matrix, open to be read.

    Only the header that numpy writes for such a matrix is accepted: numpy's own reader evaluates
    what it finds there.
    """
    try:
        with opened_file(output) as file:
            header = _HEADER.match(file.read(_MAX_HEADER))
            if header is None:
                raise not_ours(output, "it is not a float32 matrix of two dimensions")
            rows, width = int(header[1]), int(header[2])
            if file.seek(0, os.SEEK_END) != header.end() + rows * width * _FLOAT_SIZE:
                raise not_ours(output, f"it is not as long as {rows} rows of {width} numbers")
            yield _Matrix(file=file, start=header.end(), rows=rows, width=width)
    except OSError as error:
        raise not_ours(output, str(error.strerror or error)) from error


class _Pairing:
    """Finds the row of the matrix for each line, block by block.

    It is the next one. Where a line feed was damaged, lines became one or one became two: from
    there on the row before and the one after are looked at as well, so that the rest is not lost.
    """

    def __init__(self, matrix: _Matrix, seed: int) -> None:
        self._matrix, self._seed = matrix, seed
        self._next = 0
        self._torn = False

    def block(self, lines: list[Fields | None]) -> Block:
        near = self._matrix.read(self._next - 1, len(lines) + 2)
        vectors = np.zeros((len(lines), self._matrix.width), dtype="<f4")
        sound = np.zeros(len(lines), dtype=bool)
        drift = 0
        for i, fields in enumerate(lines):
            if fields is None:
                self._torn = True
                continue
            for step in (0, 1, -1) if self._torn else (0,):
                place = i + 1 + drift + step
                if 0 <= place < len(near) and self._belong(fields, near[place]):
                    vectors[i], sound[i] = near[place], True
                    drift += step
                    break
        self._next += len(lines) + drift
        digests = b"".join(parse_digest(fields or {}) for fields in lines)
        return Block(
            digests=as_digests(digests),
            cuts=np.array([parse_cut(fields or {}) for fields in lines], dtype=np.uint32),
            vectors=vectors,
            sound=sound & finite_rows(vectors),
            row=lambda i: stored_row(lines[i]),
        )

    def _belong(self, fields: Fields, vector: Vectors) -> bool:
        given = fields.get(SUM)
        if not isinstance(given, int):
            return False
        return given == sum_of(fields, self._seed, vector) or given == zlib.crc32(vector.data)
