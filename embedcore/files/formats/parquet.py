"""The .parquet output: ``vector`` as fixed_size_list<float32>, the origin in the file's metadata.

Kept columns have one Arrow type each; a column of mixed or nested values holds JSON, and its field
says so. Needs pyarrow, which is loaded only here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from embedcore.errors import ConfigurationError
from embedcore.files.cuts import characters_in, code_from, tokens_in
from embedcore.files.disk import opened_file
from embedcore.files.formats.base import Layout, RowWriter, finite_rows, not_ours, own_version
from embedcore.files.scan import Kind
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


try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise ConfigurationError("a .parquet file needs pyarrow: pip install pyarrow") from None

_PREFIX: Final = "embedcore."
_JSON_FIELD: Final = {b"embedcore.encoding": b"json"}
_LARGEST_PART: Final = 4096
_RANDOM: Final = frozenset({"vector", "text_sha256", SUM})
# What it takes to believe a row; the other columns are read when they are asked for.
_NEEDED: Final = ("id", "text_sha256", *CUT_COLUMNS, "vector", SUM)


class ParquetFormat:
    """See ``OutputFormat``. One block for each row group."""

    def paths(self, output: Path) -> tuple[Path, ...]:
        return (output,)

    def origin(self, output: Path) -> Origin | None:
        with _opened(output) as file:
            return _origin_in(file, output)

    def blocks(self, output: Path) -> Iterator[Block]:
        with _opened(output) as file:
            origin = _origin_in(file, output)
            size = output.stat().st_size
            total = 0
            for number in range(file.num_row_groups):
                with _readable(output):
                    rows = file.metadata.row_group(number).num_rows
                    if not 0 <= rows <= size:
                        raise not_ours(output, f"row group {number} says that it has {rows} rows")
                    block = _block(file, output, number, rows, origin)
                total += rows
                yield block
            lost = file.metadata.num_rows - total
            if 0 < lost <= size:
                yield _lost_block(lost, origin.dimensions or 0)

    def writer(self, files: Sequence[BinaryIO], layout: Layout) -> RowWriter:
        return _ParquetWriter(files[0], layout)


class _ParquetWriter:
    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self._layout = layout
        self._schema = _schema(layout)
        columns = [name for name in self._schema.names if name not in _RANDOM]
        # Vectors, hashes and sums do not repeat: a dictionary, statistics or compression of them
        # only costs time. As they are, a damaged byte of theirs is in one row only.
        self._writer = pq.ParquetWriter(
            file,
            self._schema,
            use_dictionary=columns,
            write_statistics=columns,
            compression=dict.fromkeys(columns, "snappy"),
        )

    def write(
        self, rows: Sequence[Row], digests: Digests, cuts: NDArray[np.uint32], vectors: Vectors
    ) -> None:
        width = self._layout.origin.dimensions or 0
        matrix = little_endian(vectors)
        raw = digests.tobytes()
        hashes = [raw[at : at + SIZE] for at in range(0, len(raw), SIZE)]
        seed = seed_of(self._layout.origin)
        codes = cuts.tolist()
        columns = {
            "tokens_cut": list(map(tokens_in, codes)),
            "characters_cut": list(map(characters_in, codes)),
        }
        sums = [
            row_sum(
                seed,
                row.id.encode(),
                hashes[i],
                {name: columns[name][i] for name in CUT_COLUMNS},
                matrix[i],
            )
            for i, row in enumerate(rows)
        ]
        flat = pa.array(matrix.ravel())
        arrays = [
            pa.array([row.id for row in rows], pa.string()),
            pa.array([digest.hex() for digest in hashes], pa.string()),
            *(pa.array(columns[name], pa.int32()) for name in CUT_COLUMNS),
            pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.float32(), width)),
            pa.array(sums, pa.uint32()),
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
        pa.field("tokens_cut", pa.int32()),
        pa.field("characters_cut", pa.int32()),
        pa.field("vector", pa.list_(pa.float32(), origin.dimensions or 0), nullable=False),
        pa.field(SUM, pa.uint32(), nullable=False),
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
def _readable(path: Path) -> Iterator[None]:
    """Whatever pyarrow makes of damaged bytes, as the error for such a file: it raises dozens of
    kinds, and has no list of them."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        raise not_ours(path, str(getattr(error, "strerror", None) or error)) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with ExitStack() as opened:
        with _readable(path):
            raw = opened.enter_context(opened_file(path))
            file = opened.enter_context(pq.ParquetFile(raw))
        yield file


def _origin_in(file: Any, path: Path) -> Origin:
    with _readable(path):
        schema = file.schema_arrow
        described = {
            name.decode().removeprefix(_PREFIX): value.decode()
            for name, value in (schema.metadata or {}).items()
            if name.startswith(_PREFIX.encode())
        }
    missing = {"model", "fingerprint", "dimensions"} - set(described)
    columns = {"id", "text_sha256", "vector"} - set(schema.names)
    if missing or columns or not described["dimensions"].isdecimal():
        raise not_ours(path, "its metadata and columns are not those of embedcore")
    width = int(described["dimensions"])
    if schema.field("vector").type != pa.list_(pa.float32(), width):
        raise not_ours(path, f"its vectors are {schema.field('vector').type}, not {width} float32")
    return Origin(
        model=described["model"],
        fingerprint=described["fingerprint"],
        input_type=described.get("input_type"),
        dimensions=width,
    )


