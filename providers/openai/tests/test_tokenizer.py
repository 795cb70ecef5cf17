"""Counts are exact, prefixes are the longest, nothing is downloaded, odd texts take no time."""

from __future__ import annotations

import base64
import gzip
import hashlib
import logging
import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from embedcore_openai import token_engines as vocabulary, tokenizer
from embedcore_openai.token_engines import TiktokenEngine
from embedcore_openai.tokenizer import Cl100kTokenizer
from hypothesis import example, given, settings, strategies as st

from embedcore.forksafe import Lazy

NASTY = [" ", "  ", "\n", "\r", "\t", "\x00", "\x1c", "\u00a0", "\u3000", "\ufeff", "a", "the"]
NASTY += ["re", "'", "'re", "'S", "'ſ", "ing", "1", "23", "456", "²", "½", "!", "--", "...", "="]
NASTY += ["你", "好", "，", "。", "한", "क", "ा", "é", "e\u0301", "İ", "ﷺ", "ﬁ", "\U0001f469"]
NASTY += ["\u200d", "👨‍👩‍👧", "🏳️‍🌈", "<|endoftext|>", "<|fim_prefix|>", "\U0010ffff", "\U00031350"]

nasty_texts = st.lists(st.sampled_from(NASTY), max_size=40).map("".join) | st.text(max_size=60)


@pytest.fixture(scope="module", autouse=True, params=["tiktoken", "splintr"])
def _engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds with and without the extra ``fast``."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiktoken":
            patch.setitem(sys.modules, "splintr", None)
        else:
            pytest.importorskip("splintr", reason="splintr has no wheel here")
        patch.setattr(vocabulary, "_engine", Lazy(shared=True))
        yield


@cache
def _reference() -> TiktokenEngine:
    return vocabulary.tiktoken()


def longest_by_trying(text: str, max_tokens: int) -> str:
    fitting = (n for n in range(len(text), -1, -1) if vocabulary.count(text[:n]) <= max_tokens)
    return text[: next(fitting)]


@pytest.mark.fault(15)
@settings(max_examples=4 * settings.default.max_examples, deadline=None)
@given(nasty_texts, st.integers(-1, 60))
@example("\n" * 3 + " " * 3 + "x", 1)
@example("a" * 20, 2)
@example("!!!\n\n\nxyz", 1)
@example("!\n\n  \n x", 2)
def test_prefix_is_the_longest_that_fits(text: str, max_tokens: int) -> None:
    prefix = Cl100kTokenizer().prefix(text, max_tokens)
    assert prefix == longest_by_trying(text, max(max_tokens, 0))


@settings(deadline=None)
@given(st.sampled_from(NASTY), st.integers(50, 700), nasty_texts, st.integers(1, 90))
def test_prefix_in_long_runs_fits_and_is_about_the_longest(
    unit: str, times: int, rest: str, max_tokens: int
) -> None:
    text = unit * times + rest
    prefix = Cl100kTokenizer().prefix(text, max_tokens)
    assert text.startswith(prefix)
    assert vocabulary.count(prefix) <= max_tokens
    assert prefix == longest_by_trying(text, max_tokens)


@pytest.mark.fault(11)
@settings(deadline=None)
@given(nasty_texts)
def test_count_is_bounded_by_bytes_and_special_tokens_are_text(text: str) -> None:
    counted = Cl100kTokenizer().count([text, text + "<|endoftext|>"])
    assert counted[0] <= len(text.encode())
    assert counted[1] > counted[0]


@pytest.mark.parametrize(
    ("text", "tokens"),
    # Counts that OpenAI's tokenizer page and cookbook name, and what its API billed (2026-08-19).
    [
        ("", 0),
        ("tiktoken is great!", 6),
        ("antidisestablishmentarianism", 6),
        ("2 + 2 = 4", 7),
        ("お誕生日おめでとう", 9),
        ("Ruby is a programmer best friend", 6),
        ("Batches come back within a day", 7),
        ("<|endoftext|>", 7),
    ],
)
def test_known_counts(text: str, tokens: int) -> None:
    assert Cl100kTokenizer().count([text]) == [tokens]
    assert Cl100kTokenizer().exact


