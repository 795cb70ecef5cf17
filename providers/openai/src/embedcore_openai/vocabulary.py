"""Where does the cl100k_base encoding come from? From this package, never from the network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import threading
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

RANKS_FILE: Final = "cl100k_base.tiktoken.gz"
RANKS_SHA256: Final = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"

# How cl100k_base cuts text into pieces before merging bytes (tiktoken_ext/openai_public.py).
_PIECES: Final = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

# White space as the pattern's engine sees it; Python's \s has four control characters more.
_SPACE: Final = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The engine gives up ("StackOverflow", a panic) when it must go back over a million of them.
_LONGEST_RUN: Final = 65_536
_LONG_RUN: Final = re.compile(f"[{_SPACE}]{{{_LONGEST_RUN},}}")


class Encoder(Protocol):
    """What is used of ``tiktoken.Encoding``."""

    def encode_ordinary(self, text: str) -> list[int]: ...

    def decode_single_token_bytes(self, token: int) -> bytes: ...


_lock = threading.Lock()
_encoder: Encoder | None = None


def ranks_file() -> Traversable:
    return files("embedcore_openai") / "data" / RANKS_FILE


def present() -> bool:
    """True when the encoding can be expected to load. Cheap: loads nothing."""
    return _encoder is not None or (find_spec("tiktoken") is not None and ranks_file().is_file())


def load() -> Encoder:
    """The encoding, built once per process. Raises ``OSError``, ``ValueError``, ``ImportError``."""
    global _encoder
    if _encoder is None:
        with _lock:
            if _encoder is None:
                _encoder = _build()
    return _encoder


def _build() -> Encoder:
    import tiktoken

    raw = gzip.decompress(ranks_file().read_bytes())
    if hashlib.sha256(raw).hexdigest() != RANKS_SHA256:
        raise ValueError(f"{RANKS_FILE} is damaged: its sha256 is not {RANKS_SHA256[:8]}…")
    pairs = (line.split() for line in raw.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    # Without special tokens: a text that spells one is plain text.
    return tiktoken.Encoding(
        "cl100k_base", pat_str=_PIECES, mergeable_ranks=ranks, special_tokens={}
    )


def encode(text: str) -> list[int]:
    """Tokens of a text as the server counts them."""
    encoder = load()
    if len(text) < _LONGEST_RUN:
        return encoder.encode_ordinary(text)
    tokens: list[int] = []
    for part in _parts(text):
        tokens += encoder.encode_ordinary(part)
    return tokens


def count(text: str) -> int:
    return len(encode(text))


def token_lengths(tokens: list[int]) -> list[int]:
    """UTF-8 bytes of each token."""
    encoder = load()
    return [len(encoder.decode_single_token_bytes(token)) for token in tokens]


def _parts(text: str) -> Iterator[str]:
    """Cut at very long runs of white space, where the pattern would cut anyway.

    Of a run that something follows, the pattern makes a piece up to its last line break, a piece
    of the rest but its last character, and leaves that one to what follows.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        if run.end() == len(text):
            break
        broken = max(text.rfind("\n", *run.span()), text.rfind("\r", *run.span())) + 1
        for cut in (broken, run.end() - 1):
            if cut > max(start, run.start()):
                yield text[start:cut]
                start = cut
    yield text[start:]
