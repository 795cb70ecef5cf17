"""Each vector of a batch is judged alone: the others are paid for too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.policy.batch.collect import check
from embedcore.provider.types import BatchOutcome
from embedcore.testing import FakeEmbedder, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

WIDTH = 8
TRUTH = vectors_of([f"text {place}" for place in range(12)], WIDTH)


@pytest.fixture(scope="module")
def judge(desk: Any) -> Any:
    """``judge(outcomes, info…)``: what ``check`` says of them."""

    def judge(outcomes: dict[int, BatchOutcome], *, reject_zero: bool = True, **info: Any) -> Any:
        known = replace(FAKE_INFO, **{"dimensions": WIDTH, **info})
        with desk(FakeEmbedder(info=known), reject_zero=reject_zero) as one:
            return check(one.engine, outcomes)

    return judge


def bad_vectors() -> dict[str, Any]:
    return {
        "narrow": np.ones(WIDTH - 1, dtype=np.float32),
        "wide": np.ones(WIDTH + 1, dtype=np.float32),
        "empty": np.empty(0, dtype=np.float32),
        "two rows": np.ones((2, WIDTH), dtype=np.float32),
        "list": [1.0] * WIDTH,
        "integers": np.ones(WIDTH, dtype=np.int64),
        "strings": np.array(["1"] * WIDTH),
        "nan": np.array([np.nan] + [1.0] * (WIDTH - 1), dtype=np.float32),
        "infinite": np.array([np.inf] + [1.0] * (WIDTH - 1), dtype=np.float32),
        "too large for float32": np.full(WIDTH, 1e300),
        "zeros": np.zeros(WIDTH, dtype=np.float32),
    }


@given(kinds=st.lists(st.sampled_from(["good", *bad_vectors()]), min_size=1, max_size=12))
def test_the_good_ones_are_kept_whatever_is_beside_them(judge: Any, kinds: list[str]) -> None:
    bad = bad_vectors()
    outcomes = {
        place: BatchOutcome(id=str(place), vector=bad.get(kind, TRUTH[place]))
        for place, kind in enumerate(kinds)
    }
    checked = judge(outcomes)
    good = [place for place, kind in enumerate(kinds) if kind == "good"]
    assert checked.places == good
    assert checked.vectors.shape == (len(good), WIDTH)
    assert checked.vectors.dtype == np.float32
    assert (checked.vectors == TRUTH[good]).all()
    assert sorted(checked.problems) == [p for p, kind in enumerate(kinds) if kind != "good"]
    assert all(why.startswith("the vector ") for why in checked.problems.values())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_any_kind_of_float_becomes_float32(judge: Any, dtype: Any) -> None:
    vector = TRUTH[0].astype(dtype)
    checked = judge({3: BatchOutcome(vector=vector)})
    assert checked.vectors.dtype == np.float32
    assert (checked.vectors[0] == vector.astype(np.float32)).all()


def test_zeros_are_refused_only_where_that_is_wished(judge: Any) -> None:
    zeros = {0: BatchOutcome(vector=np.zeros(WIDTH, dtype=np.float32))}
    assert judge(zeros, reject_zero=False).places == [0]
    assert judge(zeros, reject_zero=True).problems == {0: "the vector is all zeros"}


def test_without_a_known_width_the_first_one_decides(judge: Any) -> None:
    outcomes = {place: BatchOutcome(vector=TRUTH[place]) for place in range(3)}
    outcomes[1] = BatchOutcome(vector=np.ones(WIDTH + 1, dtype=np.float32))
    checked = judge(outcomes, dimensions=None)
    assert checked.places == [0, 2]
    assert f"width {WIDTH + 1}, not {WIDTH}" in checked.problems[1]


@pytest.mark.parametrize(
    ("name", "reply_models", "accepted"),
    [
        ("fake-embedding", (), True),
        (None, (), True),
        ("other", (), False),
        ("other", ("other",), True),
        ("other", ("*",), True),
        ("", (), False),
    ],
)
def test_the_model_that_answered_must_be_the_one_that_was_asked(
    judge: Any, name: Any, reply_models: tuple[str, ...], accepted: bool
) -> None:
    checked = judge({0: BatchOutcome(vector=TRUTH[0], model=name)}, reply_models=reply_models)
    assert checked.places == ([0] if accepted else [])
    if accepted:
        assert checked.answered_as == name
    else:
        assert "reply_models" in checked.problems[0]


def test_nothing_is_nothing(judge: Any) -> None:
    checked = judge({})
    assert checked.places == []
    assert checked.vectors.shape == (0, WIDTH)
    assert checked.problems == {}
