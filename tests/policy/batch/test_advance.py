"""The recipe for "within a day": whatever is due, in whichever process, however often."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import BudgetExceeded, TokenBudgetExceeded
from embedcore.events import BatchChanged, BatchWaits, Progress
from embedcore.money import in_dollars
from embedcore.testing.openai.batches import BatchSettings, Progress as Pace

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

DAY = 86_400.0


def texts_of(count: int, *, first: int = 0) -> list[str]:
    """Different texts of two tokens each."""
    return [f"text {number:02d}" for number in range(first, first + count)]


def test_everything_is_billed_once_and_every_row_gets_its_own_vector(batch_desk: Any) -> None:
    texts = [*texts_of(7), *texts_of(3), "another one"]
    job = batch_desk.submit(texts, batch={"part_texts": 3})
    assert len(batch_desk.jobs) == 3
    batch_desk.work(job)
    result = batch_desk.check(job, texts)
    assert result.reused.tolist() == [False] * 7 + [True] * 3 + [False]
    assert batch_desk.meter.billed_texts == dict.fromkeys(texts, 1)
    batch_desk.check_money()


@pytest.mark.fault(76)
@pytest.mark.parametrize("days", [0.5, 3.0])
def test_any_other_process_goes_on_with_it_later(batch_desk: Any, days: float) -> None:
    texts = texts_of(5)
    name = batch_desk.submit(texts, batch={"part_texts": 2}).id
    batch_desk.last.close()
    for job in batch_desk.jobs[:2]:
        batch_desk.service.finish(job.id)
    batch_desk.clock.advance(days * DAY)
    job = batch_desk.client(batch={"part_texts": 2}).batch_job(name)
    batch_desk.work(job)
    batch_desk.check(job, texts)
    # The third job has expired in the meantime, without a line that was run.
    assert len(batch_desk.jobs) == (3 if days < 1 else 4)
    batch_desk.check_money()


def test_two_batches_with_the_same_texts_share_their_jobs(batch_desk: Any) -> None:
    one = batch_desk.submit(texts_of(4))
    other = batch_desk.submit(texts_of(6))
    assert [
        len(batch_desk.strategy.service.input_lines(job.input_file_id)) for job in batch_desk.jobs
    ] == [
        4,
        2,
    ]
    batch_desk.work(one)
    batch_desk.work(other)
    batch_desk.check(one, texts_of(4))
    batch_desk.check(other, texts_of(6))
    batch_desk.check_money()


@pytest.mark.fault(75)
def test_two_clients_that_look_at_once_do_everything_once(batch_desk: Any) -> None:
    batch_desk.provide(settings=BatchSettings(progress=Pace(polls=6)))
    texts = texts_of(12)
    jobs = [batch_desk.submit(texts, batch={"part_texts": 4}) for _ in range(3)]
    failed: list[Exception] = []

    def look(job: Any) -> None:
        try:
            while not job.record.has_ended:
                job.advance()
        except Exception as error:  # noqa: BLE001 - whatever it is, the test tells of it
            failed.append(error)

    threads = [threading.Thread(target=look, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failed, failed
    for job in jobs:
        batch_desk.check(job, texts)
    assert len(batch_desk.jobs) == 3
    batch_desk.check_money()


def test_as_many_jobs_as_are_allowed_and_never_more(batch_desk: Any) -> None:
    job = batch_desk.submit(texts_of(7), batch={"part_texts": 1, "parts": 2})
    most = 0

    def one() -> None:
        nonlocal most
        at_work = [job for job in batch_desk.jobs if not job.ended]
        most = max(most, len(at_work))
        batch_desk.service.finish(at_work[0].id)

    batch_desk.work(job, meanwhile=one)
    assert most == 2
    assert len(batch_desk.jobs) == 7


# Cancelling


def test_cancelling_stops_the_job_and_keeps_what_was_done(batch_desk: Any) -> None:
    texts = texts_of(6)
    job = batch_desk.submit(texts)
    (remote,) = batch_desk.jobs
    batch_desk.service.step(remote.id, done=0)
    batch_desk.service.step(remote.id, done=2)
    assert job.cancel().state == "cancelling"
    assert remote.status == "cancelling"
    batch_desk.work(job, meanwhile=lambda: remote.ended or batch_desk.service.end_cancel(remote.id))
    report = job.status()
    assert (report.state, report.stored, report.failed) == ("cancelled", 2, 4)
    done = {int(text[-2:]) for text in batch_desk.meter.billed_texts}
    result = batch_desk.check(job, texts, without=sorted(set(range(6)) - done))
    assert "cancelled" in str(next(iter(result.errors.values())))
    assert len(batch_desk.jobs) == 1, "what was not done is not submitted again"
    batch_desk.check_money()


def test_cancelling_detaches_where_another_waits(batch_desk: Any) -> None:
    """Also from what is not sent yet: the texts must not be lost with the batch that had them."""
    texts = texts_of(6)
    one = batch_desk.submit(texts, batch={"part_texts": 2, "parts": 1})
    other = batch_desk.submit(texts, batch={"part_texts": 2, "parts": 1})
    assert one.cancel().state == "cancelled"
    assert not any(job.status == "cancelling" for job in batch_desk.jobs)
    batch_desk.work(other)
    batch_desk.check(other, texts)
    batch_desk.check_money()


def test_abandoning_leaves_others_what_they_wait_for(batch_desk: Any) -> None:
    texts = texts_of(6)
    one = batch_desk.submit(texts, batch={"part_texts": 2, "parts": 1})
    other = batch_desk.submit(texts[:4], batch={"part_texts": 2, "parts": 1})
    assert one.forget().state == "abandoned"
    batch_desk.work(other)
    batch_desk.check(other, texts[:4])
    batch_desk.check_money()


def test_abandoning_ends_it_at_once_and_counts_what_is_unconfirmed_as_spent(
    batch_desk: Any,
) -> None:
    texts = texts_of(4)
    job = batch_desk.submit(texts, batch={"part_texts": 3, "parts": 1})
    calls = len(batch_desk.strategy.calls)
    report = job.forget()
    assert report.state == "abandoned"
    assert len(batch_desk.strategy.calls) == calls, "nobody is asked"
    # Three texts were in a job, which may go on; the fourth was not sent.
    assert (report.usage.tokens, report.usage.unconfirmed_tokens, report.reserved_tokens) == (
        6,
        6,
        0,
    )
    assert batch_desk.spent().spent.tokens == 6
    result = batch_desk.check(job, texts, without=range(4))
    assert "forgotten" in str(result.errors[0])


@pytest.mark.parametrize("end", ["cancel", "forget"])
def test_an_end_is_an_end(batch_desk: Any, end: str) -> None:
    job = batch_desk.submit(texts_of(2))
    batch_desk.work(job)
    before = job.status()
    assert getattr(job, end)() == before
    assert before.state == "done"


# Budget


def test_what_does_not_fit_the_budget_is_refused_as_a_whole(batch_desk: Any) -> None:
    client = batch_desk.client(daily=9, batch={"part_texts": 1})
    with pytest.raises(TokenBudgetExceeded) as refused:
        client.submit_batch(texts_of(5))
    assert (refused.value.asked, refused.value.limit) == (10, 9)
    assert batch_desk.strategy.calls == []
    assert client.batch_jobs() == []
    assert batch_desk.files == []
    assert batch_desk.spent().held.tokens == batch_desk.spent().spent.tokens == 0


def test_money_is_held_at_the_batch_price_before_anything_is_sent(batch_desk: Any) -> None:
    seen = []
    upload = batch_desk.strategy.upload

    def watched(items: Any, *, key: str) -> str:
        seen.append(batch_desk.spent().held)
        return str(upload(items, key=key))

    batch_desk.strategy.upload = watched
    job = batch_desk.submit(texts_of(4), batch={"part_texts": 2})
    # 0.01 dollars per million tokens are 10,000 picodollars for one.
    assert {held.tokens for held in seen} == {8}
    assert all(80_000 <= held.cost <= 80_004 for held in seen)
    batch_desk.work(job)
    assert (batch_desk.spent().spent.tokens, batch_desk.spent().spent.cost) == (8, 80_000)


@settings(max_examples=settings.default.max_examples // 6, deadline=None)
@given(count=st.integers(1, 9), daily=st.integers(2, 20), part=st.integers(1, 9))
def test_what_fits_is_submitted_now_and_the_rest_on_later_days(
    tmp_path_factory: pytest.TempPathFactory, count: int, daily: int, part: int
) -> None:
    made = batch_desk.__wrapped__(tmp_path_factory.mktemp("days"))
    one = next(made)
    texts = texts_of(count)
    job = one.submit(texts, daily=daily, batch={"part_texts": part}, on_budget="wait")
    assert one.spent().held.tokens == min(daily // 2, count) * 2, "as much as fits, and no more"
    days = 0
    while not job.record.has_ended:
        days += 1
        assert days <= -(-count // (daily // 2)), "no day is wasted"
        for _ in range(4):
            one.finish_all()
            job.advance()
            one.clock.advance(61)
        assert one.spent("day").spent.tokens <= daily
        one.clock.advance(DAY - 4 * 61)
    one.check(job, texts)
    one.check_money()
    made.close()


def test_waiting_for_the_budget_is_visible_and_ends_when_the_limit_is_raised(
    batch_desk: Any,
) -> None:
    texts = texts_of(6)
    job = batch_desk.submit(texts, daily=8, batch={"part_texts": 2}, on_budget="wait")
    report = job.status()
    assert report.state == "blocked"
    assert report.blocked is not None
    assert report.blocked.startswith("budget: ")
    assert report.to_submit == 2
    (waits,) = batch_desk.told(BatchWaits)
    assert (waits.batch, waits.until) == (job.id, waits.until)
    assert waits.until.isoformat() == "2026-01-16T00:00:00+00:00"
    raised = batch_desk.client(daily=100, batch={"part_texts": 2}).batch_job(job.id)
    batch_desk.clock.advance(61)
    batch_desk.work(raised)
    assert raised.status().blocked is None
    batch_desk.check(raised, texts)
    assert len(batch_desk.told(BatchWaits)) == 1, "it is told once"


def test_one_text_that_never_fits_is_an_error_and_not_a_wait(batch_desk: Any) -> None:
    client = batch_desk.client(daily=1)
    with pytest.raises(BudgetExceeded) as refused:
        client.submit_batch(texts_of(3), on_budget="wait")
    assert refused.value.never_fits
    assert client.batch_jobs() == []
    assert batch_desk.files == []


def test_what_was_billed_while_it_waited_is_not_billed_again(batch_desk: Any) -> None:
    texts = texts_of(4)
    job = batch_desk.submit(texts, daily=4, on_budget="wait")
    batch_desk.client(daily=100).embed(texts[2:])
    batch_desk.clock.advance(DAY)
    batch_desk.work(job)
    batch_desk.check(job, texts)
    assert batch_desk.meter.billed_texts == dict.fromkeys(texts[:2], 1)


def test_what_expired_needs_the_budget_of_the_day_on_which_it_is_sent_again(
    batch_desk: Any,
) -> None:
    texts = texts_of(3)
    job = batch_desk.submit(texts, daily=6)
    batch_desk.clock.advance(DAY)
    client = batch_desk.client(daily=6)
    client.embed(["something else"])
    batch_desk.service.expire(batch_desk.jobs[0].id)
    job.advance()
    assert job.status(poll=False).state == "blocked"
    batch_desk.clock.advance(DAY)
    batch_desk.work(job)
    batch_desk.check(job, texts)
    assert batch_desk.meter.billed_twice == {}


# What is told


def test_every_change_is_told_and_logged(batch_desk: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="embedcore")
    job = batch_desk.submit(texts_of(4))
    (remote,) = batch_desk.jobs
    for done in (0, 1, 1, 3):
        batch_desk.service.step(remote.id, done=done)
        job.advance()
    batch_desk.work(job)
    lines = [one.getMessage() for one in caplog.records if one.getMessage().startswith("Batch ")]
    mine = f"Batch {remote.id}"
    assert lines == [
        f"{mine}: validating (0/4 complete)",
        f"{mine}: in_progress (0/4 complete)",
        f"{mine}: in_progress (1/4 complete)",
        f"{mine}: in_progress (3/4 complete)",
        f"{mine}: completed (4/4 complete)",
    ]
    changes = batch_desk.told(BatchChanged)
    assert [(one.job, one.status, one.completed, one.total) for one in changes[1:3]] == [
        (remote.id, "in_progress", 0, 4),
        (remote.id, "in_progress", 1, 4),
    ]


def test_progress_counts_texts_and_never_goes_back(batch_desk: Any) -> None:
    seen: list[Progress] = []
    texts = texts_of(6)
    job = batch_desk.submit([*texts, texts[0]], batch={"part_texts": 2}, progress=seen.append)
    for remote in batch_desk.jobs:
        batch_desk.service.step(remote.id, done=0)
        batch_desk.service.step(remote.id, done=1)
        job.advance()
    batch_desk.work(job)
    done = [one.done for one in seen]
    assert done == sorted(done)
    assert {0, 3, 6} <= set(done)
    assert {one.total for one in seen} == {6}
    assert (seen[-1].tokens, seen[-1].cost) == (12, in_dollars(120_000))


@pytest.mark.fault(91)
def test_what_a_wrong_clock_put_off_is_due_again_once_it_is_repaired(batch_desk: Any) -> None:
    texts = ["a", "b", "c"]
    job = batch_desk.submit(texts)
    ledger = batch_desk.last._engine.account.ledger
    now = batch_desk.clock.time() + 60
    batch_desk.clock.advance(40 * 86_400)
    batch_desk.faults.push("poll", "before")
    job.advance()
    ledger._clock = lambda: now
    ledger.repair_clock()
    context = batch_desk.last._context()
    (part,) = context.jobs.of_batch(job.record)
    assert part.trouble is not None
    assert part.next <= context.jobs.now()
    job.advance()
    assert context.jobs.again(part).trouble is None
