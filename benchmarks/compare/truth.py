"""Which vector belongs to which text? One computed from the text alone, on any machine.

Like OpenAI's vectors of 2026 its components are exactly representable as float16, and its length is
1 but for that rounding. Every step is exact or correctly rounded, so two versions of numpy agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

WIDTH: Final = 1536


def vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """Row i is the one right vector of text i."""
    raw = b"".join(hashlib.shake_128(text.encode()).digest(2 * WIDTH) for text in texts)
    whole = np.frombuffer(raw, dtype="<i2").reshape(len(texts), WIDTH).astype(np.float64)
    # Sums of whole numbers below 2**53: the same in any order of adding.
    whole /= np.sqrt(np.einsum("ij,ij->i", whole, whole))[:, None]
    return whole.astype(np.float32).astype(np.float16).astype(np.float32)


def wrong_rows(texts: Sequence[str], found: NDArray[np.float32], block: int = 500) -> int:
    """Rows that hold a vector, but not their text's. Rows of NaN stand for no vector at all."""
    wrong = 0
    for start in range(0, len(texts), block):
        rows = found[start : start + block]
        right = vectors(texts[start : start + block])
        same = (rows == right).all(axis=1) if rows.shape == right.shape else np.zeros(len(rows))
        wrong += int((~same.astype(bool) & ~missing(rows)).sum())
    return wrong


def missing(found: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows have no vector."""
    return np.isnan(found[:, 0])
