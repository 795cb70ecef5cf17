"""What a caller holds of a batch: ask it, wait for it, read it, end it."""

from __future__ import annotations

import threading
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import BatchEmbeddingFailed, ConfigurationError
from embedcore.policy.engine import Stop
from embedcore.testing.openai.batches import BatchSettings, Progress

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def test_a_report_adds_up_at_every_moment(batch_desk: Any) -> None:
    batch_desk.client().embed(TEXTS[:1])
    job = batch_desk.submit([*TEXTS, TEXTS[2]], batch={"part_texts": 2, "parts": 1})

    def look(**expected: object) -> None:
        report = job.status(poll=False)
        assert report.rows == 7
        assert report.texts == 6
        assert report.reused == 1
        assert report.stored + report.failed + report.to_submit + report.in_flight == 6
        assert {name: getattr(report, name) for name in expected} == expected
        # Rounding leaves at most one picodollar for each text.
        assert report.reserved_tokens == batch_desk.spent().held.tokens
        assert report.has_ended is (report.state == "done")

    look(stored=1, in_flight=5, to_submit=0, done=1, state="running", reserved_tokens=10)
    batch_desk.service.fail_lines("text 02", message="never")
    batch_desk.service.step(batch_desk.jobs[0].id)
    batch_desk.service.step(batch_desk.jobs[0].id, done=2)
    job.advance()
    look(stored=1, done=3, failed=0)
    batch_desk.finish_all()
    job.advance()
    look(stored=2, failed=1, in_flight=3, done=3)
    batch_desk.work(job)
    look(stored=5, failed=1, in_flight=0, done=6, state="done", reserved_tokens=0)
    report = job.status()
    assert report.usage.tokens == 8
    assert report.usage.requests == 3
    assert report.usage.exact
    assert report.created <= report.ended
    assert [one.phase for one in report.jobs] == ["done"] * 3


def test_a_status_without_a_poll_needs_no_network(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    calls = len(batch_desk.strategy.calls)
    job.status(poll=False)
    assert len(batch_desk.strategy.calls) == calls
    batch_desk.clock.advance(60)
    job.status()
    assert len(batch_desk.strategy.calls) > calls


def test_waiting_ends_with_its_time_and_may_be_repeated(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    started = batch_desk.clock.monotonic()
    report = job.wait(timeout=300, poll_interval=100)
    assert 300 <= batch_desk.clock.monotonic() - started < 301
    assert report.state == "running"
    batch_desk.finish_all()
    assert job.wait(timeout=300, poll_interval=100).state == "done"
    assert job.wait(timeout=0).state == "done"


def test_waiting_asks_as_often_as_it_was_told(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.strategy.calls.clear()
    job.wait(timeout=550, poll_interval=200)
    assert 2 <= batch_desk.strategy.calls.count("poll") <= 4, "and not all the time"


def test_waiting_ends_when_somebody_says_so(
    batch_desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = batch_desk.submit(TEXTS)
    stop, poll, polls = Stop(), batch_desk.strategy.poll, []

    def polled(job_id: str) -> Any:
        polls.append(job_id)
        if len(polls) == 3:
            stop.set()
        return poll(job_id)

    monkeypatch.setattr(batch_desk.strategy, "poll", polled)
    assert job.wait(poll_interval=100, stop=stop).state == "running"
    assert len(polls) == 3


@pytest.mark.parametrize("interval", [0, -1, float("nan")])
def test_an_interval_that_is_none_is_refused(batch_desk: Any, interval: float) -> None:
    job = batch_desk.submit(TEXTS)
    with pytest.raises(ConfigurationError, match="poll_interval"):
        job.wait(poll_interval=interval)


def test_a_result_that_is_not_there_in_time_has_what_is(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"part_texts": 2})
    first = batch_desk.jobs[0].id
    batch_desk.service.finish(first)
    with pytest.raises(BatchEmbeddingFailed) as failed:
        job.result(timeout=0.01)
    error = failed.value
    assert error.retryable
    assert first in error.jobs
    assert sorted(error.failures) == [2, 3, 4, 5]
    assert error.result is not None
    assert error.result.ok.tolist() == [True, True, False, False, False, False]
    assert error.partial is error.result
    assert "4 of 6 rows" in str(error)
    batch_desk.finish_all()
    batch_desk.check(job, TEXTS)


def test_how_errors_are_taken_is_what_was_said_at_the_beginning_or_later(batch_desk: Any) -> None:
    batch_desk.service.fail_lines("text 03", message="never")
    job = batch_desk.submit(TEXTS, on_error="keep")
    batch_desk.work(job)
    assert not job.result().ok.all()
    with pytest.raises(BatchEmbeddingFailed):
        job.result(on_error="raise")
    with pytest.raises(BatchEmbeddingFailed):
        batch_desk.client().batch_job(job.id).result()


def test_two_threads_that_wait_for_one_batch_both_get_it(batch_desk: Any) -> None:
    batch_desk.provide(settings=BatchSettings(progress=Progress(polls=5)))
    job = batch_desk.submit(TEXTS)
    found: list[bool] = []

    def wait() -> None:
        mine = batch_desk.last.batch_job(job.id)
        found.append(bool(mine.result(timeout=30, poll_interval=0.02).ok.all()))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [True] * 3
    batch_desk.check_money()


def test_to_buy_again_what_is_lost_is_too_late_once_it_has_ended(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    batch_desk.service.vanish_output(batch_desk.jobs[0].id)
    batch_desk.work(job)
    with pytest.raises(ConfigurationError, match="resubmit_lost=True"):
        job.resubmit_lost()
    assert "output_gone" in str(job.result(on_error="keep").errors[0])


def test_it_is_shown_without_texts(batch_desk: Any) -> None:
    job = batch_desk.submit(["a text that is nobody's business"])
    assert repr(job) == f"BatchJob('{job.id}', open, 1 rows)"
    assert "nobody" not in repr(job.status())


def test_the_fault_of_one_batch_holds_up_no_other(batch_desk: Any) -> None:
    broken = batch_desk.submit(TEXTS[:3])
    batch_desk.service.vanish(batch_desk.jobs[0].id)
    other = batch_desk.submit(TEXTS[3:])
    batch_desk.service.finish(batch_desk.jobs[1].id)
    client = batch_desk.client()
    assert client.resume_batches() == []
    batch_desk.clock.advance(700)
    problems = client.resume_batches()
    assert [type(one).__name__ for one in problems] == ["RemoteGone"]
    batch_desk.check(client.batch_job(other.id), TEXTS[3:])
    assert broken.status(poll=False).state == "running"
