"""What an ended job owes is looked for, and never billed a second time without being asked."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import (
    InvalidResponse,
    ProviderUnavailable,
    RateLimited,
    RemoteGone,
    RequestRejected,
)
from embedcore.storage.amounts import Amount
from embedcore.testing.openai.batches import BatchSettings, Progress, Quirks

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(6)]
LATE = ["no file", "missing", "empty", "first line", "error"]
COUNTS = ["honest", "null", "absent", "wrong", "few"]
USAGE = ["honest", "null", "absent", "zero"]
# Every two of them together; all three in a campaign.
WAYS = [
    pytest.param(
        late,
        counts,
        usage,
        marks=[] if usage == USAGE[(row + column) % len(USAGE)] else pytest.mark.campaign,
    )
    for row, late in enumerate(LATE)
    for column, counts in enumerate(COUNTS)
    for usage in USAGE
]


def quirky(batch_desk: Any, **quirks: Any) -> Any:
    for name, value in quirks.items():
        setattr(batch_desk.service.settings.quirks, name, value)
    return batch_desk


# Late


@pytest.mark.case("E2")
@pytest.mark.fault(72)
@pytest.mark.parametrize(("late", "counts", "usage"), WAYS)
def test_an_output_that_comes_late_is_waited_for(
    batch_desk: Any, late: Any, counts: Any, usage: Any
) -> None:
    quirky(batch_desk, late=late, late_looks=3, counts=counts, usage=usage)
    job = batch_desk.work(batch_desk.submit(TEXTS), seconds=1)
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.case("E2")
@pytest.mark.case("E3")
@pytest.mark.fault(72)
@pytest.mark.parametrize(("late", "counts", "usage"), WAYS)
def test_an_output_that_never_comes_ends_the_waiting_and_buys_nothing(
    batch_desk: Any, late: Any, counts: Any, usage: Any
) -> None:
    quirky(batch_desk, late=late, late_looks=None, counts=counts, usage=usage)
    job = batch_desk.submit(TEXTS)
    began = batch_desk.clock.time()
    batch_desk.work(job)
    assert 600 <= batch_desk.clock.time() - began < 800
    arrived = 1 if late == "first line" else 0
    result = job.result(on_error="keep")
    assert int(result.ok.sum()) == arrived
    assert all("output_gone" in error.message for error in result.errors.values())
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money(certain=False)
    assert batch_desk.spent().spent.tokens == 12, "it was billed, or may have been"

    again = batch_desk.submit(TEXTS)
    batch_desk.work(again)
    assert len(batch_desk.jobs) == 1, "nor by the next batch"


@pytest.mark.case("E2")
@settings(max_examples=settings.default.max_examples * 3 // 10, deadline=None)
@given(
    counts=st.sampled_from(COUNTS),
    usage=st.sampled_from(USAGE),
    lost=st.sets(st.integers(0, 5), min_size=1, max_size=5),
)
def test_it_is_decided_for_each_row(
    tmp_path_factory: pytest.TempPathFactory, counts: Any, usage: Any, lost: set[int]
) -> None:
    """Any lines may be missing: the others are collected, and those are not billed again."""
    made = batch_desk.__wrapped__(tmp_path_factory.mktemp("rows"))
    one = quirky(next(made), counts=counts, usage=usage)
    job = one.submit(
        [f"{text} {'lost' if row in lost else 'good'}" for row, text in enumerate(TEXTS)]
    )
    one.service.settings.quirks.missing = "lost"
    one.work(job)
    result = job.result(on_error="keep")
    assert {row for row in range(6) if not result.ok[row]} == lost
    assert all("output_gone" in error.message for error in result.errors.values())
    assert len(one.jobs) == 1
    one.check_money(certain=False)
    made.close()


@pytest.mark.case("E2")
def test_rows_that_arrive_are_kept_while_the_others_are_waited_for(batch_desk: Any) -> None:
    quirky(batch_desk, late="first line", late_looks=None)
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    report = job.status()
    assert (report.state, report.stored, report.in_flight) == ("running", 1, 5)
    assert "its results are not all there yet" in (report.jobs[0].trouble or "")
    assert report.reserved_tokens == 12
    context = batch_desk.last._context()
    assert len(context.stored(context.keys(None).of(TEXTS))) == 1


@pytest.mark.case("E2")
def test_lines_that_go_on_coming_are_waited_for_longer(batch_desk: Any) -> None:
    """The time begins anew with every line that comes."""
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    for row in range(5):
        batch_desk.service.settings.quirks.missing = None
        truth, least = batch_desk.strategy.__class__.results, row + 1
        batch_desk.strategy.results = lambda name, truth=truth, least=least: iter(
            sorted(truth(batch_desk.strategy, name), key=lambda line: line.id)[:least]
        )
        job.advance(asked=True)
        batch_desk.clock.advance(550)
    del batch_desk.strategy.results
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E2")
def test_the_time_is_a_setting(batch_desk: Any) -> None:
    quirky(batch_desk, late="empty", late_looks=None)
    began = batch_desk.clock.time()
    batch_desk.work(batch_desk.submit(TEXTS, batch={"output_wait": 50.0}), seconds=5)
    assert 50 <= batch_desk.clock.time() - began < 60
    batch_desk.finish_all()
    other = batch_desk.submit(["another"], batch={"output_wait": 0.0})
    batch_desk.finish_all()
    assert other.status().state == "done", "0: it is not looked for again"


@pytest.mark.case("E2")
def test_one_look_is_no_proof_for_who_buys_again_what_is_lost(batch_desk: Any) -> None:
    quirky(batch_desk, late="empty", late_looks=1)
    job = batch_desk.submit(TEXTS, batch={"output_wait": 0.0}, resubmit_lost=True)
    batch_desk.work(job)
    assert len(batch_desk.jobs) == 1
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E2")
@pytest.mark.parametrize("how", ["status", "result", "wait", "advance"])
def test_whoever_asks_has_it_looked_for_at_once(batch_desk: Any, how: str) -> None:
    quirky(batch_desk, late="empty", late_looks=None)
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    job.status()
    batch_desk.clock.advance(300)
    job.status()
    batch_desk.strategy.calls.clear()
    job.advance()
    assert batch_desk.strategy.calls == [], "by itself only now and then"
    quirky(batch_desk, late=None)
    if how == "status":
        assert job.status().state == "done"
    elif how == "result":
        assert job.result(timeout=0).ok.all()
    elif how == "wait":
        assert job.wait(timeout=0).has_ended
    else:
        job.advance(asked=True)
        assert job.record.has_ended
    batch_desk.check(job, TEXTS)


def refuse(batch_desk: Any, what: str, error: Any) -> None:
    """From now on a call is answered with this error."""
    batch_desk.faults.push(what, error=error, times=1_000)


@pytest.mark.case("E2")
@pytest.mark.case("E3")
@pytest.mark.parametrize("what", ["results", "poll"])
def test_our_own_pauses_are_not_for_who_asks(batch_desk: Any, what: str) -> None:
    """A server that was away for a while has the results by now: who asks need not wait."""
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    refuse(batch_desk, what, ProviderUnavailable("503: later", status=503, billed="no"))
    for _ in range(8):
        job.status()
    batch_desk.faults.clear()
    batch_desk.strategy.calls.clear()
    job.advance()
    assert batch_desk.strategy.calls == [], "that would be minutes from now"
    assert job.status().state == "done"
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E3")
@pytest.mark.parametrize("what", ["results", "poll"])
def test_the_pauses_that_a_provider_asks_for_are_for_everybody(batch_desk: Any, what: str) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    refuse(batch_desk, what, RateLimited("429: slowly", retry_after=90.0, status=429))
    job.status()
    batch_desk.faults.clear()
    batch_desk.strategy.calls.clear()
    batch_desk.clock.advance(89)
    assert job.status().state == "running"
    other = batch_desk.client().batch_job(job.id)
    assert other.status().state == "running"
    assert batch_desk.strategy.calls == [], "by any process"
    batch_desk.clock.advance(2)
    assert other.status().state == "done"
    batch_desk.check(other, TEXTS)


@pytest.mark.case("E3")
def test_to_ask_often_does_not_end_it_sooner(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    refuse(batch_desk, "results", ProviderUnavailable("500: broken", status=500, billed="no"))
    for _ in range(40):
        job.status()
        batch_desk.clock.advance(10)
    assert job.status().state == "running"
    batch_desk.faults.clear()
    assert job.status().state == "done"
    batch_desk.check(job, TEXTS)


@pytest.mark.case("E3")
def test_what_came_too_late_is_read_by_the_next_who_asks_for_the_result(batch_desk: Any) -> None:
    quirky(batch_desk, late="no file", late_looks=None)
    job = batch_desk.work(batch_desk.submit(TEXTS))
    assert not job.result(on_error="keep").ok.any()
    quirky(batch_desk, late=None)
    again = batch_desk.client().batch_job(job.id)
    batch_desk.check(again, TEXTS)
    assert again.status().state == "done"
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.case("E2")
@pytest.mark.parametrize("usage", ["absent", "zero", "null"])
def test_a_job_that_does_not_account_for_all_its_texts_proves_nothing(
    batch_desk: Any, usage: Any
) -> None:
    """It has completed, it says, 5 of 6 texts, and names no other as failed."""
    quirky(batch_desk, counts="few", missing="03", usage=usage)
    job = batch_desk.work(batch_desk.submit(TEXTS))
    result = batch_desk.check(job, TEXTS, without=[3])
    assert "output_gone: its provider counts 5 done" in str(result.errors[3])
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.case("E2")
def test_a_job_that_is_done_and_names_nothing_that_it_did_proves_nothing(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.service.step(batch_desk.jobs[0].id)
    batch_desk.service.finish(batch_desk.jobs[0].id, done=0)
    batch_desk.work(job)
    result = job.result(on_error="keep")
    assert all("output_gone" in error.message for error in result.errors.values())
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money(certain=False)


@pytest.mark.case("E2")
def test_it_is_looked_for_at_once_and_then_more_and_more_rarely(batch_desk: Any) -> None:
    quirky(batch_desk, late="empty", late_looks=None)
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    looked = []
    for second in range(700):
        batch_desk.strategy.calls.clear()
        job.advance()
        if "results" in batch_desk.strategy.calls:
            looked.append(second)
        batch_desk.clock.advance(1)
    assert looked[:4] == [0, 1, 2, 4]
    assert len(looked) < 25
    waits = np.diff(looked)
    assert max(waits) <= 61


@pytest.mark.case("E2")
def test_result_returns_and_says_why(batch_desk: Any) -> None:
    quirky(batch_desk, late="no file", late_looks=None)
    job = batch_desk.submit(TEXTS, batch={"output_wait": 0.02})
    batch_desk.finish_all()
    batch_desk.last._engine.account.ledger._clock = __import__("time").time
    result = job.result(poll_interval=0.01, on_error="keep")
    assert not result.ok.any()
    assert "its provider counts 6 done, and there are results for 0" in result.errors[0].message


# Gone


@pytest.mark.case("E3")
@pytest.mark.fault(70)
@pytest.mark.parametrize(
    "error",
    [
        RemoteGone("404: no such file", status=404),
        RequestRejected("400: the file is not ready", status=400, billed="no"),
        InvalidResponse("a page instead of lines", billed="no"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("at", [0, 3])
def test_results_that_cannot_be_had_once_are_read_again(
    batch_desk: Any, error: Any, at: int
) -> None:
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    batch_desk.faults.push("results", at=at, error=error, times=2)
    job.wait(timeout=0)
    batch_desk.work(job, seconds=1)
    batch_desk.check(job, TEXTS)
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


@pytest.mark.case("E3")
@pytest.mark.parametrize("counts", ["honest", "absent"])
def test_an_error_file_that_comes_late_is_waited_for(batch_desk: Any, counts: Any) -> None:
    batch_desk.service.fail_lines("02", status=400, message="not this one")
    quirky(batch_desk, late="missing", late_files="error", late_looks=2, counts=counts)
    job = batch_desk.work(batch_desk.submit(TEXTS), seconds=1)
    result = batch_desk.check(job, TEXTS, without=[2])
    assert "not this one" in str(result.errors[2])
    assert len(batch_desk.jobs) == 1


@pytest.mark.case("E3")
def test_an_error_file_that_never_comes_does_not_cost_the_good_rows(batch_desk: Any) -> None:
    """What the provider counts as failed was not paid for: it is tried again."""
    batch_desk.service.fail_lines("02", status=400, message="not this one", times=1)
    quirky(batch_desk, late="missing", late_files="error", late_looks=None)
    job = batch_desk.work(batch_desk.submit(TEXTS))
    batch_desk.check(job, TEXTS)
    assert [len(batch_desk.service.input_lines(one.input_file_id)) for one in batch_desk.jobs] == [
        6,
        1,
    ]
    batch_desk.check_money()


@pytest.mark.case("E3")
def test_a_key_that_was_withdrawn_is_not_taken_for_a_late_output(batch_desk: Any) -> None:
    from embedcore.errors import PermissionDenied

    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    batch_desk.faults.push("results", error=PermissionDenied("not with this key"), times=1_000)
    for _ in range(30):
        job.advance()
        batch_desk.clock.advance(100)
    with pytest.raises(PermissionDenied):
        job.wait(timeout=30)
    batch_desk.faults.clear()
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)


# Another job's


@pytest.mark.case("E1")
@pytest.mark.parametrize("usage", ["honest", "absent"])
@pytest.mark.parametrize("counts", ["honest", "absent"])
def test_two_jobs_that_get_each_others_output_keep_nothing_of_it(
    batch_desk: Any, counts: Any, usage: Any
) -> None:
    quirky(batch_desk, counts=counts, usage=usage)
    job = batch_desk.submit(TEXTS, batch={"part_texts": 3})
    batch_desk.finish_all()
    batch_desk.service.swap_outputs(*(one.id for one in batch_desk.jobs))
    job.status()
    context = batch_desk.last._context()
    assert context.stored(context.keys(None).of(TEXTS)) == set()
    assert job.status(poll=False).stored == 0
    batch_desk.work(job)
    result = job.result(on_error="keep")
    assert not result.ok.any()
    assert np.isnan(result.vectors).all()
    assert all("output_gone" in error.message for error in result.errors.values())
    assert "3 lines name no text of it" in result.errors[0].message
    assert len(batch_desk.jobs) == 2, "nothing is billed again"
    assert batch_desk.spent().spent.tokens == 12
    assert batch_desk.spent().held == Amount()


@pytest.mark.case("E1")
def test_an_exchange_that_is_undone_in_time_loses_nothing(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, batch={"part_texts": 3})
    batch_desk.finish_all()
    ids = [one.id for one in batch_desk.jobs]
    batch_desk.service.swap_outputs(*ids)
    job.status()
    batch_desk.service.swap_outputs(*ids)
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E1")
@pytest.mark.case("E2")
def test_lines_that_are_only_numbered_are_nobodys(batch_desk: Any) -> None:
    """Nothing says that the numbers are those of our lines."""
    quirky(batch_desk, numeric_ids=True)
    job = batch_desk.work(batch_desk.submit(TEXTS))
    result = job.result(on_error="keep")
    assert not result.ok.any()
    assert len(batch_desk.jobs) == 1
    batch_desk.check_money()


# What was not paid for


@pytest.mark.case("E2")
@pytest.mark.fault(63)
@pytest.mark.parametrize("usage", ["honest", "absent"])
@pytest.mark.parametrize("done", [0, 2])
def test_what_a_job_did_not_come_to_is_sent_again_at_once(
    batch_desk: Any, done: int, usage: Any
) -> None:
    quirky(batch_desk, usage=usage)
    job = batch_desk.submit(TEXTS)
    batch_desk.service.expire(batch_desk.jobs[0].id, done=done)
    job.advance()
    assert [len(batch_desk.service.input_lines(one.input_file_id)) for one in batch_desk.jobs] == [
        6,
        6 - done,
    ]
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


@pytest.mark.case("E2")
def test_the_late_output_of_an_expired_job_is_waited_for_as_well(batch_desk: Any) -> None:
    quirky(batch_desk, late="no file", late_looks=3)
    job = batch_desk.submit(TEXTS)
    batch_desk.service.expire(batch_desk.jobs[0].id, done=4)
    job.advance()
    assert len(batch_desk.jobs) == 1
    batch_desk.work(job, seconds=1)
    batch_desk.check(job, TEXTS)
    batch_desk.check_money()


def test_a_batch_that_was_cancelled_waits_for_nothing(batch_desk: Any) -> None:
    quirky(batch_desk, late="no file", late_looks=None)
    job = batch_desk.submit(TEXTS)
    batch_desk.service.step(batch_desk.jobs[0].id, done=0)
    batch_desk.service.step(batch_desk.jobs[0].id, done=2)
    job.cancel()
    batch_desk.service.end_cancel(batch_desk.jobs[0].id)
    job.advance()
    assert job.record.state == "cancelled"
    assert batch_desk.spent().held == Amount()


@pytest.mark.fault(79)
def test_a_connection_that_breaks_is_no_late_output(batch_desk: Any) -> None:
    batch_desk.provide(settings=BatchSettings(progress=Progress(polls=1), quirks=Quirks(cut=0.5)))
    job = batch_desk.submit(TEXTS)
    for _ in range(4):
        job.advance()
        batch_desk.clock.advance(301)
    report = job.status(poll=False)
    assert (report.state, report.stored) == ("running", 3)
    quirky(batch_desk, cut=None)


@pytest.mark.case("E2")
@pytest.mark.fault(91)
def test_a_wait_that_began_by_a_wrong_clock_ends_once_the_clock_is_repaired(
    batch_desk: Any,
) -> None:
    quirky(batch_desk, late="empty", late_looks=None)
    job = batch_desk.submit(TEXTS)
    batch_desk.finish_all()
    ledger = batch_desk.last._engine.account.ledger
    real = batch_desk.clock.time
    ledger._clock = lambda: real() + 40 * 86_400
    refuse(batch_desk, "results", RateLimited("429: slowly", retry_after=90.0, status=429))
    job.status()
    ledger._clock = real
    ledger.repair_clock()
    batch_desk.faults.clear()
    batch_desk.strategy.calls.clear()
    job.advance()
    assert "results" in batch_desk.strategy.calls, "the pause that was asked for is over as well"
    began = real()
    batch_desk.work(job)
    assert real() - began < 800
