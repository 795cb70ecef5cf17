"""One pass over the inputs that reads and checks every row before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedcore.errors import InputRejected
from embedcore.files.inputs import Inputs
from embedcore.files.types import SIZE, JsonValue, OnError, Row, as_digests, content_digest

if TYPE_CHECKING:
    from embedcore.files.types import Digests

Kind: TypeAlias = Literal["string", "int", "wide", "float", "bool", "json"]

# A block of texts handed to the client, or of rows to a writer, holds about this much text at most.
BLOCK_CHARACTERS = 32_000_000
_TOLD_EVERY = 10_000
_EMPTY_NAMED = 5
_EXACT_IN_DOUBLE = 2**53


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The rows by content. ``raw``: 32 bytes of digest for each row; ``empty``: its text is "".

    ``kinds``: for each kept column the one kind of value that holds all of it.
    """

    raw: bytes
    empty: NDArray[np.bool_]
    kinds: dict[str, Kind]

    @property
    def rows(self) -> int:
        return len(self.empty)

    @cached_property
    def digests(self) -> Digests:
        """Shape (rows,)."""
        return as_digests(self.raw)

    @cached_property
    def firsts(self) -> NDArray[np.intp]:
        """The position of the first row of each distinct text that is not empty, ascending."""
        filled = np.flatnonzero(~self.empty)
        _, first = np.unique(self.digests[filled], return_index=True)
        return np.sort(filled[first])

    def check(self, row: Row) -> None:
        """Raise ``InputRejected`` if this row is not the one that was scanned."""
        start = row.position * SIZE
        if self.raw[start : start + SIZE] != content_digest(row.text):
            raise InputRejected(
                f"{row.where}: the input changed while it was read; run again with the new one",
                position=row.position,
                reason="changed while it was read",
            )


def scan(
    inputs: Inputs, *, on_empty: OnError = "raise", on_rows: Callable[[int], None] | None = None
) -> Scan:
    """Read every row once. ``on_rows`` is told now and then how many there are so far.

    Raises ``InputRejected`` for the first row that cannot be read, and for empty texts unless
    ``on_empty`` is "keep".
    """
    raw = bytearray()
    empty: list[int] = []
    named: list[str] = []
    kinds: dict[str, Kind | None] = dict.fromkeys(inputs.keep)
    count = 0
    for row in inputs.rows():
        raw += content_digest(row.text)
        if not row.text:
            empty.append(row.position)
            named += [row.where] if len(named) < _EMPTY_NAMED else []
        for column, value in row.kept.items():
            kinds[column] = _merged(kinds.get(column), value)
        count += 1
        if on_rows is not None and count % _TOLD_EVERY == 0:
            on_rows(count)
    if empty and on_empty == "raise":
        raise _empty_error(empty, named)
    mask = np.zeros(count, dtype=bool)
    mask[empty] = True
    known: dict[str, Kind] = {column: kind or "string" for column, kind in kinds.items()}
    return Scan(raw=bytes(raw), empty=mask, kinds=known)


def _empty_error(empty: list[int], named: list[str]) -> InputRejected:
    more = f" and {len(empty) - len(named):,} more" if len(empty) > len(named) else ""
    rows = "1 text is empty" if len(empty) == 1 else f"{len(empty):,} texts are empty"
    return InputRejected(
        f"{rows}: {', '.join(named)}{more}. Remove them, or let them count as failed rows with "
        'on_empty="keep"',
        position=empty[0],
        reason="empty text",
    )


def _kind_of(value: JsonValue) -> Kind:
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, float):
        return "float"
    if isinstance(value, int):
        if abs(value) <= _EXACT_IN_DOUBLE:
            return "int"
        return "wide" if -(2**63) <= value < 2**63 else "json"
    return "json"


def _merged(known: Kind | None, value: JsonValue) -> Kind | None:
    """The kind that holds both without loss. Whole numbers beyond 2⁵³ are not doubles."""
    if value is None:
        return known
    kind = _kind_of(value)
    if known is None or known == kind:
        return kind
    pair = {known, kind}
    if pair == {"int", "float"}:
        return "float"
    if pair == {"int", "wide"}:
        return "wide"
    return "json"


def blocks(rows: Iterator[Row], *, max_rows: int) -> Iterator[list[Row]]:
    """Consecutive rows in lists of at most ``max_rows`` and about ``BLOCK_CHARACTERS``."""
    block: list[Row] = []
    characters = 0
    for row in rows:
        block.append(row)
        characters += len(row.text)
        if len(block) >= max_rows or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def rows_at(inputs: Inputs, found: Scan, positions: NDArray[np.intp]) -> Iterator[Row]:
    """The rows at these ascending positions, checked to be the ones that were scanned."""
    wanted = iter(positions.tolist())
    following = next(wanted, None)
    if following is None:
        return
    for row in inputs.rows():
        if row.position == following:
            found.check(row)
            yield row
            following = next(wanted, None)
            if following is None:
                return
    raise _shrunk(following)


def _shrunk(position: int) -> InputRejected:
    return InputRejected(
        f"the input ends before row {position}, which it had before; run again with the new one",
        position=position,
        reason="changed while it was read",
    )


def all_rows(inputs: Inputs, found: Scan) -> Iterator[Row]:
    """Every row again, checked to be the ones that were scanned, neither more nor fewer."""
    count = 0
    for row in inputs.rows():
        found.check(row)
        yield row
        count += 1
    if count < found.rows:
        raise _shrunk(count)
