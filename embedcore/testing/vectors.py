"""Vectors and token counts of texts in the fakes.

Both are functions of the text alone, so that a test sees at once when a vector was attached to
another text, and can say what a request must have cost.

The exact encoding, cl100k_base, is that of the installed provider ``openai``, asked for by name as
any program does. Without it a token is four UTF-8 bytes, and a warning says so once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from embedcore.errors import ConfigurationError
from embedcore.provider import registry

if TYPE_CHECKING:
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
    that reserves money by that bound meets the same looseness here.
    """
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def _noise(text: str, dimensions: int, salt: str) -> bytes:
    """Two bytes per dimension; the salt's length keeps ("ab", "c") and ("a", "bc") apart."""
    seed = f"{len(salt)}:{salt}{text}".encode("utf-8", "surrogatepass")
    return hashlib.shake_256(seed).digest(2 * dimensions)


CL100K_BASE: Final = "cl100k_base"
BYTES: Final = "bytes/4"

_PROVIDER: Final = "openai"
_MODEL: Final = "text-embedding-3-small"

logger = logging.getLogger("embedcore.testing")


def openai_tokens(texts: Sequence[str]) -> list[int]:
    """The tokens that OpenAI's embedding models bill for each text."""
    count, _ = _counter()
    return count(texts)


def openai_encoding() -> str:
    """By what ``openai_tokens`` counts: "cl100k_base", or "bytes/4" without the provider."""
    return _counter()[1]


def counted_by_bytes(texts: Sequence[str]) -> list[int]:
    """``tokens_of`` each text."""
    return [tokens_of(text) for text in texts]


@cache
def _counter() -> tuple[Callable[[Sequence[str]], list[int]], str]:
    try:
        tokenizer = registry.create(_PROVIDER, _MODEL, {}).tokenizer
        tokenizer.count([""])
    except ConfigurationError as error:
        return _by_bytes(str(error))
    if not tokenizer.exact:
        return _by_bytes("its vocabulary cannot be loaded")
    return tokenizer.count, CL100K_BASE


def _by_bytes(why: str) -> tuple[Callable[[Sequence[str]], list[int]], str]:
    logger.warning(
        "the fake server counts a token for four bytes, not as OpenAI does: %s. With "
        "embedcore-openai installed its bill is exact",
        why,
    )
    return counted_by_bytes, BYTES
