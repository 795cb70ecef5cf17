"""Which texts are the same? Two with the same SHA-256 of their UTF-8 bytes, nothing normalised.

A million digests take 32 MB as one numpy array of 32-byte strings. Elements are only compared
inside numpy: taking one out as ``bytes`` would lose its trailing zeros.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from embedcore.files.types import Digests

SIZE = 32


def content_digest(text: str) -> bytes:
    """SHA-256 of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).digest()


def parsed_digest(text: object) -> bytes | None:
    """The digest that is written as 64 hexadecimal digits; None for anything else."""
    try:
        digest = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        return None
    return digest if len(digest) == SIZE else None


def is_digest_of(digest: bytes, text: str) -> bool:
    """Whether the text has that digest. One with half a character has none."""
    try:
        return content_digest(text) == digest
    except UnicodeEncodeError:
        return False


def as_digests(raw: bytes | bytearray | memoryview) -> Digests:
    """An array of shape (n,) over ``32 * n`` bytes, without a copy."""
    return np.frombuffer(raw, dtype=f"S{SIZE}")


class DigestIndex:
    """Finds the place of a digest in an array. Building sorts; finding is a binary search."""

    def __init__(self, digests: Digests) -> None:
        self._order = np.argsort(digests, kind="stable")
        self._sorted = digests[self._order]

    def find(self, wanted: Digests) -> NDArray[np.intp]:
        """For each of ``wanted`` its first place in the array, or -1."""
        if not len(self._sorted):
            return np.full(len(wanted), -1, dtype=np.intp)
        near = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        places: NDArray[np.intp] = np.where(self._sorted[near] == wanted, self._order[near], -1)
        return places
