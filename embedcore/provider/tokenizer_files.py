"""Tokenizers of Hugging Face's form, read from a ``tokenizer.json``.

From a file, or from the local cache of the hub; never from the net. The packages ``tokenizers``
and, for the cache, ``huggingface-hub`` are imported where one is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from embedcore.errors import ConfigurationError

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


def is_path(name: str) -> bool:
    """Whether the name of a model or a file can only be a path."""
    return name.startswith((".", "/", "~")) or "\\" in name


def hub_file(repository: str, name: str) -> Path | None:
    """A file of a model on the hub, if it was downloaded before."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository, name)
    except (ImportError, ValueError):
        found = None
    return Path(found) if isinstance(found, str) else None


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
    if name.endswith(".json") or is_path(name):
        raise ConfigurationError(f"tokenizer = {name!r}: there is no such file, nor {FILE} in it")
    found = hub_file(name, FILE)
    if found is not None:
        return found
    raise ConfigurationError(
        f"tokenizer = {name!r}: no such file, and not in the local cache of Hugging Face, and "
        f"nothing is downloaded here. Download it once (hf download {name} {FILE}), or give the "
        f"path of a {FILE}"
    )
