"""How many cl100k tokens has a text? Counted by tiktoken, with the vocabulary of this repository.

Without either of the two a text counts as one token per four UTF-8 bytes, and the results say
``"counted": "estimate"``: billed and ideal figures then share the same rough unit.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import tiktoken

_RANKS: Final = "providers/openai/src/embedcore_openai/data/cl100k_base.tiktoken.gz"
_ADDRESS: Final = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"


def offer_vocabulary(folder: Path) -> None:
    """Put the vocabulary where tiktoken looks for what it downloaded before, here and in children.

    A peer that tokenises then needs no network either. Does nothing where the file is missing.
    """
    source = Path(__file__).parents[2] / _RANKS
    if not source.is_file():
        return
    # tiktoken names its copies after the address, and checks their content itself.
    name = hashlib.sha1(_ADDRESS.encode(), usedforsecurity=False).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).is_file():
        (folder / name).write_bytes(gzip.decompress(source.read_bytes()))
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)


class Counter:
    """Counts, and turns token lists back into texts, which only tiktoken can."""

    def __init__(self) -> None:
        self._encoding = _encoding()

    @property
    def how(self) -> str:
        return "estimate" if self._encoding is None else "tiktoken"

    def count(self, text: str) -> int:
        if self._encoding is None:
            return max(1, len(text.encode()) // 4)
        return len(self._encoding.encode_ordinary(text))

    def text(self, tokens: Sequence[int]) -> str:
        if self._encoding is None:
            raise ValueError("a list of tokens cannot be read without tiktoken")
        return self._encoding.decode(list(tokens))


def _encoding() -> tiktoken.Encoding | None:
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        return None
    try:
        import tiktoken
    except ImportError:
        return None
    return tiktoken.get_encoding("cl100k_base")
