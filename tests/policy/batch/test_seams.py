"""The faults of batches, one by one: what is lost, late, twice or gone, and what it costs then.

Each ends with ``World.end``: everybody advances until all is quiet, and the ledger is compared with
the provider's bill.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedcore.policy.batch.cleanup import forget
from embedcore.testing.openai.batches import Listing, Progress


def _beside(name: str) -> Any:
    """A module of this folder: no test can be imported by its name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


world_of = _beside("batch_world")


@pytest.fixture
def world() -> Iterator[Any]:
    """Three processes; jobs move by hand until the end."""
    world = world_of.World(progress=Progress())
    world.service.settings.window = None
    yield world
    world.close()


def test_the_example_of_the_world_works() -> None:
    example = world_of.__doc__.split("::\n\n")[1].split("\n\n``")[0]
    exec(textwrap.dedent(example), vars(world_of).copy())


def _states(world: Any) -> list[str]:
    return [state for (state,) in world._rows("SELECT state FROM part ORDER BY id")]


def _ends(world: Any, *, unconfirmed: int = 0) -> None:
    """All comes to its end; beside the bill only so many tokens are spent."""
    world.end()
    billed = world.service.meter.billed_tokens
    assert world_of.spent(world).tokens == billed + unconfirmed


@pytest.mark.fault(56)
@pytest.mark.parametrize("effect", ["after", "late"])
@pytest.mark.parametrize("crash", [False, True])
def test_lost_upload(world: Any, effect: Any, crash: bool) -> None:
    world.processes[0].wire.faults.push("upload", effect, crash=crash, requests=1)
    world.submit(0, ["a", "b"])
    assert _states(world) == ["planned"]
    world.pass_time(130)
    world.advance(1)
    assert _states(world) == ["submitted"]
    assert len(world.service.jobs) == 1
    _ends(world)
    assert not world.service.meter.billed_twice


@pytest.mark.fault(57)
@pytest.mark.parametrize("crash", [False, True])
def test_lost_create_is_adopted(world: Any, crash: bool) -> None:
    world.processes[0].wire.faults.push("create", "after", crash=crash)
    world.submit(0, ["a", "b"])
    # Who still lives looks at once.
    assert _states(world) == ["creating" if crash else "submitted"]
    world.pass_time(130)
    world.advance(1)
    assert _states(world) == ["submitted"]
    _ends(world)
    assert len(world.service.jobs) == 2, "one more for the last text of the end"
    assert not world.service.meter.billed_twice


@pytest.mark.fault(57)
@pytest.mark.fault(59)
@pytest.mark.parametrize("seconds", [30.0, 300.0, 590.0])
def test_lost_create_that_the_list_does_not_show_yet(world: Any, seconds: float) -> None:
    world.service.settings.listing = Listing(lag_seconds=seconds, lag_listings=1)
    world.processes[0].seams.set("create after", 1, world.processes[0].seams.die)
    world.submit(0, ["a"])
    for _ in range(20):
        world.pass_time(61)
        world.advance(1)
        world.check()
    assert _states(world) == ["submitted"]
    _ends(world)
    assert not world.service.meter.billed_twice


@pytest.mark.fault(58)
def test_create_that_lands_behind_the_fence(world: Any) -> None:
    """Its input is gone: it is refused, and what was charged is corrected long after."""
    world.processes[0].wire.faults.push("create", "late", seconds=3_000.0)
    world.submit(0, ["a", "bread"])
    for _ in range(4):
        world.pass_time(700)
        world.advance(1)
    assert _states(world) == ["lost", "submitted"]
    (charged,) = world._rows("SELECT tokens FROM attempt WHERE state = 'charged'")
    assert charged == (3,)
    world.pass_time(3_000)
    assert world.service.landed == ["No such File object: file-0000000000000000000001"]
    assert len(world.service.jobs) == 1
    _ends(world)
    assert not world.service.meter.billed_twice


@pytest.mark.fault(58)
def test_create_that_no_fence_holds() -> None:
    """Where deleted inputs are accepted it runs: it was charged, is found, stopped and paid."""
    world = world_of.World(progress=Progress(seconds=1_000.0), keeps_deleted=True)
    world.processes[0].wire.faults.push("create", "late", seconds=2_500.0)
    world.submit(0, ["a", "bread"])
    for _ in range(8):
        world.pass_time(700)
        world.advance(1)
        world.check()
    world.end()
    assert sorted(world.service.meter.billed_twice) == ["a", "bread"]
    assert world_of.spent(world).tokens == world.service.meter.billed_tokens
    world.close()


@pytest.mark.fault(58)
@pytest.mark.fault(60)
def test_two_jobs_behind_the_fence() -> None:
    """Neither is left running."""
    world = world_of.World(progress=Progress(), keeps_deleted=True)
    world.processes[0].wire.faults.push("create", "late", seconds=2_500.0)
    world.submit(0, ["a", "bread"])
    ((file, key),) = world._rows("SELECT input, key FROM part")
    for _ in range(4):
        world.pass_time(700)
        world.advance(1)
    world.service.taken = lambda _: None
    world.service.create(file, metadata={world_of.KEY: key})
    for _ in range(3):
        world.pass_time(4_000)
        world.advance(1)
    twins = [job.status for job in world.service.jobs if world.key_of(job) == key]
    assert twins == ["cancelling", "cancelling"]
    world.close()


