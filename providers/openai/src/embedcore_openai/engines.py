"""How does tiktoken turn text into tokens of cl100k_base, whatever the text?"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

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


class Engine(Protocol):
    """Texts to tokens and back, as the server does it. Callable from several threads."""

    def encode(self, text: str) -> Sequence[int]:
        """Special tokens are never made: a text that spells one is plain text."""
        ...

    def decode(self, tokens: Sequence[int]) -> bytes: ...


class TiktokenEngine:
    """tiktoken with the given ranks (its own file format). Raises ``ImportError``."""

    def __init__(self, ranks: bytes) -> None:
        import tiktoken

        pairs = (line.split() for line in ranks.splitlines() if line)
        self._encoding = tiktoken.Encoding(
            "cl100k_base",
            pat_str=_PIECES,
            mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
            special_tokens={},
        )

    def encode(self, text: str) -> list[int]:
        if len(text) < _LONGEST_RUN:
            return self._ordinary(text)
        tokens: list[int] = []
        for part in _parts(text):
            tokens += self._ordinary(part)
        return tokens

    def decode(self, tokens: Sequence[int]) -> bytes:
        decoded: bytes = self._encoding.decode_bytes(tokens)
        return decoded

    def _ordinary(self, text: str) -> list[int]:
        tokens: list[int] = self._encoding.encode_ordinary(text)
        return tokens


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
