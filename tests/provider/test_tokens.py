"""Are estimates estimates, bounds bounds, and prefixes the longest that fit?"""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, strategies as st

from embedcore.provider.tokens import (
    EstimatingTokenizer,
    estimate_tokens,
    utf8_length,
    utf8_prefix,
)

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    "aé€😀\u0301\u200d", max_size=12
)


@pytest.mark.parametrize(
    ("given_texts", "tokens"),
    [
        (["hello world"], 3),
        ([], 0),
        ([""], 0),
        (["a"], 1),
        (["abcd", "abcde"], 3),
        ("hello world", 3),
    ],
)
def test_an_estimate_is_four_characters_each_rounded_up(
    given_texts: list[str] | str, tokens: int
) -> None:
    assert estimate_tokens(given_texts) == tokens


@given(st.lists(texts))
def test_an_estimate_takes_any_iterable(many: list[str]) -> None:
    assert estimate_tokens(iter(many)) == sum(math.ceil(len(text) / 4) for text in many)


@given(texts)
def test_the_length_is_that_of_the_bytes(text: str) -> None:
    assert utf8_length(text) == len(text.encode())


def test_half_a_surrogate_pair_has_no_length() -> None:
    with pytest.raises(UnicodeEncodeError):
        utf8_length("a\ud800")


@given(texts, st.integers(-3, 40))
@example("😀", 3)
@example("a😀b", 5)
def test_a_prefix_is_the_longest_of_whole_characters_that_fits(text: str, most: int) -> None:
    prefix = utf8_prefix(text, most)
    assert text.startswith(prefix)
    assert len(prefix.encode()) <= max(most, 0)
    rest = text[len(prefix) :]
    assert not rest or len((prefix + rest[0]).encode()) > most


@given(st.lists(texts), st.floats(1, 8))
def test_a_count_covers_the_bytes_and_an_empty_text_is_free(
    many: list[str], bytes_per_token: float
) -> None:
    tokenizer = EstimatingTokenizer(bytes_per_token)
    counts = tokenizer.count(many)
    assert tokenizer.exact is False
    assert len(counts) == len(many)
    for text, count in zip(many, counts, strict=True):
        assert isinstance(count, int)
        assert count * bytes_per_token >= len(text.encode()) * (1 - 1e-12)
        assert (count == 0) is (text == "")


@given(texts)
def test_without_an_argument_a_token_is_a_byte(text: str) -> None:
    assert EstimatingTokenizer().count([text]) == [len(text.encode())]


@given(texts, st.integers(0, 30), st.sampled_from([1.0, 1.5, 2.7, 3.0, 4.0]))
def test_a_tokenizers_prefix_is_the_longest_that_counts_no_more(
    text: str, most: int, bytes_per_token: float
) -> None:
    tokenizer = EstimatingTokenizer(bytes_per_token)
    prefix = tokenizer.prefix(text, most)
    assert text.startswith(prefix)
    assert tokenizer.count([prefix])[0] <= most
    rest = text[len(prefix) :]
    assert not rest or tokenizer.count([prefix + rest[0]])[0] > most


@pytest.mark.parametrize("wrong", [0, 0.99, -1, float("nan")])
def test_fewer_bytes_than_one_to_a_token_would_be_no_bound(wrong: float) -> None:
    with pytest.raises(ValueError, match="≥ 1"):
        EstimatingTokenizer(wrong)
