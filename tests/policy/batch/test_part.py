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
    InvalidResponse,
    ProviderUnavailable,
    RateLimited,
    RemoteGone,
    RequestTooLarge,
)
from embedcore.testing.openai.batches import BatchSettings, Progress

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

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
def test_a_poll_that_fails_changes_nothing(batch_desk: Any, error: Exception) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.faults.push("poll", error=error, times=20)
    before = job.status(poll=False)
    for _ in range(10):
        batch_desk.clock.advance(1)
        job.advance()
    (remote,) = job.status(poll=False).jobs
    assert (remote.id, remote.phase) == (batch_desk.jobs[0].id, "submitted")
    assert remote.trouble is not None
    assert str(error) in remote.trouble
    assert job.status(poll=False).reserved_tokens == before.reserved_tokens
    batch_desk.faults.clear()
    batch_desk.work(job, seconds=400)
    assert job.status(poll=False).jobs[0].trouble is None
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.fault(61)
def test_polls_that_fail_are_spread_further_and_further(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.faults.push("poll", error=ProviderUnavailable("down", billed="no"), times=100)
    asked = []
    batch_desk.strategy.calls.clear()
    for second in range(0, 2_000, 2):
        batch_desk.clock.advance(2)
        job.advance()
        if batch_desk.strategy.calls:
            asked.append(second)
            batch_desk.strategy.calls.clear()
    waits = [after - before for before, after in pairwise(asked)]
    assert len(asked) < 30
    assert max(waits[:2]) <= 10
    assert all(100 <= wait <= 302 for wait in waits[-3:]), "and never for hours"


def test_what_the_provider_asks_to_wait_is_waited(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.faults.push("poll", error=RateLimited("slow down", retry_after=200.0))
    job.advance()
    batch_desk.strategy.calls.clear()
    batch_desk.clock.advance(190)
    job.advance()
    job.status()
    assert batch_desk.strategy.calls == []
    batch_desk.clock.advance(11)
    job.advance()
    assert batch_desk.strategy.calls == ["poll"]


@pytest.mark.fault(81)
def test_a_status_that_nobody_knows_is_not_the_end(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.service.settings.quirks.status_word = "pondering"
    for _ in range(5):
        batch_desk.clock.advance(600)
        job.advance()
    (remote,) = job.status().jobs
    assert (remote.phase, remote.status) == ("submitted", "pondering")
    batch_desk.service.settings.quirks.status_word = None
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)


@pytest.mark.fault(82)
def test_a_key_that_was_rotated_is_an_error_until_it_is_mended(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    batch_desk.faults.push("poll", error=AuthenticationFailed("the key is not valid any more"))
    with pytest.raises(AuthenticationFailed, match="not valid any more"):
        job.wait(timeout=30)
    batch_desk.clock.advance(60)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


# Parts that are gone


@pytest.mark.fault(71)
def test_a_job_that_is_gone_is_an_error_and_is_not_created_again(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.service.vanish(batch_desk.jobs[0].id)
    assert job.wait(timeout=590).state == "running", "it is looked for, first"
    for _ in range(3):
        with pytest.raises(RemoteGone):
            job.wait(timeout=60)
        batch_desk.clock.advance(4_000)
    assert len(batch_desk.jobs) == 1
    report = job.status(poll=False)
    assert report.in_flight == 3
    assert report.reserved_tokens == 4, "it may be found again, and billed"
    assert report.jobs[0].trouble is not None


@pytest.mark.fault(71)
def test_the_error_comes_only_when_nothing_else_goes_on(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"part_texts": 2})
    batch_desk.service.vanish(batch_desk.jobs[0].id)
    assert job.wait(timeout=0.01).state == "running", "the other one is not held up"
    batch_desk.service.finish(batch_desk.jobs[1].id)
    batch_desk.clock.advance(600)
    with pytest.raises(RemoteGone):
        job.wait(timeout=700)
    assert job.status(poll=False).stored == 1


@pytest.mark.fault(71)
def test_a_job_that_is_gone_is_billed_again_for_who_asks_for_it(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.service.vanish(batch_desk.jobs[0].id)
    job.advance()
    job.resubmit_lost()
    batch_desk.clock.advance(600)
    batch_desk.work(
        job,
        meanwhile=lambda: [
            batch_desk.service.finish(j.id) for j in batch_desk.jobs[1:] if not j.ended
        ],
    )
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 2
    assert job.status().usage.unconfirmed_tokens == 4, "the first one counts as spent"
    batch_desk.check_money(certain=False)


GONE = RemoteGone("404: no such job", status=404)


@pytest.mark.case("E3")
@pytest.mark.fault(71)
@pytest.mark.parametrize("looks", [1, 2, 7])
@pytest.mark.parametrize("when", ["at work", "ended", "cancelled"])
def test_a_job_that_is_not_found_for_a_while_is_billed_once(
    batch_desk: Any, looks: int, when: str
) -> None:
    """That what is lost may be billed again does not say that it is lost."""
    job = batch_desk.submit(TEXTS, resubmit_lost=True)
    if when != "at work":
        batch_desk.finish_all()
    batch_desk.faults.push("poll", error=GONE, times=looks)
    if when == "cancelled":
        job.cancel()
    while batch_desk.faults.pending:
        job.advance(asked=True)
        batch_desk.clock.advance(80)
    assert len(batch_desk.jobs) == 1
    assert job.status(poll=False).reserved_tokens == 4
    batch_desk.work(job)
    assert len(batch_desk.jobs) == 1
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E3")
@pytest.mark.fault(71)
def test_a_job_that_the_list_does_not_have_either_is_looked_for_all_through_the_grace(
    batch_desk: Any,
) -> None:
    job = batch_desk.submit(TEXTS, resubmit_lost=True)
    (remote,) = batch_desk.jobs
    remote.gone = True
    for _ in range(8):
        job.advance(asked=True)
        batch_desk.clock.advance(70)
    remote.gone = False
    batch_desk.work(job)
    assert len(batch_desk.jobs) == 1
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.fault(71)
def test_each_time_that_it_is_found_the_looking_begins_anew(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, resubmit_lost=True)
    for _ in range(5):
        batch_desk.faults.push("poll", error=GONE)
        job.advance(asked=True)
        batch_desk.clock.advance(400)
        job.advance(asked=True)
        assert job.status(poll=False).jobs[0].trouble is None
        batch_desk.clock.advance(400)
    assert len(batch_desk.jobs) == 1


@pytest.mark.fault(71)
@pytest.mark.fault(78)
@pytest.mark.parametrize("listing", ["has it", "breaks", "cannot be read"])
def test_a_job_is_gone_only_if_the_list_says_so_too(batch_desk: Any, listing: str) -> None:
    job = batch_desk.submit(TEXTS, resubmit_lost=True)
    batch_desk.faults.push("poll", error=GONE, times=1_000)
    if listing != "has it":
        error = InvalidResponse("an odd list", billed="no") if listing != "breaks" else None
        batch_desk.faults.push("find", error=error, times=1_000)
    for _ in range(40):
        job.advance()
        batch_desk.clock.advance(61)
    assert len(batch_desk.jobs) == 1
    assert job.status(poll=False).in_flight == 3
    assert job.status(poll=False).jobs[0].trouble is not None
    batch_desk.faults.clear()
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.fault(71)
def test_a_job_of_the_same_input_that_the_list_has_is_gone_on_with(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, resubmit_lost=True)
    (old,) = batch_desk.jobs
    batch_desk.service.vanish(old.id)
    batch_desk.service.create(old.input_file_id, metadata=old.metadata)
    batch_desk.work(
        job,
        meanwhile=lambda: [
            batch_desk.service.finish(j.id) for j in batch_desk.jobs if not (j.ended or j.gone)
        ],
    )
    assert len(batch_desk.jobs) == 2
    batch_desk.check(job, TEXTS)


# Parts that fail as a whole


@pytest.mark.fault(62)
def test_a_line_that_validation_refuses_is_a_reason_of_its_own_text(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    first = batch_desk.jobs[0].id
    batch_desk.service.fail(first, "invalid_value", "this text is not good", line=2)
    batch_desk.work(
        job,
        meanwhile=lambda: [batch_desk.service.finish(j.id) for j in batch_desk.jobs if not j.ended],
    )
    result = batch_desk.check(job, TEXTS, without=[1])
    assert "this text is not good" in str(result.errors[1])
    assert [len(batch_desk.service.input_lines(j.input_file_id)) for j in batch_desk.jobs] == [3, 2]
    batch_desk.check_money()


@pytest.mark.fault(62)
def test_a_job_that_always_fails_ends_with_a_reason(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"attempts": 4})
    batch_desk.work(
        job,
        meanwhile=lambda: [
            batch_desk.service.fail(j.id, "server_error", "we could not read the file")
            for j in batch_desk.jobs
            if not j.ended
        ],
    )
    assert len(batch_desk.jobs) == 4
    with pytest.raises(BatchEmbeddingFailed) as failed:
        job.result()
    assert sorted(failed.value.failures) == [0, 1, 2]
    assert all("could not read the file" in why for why in failed.value.failures.values())
    assert not failed.value.retryable
    batch_desk.check_money()


def test_a_text_that_is_too_large_for_any_job_gets_that_reason(batch_desk: Any) -> None:
    job_texts = ["a", "b"]
    batch_desk.faults.push("upload", error=RequestTooLarge("413: this is too large"))
    job = batch_desk.submit(job_texts, batch={"part_texts": 1})
    batch_desk.work(job)
    result = batch_desk.check(job, job_texts, without=[0])
    assert "too large" in str(result.errors[0])
    batch_desk.check_money()


# The queue


@pytest.mark.fault(74)
def test_a_full_queue_is_waited_for_visibly_and_is_no_failure(batch_desk: Any) -> None:
    texts = [f"text {number:02d}" for number in range(6)]
    batch_desk.provide(settings=BatchSettings(progress=Progress(), enqueued_token_limit=9))
    job = batch_desk.submit(texts, batch={"part_texts": 2, "attempts": 1})
    batch_desk.service.step(batch_desk.jobs[0].id)
    batch_desk.service.step(batch_desk.jobs[1].id)
    batch_desk.service.step(batch_desk.jobs[2].id)
    assert [one.status for one in batch_desk.jobs] == ["in_progress", "in_progress", "failed"]
    job.advance()
    report = job.status(poll=False)
    assert report.state == "blocked"
    assert report.blocked is not None
    assert report.blocked.startswith("queue: ")
    assert report.failed == 0
    assert batch_desk.spent().held.tokens == 12
    batch_desk.clock.advance(3_600)
    job.advance()
    assert len(batch_desk.jobs) == 3, "what is known not to fit is not tried"
    batch_desk.work(job, seconds=1_900)
    batch_desk.check(job, texts)
    assert len(batch_desk.jobs) == 4
    assert job.status().blocked is None
    batch_desk.check_money()


@pytest.mark.fault(74)
def test_a_job_larger_than_the_queue_is_cut_smaller(batch_desk: Any) -> None:
    texts = [f"text {number:02d}" for number in range(20)]
    batch_desk.provide(settings=BatchSettings(progress=Progress(polls=2), enqueued_token_limit=10))
    job = batch_desk.submit(texts, batch={"attempts": 1})
    batch_desk.work(job, meanwhile=lambda: None, seconds=400, looks=200)
    batch_desk.check(job, texts)
    assert all(
        len(batch_desk.service.input_lines(one.input_file_id)) <= 5
        for one in batch_desk.jobs
        if one.status == "completed"
    )
    batch_desk.check_money()


@pytest.mark.fault(74)
def test_a_queue_that_never_says_how_much_fits_is_found_out(batch_desk: Any) -> None:
    texts = [f"text {number:02d}" for number in range(8)]
    job = batch_desk.submit(texts, batch={"attempts": 1})

    def provider() -> None:
        for one in batch_desk.jobs:
            if not one.ended:
                small = len(batch_desk.service.input_lines(one.input_file_id)) <= 2
                if small:
                    batch_desk.service.finish(one.id)
                else:
                    batch_desk.service.fail(one.id, message="too much is enqueued")

    batch_desk.work(job, meanwhile=provider, seconds=1_900)
    batch_desk.check(job, texts)
    batch_desk.check_money()


@pytest.mark.fault(74)
def test_a_queue_that_stays_full_is_asked_less_and_less_often(batch_desk: Any) -> None:
    job = batch_desk.submit(["a"], batch={"attempts": 50})
    made = []
    for second in range(0, 12_000, 30):
        for one in batch_desk.jobs:
            if not one.ended:
                batch_desk.service.fail(one.id, message="too much is enqueued")
                made.append(second)
        job.advance()
        batch_desk.clock.advance(30)
    waits = [after - before for before, after in pairwise(made)]
    assert waits == sorted(waits)
    assert waits[0] <= 150
    assert 1_500 <= waits[-1] <= 2_000


@pytest.mark.fault(74)
def test_one_text_that_no_queue_takes_ends_with_that_reason(batch_desk: Any) -> None:
    batch_desk.provide(settings=BatchSettings(progress=Progress(polls=2), enqueued_token_limit=5))
    job = batch_desk.submit(["x" * 100, "y"])
    batch_desk.work(job, meanwhile=lambda: None, seconds=1_900, looks=100)
    result = batch_desk.check(job, ["x" * 100, "y"], without=[0])
    assert "Enqueued token limit" in str(result.errors[0])
    batch_desk.check_money()


def test_the_queue_that_was_configured_is_kept(batch_desk: Any) -> None:
    texts = [f"text {number:02d}" for number in range(6)]
    job = batch_desk.submit(texts, batch={"enqueued_tokens": 5, "part_texts": 9})
    assert [len(batch_desk.service.input_lines(one.input_file_id)) for one in batch_desk.jobs] == [
        2
    ]
    batch_desk.work(job)
    assert [len(batch_desk.service.input_lines(one.input_file_id)) for one in batch_desk.jobs] == [
        2
    ] * 3
    batch_desk.check(job, texts)


# Whoever is at work


@pytest.mark.fault(75)
def test_what_another_process_is_at_work_on_is_left_alone(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    other = batch_desk.client()
    context = other._context()
    (part,) = context.jobs.live(context.pool)
    owned = context.jobs.take(part)
    assert owned is not None
    batch_desk.strategy.calls.clear()
    batch_desk.finish_all()
    job.advance()
    assert batch_desk.strategy.calls == []
    batch_desk.clock.advance(121)
    job.advance()
    assert batch_desk.strategy.calls == ["poll", "results"], "until its lease ends"
    batch_desk.check(job, TEXTS)


def test_texts_and_keys_are_nowhere_in_the_log(
    batch_desk: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="embedcore")
    secret = "a text that is nobody's business"
    batch_desk.faults.push("poll", error=ProviderUnavailable("down", billed="no"))
    batch_desk.faults.push("create", "after")
    job = batch_desk.submit([(secret + " (key)", secret)])
    batch_desk.service.fail(batch_desk.jobs[0].id, "invalid_value", "not good", line=1)
    batch_desk.work(job, seconds=400)
    assert "nobody's business" not in caplog.text
    assert "nobody's business" not in repr(batch_desk.events)
