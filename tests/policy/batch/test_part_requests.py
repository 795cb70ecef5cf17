"""A job is asked for with the input that is there, as soon as it can be used, and none is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import ProviderUnavailable, RateLimited, RequestRejected
from embedcore.testing.openai.batches import Quirks as Quirks

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = ["one", "two", "three"]


def not_ready(batch_desk: Any, **how: Any) -> Any:
    for name, value in how.items():
        setattr(batch_desk.service.settings, f"not_ready_{name}", value)
    return batch_desk


def inputs(batch_desk: Any) -> list[str]:
    """Input files that are at the provider."""
    return [file["id"] for file in batch_desk.service.files(purpose="batch")["data"]]


@pytest.mark.case("E4")
@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("word", ["pending", None])
@pytest.mark.parametrize("creates", [1, 3])
def test_a_file_that_is_not_ready_is_asked_for_again(
    batch_desk: Any, status: int, word: str | None, creates: int
) -> None:
    not_ready(batch_desk, creates=creates, status=status, word=word)
    job = batch_desk.submit(TEXTS)
    assert job.status(poll=False).state == "running", "that is no refusal"
    batch_desk.work(job, seconds=1)
    batch_desk.check(job, TEXTS)
    assert batch_desk.strategy.calls.count("upload") == 1
    assert inputs(batch_desk) == [batch_desk.jobs[0].input_file_id], "no orphans"
    batch_desk.check_money()


@pytest.mark.case("E4")
def test_a_file_that_takes_minutes_is_waited_for(batch_desk: Any) -> None:
    not_ready(batch_desk, seconds=400.0)
    job = batch_desk.submit(TEXTS)
    asked = []
    for second in range(0, 500, 5):
        batch_desk.strategy.calls.clear()
        job.advance()
        asked += [second] * batch_desk.strategy.calls.count("create")
        batch_desk.clock.advance(5)
    assert len(asked) < 20
    assert asked[-1] < 500
    (remote,) = job.status().jobs
    assert (remote.phase, remote.trouble) == ("submitted", None)
    assert batch_desk.strategy.calls.count("upload") == 0
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)


@pytest.mark.case("E4")
@pytest.mark.parametrize("how", ["status", "result"])
def test_whoever_asks_has_it_tried_at_once(batch_desk: Any, how: str) -> None:
    not_ready(batch_desk, seconds=1e9)
    job = batch_desk.submit(TEXTS)
    batch_desk.clock.advance(300)
    job.status()
    batch_desk.strategy.calls.clear()
    job.advance()
    assert batch_desk.strategy.calls == [], "by itself only now and then"
    not_ready(batch_desk, seconds=0.0)
    job.status() if how == "status" else job.result(timeout=0, on_error="keep")
    assert len(batch_desk.jobs) == 1
    assert batch_desk.spent().held.tokens == 4


@pytest.mark.case("E4")
@pytest.mark.parametrize("status", [400, 404])
def test_a_file_that_is_never_ready_ends_as_a_clear_error(batch_desk: Any, status: int) -> None:
    not_ready(batch_desk, seconds=1e9, status=status)
    job = batch_desk.submit(TEXTS, batch={"input_wait": 100.0})
    began = batch_desk.clock.time()
    problems: list[Any] = []
    while not problems:
        batch_desk.clock.advance(10)
        problems = job.advance()
    assert 100 <= batch_desk.clock.time() - began <= 120
    assert isinstance(problems[0], RequestRejected)
    assert "could not be used" in str(problems[0])
    assert inputs(batch_desk) == [], "what was refused is deleted"
    with pytest.raises(RequestRejected):
        for _ in range(30):
            batch_desk.clock.advance(10)
            job.wait(timeout=0)
    not_ready(batch_desk, seconds=0.0)
    batch_desk.work(job)
    batch_desk.check(job, TEXTS)
    assert len(inputs(batch_desk)) == 1


def _asks_too_often(batch_desk: Any) -> None:
    batch_desk.faults.push("create", error=RateLimited("too many jobs at once"), times=5)


def _is_refused(batch_desk: Any) -> None:
    batch_desk.faults.push("create", error=RequestRejected("400: no", billed="no"))


@pytest.mark.case("E4")
@pytest.mark.parametrize("fault", [_asks_too_often, _is_refused])
def test_an_input_that_is_replaced_is_deleted(
    batch_desk: Any, fault: Callable[[Any], None]
) -> None:
    # Two jobs: one that is refused must not make the whole batch a refused one.
    job = batch_desk.submit(TEXTS[:1])
    more = batch_desk.client(batch={"part_texts": 1}).submit_batch(TEXTS[1:])
    batch_desk.service.settings.enqueued_token_limit = None
    fault(batch_desk)
    third = batch_desk.client(batch={"part_texts": 1}).submit_batch(["x", "y"])
    for _ in range(12):
        third.advance()
        batch_desk.clock.advance(310)
    for one in (job, more, third):
        batch_desk.work(one)
    assert sorted(inputs(batch_desk)) == sorted(one.input_file_id for one in batch_desk.jobs)


@pytest.mark.case("E4")
def test_an_input_of_which_nobody_wants_a_job_is_deleted(batch_desk: Any) -> None:
    not_ready(batch_desk, seconds=1e9)
    job = batch_desk.submit(TEXTS)
    assert len(inputs(batch_desk)) == 1
    job.cancel()
    batch_desk.clock.advance(100)
    job.advance()
    assert inputs(batch_desk) == []
    assert job.record.state == "cancelled"


@pytest.mark.case("E4")
def test_an_input_that_cannot_be_deleted_is_left_to_others(batch_desk: Any) -> None:
    not_ready(batch_desk, seconds=1e9)
    job = batch_desk.submit(TEXTS)
    batch_desk.faults.push("discard", error=ProviderUnavailable("503", billed="no"))
    job.cancel()
    batch_desk.clock.advance(100)
    job.advance()
    assert job.record.state == "cancelled"
    assert len(inputs(batch_desk)) == 1
