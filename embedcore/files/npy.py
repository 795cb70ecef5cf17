"""The .npy output: a plain (n, d) float32 matrix, and ``<name>.npy.rows.jsonl`` beside it.

The sidecar's first line is a header, then comes one line for each row of the matrix. Two files
cannot be replaced in one step, so every line carries the CRC-32 of its vector: a matrix and a
sidecar that do not belong together are found out.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embedcore.files.digests import as_digests
from embedcore.files.disk import beside
from embedcore.files.formats import Layout, RowWriter, finite_rows, not_ours, own_version
from embedcore.files.jsonl import (
    Fields,
    head_fields,
    json_line,
    numbered_objects,
    object_blocks,
    parse_cut,
    parse_digest,
    stored_row,
    tail_fields,
)
from embedcore.files.types import Block, Origin, Row

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
        header = next((fields for _, fields in numbered_objects(sidecar)), {})
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

    def blocks(self, output: Path, *, vectors: bool = True) -> Iterator[Block]:
        self.origin(output)
        sidecar = self.paths(output)[1]
        lines = object_blocks(islice(numbered_objects(sidecar), 1, None))
        with _opened_matrix(output) as (file, width):
            for numbered in lines:
                raw = file.read(len(numbered) * width * _FLOAT_SIZE)
                there = len(raw) // (width * _FLOAT_SIZE) if width else len(numbered)
                # A sidecar longer than the matrix: the rest of its rows have no vector to trust.
                part = np.zeros((len(numbered), width), dtype=np.float32)
                part[:there] = np.frombuffer(raw, dtype="<f4").reshape(there, width)
                yield _block(numbered, sidecar, part, there, vectors)

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
        matrix = np.ascontiguousarray(vectors, dtype="<f4")
        self._matrix.write(matrix.tobytes())
        for i, row in enumerate(rows):
            fields = head_fields(row, digests[i : i + 1], int(cuts[i]))
            fields["vector_crc32"] = zlib.crc32(matrix[i])
            self._sidecar.write(json_line(fields | tail_fields(row, self._layout)))

    def finish(self) -> None:
        """Nothing follows the last row."""

    def abandon(self) -> None:
        """Nothing to let go."""


@contextmanager
def _opened_matrix(output: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file at its first number, and the width of its rows.

    Only the header that numpy writes for such a matrix is accepted: numpy's own reader evaluates
    what it finds there.
    """
    try:
        with output.open("rb") as file:
            header = _HEADER.match(file.read(_MAX_HEADER))
            if header is None:
                raise not_ours(output, "it is not a float32 matrix of two dimensions")
            rows, width = int(header[1]), int(header[2])
            if file.seek(0, os.SEEK_END) != header.end() + rows * width * _FLOAT_SIZE:
                raise not_ours(output, f"it is not as long as {rows} rows of {width} numbers")
            file.seek(header.end())
            yield file, width
    except OSError as error:
        raise not_ours(output, str(error.strerror or error)) from error


def _block(
    numbered: list[tuple[int, Fields]],
    sidecar: Path,
    vectors: Vectors,
    there: int,
    with_vectors: bool,
) -> Block:
    raw = bytearray()
    for number, fields in numbered:
        raw += parse_digest(fields, sidecar, number)
    sound = np.array(
        [
            i < there and fields.get("vector_crc32") == zlib.crc32(vectors[i].astype("<f4"))
            for i, (_, fields) in enumerate(numbered)
        ],
        dtype=bool,
    )
    return Block(
        digests=as_digests(raw),
        cuts=np.array([parse_cut(fields) for _, fields in numbered], dtype=np.uint32),
        vectors=vectors if with_vectors else None,
        sound=sound & finite_rows(vectors),
        row=lambda i: stored_row(numbered[i][1]),
    )
