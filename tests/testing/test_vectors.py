"""Is the vector of a text a function of the text, and of nothing else?"""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.testing import tokens_of, vector_of, vectors_of
from embedcore.testing.strategies import nasty_texts, text_lists, texts

widths = st.integers(8, 200)


@given(texts(), widths)
def test_vector_has_the_promised_form(text, width):
    vector = vector_of(text, width)
    assert (vector.dtype, vector.shape) == (np.float32, (width,))
    assert vector.flags.c_contiguous
    assert np.linalg.norm(vector.astype(np.float64)) == pytest.approx(1, abs=1e-6)
    assert vector.all()


@given(texts() | nasty_texts(), texts() | nasty_texts(), widths)
def test_distinct_texts_have_distinct_vectors(one, other, width):
    same = np.array_equal(vector_of(one, width), vector_of(other, width))
    assert same == (one == other)


@given(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4), st.text(max_size=4))
def test_salt_and_text_do_not_run_together(salt, text, other_salt, other_text):
    same = np.array_equal(vector_of(text, 8, salt=salt), vector_of(other_text, 8, salt=other_salt))
    assert same == ((salt, text) == (other_salt, other_text))


@given(text_lists(max_size=10), widths, st.text(max_size=3))
def test_many_are_as_one_to_the_bit(given_texts, width, salt):
    together = vectors_of(given_texts, width, salt=salt)
    assert (together.dtype, together.shape) == (np.float32, (len(given_texts), width))
    assert together.flags.c_contiguous
    for row, text in zip(together, given_texts, strict=True):
        assert np.array_equal(row, vector_of(text, width, salt=salt))


@given(texts(), st.integers(8, 60), st.integers(0, 60))
def test_narrow_vector_is_the_beginning_of_a_wide_one(text, width, more):
    wide = vector_of(text, width + more)[:width].astype(np.float64)
    assert np.allclose(vector_of(text, width), wide / np.linalg.norm(wide), atol=1e-6)


def test_blocks_leave_no_seam():
    many = [f"text {number}" for number in range(1000)]
    assert np.array_equal(vectors_of(many, 16)[777], vector_of("text 777", 16))


def test_vectors_are_the_same_on_every_machine_and_version():
    pinned = hashlib.sha256(vectors_of(["a", "b", "日本"], 64).astype("<f4").tobytes()).hexdigest()
    assert pinned == "52dac694dfb54289cfc4ebe1aad79a19aa5cccc89e4227c8afad650794e9bbbb"


@pytest.mark.campaign(short=True)
def test_twenty_thousand_wide_vectors_take_seconds():
    begun = time.process_time()
    vectors_of([f"text {number}" for number in range(20_000)], 1536)
    assert time.process_time() - begun < 5


@given(texts(min_size=0) | nasty_texts())
def test_tokens_are_a_quarter_of_the_bytes(text):
    size = len(text.encode("utf-8", "surrogatepass"))
    assert 4 * (tokens_of(text) - 1) < size <= 4 * tokens_of(text) or (size == tokens_of(text) == 0)
