"""Does every row get the vector of its own text, in whatever order the replies come?"""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import ProviderUnavailable, RequestRejected
from embedcore.policy.result import Spending, TextCut
from embedcore.policy.result_buffer import ResultBuffer
from embedcore.policy.texts import take_in
from embedcore.testing import vectors_of
from embedcore.testing.strategies import text_lists

WIDTH = 8


def result_of(collected, taken, cuts=None):
    return collected.result(taken, cuts or {}, spending=Spending(), model="m", fingerprint="f")


@settings(deadline=None)
@given(text_lists(max_size=15), st.data())
def test_any_order_of_puts_and_failures_puts_the_right_vectors_into_rows(given_texts, data):
    taken = take_in(given_texts, keep_empty=False, keep=False)
    count = len(taken.texts)
    collected = ResultBuffer(taken.rows, count, data.draw(st.sampled_from([None, WIDTH])))
    done, failed = set(), set()
    groups = data.draw(
        st.lists(st.lists(st.integers(0, max(count - 1, 0)), min_size=1, unique=True), max_size=8)
        if count
        else st.just([])
    )
    for group in groups:
        if data.draw(st.booleans()):
            collected.put(group, vectors_of([taken.texts[index] for index in group], WIDTH))
            done |= set(group)
        else:
            collected.fail(group, ProviderUnavailable(f"no {group}"))
            failed |= set(group)
    failed -= done

    result = result_of(collected, taken)
    assert result.vectors.shape[0] == len(given_texts)
    assert result.vectors.dtype == np.float32
    seen = set()
    for row, text in enumerate(given_texts):
        index = taken.rows[row]
        outcome = result.outcomes[row]
        assert bool(result.ok[row]) == (index in done)
        assert (row in result.errors) == (index in failed)
        if index in done:
            assert (result.vectors[row] == vectors_of([text], WIDTH)[0]).all()
            assert outcome.state == ("reused" if index in seen else "ok")
        else:
            assert np.isnan(result.vectors[row]).all()
            assert outcome.state == "failed"
            assert not result.reused[row]
        assert outcome.error is result.errors.get(row)
        seen.add(index)


def test_a_text_that_has_its_vector_is_not_failed_by_what_follows():
    taken = take_in(["a", "b"], keep_empty=False, keep=False)
    collected = ResultBuffer(taken.rows, 2, WIDTH)
    collected.put([0], vectors_of(["a"], WIDTH))
    collected.fail([0, 1], RequestRejected("late"))
    result = result_of(collected, taken)
    assert result.ok.tolist() == [True, False]
    assert sorted(result.errors) == [1]
    collected.put([1], vectors_of(["b"], WIDTH))
    assert result_of(collected, taken).errors == {}


def test_the_callers_array_is_not_written_to_afterwards():
    taken = take_in(["a", "b"], keep_empty=False, keep=False)
    collected = ResultBuffer(taken.rows, 2, WIDTH)
    vectors = vectors_of(["a"], WIDTH)
    collected.put([0], vectors)
    before = result_of(collected, taken)
    vectors[:] = 0
    collected.put([1], vectors_of(["b"], WIDTH))
    assert before.ok.tolist() == [True, False]
    assert (before.vectors[0] == vectors_of(["a"], WIDTH)[0]).all()


def test_nothing_collected_has_the_width_of_the_model():
    taken = take_in(["", "a"], keep_empty=True, keep=False)
    assert result_of(ResultBuffer(taken.rows, 1, WIDTH), taken).vectors.shape == (2, WIDTH)
    assert result_of(ResultBuffer(taken.rows, 1, None), taken).vectors.shape == (2, 0)
    empty = take_in([], keep_empty=False, keep=False)
    assert result_of(ResultBuffer(empty.rows, 0, WIDTH), empty).vectors.shape == (0, WIDTH)


def test_threads_that_put_at_once_lose_nothing():
    texts = [f"text {number}" for number in range(400)]
    taken = take_in(texts, keep_empty=False, keep=False)
    collected = ResultBuffer(taken.rows, 400, None)
    groups = [list(range(start, 400, 40)) for start in range(40)]

    def put(group):
        collected.put(group, vectors_of([texts[index] for index in group], WIDTH))

    threads = [threading.Thread(target=put, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (result_of(collected, taken).vectors == vectors_of(texts, WIDTH)).all()


def test_outcomes_are_a_sequence():
    taken = take_in(["a", "", "a"], keep_empty=True, keep=False)
    collected = ResultBuffer(taken.rows, 1, WIDTH)
    collected.put([0], vectors_of(["a"], WIDTH))
    cuts = {0: TextCut(tokens=3), 1: TextCut(), 2: TextCut(characters=5)}
    result = result_of(collected, taken, cuts)
    outcomes = result.outcomes
    assert [one.state for one in outcomes] == ["ok", "failed", "reused"]
    assert outcomes[-1].state == "reused"
    assert [one.state for one in outcomes[1:]] == ["failed", "reused"]
    assert [one.cut for one in outcomes] == ["yes", "no", "yes"]
    assert [one.tokens_cut for one in outcomes] == [3, 0, None]
    assert [one.characters_cut for one in outcomes] == [None, None, 5]
    assert result.tokens_cut == {0: 3, 2: None}
    assert result.characters_cut == {2: 5}
    assert result.perhaps_cut == frozenset()
    with pytest.raises(IndexError):
        outcomes[3]


def test_a_result_pickles_with_its_errors():
    taken = take_in(["a", "b"], keep_empty=False, keep=False)
    collected = ResultBuffer(taken.rows, 2, WIDTH)
    collected.put([0], vectors_of(["a"], WIDTH))
    error = RequestRejected("no", billed="no", status=400)
    collected.fail([1], error)
    result = result_of(collected, taken)
    error.partial = result  # as the recipe does it: the error is in its own partial result
    for again in (pickle.loads(pickle.dumps(result)), pickle.loads(pickle.dumps(error)).partial):
        assert (again.vectors[0] == result.vectors[0]).all()
        assert again.ok.tolist() == [True, False]
        assert str(again.errors[1]) == "no"
        assert again.errors[1].status == 400
        assert again.errors[1].partial is again
