"""Is what is kept of a text the longest prefix that fits, and is it said what was cut?"""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import InputTooLong
from embedcore.policy.texts import cut_overlong
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import ModelInfo, Price
from embedcore.testing import FakeEmbedder, FakeTokenizer
from embedcore.testing.strategies import text_lists, texts

INFO = ModelInfo(
    provider="fake", model="short", dimensions=8, max_input_tokens=5, price=Price(immediate=1)
)


def tokenizers():
    from embedcore_openai.tokenizer import Cl100kTokenizer

    return st.sampled_from([FakeTokenizer(), EstimatingTokenizer(), Cl100kTokenizer()])


class Untouchable:
    """A tokenizer that nobody needs."""

    exact = True

    def count(self, texts):
        raise AssertionError("counted without need")

    def prefix(self, text, max_tokens):
        raise AssertionError("cut without need")


@pytest.mark.fault(15)
@pytest.mark.fault(11)
@settings(deadline=None)
@given(texts(max_size=60), st.integers(0, 40), tokenizers())
def test_the_longest_prefix_of_whole_characters_that_fits(text, limit, tokenizer):
    cut = cut_overlong(text, len(text.encode()), limit, tokenizer)
    tokens = tokenizer.count([text])[0]
    if cut is None:
        assert tokens <= limit
        return
    assert tokens > limit
    assert text.startswith(cut.kept)
    assert cut.kept != text
    assert tokenizer.count([cut.kept])[0] == cut.tokens <= limit
    assert cut.tokens_cut == max(tokens - cut.tokens, 1)
    # The counts of byte pairs may fall a little with a longer text, but only where pairs meet.
    end = len(cut.kept)
    longer = [text[:longer] for longer in range(end + 1, min(end + 60, len(text)) + 1)]
    assert min(tokenizer.count(longer)) > limit


@given(texts(), st.integers(0, 500))
def test_a_text_of_no_more_bytes_than_the_limit_meets_no_tokenizer(text, spare):
    size = len(text.encode())
    assert cut_overlong(text, size, size + spare, Untouchable()) is None
    assert cut_overlong(text, size, None, Untouchable()) is None


def test_short_texts_of_a_call_meet_no_tokenizer(desk):
    with desk(FakeEmbedder(tokenizer=Untouchable())) as one:
        rows = ["a" * 8191, "ü" * 4095, "short"]
        one.right(one.embed(rows), rows)
        one.check()


MEGABYTES = [3, pytest.param(10, marks=pytest.mark.campaign(short=True))]


@pytest.mark.fault(7)
@pytest.mark.parametrize("piece", ["word and ", "字", "a", "👩‍👩‍👧‍👦", " "])
@pytest.mark.parametrize("megabytes", MEGABYTES)
def test_megabytes_are_cut_quickly_and_in_little_memory(piece, megabytes):
    from embedcore_openai.tokenizer import Cl100kTokenizer

    text = piece * (megabytes * 1_000_000 // len(piece.encode()))
    tokenizer = Cl100kTokenizer()
    tokenizer.count(["warm up"])
    tracemalloc.start()
    began = time.process_time()
    cut = cut_overlong(text, len(text.encode()), 8191, tokenizer)
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cut is not None
    assert cut.tokens <= 8191
    assert cut.tokens_cut > 0
    assert text.startswith(cut.kept)
    assert peak < megabytes * 3_000_000
    assert seconds < 20 or megabytes < 10


def test_a_huge_text_that_fits_a_huge_limit_is_left_alone():
    text = "many words " * 400_000
    size = len(text)
    assert cut_overlong(text, size, size // 4 + 1, FakeTokenizer()) is None
    cut = cut_overlong(text, size, size // 4 - 100, FakeTokenizer())
    assert cut is not None
    assert 90 <= cut.tokens_cut <= 110


@pytest.mark.fault(15)
@settings(deadline=None)
@given(text_lists(max_size=8))
def test_what_was_cut_is_said_for_each_row(desk, given_texts):
    tokenizer = FakeTokenizer()
    with desk(FakeEmbedder(info=INFO)) as one:
        result = one.embed(given_texts)
        kept = [tokenizer.prefix(text, 5) for text in given_texts]
        one.right(result, kept)
        cut = {
            row: max(sum(tokenizer.count([text])) - sum(tokenizer.count([kept[row]])), 1)
            for row, text in enumerate(given_texts)
            if text != kept[row]
        }
        assert result.tokens_cut == cut
        assert [one.tokens_cut for one in result.outcomes] == [
            cut.get(row, 0) for row in range(len(given_texts))
        ]
        # Truncated texts that are equal then are one text, and so one purchase.
        sent = [text for call in one.embedder.calls for text in call.texts]
        assert sent == list(dict.fromkeys(kept))
        one.check()


@pytest.mark.fault(12)
def test_texts_that_differ_only_behind_the_cut_are_billed_once(desk):
    rows = ["x" * 20, "x" * 21, "x" * 90, "y"]
    with desk(FakeEmbedder(info=INFO)) as one:
        result = one.embed(rows)
        assert [call.texts for call in one.embedder.calls] == [("x" * 20, "y")]
        assert result.tokens_cut == {1: 1, 2: 18}
        assert result.reused.tolist() == [False, True, True, False]
        one.check()


@pytest.mark.fault(15)
def test_reject_names_the_row_and_by_how_much(desk):
    with desk(FakeEmbedder(info=INFO), overlong="reject") as one:
        with pytest.raises(InputTooLong, match="row 2 is 3 tokens over the 5") as caught:
            one.embed(["a", "b", "x" * 32, "y" * 32])
        assert caught.value.position == 2
        assert one.embedder.meter.requests == 0
        result = one.embed(["x" * 32, "a", "x" * 32, "y" * 40], on_error="keep")
        assert result.ok.tolist() == [False, True, False, False]
        assert sorted(result.errors) == [0, 2, 3]
        assert {row: error.position for row, error in result.errors.items()} == {0: 0, 2: 0, 3: 3}
        one.check()


class CountsBytes(EstimatingTokenizer):
    """Of a model whose tokens are bytes."""

    exact = True


def test_a_limit_below_one_character_is_an_error_and_no_empty_text(desk):
    embedder = FakeEmbedder(info=replace(INFO, max_input_tokens=2), tokenizer=CountsBytes())
    with desk(embedder) as one:
        with pytest.raises(InputTooLong):
            one.embed(["字"])
        assert one.embedder.meter.requests == 0