def _read_group(file: Any, path: Path, number: int, *, needed: bool) -> Any | None:
    """One row group; the columns to believe it, or the others. None if it is damaged.

    Raises ``ConfigurationError`` where the system could not read it, which says nothing of it.
    """
    believed = {*_NEEDED, *_may_be_sums(file.schema_arrow)}
    names = [name for name in file.schema_arrow.names if (name in believed) == needed]
    try:
        table = file.read_row_group(number, columns=names)
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise not_ours(path, str(getattr(error, "strerror", None) or error)) from error
        return None
    return table


def _block(file: Any, path: Path, number: int, rows: int, origin: Origin) -> Block:
    width = origin.dimensions or 0
    table = _read_group(file, path, number, needed=True)
    vectors = None if table is None or len(table) != rows else _vectors(table, width)
    if table is None or vectors is None:
        return _lost_block(rows, width)
    ids, digests = _in_bytes(table, "id"), list(map(_digest, _in_bytes(table, "text_sha256")))
    cuts = {name: _in_column(table, name) for name in CUT_COLUMNS}
    sound = finite_rows(vectors)
    sound &= [None not in pair for pair in zip(ids, digests, strict=True)]
    for name in _may_be_sums(table.schema):
        fit = _fit(ids, digests, cuts, vectors, _in_column(table, name), seed_of(origin))
        if name == SUM or any(fit):
            sound &= fit

    @cache
    def others() -> Any | None:
        with _opened(path) as again, _readable(path):
            return _read_group(again, path, number, needed=False)

    return Block(
        digests=as_digests(b"".join(digest or bytes(SIZE) for digest in digests)),
        cuts=_codes(cuts, stated="tokens_cut" in table.column_names),
        vectors=vectors,
        sound=sound,
        row=lambda i: _stored_row(ids[i], digests[i], others(), i),
    )


def _may_be_sums(schema: Any) -> list[str]:
    """The column of the sums; without it those of its type, which no other column of ours has: one
    that fits any row has lost its name. None: the file is older than sums, or they were left out.
    """
    if SUM in schema.names:
        return [SUM]
    return [field.name for field in schema if field.type == pa.uint32()]


def _lost_block(rows: int, width: int) -> Block:
    return Block(
        digests=as_digests(bytes(SIZE * rows)),
        cuts=np.zeros(rows, dtype=np.uint32),
        vectors=np.broadcast_to(np.float32(0), (rows, width)),
        sound=np.zeros(rows, dtype=bool),
        row=lambda _: None,
    )


def _codes(cuts: dict[str, list[Any]], *, stated: bool) -> NDArray[np.uint32]:
    both = zip(cuts["tokens_cut"], cuts["characters_cut"], strict=True)
    codes = [code_from(tokens, characters, stated=stated) for tokens, characters in both]
    return np.array(codes, dtype=np.uint32)


def _in_column(table: Any, name: str) -> list[Any]:
    return table.column(name).to_pylist() if name in table.column_names else [None] * len(table)


def _in_bytes(table: Any, name: str) -> list[bytes | None]:
    """Strings as they are in the file: damaged ones are not UTF-8."""
    found: list[bytes | None] = table.column(name).cast(pa.binary()).to_pylist()
    return found


def _digest(text: bytes | None) -> bytes | None:
    return None if text is None else parsed_digest(text.decode("utf-8", "replace"))


def _fit(
    ids: list[bytes | None],
    digests: list[bytes | None],
    cuts: dict[str, list[Any]],
    vectors: Vectors,
    sums: list[int | None],
    seed: int,
) -> list[bool]:
    """Which rows have the sum that they should have."""
    cut = [dict(zip(cuts, values, strict=True)) for values in zip(*cuts.values(), strict=True)]
    return [
        row_id is not None
        and digest is not None
        and row_sum(seed, row_id, digest, cut[i], vectors[i]) == sums[i]
        for i, (row_id, digest) in enumerate(zip(ids, digests, strict=True))
    ]


def _vectors(table: Any, width: int) -> Vectors | None:
    """Shape (n, width); None if a vector is incomplete."""
    column = table.column("vector")
    flat = column.combine_chunks().flatten()
    if column.null_count or flat.null_count or len(flat) != len(table) * width:
        return None
    return little_endian(np.asarray(flat, dtype=np.float32).reshape(len(table), width))


def _stored_row(
    row_id: bytes | None, digest: bytes | None, table: Any | None, i: int
) -> StoredRow | None:
    if table is None or row_id is None or digest is None:
        return None
    try:
        fields = table.slice(i, 1).to_pylist()[0] if table.num_columns else {}
        kept = {
            field.name: _kept(field, fields[field.name])
            for field in table.schema
            if field.name not in RESERVED_COLUMNS
        }
        name, text = row_id.decode(), fields.get("text")
    except Exception:  # noqa: BLE001 - no UTF-8, no JSON, or what pyarrow makes of a damaged value
        return None
    if text is not None and not (isinstance(text, str) and is_digest_of(digest, text)):
        return None
    return StoredRow(id=name, text=text, kept=kept)


def _kept(field: Any, value: Any) -> JsonValue:
    encoded = (field.metadata or {}).get(b"embedcore.encoding") == b"json"
    found: JsonValue = json.loads(value) if encoded and value is not None else value
    return found