@pytest.mark.fault(58)
def test_create_that_lands_between_the_last_look_and_the_fence(world: Any) -> None:
    process = world.processes[1]
    world.processes[0].wire.faults.push("create", "late", seconds=7_000.0)
    world.submit(0, ["a"])
    for _ in range(3):
        process.seams.set("discard before", 1, world.land(0))
        world.advance(1)
        world.pass_time(700)
        world.check()
    process.seams.set("discard before", 1, world.land(0))
    world.advance(1)
    assert _states(world) == ["submitted"]
    _ends(world)
    assert not world.service.meter.billed_twice


@pytest.mark.fault(60)
def test_second_job_of_one_part(world: Any) -> None:
    """A proxy repeated the call: the earliest is ours, the other one is stopped and charged."""
    world.processes[0].wire.faults.push("create", "after", crash=True)
    world.submit(0, ["a", "bread"])
    (job,) = world.service.jobs
    world.time += 5
    # Around the world's own eyes, which would call it a violation.
    world.service.taken = lambda _: None
    world.service.create(job.input_file_id, metadata=job.metadata)
    world.pass_time(130)
    world.advance(1)
    first, second = world.service.jobs
    assert [first.status, second.status] == ["validating", "cancelling"]
    assert world._rows("SELECT job, jobs FROM part") == [(first.id, second.id)]
    recorded = world._rows("SELECT tokens, note FROM attempt WHERE state = 'recorded'")
    assert [tokens for tokens, _ in recorded] == [3]
    assert second.id in recorded[0][1]
    world.pass_time(100)
    world.advance(2)
    assert len(world._rows("SELECT 1 FROM attempt WHERE state = 'recorded'")) == 1


@pytest.mark.fault(61)
@pytest.mark.parametrize("effect", ["before", "after"])
def test_poll_errors_change_nothing(world: Any, effect: Any) -> None:
    world.submit(0, ["a", "b"])
    before = world._rows("SELECT state, job, attempt FROM part")
    for process in world.processes:
        process.wire.faults.push("poll", effect, times=5)
    for number in range(15):
        world.advance(number % 3)
        world.pass_time(700)
    assert world._rows("SELECT state, job, attempt FROM part") == before
    assert world.processes[0].wire.faults.pending == 0
    _ends(world)
    assert len(world.service.jobs) == 2, "one more for the last text of the end"


@pytest.mark.fault(63)
@pytest.mark.fault(64)
@pytest.mark.parametrize("how", ["expire", "finish", "end_cancel"])
def test_partial_results_are_kept(world: Any, how: str) -> None:
    world.submit(0, ["a", "bread"])
    (job,) = world.service.jobs
    world.service.step(job.id)
    if how == "end_cancel":
        world.cancel_elsewhere(job)
    getattr(world.service, how)(job.id, done=1)
    world.advance(1)
    if how == "end_cancel":
        assert world.service.jobs == [job], "until a person says so"
        world.send_again()
        world.advance(1)
    _, again = world.service.jobs
    done = {result.line.texts[0] for result in job.results}
    assert len(done) == 1
    assert set(world.texts_of(again)) == {"a", "bread"} - done
    _ends(world)
    assert not world.service.meter.billed_twice


@pytest.mark.fault(64)
def test_cancelling_for_hours(world: Any) -> None:
    """Whoever cancelled is told the end; another one who joined the job is not cancelled."""
    world.submit(0, ["a", "bread"])
    (job,) = world.service.jobs
    world.service.step(job.id, done=1)
    world.cancel(0, 0)
    assert job.status == "cancelling"
    for _ in range(5):
        world.pass_time(4_000)
        world.advance(1)
        world.check()
    assert world._rows("SELECT state FROM batch") == [("cancelling",)]
    world.service.end_cancel(job.id)
    world.pass_time(4_000)
    world.advance(1)
    assert world._rows("SELECT state FROM batch") == [("cancelled",)]
    _ends(world)


@pytest.mark.fault(64)
def test_cancelling_detaches_from_a_shared_job(world: Any) -> None:
    world.submit(0, ["a", "bread"])
    world.submit(1, ["bread"])
    world.cancel(0, 0)
    (job,) = world.service.jobs
    assert job.status == "validating"
    _ends(world)
    assert not world.service.meter.billed_twice


@pytest.mark.fault(64)
@pytest.mark.parametrize("how", ["cancel", "abandon"])
def test_who_joined_a_part_goes_on_when_its_planner_gives_up(world: Any, how: str) -> None:
    """The texts of the part are in the file of the one who has ended."""
    world.processes[0].wire.faults.push("upload", "before")
    world.submit(0, ["a", "bread"])
    world.submit(1, ["bread"])
    assert _states(world) == ["planned"]
    getattr(world, how)(0, 0)
    _ends(world)
    states = world._rows("SELECT state FROM batch ORDER BY id LIMIT 2")
    assert states[1] == ("done",)


