"""Is every reply that cannot be believed refused, and every other one made float32?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from embedcore.errors import InvalidResponse, ReplyMismatch
from embedcore.policy.reply_checks import billed_tokens, checked_vectors
from embedcore.provider.types import EmbedReply, ModelInfo

INFO = ModelInfo(provider="fake", model="m", dimensions=3)
GOOD = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)


def check(vectors, *, texts=2, info=INFO, width=None, **reply):
    return checked_vectors(EmbedReply(vectors=vectors, **reply), texts, info, width=width)


@pytest.mark.fault(125)
@pytest.mark.parametrize(
    "given",
    [
        GOOD,
        GOOD.tolist(),
        tuple(map(tuple, GOOD.tolist())),
        GOOD.astype(np.float64),
        GOOD.astype(np.float16),
        GOOD.astype(">f4"),
        GOOD.astype(np.int64),
        np.asfortranarray(GOOD),
        memoryview(GOOD),
        list(GOOD),
        (row for row in GOOD.tolist()),
        GOOD[::1, ::1],
        np.repeat(GOOD, 2, axis=1)[:, ::2],
    ],
    ids=lambda given: type(given).__name__,
)
def test_numbers_in_any_container_become_float32(given):
    checked = check(given)
    vectors = checked.vectors
    assert type(vectors) is np.ndarray
    assert vectors.dtype == np.float32
    assert vectors.flags.c_contiguous
    assert vectors.dtype.isnative
    assert (vectors == GOOD).all()
    assert checked.zeros == checked.missing == []


@pytest.mark.fault(125)
@pytest.mark.fault(37)
@pytest.mark.fault(42)
@pytest.mark.parametrize(
    "given",
    [
        GOOD[:1],
        np.vstack([GOOD, GOOD]),
        GOOD[0],
        GOOD[None],
        np.float32(1),
        [[1, 2, 3], [4, 5]],
        [["1", "2", "3"], ["4", "5", "6"]],
        [[1, "2", 3], [4, None, 6]],
        [None, None],
        [[], [None]],
        [[1, 2, 3], [], None],
        np.full((2, 3), np.nan),
        [[True, False, True], [False, False, True]],
        GOOD.astype(np.complex64),
        GOOD.astype(object),
        GOOD.tobytes(),
        "vectors",
        None,
        7,
        {},
        {0: [1, 2, 3], 1: [4, 5, 6]},
        [],
        iter([]),
        memoryview(GOOD.tobytes()),
        np.empty((2, 0), dtype=np.float32),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_an_invalid_response(given):
    with pytest.raises(InvalidResponse) as caught:
        check(given, request_id="req-7")
    assert caught.value.billed == "yes"
    assert caught.value.request_id == "req-7"
    assert not caught.value.retryable


@pytest.mark.fault(125)
@pytest.mark.parametrize(
    "reply", [None, GOOD, [[1, 2, 3]], "x", 7, object()], ids=lambda value: type(value).__name__
)
def test_what_is_no_reply_is_an_invalid_response(reply):
    with pytest.raises(InvalidResponse, match="instead of an EmbedReply"):
        checked_vectors(reply, 2, INFO, width=None)


@pytest.mark.fault(42)
@pytest.mark.parametrize("given", [GOOD[:, :2], np.hstack([GOOD, GOOD]), [[1, 2], None]], ids=str)
def test_another_width_is_the_settings_fault(given):
    with pytest.raises(ReplyMismatch, match="not 3"):
        check(given)


@pytest.mark.fault(40)
@settings(deadline=None)
@given(
    arrays.arrays(np.float64, (2, 3), elements=st.floats(-1e30, 1e30)),
    st.integers(0, 1),
    st.integers(0, 2),
    st.sampled_from([np.inf, -np.inf, 1e39, -1e300]),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_a_number_that_is_infinite_in_float32_is_refused(matrix, row, column, bad, kind):
    with np.errstate(over="ignore"):
        matrix = np.clip(matrix, -60000, 60000).astype(kind)
        matrix[row, column] = bad
    with pytest.raises(InvalidResponse, match=f"not finite in vector {row}"):
        check(matrix)


NOTHING = [None, [], [None, 2.0, 3.0], [None], [float("nan"), 1.0, 2.0], [float("nan")] * 3]


@pytest.mark.case("A4")
@pytest.mark.fault(40)
@settings(deadline=None)
@given(
    st.lists(st.none() | st.sampled_from(range(len(NOTHING))), min_size=2, max_size=9),
    st.sampled_from([list, tuple, iter, np.array]),
)
def test_rows_that_are_null_empty_or_nan_are_missing_and_the_others_are_kept(rows, container):
    good = [[float(row), 2.0, 3.0] for row in range(len(rows))]
    given = [good[row] if hole is None else NOTHING[hole] for row, hole in enumerate(rows)]
    missing = [row for row, hole in enumerate(rows) if hole is not None]
    if container is np.array:
        given = [[float("nan")] * 3 if row in missing else one for row, one in enumerate(given)]
    if len(missing) == len(rows):
        with pytest.raises(InvalidResponse):
            check(container(given), texts=len(rows))
        return
    checked = check(container(given), texts=len(rows))
    assert checked.missing == missing
    for row in set(range(len(rows))) - set(missing):
        assert checked.vectors[row].tolist() == good[row]


@settings(deadline=None)
@given(st.floats(2.0**64, 2.0**127, width=32), st.sampled_from([-1.0, 1.0]))
def test_huge_numbers_whose_squares_overflow_are_finite_all_the_same(size, sign):
    matrix = np.full((2, 3), size * sign, dtype=np.float32)
    checked = check(matrix)
    assert (checked.vectors == matrix).all()
    assert checked.zeros == []


@pytest.mark.fault(41)
@settings(deadline=None)
@given(
    arrays.arrays(
        np.float32,
        (5, 3),
        elements=st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 1.0, -2.0, 3e38]),
    )
)
def test_all_zero_vectors_are_found_and_tiny_ones_are_not_taken_for_them(matrix):
    checked = check(matrix, texts=5)
    assert checked.zeros == [row for row in range(5) if not matrix[row].any()]
    assert (checked.vectors == matrix).all()


@pytest.mark.fault(42)
def test_the_width_of_earlier_replies_binds_where_the_model_does_not_say():
    unknown = replace(INFO, dimensions=None)
    assert check(GOOD, info=unknown).vectors.shape == (2, 3)
    assert check(GOOD, info=unknown, width=3).vectors.shape == (2, 3)
    with pytest.raises(ReplyMismatch, match="width 3, not 4"):
        check(GOOD, info=unknown, width=4)


@pytest.mark.fault(47)
def test_another_models_reply_is_refused_unless_it_is_an_alias():
    for name in (None, "m"):
        check(GOOD, model=name)
    with pytest.raises(ReplyMismatch, match="reply_models"):
        check(GOOD, model="other")
    with pytest.raises(ReplyMismatch):
        check(GOOD, model="")
    check(GOOD, model="m-2026", info=replace(INFO, reply_models=("m-2026",)))
    check(GOOD, model="anything", info=replace(INFO, reply_models=("*",)))
    with pytest.raises(ReplyMismatch):
        check(GOOD, model="m-2027", info=replace(INFO, reply_models=("m-2026",)))


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", [7, b"m", ["m"], object()], ids=lambda value: type(value).__name__)
def test_a_model_that_is_no_name_is_refused(name):
    with pytest.raises(ReplyMismatch):
        check(GOOD, model=name)


@pytest.mark.fault(44)
@settings(deadline=None)
@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(max_value=0),
        st.floats(),
        st.integers(2**53, 2**80),
        st.sampled_from(["7", b"7", [7], 2**70, 2**63]),
    )
)
def test_a_bill_that_cannot_be_right_is_none(tokens):
    assert billed_tokens(EmbedReply(vectors=GOOD, tokens=tokens)) is None


@settings(deadline=None)
@given(st.integers(1, 10**9), st.sampled_from([int, np.int64, np.uint32]))
def test_a_bill_that_can_be_right_is_taken(tokens, kind):
    found = billed_tokens(EmbedReply(vectors=GOOD, tokens=kind(tokens)))
    assert found == tokens
    assert type(found) is int
