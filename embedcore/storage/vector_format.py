"""How a vector is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from embedcore.storage.keys import KEY_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]


_WORD_BYTES: Final = 8
_KEY_WORDS: Final = KEY_BYTES // _WORD_BYTES
_HALF: Final = np.dtype("<f2")
_SINGLE: Final = np.dtype("<f4")
# A float32 that a float16 can hold has nothing in the last 13 of its 23 bits.
_LOST_BITS: Final = np.uint32(0x1FFF)
_SHIFT: Final = np.uint32(13)
_SIGN_SHIFT: Final = np.uint32(16)
_SIGN: Final = np.uint32(0x8000)
_MAGNITUDE: Final = np.uint32(0x7FFF_FFFF)
# The exponents of the two are 112 apart; from 1 to 30 that is all there is to it.
_APART: Final = np.uint32(112 << 23)
_FIRST: Final = np.uint32(1 << 23)
_EXPONENTS: Final = np.uint32(30 << 23)
# What lies in a core's cache is worked on several times.
_AT_ONCE: Final = 1 << 17


def all_zero(vectors: Vectors) -> NDArray[np.bool_]:
    """Which vectors are all zeros, as servers give them for texts that they cannot handle."""
    if not vectors.shape[1]:
        return np.zeros(len(vectors), dtype=np.bool_)
    found: NDArray[np.bool_] = vectors[:, 0] == 0
    # Hardly any begins with a zero: only those are read to their end.
    suspects = np.flatnonzero(found)
    found[suspects] = ~vectors[suspects].any(axis=1)
    return found


class Encoder:
    """Encodes one array after the other, in memory that it keeps: to ask the system for more again
    and again costs more than the work itself. For one thread at a time."""

    def __init__(self) -> None:
        self._half = np.empty(0, dtype="<u2")
        self._rest = np.empty((2, 0), dtype="<u4")

    def encode(self, vectors: Vectors) -> NDArray[Any]:
        """Little-endian float16 where that loses no bit of any component, else float32; (n, d).

        What it returned before is not valid any more.
        """
        single = np.ascontiguousarray(vectors, dtype=_SINGLE)
        # As a rule the first number tells.
        if not single.size or (single.view("<u4")[0] & _LOST_BITS).any():
            return single
        if len(self._half) < single.size:
            self._half = np.empty(single.size, dtype="<u2")
            self._rest = np.empty((2, min(_AT_ONCE, single.size)), dtype="<u4")
        half = self._halves(single.reshape(-1))
        return single if half is None else half.reshape(single.shape)

    def _halves(self, single: NDArray[np.float32]) -> NDArray[np.float16] | None:
        """The same numbers as float16, or None where one of them is not exact in it; both (n,).

        By the bits: numpy's own conversion, and the one back that would show what is exact, take
        four times as long.
        """
        bits = single.view("<u4")
        if np.bitwise_or.reduce(bits) & _LOST_BITS:
            return None
        made = self._half[: len(bits)]
        others = []
        for start in range(0, len(bits), _AT_ONCE):
            part = bits[start : start + _AT_ONCE]
            number, sign = self._rest[:, : len(part)]
            np.bitwise_and(part, _MAGNITUDE, out=number)
            np.subtract(number, _APART, out=number)
            # Below the first exponent this is a very large number.
            np.subtract(number, _FIRST, out=sign)
            others.append(np.flatnonzero(sign >= _EXPONENTS) + start)
            np.right_shift(number, _SHIFT, out=number)
            np.right_shift(part, _SIGN_SHIFT, out=sign)
            np.bitwise_and(sign, _SIGN, out=sign)
            np.bitwise_or(number, sign, out=made[start : start + _AT_ONCE], casting="unsafe")
        half: NDArray[np.float16] = made.view(_HALF)
        # Zeros, what is nearly zero, and what is too large: few.
        places = np.concatenate(others)
        some = single[places]
        with np.errstate(over="ignore"):
            half[places] = some.astype(_HALF)
        # Compared as bits: -0.0 equals 0.0, and is another vector.
        same = half[places].astype(_SINGLE).view("<u4") == some.view("<u4")
        return half if same.all() else None


def checksums(stored: NDArray[Any], keys: Sequence[bytes]) -> NDArray[np.int64]:
    """One for each row of what ``Encoder`` returned, bound to the row's key and number format."""
    words = _words(stored)
    heads = np.frombuffer(b"".join(keys), dtype="<u8").reshape(len(keys), _KEY_WORDS)
    factors = _factors(_KEY_WORDS + words.shape[1])
    # Odd factors: one changed word always changes the sum.
    sums = np.einsum("ij,j->i", words, factors[_KEY_WORDS:])
    sums += np.einsum("ij,j->i", heads, factors[:_KEY_WORDS]) + np.uint64(stored.itemsize)
    mixed: NDArray[np.int64] = sums.view("<i8")
    return mixed


def decode(
    blobs: Sequence[bytes],
    sums: Sequence[int],
    widths: Sequence[int],
    keys: Sequence[bytes],
    *,
    width: int,
    into: Vectors | None = None,
) -> tuple[Vectors, NDArray[np.bool_]]:
    """Vectors of shape (n, width), and which of them are as they were written, in that width.

    They are written to ``into`` where it is given and all of them are of one format.
    """
    expected = np.array(sums, dtype=np.int64)
    lengths = np.fromiter(map(len, blobs), dtype=np.int64, count=len(blobs))
    fitting = np.array(widths) == width
    for kind in (_HALF, _SINGLE):
        if fitting.all() and (lengths == width * kind.itemsize).all():
            # As nearly always: nothing is copied that need not be.
            stored = np.frombuffer(b"".join(blobs), dtype=kind).reshape(len(blobs), width)
            sound = checksums(stored, keys) == expected
            if into is None:
                return stored.astype(np.float32, copy=False), sound
            np.copyto(into, stored)
            return into, sound
    vectors = np.empty((len(blobs), width), dtype=np.float32)
    sound = np.zeros(len(blobs), dtype=np.bool_)
    for kind in (_HALF, _SINGLE):
        places = np.flatnonzero(fitting & (lengths == width * kind.itemsize))
        if not len(places):
            continue
        chosen = places.tolist()
        raw = b"".join([blobs[place] for place in chosen])
        stored = np.frombuffer(raw, dtype=kind).reshape(len(chosen), width)
        found = checksums(stored, [keys[place] for place in chosen])
        sound[places] = found == expected[places]
        vectors[places] = stored
    return vectors, sound


def is_intact(blob: object, checksum: object, width: object, key: object) -> bool:
    """Whether one row is as it was written.

    What a damaged file holds need not be what its columns allow, nor of a sensible size.
    """
    return (
        type(blob) is bytes
        and type(checksum) is int
        and type(width) is int
        and type(key) is bytes
        and len(key) == KEY_BYTES
        and len(blob) in (width * _HALF.itemsize, width * _SINGLE.itemsize)
        and len(blob) > 0
        and bool(decode([blob], [checksum], [width], [key], width=width)[1][0])
    )


def _words(stored: NDArray[Any]) -> NDArray[np.uint64]:
    rows, width = stored.shape
    in_bytes = width * stored.itemsize
    raw = stored.view(np.uint8).reshape(rows, in_bytes)
    if in_bytes % _WORD_BYTES:
        raw = np.pad(raw, ((0, 0), (0, -in_bytes % _WORD_BYTES)))
    return raw.view("<u8")


@lru_cache(maxsize=8)
def _factors(count: int) -> NDArray[np.uint64]:
    """Odd numbers that look random and never change: the file depends on them (splitmix64)."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) | np.uint64(1)
