"""A create whose answer was lost: the job is found, or it is made sure that there is none."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import ProviderUnavailable, RateLimited, RequestRejected
from embedcore.events import BatchStray
from embedcore.testing.fakebatch import KEY, Crashed

bureau = run_path(str(Path(__file__).with_name("batch_bureau.py")))["bureau"]

TEXTS = ["one", "two", "three"]
GRACE = 600.0


def look(bureau: Any, job: Any, seconds: float, times: int = 1) -> None:
    for _ in range(times):
        bureau.clock.advance(seconds)
        job.advance()


@pytest.mark.fault(57)
def test_a_job_whose_answer_was_lost_is_found_and_paid_once(bureau: Any) -> None:
    bureau.faults.push("create", "after")
    job = bureau.submit(TEXTS)
    bureau.work(job)
    bureau.check(job, TEXTS)
    assert bureau.strategy.calls.count("create") == 1
    bureau.check_money()


@pytest.mark.fault(59)
@pytest.mark.parametrize("effect", ["before", "after"])
def test_a_crash_at_the_create_is_as_good_as_a_lost_answer(bureau: Any, effect: Any) -> None:
    bureau.faults.push("create", effect, crash=True)
    with pytest.raises(Crashed):
        bureau.submit(TEXTS)
    (job,) = bureau.client().batch_jobs()
    bureau.work(job)
    bureau.check(job, TEXTS)
    assert bureau.strategy.calls.count("create") == (1 if effect == "after" else 2)
    # What was never created is charged, until nobody can doubt it any more.
    bureau.check_money(certain=effect == "after")


@pytest.mark.fault(56)
def test_a_lost_upload_costs_nothing(bureau: Any) -> None:
    bureau.faults.push("upload", "after")
    job = bureau.submit(TEXTS)
    bureau.work(job)
    bureau.check(job, TEXTS)
    assert bureau.strategy.calls.count("upload") == 2
    assert len(bureau.jobs) == 1
    bureau.check_money()


def test_a_proof_that_there_is_no_job_lets_it_be_asked_for_again(bureau: Any) -> None:
    bureau.faults.push("create", error=RateLimited("slow down", retry_after=90.0))
    job = bureau.submit(TEXTS)
    assert bureau.jobs == []
    look(bureau, job, 80.0)
    assert bureau.jobs == [], "as long as the provider asked to wait"
    look(bureau, job, 11.0)
    assert len(bureau.jobs) == 1
    assert bureau.strategy.calls.count("upload") == 1, "what was uploaded is used"
    assert "find" not in bureau.strategy.calls
    bureau.work(job)
    bureau.check_money()


def test_nothing_is_created_again_before_the_grace_is_over(bureau: Any) -> None:
    bureau.faults.push("create", "before", crash=True)
    with pytest.raises(Crashed):
        bureau.submit(TEXTS)
    (job,) = bureau.client().batch_jobs()
    look(bureau, job, 59.0, 10)
    assert "discard" not in bureau.strategy.calls
    assert bureau.strategy.calls.count("create") == 1
    assert job.status(poll=False).in_flight == 3


@pytest.mark.fault(57)
def test_one_empty_list_proves_nothing_however_late_it_is(bureau: Any) -> None:
    """It may have been answered by a copy that lags behind."""
    bureau.faults.push("create", "after", crash=True)
    with pytest.raises(Crashed):
        bureau.submit(TEXTS)
    bureau.service.settings.listing.lag_listings = 1
    (job,) = bureau.client().batch_jobs()
    look(bureau, job, 10 * GRACE)
    assert "discard" not in bureau.strategy.calls
    look(bureau, job, 61.0)
    assert [one.id for one in job.status(poll=False).jobs] == [bureau.jobs[0].id]
    assert bureau.strategy.calls.count("create") == 1


def test_a_look_that_fails_proves_nothing(bureau: Any) -> None:
    bureau.faults.push("create", "before", crash=True)
    with pytest.raises(Crashed):
        bureau.submit(TEXTS)
    (job,) = bureau.client().batch_jobs()
    bureau.faults.push("find", error=ProviderUnavailable("half of the list", billed="no"), times=30)
    look(bureau, job, 700.0, 25)
    assert "discard" not in bureau.strategy.calls
    assert job.status(poll=False).in_flight == 3


@pytest.mark.fault(58)
def test_a_create_that_lands_after_all_looks_meets_the_fence(bureau: Any) -> None:
    bureau.faults.push("create", "late", crash=True)
    with pytest.raises(Crashed):
        bureau.submit(TEXTS)
    (job,) = bureau.client().batch_jobs()
    look(bureau, job, 200.0, 8)
    assert bureau.strategy.calls.count("create") == 2
    calls = bureau.strategy.calls
    fence = calls.index("discard")
    assert calls[fence + 1] == "find", "it is looked for once more behind the fence"
    assert calls.index("create", 2) > fence
    (report,) = [one for one in job.status(poll=False).jobs if one.phase == "lost"]
    assert report.id is None
    assert job.status(poll=False).usage.uncertain_tokens == 4

    assert bureau.service.land() == 1
    assert len(bureau.jobs) == 1, "its input is gone"
    bureau.work(job)
    bureau.check(job, TEXTS)
    bureau.check_money(certain=False)
    assert bureau.spent().spent.tokens == 8, "the attempt that may have been billed is charged"

    bureau.clock.advance(90_000)
    bureau.client().resume_batches()
    assert bureau.spent().spent.tokens == 4, "and corrected when nothing ever shows such a job"
    bureau.check_money()


@pytest.mark.fault(60)
def test_of_several_jobs_the_earliest_is_ours_and_the_others_are_stopped(bureau: Any) -> None:
    bureau.faults.push("create", "after", crash=True)
    with pytest.raises(Crashed):
        bureau.submit(TEXTS)
    (first,) = bureau.jobs
    bureau.clock.advance(5)
    for _ in range(2):
        bureau.service.create(first.input_file_id, metadata={KEY: first.metadata[KEY]})
        bureau.clock.advance(5)
    (job,) = bureau.client().batch_jobs()
    job.advance()
    assert [one.status for one in bureau.jobs[1:]] == ["cancelling", "cancelling"]
    told = bureau.told(BatchStray)
    assert [one.job for one in told] == [one.id for one in bureau.jobs[1:]]
    assert sum(one.tokens for one in told) == 8
    assert bureau.spent().spent.tokens == 8, "what they may cost is on the books at once"
    bureau.work(job)
    assert [one.id for one in job.status().jobs] == [first.id]
    bureau.check(job, TEXTS)
    assert bureau.spent().spent.tokens == 12
    assert bureau.spent().held.tokens == 0


@pytest.mark.fault(77)
@pytest.mark.parametrize("skew", [-3_000, 3_000])
def test_the_clock_of_the_provider_may_be_another(bureau: Any, skew: int) -> None:
    bureau.service.clock.advance(skew)
    bureau.faults.push("create", "after", crash=True)
    with pytest.raises(Crashed):
        bureau.submit(TEXTS)
    (job,) = bureau.client().batch_jobs()
    job.advance()
    assert [one.id for one in job.status(poll=False).jobs] == [bureau.jobs[0].id]


def test_a_create_that_is_refused_for_good_is_an_error_and_nothing_is_left(bureau: Any) -> None:
    bureau.faults.push("create", error=RequestRejected("no such endpoint", billed="no"))
    client = bureau.client()
    with pytest.raises(RequestRejected, match="no such endpoint"):
        client.submit_batch(TEXTS)
    assert client.batch_jobs() == []
    assert bureau.files == []
    assert bureau.spent().held.tokens == bureau.spent().spent.tokens == 0
