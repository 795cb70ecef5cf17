"""Somebody cancels a job at the provider: what it did is kept, and nothing starts anew."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import BatchEmbeddingFailed, ConfigurationError, PermanentProviderError
from embedcore.events import BatchStopped
from embedcore.storage.amounts import Amount
from embedcore.testing.openai.batches import BatchSettings, Progress

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def cancelled_elsewhere(batch_desk: Any, *, done: int = 2, number: int = 0) -> None:
    remote = batch_desk.jobs[number]
    batch_desk.service.step(remote.id)
    batch_desk.service.cancel(remote.id)
    batch_desk.service.end_cancel(remote.id, done=done)


@pytest.mark.case("E6")
@pytest.mark.fault(64)
@pytest.mark.parametrize(
    ("word", "counts", "done"),
    # The word is read where the job's state is, before anything else is asked of it.
    [
        *[("cancelled", counts, done) for counts in ("honest", "absent") for done in (0, 2, 6)],
        ("canceled", "honest", 2),
        ("CANCELED", "absent", 2),
    ],
)
def test_what_was_done_is_kept_and_the_rest_waits_for_a_person(
    batch_desk: Any, done: int, counts: Any, word: str
) -> None:
    batch_desk.service.settings.quirks.counts = counts
    batch_desk.service.settings.quirks.words = {"cancelled": word}
    job = batch_desk.submit(TEXTS)
    cancelled_elsewhere(batch_desk, done=done)
    for _ in range(30):
        job.advance()
        batch_desk.clock.advance(61)
    assert len(batch_desk.jobs) == 1, "it is never created again by itself"
    report = job.status(poll=False)
    assert (report.stored, report.stopped) == (done, 6 - done)
    assert batch_desk.spent().spent.tokens == 2 * done
    assert batch_desk.spent().held == Amount(), "what is not going to be sent is not held"
    if done == 6:
        assert report.state == "done"
        return
    assert report.state == "blocked"
    assert report.blocked is not None
    assert report.blocked.startswith("cancelled: ")
    (told,) = batch_desk.told(BatchStopped)
    assert (told.batch, told.job, told.texts) == (job.id, batch_desk.jobs[0].id, 6 - done)

    assert job.resubmit_cancelled() == 6 - done
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    assert [len(batch_desk.service.input_lines(one.input_file_id)) for one in batch_desk.jobs] == [
        6,
        6 - done,
    ]
    batch_desk.check_money()


@pytest.mark.case("E6")
def test_result_does_not_wait_for_ever_and_names_both_ways_on(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    cancelled_elsewhere(batch_desk)
    with pytest.raises(PermanentProviderError) as raised:
        job.result(poll_interval=0.01)
    for way in (f"--resubmit-cancelled {job.id}", f"cancel {job.id}", "resubmit_cancelled()"):
        assert way in str(raised.value)
    with pytest.raises(PermanentProviderError):
        job.wait()
    assert len(batch_desk.jobs) == 1
    assert job.cancel().state == "cancelled"
    with pytest.raises(BatchEmbeddingFailed) as failed:
        job.result()
    assert len(failed.value.failures) == 4
    with pytest.raises(ConfigurationError, match="has ended"):
        job.resubmit_cancelled()


@pytest.mark.case("E6")
def test_other_jobs_of_the_batch_go_on(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"part_texts": 3})
    cancelled_elsewhere(batch_desk, done=0)
    assert job.wait(timeout=0.01, poll_interval=0.01).state == "blocked", "no error yet"
    batch_desk.service.finish(batch_desk.jobs[1].id)
    with pytest.raises(PermanentProviderError):
        job.wait()
    assert job.status(poll=False).stored == 3


@pytest.mark.case("E6")
def test_a_new_batch_of_the_same_texts_does_not_start_them_either(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    cancelled_elsewhere(batch_desk)
    job.advance()
    with pytest.raises(PermanentProviderError, match="cancelled at the provider"):
        batch_desk.submit(TEXTS)
    assert len(batch_desk.jobs) == 1
    more = batch_desk.submit([*TEXTS, "another"])
    assert len(batch_desk.service.input_lines(batch_desk.jobs[1].input_file_id)) == 1
    assert more.status(poll=False).stopped == 4
    assert more.resubmit_cancelled() == 4, "whoever says so says it for all"
    batch_desk.work(more)
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E6")
def test_texts_that_nobody_wants_any_more_are_like_new_for_the_next(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    cancelled_elsewhere(batch_desk)
    job.advance()
    job.cancel()
    again = batch_desk.work(batch_desk.submit(TEXTS))
    batch_desk.check(again, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E6")
def test_texts_that_were_billed_elsewhere_need_no_answer(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, cache=True)
    cancelled_elsewhere(batch_desk)
    job.advance()
    batch_desk.client(cache=True).embed(TEXTS)
    job.advance()
    assert job.record.state == "done"
    batch_desk.check(job, TEXTS)


@pytest.mark.case("E6")
def test_what_embedcore_cancelled_itself_is_sent_again_for_the_next(batch_desk: Any) -> None:
    """Nobody waited for it any more, and before it stopped somebody did."""
    job = batch_desk.submit(TEXTS)
    batch_desk.service.step(batch_desk.jobs[0].id)
    job.cancel()
    assert batch_desk.jobs[0].status == "cancelling"
    other = batch_desk.submit(TEXTS[:3])
    assert len(batch_desk.jobs) == 1
    batch_desk.service.end_cancel(batch_desk.jobs[0].id, done=1)
    batch_desk.work(other)
    assert len(batch_desk.jobs) == 2
    batch_desk.check(other, TEXTS[:3])
    assert batch_desk.told(BatchStopped) == []
    batch_desk.check_money()


@pytest.mark.case("E6")
def test_it_is_no_failed_attempt(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"attempts": 1})
    for number in range(4):
        cancelled_elsewhere(batch_desk, done=0, number=number)
        job.advance()
        job.resubmit_cancelled()
        job.advance()
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)


@pytest.mark.case("E6")
def test_the_deadline_of_auto_does_not_start_them_either(batch_desk: Any) -> None:
    batch_desk.provide(settings=BatchSettings(progress=Progress()))
    config = {"batch": {"small_texts": 0, "quickest": 1.0, "drain_before": 100.0}}
    client = batch_desk.client(**config)
    job = client.submit_batch(TEXTS, strategy="auto", deadline=3_000)
    cancelled_elsewhere(batch_desk)
    job.advance()
    batch_desk.clock.advance(2_950)
    job.advance()
    assert batch_desk.embedder.meter.billed_tokens == 0
    assert job.status(poll=False).stopped == 4
