"""Token engines of cl100k_base: splintr where it has wheels, else tiktoken.

splintr comes along where it has wheels, and nothing but speed and memory depends on it. It
gets the vocabulary of this package and no special tokens, so that it has nothing of its own to
disagree by but the cutting and merging; those are tried at the start on texts whose counts are
known.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Protocol

from embedcore.forksafe import Lazy, Lock

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


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


# splintr remembers pieces of texts, up to a number of them but of any length: a dozen bytes for
# each character of a text that repeats nothing.
_REMEMBERED_CHARACTERS: Final = 2_000_000

# Counts by tiktoken 0.14: contractions, digits, white space, line ends, special tokens as text,
# scripts, emoji, and letters of the newest Unicode, which an older table does not know as such.
KNOWN_COUNTS: Final = {
    "": 0,
    "antidisestablishmentarianism": 6,
    "<|endoftext|><|fim_prefix|>": 13,
    "it'S we'LL, '\u017f I'm": 11,
    "1234567 12 \u00bd\u00b2\u0663": 10,
    "  \n\n \t x\r\n  y   ": 7,
    "\u3000\u00a0\u0085\u2028 \x1c \ufeffa": 10,
    "def f(x):\n    return {'a': [1, 2]}  # x": 18,
    "안녕하세요 नमस्ते สวัสดี 你好，世界。": 27,
    "👩‍👩‍👧 🏳️‍🌈🇩🇪": 28,
    "e\u0301 \u0130 \ufdfa \ufb01 K": 9,
    "a" * 300 + "!" * 40 + " " * 90 + "z": 46,
    "\U0003134f's \U000323b0's \U00011db6=A \U0002ebf0/C": 26,
    "\x00\U0010ffff\u200b_x": 8,
}

_log = logging.getLogger("embedcore.openai")


class _Splintr(Protocol):
    """What is used of ``splintr.Tokenizer``."""

    def encode_flat(self, text: str) -> bytes: ...

    def decode_bytes(self, tokens: list[int]) -> bytes: ...

    def clear_cache(self) -> None: ...


def engine(ranks: bytes, *, instead: Callable[[], Engine]) -> FastEngine | None:
    """The engine for these ranks; None if it is not installed, or with one warning if not sound.

    ``instead`` makes what takes its place should it fail later on.
    """
    try:
        splintr = import_module("splintr")
    except ModuleNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - a package of others, and it is only an option
        _warn(_name(error))
        return None
    try:
        made = FastEngine(_built(splintr, ranks), instead)
        wrong = [text for text, known in KNOWN_COUNTS.items() if not made.agrees(text, known)]
    except BaseException as error:  # noqa: BLE001 - a panic is no Exception
        _reraise_unless_its_own(error)
        _warn(_name(error))
        return None
    if wrong:
        _warn(f"it disagrees about {len(wrong)} of {len(KNOWN_COUNTS)} known texts")
        return None
    return made


class FastEngine:
    """Implements ``Engine``. After a failure it is tiktoken that answers, with one warning."""

    def __init__(self, splintr: _Splintr, instead: Callable[[], Engine]) -> None:
        self._splintr: _Splintr | None = splintr
        self._instead = instead
        self._other: Engine | None = None
        self._lock = Lock()
        self._characters = 0

    def agrees(self, text: str, known: int) -> bool:
        """Does the engine itself give that many tokens, which spell the text? Raises its errors."""
        if self._splintr is None:
            return False
        tokens = _numbers(self._splintr.encode_flat(text))
        return len(tokens) == known and self._splintr.decode_bytes(list(tokens)) == text.encode()

    def encode(self, text: str) -> Sequence[int]:
        splintr = self._splintr
        if splintr is None:
            return self._replacement().encode(text)
        try:
            return _numbers(self._encoded(splintr, text))
        except BaseException as error:  # noqa: BLE001 - a panic is no Exception
            _reraise_unless_its_own(error)
            return self._replaced(error).encode(text)

    def decode(self, tokens: Sequence[int]) -> bytes:
        splintr = self._splintr
        if splintr is None:
            return self._replacement().decode(tokens)
        try:
            return splintr.decode_bytes(list(tokens))
        except BaseException as error:  # noqa: BLE001 - a panic is no Exception
            _reraise_unless_its_own(error)
            return self._replaced(error).decode(tokens)

    def forget(self) -> None:
        """Drop the pieces of texts that are remembered to be quicker the next time."""
        self._characters = 0
        if self._splintr is not None:
            self._splintr.clear_cache()

    def _encoded(self, splintr: _Splintr, text: str) -> bytes:
        # Not counted under a lock: what other threads add at the same moment may be lost.
        self._characters += len(text)
        if self._characters > _REMEMBERED_CHARACTERS:
            self.forget()
        try:
            return splintr.encode_flat(text)
        except UnicodeEncodeError:
            # tiktoken reads a lone surrogate as the replacement character.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return splintr.encode_flat(whole)

    def _replaced(self, error: BaseException) -> Engine:
        with self._lock:
            is_first, self._splintr = self._splintr is not None, None
        if is_first:
            _warn(_name(error))
        return self._replacement()

    def _replacement(self) -> Engine:
        with self._lock:
            if self._other is None:
                self._other = self._instead()
            return self._other


def _built(splintr: Any, ranks: bytes) -> _Splintr:
    made: _Splintr = splintr.Tokenizer.from_bytes(ranks, splintr.CL100K_BASE_PATTERN, None)
    return made


def _numbers(packed: bytes) -> Sequence[int]:
    """Tokens as they come, four bytes each; no Python integers are made before they are asked for.

    The order of the bytes is this machine's: a little-endian one, there is no wheel for others.
    """
    return memoryview(packed).cast("I")


def _reraise_unless_its_own(error: BaseException) -> None:
    """What stops the program is not the engine's failure."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error


def _name(error: BaseException) -> str:
    # Without its message: that may quote the text.
    return f"it failed with {type(error).__name__}"


def _warn(reason: str) -> None:
    _log.warning(
        "splintr, the faster tokenizer, is not used: %s. tiktoken counts instead, as exactly and "
        "slower; the requirements of embedcore-openai name the version that fits",
        reason,
    )


RANKS_FILE: Final = "cl100k_base.tiktoken.gz"
RANKS_SHA256: Final = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"

_engine: Lazy[Engine] = Lazy(shared=True)


def ranks_file() -> Traversable:
    return files("embedcore_openai") / "data" / RANKS_FILE


def present() -> bool:
    """True when the encoding can be expected to load. Cheap: loads nothing."""
    return _engine.is_there or (find_spec("tiktoken") is not None and ranks_file().is_file())


def is_loaded() -> bool:
    """True when counting costs no loading."""
    return _engine.is_there


def load() -> Engine:
    """The encoding, built once per process: the faster engine if it is installed, else tiktoken.

    Raises ``OSError``, ``ValueError``, ``ImportError``.
    """
    return _engine.get(lambda: engine(ranks(), instead=tiktoken) or tiktoken())


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
