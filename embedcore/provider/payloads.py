"""Finds the vectors in a body before it is parsed.

The vectors are told apart without making a string of each of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_QUOTE: Final = ord('"')
_BACKSLASH: Final = ord("\\")
_COMMA: Final = ord(",")
_OPENING: Final = (ord("["), ord("{"))
# Shorter texts stay where they are: names, and vectors of very few dimensions.
_SHORTEST: Final = 64
# In no base64 text; a body that has it anywhere else is left to the parser as a whole.
_MARK: Final = b"#"
_BLOCK: Final = 1 << 18
_WEIGHT: Final = 8
# Below that numpy takes longer than what it saves.
_SMALL: Final = 1 << 12
# A string, with its end or that of the body; or all that stands between two.
_PIECE: Final = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)|[^"]++', re.S)


def apart(body: bytes | memoryview, most: int) -> tuple[bytes, list[memoryview]] | None:
    """The document with ``"#0"``, ``"#1"`` … for its long texts, and those texts.

    None where quotation marks alone do not tell where a text ends, where a mark could be mistaken,
    or where there are more than ``most`` of them.
    """
    view = memoryview(body)
    marks = _places(view, most)
    if marks is None or len(marks) % 2:
        return None
    begins, ends = marks[0::2] + 1, marks[1::2]
    long = np.flatnonzero(ends - begins >= _SHORTEST)
    first, last = begins[long].tolist(), ends[long].tolist()
    payloads = [view[begin:end] for begin, end in zip(first, last, strict=True)]
    between = [
        bytes(view[end:begin]) for end, begin in zip([0, *last], [*first, len(view)], strict=True)
    ]
    if _MARK in b"".join(between):
        return None
    parts = [b""] * (2 * len(payloads) + 1)
    parts[0::2] = between
    parts[1::2] = [b"#%d" % number for number in range(len(payloads))]
    return b"".join(parts), payloads


def payload_of(text: object, payloads: list[memoryview]) -> memoryview | None:
    """The long text that a mark stands for; None if it is no mark."""
    if type(text) is not str or not text.startswith("#"):
        return None
    return payloads[int(text[1:])]


def filled(rows: list[Any], payloads: list[memoryview]) -> list[Any] | None:
    """The rows with their payloads; None if a payload is anywhere but in one row."""
    if rows == [f"#{number}" for number in range(len(payloads))]:
        return list(payloads)
    found = [payload_of(row, payloads) for row in rows]
    used = [one for one in found if one is not None]
    if len(used) != len(payloads):
        return None
    return [row if one is None else one for row, one in zip(rows, found, strict=True)]


def quotation_marks(body: bytes) -> int:
    """``body.count(b'"')`` at four times the speed."""
    return sum(int(np.count_nonzero(block == _QUOTE)) for block in _blocks(body))


def strings_in(value: object) -> int:
    if isinstance(value, str):
        return 1
    if isinstance(value, dict):
        return len(value) + sum(map(strings_in, value.values()))
    return sum(map(strings_in, value)) if isinstance(value, list) else 0


def strings_in_entries(entries: list[Any], vector: str | None) -> int:
    """``strings_in(entries)``, without a look into the lists of numbers under ``vector``."""
    if set(map(type, entries)) == {dict}:
        kinds = Counter(map(type, chain.from_iterable(map(dict.values, entries))))
        if list not in kinds and dict not in kinds:
            return sum(map(len, entries)) + kinds[str]
    strings = 0
    for entry in entries:
        if not isinstance(entry, dict):
            strings += type(entry) is str
            continue
        strings += len(entry)
        for name, value in entry.items():
            if type(value) is str:
                strings += 1
            elif name != vector:
                strings += strings_in(value)
    return strings


def _blocks(body: bytes | memoryview) -> Iterator[NDArray[np.uint8]]:
    codes = np.frombuffer(body, dtype=np.uint8)
    return (codes[at : at + _BLOCK] for at in range(0, len(codes), _BLOCK))


def _places(body: memoryview, most: int) -> NDArray[np.intp] | None:
    """Where the quotation marks are; None if a backslash may have taken the meaning of one."""
    found, total = [], 0
    for number, block in enumerate(_blocks(body)):
        if (block == _BACKSLASH).any():
            return None
        found.append(np.flatnonzero(block == _QUOTE) + number * _BLOCK)
        total += len(found[-1])
        if total > most:
            return None
    return np.concatenate(found) if found else None


def has_more_parts(body: bytes, most: int) -> bool:
    """Whether a document has more parts than ``most``, before an object is made of each.

    A part is a number; an object, a list or a string counts for eight.
    """
    if _parts(body) <= most:
        return False
    # Brackets and commas within texts are no parts.
    parts = 0
    for piece in _PIECE.finditer(body):
        parts += _WEIGHT if body[piece.start()] == _QUOTE else _parts(piece[0])
        if parts > most:
            return True
    return False


def _parts(body: bytes) -> int:
    """An upper bound of the numbers in a document, an object, list or string for eight."""
    if len(body) < _SMALL:
        heavy = body.count(b"[") + body.count(b"{") + body.count(b'"') // 2
        return body.count(b",") + _WEIGHT * heavy
    numbers = heavy = 0
    for block in _blocks(body):
        numbers += int(np.count_nonzero(block == _COMMA))
        heavy += sum(int(np.count_nonzero(block == code)) for code in _OPENING)
        heavy += int(np.count_nonzero(block == _QUOTE)) // 2
    return numbers + _WEIGHT * heavy
