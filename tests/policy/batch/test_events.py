"""What observers hear of a batch's money is what the ledger has, whatever became of its jobs."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import OutcomeUnknown, TokenBudgetExceeded
from embedcore.events import BatchDuplicate, BatchWaits, Refused, Reserved, Settled
from embedcore.storage.amounts import Amount

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def amounts(batch_desk: Any) -> list[tuple[int, bool]]:
    return [(one.tokens, one.unconfirmed) for one in batch_desk.told(Settled)]


@pytest.mark.case("H2")
def test_a_job_that_ends_is_settled(batch_desk: Any) -> None:
    job = batch_desk.work(batch_desk.submit(TEXTS, batch={"part_texts": 3}))
    batch_desk.check(job, TEXTS)
    assert amounts(batch_desk) == [(6, False), (6, False)]
    (held,) = batch_desk.told(Reserved)
    assert (held.tokens, held.provider, held.model) == (12, "fake", "fake-embedding")
    batch_desk.check_events(batch_desk.spent().spent)


@pytest.mark.case("H2")
def test_what_is_held_anew_for_what_is_sent_again_is_told(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.service.expire(batch_desk.jobs[0].id, done=2)
    batch_desk.work(job)
    assert [one.tokens for one in batch_desk.told(Reserved)] == [12, 8]
    assert amounts(batch_desk) == [(4, False), (8, False)]
    batch_desk.check_money()


@pytest.mark.case("H2")
def test_a_job_that_cost_nothing_settles_nothing(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"attempts": 1})
    batch_desk.service.fail(batch_desk.jobs[0].id, "server_error", "not read")
    batch_desk.work(job)
    assert amounts(batch_desk) == []
    assert batch_desk.spent().spent == Amount()


@pytest.mark.case("H2")
def test_a_charge_without_proof_is_told_and_taken_back(batch_desk: Any) -> None:
    """Its create was lost, no job of it ever showed, and the charge was corrected."""
    batch_desk.faults.push("create", "before", error=OutcomeUnknown("no answer"))
    job = batch_desk.submit(TEXTS)
    for _ in range(20):
        job.advance()
        batch_desk.clock.advance(100)
    assert (12, True) in amounts(batch_desk)
    batch_desk.work(job, seconds=3_700, looks=80)
    batch_desk.clock.advance(100_000)
    for _ in range(3):
        batch_desk.last.resume_batches()
        batch_desk.clock.advance(4_000)
    assert sorted(amounts(batch_desk)) == [(-12, True), (12, False), (12, True)]
    batch_desk.check_money()


@pytest.mark.case("H2")
def test_a_job_that_shows_after_all_is_settled_at_what_it_cost(batch_desk: Any) -> None:
    batch_desk.faults.push("create", "late", seconds=5_000.0, error=OutcomeUnknown("no answer"))
    batch_desk.service.settings.accepts_deleted_input = True
    job = batch_desk.submit(TEXTS)
    for _ in range(90):
        batch_desk.clock.advance(100)
        job.advance()
        batch_desk.last.resume_batches()
        for one in batch_desk.jobs:
            if one.status == "validating":
                batch_desk.service.step(one.id)
            elif one.status == "in_progress":
                batch_desk.service.step(one.id, done=2)
            elif one.status == "cancelling":
                batch_desk.service.end_cancel(one.id)
    assert len(batch_desk.told(BatchDuplicate)) == 1
    batch_desk.finish_all()
    batch_desk.work(job)
    batch_desk.last.resume_batches()
    used = batch_desk.spent()
    batch_desk.check_events(used.spent)
    assert used.held == Amount()
    assert (-12, True) in amounts(batch_desk), "the charge became what the job cost"


@pytest.mark.case("H2")
def test_what_is_given_up_by_hand_is_settled_as_unconfirmed(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    job.forget()
    assert amounts(batch_desk) == [(12, True)]
    batch_desk.check_events(batch_desk.spent().spent)


@pytest.mark.case("H2")
def test_results_that_are_gone_are_settled(batch_desk: Any) -> None:
    batch_desk.service.settings.quirks.late = "missing"
    batch_desk.service.settings.quirks.late_looks = None
    batch_desk.work(batch_desk.submit(TEXTS))
    assert amounts(batch_desk) == [(12, False)]
    batch_desk.check_money()


@pytest.mark.case("H2")
def test_what_is_billed_near_a_deadline_is_settled_too(batch_desk: Any) -> None:
    job = batch_desk.client().submit_batch(TEXTS, strategy="immediate")
    batch_desk.work(job)
    used = batch_desk.spent()
    assert used.spent.tokens == 12
    batch_desk.check_events(used.spent)


@pytest.mark.case("H2")
def test_a_refusal_names_the_model(batch_desk: Any) -> None:
    with pytest.raises(TokenBudgetExceeded):
        batch_desk.submit(TEXTS, daily=5)
    (refused,) = batch_desk.told(Refused)
    assert (refused.provider, refused.model) == ("fake", "fake-embedding")
    job = batch_desk.client(daily=5).submit_batch(TEXTS, on_budget="wait")
    assert [one.tokens for one in batch_desk.told(Reserved)] == [4]
    assert len(batch_desk.told(BatchWaits)) == 1
    assert job.status(poll=False).reserved_tokens == 4
