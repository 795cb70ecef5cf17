"""The tokenizer of OpenAI's models, cl100k_base."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import Final
from unicodedata import ucd_3_2_0

from embedcore.provider.tokens import EstimatingTokenizer, utf8_length, utf8_prefix
from embedcore_openai import known_words, token_engines as vocabulary

# No token of cl100k_base is longer, so a text of n tokens has at most n times as many bytes.
_LONGEST_TOKEN: Final = 128
_USUAL_BYTES_PER_TOKEN: Final = 6
# Up to this length a segment is searched character by character.
_SHORT_SEGMENT: Final = 512
# In a longer one, how far beyond a token's end a longer prefix is looked for, and how many
# characters may be read for it.
_LOOK_AHEAD: Final = 32
_LOOK_AHEAD_WORK: Final = 1_000_000
# Tokens by which a head must pass the limit, so that its own end cannot matter.
_MARGIN: Final = 64

_log = logging.getLogger("embedcore.openai")


class Cl100kTokenizer:
    """The exact tokenizer of the three OpenAI embedding models, offline.

    ``<|endoftext|>`` and its like are plain text. When the packaged vocabulary cannot be loaded,
    it counts UTF-8 bytes instead, which is never too few, warns once and says ``exact = False``.
    """

    def __init__(self) -> None:
        self._bound: EstimatingTokenizer | None = None

    @property
    def exact(self) -> bool:
        return self._bound is None and vocabulary.present()

    def count(self, texts: Sequence[str]) -> list[int]:
        fallback = self._fallback()
        if fallback is not None:
            return fallback.count(texts)
        return [vocabulary.count(text) for text in texts]

    def prefix(self, text: str, max_tokens: int) -> str:
        """The longest prefix of whole characters with ``count`` ≤ ``max_tokens``.

        Inside an unbroken run of over 512 characters (white space, one endless word) the result
        fits and may, in contrived cases, miss a longer prefix that fits too.
        """
        if max_tokens <= 0:
            return ""
        # A token is never less than one byte.
        if len(text) <= max_tokens and utf8_length(text) <= max_tokens:
            return text
        if self._bound is None and known_words.fits(text, max_tokens):
            return text
        fallback = self._fallback()
        if fallback is not None:
            return fallback.prefix(text, max_tokens)
        return _longest_prefix(text, max_tokens)

    def _fallback(self) -> EstimatingTokenizer | None:
        if self._bound is None:
            try:
                vocabulary.load()
            except (OSError, EOFError, ValueError, ImportError, zlib.error) as error:
                self._bound = EstimatingTokenizer()
                _warn_once(error)
        return self._bound


_warned = False


def _warn_once(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        _log.warning(
            "the cl100k_base vocabulary cannot be loaded (%s: %s): tokens are bounded by bytes "
            "and texts are cut shorter than needed; reinstall embedcore-openai",
            type(error).__name__,
            error,
        )


def _longest_prefix(text: str, max_tokens: int) -> str:
    head, tokens = _enough_of(text, max_tokens)
    if len(tokens) <= max_tokens and len(head) == len(text):
        return text
    # As far as the first max_tokens tokens reach; up to any boundary beyond, it costs more.
    size = len(vocabulary.decode(tokens[:max_tokens]))
    reached = len(utf8_prefix(head, size))
    start, stop = _boundary_before(head, reached), _boundary_after(head, reached)
    left = _tokens_between(tokens, max_tokens, size - utf8_length(head[:start]))
    return head[:start] + _fit(head[start:stop], left, reached - start)


def _tokens_between(tokens: Sequence[int], stop: int, size: int) -> int:
    """How many tokens before ``stop`` reach into the last ``size`` bytes of what they spell."""
    number = 0
    while size > 0:
        number += 1
        size -= len(vocabulary.decode(tokens[stop - number : stop - number + 1]))
    return number


def _enough_of(text: str, max_tokens: int) -> tuple[str, Sequence[int]]:
    """A head of the text that surely contains the prefix, and its tokens.

    It is longer than the prefix by so much that what follows it does not matter.
    """
    limit = max_tokens * _LONGEST_TOKEN
    size = max_tokens * _USUAL_BYTES_PER_TOKEN + _SHORT_SEGMENT
    while size < limit and size < len(text):
        head = text[:size]
        tokens = vocabulary.encode(head)
        if len(tokens) > max_tokens + _MARGIN:
            return head, tokens
        size = max(2 * size, size * (max_tokens + _MARGIN) // len(tokens))
    head = text[:limit]
    return head, vocabulary.encode(head)


def _is_boundary(text: str, position: int) -> bool:
    """True where the pattern ends a piece, whatever comes before and after.

    A space is never inside a piece after something else, and a run of letters ends at what is
    not one. (Line breaks are no such place: they may belong to the punctuation before them.)
    """
    before, after = text[position - 1], text[position]
    if after == " ":
        return not before.isspace()
    return _settled_class(before) == "L" and _settled_class(after) not in "LC"


def _settled_class(character: str) -> str:
    """The first letter of its category in a Unicode version that all engines have: C if newer."""
    return ucd_3_2_0.category(character)[0]


def _boundary_before(text: str, position: int) -> int:
    """The last boundary at or before a position; 0 if there is none."""
    position = min(position, len(text) - 1)
    while position > 0 and not _is_boundary(text, position):
        position -= 1
    return position


def _boundary_after(text: str, position: int) -> int:
    """The first boundary after a position; the end of the text if there is none."""
    position += 1
    while position < len(text) and not _is_boundary(text, position):
        position += 1
    return min(position, len(text))


def _fit(segment: str, max_tokens: int, reached: int) -> str:
    """The longest prefix that fits, of a segment without inner boundaries.

    The count is not monotone here: one more character may merge two tokens into one, and the end
    of the text changes how white space is cut. So the search goes down from the far end; in a
    long segment, from a little beyond ``reached``, the characters of its first ``max_tokens``.
    """
    longest = len(segment) if max_tokens > 0 else 0
    if longest > _SHORT_SEGMENT:
        # Each count reads the whole prefix: the longer it is, the fewer are made.
        ahead = min(_LOOK_AHEAD, _LOOK_AHEAD_WORK // (reached + 1) + 1)
        longest = min(longest, reached + ahead)
    while longest > 0 and vocabulary.count(segment[:longest]) > max_tokens:
        longest -= 1
    return segment[:longest]
