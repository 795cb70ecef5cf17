"""Where does the cl100k_base encoding come from? From this package, never from the network."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from embedcore.forksafe import Lazy
from embedcore_openai import fast
from embedcore_openai.engines import Engine, TiktokenEngine

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

RANKS_FILE: Final = "cl100k_base.tiktoken.gz"
RANKS_SHA256: Final = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"

_engine: Lazy[Engine] = Lazy(shared=True)


def ranks_file() -> Traversable:
    return files("embedcore_openai") / "data" / RANKS_FILE


def present() -> bool:
    """True when the encoding can be expected to load. Cheap: loads nothing."""
    return _engine.is_there or (find_spec("tiktoken") is not None and ranks_file().is_file())


def load() -> Engine:
    """The encoding, built once per process: the faster engine if it is installed, else tiktoken.

    Raises ``OSError``, ``ValueError``, ``ImportError``.
    """
    return _engine.get(lambda: fast.engine(ranks(), instead=tiktoken) or tiktoken())


def tiktoken() -> TiktokenEngine:
    """A new engine of the reference. Raises what ``load`` raises."""
    return TiktokenEngine(ranks())


def ranks() -> bytes:
    """The vocabulary in tiktoken's file format, unpacked and verified."""
    raw = gzip.decompress(ranks_file().read_bytes())
    if hashlib.sha256(raw).hexdigest() != RANKS_SHA256:
        raise ValueError(f"{RANKS_FILE} is damaged: its sha256 is not {RANKS_SHA256[:8]}…")
    return raw


def encode(text: str) -> Sequence[int]:
    """Tokens of a text as the server counts them."""
    return load().encode(text)


def count(text: str) -> int:
    return len(encode(text))


def decode(tokens: Sequence[int]) -> bytes:
    """The UTF-8 bytes that tokens stand for; they may end within a character."""
    return load().decode(tokens)