@pytest.mark.fault(64)
@pytest.mark.fault(71)
def test_cancelled_job_that_is_gone_ends(world: Any) -> None:
    """Nobody waits for it, so nobody could abandon it: it ends by itself, charged."""
    world.submit(0, ["a", "bread"])
    (job,) = world.service.jobs
    world.service.step(job.id, done=1)
    world.cancel(0, 0)
    world.service.end_cancel(job.id)
    world.lose(job, output=False)
    for _ in range(3):
        world.pass_time(4_000)
        world.advance(1)
    assert _states(world) == ["done"]
    _ends(world, unconfirmed=3 - job.billed_tokens)


@pytest.mark.fault(75)
@pytest.mark.parametrize("seam", ["upload", "create", "poll", "results"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("taken_for_dead", [False, True])
def test_overtaken(world: Any, seam: str, when: str, taken_for_dead: bool) -> None:
    """One stands still in the middle of a call; meanwhile another one does all the rest."""
    first = seam in ("upload", "create")
    process = world.processes[0]
    seconds = 0 if taken_for_dead else 130
    if taken_for_dead:
        world.ended.add(process.name)
    if first:
        process.seams.set(f"{seam} {when}", 1, world.stall(seconds, 1, 1))
    world.submit(0, ["a", "bread"])
    if not first:
        for job in world.service.jobs:
            world.service.finish(job.id)
        process.seams.set(f"{seam} {when}", 1, world.stall(seconds, 1, 2))
        world.advance(0)
    world.check()
    _ends(world)
    assert not world.service.meter.billed_twice
    assert world.service.meter.billed_texts.total() == 3


@pytest.mark.fault(76)
@pytest.mark.parametrize("window", [86_400.0, None])
def test_restart_after_three_days(world: Any, window: float | None) -> None:
    """The job has expired meanwhile, or is still there."""
    world.service.settings.window = window
    world.processes[0].seams.set("create after", 1, world.processes[0].seams.die)
    world.submit(0, ["a", "bread"])
    world.service.step(world.service.jobs[0].id)
    world.service.step(world.service.jobs[0].id, done=1)
    world.pass_time(3 * 86_400)
    world.advance(1)
    assert world.service.jobs[0].status == ("in_progress" if window is None else "expired")
    _ends(world)
    assert not world.service.meter.billed_twice


@pytest.mark.fault(77)
@pytest.mark.parametrize("skew", [-3_000.0, 3_000.0])
def test_clock_of_the_provider_is_another_one(skew: float) -> None:
    world = world_of.World(progress=Progress(), skew=skew)
    world.processes[0].wire.faults.push("create", "after", crash=True)
    world.submit(0, ["a", "bread"])
    world.pass_time(130)
    world.advance(1)
    assert _states(world) == ["submitted"]
    _ends(world)
    assert not world.service.meter.billed_twice
    world.close()


@pytest.mark.parametrize(
    "name",
    [
        "state before",
        # What is written after a commit is not there before the next one either: they differ in
        # the call between them, and that has seams of its own.
        pytest.param("state after", marks=pytest.mark.campaign(short=True)),
        "create before",
        "create after",
        "results after",
        "vectors before",
    ],
)
def test_every_seam_of_one_batch(name: str) -> None:
    """Killed at the first, second, third, … commit and call of a batch, until none is left."""
    number, died = 0, True
    while died:
        number += 1
        world = world_of.World(progress=Progress(polls=1))
        process = world.processes[0]
        process.seams.set(name, number, process.seams.die)
        world.submit(0, ["a", "bread", "cheese"])
        if process in world.processes:
            # It goes on with the count where it was.
            world.advance(0)
        died = process not in world.processes
        world.end()
        assert not world.service.meter.billed_twice
        world.close()
    assert number > 1, "it was never reached"


def test_trouble_of_others_is_no_reason_to_refuse(world: Any) -> None:
    """There is no room for it yet, and the job of another batch is gone: it waits."""
    for letter in "abc":
        world.submit(0, [f"{letter}1", f"{letter}2"])
    job = world.service.jobs[0]
    world.service.finish(job.id)
    world.lose(job, output=False)
    world.submit(1, ["d"])
    assert [one.texts for one in world.submitted.values()][3:] == [("d",)]
    world.buy_lost()
    world.end()


def test_part_of_a_batch_that_was_forgotten(world: Any) -> None:
    """The next batch must not be taken for it: the part's texts are in no file any more."""
    world.set_limit(2)
    world.submit(0, ["milk"])
    world.submit(0, ["bread"], on_budget="wait")
    world.set_limit(100)
    world.processes[1].wire.faults.push("upload", "before")
    world.submit(1, ["bread"])
    assert _states(world) == ["submitted", "planned"]
    # As a submission does that is refused; the first one still waits for the text.
    _, first, second = world.submitted
    context = world.processes[1].context
    forget(context, context.batches.named(second))
    del world.submitted[second]
    world.submit(2, ["cheese"])
    _ends(world)
    assert world._rows("SELECT state FROM batch WHERE name = ?", first) == [("done",)]
