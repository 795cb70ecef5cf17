"""What an ended job owes is looked for, and never bought a second time without being asked."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from embedcore.errors import (
    InvalidResponse,
    ProviderUnavailable,
    RateLimited,
    RemoteGone,
    RequestRejected,
)
from embedcore.storage.amounts import Amount
from embedcore.testing.batches import BatchSettings, Progress, Quirks

bureau = run_path(str(Path(__file__).with_name("batch_bureau.py")))["bureau"]

TEXTS = [f"text {number:02d}" for number in range(6)]
LATE = ["no file", "missing", "empty", "first line", "error"]
COUNTS = ["honest", "null", "absent", "wrong", "few"]
USAGE = ["honest", "null", "absent", "zero"]


def quirky(bureau: Any, **quirks: Any) -> Any:
    for name, value in quirks.items():
        setattr(bureau.service.settings.quirks, name, value)
    return bureau


# Late


@pytest.mark.case("E2")
@pytest.mark.fault(72)
@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("usage", USAGE)
def test_an_output_that_comes_late_is_waited_for(
    bureau: Any, late: Any, counts: Any, usage: Any
) -> None:
    quirky(bureau, late=late, late_looks=3, counts=counts, usage=usage)
    job = bureau.work(bureau.submit(TEXTS), seconds=1)
    bureau.check(job, TEXTS)
    assert len(bureau.jobs) == 1
    bureau.check_money()


@pytest.mark.case("E2")
@pytest.mark.case("E3")
@pytest.mark.fault(72)
@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("usage", USAGE)
def test_an_output_that_never_comes_ends_the_waiting_and_buys_nothing(
    bureau: Any, late: Any, counts: Any, usage: Any
) -> None:
    quirky(bureau, late=late, late_looks=None, counts=counts, usage=usage)
    job = bureau.submit(TEXTS)
    began = bureau.clock.time()
    bureau.work(job)
    assert 600 <= bureau.clock.time() - began < 800
    arrived = 1 if late == "first line" else 0
    result = job.result(on_error="keep")
    assert int(result.ok.sum()) == arrived
    assert all("output_gone" in error.message for error in result.errors.values())
    assert len(bureau.jobs) == 1
    bureau.check_money(certain=False)
    assert bureau.spent().spent.tokens == 12, "it was billed, or may have been"

    again = bureau.submit(TEXTS)
    bureau.work(again)
    assert len(bureau.jobs) == 1, "nor by the next batch"


@pytest.mark.case("E2")
@pytest.mark.parametrize("usage", USAGE)
@pytest.mark.parametrize("counts", COUNTS)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lost=st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_it_is_decided_for_each_row(
    tmp_path_factory: pytest.TempPathFactory, counts: Any, usage: Any, lost: set[int]
) -> None:
    """Any lines may be missing: the others are collected, and those are not bought again."""
    made = bureau.__wrapped__(tmp_path_factory.mktemp("rows"))
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
def test_rows_that_arrive_are_kept_while_the_others_are_waited_for(bureau: Any) -> None:
    quirky(bureau, late="first line", late_looks=None)
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    report = job.status()
    assert (report.state, report.stored, report.in_flight) == ("running", 1, 5)
    assert "its results are not all there yet" in (report.jobs[0].trouble or "")
    assert report.held_tokens == 12
    office = bureau.last._office()
    assert len(office.stored(office.keys(None).of(TEXTS))) == 1


@pytest.mark.case("E2")
def test_lines_that_go_on_coming_are_waited_for_longer(bureau: Any) -> None:
    """The time begins anew with every line that comes."""
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    for row in range(5):
        bureau.service.settings.quirks.missing = None
        truth, least = bureau.strategy.__class__.results, row + 1
        bureau.strategy.results = lambda name, truth=truth, least=least: iter(
            sorted(truth(bureau.strategy, name), key=lambda line: line.id)[:least]
        )
        job.advance(asked=True)
        bureau.clock.advance(550)
    del bureau.strategy.results
    bureau.work(job)
    bureau.check(job, TEXTS)
    bureau.check_money()


@pytest.mark.case("E2")
def test_the_time_is_a_setting(bureau: Any) -> None:
    quirky(bureau, late="empty", late_looks=None)
    began = bureau.clock.time()
    bureau.work(bureau.submit(TEXTS, batch={"output_wait": 50.0}), seconds=5)
    assert 50 <= bureau.clock.time() - began < 60
    bureau.finish_all()
    other = bureau.submit(["another"], batch={"output_wait": 0.0})
    bureau.finish_all()
    assert other.status().state == "done", "0: it is not looked for again"


@pytest.mark.case("E2")
@pytest.mark.parametrize("how", ["status", "result", "wait", "advance"])
def test_whoever_asks_has_it_looked_for_at_once(bureau: Any, how: str) -> None:
    quirky(bureau, late="empty", late_looks=None)
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    job.status()
    bureau.clock.advance(300)
    job.status()
    bureau.strategy.calls.clear()
    job.advance()
    assert bureau.strategy.calls == [], "by itself only now and then"
    quirky(bureau, late=None)
    if how == "status":
        assert job.status().state == "done"
    elif how == "result":
        assert job.result(timeout=0).ok.all()
    elif how == "wait":
        assert job.wait(timeout=0).has_ended
    else:
        job.advance(asked=True)
        assert job.record.has_ended
    bureau.check(job, TEXTS)


def refuse(bureau: Any, what: str, error: Any) -> None:
    """From now on a call is answered with this error."""
    bureau.faults.push(what, error=error, times=1_000)


@pytest.mark.case("E2")
@pytest.mark.case("E3")
@pytest.mark.parametrize("what", ["results", "poll"])
def test_our_own_pauses_are_not_for_who_asks(bureau: Any, what: str) -> None:
    """A server that was away for a while has the results by now: who asks need not wait."""
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    refuse(bureau, what, ProviderUnavailable("503: later", status=503, billed="no"))
    for _ in range(8):
        job.status()
    bureau.faults.clear()
    bureau.strategy.calls.clear()
    job.advance()
    assert bureau.strategy.calls == [], "that would be minutes from now"
    assert job.status().state == "done"
    bureau.check(job, TEXTS)
    bureau.check_money()


@pytest.mark.case("E3")
@pytest.mark.parametrize("what", ["results", "poll"])
def test_the_pauses_that_a_provider_asks_for_are_for_everybody(bureau: Any, what: str) -> None:
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    refuse(bureau, what, RateLimited("429: slowly", retry_after=90.0, status=429))
    job.status()
    bureau.faults.clear()
    bureau.strategy.calls.clear()
    bureau.clock.advance(89)
    assert job.status().state == "running"
    other = bureau.client().batch_job(job.id)
    assert other.status().state == "running"
    assert bureau.strategy.calls == [], "by any process"
    bureau.clock.advance(2)
    assert other.status().state == "done"
    bureau.check(other, TEXTS)


@pytest.mark.case("E3")
def test_to_ask_often_does_not_end_it_sooner(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    refuse(bureau, "results", ProviderUnavailable("500: broken", status=500, billed="no"))
    for _ in range(40):
        job.status()
        bureau.clock.advance(10)
    assert job.status().state == "running"
    bureau.faults.clear()
    assert job.status().state == "done"
    bureau.check(job, TEXTS)


@pytest.mark.case("E3")
def test_what_came_too_late_is_read_by_the_next_who_asks_for_the_result(bureau: Any) -> None:
    quirky(bureau, late="no file", late_looks=None)
    job = bureau.work(bureau.submit(TEXTS))
    assert not job.result(on_error="keep").ok.any()
    quirky(bureau, late=None)
    again = bureau.client().batch_job(job.id)
    bureau.check(again, TEXTS)
    assert again.status().state == "done"
    assert len(bureau.jobs) == 1
    bureau.check_money()


@pytest.mark.case("E2")
@pytest.mark.parametrize("usage", ["absent", "zero", "null"])
def test_a_job_that_does_not_account_for_all_its_texts_proves_nothing(
    bureau: Any, usage: Any
) -> None:
    """It has completed, it says, 5 of 6 texts, and names no other as failed."""
    quirky(bureau, counts="few", missing="03", usage=usage)
    job = bureau.work(bureau.submit(TEXTS))
    result = bureau.check(job, TEXTS, without=[3])
    assert "output_gone: its provider counts 5 done" in str(result.errors[3])
    assert len(bureau.jobs) == 1
    bureau.check_money()


@pytest.mark.case("E2")
def test_a_job_that_is_done_and_names_nothing_that_it_did_proves_nothing(bureau: Any) -> None:
    job = bureau.submit(TEXTS)
    bureau.service.step(bureau.jobs[0].id)
    bureau.service.finish(bureau.jobs[0].id, done=0)
    bureau.work(job)
    result = job.result(on_error="keep")
    assert all("output_gone" in error.message for error in result.errors.values())
    assert len(bureau.jobs) == 1
    bureau.check_money(certain=False)


@pytest.mark.case("E2")
def test_it_is_looked_for_at_once_and_then_more_and_more_rarely(bureau: Any) -> None:
    quirky(bureau, late="empty", late_looks=None)
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    looked = []
    for second in range(700):
        bureau.strategy.calls.clear()
        job.advance()
        if "results" in bureau.strategy.calls:
            looked.append(second)
        bureau.clock.advance(1)
    assert looked[:4] == [0, 1, 2, 4]
    assert len(looked) < 25
    waits = np.diff(looked)
    assert max(waits) <= 61


@pytest.mark.case("E2")
def test_result_returns_and_says_why(bureau: Any) -> None:
    quirky(bureau, late="no file", late_looks=None)
    job = bureau.submit(TEXTS, batch={"output_wait": 0.02})
    bureau.finish_all()
    bureau.last._engine.account.ledger._clock = __import__("time").time
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
def test_results_that_cannot_be_had_once_are_read_again(bureau: Any, error: Any, at: int) -> None:
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    bureau.faults.push("results", at=at, error=error, times=2)
    job.wait(timeout=0)
    bureau.work(job, seconds=1)
    bureau.check(job, TEXTS)
    assert len(bureau.jobs) == 1
    bureau.check_money()


@pytest.mark.case("E3")
@pytest.mark.parametrize("counts", ["honest", "absent"])
def test_an_error_file_that_comes_late_is_waited_for(bureau: Any, counts: Any) -> None:
    bureau.service.fail_lines("02", status=400, message="not this one")
    quirky(bureau, late="missing", late_files="error", late_looks=2, counts=counts)
    job = bureau.work(bureau.submit(TEXTS), seconds=1)
    result = bureau.check(job, TEXTS, without=[2])
    assert "not this one" in str(result.errors[2])
    assert len(bureau.jobs) == 1


@pytest.mark.case("E3")
def test_an_error_file_that_never_comes_does_not_cost_the_good_rows(bureau: Any) -> None:
    """What the provider counts as failed was not paid for: it is tried again."""
    bureau.service.fail_lines("02", status=400, message="not this one", times=1)
    quirky(bureau, late="missing", late_files="error", late_looks=None)
    job = bureau.work(bureau.submit(TEXTS))
    bureau.check(job, TEXTS)
    assert [len(bureau.service.input_lines(one.input_file_id)) for one in bureau.jobs] == [6, 1]
    bureau.check_money()


@pytest.mark.case("E3")
def test_a_key_that_was_withdrawn_is_not_taken_for_a_late_output(bureau: Any) -> None:
    from embedcore.errors import PermissionDenied

    job = bureau.submit(TEXTS)
    bureau.finish_all()
    bureau.faults.push("results", error=PermissionDenied("not with this key"), times=1_000)
    for _ in range(30):
        job.advance()
        bureau.clock.advance(100)
    with pytest.raises(PermissionDenied):
        job.wait(timeout=30)
    bureau.faults.clear()
    bureau.work(job)
    bureau.check(job, TEXTS)


# Another job's


@pytest.mark.case("E1")
@pytest.mark.parametrize("usage", ["honest", "absent"])
@pytest.mark.parametrize("counts", ["honest", "absent"])
def test_two_jobs_that_get_each_others_output_keep_nothing_of_it(
    bureau: Any, counts: Any, usage: Any
) -> None:
    quirky(bureau, counts=counts, usage=usage)
    job = bureau.submit(TEXTS, batch={"part_texts": 3})
    bureau.finish_all()
    bureau.service.swap_outputs(*(one.id for one in bureau.jobs))
    job.status()
    office = bureau.last._office()
    assert office.stored(office.keys(None).of(TEXTS)) == set()
    assert job.status(poll=False).stored == 0
    bureau.work(job)
    result = job.result(on_error="keep")
    assert not result.ok.any()
    assert np.isnan(result.vectors).all()
    assert all("output_gone" in error.message for error in result.errors.values())
    assert "3 lines name no text of it" in result.errors[0].message
    assert len(bureau.jobs) == 2, "nothing is bought again"
    assert bureau.spent().spent.tokens == 12
    assert bureau.spent().held == Amount()


@pytest.mark.case("E1")
def test_an_exchange_that_is_undone_in_time_loses_nothing(bureau: Any) -> None:
    job = bureau.submit(TEXTS, batch={"part_texts": 3})
    bureau.finish_all()
    ids = [one.id for one in bureau.jobs]
    bureau.service.swap_outputs(*ids)
    job.status()
    bureau.service.swap_outputs(*ids)
    bureau.work(job)
    bureau.check(job, TEXTS)
    bureau.check_money()


@pytest.mark.case("E1")
@pytest.mark.case("E2")
def test_lines_that_are_only_numbered_are_nobodys(bureau: Any) -> None:
    """Nothing says that the numbers are those of our lines."""
    quirky(bureau, numeric_ids=True)
    job = bureau.work(bureau.submit(TEXTS))
    result = job.result(on_error="keep")
    assert not result.ok.any()
    assert len(bureau.jobs) == 1
    bureau.check_money()


# What was not paid for


@pytest.mark.case("E2")
@pytest.mark.fault(63)
@pytest.mark.parametrize("usage", ["honest", "absent"])
@pytest.mark.parametrize("done", [0, 2])
def test_what_a_job_did_not_come_to_is_sent_again_at_once(
    bureau: Any, done: int, usage: Any
) -> None:
    quirky(bureau, usage=usage)
    job = bureau.submit(TEXTS)
    bureau.service.expire(bureau.jobs[0].id, done=done)
    job.advance()
    assert [len(bureau.service.input_lines(one.input_file_id)) for one in bureau.jobs] == [
        6,
        6 - done,
    ]
    bureau.work(job)
    bureau.check(job, TEXTS)
    bureau.check_money()


@pytest.mark.case("E2")
def test_the_late_output_of_an_expired_job_is_waited_for_as_well(bureau: Any) -> None:
    quirky(bureau, late="no file", late_looks=3)
    job = bureau.submit(TEXTS)
    bureau.service.expire(bureau.jobs[0].id, done=4)
    job.advance()
    assert len(bureau.jobs) == 1
    bureau.work(job, seconds=1)
    bureau.check(job, TEXTS)
    bureau.check_money()


def test_a_batch_that_was_cancelled_waits_for_nothing(bureau: Any) -> None:
    quirky(bureau, late="no file", late_looks=None)
    job = bureau.submit(TEXTS)
    bureau.service.step(bureau.jobs[0].id, done=0)
    bureau.service.step(bureau.jobs[0].id, done=2)
    job.cancel()
    bureau.service.end_cancel(bureau.jobs[0].id)
    job.advance()
    assert job.record.state == "cancelled"
    assert bureau.spent().held == Amount()


@pytest.mark.fault(79)
def test_a_connection_that_breaks_is_no_late_output(bureau: Any) -> None:
    bureau.provide(settings=BatchSettings(progress=Progress(polls=1), quirks=Quirks(cut=0.5)))
    job = bureau.submit(TEXTS)
    for _ in range(4):
        job.advance()
        bureau.clock.advance(301)
    report = job.status(poll=False)
    assert (report.state, report.stored) == ("running", 3)
    quirky(bureau, cut=None)


@pytest.mark.case("E2")
@pytest.mark.fault(91)
def test_a_wait_that_began_by_a_wrong_clock_ends_once_the_clock_is_repaired(bureau: Any) -> None:
    quirky(bureau, late="empty", late_looks=None)
    job = bureau.submit(TEXTS)
    bureau.finish_all()
    ledger = bureau.last._engine.account.ledger
    real = bureau.clock.time
    ledger._clock = lambda: real() + 40 * 86_400
    refuse(bureau, "results", RateLimited("429: slowly", retry_after=90.0, status=429))
    job.status()
    ledger._clock = real
    ledger.repair_clock()
    bureau.faults.clear()
    bureau.strategy.calls.clear()
    job.advance()
    assert "results" in bureau.strategy.calls, "the pause that was asked for is over as well"
    began = real()
    bureau.work(job)
    assert real() - began < 800
