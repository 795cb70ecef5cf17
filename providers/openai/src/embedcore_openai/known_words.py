"""Shows that a text is short enough without the engine of its encoding.

Loading an engine takes 28 MB, and half the CPU that ten thousand texts take. Most long texts
are prose, of which the words alone tell that it is far below a model's limit.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from importlib.resources import files
from typing import Final

from embedcore.forksafe import Lazy
from embedcore_openai import token_engines

WORDS_FILE: Final = "cl100k_words.txt.gz"
WORDS_SHA256: Final = "e0846864f9fbb8f3ab692840b950d8107e10c9cd0cfcffdcbdea1733a5c90b29"

# What may follow a word immediately: it ends there, and with the space before it is one piece.
_ENDS: Final = b',.?!;:\n)"'
_TO_ONE_END: Final = bytes.maketrans(_ENDS, b"," * len(_ENDS))
# No prose has longer words on average.
_LONGEST_WORDS: Final = 8
# What an engine costs once is then used up: it reads five times as fast.
_MOST_CHARACTERS: Final = 8_000_000

_words: Lazy[frozenset[bytes]] = Lazy(shared=True)
_read: int = 0


def fits(text: str, max_tokens: int) -> bool:
    """True: a text has no more tokens. False: that must be counted.

    To cl100k_base a word of letters with the space before it is one piece, and one token if the
    vocabulary has it. Of everything else a byte is one token at most.
    """
    global _read
    if token_engines.is_loaded():
        _words.take()
        return False
    # Not counted under a lock: what other threads add at the same moment may be lost.
    if len(text) > _LONGEST_WORDS * max_tokens or _read > _MOST_CHARACTERS:
        return False
    _read += len(text)
    return at_most(text) <= max_tokens


def at_most(text: str) -> int:
    """An upper bound of a text's tokens, by the words that are known to be one."""
    raw = text.encode()
    # No space is before the first.
    _, *words = raw.translate(_TO_ONE_END).replace(b",", b" ,").split(b" ")
    known = filter(_words.get(words_of_file).__contains__, words)
    return len(raw) - len(b"".join(known))


def words_of_file() -> frozenset[bytes]:
    """The words that are a token with the space before them; none if the file is damaged."""
    try:
        raw = gzip.decompress((files("embedcore_openai") / "data" / WORDS_FILE).read_bytes())
    except (OSError, EOFError, zlib.error):
        return frozenset()
    if hashlib.sha256(raw).hexdigest() != WORDS_SHA256:
        return frozenset()
    return frozenset(raw.split(b"\n"))
