"""What observers hear of a batch's money is what the ledger has, whatever became of its jobs."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import OutcomeUnknown, TokenBudgetExceeded
from embedcore.events import BatchStray, BatchWaits, Held, Refused, Settled
from embedcore.storage.amounts import Amount

bureau = run_path(str(Path(__file__).with_name("batch_bureau.py")))["bureau"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def amounts(bureau: Any) -> list[tuple[int, bool]]:
    return [(one.tokens, one.uncertain) for one in bureau.told(Settled)]


@pytest.mark.case("H2")
def test_a_job_that_ends_is_settled(bureau: Any) -> None:
    job = bureau.work(bureau.submit(TEXTS, batch={"part_texts": 3}))
    bureau.check(job, TEXTS)
    assert amounts(bureau) == [(6, False), (6, False)]
    (held,) = bureau.told(Held)
    assert (held.tokens, held.provider, held.model) == (12, "fake", "fake-embedding")
    bureau.check_events(bureau.spent().spent)


@pytest.mark.case("H2")
def test_what_is_held_anew_for_what_is_sent_again_is_told(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.service.expire(bureau.jobs[0].id, done=2)
    bureau.work(job)
    assert [one.tokens for one in bureau.told(Held)] == [12, 8]
    assert amounts(bureau) == [(4, False), (8, False)]
    bureau.check_money()


@pytest.mark.case("H2")
def test_a_job_that_cost_nothing_settles_nothing(bureau: Any) -> None:
    job = bureau.submit(TEXTS, batch={"attempts": 1})
    bureau.service.fail(bureau.jobs[0].id, "server_error", "not read")
    bureau.work(job)
    assert amounts(bureau) == []
    assert bureau.spent().spent == Amount()


@pytest.mark.case("H2")
def test_a_charge_without_proof_is_told_and_taken_back(bureau: Any) -> None:
    """Its create was lost, no job of it ever showed, and the charge was corrected."""
    bureau.faults.push("create", "before", error=OutcomeUnknown("no answer"))
    job = bureau.submit(TEXTS)
    for _ in range(20):
        job.advance()
        bureau.clock.advance(100)
    assert (12, True) in amounts(bureau)
    bureau.work(job, seconds=3_700, looks=80)
    bureau.clock.advance(100_000)
    for _ in range(3):
        bureau.last.resume_batches()
        bureau.clock.advance(4_000)
    assert sorted(amounts(bureau)) == [(-12, True), (12, False), (12, True)]
    bureau.check_money()


@pytest.mark.case("H2")
def test_a_job_that_shows_after_all_is_settled_at_what_it_cost(bureau: Any) -> None:
    bureau.faults.push("create", "late", seconds=5_000.0, error=OutcomeUnknown("no answer"))
    bureau.service.settings.accepts_deleted_input = True
    job = bureau.submit(TEXTS)
    for _ in range(90):
        bureau.clock.advance(100)
        job.advance()
        bureau.last.resume_batches()
        for one in bureau.jobs:
            if one.status == "validating":
                bureau.service.step(one.id)
            elif one.status == "in_progress":
                bureau.service.step(one.id, done=2)
            elif one.status == "cancelling":
                bureau.service.end_cancel(one.id)
    assert len(bureau.told(BatchStray)) == 1
    bureau.finish_all()
    bureau.work(job)
    bureau.last.resume_batches()
    used = bureau.spent()
    bureau.check_events(used.spent)
    assert used.held == Amount()
    assert (-12, True) in amounts(bureau), "the charge became what the job cost"


@pytest.mark.case("H2")
def test_what_is_given_up_by_hand_is_settled_as_uncertain(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    job.abandon()
    assert amounts(bureau) == [(12, True)]
    bureau.check_events(bureau.spent().spent)


@pytest.mark.case("H2")
def test_results_that_are_gone_are_settled(bureau: Any) -> None:
    bureau.service.settings.quirks.late = "missing"
    bureau.service.settings.quirks.late_looks = None
    bureau.work(bureau.submit(TEXTS))
    assert amounts(bureau) == [(12, False)]
    bureau.check_money()


@pytest.mark.case("H2")
def test_what_is_bought_near_a_deadline_is_settled_too(bureau: Any) -> None:
    job = bureau.client().submit_batch(TEXTS, strategy="immediate")
    bureau.work(job)
    used = bureau.spent()
    assert used.spent.tokens == 12
    bureau.check_events(used.spent)


@pytest.mark.case("H2")
def test_a_refusal_names_the_model(bureau: Any) -> None:
    with pytest.raises(TokenBudgetExceeded):
        bureau.submit(TEXTS, daily=5)
    (refused,) = bureau.told(Refused)
    assert (refused.provider, refused.model) == ("fake", "fake-embedding")
    job = bureau.client(daily=5).submit_batch(TEXTS, on_budget="wait")
    assert [one.tokens for one in bureau.told(Held)] == [4]
    assert len(bureau.told(BatchWaits)) == 1
    assert job.status(poll=False).held_tokens == 4
