"""A job has ended: what it brought is kept, its money settled, and only the rest sent again."""

from __future__ import annotations

import logging
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import BatchEmbeddingFailed, ProviderUnavailable, RemoteGone
from embedcore.events import BoundViolated
from embedcore.money import in_dollars
from embedcore.provider.types import BatchOutcome, Price
from embedcore.storage.amounts import Amount
from embedcore.testing import vectors_of
from embedcore.testing.openai.batches import BatchSettings, Progress

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def texts_in(batch_desk: Any, job: Any) -> int:
    return len(batch_desk.service.input_lines(job.input_file_id))


def outcomes(*tokens: int | None) -> list[BatchOutcome]:
    """A vector for each of the first of ``TEXTS``, with what its line says it cost."""
    vectors = vectors_of(TEXTS, 32)
    return [
        BatchOutcome(id=str(place), vector=vectors[place], tokens=each)
        for place, each in enumerate(tokens)
    ]


@pytest.mark.fault(63)
@settings(max_examples=settings.default.max_examples // 5, deadline=None)
@given(
    # One that says that it is done, and names nothing that it did, is not believed.
    end=st.one_of(
        st.tuples(st.just("expire"), st.integers(0, 6)),
        st.tuples(st.just("finish"), st.integers(1, 6)),
    ),
    order=st.sampled_from(["shuffled", "input", "reversed"]),
)
def test_what_was_done_is_kept_and_only_the_rest_is_sent_again(
    tmp_path_factory: pytest.TempPathFactory, end: tuple[str, int], order: Any
) -> None:
    how, done = end
    made = batch_desk.__wrapped__(tmp_path_factory.mktemp("ended"))
    one = next(made)
    one.service.settings.quirks.order = order
    job = one.submit(TEXTS)
    (first,) = one.jobs
    one.service.step(first.id)
    getattr(one.service, how)(first.id, done=done)
    one.work(job)
    one.check(job, TEXTS)
    assert [texts_in(one, remote) for remote in one.jobs] == [6] + [6 - done] * (done < 6)
    one.check_money()
    made.close()


@pytest.mark.fault(64)
def test_a_job_that_is_cancelling_for_hours_is_waited_for(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    (first,) = batch_desk.jobs
    batch_desk.service.step(first.id)
    batch_desk.service.step(first.id, done=2)
    batch_desk.service.cancel(first.id)
    for _ in range(20):
        batch_desk.clock.advance(600)
        job.advance()
    assert len(batch_desk.jobs) == 1, "what may still come is not billed again"
    assert job.status(poll=False).in_flight == 6
    batch_desk.service.end_cancel(first.id)
    job.advance()
    assert job.resubmit_cancelled() == 4
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    assert texts_in(batch_desk, batch_desk.jobs[1]) == 4
    batch_desk.check_money()


@pytest.mark.fault(65)
def test_a_completed_job_with_only_an_error_file_has_its_reasons_read(batch_desk: Any) -> None:
    batch_desk.service.fail_lines("text", status=400, message="this is not allowed")
    job = batch_desk.submit(TEXTS)
    batch_desk.work(job)
    assert batch_desk.jobs[0].output_file_id is None
    result = batch_desk.check(job, TEXTS, without=range(6))
    assert all("this is not allowed" in str(error) for error in result.errors.values())
    assert len(batch_desk.jobs) == 1, "what can never work is not tried again"
    assert batch_desk.spent().spent == batch_desk.spent().held == Amount()


@pytest.mark.fault(70)
def test_results_that_are_gone_are_paid_and_not_billed_again(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    batch_desk.service.vanish_output(batch_desk.jobs[0].id)
    batch_desk.work(job)
    result = batch_desk.check(job, TEXTS, without=range(6))
    assert all("output_gone" in str(error) for error in result.errors.values())
    assert len(batch_desk.jobs) == 1
    assert batch_desk.spent().spent.tokens == 12
    assert batch_desk.spent().held == Amount()

    again = batch_desk.submit(TEXTS)
    assert again.record.has_ended, "nor by the next batch"
    assert "output_gone" in str(batch_desk.check(again, TEXTS, without=range(6)).errors[3])
    assert len(batch_desk.jobs) == 1

    wanted = batch_desk.submit(TEXTS, resubmit_lost=True)
    batch_desk.work(wanted)
    batch_desk.check(wanted, TEXTS)
    assert len(batch_desk.jobs) == 2
    # Vectors belong to texts: the first batch has them by now as well.
    batch_desk.check(job, TEXTS)


@pytest.mark.fault(70)
def test_who_said_so_before_has_lost_results_billed_again_at_once(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, resubmit_lost=True, batch={"attempts": 3})
    batch_desk.finish_all()
    batch_desk.service.vanish_output(batch_desk.jobs[0].id)
    job.advance()
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 2
    assert batch_desk.spent().spent.tokens == 24


@pytest.mark.fault(70)
def test_results_that_vanish_while_they_are_read_keep_what_was_read(batch_desk: Any) -> None:
    texts = [f"text {number}" for number in range(1_000)]
    job = batch_desk.submit(texts)
    batch_desk.finish_all()
    batch_desk.faults.push("results", at=700, error=RemoteGone("404: no such file"), times=1_000)
    batch_desk.work(job)
    result = job.result(on_error="keep")
    assert 512 <= int(result.ok.sum()) <= 700
    right = vectors_of(texts, 32)
    assert (result.vectors[result.ok] == right[result.ok]).all()
    assert all("output_gone" in str(error) for error in result.errors.values())
    batch_desk.check_money()


@pytest.mark.fault(72)
def test_counts_that_do_not_add_up_are_a_warning_and_the_lines_are_believed(
    batch_desk: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batch_desk.service.settings.quirks.counts = "wrong"
    job = batch_desk.work(batch_desk.submit(TEXTS))
    batch_desk.check(job, TEXTS)
    assert "there are 6 lines" in caplog.text
    assert len(batch_desk.jobs) == 1


@pytest.mark.fault(72)
@pytest.mark.parametrize("counts", ["honest", "null", "absent"])
def test_missing_lines_are_sent_again_whatever_the_counts_say(
    batch_desk: Any, counts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="embedcore")
    batch_desk.service.settings.quirks.counts = counts
    job = batch_desk.submit(TEXTS)
    batch_desk.service.finish(batch_desk.jobs[0].id, done=4)
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    assert [texts_in(batch_desk, remote) for remote in batch_desk.jobs] == [6, 2]
    batch_desk.check_money()


def test_texts_without_a_result_end_with_a_reason_after_so_many_jobs(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"attempts": 3})
    batch_desk.work(
        job,
        meanwhile=lambda: [
            batch_desk.service.expire(one.id, done=0) for one in batch_desk.jobs if not one.ended
        ],
    )
    assert len(batch_desk.jobs) == 3
    with pytest.raises(BatchEmbeddingFailed) as failed:
        job.result()
    assert failed.value.jobs
    assert all("expired" in why for why in failed.value.failures.values())
    assert batch_desk.spent().spent == batch_desk.spent().held == Amount()

    again = batch_desk.submit(TEXTS)
    batch_desk.work(again)
    # A new batch tries them again.
    batch_desk.check(again, TEXTS)


def test_a_job_that_goes_on_a_little_each_time_comes_to_its_end(batch_desk: Any) -> None:
    """Progress is no failed attempt: otherwise large slow batches would never be complete."""
    job = batch_desk.submit(TEXTS, batch={"attempts": 2})
    batch_desk.work(
        job,
        meanwhile=lambda: [
            batch_desk.service.finish(one.id, done=1) for one in batch_desk.jobs if not one.ended
        ],
    )
    batch_desk.check(job, TEXTS)
    assert [texts_in(batch_desk, remote) for remote in batch_desk.jobs] == [6, 5, 4, 3, 2, 1]
    batch_desk.check_money()


# Money


@pytest.mark.parametrize(
    ("lines", "usage", "spent", "exact"),
    [
        ([2] * 6, None, 12, True),
        ([2] * 6, 12, 12, True),
        ([1] * 6, None, 6, True),
        ([2] * 6, 30, 30, True),
        ([2] * 6, 3, 12, True),
        ([None] * 6, 9, 9, True),
        ([None] * 6, None, 12, False),
        ([1, 1, 1, None, None, None], None, 9, False),
        ([2] * 6, 0, 12, True),
        ([2] * 6, -5, 12, True),
        ([2] * 6, 2**60, 12, True),
    ],
)
def test_the_money_is_settled_by_the_lines_or_by_what_the_job_says(
    batch_desk: Any, lines: Any, usage: int | None, spent: int, exact: bool
) -> None:
    batch_desk.strategy.results = lambda job_id: iter(batch_desk.named(0, outcomes(*lines)))
    status = batch_desk.strategy.poll
    batch_desk.strategy.poll = lambda job_id: replace(status(job_id), tokens=usage)
    job = batch_desk.work(batch_desk.submit(TEXTS))
    batch_desk.check(job, TEXTS)
    used = job.status().usage
    assert (used.tokens, used.cost, used.exact) == (spent, in_dollars(spent * 10_000), exact)
    assert used.unconfirmed_tokens == 0
    assert batch_desk.spent().spent.tokens == spent
    assert batch_desk.spent().held == Amount()


@pytest.mark.fault(83)
def test_a_price_that_changes_meanwhile_changes_nothing(batch_desk: Any) -> None:
    name = batch_desk.submit(TEXTS).id
    batch_desk.embedder.info = replace(
        batch_desk.embedder.info, price=Price(immediate=Decimal(2), batch=Decimal(1))
    )
    job = batch_desk.client().batch_job(name)
    batch_desk.work(job)
    assert job.status().usage.cost == in_dollars(12 * 10_000)


def test_a_bill_larger_than_what_was_held_is_booked_and_told(batch_desk: Any) -> None:
    batch_desk.strategy.results = lambda job_id: iter(batch_desk.named(0, outcomes(*[5] * 6)))
    job = batch_desk.work(batch_desk.submit(TEXTS, daily=12))
    assert batch_desk.spent().spent.tokens == 30
    (told,) = batch_desk.told(BoundViolated)
    assert (told.reserved, told.billed) == (12, 30)
    batch_desk.check(job, TEXTS)


def test_money_goes_to_the_day_on_which_it_was_held(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, daily=12)
    batch_desk.clock.advance(20 * 3_600)
    batch_desk.finish_all()
    job.advance()
    assert batch_desk.spent("day").spent.tokens == 0
    assert batch_desk.spent("total").spent.tokens == 12
    batch_desk.client(daily=12).embed(["something of today"])


def test_an_error_while_results_are_read_is_an_error_and_not_the_end(batch_desk: Any) -> None:
    batch_desk.provide(settings=BatchSettings(progress=Progress(polls=2)))
    job = batch_desk.submit(TEXTS)
    batch_desk.faults.push("results", error=ProviderUnavailable("503", billed="no"))
    batch_desk.faults.push("results", at=3, error=ValueError("a plugin that breaks"))
    batch_desk.work(job, meanwhile=lambda: None, seconds=400)
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.fault(79)
def test_results_that_stay_cut_off_end_with_what_could_be_read(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    batch_desk.faults.push(
        "results", error=ProviderUnavailable("cut off", billed="no"), at=4, times=1_000
    )
    for _ in range(40):
        job.advance()
        if job.record.has_ended:
            break
        batch_desk.clock.advance(301)
    assert job.record.state == "done"
    result = job.result(on_error="keep")
    assert result.ok.sum() == 4
    assert all("could not be read" in error.message for error in result.errors.values())
    assert batch_desk.spent().held == Amount()
    assert batch_desk.meter.billed_twice == {}


def test_who_was_billed_more_than_was_counted_holds_more_from_then_on(batch_desk: Any) -> None:
    client = batch_desk.client()
    first = client.submit_batch(TEXTS[:3])
    honest = batch_desk.strategy.results
    batch_desk.strategy.results = lambda _: iter(batch_desk.named(0, outcomes(9, 9, 9)))
    batch_desk.work(first)
    (violated,) = batch_desk.told(BoundViolated)
    assert violated.billed == 27
    batch_desk.strategy.results = honest
    second = client.submit_batch(TEXTS[3:])
    assert second.status(poll=False).reserved_tokens == 27
