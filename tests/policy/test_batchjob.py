"""What a caller holds of a batch: ask it, wait for it, read it, end it."""

from __future__ import annotations

import threading
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import BatchEmbeddingFailed, ConfigurationError
from embedcore.policy.engine import Stop
from embedcore.testing.batches import BatchSettings, Progress

bureau = run_path(str(Path(__file__).with_name("batch_bureau.py")))["bureau"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def test_a_report_adds_up_at_every_moment(bureau: Any) -> None:
    bureau.client().embed(TEXTS[:1])
    job = bureau.submit([*TEXTS, TEXTS[2]], batch={"part_texts": 2, "parts": 1})

    def look(**expected: object) -> None:
        report = job.status(poll=False)
        assert report.rows == 7
        assert report.texts == 6
        assert report.reused == 1
        assert report.stored + report.failed + report.to_submit + report.in_flight == 6
        assert {name: getattr(report, name) for name in expected} == expected
        # Rounding leaves at most one picodollar for each text.
        assert report.held_tokens == bureau.spent().held.tokens
        assert report.has_ended is (report.state == "done")

    look(stored=1, in_flight=5, to_submit=0, done=1, state="running", held_tokens=10)
    bureau.service.fail_lines("text 02", message="never")
    bureau.service.step(bureau.jobs[0].id)
    bureau.service.step(bureau.jobs[0].id, done=2)
    job.advance()
    look(stored=1, done=3, failed=0)
    bureau.finish_all()
    job.advance()
    look(stored=2, failed=1, in_flight=3, done=3)
    bureau.work(job)
    look(stored=5, failed=1, in_flight=0, done=6, state="done", held_tokens=0)
    report = job.status()
    assert report.usage.tokens == 8
    assert report.usage.requests == 3
    assert report.usage.exact
    assert report.created <= report.ended
    assert [one.phase for one in report.jobs] == ["done"] * 3


def test_a_status_without_a_poll_needs_no_network(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    calls = len(bureau.strategy.calls)
    job.status(poll=False)
    assert len(bureau.strategy.calls) == calls
    bureau.clock.advance(60)
    job.status()
    assert len(bureau.strategy.calls) > calls


def test_waiting_ends_with_its_time_and_may_be_repeated(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    started = bureau.clock.monotonic()
    report = job.wait(timeout=300, poll_interval=100)
    assert 300 <= bureau.clock.monotonic() - started < 301
    assert report.state == "running"
    bureau.finish_all()
    assert job.wait(timeout=300, poll_interval=100).state == "done"
    assert job.wait(timeout=0).state == "done"


def test_waiting_asks_as_often_as_it_was_told(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.strategy.calls.clear()
    job.wait(timeout=550, poll_interval=200)
    assert 2 <= bureau.strategy.calls.count("poll") <= 4, "and not all the time"


def test_waiting_ends_when_somebody_says_so(bureau: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bureau.submit(TEXTS)
    stop, poll, polls = Stop(), bureau.strategy.poll, []

    def polled(job_id: str) -> Any:
        polls.append(job_id)
        if len(polls) == 3:
            stop.set()
        return poll(job_id)

    monkeypatch.setattr(bureau.strategy, "poll", polled)
    assert job.wait(poll_interval=100, stop=stop).state == "running"
    assert len(polls) == 3


@pytest.mark.parametrize("interval", [0, -1, float("nan")])
def test_an_interval_that_is_none_is_refused(bureau: Any, interval: float) -> None:
    job = bureau.submit(TEXTS)
    with pytest.raises(ConfigurationError, match="poll_interval"):
        job.wait(poll_interval=interval)


def test_a_result_that_is_not_there_in_time_has_what_is(bureau: Any) -> None:
    job = bureau.submit(TEXTS, batch={"part_texts": 2})
    first = bureau.jobs[0].id
    bureau.service.finish(first)
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
    bureau.finish_all()
    bureau.check(job, TEXTS)


def test_how_errors_are_taken_is_what_was_said_at_the_beginning_or_later(bureau: Any) -> None:
    bureau.service.fail_lines("text 03", message="never")
    job = bureau.submit(TEXTS, on_error="keep")
    bureau.work(job)
    assert not job.result().ok.all()
    with pytest.raises(BatchEmbeddingFailed):
        job.result(on_error="raise")
    with pytest.raises(BatchEmbeddingFailed):
        bureau.client().batch_job(job.id).result()


def test_two_threads_that_wait_for_one_batch_both_get_it(bureau: Any) -> None:
    bureau.provide(settings=BatchSettings(progress=Progress(polls=5)))
    job = bureau.submit(TEXTS)
    found: list[bool] = []

    def wait() -> None:
        mine = bureau.last.batch_job(job.id)
        found.append(bool(mine.result(timeout=30, poll_interval=0.02).ok.all()))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [True] * 3
    bureau.check_money()


def test_to_buy_again_what_is_lost_is_too_late_once_it_has_ended(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    bureau.service.vanish_output(bureau.jobs[0].id)
    bureau.work(job)
    with pytest.raises(ConfigurationError, match="resubmit_lost=True"):
        job.resubmit_lost()
    assert "output_gone" in str(job.result(on_error="keep").errors[0])


def test_it_is_shown_without_texts(bureau: Any) -> None:
    job = bureau.submit(["a text that is nobody's business"])
    assert repr(job) == f"BatchJob('{job.id}', open, 1 rows)"
    assert "nobody" not in repr(job.status())


def test_the_fault_of_one_batch_holds_up_no_other(bureau: Any) -> None:
    broken = bureau.submit(TEXTS[:3])
    bureau.service.vanish(bureau.jobs[0].id)
    other = bureau.submit(TEXTS[3:])
    bureau.service.finish(bureau.jobs[1].id)
    client = bureau.client()
    problems = client.resume_batches()
    assert [type(one).__name__ for one in problems] == ["RemoteGone"]
    bureau.check(client.batch_job(other.id), TEXTS[3:])
    assert broken.status(poll=False).state == "running"
