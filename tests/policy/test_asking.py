"""A job is asked for with the input that is there, as soon as it can be used, and none is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import ProviderUnavailable, RateLimited, RequestRejected
from embedcore.testing.batches import Quirks as Quirks

bureau = run_path(str(Path(__file__).with_name("batch_bureau.py")))["bureau"]

TEXTS = ["one", "two", "three"]


def not_ready(bureau: Any, **how: Any) -> Any:
    for name, value in how.items():
        setattr(bureau.service.settings, f"not_ready_{name}", value)
    return bureau


def inputs(bureau: Any) -> list[str]:
    """Input files that are at the provider."""
    return [file["id"] for file in bureau.service.files(purpose="batch")["data"]]


@pytest.mark.case("E4")
@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("word", ["pending", None])
@pytest.mark.parametrize("creates", [1, 3])
def test_a_file_that_is_not_ready_is_asked_for_again(
    bureau: Any, status: int, word: str | None, creates: int
) -> None:
    not_ready(bureau, creates=creates, status=status, word=word)
    job = bureau.submit(TEXTS)
    assert job.status(poll=False).state == "running", "that is no refusal"
    bureau.work(job, seconds=1)
    bureau.check(job, TEXTS)
    assert bureau.strategy.calls.count("upload") == 1
    assert inputs(bureau) == [bureau.jobs[0].input_file_id], "no orphans"
    bureau.check_money()


@pytest.mark.case("E4")
def test_a_file_that_takes_minutes_is_waited_for(bureau: Any) -> None:
    not_ready(bureau, seconds=400.0)
    job = bureau.submit(TEXTS)
    asked = []
    for second in range(0, 500, 5):
        bureau.strategy.calls.clear()
        job.advance()
        asked += [second] * bureau.strategy.calls.count("create")
        bureau.clock.advance(5)
    assert len(asked) < 20
    assert asked[-1] < 500
    (remote,) = job.status().jobs
    assert (remote.phase, remote.trouble) == ("submitted", None)
    assert bureau.strategy.calls.count("upload") == 0
    bureau.work(job)
    bureau.check(job, TEXTS)


@pytest.mark.case("E4")
@pytest.mark.parametrize("how", ["status", "result"])
def test_whoever_asks_has_it_tried_at_once(bureau: Any, how: str) -> None:
    not_ready(bureau, seconds=1e9)
    job = bureau.submit(TEXTS)
    bureau.clock.advance(300)
    job.status()
    bureau.strategy.calls.clear()
    job.advance()
    assert bureau.strategy.calls == [], "by itself only now and then"
    not_ready(bureau, seconds=0.0)
    job.status() if how == "status" else job.result(timeout=0, on_error="keep")
    assert len(bureau.jobs) == 1
    assert bureau.spent().held.tokens == 4


@pytest.mark.case("E4")
@pytest.mark.parametrize("status", [400, 404])
def test_a_file_that_is_never_ready_ends_as_a_clear_error(bureau: Any, status: int) -> None:
    not_ready(bureau, seconds=1e9, status=status)
    job = bureau.submit(TEXTS, batch={"input_wait": 100.0})
    began = bureau.clock.time()
    problems: list[Any] = []
    while not problems:
        bureau.clock.advance(10)
        problems = job.advance()
    assert 100 <= bureau.clock.time() - began <= 120
    assert isinstance(problems[0], RequestRejected)
    assert "could not be used" in str(problems[0])
    assert inputs(bureau) == [], "what was refused is deleted"
    with pytest.raises(RequestRejected):
        for _ in range(30):
            bureau.clock.advance(10)
            job.wait(timeout=0)
    not_ready(bureau, seconds=0.0)
    bureau.work(job)
    bureau.check(job, TEXTS)
    assert len(inputs(bureau)) == 1


def _asks_too_often(bureau: Any) -> None:
    bureau.faults.push("create", error=RateLimited("too many jobs at once"), times=5)


def _is_refused(bureau: Any) -> None:
    bureau.faults.push("create", error=RequestRejected("400: no", billed="no"))


@pytest.mark.case("E4")
@pytest.mark.parametrize("fault", [_asks_too_often, _is_refused])
def test_an_input_that_is_replaced_is_deleted(bureau: Any, fault: Callable[[Any], None]) -> None:
    # Two jobs: one that is refused must not make the whole batch a refused one.
    job = bureau.submit(TEXTS[:1])
    more = bureau.client(batch={"part_texts": 1}).submit_batch(TEXTS[1:])
    bureau.service.settings.enqueued_token_limit = None
    fault(bureau)
    third = bureau.client(batch={"part_texts": 1}).submit_batch(["x", "y"])
    for _ in range(12):
        third.advance()
        bureau.clock.advance(310)
    for one in (job, more, third):
        bureau.work(one)
    assert sorted(inputs(bureau)) == sorted(one.input_file_id for one in bureau.jobs)


@pytest.mark.case("E4")
def test_an_input_of_which_nobody_wants_a_job_is_deleted(bureau: Any) -> None:
    not_ready(bureau, seconds=1e9)
    job = bureau.submit(TEXTS)
    assert len(inputs(bureau)) == 1
    job.cancel()
    bureau.clock.advance(100)
    job.advance()
    assert inputs(bureau) == []
    assert job.record.state == "cancelled"


@pytest.mark.case("E4")
def test_an_input_that_cannot_be_deleted_is_left_to_others(bureau: Any) -> None:
    not_ready(bureau, seconds=1e9)
    job = bureau.submit(TEXTS)
    bureau.faults.push("discard", error=ProviderUnavailable("503", billed="no"))
    job.cancel()
    bureau.clock.advance(100)
    job.advance()
    assert job.record.state == "cancelled"
    assert len(inputs(bureau)) == 1
