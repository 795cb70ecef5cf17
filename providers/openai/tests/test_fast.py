"""The faster engine gives tiktoken's tokens for any text, or tiktoken is used instead."""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import pytest
from embedcore_openai import token_engines as fast, token_engines as vocabulary
from embedcore_openai.token_engines import Engine, TiktokenEngine
from embedcore_openai.tokenizer import Cl100kTokenizer
from hypothesis import example, given, settings, strategies as st

from embedcore.forksafe import Lazy

PIECES = [" ", "  ", "\n", "\r\n", "\t", "\x00", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000"]
PIECES += ["\ufeff", "a", "the", "ing", "'", "'re", "'S", "'\u017f", "'LL", "1", "23", "4567"]
PIECES += ["²", "½", "٣", "!", "--", "...", "=", "_", "/", "你", "好", "，", "한", "क", "ा", "é"]
PIECES += ["e\u0301", "\u0130", "ﷺ", "ﬁ", "\u212a", "👨‍👩‍👧", "🏳️‍🌈", "🇩🇪", "\u200d", "\ud800"]
PIECES += ["<|endoftext|>", "<|fim_prefix|>", "\U0010ffff", "\U000323b0", "\U0003134f"]
PIECES += ["def f(x):\n    return x\n"]

mixed = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
runs = st.lists(
    st.tuples(st.sampled_from(PIECES), st.integers(1, 900)).map(lambda run: run[0] * run[1]),
    max_size=5,
).map("".join)
texts = mixed | runs | st.text(max_size=80) | st.text(st.characters(), max_size=80)


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


class Panic(BaseException):
    """As pyo3's ``PanicException``, this is no ``Exception``."""


@pytest.fixture(scope="module")
def reference() -> TiktokenEngine:
    return vocabulary.tiktoken()


@pytest.fixture(scope="module")
def splintr() -> fast.FastEngine:
    pytest.importorskip("splintr", reason="splintr has no wheel here")
    engine = fast.engine(vocabulary.ranks(), instead=never)
    assert engine is not None
    return engine


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, reference: TiktokenEngine) -> Callable[[object], None]:
    """Puts something in the place of the package splintr, and forgets the engine.

    Where tiktoken takes over, it is the one that is there: to build one takes half a second.
    """
    monkeypatch.setattr(vocabulary, "tiktoken", lambda: reference)

    def install(package: object) -> None:
        monkeypatch.setattr(vocabulary, "_engine", Lazy(shared=True))
        monkeypatch.setitem(sys.modules, "splintr", package)  # type: ignore[arg-type]

    return install


def never() -> Engine:
    raise AssertionError("the faster engine was given up")


def package(reference: TiktokenEngine, **changed: object) -> SimpleNamespace:
    """A splintr made of tiktoken, with some functions changed."""
    parts: dict[str, object] = {
        "encode_flat": lambda text: packed(reference.encode(text)),
        "decode_bytes": reference.decode,
        "clear_cache": lambda: None,
        **changed,
    }
    made = SimpleNamespace(**parts)
    factory = SimpleNamespace(from_bytes=lambda ranks, pattern, special: made)
    return SimpleNamespace(Tokenizer=factory, CL100K_BASE_PATTERN="")


def packed(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, sys.byteorder) for token in tokens)


