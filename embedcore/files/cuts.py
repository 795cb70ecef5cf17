"""How much of a row's text was cut off, in outputs and journals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedcore import TextCut
    from embedcore.files.types import JsonValue

# Below: tokens, 0 for none. With this bit: characters, where the tokens were not counted.
_CHARACTERS: Final = 1 << 31
# It is not known whether the server cut it.
UNKNOWN: Final = (1 << 32) - 1
_MOST: Final = (1 << 31) - 2


def code_of(cut: TextCut | None) -> int:
    """The number for a cut; None: nothing was cut."""
    if cut is None:
        return 0
    if cut.tokens is not None:
        return min(cut.tokens, _MOST)
    return UNKNOWN if cut.characters is None else _CHARACTERS | min(cut.characters, _MOST)


def codes_of(cuts: Mapping[int, TextCut], numbers: Sequence[int]) -> NDArray[np.uint32]:
    """The same for these rows, shape (n,)."""
    return np.array([code_of(cuts.get(number)) for number in numbers], dtype=np.uint32)


def tokens_in(code: int) -> int | None:
    """Tokens cut; None: not counted, or not known."""
    return None if code & _CHARACTERS else code


def characters_in(code: int) -> int | None:
    """Characters cut, where the tokens were not counted; None otherwise."""
    return code & ~_CHARACTERS if code & _CHARACTERS and code != UNKNOWN else None


def code_from(tokens: JsonValue, characters: JsonValue, *, stated: bool) -> int:
    """The number for what an output says of a row; 0 for nonsense.

    ``stated``: it says something of tokens, if only that they are not known.
    """
    if _is_count(tokens):
        return int(tokens)  # type: ignore[arg-type]
    if tokens is not None or not stated:
        return 0
    if characters is None:
        return UNKNOWN
    return _CHARACTERS | int(characters) if _is_count(characters) else 0  # type: ignore[arg-type]


def _is_count(value: JsonValue) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Rows that were cut, by so many ``tokens`` and, of others, ``characters``; and rows of which
    it is not known (``unknown``)."""

    rows: int = 0
    unknown: int = 0
    tokens: int = 0
    characters: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            rows=self.rows + other.rows,
            unknown=self.unknown + other.unknown,
            tokens=self.tokens + other.tokens,
            characters=self.characters + other.characters,
        )


def tally(codes: NDArray[np.uint32]) -> Tally:
    """What the cuts of some rows come to."""
    unknown = codes == UNKNOWN
    characters = (codes >= _CHARACTERS) & ~unknown
    tokens = codes < _CHARACTERS
    return Tally(
        rows=int(np.count_nonzero(codes) - np.count_nonzero(unknown)),
        unknown=int(np.count_nonzero(unknown)),
        tokens=int(codes[tokens].sum(dtype=np.int64)),
        characters=int((codes[characters] & ~np.uint32(_CHARACTERS)).sum(dtype=np.int64)),
    )
