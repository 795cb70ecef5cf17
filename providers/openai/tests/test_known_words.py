"""That a long text fits is seen without the engine: never where it does not fit."""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from embedcore_openai import known_words, token_engines
from embedcore_openai.tokenizer import Cl100kTokenizer
from hypothesis import example, given, settings, strategies as st

from embedcore.forksafe import Lazy

PROSE = ["The", "the", "model", "of", "Embedding", "antidisestablishment", "qxz", "naïve", "word"]
ENDS = [" ", "  ", "\n", "\r\n", "\t", ". ", ", ", "! ", "? ", "; ", ": ", ") ", '" ', "'s ", "-"]
ODD = ["é", "e\u0301", "ſ", "你", "\u00a0", "\u2028", "1", "²", "_", "'", "\x00", "👨‍👩‍👧", "ﬁ"]
texts = st.lists(st.sampled_from(PROSE + ENDS + ODD), max_size=60).map("".join) | st.text()


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """No engine is there; tells whether one is."""
    monkeypatch.setattr(token_engines, "_engine", Lazy(shared=True))
    monkeypatch.setattr(known_words, "_words", Lazy(shared=True))
    monkeypatch.setattr(known_words, "_read", 0)
    return token_engines.is_loaded


@settings(max_examples=4 * settings.default.max_examples, deadline=None)
@given(texts)
@example(" word'll the's")
@example(" the" + "ſ")
@example("the the\u0301 the1 the_")
def test_no_text_has_more_tokens_than_that(text: str) -> None:
    assert token_engines.count(text) <= known_words.at_most(text) <= len(text.encode())


def test_the_words_are_those_of_the_vocabulary() -> None:
    pieces = [base64.b64decode(line.split()[0]) for line in token_engines.ranks().splitlines()]
    words = {piece[1:] for piece in pieces if re.fullmatch(rb" [A-Za-z]+", piece)}
    assert known_words.words_of_file() == words


def test_prose_that_fits_loads_no_engine(unloaded: Callable[[], bool]) -> None:
    text = "The people of the model were there, and the word is known. " * 570
    assert len(text) > 4 * 8191
    assert Cl100kTokenizer().prefix(text, 8191) == text
    assert not unloaded()


def test_what_does_not_fit_is_counted(unloaded: Callable[[], bool]) -> None:
    text = "The people of the model were there, and the word is known. " * 700
    kept = Cl100kTokenizer().prefix(text, 8191)
    assert unloaded()
    assert text.startswith(kept)
    assert token_engines.count(kept) == 8191


def test_with_an_engine_the_words_are_let_go(unloaded: Callable[[], bool]) -> None:
    assert known_words.fits("word", 1) is False
    assert known_words.fits(" word", 1) is True
    token_engines.load()
    assert known_words.fits(" word", 1) is False
    assert not known_words._words.is_there


def test_many_long_texts_are_worth_an_engine(
    unloaded: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_words, "_MOST_CHARACTERS", 5)
    assert known_words.fits(" a word", 6)
    assert not known_words.fits(" a word", 6)
    assert not unloaded()


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"qxz\nword")],
    ids=["empty", "no gzip", "other words"],
)
def test_a_damaged_file_proves_nothing(
    content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / known_words.WORDS_FILE).write_bytes(content)
    monkeypatch.setattr(known_words, "files", lambda _: tmp_path)
    assert known_words.words_of_file() == frozenset()
