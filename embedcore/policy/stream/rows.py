"""Rows and blocks of a stream."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from embedcore import money
from embedcore.errors import ConfigurationError, InputRejected
from embedcore.policy.result import (
    CutViews,
    Spending,
    TextCut,
    zero_rows,
)
from embedcore.policy.sources import choices_in, in_order, plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.errors import EmbeddingError
    from embedcore.provider.types import Vectors


# As a message of ours begins that is about rows of the caller's.
_SHOWN_KEY: Final = 80
_ROWS: Final = re.compile(r"rows? (\d+)(?: to (\d+))?(?=[ :])")


class Row(NamedTuple):
    """One element of a stream: its key, its text, and the element as it was given.

    ``problem``: why key or text could not be found in it, or None.
    """

    key: Any
    text: Any
    item: Any
    problem: InputRejected | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Block(CutViews):
    """Some rows of a stream, in their order, with their vectors. Row i belongs to vector i.

    - ``keys``: of each row, or its number in the stream where it has none.
    - ``rows``: the elements as they were given.
    - ``first``: number of the first row in the stream, from 0.
    - ``vectors``: float32, shape (n, d); a failed row is NaN.
    - ``ok``, ``reused``: bool, shape (n,), as in ``EmbeddingResult``.
    - ``cuts``, ``errors``: by place in the block; only the rows concerned. ``tokens_cut``,
      ``characters_cut`` and ``perhaps_cut`` say what ``cuts`` does, as in ``EmbeddingResult``.
    - ``usage``: what this block cost.

    Iterating gives ``(key, vector)`` of every row; the vector of a failed row is None.
    """

    keys: Sequence[Any]
    rows: Sequence[Any]
    first: int
    vectors: Vectors
    ok: NDArray[np.bool_]
    reused: NDArray[np.bool_]
    usage: Spending = field(default_factory=Spending)
    cuts: Mapping[int, TextCut] = field(default_factory=dict)
    errors: Mapping[int, EmbeddingError] = field(default_factory=dict)

    @property
    def zeros(self) -> NDArray[np.bool_]:
        """Rows whose vector is all zeros, as in ``EmbeddingResult``."""
        return zero_rows(self.vectors)

    def __len__(self) -> int:
        return len(self.ok)

    def __iter__(self) -> Iterator[tuple[Any, Vectors | None]]:
        for key, vector, ok in zip(self.keys, self.vectors, self.ok.tolist(), strict=True):
            yield key, vector if ok else None

    def __repr__(self) -> str:
        return (
            f"Block(rows {self.first} to {self.first + len(self) - 1}, "
            f"{int(self.ok.sum())} ok, tokens={self.usage.tokens}, "
            f"cost=${money.exact(self.usage.cost)})"
        )


def called(number: int, key: Any) -> str:
    """How a message names a row: by its key, or by its number where it has none."""
    # The caller may have left out rows that we never saw: a number of ours says nothing to him.
    if type(key) is int and key == number:
        return f"row {number}"
    return f"row with key {repr(key)[:_SHOWN_KEY]}"


def name_rows(error: BaseException, rows: Sequence[Row], first: int) -> None:
    """Have an error's message name rows by their keys. ``first``: number of the first row."""
    message = getattr(error, "message", "")
    found = _ROWS.match(message)
    if found is None:
        return
    places = [int(number) - first for number in found.groups() if number is not None]
    if not all(0 <= place < len(rows) for place in places):
        return
    names = [called(first + place, rows[place].key) for place in places]
    if all(name.startswith("row with key ") for name in names):
        keys = " to ".join(name.removeprefix("row with key ") for name in names)
        plural = "rows with keys" if len(names) > 1 else "row with key"
        error.message = f"{plural} {keys}{message[found.end() :]}"  # type: ignore[attr-defined]
        error.args = (error.message,)  # type: ignore[attr-defined]


class RowReader:
    """Tells key and text of each element of a stream, numbering them from 0.

    Without ``text`` an element is a text, or a tuple ``(key, text)``. With it, the element is a
    mapping, or anything else that can be indexed by ``text`` and by ``key``; a named tuple also by
    the names of its fields.
    """

    def __init__(self, *, text: str | int | None, key: str | int | None) -> None:
        if key is not None and text is None:
            raise ConfigurationError(f"key = {key!r} names a column; name that of the text as well")
        self._text = text
        self._key = key
        self._count = 0

    def elements(self, rows: Any) -> Iterable[Any]:
        """The elements of a stream, in their order. Raises ``InputRejected`` for what has none, is
        one text, or is a table that does not give its rows."""
        return in_order(rows, "an iterable of rows", column=self._text)

    def row(self, item: Any) -> Row:
        """The next element; ``problem`` says what is wrong with one that has no key or text."""
        number = self._count
        self._count += 1
        key: Any = number
        try:
            if self._text is None:
                return _plain(item, number)
            if self._key is not None:
                key = _column(item, self._key, number)
            return Row(key, _column(item, self._text, number), item)
        except InputRejected as problem:
            row = Row(key, None, item, problem)
            name_rows(problem, [row], number)
            return row


def _plain(item: Any, number: int) -> Row:
    if isinstance(item, str):
        return Row(number, item, item)
    if isinstance(item, tuple) and len(item) == 2:
        return Row(item[0], item[1], item)
    value = plain(item)
    choices = None if isinstance(value, str) else choices_in(value)
    if choices is not None and choices.is_mapping:
        raise InputRejected(
            f"row {number} is a mapping with the {choices}: say which column is the text, as in "
            'embed_iter(rows, text="…", key="…")',
            position=number,
            reason="a mapping, and text= is not given",
        )
    return Row(number, value, item)


def _column(item: Any, column: str | int, number: int) -> Any:
    # A text can be indexed as well, and gives one character.
    if not isinstance(item, (str, bytes)):
        try:
            if isinstance(column, str) and column in getattr(item, "_fields", ()):
                return getattr(item, column)
            return item[column]
        except (LookupError, TypeError, ValueError):  # an array's rows raise a ValueError
            pass
    raise InputRejected(
        f"row {number} has no {column!r}; it has: {_known_of(item)[:200]}",
        position=number,
        reason=f"no column {column!r}",
    )


def _known_of(item: Any) -> str:
    if hasattr(item, "_fields"):
        return ", ".join(item._fields)
    choices = choices_in(item)
    return type(item).__name__ if choices is None else ", ".join(map(str, choices.names))
