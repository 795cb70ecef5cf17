"""Results that were paid for can be read again: when they are there, and when they are believed."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest

from embedcore import EmbeddingClient
from embedcore.errors import BatchEmbeddingFailed, RemoteGone
from embedcore.provider.types import BatchOutcome
from embedcore.storage.amounts import Amount

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def quirky(batch_desk: Any, **quirks: Any) -> Any:
    for name, value in quirks.items():
        setattr(batch_desk.service.settings.quirks, name, value)
    return batch_desk


def lost(batch_desk: Any, **how: Any) -> Any:
    """A batch that has ended without results that were paid for."""
    quirky(batch_desk, late="missing", late_looks=None)
    job = batch_desk.work(batch_desk.submit(TEXTS, **how))
    assert job.status().failed == 6
    return job


@pytest.mark.case("E3")
@pytest.mark.fault(70)
@pytest.mark.parametrize("how", [{}, {"lost": True}])
def test_an_output_that_appears_after_the_end_is_read_whenever_somebody_asks(
    batch_desk: Any, how: Any
) -> None:
    job = lost(batch_desk)
    before = batch_desk.spent()
    with pytest.raises(RemoteGone):
        job.read_again(**how)
    quirky(batch_desk, late="first line")
    assert job.read_again(**how) == 1
    assert (job.status().stored, job.status().failed) == (1, 5)
    quirky(batch_desk, late=None)
    assert batch_desk.client().batch_job(job.id).read_again(**how) == 5
    report = job.status()
    assert (report.state, report.stored, report.failed) == ("done", 6, 0)
    batch_desk.check(job, TEXTS)
    assert job.read_again(**how) == 0
    assert len(batch_desk.jobs) == 1
    assert batch_desk.spent() == before, "it is paid already"


@pytest.mark.case("E3")
def test_it_is_read_for_the_lost_rows_of_a_batch_that_goes_on(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"part_texts": 3})
    quirky(batch_desk, late="missing", late_looks=None)
    batch_desk.service.finish(batch_desk.jobs[0].id)
    for _ in range(15):
        job.advance()
        batch_desk.clock.advance(61)
    assert (job.status().failed, job.status().in_flight) == (3, 3)
    quirky(batch_desk, late=None)
    assert job.read_again() == 3
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E3")
def test_other_batches_that_ended_without_them_have_them_too(batch_desk: Any) -> None:
    job = lost(batch_desk)
    other = batch_desk.submit(TEXTS[:2])
    assert other.status().failed == 2
    quirky(batch_desk, late=None)
    assert job.read_again() == 6
    assert (other.status().stored, other.status().failed) == (2, 0)
    batch_desk.check(other, TEXTS[:2])


@pytest.mark.case("E1")
@pytest.mark.case("E3")
def test_lines_of_another_job_are_nobodys_then_as_well(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"part_texts": 3})
    batch_desk.finish_all()
    ids = [one.id for one in batch_desk.jobs]
    batch_desk.service.swap_outputs(*ids)
    batch_desk.work(job)
    assert job.read_again() == 0
    assert not job.result(on_error="keep").ok.any()
    batch_desk.service.swap_outputs(*ids)
    assert job.read_again() == 6
    batch_desk.check(job, TEXTS)


@pytest.mark.case("E3")
def test_records_go_with_the_batch(batch_desk: Any) -> None:
    job = lost(batch_desk)
    batch_desk.clock.advance(40 * 86_400)
    quirky(batch_desk, late=None)
    batch_desk.work(batch_desk.submit(["another"]))
    with batch_desk.last._engine.account.ledger.database.read() as connection:
        assert connection.execute("SELECT * FROM unread").fetchall() == []
    assert job.id not in {one.id for one in batch_desk.last.batch_jobs()}


# Wanted again, and then not after all


def said(batch_desk: Any, job: Any) -> dict[int, str]:
    """Why each row has no vector, as another process would read it."""
    found = batch_desk.client().batch_job(job.id)
    return {row: str(error) for block in found.blocks() for row, error in block.errors.items()}


def end_of(batch_desk: Any, job: Any, how: str) -> None:
    """Somebody gives it up before it has anything."""
    if how == "cancel":
        job.cancel()

        def cancelled() -> None:
            for one in batch_desk.jobs:
                if one.status == "cancelling":
                    batch_desk.service.end_cancel(one.id)

        batch_desk.work(job, meanwhile=cancelled)
    else:
        job.forget()
    assert job.record.has_ended


@pytest.mark.case("E3")
@pytest.mark.parametrize("how", ["cancel", "abandon"])
@pytest.mark.parametrize("consent", ["submitted", "said later"])
@pytest.mark.parametrize("sent", [True, False])
def test_what_was_lost_is_lost_still_when_nobody_buys_it_again_after_all(
    batch_desk: Any, how: str, consent: str, sent: bool
) -> None:
    job = lost(batch_desk)
    reasons = said(batch_desk, job)
    # Nothing fits into a limit of so little: it is in no job then.
    more = {} if sent else {"daily": batch_desk.spent().spent.tokens, "on_budget": "wait"}
    if consent == "submitted":
        again = batch_desk.submit(TEXTS, resubmit_lost=True, **more)
    else:
        again = batch_desk.submit([*TEXTS, "new"], **more)
        assert again.resubmit_lost() == 6
    if sent:
        again.advance()
    assert said(batch_desk, job) == reasons, "while another one tries"
    end_of(batch_desk, again, how)
    for one in batch_desk.jobs[1:]:
        if not one.ended:
            batch_desk.service.cancel(one.id)
            batch_desk.service.end_cancel(one.id)
    assert said(batch_desk, job) == reasons

    billed = batch_desk.meter.billed_tokens
    third = batch_desk.work(batch_desk.submit(TEXTS))
    assert (third.status().failed, batch_desk.meter.billed_tokens) == (6, billed), "unasked"
    quirky(batch_desk, late=None)
    assert job.read_again() == 6
    batch_desk.check(job, TEXTS)
    assert (job.status().stored, third.status().stored) == (6, 6)
    assert batch_desk.meter.billed_twice == {}


@pytest.mark.case("E3")
@pytest.mark.parametrize("how", ["cancel", "abandon"])
def test_the_reason_of_a_batch_that_ended_stays_when_its_texts_are_tried_again(
    batch_desk: Any, how: str
) -> None:
    batch_desk.service.fail_lines("text 01", status=400, message="this one is not allowed")
    job = batch_desk.work(batch_desk.submit(TEXTS))
    reasons = said(batch_desk, job)
    assert "not allowed" in reasons[1]
    again = batch_desk.submit(TEXTS)
    again.advance()
    assert said(batch_desk, job) == reasons
    end_of(batch_desk, again, how)
    assert said(batch_desk, job) == reasons


@pytest.mark.case("E3")
def test_what_is_read_again_is_billed_by_nobody_who_waits_for_it(batch_desk: Any) -> None:
    job = lost(batch_desk)
    daily = batch_desk.spent().spent.tokens
    again = batch_desk.submit(TEXTS, resubmit_lost=True, daily=daily, on_budget="wait")
    quirky(batch_desk, late=None)
    assert job.read_again() == 6
    assert (job.status().stored, job.status().failed) == (6, 0)
    again.advance()
    assert again.status().state == "done"
    batch_desk.check(again, TEXTS)
    assert len(batch_desk.jobs) == 1


# Believed later


def with_other_names(batch_desk: Any, names: tuple[str, ...]) -> EmbeddingClient:
    """The same client after ``reply_models`` was set."""
    from dataclasses import replace

    batch_desk.embedder.info = replace(batch_desk.embedder.info, reply_models=names)
    return batch_desk.client()


@pytest.mark.case("E5")
def test_lines_under_another_models_name_are_believed_when_a_setting_says_so(
    batch_desk: Any,
) -> None:
    quirky(batch_desk, reply_model="the-same-model-2026")
    job = batch_desk.work(batch_desk.submit(TEXTS))
    with pytest.raises(BatchEmbeddingFailed, match="reply_models") as failed:
        job.result()
    assert "fetch --again" in failed.value.failures[0]
    assert job.read_again() == 0, "not yet"
    assert job.read_again(lost=True) == 0, "they were to be had"

    again = with_other_names(batch_desk, ("the-same-model-2026",)).batch_job(job.id)
    assert again.read_again() == 6
    batch_desk.check(again, TEXTS)
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.case("E5")
def test_submitting_the_same_again_reads_before_it_buys(batch_desk: Any) -> None:
    """Whoever follows the advice and runs the same program again pays nothing."""
    quirky(batch_desk, reply_model="the-same-model-2026")
    batch_desk.work(batch_desk.submit(TEXTS))
    client = with_other_names(batch_desk, ("*",))
    vectors = client.batch_embed_texts(TEXTS, poll_interval=0.01)
    assert len(vectors) == 6
    assert len(batch_desk.jobs) == 1
    more = batch_desk.work(client.submit_batch([*TEXTS, "a seventh"]))
    batch_desk.check(more, [*TEXTS, "a seventh"])
    assert [len(batch_desk.service.input_lines(one.input_file_id)) for one in batch_desk.jobs] == [
        6,
        1,
    ]
    batch_desk.check_money()


@pytest.mark.case("E5")
def test_lost_rows_are_read_before_they_are_billed_again(batch_desk: Any) -> None:
    lost(batch_desk)
    quirky(batch_desk, late=None)
    again = batch_desk.submit(TEXTS, resubmit_lost=True)
    assert again.status().state == "done"
    batch_desk.check(again, TEXTS)
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.case("E5")
def test_what_cannot_be_read_again_is_billed_when_it_is_asked_for(batch_desk: Any) -> None:
    lost(batch_desk)
    again = batch_desk.submit(TEXTS, resubmit_lost=True)
    quirky(batch_desk, late=None)
    batch_desk.work(again)
    batch_desk.check(again, TEXTS)
    assert len(batch_desk.jobs) == 2
    assert batch_desk.spent().held == Amount()


@pytest.mark.case("E5")
@pytest.mark.parametrize("bad", ["zeros", "width"])
def test_every_setting_that_decides_what_is_believed_can_be_changed(
    batch_desk: Any, bad: str
) -> None:
    width = 32 if bad == "zeros" else 16
    vector = np.zeros(width, dtype=np.float32) + (bad == "width")
    config = {"on_zero": "reject"} if bad == "zeros" else {}
    truth = batch_desk.strategy.results
    batch_desk.strategy.results = lambda job_id: iter(
        batch_desk.named(
            0, [BatchOutcome(id=str(row), vector=vector, tokens=2) for row in range(6)]
        )
    )
    job = batch_desk.work(batch_desk.submit(TEXTS, **config))
    assert job.status().failed == 6
    if bad == "width":
        # The server is mended.
        batch_desk.strategy.results = truth
    again = batch_desk.client().batch_job(job.id)
    assert again.read_again() == 6
    assert len(batch_desk.jobs) == 1


@pytest.mark.case("E5")
def test_two_different_vectors_for_one_text_are_never_believed(batch_desk: Any) -> None:
    quirky(batch_desk, duplicate_different="text 02")
    job = batch_desk.work(batch_desk.submit(TEXTS))
    batch_desk.check(job, TEXTS, without=[2])
    assert job.read_again() == 0
    batch_desk.check(job, TEXTS, without=[2])


# Lost, wanted again, and given up when nothing else knows of the loss any more


@pytest.mark.case("E3")
@pytest.mark.parametrize("how", ["cancel", "abandon"])
@pytest.mark.parametrize("kept", ["the first batch", "the second batch"])
def test_what_was_lost_is_lost_still_when_its_records_are_gone(
    batch_desk: Any, how: str, kept: str
) -> None:
    job = batch_desk.submit([*TEXTS, "slow"], batch={"part_texts": 6})
    first = batch_desk.jobs[0]
    quirky(batch_desk, late="missing", late_looks=None)
    batch_desk.service.finish(first.id)
    for _ in range(15):
        job.advance()
        batch_desk.clock.advance(61)
    if kept == "the first batch":
        # It ends long after its lost part, whose record goes first.
        batch_desk.clock.advance(20 * 86_400)
    quirky(batch_desk, late=None)
    batch_desk.work(job)
    quirky(batch_desk, late="missing")
    assert job.status().failed == 6
    batch_desk.service.settings.window = None
    again = batch_desk.submit(TEXTS, resubmit_lost=True)
    batch_desk.clock.advance((15 if kept == "the first batch" else 40) * 86_400)
    batch_desk.submit(["another"], strategy="immediate")
    names = {one.id for one in batch_desk.last.batch_jobs()}
    assert (job.id in names) == (kept == "the first batch")
    end_of(batch_desk, again, how)
    for one in batch_desk.jobs:
        if not one.ended:
            batch_desk.service.cancel(one.id)
            batch_desk.service.end_cancel(one.id)
    billed = batch_desk.meter.billed_tokens
    third = batch_desk.work(batch_desk.submit(TEXTS))
    assert (third.status().failed, batch_desk.meter.billed_tokens) == (6, billed), "unasked"
    assert "output_gone" in third.result(on_error="keep").errors[0].message
    quirky(batch_desk, late=None)
    fourth = batch_desk.work(batch_desk.submit(TEXTS, resubmit_lost=True))
    assert fourth.status().stored == 6


@pytest.mark.case("E3")
@pytest.mark.parametrize("how", ["cancel", "abandon"])
def test_who_only_joined_does_not_buy_again_what_another_gave_up(batch_desk: Any, how: str) -> None:
    lost(batch_desk)
    nothing = {"daily": batch_desk.spent().spent.tokens, "on_budget": "wait"}
    again = batch_desk.submit(TEXTS, resubmit_lost=True, **nothing)
    joined = batch_desk.submit(TEXTS, **nothing)
    assert joined.status().to_submit == 6
    end_of(batch_desk, again, how)
    billed = batch_desk.meter.billed_tokens
    joined = batch_desk.work(batch_desk.client().batch_job(joined.id))
    assert (joined.status().failed, batch_desk.meter.billed_tokens) == (6, billed)