@settings(max_examples=settings.default.max_examples // 5, deadline=None)
@given(
    st.lists(st.sampled_from([" ", "\n", "\t", "\r"]), min_size=1, max_size=3).map("".join),
    st.integers(0, 3),
    nasty_texts,
    nasty_texts,
)
def test_cutting_at_long_white_space_changes_no_count(
    unit: str, extra: int, before: str, after: str
) -> None:
    run = (unit * (70_000 // len(unit))) + " " * extra
    text = before + run + after + run + "!" + run
    reference = _reference()
    tokens = reference.encode(text)
    assert tokens == reference._ordinary(text)
    assert list(vocabulary.encode(text)) == tokens


_RARE = [pytest.param(tail, marks=pytest.mark.campaign(short=True)) for tail in ("!", "")]


@pytest.mark.parametrize("tail", ["x", "\nx", *_RARE])
def test_white_space_that_the_engine_gives_up_on(tail: str) -> None:
    # Over a million: tiktoken itself panics here.
    text = "!" + " " * 1_200_000 + tail
    assert vocabulary.count(text) == pytest.approx(1_200_000 / 128, abs=4)


_LONG = {
    "one letter": "a" * 1_000_000,
    "space": " " * 1_500_000 + "x",
    "base64": base64.b64encode(random.Random(1).randbytes(7_500_000)).decode(),
    "emoji": "👩‍👩‍👧" * 400_000,
    "chinese": "你好世界" * 800_000,
    "english": "the quick brown fox jumps over it. " * 300_000,
    "punctuation": "!" * 2_000_000,
    "digits": "1234567890" * 1_000_000,
}


# Runs of letters, runs of signs and words like those of the others: cut by the same branches.
_ALIKE = ("chinese", "punctuation", "digits")


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.campaign(short=True)) if name in _ALIKE else name
        for name in _LONG
    ],
)
def test_long_texts_are_cut_in_little_memory(name: str) -> None:
    text, exact = _LONG[name], Cl100kTokenizer()
    text = text[-1_200_000:]
    exact.count([""])
    tracemalloc.start()
    prefix = exact.prefix(text, 8191)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text.startswith(prefix)
    assert 8185 <= vocabulary.count(prefix) <= 8191
    assert peak < 3 * len(text.encode()) + 30_000_000


@pytest.mark.campaign(short=True)
@pytest.mark.parametrize("name", list(_LONG))
def test_texts_of_megabytes_are_cut_quickly(name: str) -> None:
    text, exact = _LONG[name], Cl100kTokenizer()
    exact.count([""])
    began = time.process_time()
    prefix = exact.prefix(text, 8191)
    seconds = time.process_time() - began
    assert text.startswith(prefix)
    assert 8185 <= vocabulary.count(prefix) <= 8191
    assert seconds < 4, f"{seconds:.1f} s"


def test_nothing_is_downloaded_and_no_cache_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import socket

    def no_network(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(vocabulary, "_engine", Lazy(shared=True))
    assert Cl100kTokenizer().count(["hello world"]) == [2]
    assert not list(tmp_path.iterdir())


def test_the_packaged_ranks_are_the_published_ones() -> None:
    packed = vocabulary.ranks_file().read_bytes()
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == (
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    )
    # No time of packing inside: the same file gives the same package.
    assert packed[4:8] == b"\0\0\0\0"


@pytest.mark.fault(17)
@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "no gzip", "empty"])
def test_without_the_vocabulary_bytes_bound_the_count(
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    packed = vocabulary.ranks_file().read_bytes()
    contents = {
        "cut": packed[:10_000],
        "changed": gzip.compress(gzip.decompress(packed)[:-3]),
        "no gzip": b"hello",
        "empty": b"",
    }
    file = tmp_path / "ranks.gz"
    if damage in contents:
        file.write_bytes(contents[damage])
    monkeypatch.setattr(vocabulary, "ranks_file", lambda: file)
    monkeypatch.setattr(vocabulary, "_engine", Lazy(shared=True))
    monkeypatch.setattr(tokenizer, "_warned", False)
    one, other = Cl100kTokenizer(), Cl100kTokenizer()
    with caplog.at_level(logging.WARNING):
        assert one.count(["héllo", ""]) == [6, 0]
        assert other.prefix("héllo", 2) == "h"
    assert not one.exact
    assert not other.exact
    assert len(caplog.records) == 1
    assert "reinstall" in caplog.text


def test_a_missing_vocabulary_is_not_called_exact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vocabulary, "ranks_file", lambda: tmp_path / "none.gz")
    monkeypatch.setattr(vocabulary, "_engine", Lazy(shared=True))
    assert not Cl100kTokenizer().exact
