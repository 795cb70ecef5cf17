"""How are several files, standard input and iterables read as one sequence of rows, twice?"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from embedcore.errors import ConfigurationError, InputRejected
from embedcore.files.decoding import decoded_lines
from embedcore.files.disk import display
from embedcore.files.readers import INPUT_SUFFIXES, Record, read_records
from embedcore.files.spool import Spool
from embedcore.files.types import Columns, InputFormat, JsonValue, Row, Source

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            # There is something, and whoever reads it will say where it is.
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
                f"{', '.join(INPUT_SUFFIXES)}, or name the format with input_format, --format"
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
    while part := stream.read(_PART):
        yield part


def _standard_input() -> BinaryIO:
    # A program without a console has none, and a shell can close it.
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigurationError("standard input is closed: there is nothing to read from it")
    return sys.stdin.buffer


def _require_bytes(copy: Spool, name: str) -> None:
    """A program that fails at once writes nothing into its pipe, and nobody is told but by this."""
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
