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

bureau = run_path(str(Path(__file__).with_name("batch_bureau.py")))["bureau"]

TEXTS = [f"text {number:02d}" for number in range(6)]


def quirky(bureau: Any, **quirks: Any) -> Any:
    for name, value in quirks.items():
        setattr(bureau.service.settings.quirks, name, value)
    return bureau


def lost(bureau: Any, **how: Any) -> Any:
    """A batch that has ended without results that were paid for."""
    quirky(bureau, late="missing", late_looks=None)
    job = bureau.work(bureau.submit(TEXTS, **how))
    assert job.status().failed == 6
    return job


@pytest.mark.case("E3")
@pytest.mark.fault(70)
@pytest.mark.parametrize("how", [{}, {"lost": True}])
def test_an_output_that_appears_after_the_end_is_read_whenever_somebody_asks(
    bureau: Any, how: Any
) -> None:
    job = lost(bureau)
    before = bureau.spent()
    with pytest.raises(RemoteGone):
        job.read_again(**how)
    quirky(bureau, late="first line")
    assert job.read_again(**how) == 1
    assert (job.status().stored, job.status().failed) == (1, 5)
    quirky(bureau, late=None)
    assert bureau.client().batch_job(job.id).read_again(**how) == 5
    report = job.status()
    assert (report.state, report.stored, report.failed) == ("done", 6, 0)
    bureau.check(job, TEXTS)
    assert job.read_again(**how) == 0
    assert len(bureau.jobs) == 1
    assert bureau.spent() == before, "it is paid already"


@pytest.mark.case("E3")
def test_it_is_read_for_the_lost_rows_of_a_batch_that_goes_on(bureau: Any) -> None:
    job = bureau.submit(TEXTS, batch={"part_texts": 3})
    quirky(bureau, late="missing", late_looks=None)
    bureau.service.finish(bureau.jobs[0].id)
    for _ in range(15):
        job.advance()
        bureau.clock.advance(61)
    assert (job.status().failed, job.status().in_flight) == (3, 3)
    quirky(bureau, late=None)
    assert job.read_again() == 3
    bureau.work(job)
    bureau.check(job, TEXTS)
    bureau.check_money()


@pytest.mark.case("E3")
def test_other_batches_that_ended_without_them_have_them_too(bureau: Any) -> None:
    job = lost(bureau)
    other = bureau.submit(TEXTS[:2])
    assert other.status().failed == 2
    quirky(bureau, late=None)
    assert job.read_again() == 6
    assert (other.status().stored, other.status().failed) == (2, 0)
    bureau.check(other, TEXTS[:2])


@pytest.mark.case("E1")
@pytest.mark.case("E3")
def test_lines_of_another_job_are_nobodys_then_as_well(bureau: Any) -> None:
    job = bureau.submit(TEXTS, batch={"part_texts": 3})
    bureau.finish_all()
    ids = [one.id for one in bureau.jobs]
    bureau.service.swap_outputs(*ids)
    bureau.work(job)
    assert job.read_again() == 0
    assert not job.result(on_error="keep").ok.any()
    bureau.service.swap_outputs(*ids)
    assert job.read_again() == 6
    bureau.check(job, TEXTS)


@pytest.mark.case("E3")
def test_records_go_with_the_batch(bureau: Any) -> None:
    job = lost(bureau)
    bureau.clock.advance(40 * 86_400)
    quirky(bureau, late=None)
    bureau.work(bureau.submit(["another"]))
    with bureau.last._engine.account.ledger.database.read() as connection:
        assert connection.execute("SELECT * FROM unread").fetchall() == []
    assert job.id not in {one.id for one in bureau.last.batch_jobs()}


# Believed later


def with_other_names(bureau: Any, names: tuple[str, ...]) -> EmbeddingClient:
    """The same client after ``reply_models`` was set."""
    from dataclasses import replace

    bureau.embedder.info = replace(bureau.embedder.info, reply_models=names)
    return bureau.client()


@pytest.mark.case("E5")
def test_lines_under_another_models_name_are_believed_when_a_setting_says_so(bureau: Any) -> None:
    quirky(bureau, reply_model="the-same-model-2026")
    job = bureau.work(bureau.submit(TEXTS))
    with pytest.raises(BatchEmbeddingFailed, match="reply_models") as failed:
        job.result()
    assert "fetch --again" in failed.value.failures[0]
    assert job.read_again() == 0, "not yet"
    assert job.read_again(lost=True) == 0, "they were to be had"

    again = with_other_names(bureau, ("the-same-model-2026",)).batch_job(job.id)
    assert again.read_again() == 6
    bureau.check(again, TEXTS)
    assert len(bureau.jobs) == 1
    bureau.check_money()


@pytest.mark.case("E5")
def test_submitting_the_same_again_reads_before_it_buys(bureau: Any) -> None:
    """Whoever follows the advice and runs the same program again pays nothing."""
    quirky(bureau, reply_model="the-same-model-2026")
    bureau.work(bureau.submit(TEXTS))
    client = with_other_names(bureau, ("*",))
    vectors = client.batch_embed_texts(TEXTS, poll_interval=0.01)
    assert len(vectors) == 6
    assert len(bureau.jobs) == 1
    more = bureau.work(client.submit_batch([*TEXTS, "a seventh"]))
    bureau.check(more, [*TEXTS, "a seventh"])
    assert [len(bureau.service.input_lines(one.input_file_id)) for one in bureau.jobs] == [6, 1]
    bureau.check_money()


@pytest.mark.case("E5")
def test_lost_rows_are_read_before_they_are_bought_again(bureau: Any) -> None:
    lost(bureau)
    quirky(bureau, late=None)
    again = bureau.submit(TEXTS, resubmit_lost=True)
    assert again.status().state == "done"
    bureau.check(again, TEXTS)
    assert len(bureau.jobs) == 1
    bureau.check_money()


@pytest.mark.case("E5")
def test_what_cannot_be_read_again_is_bought_when_it_is_asked_for(bureau: Any) -> None:
    lost(bureau)
    again = bureau.submit(TEXTS, resubmit_lost=True)
    quirky(bureau, late=None)
    bureau.work(again)
    bureau.check(again, TEXTS)
    assert len(bureau.jobs) == 2
    assert bureau.spent().held == Amount()


@pytest.mark.case("E5")
@pytest.mark.parametrize("bad", ["zeros", "width"])
def test_every_setting_that_decides_what_is_believed_can_be_changed(bureau: Any, bad: str) -> None:
    width = 32 if bad == "zeros" else 16
    vector = np.zeros(width, dtype=np.float32) + (bad == "width")
    config = {"on_zero": "reject"} if bad == "zeros" else {}
    truth = bureau.strategy.results
    bureau.strategy.results = lambda job_id: iter(
        bureau.named(0, [BatchOutcome(id=str(row), vector=vector, tokens=2) for row in range(6)])
    )
    job = bureau.work(bureau.submit(TEXTS, **config))
    assert job.status().failed == 6
    if bad == "width":
        # The server is mended.
        bureau.strategy.results = truth
    again = bureau.client().batch_job(job.id)
    assert again.read_again() == 6
    assert len(bureau.jobs) == 1


@pytest.mark.case("E5")
def test_two_different_vectors_for_one_text_are_never_believed(bureau: Any) -> None:
    quirky(bureau, duplicate_different="text 02")
    job = bureau.work(bureau.submit(TEXTS))
    bureau.check(job, TEXTS, without=[2])
    assert job.read_again() == 0
    bureau.check(job, TEXTS, without=[2])
