"""A job has ended: what it brought is kept, its money settled, and only the rest sent again."""

from __future__ import annotations

import logging
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from embedcore.errors import BatchEmbeddingFailed, ProviderUnavailable, RemoteGone
from embedcore.events import BoundViolated
from embedcore.provider.types import BatchOutcome, Price
from embedcore.storage.amounts import Amount
from embedcore.testing import vectors_of
from embedcore.testing.batches import BatchSettings, Progress

bureau = run_path(str(Path(__file__).with_name("batch_bureau.py")))["bureau"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def texts_in(bureau: Any, job: Any) -> int:
    return len(bureau.service.input_lines(job.input_file_id))


def outcomes(*tokens: int | None) -> list[BatchOutcome]:
    """A vector for each of the first of ``TEXTS``, with what its line says it cost."""
    vectors = vectors_of(TEXTS, 32)
    return [
        BatchOutcome(id=str(place), vector=vectors[place], tokens=each)
        for place, each in enumerate(tokens)
    ]


@pytest.mark.fault(63)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
    made = bureau.__wrapped__(tmp_path_factory.mktemp("ended"))
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
def test_a_job_that_is_cancelling_for_hours_is_waited_for(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    (first,) = bureau.jobs
    bureau.service.step(first.id)
    bureau.service.step(first.id, done=2)
    bureau.service.cancel(first.id)
    for _ in range(20):
        bureau.clock.advance(600)
        job.advance()
    assert len(bureau.jobs) == 1, "what may still come is not bought again"
    assert job.status(poll=False).in_flight == 6
    bureau.service.end_cancel(first.id)
    job.advance()
    assert job.resubmit_cancelled() == 4
    bureau.work(job)
    bureau.check(job, TEXTS)
    assert texts_in(bureau, bureau.jobs[1]) == 4
    bureau.check_money()


@pytest.mark.fault(65)
def test_a_completed_job_with_only_an_error_file_has_its_reasons_read(bureau: Any) -> None:
    bureau.service.fail_lines("text", status=400, message="this is not allowed")
    job = bureau.submit(TEXTS)
    bureau.work(job)
    assert bureau.jobs[0].output_file_id is None
    result = bureau.check(job, TEXTS, without=range(6))
    assert all("this is not allowed" in str(error) for error in result.errors.values())
    assert len(bureau.jobs) == 1, "what can never work is not tried again"
    assert bureau.spent().spent == bureau.spent().held == Amount()


@pytest.mark.fault(70)
def test_results_that_are_gone_are_paid_and_not_bought_again(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    bureau.service.vanish_output(bureau.jobs[0].id)
    bureau.work(job)
    result = bureau.check(job, TEXTS, without=range(6))
    assert all("output_gone" in str(error) for error in result.errors.values())
    assert len(bureau.jobs) == 1
    assert bureau.spent().spent.tokens == 12
    assert bureau.spent().held == Amount()

    again = bureau.submit(TEXTS)
    assert again.record.has_ended, "nor by the next batch"
    assert "output_gone" in str(bureau.check(again, TEXTS, without=range(6)).errors[3])
    assert len(bureau.jobs) == 1

    wanted = bureau.submit(TEXTS, resubmit_lost=True)
    bureau.work(wanted)
    bureau.check(wanted, TEXTS)
    assert len(bureau.jobs) == 2
    # Vectors belong to texts: the first batch has them by now as well.
    bureau.check(job, TEXTS)


@pytest.mark.fault(70)
def test_who_said_so_before_has_lost_results_bought_again_at_once(bureau: Any) -> None:
    job = bureau.submit(TEXTS, resubmit_lost=True, batch={"attempts": 3})
    bureau.finish_all()
    bureau.service.vanish_output(bureau.jobs[0].id)
    job.advance()
    bureau.work(job)
    bureau.check(job, TEXTS)
    assert len(bureau.jobs) == 2
    assert bureau.spent().spent.tokens == 24


@pytest.mark.fault(70)
def test_results_that_vanish_while_they_are_read_keep_what_was_read(bureau: Any) -> None:
    texts = [f"text {number}" for number in range(1_000)]
    job = bureau.submit(texts)
    bureau.finish_all()
    bureau.faults.push("results", at=700, error=RemoteGone("404: no such file"), times=1_000)
    bureau.work(job)
    result = job.result(on_error="keep")
    assert 512 <= int(result.ok.sum()) <= 700
    right = vectors_of(texts, 32)
    assert (result.vectors[result.ok] == right[result.ok]).all()
    assert all("output_gone" in str(error) for error in result.errors.values())
    bureau.check_money()


@pytest.mark.fault(72)
def test_counts_that_do_not_add_up_are_a_warning_and_the_lines_are_believed(
    bureau: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bureau.service.settings.quirks.counts = "wrong"
    job = bureau.work(bureau.submit(TEXTS))
    bureau.check(job, TEXTS)
    assert "there are 6 lines" in caplog.text
    assert len(bureau.jobs) == 1


@pytest.mark.fault(72)
@pytest.mark.parametrize("counts", ["honest", "null", "absent"])
def test_missing_lines_are_sent_again_whatever_the_counts_say(
    bureau: Any, counts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="embedcore")
    bureau.service.settings.quirks.counts = counts
    job = bureau.submit(TEXTS)
    bureau.service.finish(bureau.jobs[0].id, done=4)
    bureau.work(job)
    bureau.check(job, TEXTS)
    assert [texts_in(bureau, remote) for remote in bureau.jobs] == [6, 2]
    bureau.check_money()


def test_texts_without_a_result_end_with_a_reason_after_so_many_jobs(bureau: Any) -> None:
    job = bureau.submit(TEXTS, batch={"attempts": 3})
    bureau.work(
        job,
        meanwhile=lambda: [
            bureau.service.expire(one.id, done=0) for one in bureau.jobs if not one.ended
        ],
    )
    assert len(bureau.jobs) == 3
    with pytest.raises(BatchEmbeddingFailed) as failed:
        job.result()
    assert failed.value.jobs
    assert all("expired" in why for why in failed.value.failures.values())
    assert bureau.spent().spent == bureau.spent().held == Amount()

    again = bureau.submit(TEXTS)
    bureau.work(again)
    # A new batch tries them again.
    bureau.check(again, TEXTS)


def test_a_job_that_goes_on_a_little_each_time_comes_to_its_end(bureau: Any) -> None:
    """Progress is no failed attempt: otherwise large slow batches would never be complete."""
    job = bureau.submit(TEXTS, batch={"attempts": 2})
    bureau.work(
        job,
        meanwhile=lambda: [
            bureau.service.finish(one.id, done=1) for one in bureau.jobs if not one.ended
        ],
    )
    bureau.check(job, TEXTS)
    assert [texts_in(bureau, remote) for remote in bureau.jobs] == [6, 5, 4, 3, 2, 1]
    bureau.check_money()


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
    bureau: Any, lines: Any, usage: int | None, spent: int, exact: bool
) -> None:
    bureau.strategy.results = lambda job_id: iter(bureau.named(0, outcomes(*lines)))
    status = bureau.strategy.poll
    bureau.strategy.poll = lambda job_id: replace(status(job_id), tokens=usage)
    job = bureau.work(bureau.submit(TEXTS))
    bureau.check(job, TEXTS)
    used = job.status().usage
    assert (used.tokens, used.picodollars, used.exact) == (spent, spent * 10_000, exact)
    assert used.uncertain_tokens == 0
    assert bureau.spent().spent.tokens == spent
    assert bureau.spent().held == Amount()


@pytest.mark.fault(83)
def test_a_price_that_changes_meanwhile_changes_nothing(bureau: Any) -> None:
    name = bureau.submit(TEXTS).id
    bureau.embedder.info = replace(
        bureau.embedder.info, price=Price(immediate=Decimal(2), batch=Decimal(1))
    )
    job = bureau.client().batch_job(name)
    bureau.work(job)
    assert job.status().usage.picodollars == 12 * 10_000


def test_a_bill_larger_than_what_was_held_is_booked_and_told(bureau: Any) -> None:
    bureau.strategy.results = lambda job_id: iter(bureau.named(0, outcomes(*[5] * 6)))
    job = bureau.work(bureau.submit(TEXTS, daily=12))
    assert bureau.spent().spent.tokens == 30
    (told,) = bureau.told(BoundViolated)
    assert (told.held, told.billed) == (12, 30)
    bureau.check(job, TEXTS)


def test_money_goes_to_the_day_on_which_it_was_held(bureau: Any) -> None:
    job = bureau.submit(TEXTS, daily=12)
    bureau.clock.advance(20 * 3_600)
    bureau.finish_all()
    job.advance()
    assert bureau.spent("day").spent.tokens == 0
    assert bureau.spent("total").spent.tokens == 12
    bureau.client(daily=12).embed(["something of today"])


def test_an_error_while_results_are_read_is_an_error_and_not_the_end(bureau: Any) -> None:
    bureau.provide(settings=BatchSettings(progress=Progress(polls=2)))
    job = bureau.submit(TEXTS)
    bureau.faults.push("results", error=ProviderUnavailable("503", billed="no"))
    bureau.faults.push("results", at=3, error=ValueError("a plugin that breaks"))
    bureau.work(job, meanwhile=lambda: None, seconds=400)
    bureau.check(job, TEXTS)
    assert len(bureau.jobs) == 1
    bureau.check_money()


@pytest.mark.fault(79)
def test_results_that_stay_cut_off_end_with_what_could_be_read(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    bureau.faults.push(
        "results", error=ProviderUnavailable("cut off", billed="no"), at=4, times=1_000
    )
    for _ in range(40):
        job.advance()
        if job.record.has_ended:
            break
        bureau.clock.advance(301)
    assert job.record.state == "done"
    result = job.result(on_error="keep")
    assert result.ok.sum() == 4
    assert all("could not be read" in error.message for error in result.errors.values())
    assert bureau.spent().held == Amount()
    assert bureau.meter.billed_twice == {}


def test_who_was_billed_more_than_was_counted_holds_more_from_then_on(bureau: Any) -> None:
    client = bureau.client()
    first = client.submit_batch(TEXTS[:3])
    honest = bureau.strategy.results
    bureau.strategy.results = lambda _: iter(bureau.named(0, outcomes(9, 9, 9)))
    bureau.work(first)
    (violated,) = bureau.told(BoundViolated)
    assert violated.billed == 27
    bureau.strategy.results = honest
    second = client.submit_batch(TEXTS[3:])
    assert second.status(poll=False).held_tokens == 27
