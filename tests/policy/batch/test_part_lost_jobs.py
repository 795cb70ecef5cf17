"""A create whose answer was lost: the job is found, or it is made sure that there is none."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import InvalidResponse, ProviderUnavailable, RateLimited, RequestRejected
from embedcore.events import BatchDuplicate
from embedcore.testing.fakes.batch import KEY, Crashed

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = ["one", "two", "three"]
GRACE = 600.0


def look(batch_desk: Any, job: Any, seconds: float, times: int = 1) -> None:
    for _ in range(times):
        batch_desk.clock.advance(seconds)
        job.advance()


@pytest.mark.fault(57)
def test_a_job_whose_answer_was_lost_is_found_and_paid_once(batch_desk: Any) -> None:
    batch_desk.faults.push("create", "after")
    job = batch_desk.submit(TEXTS)
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    assert batch_desk.strategy.calls.count("create") == 1
    batch_desk.check_money()


@pytest.mark.fault(59)
@pytest.mark.parametrize("effect", ["before", "after"])
def test_a_crash_at_the_create_is_as_good_as_a_lost_answer(batch_desk: Any, effect: Any) -> None:
    batch_desk.faults.push("create", effect, crash=True)
    with pytest.raises(Crashed):
        batch_desk.submit(TEXTS)
    (job,) = batch_desk.client().batch_jobs()
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    assert batch_desk.strategy.calls.count("create") == (1 if effect == "after" else 2)
    # What was never created is charged, until nobody can doubt it any more.
    batch_desk.check_money(certain=effect == "after")


@pytest.mark.fault(56)
def test_a_lost_upload_costs_nothing(batch_desk: Any) -> None:
    batch_desk.faults.push("upload", "after")
    job = batch_desk.submit(TEXTS)
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    assert batch_desk.strategy.calls.count("upload") == 2
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


def test_a_proof_that_there_is_no_job_lets_it_be_asked_for_again(batch_desk: Any) -> None:
    batch_desk.faults.push("create", error=RateLimited("slow down", retry_after=90.0))
    job = batch_desk.submit(TEXTS)
    assert batch_desk.jobs == []
    look(batch_desk, job, 80.0)
    assert batch_desk.jobs == [], "as long as the provider asked to wait"
    look(batch_desk, job, 11.0)
    assert len(batch_desk.jobs) == 1
    assert batch_desk.strategy.calls.count("upload") == 1, "what was uploaded is used"
    assert "find" not in batch_desk.strategy.calls
    batch_desk.work(job)
    batch_desk.check_money()


def test_nothing_is_created_again_before_the_grace_is_over(batch_desk: Any) -> None:
    batch_desk.faults.push("create", "before", crash=True)
    with pytest.raises(Crashed):
        batch_desk.submit(TEXTS)
    (job,) = batch_desk.client().batch_jobs()
    look(batch_desk, job, 59.0, 10)
    assert "discard" not in batch_desk.strategy.calls
    assert batch_desk.strategy.calls.count("create") == 1
    assert job.status(poll=False).in_flight == 3


@pytest.mark.fault(57)
def test_one_empty_list_proves_nothing_however_late_it_is(batch_desk: Any) -> None:
    """It may have been answered by a copy that lags behind."""
    batch_desk.faults.push("create", "after", crash=True)
    with pytest.raises(Crashed):
        batch_desk.submit(TEXTS)
    batch_desk.service.settings.listing.lag_listings = 1
    (job,) = batch_desk.client().batch_jobs()
    look(batch_desk, job, 10 * GRACE)
    assert "discard" not in batch_desk.strategy.calls
    look(batch_desk, job, 61.0)
    assert [one.id for one in job.status(poll=False).jobs] == [batch_desk.jobs[0].id]
    assert batch_desk.strategy.calls.count("create") == 1


def test_a_look_that_fails_proves_nothing(batch_desk: Any) -> None:
    batch_desk.faults.push("create", "before", crash=True)
    with pytest.raises(Crashed):
        batch_desk.submit(TEXTS)
    (job,) = batch_desk.client().batch_jobs()
    batch_desk.faults.push(
        "find", error=ProviderUnavailable("half of the list", billed="no"), times=30
    )
    look(batch_desk, job, 700.0, 25)
    assert "discard" not in batch_desk.strategy.calls
    assert job.status(poll=False).in_flight == 3


@pytest.mark.fault(58)
def test_a_create_that_lands_after_all_looks_meets_the_fence(batch_desk: Any) -> None:
    batch_desk.faults.push("create", "late", crash=True)
    with pytest.raises(Crashed):
        batch_desk.submit(TEXTS)
    (job,) = batch_desk.client().batch_jobs()
    look(batch_desk, job, 200.0, 8)
    assert batch_desk.strategy.calls.count("create") == 2
    calls = batch_desk.strategy.calls
    fence = calls.index("discard")
    assert calls[fence + 1] == "find", "it is looked for once more behind the fence"
    assert calls.index("create", 2) > fence
    (report,) = [one for one in job.status(poll=False).jobs if one.phase == "lost"]
    assert report.id is None
    assert job.status(poll=False).usage.unconfirmed_tokens == 4

    assert batch_desk.service.land() == 1
    assert len(batch_desk.jobs) == 1, "its input is gone"
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money(certain=False)
    assert batch_desk.spent().spent.tokens == 8, "the attempt that may have been billed is charged"

    batch_desk.clock.advance(90_000)
    batch_desk.client().resume_batches()
    assert batch_desk.spent().spent.tokens == 4, "and corrected when nothing ever shows such a job"
    batch_desk.check_money()


@pytest.mark.fault(60)
def test_of_several_jobs_the_earliest_is_ours_and_the_others_are_stopped(batch_desk: Any) -> None:
    batch_desk.faults.push("create", "after", crash=True)
    with pytest.raises(Crashed):
        batch_desk.submit(TEXTS)
    (first,) = batch_desk.jobs
    batch_desk.clock.advance(5)
    for _ in range(2):
        batch_desk.service.create(first.input_file_id, metadata={KEY: first.metadata[KEY]})
        batch_desk.clock.advance(5)
    (job,) = batch_desk.client().batch_jobs()
    job.advance()
    assert [one.status for one in batch_desk.jobs[1:]] == ["cancelling", "cancelling"]
    told = batch_desk.told(BatchDuplicate)
    assert [one.job for one in told] == [one.id for one in batch_desk.jobs[1:]]
    assert sum(one.tokens for one in told) == 8
    assert batch_desk.spent().spent.tokens == 8, "what they may cost is on the ledger at once"
    batch_desk.work(job)
    assert [one.id for one in job.status().jobs] == [first.id]
    batch_desk.check(job, TEXTS)
    assert batch_desk.spent().spent.tokens == 12
    assert batch_desk.spent().held.tokens == 0


@pytest.mark.fault(77)
@pytest.mark.parametrize("skew", [-3_000, 3_000])
def test_the_clock_of_the_provider_may_be_another(batch_desk: Any, skew: int) -> None:
    batch_desk.service.clock.advance(skew)
    batch_desk.faults.push("create", "after", crash=True)
    with pytest.raises(Crashed):
        batch_desk.submit(TEXTS)
    (job,) = batch_desk.client().batch_jobs()
    job.advance()
    assert [one.id for one in job.status(poll=False).jobs] == [batch_desk.jobs[0].id]


def test_a_create_that_is_refused_for_good_is_an_error_and_nothing_is_left(batch_desk: Any) -> None:
    batch_desk.faults.push("create", error=RequestRejected("no such endpoint", billed="no"))
    client = batch_desk.client()
    with pytest.raises(RequestRejected, match="no such endpoint"):
        client.submit_batch(TEXTS)
    assert client.batch_jobs() == []
    assert batch_desk.files == []
    assert batch_desk.spent().held.tokens == batch_desk.spent().spent.tokens == 0


def test_a_list_that_cannot_be_read_names_what_ends_the_wait(batch_desk: Any) -> None:
    batch_desk.faults.push("create", "before", crash=True)
    with pytest.raises(Crashed):
        batch_desk.submit(TEXTS)
    (job,) = batch_desk.client().batch_jobs()
    odd = InvalidResponse("an odd list", billed="no")
    batch_desk.faults.push("find", error=odd, times=1_000)
    look(batch_desk, job, 700, times=3)
    trouble = job.status(poll=False).jobs[0].trouble
    assert trouble.startswith("an odd list. ")
    assert trouble.count(f"embedcore batch forget {job.id}") == 1
    assert batch_desk.strategy.calls.count("create") == 1
    assert job.forget().has_ended
