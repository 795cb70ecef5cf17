"""The .parquet output: ``vector`` as fixed_size_list<float32>, the origin in the file's metadata.

Kept columns have one Arrow type each; a column of mixed or nested values holds JSON, and its field
says so. Needs pyarrow, which is loaded only here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from embedcore.errors import ConfigurationError
from embedcore.files.digests import SIZE, as_digests
from embedcore.files.formats import Layout, RowWriter, finite_rows, not_ours, own_version
from embedcore.files.scan import Kind
from embedcore.files.types import RESERVED_COLUMNS, Block, JsonValue, Origin, Row, StoredRow

if TYPE_CHECKING:
    from embedcore.files.types import Digests, Vectors

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise ConfigurationError("a .parquet file needs pyarrow: pip install pyarrow") from None

_PREFIX: Final = "embedcore."
_JSON_FIELD: Final = {b"embedcore.encoding": b"json"}
_LARGEST_PART: Final = 4096


class ParquetFormat:
    """See ``OutputFormat``. One block for each row group."""

    def paths(self, output: Path) -> tuple[Path, ...]:
        return (output,)

    def origin(self, output: Path) -> Origin | None:
        with _opened(output) as file:
            return _origin_in(file, output)

    def blocks(self, output: Path, *, vectors: bool = True) -> Iterator[Block]:
        with _opened(output) as file:
            origin = _origin_in(file, output)
            names = [name for name in file.schema_arrow.names if vectors or name != "vector"]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=names)
                yield _block(table, output, origin.dimensions or 0, vectors)

    def writer(self, files: Sequence[BinaryIO], layout: Layout) -> RowWriter:
        return _ParquetWriter(files[0], layout)


class _ParquetWriter:
    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self._layout = layout
        self._schema = _schema(layout)
        columns = [name for name in self._schema.names if name not in ("vector", "text_sha256")]
        # Vectors and hashes do not repeat: a dictionary or statistics of them only cost time.
        self._writer = pq.ParquetWriter(
            file, self._schema, use_dictionary=columns, write_statistics=columns
        )

    def write(
        self, rows: Sequence[Row], digests: Digests, cuts: NDArray[np.uint32], vectors: Vectors
    ) -> None:
        width = self._layout.origin.dimensions or 0
        flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
        raw = digests.tobytes()
        arrays = [
            pa.array([row.id for row in rows], pa.string()),
            pa.array([raw[at : at + SIZE].hex() for at in range(0, len(raw), SIZE)], pa.string()),
            pa.array(cuts, pa.int32()),
            pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.float32(), width)),
        ]
        for column, kind in self._layout.kinds.items():
            convert, arrow_type = _TYPES[kind]
            values = (row.kept.get(column) for row in rows)
            converted = [None if value is None else convert(value) for value in values]
            arrays.append(pa.array(converted, arrow_type))
        if self._layout.keep_text:
            arrays.append(pa.array([row.text for row in rows], pa.string()))
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table, row_group_size=_LARGEST_PART)

    def finish(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        # Its destructor would close it again, and warn when that fails too.
        with suppress(Exception):
            self._writer.close()
        self._writer.is_open = False


def _as_json(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False)


_TYPES: Final[dict[Kind, tuple[Callable[[Any], object], Any]]] = {
    "string": (str, pa.string()),
    "int": (int, pa.int64()),
    "wide": (int, pa.int64()),
    "float": (float, pa.float64()),
    "bool": (bool, pa.bool_()),
    "json": (_as_json, pa.string()),
}


def _schema(layout: Layout) -> Any:
    origin = layout.origin
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text_sha256", pa.string(), nullable=False),
        pa.field("tokens_cut", pa.int32(), nullable=False),
        pa.field("vector", pa.list_(pa.float32(), origin.dimensions or 0), nullable=False),
    ]
    for column, kind in layout.kinds.items():
        metadata = _JSON_FIELD if kind == "json" else None
        fields.append(pa.field(column, _TYPES[kind][1], metadata=metadata))
    if layout.keep_text:
        fields.append(pa.field("text", pa.string(), nullable=False))
    described = {
        "version": own_version(),
        "model": origin.model,
        "fingerprint": origin.fingerprint,
        "dimensions": str(origin.dimensions or 0),
    }
    if origin.input_type is not None:
        described["input_type"] = origin.input_type
    return pa.schema(fields, {_PREFIX + name: value for name, value in described.items()})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:
            yield file
    except pa.ArrowException as error:
        raise not_ours(path, str(error)) from None
    except OSError as error:
        raise not_ours(path, str(error.strerror or error)) from error


def _origin_in(file: Any, path: Path) -> Origin:
    metadata = file.schema_arrow.metadata or {}
    described = {
        name.decode().removeprefix(_PREFIX): value.decode()
        for name, value in metadata.items()
        if name.startswith(_PREFIX.encode())
    }
    missing = {"model", "fingerprint", "dimensions"} - set(described)
    columns = {"id", "text_sha256", "vector"} - set(file.schema_arrow.names)
    if missing or columns or not described["dimensions"].isdecimal():
        raise not_ours(path, "its metadata and columns are not those of embedcore")
    return Origin(
        model=described["model"],
        fingerprint=described["fingerprint"],
        input_type=described.get("input_type"),
        dimensions=int(described["dimensions"]),
    )


def _block(table: Any, path: Path, width: int, with_vectors: bool) -> Block:
    vectors = _vectors(table, path, width) if with_vectors else None
    raw = bytearray()
    for text in table.column("text_sha256").to_pylist():
        raw += _digest(text, path)
    rest = table.drop_columns(["vector"]) if with_vectors else table
    cuts = rest.column("tokens_cut").to_pylist() if "tokens_cut" in rest.column_names else []
    return Block(
        digests=as_digests(raw),
        cuts=np.array(cuts or [0] * len(table), dtype=np.uint32),
        vectors=vectors,
        sound=np.ones(len(table), dtype=bool) if vectors is None else finite_rows(vectors),
        row=lambda i: _stored_row(rest, i),
    )


def _digest(text: object, path: Path) -> bytes:
    try:
        digest = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        digest = b""
    if len(digest) != SIZE:
        raise not_ours(path, "a text_sha256 is not one")
    return digest


def _vectors(table: Any, path: Path, width: int) -> Vectors:
    column = table.column("vector")
    if column.type != pa.list_(pa.float32(), width) or column.null_count:
        raise not_ours(path, f"its vectors are {column.type}, not {width} float32 each")
    flat = column.combine_chunks().flatten()
    values: Vectors = np.asarray(flat, dtype=np.float32)
    if len(values) != len(table) * width or flat.null_count:
        raise not_ours(path, "a vector is incomplete")
    return values.reshape(len(table), width)


def _stored_row(table: Any, i: int) -> StoredRow:
    fields = table.slice(i, 1).to_pylist()[0]
    kept: dict[str, JsonValue] = {}
    for field in table.schema:
        if field.name not in RESERVED_COLUMNS:
            value = fields[field.name]
            encoded = (field.metadata or {}).get(b"embedcore.encoding") == b"json"
            kept[field.name] = json.loads(value) if encoded and value is not None else value
    return StoredRow(id=fields["id"], text=fields.get("text"), kept=kept)
