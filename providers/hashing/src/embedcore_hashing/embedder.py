"""Signed hashing of words and character n-grams into a vector.

Its words and their character n-grams are hashed to places with a sign, and their weights summed.
Texts that share words, or parts of words, come out close; nothing is known of what words mean.

All sums are of whole numbers and the only roundings are IEEE divisions and square roots, so that a
text has the same vector, bit for bit, in every process and on every system.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from embedcore.provider.base import BaseEmbedder
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Features: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int8]]

# Found with benchmarks/hashing_retrieval.py; the optimum is flat.
_WORD_WEIGHT: Final = 5
_NGRAM_WEIGHT: Final = 2
_FUNCTION_WORD_WEIGHT: Final = 1
_NGRAM_SIZES: Final = (3, 4, 5)
# Scripts written without spaces have short words, and a run of them is a phrase.
_UNSPACED_NGRAM_SIZES: Final = (1, 2, 3)
_FIRST_UNSPACED: Final = "\u2e80"

_TIMES_SCALE: Final = 256
_GRID: Final = 2**22
_CACHED_WORDS: Final = 32_768

_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# Anything but space and punctuation: the letter classes of ``re`` lack combining vowel signs. The
# bound keeps one endless "word" from filling the cache.
_WORD: Final = re.compile(
    r"[^\s\x00-/:-@\[-`{-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7"
    r"\u2000-\u206f\u3000-\u3004\u3008-\u303f\ufe00-\ufe0f]{1,64}"
)

_ENGLISH: Final = (
    "a an and are as at be been but by can do does for from had has have he if in into is it its "
    "may no not of on or s she should so such t than that the their then there these they this to "
    "was we were what when where which who will with would you your"
)
_FUNCTION_WORDS: Final = frozenset(_ENGLISH.split())


class HashingEmbedder(BaseEmbedder):
    """Vectors of ``info.dimensions`` components and length 1, each a function of its text alone."""

    def __init__(self, info: ModelInfo) -> None:
        if info.dimensions is None:
            raise ValueError("a hashing embedder needs a width")
        self.info = info
        self._width = info.dimensions
        self._features = lru_cache(maxsize=_CACHED_WORDS)(self._hash_word)

    def embed(self, request: EmbedRequest) -> EmbedReply:
        """Row i for text i, also for a text without any word."""
        vectors = np.empty((len(request.texts), self._width), dtype=np.float32)
        for row, text in enumerate(request.texts):
            vectors[row] = self._vector(text)
        return EmbedReply(vectors=vectors, model=self.info.model)

    def close(self) -> None:
        """Forget the words seen so far."""
        self._features.cache_clear()

    def _vector(self, text: str) -> NDArray[np.float32]:
        counts = Counter(split_words(text))
        if not counts:
            return _unit(self._digest(text))
        features = [self._features(word) for word in counts]
        places = np.concatenate([place for place, _ in features])
        weights = np.concatenate([weight for _, weight in features]).astype(np.float64)
        times = [_damped(count) for count in counts.values()]
        weights *= np.repeat(times, [len(place) for place, _ in features])
        sums = np.bincount(places, weights, minlength=self._width).astype(np.float64, copy=False)
        # In a narrow vector the features of a short text can cancel each other out.
        return _unit(sums if sums.any() else self._digest(text))

    def _hash_word(self, word: str) -> Features:
        """Where a word adds to the vector, and how much: one entry per feature, signs included."""
        hashes, weights = zip(
            *((_hash(name), weight) for name, weight in name_features(word)), strict=True
        )
        places = np.array([value % self._width for value in hashes], dtype=np.int32)
        signs = np.array([1 if value >> 63 else -1 for value in hashes], dtype=np.int8)
        return places, signs * np.array(weights, dtype=np.int8)

    def _digest(self, text: str) -> NDArray[np.float64]:
        """Sums for a text without words, from a hash of the whole of it; never all zero."""
        sums = np.zeros(self._width)
        # Different powers of two: where places meet, they cannot cancel out.
        for power in range(8):
            value = _hash(f"t{power}{text}")
            sums[value % self._width] += 2**power if value >> 63 else -(2**power)
        return sums


def split_words(text: str) -> list[str]:
    """The words of a text in order, case-folded; ``snake_case``, ``CamelCase`` and dots split."""
    normal = unicodedata.normalize("NFKC", text)
    return _WORD.findall(_HUMP.sub(" ", normal).casefold())


def name_features(word: str) -> Iterator[tuple[str, int]]:
    """The features of a word with their weights: itself and its n-grams with marked ends."""
    if word in _FUNCTION_WORDS:
        yield "w" + word, _FUNCTION_WORD_WEIGHT
        return
    yield "w" + word, _WORD_WEIGHT
    marked = f"<{word}>"
    for size in _NGRAM_SIZES if word[0] < _FIRST_UNSPACED else _UNSPACED_NGRAM_SIZES:
        for start in range(len(marked) - size + 1 if size < len(marked) else 0):
            yield "g" + marked[start : start + size], _NGRAM_WEIGHT


def _hash(feature: str) -> int:
    """64 bits, the same in every process; ``hash()`` of a string is not."""
    octets = feature.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(octets, digest_size=8).digest(), "little")


def _damped(count: int) -> int:
    """The weight of a word that occurs ``count`` times: 1 + ln(count), as a whole number."""
    return round(_TIMES_SCALE * (1 + math.log(count)))


def _unit(sums: NDArray[np.float64]) -> NDArray[np.float32]:
    """The vector scaled to length 1, by arithmetic that no machine rounds differently."""
    grid = np.rint(sums / np.abs(sums).max() * _GRID).astype(np.int64)
    # 65,536 squares of at most 2⁴⁴ stay below 2⁶³.
    unit: NDArray[np.float64] = grid / math.sqrt(int(grid @ grid))
    return unit.astype(np.float32)
