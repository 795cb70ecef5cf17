"""Tokenizers: cl100k_base for OpenAI's models, Hugging Face files for others.

Read from a ``tokenizer.json``: a file, or one in Hugging Face's local cache; never from the net.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unicodedata import ucd_3_2_0

from embedcore.errors import ConfigurationError
from embedcore.provider.tokens import EstimatingTokenizer, utf8_length, utf8_prefix
from embedcore_openai import token_engines as vocabulary

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


FILE: Final = "tokenizer.json"

_USUAL_CHARACTERS_PER_TOKEN: Final = 6
# Tokens by which the beginning of a text must pass the limit, so that its own end cannot matter.
_HUB_MARGIN: Final = 64
# How far beyond the last token that fits a longer prefix is looked for, in characters, and up to
# which length of the prefix; in longer ones only a little.
_HUB_LOOK_AHEAD: Final = 16
_LITTLE_AHEAD: Final = 2
_SHORT: Final = 2_000
# Texts that have more tokens than bytes, if any has: control characters, one ligature for a
# sentence, scripts that a vocabulary does not have.
_PROBES: Final = (
    "a",
    "\x01",
    "\x01\x02",
    "\u00e9",
    "\ufdfa" * 9,
    "\U0001f469",
    "½",
    "1",
    "~^",
    "ﬃ",
)


class HubTokenizer:
    """Counts exactly as the server's own library does, the marks around a text not included.

    ``marks``: how many tokens it puts around each text. ``tokens_per_byte``: no text is known to
    have more.
    """

    exact = True

    def __init__(self, name: str) -> None:
        """``name``: a path, or a model on the hub. Raises ``ConfigurationError``."""
        self._tokenizer = _loaded(name)
        self.marks = int(self._tokenizer.num_special_tokens_to_add(is_pair=False))
        most = max(count / len(text.encode()) for text, count in zip(*self._probed(), strict=True))
        self.tokens_per_byte = max(math.ceil(most), 1)

    def count(self, texts: Sequence[str]) -> list[int]:
        # One by one: many at once start threads, which do not survive a fork.
        return [len(self._encoded(text)) for text in texts]

    def prefix(self, text: str, max_tokens: int) -> str:
        """The longest prefix of whole characters with ``count`` ≤ ``max_tokens``.

        In a text of thousands of characters it fits and may, in contrived cases, miss a few
        characters that would fit as well.
        """
        if max_tokens <= 0:
            return ""
        head, encoded = self._enough_of(text, max_tokens)
        if len(encoded) <= max_tokens and len(head) == len(text):
            return text
        return self._longest(text, encoded, max_tokens)

    def _enough_of(self, text: str, max_tokens: int) -> tuple[str, Encoding]:
        """A beginning that surely contains the prefix, and its tokens."""
        size = max_tokens * _USUAL_CHARACTERS_PER_TOKEN + _SHORT
        while True:
            head = text[:size]
            encoded = self._encoded(head)
            if len(encoded) > max_tokens + _HUB_MARGIN or len(head) == len(text):
                return head, encoded
            size *= 2

    def _longest(self, text: str, encoded: Encoding, max_tokens: int) -> str:
        # Up to the token that no longer fits: what lies between it and the last costs nothing.
        offsets = encoded.offsets
        end = max(stop for _, stop in offsets[:max_tokens])
        reached = max(end, offsets[max_tokens][0])
        ahead = _HUB_LOOK_AHEAD if reached <= _SHORT else _LITTLE_AHEAD
        longest = min(reached + ahead, len(text))
        while longest > 0 and self.count([text[:longest]])[0] > max_tokens:
            longest -= 1
        return text[:longest]

    def _encoded(self, text: str) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            # A lone surrogate, which is never sent.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._tokenizer.encode(whole, add_special_tokens=False)

    def _probed(self) -> tuple[Sequence[str], list[int]]:
        return _PROBES, self.count(_PROBES)


@lru_cache(maxsize=8)
def tokenizer_of(name: str) -> HubTokenizer:
    """That tokenizer, read once per process. Raises ``ConfigurationError``."""
    return HubTokenizer(name)


def _loaded(name: str) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigurationError(
            f"tokenizer = {name!r} needs the package tokenizers: pip install tokenizers"
        ) from None
    path = _found(name)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - it raises nothing more special
        raise ConfigurationError(
            f"tokenizer = {name!r}: {path} is no {FILE} ({str(error)[:200]})"
        ) from None
    # Files carry the limits with which the model was trained: all of a text is counted here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _found(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() and (path / FILE).is_file():
        return path / FILE
    if path.is_file():
        return path
    if name.endswith(".json") or name.startswith((".", "/", "~")) or "\\" in name:
        raise ConfigurationError(f"tokenizer = {name!r}: there is no such file, nor {FILE} in it")
    return _cached(name)


def _cached(name: str) -> Path:
    """The file of a model on the hub, if it was downloaded before."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, FILE)
    except (ImportError, ValueError):
        found = None
    if isinstance(found, str):
        return Path(found)
    raise ConfigurationError(
        f"tokenizer = {name!r}: no such file, and not in the local cache of Hugging Face, and "
        f"nothing is downloaded here. Download it once (hf download {name} {FILE}), or give the "
        f"path of a {FILE}"
    )


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