def prefix_by(engine: Engine, text: str, max_tokens: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        made: Lazy[Engine] = Lazy(shared=True)
        made.get(lambda: engine)
        patch.setattr(vocabulary, "_engine", made)
        return Cl100kTokenizer().prefix(text, max_tokens)


@settings(max_examples=6 * settings.default.max_examples, deadline=None)
@given(texts)
@example("a" * 100_000)
@example("ab" * 50_000)
@example("1" * 100_000)
@example(" " * 200_000 + "x")
@example("\n" * 100_000 + " x")
@example("!" * 100_000)
@example("👩‍👩‍👧" * 20_000)
def test_tokens_are_those_of_tiktoken(
    splintr: fast.FastEngine, reference: TiktokenEngine, text: str
) -> None:
    assert list(splintr.encode(text)) == reference.encode(text)


# What Unicode has given characters to, and of the rest a part.
GIVEN = [*range(0, 0x40000, 4096), *range(0x40000, sys.maxunicode + 1, 16 * 4096)]
ALL = range(0, sys.maxunicode + 1, 4096)


@pytest.mark.parametrize(
    "starts",
    [GIVEN, pytest.param(ALL, marks=pytest.mark.campaign(short=True))],
    ids=["given", "all"],
)
def test_every_character_is_cut_as_by_tiktoken(
    splintr: fast.FastEngine, reference: TiktokenEngine, starts: Iterable[int]
) -> None:
    for start in starts:
        points = (point for point in range(start, start + 4096) if not 0xD800 <= point < 0xE000)
        text = "".join(f"{chr(point)}'s  {chr(point)} \n{chr(point)}1=x" for point in points)
        assert list(splintr.encode(text)) == reference.encode(text), hex(start)


@pytest.mark.fault(15)
@settings(max_examples=3 * settings.default.max_examples, deadline=None)
@given(texts.filter(is_unicode), st.integers(0, 400))
def test_prefixes_are_those_of_tiktoken(
    splintr: fast.FastEngine, reference: TiktokenEngine, text: str, max_tokens: int
) -> None:
    assert prefix_by(splintr, text, max_tokens) == prefix_by(reference, text, max_tokens)


@given(texts)
def test_tokens_spell_the_text(splintr: fast.FastEngine, text: str) -> None:
    spelt = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert splintr.decode(splintr.encode(text)) == spelt.encode()


@pytest.mark.parametrize("text", fast.KNOWN_COUNTS)
def test_the_known_counts_are_those_of_tiktoken(reference: TiktokenEngine, text: str) -> None:
    assert len(reference.encode(text)) == fast.KNOWN_COUNTS[text]


@pytest.mark.campaign(short=True)
@pytest.mark.fault(7)
@pytest.mark.parametrize("alphabet", ["a", "ab", "etaoin", " \n", " x", "!?", "0123456789"])
def test_no_text_takes_long(splintr: fast.FastEngine, alphabet: str) -> None:
    text = "".join(random.Random(1).choices(alphabet, k=1_000_000))
    began = time.process_time()
    splintr.encode(text)
    seconds = time.process_time() - began
    assert seconds < 4, f"{seconds:.1f} s"


def test_several_threads_get_the_same_tokens(
    splintr: fast.FastEngine, reference: TiktokenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "_REMEMBERED_CHARACTERS", 5_000)
    source = random.Random(7)
    given_texts = ["".join(source.choices(PIECES, k=400)) for _ in range(40)]
    expected = [reference.encode(text) for text in given_texts]
    wrong: list[int] = []

    def count() -> None:
        for _ in range(5):
            for position, text in enumerate(given_texts):
                if list(splintr.encode(text)) != expected[position]:
                    wrong.append(position)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_remembered_is_forgotten_in_time(
    install: Callable[[object], None],
    reference: TiktokenEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cleared: list[int] = []
    monkeypatch.setattr(fast, "_REMEMBERED_CHARACTERS", 1_000)
    install(package(reference, clear_cache=lambda: cleared.append(1)))
    for _ in range(50):
        vocabulary.encode("a" * 100)
    assert 4 <= len(cleared) <= 5


def test_without_the_extra_tiktoken_counts_and_nothing_is_said(
    install: Callable[[object], None], caplog: pytest.LogCaptureFixture
) -> None:
    install(None)
    assert isinstance(vocabulary.load(), TiktokenEngine)
    assert not caplog.records


def _wrong_count(reference: TiktokenEngine) -> SimpleNamespace:
    return package(reference, encode_flat=lambda text: packed([*reference.encode(text), 1]))


def _special_tokens(reference: TiktokenEngine) -> SimpleNamespace:
    def encode_flat(text: str) -> bytes:
        return packed(reference.encode(text.replace("<|endoftext|>", "a")))

    return package(reference, encode_flat=encode_flat)


def _other_ids(reference: TiktokenEngine) -> SimpleNamespace:
    return package(
        reference, encode_flat=lambda text: packed([t ^ 1 for t in reference.encode(text)])
    )


def _panic(*_: object) -> bytes:
    raise Panic("my secret text")


def _panics(reference: TiktokenEngine) -> SimpleNamespace:
    return package(reference, encode_flat=_panic)


def _another_interface(_: TiktokenEngine) -> SimpleNamespace:
    return SimpleNamespace()


@pytest.mark.parametrize(
    "kind", [_wrong_count, _special_tokens, _other_ids, _panics, _another_interface]
)
def test_an_engine_that_disagrees_or_fails_is_not_used(
    kind: Callable[[TiktokenEngine], SimpleNamespace],
    install: Callable[[object], None],
    reference: TiktokenEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(kind(reference))
    with caplog.at_level(logging.WARNING):
        assert Cl100kTokenizer().count(["<|endoftext|>", "hello world"]) == [7, 2]
        assert Cl100kTokenizer().prefix("hello world " * 9, 3) == "hello world hello"
    assert isinstance(vocabulary.load(), TiktokenEngine)
    assert len(caplog.records) == 1
    assert "tiktoken counts instead" in caplog.text


@pytest.mark.parametrize("error", [Panic("my secret text"), ValueError("my secret text")])
@pytest.mark.parametrize("broken", ["encode_flat", "decode_bytes", "clear_cache"])
def test_an_engine_that_fails_later_is_replaced(
    error: BaseException,
    broken: str,
    install: Callable[[object], None],
    reference: TiktokenEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(fast, "_REMEMBERED_CHARACTERS", 1_000)
    made = package(reference)
    install(made)
    assert isinstance(vocabulary.load(), fast.FastEngine)
    setattr(made.Tokenizer.from_bytes(b"", "", None), broken, fail)
    text = "my secret text " * 100
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert vocabulary.count(text) == len(reference.encode(text))
            assert vocabulary.decode(reference.encode(text)) == text.encode()
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_taken_for_a_failure(
    stop: type[BaseException],
    install: Callable[[object], None],
    reference: TiktokenEngine,
) -> None:
    def interrupted(text: str) -> bytes:
        raise stop

    made = package(reference)
    install(made)
    engine = vocabulary.load()
    made.Tokenizer.from_bytes(b"", "", None).encode_flat = interrupted
    with pytest.raises(stop):
        vocabulary.count("hello")
    del made.Tokenizer.from_bytes(b"", "", None).encode_flat
    assert isinstance(engine, fast.FastEngine)


@pytest.fixture(autouse=True)
def _same_engine_afterwards() -> Iterator[None]:
    before = vocabulary._engine
    yield
    vocabulary._engine = before
