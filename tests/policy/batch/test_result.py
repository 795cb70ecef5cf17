"""Rows with their vectors, out of the file and the store, in any process and any block size."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import ConfigurationError, InputRejected, ProviderError
from embedcore.testing import vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

ROWS: list[Any] = ["a", "b", "a", "", "c", "refused", "b", "d", "a"]


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 12), rows=st.permutations(ROWS))
def test_blocks_of_any_size_say_what_the_result_says(
    tmp_path_factory: pytest.TempPathFactory, size: int, rows: list[Any]
) -> None:
    made = batch_desk.__wrapped__(tmp_path_factory.mktemp("blocks"))
    one = next(made)
    one.service.fail_lines("refused", message="not this one")
    job = one.submit([(f"key {row}", text) for row, text in enumerate(rows)], on_error="keep")
    one.work(job)
    bad = [row for row, text in enumerate(rows) if text in ("", "refused")]
    result = one.check(job, rows, without=bad)
    again = one.client().batch_job(job.id)
    blocks = list(again.blocks(size))
    assert [block.first for block in blocks] == list(range(0, len(rows), size))
    assert all(len(block) == size for block in blocks[:-1])
    assert [key for block in blocks for key in block.keys] == [f"key {n}" for n in range(9)]
    vectors = np.concatenate([block.vectors for block in blocks])
    assert np.array_equal(vectors, result.vectors, equal_nan=True)
    assert np.concatenate([block.ok for block in blocks]).tolist() == result.ok.tolist()
    reused = np.concatenate([block.reused for block in blocks]).tolist()
    first = {text: row for row, text in reversed(list(enumerate(rows)))}
    assert reused == [row not in bad and first[text] != row for row, text in enumerate(rows)], (
        "one row of each text was billed, in whatever block the others are"
    )
    assert result.reused.tolist() == reused
    errors = {
        block.first + place: str(error) for block in blocks for place, error in block.errors.items()
    }
    assert errors == {row: str(error) for row, error in result.errors.items()}
    made.close()


def test_every_reason_is_of_its_own_kind_and_names_its_row(batch_desk: Any) -> None:
    batch_desk.service.fail_lines("refused", message="not this one")
    job = batch_desk.work(batch_desk.submit(ROWS, on_error="keep"))
    errors = job.result().errors
    assert isinstance(errors[3], InputRejected)
    assert isinstance(errors[5], ProviderError)
    assert "not this one" in str(errors[5])
    assert {row: error.position for row, error in errors.items()} == {3: 3, 5: 5}


def test_what_is_under_way_says_so(batch_desk: Any) -> None:
    job = batch_desk.submit(["a", "b"])
    (block,) = job.blocks()
    assert not block.ok.any()
    assert all(error.retryable for error in block.errors.values())
    assert [vector for _, vector in block] == [None, None]


def test_a_vector_that_was_pruned_is_a_reason_and_is_billed_again_only_if_asked(
    batch_desk: Any,
) -> None:
    texts = ["a", "b", "c"]
    job = batch_desk.work(batch_desk.submit(texts))
    batch_desk.last.close()
    connection = sqlite3.connect(batch_desk.home / "vectors" / "index.db")
    connection.execute("DELETE FROM vector WHERE id = 2")
    connection.commit()
    connection.close()
    (gone,) = np.flatnonzero(~job.result(on_error="keep").ok).tolist()
    result = batch_desk.check(job, texts, without=[gone])
    assert "not cached any more; submit it again" in str(result.errors[gone])
    assert len(batch_desk.jobs) == 1
    again = batch_desk.work(batch_desk.submit(texts))
    batch_desk.check(again, texts)
    assert batch_desk.meter.billed_texts[texts[gone]] == 2
    assert batch_desk.meter.billed_texts.total() == 4


def test_a_damaged_vector_is_never_given_out(
    batch_desk: Any, flip_vectors: Callable[..., None]
) -> None:
    texts = ["a", "b", "c"]
    job = batch_desk.work(batch_desk.submit(texts))
    batch_desk.last.close()
    flip_vectors(batch_desk.home / "vectors", "id = 1")
    result = job.result(on_error="keep")
    assert int(result.ok.sum()) == 2
    right = vectors_of(texts, 32)
    assert (result.vectors[result.ok] == right[result.ok]).all()


def test_the_width_need_not_be_known_before(batch_desk: Any) -> None:
    batch_desk.provide(info=replace(FAKE_INFO, dimensions=None))
    texts = ["a", "b"]
    job = batch_desk.work(batch_desk.submit(["", *texts], on_error="keep"))
    batch_desk.check(job, ["", *texts], without=[0])
    batch_desk.check(batch_desk.client().batch_job(job.id), ["", *texts], without=[0])


@pytest.mark.parametrize("size", [0, -1])
def test_a_block_has_a_row(batch_desk: Any, size: int) -> None:
    with pytest.raises(ConfigurationError, match="size"):
        batch_desk.submit(["a"]).blocks(size)
