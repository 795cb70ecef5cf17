"""A vector is a function of its text, so that a swap is seen; and the corpus is always the same."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from compare import corpus, truth
from hypothesis import given, strategies as st

if TYPE_CHECKING:
    from compare.tokens import Counter

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=8)


@given(TEXTS)
def test_a_vector_depends_on_its_text_alone(texts: list[str]) -> None:
    together = truth.vectors(texts)
    alone = np.concatenate([truth.vectors([text]) for text in texts])
    assert np.array_equal(together, alone)
    assert len(np.unique(together, axis=0)) == len(set(texts))


@given(TEXTS)
def test_vectors_are_like_those_of_openai(texts: list[str]) -> None:
    vectors = truth.vectors(texts)
    assert vectors.shape == (len(texts), truth.WIDTH)
    assert np.array_equal(vectors.astype(np.float16).astype(np.float32), vectors)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


def test_a_vector_of_yesterday_is_one_of_today() -> None:
    first = truth.vectors(["embedcore"])[0, :3]
    assert first.tolist() == EMBEDCORE


def test_every_wrong_row_is_counted_and_a_missing_one_is_not_wrong() -> None:
    texts = [f"text {number}" for number in range(20)]
    vectors = truth.vectors(texts)
    assert truth.wrong_rows(texts, vectors, block=7) == 0
    vectors[[3, 4]] = vectors[[4, 3]]
    vectors[11, 1500] += np.float32(0.001)
    vectors[18] = np.nan
    assert truth.wrong_rows(texts, vectors, block=7) == 3
    assert truth.missing(vectors).sum() == 1


def test_the_corpus_is_the_same_each_time_and_a_short_one_begins_a_long_one() -> None:
    assert corpus.texts(300) == corpus.texts(1000)[:300]
    assert corpus.texts(50, seed=1) != corpus.texts(50)


def test_five_of_a_hundred_texts_are_copies_in_every_part() -> None:
    texts = corpus.texts(4000)
    for part in (1000, 4000):
        assert 0.03 < 1 - len(set(texts[:part])) / part < 0.07
    assert len(set(corpus.texts(4000, duplicates=0.0))) == 4000


def test_the_corpus_has_long_foreign_and_code_texts() -> None:
    texts = list(dict.fromkeys(islice(corpus.stream(), 4000)))
    assert 0.005 < sum(len(text) > 8000 for text in texts) / len(texts) < 0.02
    assert 0.04 < sum("。" in text for text in texts) / len(texts) < 0.08
    assert 0.07 < sum("def " in text for text in texts) / len(texts) < 0.13


def test_short_texts_have_some_fifteen_tokens_and_are_different(counter: Counter) -> None:
    texts = corpus.short_texts(4000)
    assert len(set(texts)) == 4000
    assert texts[:50] == corpus.short_texts(50)
    counts = [counter.count(text) for text in texts]
    assert 12 < sum(counts) / len(counts) < 17
    assert min(counts) >= 9
    assert max(counts) <= 22


# Components of the vector of "embedcore": a change of the function changes every figure.
EMBEDCORE = [0.03656005859375, -0.0188446044921875, -0.0284423828125]
