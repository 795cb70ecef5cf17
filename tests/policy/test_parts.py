"""One part: what is committed, called, and done when the answer is an error."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import (
    AuthenticationFailed,
    BatchEmbeddingFailed,
    ProviderUnavailable,
    RateLimited,
    RemoteGone,
    RequestTooLarge,
)
from embedcore.testing.batches import BatchSettings, Progress

bureau = run_path(str(Path(__file__).with_name("batch_bureau.py")))["bureau"]

TEXTS = ["one", "two", "three"]


# Polls


@pytest.mark.fault(61)
@pytest.mark.parametrize(
    "error",
    [
        ProviderUnavailable("the gate is closed", status=503),
        RateLimited("slow down"),
        TimeoutError("whatever a plugin raises"),
        AuthenticationFailed("the key was rotated"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_poll_that_fails_changes_nothing(bureau: Any, error: Exception) -> None:
    job = bureau.submit(TEXTS)
    bureau.faults.push("poll", error=error, times=20)
    before = job.status(poll=False)
    for _ in range(10):
        bureau.clock.advance(1)
        job.advance()
    (remote,) = job.status(poll=False).jobs
    assert (remote.id, remote.phase) == (bureau.jobs[0].id, "submitted")
    assert remote.trouble is not None
    assert str(error) in remote.trouble
    assert job.status(poll=False).held_tokens == before.held_tokens
    bureau.faults.clear()
    bureau.work(job, seconds=400)
    assert job.status(poll=False).jobs[0].trouble is None
    bureau.check(job, TEXTS)
    assert len(bureau.jobs) == 1
    bureau.check_money()


@pytest.mark.fault(61)
def test_polls_that_fail_are_spread_further_and_further(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.faults.push("poll", error=ProviderUnavailable("down", billed="no"), times=100)
    asked = []
    bureau.strategy.calls.clear()
    for second in range(0, 2_000, 2):
        bureau.clock.advance(2)
        job.advance()
        if bureau.strategy.calls:
            asked.append(second)
            bureau.strategy.calls.clear()
    waits = [after - before for before, after in pairwise(asked)]
    assert len(asked) < 30
    assert max(waits[:2]) <= 10
    assert all(100 <= wait <= 302 for wait in waits[-3:]), "and never for hours"


def test_what_the_provider_asks_to_wait_is_waited(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.faults.push("poll", error=RateLimited("slow down", retry_after=200.0))
    job.advance()
    bureau.strategy.calls.clear()
    bureau.clock.advance(190)
    job.advance()
    job.status()
    assert bureau.strategy.calls == []
    bureau.clock.advance(11)
    job.advance()
    assert bureau.strategy.calls == ["poll"]


@pytest.mark.fault(81)
def test_a_status_that_nobody_knows_is_not_the_end(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.service.settings.quirks.status_word = "pondering"
    for _ in range(5):
        bureau.clock.advance(600)
        job.advance()
    (remote,) = job.status().jobs
    assert (remote.phase, remote.status) == ("submitted", "pondering")
    bureau.service.settings.quirks.status_word = None
    bureau.work(job)
    bureau.check(job, TEXTS)


@pytest.mark.fault(82)
def test_a_key_that_was_rotated_is_an_error_until_it_is_mended(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    bureau.faults.push("poll", error=AuthenticationFailed("the key is not valid any more"))
    with pytest.raises(AuthenticationFailed, match="not valid any more"):
        job.wait(timeout=30)
    bureau.clock.advance(60)
    bureau.check(job, TEXTS)
    bureau.check_money()


# Jobs that are gone


@pytest.mark.fault(71)
def test_a_job_that_is_gone_is_an_error_and_is_not_created_again(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.service.vanish(bureau.jobs[0].id)
    for _ in range(3):
        with pytest.raises(RemoteGone):
            job.wait(timeout=30)
        bureau.clock.advance(4_000)
    assert len(bureau.jobs) == 1
    report = job.status(poll=False)
    assert report.in_flight == 3
    assert report.held_tokens == 4, "it may be found again, and billed"
    assert report.jobs[0].trouble is not None


@pytest.mark.fault(71)
def test_the_error_comes_only_when_nothing_else_goes_on(bureau: Any) -> None:
    job = bureau.submit(TEXTS, batch={"part_texts": 2})
    bureau.service.vanish(bureau.jobs[0].id)
    assert job.wait(timeout=0.01).state == "running", "the other one is not held up"
    bureau.service.finish(bureau.jobs[1].id)
    bureau.clock.advance(600)
    with pytest.raises(RemoteGone):
        job.wait(timeout=30)
    assert job.status(poll=False).stored == 1


@pytest.mark.fault(71)
def test_a_job_that_is_gone_is_bought_again_for_who_asks_for_it(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.service.vanish(bureau.jobs[0].id)
    job.advance()
    job.resubmit_lost()
    bureau.clock.advance(600)
    bureau.work(
        job, meanwhile=lambda: [bureau.service.finish(j.id) for j in bureau.jobs[1:] if not j.ended]
    )
    bureau.check(job, TEXTS)
    assert len(bureau.jobs) == 2
    assert job.status().usage.uncertain_tokens == 4, "the first one counts as spent"
    bureau.check_money(certain=False)


# Jobs that fail as a whole


@pytest.mark.fault(62)
def test_a_line_that_validation_refuses_is_a_reason_of_its_own_text(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    first = bureau.jobs[0].id
    bureau.service.fail(first, "invalid_value", "this text is not good", line=2)
    bureau.work(
        job, meanwhile=lambda: [bureau.service.finish(j.id) for j in bureau.jobs if not j.ended]
    )
    result = bureau.check(job, TEXTS, without=[1])
    assert "this text is not good" in str(result.errors[1])
    assert [len(bureau.service.input_lines(j.input_file_id)) for j in bureau.jobs] == [3, 2]
    bureau.check_money()


@pytest.mark.fault(62)
def test_a_job_that_always_fails_ends_with_a_reason(bureau: Any) -> None:
    job = bureau.submit(TEXTS, batch={"attempts": 4})
    bureau.work(
        job,
        meanwhile=lambda: [
            bureau.service.fail(j.id, "server_error", "we could not read the file")
            for j in bureau.jobs
            if not j.ended
        ],
    )
    assert len(bureau.jobs) == 4
    with pytest.raises(BatchEmbeddingFailed) as failed:
        job.result()
    assert sorted(failed.value.failures) == [0, 1, 2]
    assert all("could not read the file" in why for why in failed.value.failures.values())
    assert not failed.value.retryable
    bureau.check_money()


def test_a_text_that_is_too_large_for_any_job_gets_that_reason(bureau: Any) -> None:
    job_texts = ["a", "b"]
    bureau.faults.push("upload", error=RequestTooLarge("413: this is too large"))
    job = bureau.submit(job_texts, batch={"part_texts": 1})
    bureau.work(job)
    result = bureau.check(job, job_texts, without=[0])
    assert "too large" in str(result.errors[0])
    bureau.check_money()


# The queue


@pytest.mark.fault(74)
def test_a_full_queue_is_waited_for_visibly_and_is_no_failure(bureau: Any) -> None:
    texts = [f"text {number:02d}" for number in range(6)]
    bureau.provide(settings=BatchSettings(progress=Progress(), enqueued_token_limit=9))
    job = bureau.submit(texts, batch={"part_texts": 2, "attempts": 1})
    bureau.service.step(bureau.jobs[0].id)
    bureau.service.step(bureau.jobs[1].id)
    bureau.service.step(bureau.jobs[2].id)
    assert [one.status for one in bureau.jobs] == ["in_progress", "in_progress", "failed"]
    job.advance()
    report = job.status(poll=False)
    assert report.state == "blocked"
    assert report.blocked is not None
    assert report.blocked.startswith("queue: ")
    assert report.failed == 0
    assert bureau.spent().held.tokens == 12
    bureau.clock.advance(3_600)
    job.advance()
    assert len(bureau.jobs) == 3, "what is known not to fit is not tried"
    bureau.work(job, seconds=1_900)
    bureau.check(job, texts)
    assert len(bureau.jobs) == 4
    assert job.status().blocked is None
    bureau.check_money()


@pytest.mark.fault(74)
def test_a_job_larger_than_the_queue_is_cut_smaller(bureau: Any) -> None:
    texts = [f"text {number:02d}" for number in range(20)]
    bureau.provide(settings=BatchSettings(progress=Progress(polls=2), enqueued_token_limit=10))
    job = bureau.submit(texts, batch={"attempts": 1})
    bureau.work(job, meanwhile=lambda: None, seconds=400, looks=200)
    bureau.check(job, texts)
    assert all(
        len(bureau.service.input_lines(one.input_file_id)) <= 5
        for one in bureau.jobs
        if one.status == "completed"
    )
    bureau.check_money()


@pytest.mark.fault(74)
def test_a_queue_that_never_says_how_much_fits_is_found_out(bureau: Any) -> None:
    texts = [f"text {number:02d}" for number in range(8)]
    job = bureau.submit(texts, batch={"attempts": 1})

    def provider() -> None:
        for one in bureau.jobs:
            if not one.ended:
                small = len(bureau.service.input_lines(one.input_file_id)) <= 2
                if small:
                    bureau.service.finish(one.id)
                else:
                    bureau.service.fail(one.id, message="too much is enqueued")

    bureau.work(job, meanwhile=provider, seconds=1_900)
    bureau.check(job, texts)
    bureau.check_money()


@pytest.mark.fault(74)
def test_a_queue_that_stays_full_is_asked_less_and_less_often(bureau: Any) -> None:
    job = bureau.submit(["a"], batch={"attempts": 50})
    made = []
    for second in range(0, 12_000, 30):
        for one in bureau.jobs:
            if not one.ended:
                bureau.service.fail(one.id, message="too much is enqueued")
                made.append(second)
        job.advance()
        bureau.clock.advance(30)
    waits = [after - before for before, after in pairwise(made)]
    assert waits == sorted(waits)
    assert waits[0] <= 150
    assert 1_500 <= waits[-1] <= 2_000


@pytest.mark.fault(74)
def test_one_text_that_no_queue_takes_ends_with_that_reason(bureau: Any) -> None:
    bureau.provide(settings=BatchSettings(progress=Progress(polls=2), enqueued_token_limit=5))
    job = bureau.submit(["x" * 100, "y"])
    bureau.work(job, meanwhile=lambda: None, seconds=1_900, looks=100)
    result = bureau.check(job, ["x" * 100, "y"], without=[0])
    assert "Enqueued token limit" in str(result.errors[0])
    bureau.check_money()


def test_the_queue_that_was_configured_is_kept(bureau: Any) -> None:
    texts = [f"text {number:02d}" for number in range(6)]
    job = bureau.submit(texts, batch={"enqueued_tokens": 5, "part_texts": 9})
    assert [len(bureau.service.input_lines(one.input_file_id)) for one in bureau.jobs] == [2]
    bureau.work(job)
    assert [len(bureau.service.input_lines(one.input_file_id)) for one in bureau.jobs] == [2] * 3
    bureau.check(job, texts)


# Whoever is at work


@pytest.mark.fault(75)
def test_what_another_process_is_at_work_on_is_left_alone(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    other = bureau.client()
    office = other._office()
    (part,) = office.jobs.live(office.pool)
    owned = office.jobs.take(part)
    assert owned is not None
    bureau.strategy.calls.clear()
    bureau.finish_all()
    job.advance()
    assert bureau.strategy.calls == []
    bureau.clock.advance(121)
    job.advance()
    assert bureau.strategy.calls == ["poll", "results"], "until its lease ends"
    bureau.check(job, TEXTS)


def test_texts_and_keys_are_nowhere_in_the_log(
    bureau: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="embedcore")
    secret = "a text that is nobody's business"
    bureau.faults.push("poll", error=ProviderUnavailable("down", billed="no"))
    bureau.faults.push("create", "after")
    job = bureau.submit([(secret + " (key)", secret)])
    bureau.service.fail(bureau.jobs[0].id, "invalid_value", "not good", line=1)
    bureau.work(job, seconds=400)
    assert "nobody's business" not in caplog.text
    assert "nobody's business" not in repr(bureau.events)
