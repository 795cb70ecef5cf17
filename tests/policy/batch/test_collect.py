"""What a job brought: never a wrong vector, nothing lost, and harmless to read again."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import ProviderUnavailable, StorageFull
from embedcore.provider.types import BatchOutcome
from embedcore.storage.amounts import Amount
from embedcore.testing import vectors_of
from embedcore.testing.fakes.batch import Crashed

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(8)]


def vector(place: int) -> Any:
    return vectors_of(TEXTS, 32)[place]


def good(place: int) -> BatchOutcome:
    return BatchOutcome(id=str(place), vector=vector(place), tokens=2, model="fake-embedding")


def other(place: int) -> BatchOutcome:
    return BatchOutcome(id=str(place), vector=-vector(place), tokens=2)


def refused(place: int, **more: Any) -> BatchOutcome:
    return BatchOutcome(id=str(place), error="not good", code="bad_text", **more)


def bring(batch_desk: Any, first: list[BatchOutcome]) -> Any:
    """A batch whose first job brings these, by their places, and every further one the truth."""
    truth = batch_desk.strategy.results
    batch_desk.strategy.results = lambda job_id: (
        iter(batch_desk.named(0, first)) if job_id == batch_desk.jobs[0].id else truth(job_id)
    )
    job = batch_desk.submit(TEXTS)
    return batch_desk.work(job)


# Which line is whose


@settings(max_examples=settings.default.max_examples // 5, deadline=None)
@given(data=st.data())
def test_whatever_comes_no_row_gets_a_vector_that_is_not_its_own(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    places = st.integers(0, 7)
    lines = data.draw(
        st.lists(
            st.builds(good, places)
            | st.builds(good, places)
            | st.builds(refused, places, retryable=st.booleans())
            | st.builds(
                BatchOutcome,
                id=st.sampled_from(["", "07", "8", "-1", "+1", "１", "1.0", "x", " 1", "9" * 40]),
                vector=st.just(vector(0)),
                tokens=st.none() | st.integers(0, 9),
            ),
            max_size=14,
        )
    )
    made = batch_desk.__wrapped__(tmp_path_factory.mktemp("lines"))
    one = next(made)
    job = bring(one, lines)
    result = job.result(on_error="keep")
    right = vectors_of(TEXTS, 32)
    assert (result.vectors[result.ok] == right[result.ok]).all()
    known = set(map(str, range(8)))
    came = {int(line.id) for line in lines if line.vector is not None and line.id in known}
    # A text without a line may have been paid for: it is not billed again.
    tried_again = {int(line.id) for line in lines if line.error is not None and line.retryable} - {
        int(line.id) for line in lines if line.error is not None and not line.retryable
    }
    assert {row for row in range(8) if not result.ok[row]} == set(range(8)) - came - tried_again
    assert one.spent().held == Amount()
    made.close()


@pytest.mark.fault(67)
@pytest.mark.parametrize("between", [0, 600])
def test_an_equal_vector_that_comes_twice_is_one(batch_desk: Any, between: int) -> None:
    """Whether both are in one chunk or far apart."""
    nobody = [BatchOutcome(id="", error="of nobody")] * between
    job = bring(batch_desk, [good(0), good(1), *nobody, good(0), *map(good, range(1, 8))])
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 1


@pytest.mark.fault(67)
@pytest.mark.parametrize("between", [0, 600])
@pytest.mark.parametrize("swapped", [False, True])
def test_two_different_vectors_for_one_text_are_worth_nothing(
    batch_desk: Any, between: int, swapped: bool
) -> None:
    nobody = [BatchOutcome(id="", error="of nobody")] * between
    pair = [other(0), good(0)] if swapped else [good(0), other(0)]
    job = bring(batch_desk, [pair[0], *nobody, pair[1], *map(good, range(1, 8))])
    result = batch_desk.check(job, TEXTS, without=[0])
    assert "two different vectors" in str(result.errors[0])
    later = batch_desk.work(batch_desk.submit(TEXTS))
    batch_desk.check(later, TEXTS)


@pytest.mark.parametrize("between", [0, 600])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("retryable", [False, True])
def test_of_an_error_and_a_vector_the_vector_counts_in_any_order(
    batch_desk: Any, between: int, swapped: bool, retryable: bool
) -> None:
    nobody = [BatchOutcome(id="", error="of nobody")] * between
    pair = [refused(0, retryable=retryable), good(0)]
    pair = pair[::-1] if swapped else pair
    job = bring(batch_desk, [pair[0], *nobody, pair[1], *map(good, range(1, 8))])
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 1


@pytest.mark.fault(68)
@pytest.mark.case("E1")
def test_lines_of_nobody_are_counted_reported_and_never_guessed(
    batch_desk: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="embedcore")
    quirks = batch_desk.service.settings.quirks
    quirks.no_id, quirks.missing, quirks.unknown_id = "text 02", "text 05", True
    job = batch_desk.work(batch_desk.submit(TEXTS))
    assert "2 lines of its results belong to no text of it" in caplog.text
    result = batch_desk.check(job, TEXTS, without=[2, 5])
    assert all("output_gone" in str(error) for error in result.errors.values())
    assert len(batch_desk.jobs) == 1, "one of them was paid for, and nobody knows which"


@pytest.mark.fault(66)
def test_error_lines_are_reasons_of_their_texts(batch_desk: Any) -> None:
    batch_desk.service.fail_lines("text 01", status=400, message="this one is not allowed")
    batch_desk.service.fail_lines("text 03", status=422, code="odd_text", message="nor this")
    job = batch_desk.work(batch_desk.submit(TEXTS))
    result = batch_desk.check(job, TEXTS, without=[1, 3])
    assert "this one is not allowed" in str(result.errors[1])
    assert "odd_text: nor this" in str(result.errors[3])
    assert [error.position for error in result.errors.values()] == [1, 3]
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.fault(66)
@pytest.mark.parametrize(
    "how", [{"status": 500}, {"status": 429}, {"http": False}], ids=["500", "429", "no response"]
)
def test_error_lines_that_may_pass_are_sent_again(batch_desk: Any, how: Any) -> None:
    batch_desk.service.fail_lines("text 01", times=1, message="just now not", **how)
    job = batch_desk.work(batch_desk.submit(TEXTS))
    batch_desk.check(job, TEXTS)
    assert [len(batch_desk.service.input_lines(one.input_file_id)) for one in batch_desk.jobs] == [
        8,
        1,
    ]
    batch_desk.check_money()


@pytest.mark.fault(66)
def test_error_lines_that_never_pass_are_tried_so_often(batch_desk: Any) -> None:
    batch_desk.service.fail_lines("text 01", status=500, message="our fault")
    job = batch_desk.work(batch_desk.submit(TEXTS, batch={"attempts": 3}))
    result = batch_desk.check(job, TEXTS, without=[1])
    assert "our fault" in str(result.errors[1])
    assert len(batch_desk.jobs) == 3


@pytest.mark.parametrize("billed", ["yes", "unknown"])
def test_an_error_that_may_have_cost_something_is_charged(batch_desk: Any, billed: Any) -> None:
    batch_desk.service.settings.quirks.usage = "absent"
    job = bring(batch_desk, [refused(0, billed=billed), *map(good, range(1, 8))])
    used = job.status().usage
    assert (used.tokens, used.exact) == (16, False)


# Which vector may be believed


@pytest.mark.parametrize(
    "bad",
    [
        vectors_of(["x"], 16)[0],
        np.full(32, np.nan, dtype=np.float32),
        np.array([1e300] * 32),
        np.arange(32),
        vectors_of(["x"], 32),
        [0.1] * 32,
        np.empty(0, dtype=np.float32),
    ],
    ids=["width", "nan", "overflow", "integers", "shape", "list", "empty"],
)
def test_a_vector_that_cannot_be_right_is_not_kept_and_was_paid(batch_desk: Any, bad: Any) -> None:
    job = bring(batch_desk, [BatchOutcome(id="0", vector=bad, tokens=2), *map(good, range(1, 8))])
    result = batch_desk.check(job, TEXTS, without=[0])
    assert "the vector" in str(result.errors[0])
    assert job.status().usage.tokens == 16


def test_a_vector_of_another_model_is_not_kept(batch_desk: Any) -> None:
    batch_desk.service.settings.quirks.reply_model = "another-model"
    job = batch_desk.work(batch_desk.submit(TEXTS))
    result = batch_desk.check(job, TEXTS, without=range(8))
    assert "reply_models" in str(result.errors[0])


# Interrupted


@pytest.mark.fault(79)
# Around what is written at once.
@pytest.mark.parametrize("at", [0, 511, 512, 1_100])
def test_a_download_that_is_cut_off_is_read_again(batch_desk: Any, at: int) -> None:
    texts = [f"text {number}" for number in range(1_200)]
    job = batch_desk.submit(texts)
    batch_desk.finish_all()
    batch_desk.faults.push("results", at=at, error=ProviderUnavailable("reset", billed="no"))
    batch_desk.work(job)
    batch_desk.check(job, texts)
    assert batch_desk.strategy.calls.count("results") == 2
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.fault(79)
def test_what_is_only_half_there_is_not_the_end(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    cut = ProviderUnavailable("the file ends in the middle of a line", billed="no")
    batch_desk.faults.push("results", at=5, error=cut, times=30)
    for _ in range(5):
        job.advance()
        batch_desk.clock.advance(400)
    report = job.status(poll=False)
    assert report.jobs[0].phase == "collecting"
    assert report.reserved_tokens == 16
    batch_desk.faults.clear()
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.fault(80)
@pytest.mark.parametrize("seam", ["before vectors", "between", "after states", "at the end"])
def test_a_crash_while_results_are_stored_loses_nothing(batch_desk: Any, seam: str) -> None:
    texts = [f"text {number}" for number in range(1_200)]
    job = batch_desk.submit(texts)
    batch_desk.finish_all()
    context = batch_desk.last._context()
    target, name = {
        "before vectors": (context.store, "put"),
        "between": (context.jobs, "store"),
        "after states": (context.jobs, "store"),
        "at the end": (context.steps, "end"),
    }[seam]
    real, calls = getattr(target, name), []

    def dying(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if name == "end" else 2):
            if seam == "after states":
                real(*arguments, **more)
            raise Crashed
        return real(*arguments, **more)

    setattr(target, name, dying)
    with pytest.raises(Crashed):
        job.advance()
    setattr(target, name, real)

    again = batch_desk.client().batch_job(job.id)
    batch_desk.work(again)
    result = batch_desk.check(again, texts)
    assert not result.reused.any()
    assert again.status().stored == 1_200
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


def test_a_full_store_stops_it_and_it_goes_on_when_there_is_room(batch_desk: Any) -> None:
    texts = [f"text {number}" for number in range(1_200)]
    job = batch_desk.submit(texts)
    batch_desk.finish_all()
    store = batch_desk.last._context().store
    # As on a disk that has no more room: SQLite says the same.
    with store.database.transaction() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(StorageFull, match="cannot grow"):
        job.advance()
    with pytest.raises(StorageFull):
        job.wait(timeout=5)
    report = job.status(poll=False)
    assert report.state == "running"
    assert report.in_flight > 0
    assert report.reserved_tokens > 0, "the money is settled when all is there"
    kept = store.look(batch_desk.last._context().keys(None).of(texts), None)
    assert report.stored == len(kept.there), "what counts as stored is in the store"
    with store.database.transaction() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    batch_desk.work(job)
    batch_desk.check(job, texts)
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


def test_the_cap_of_the_cache_keeps_no_vector_of_a_batch_out(batch_desk: Any) -> None:
    """They are nowhere else. Nor are they less kept for it, and the cap holds for all others."""
    client = batch_desk.client(cache_cap=0)
    job = batch_desk.work(client.submit_batch(TEXTS))
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()
    store = client._context().store
    assert store.used > store.cap == 0
    assert client.embed(TEXTS).usage.tokens == 0, "they are there for anybody"
    client.embed(["another"])
    assert client.embed(["another"]).usage.tokens > 0


def test_vectors_of_a_batch_are_kept_from_pruning(batch_desk: Any) -> None:
    batch_desk.work(batch_desk.submit(TEXTS, batch={"keep_days": 12.0}))
    batch_desk.last.close()
    connection = sqlite3.connect(batch_desk.home / "vectors" / "index.db")
    try:
        (until,) = connection.execute("SELECT min(keep_until) FROM vector").fetchone()
    finally:
        connection.close()
    assert until - int(batch_desk.clock.time() // 86_400) in (11, 12)
