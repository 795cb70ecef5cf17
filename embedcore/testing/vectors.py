"""Which vector, and how many tokens, does a text have in the fakes?

Both are functions of the text alone, so that a test sees at once when a vector was attached to
another text, and can say what a request must have cost.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from embedcore.provider.types import Vectors

BYTES_PER_TOKEN = 4
"""UTF-8 bytes to a token of ``tokens_of``: about what English has in a real tokenizer."""

_BLOCK = 64  # rows at a time, so that the work stays in the processor's cache


def vectors_of(texts: Sequence[str], dimensions: int, *, salt: str = "") -> Vectors:
    """One unit vector per text: a C-contiguous float32 array of shape (len(texts), dimensions).

    Row i is ``vector_of(texts[i], dimensions, salt=salt)``, bit for bit.
    """
    result: Vectors = np.empty((len(texts), dimensions), dtype=np.float32)
    for start in range(0, len(texts), _BLOCK):
        block = texts[start : start + _BLOCK]
        noise = b"".join([_noise(text, dimensions, salt) for text in block])
        # Odd numbers are never zero, so every vector has a length. Their squares add up exactly in
        # a float64, in any order: the result depends on neither the machine nor the neighbours.
        numbers = np.frombuffer(noise, dtype="<i2").reshape(len(block), dimensions)
        odd = numbers.astype(np.float64) * 2 + 1
        lengths = np.sqrt(np.einsum("ij,ij->i", odd, odd))
        np.divide(odd, lengths[:, None], out=result[start : start + _BLOCK], casting="same_kind")
    return result


def vector_of(text: str, dimensions: int, *, salt: str = "") -> Vectors:
    """The unit vector of a text: float32, shape (dimensions,).

    Distinct texts, or the same text under another ``salt`` (another model, say), have distinct
    vectors from 8 dimensions up. A narrower vector is the beginning of a wider one, scaled to unit
    length again, as models with a ``dimensions`` parameter do it. Lone surrogates have one as well.
    """
    row: Vectors = vectors_of([text], dimensions, salt=salt)[0]
    return row


def tokens_of(text: str) -> int:
    """Tokens of a text in the fakes: one per four UTF-8 bytes, rounded up; 0 for the empty text.

    One token per byte is then a bound four times too large, as it is for English in reality: code
    that holds money by that bound meets the same looseness here.
    """
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def _noise(text: str, dimensions: int, salt: str) -> bytes:
    """Two bytes per dimension; the salt's length keeps ("ab", "c") and ("a", "bc") apart."""
    seed = f"{len(salt)}:{salt}{text}".encode("utf-8", "surrogatepass")
    return hashlib.shake_256(seed).digest(2 * dimensions)
