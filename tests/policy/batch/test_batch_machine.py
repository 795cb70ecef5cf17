"""Is anything billed twice, lost, or held for ever, whatever happens to whom and when?

Three processes over one state folder, the provider's own bill as the truth. A rule does one thing,
and may have somebody die or stand still at any seam on its way. At the end nothing more goes wrong,
and everything must come to its end in a bounded number of steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, core, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from embedcore.errors import StorageError
from embedcore.testing.openai.batch_jobs import Job
from embedcore.testing.openai.batches import Listing, Progress
from embedcore.testing.openai.embeddings import ApiError


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
mutants = _beside("batch_mutants")

TEXTS = (
    *("a", "bread", "cheese and wine", "d" * 30, "elderflower", "f", "Grüße", "hot water"),
    *("ink", "jam", "kale", "lemon", "milk", "nut", "oats and honey", "pear"),
)
SECONDS = (1, 30, 61, 61, 130, 700, 700, 4_000, 86_400)

who = st.integers(0, 2)
which = st.integers(0, 4)
some_texts = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5)
PROGRESS = {
    "soon": lambda: Progress(polls=2),
    "polls": lambda: Progress(polls=3),
    "by hand": Progress,
    "by time": lambda: Progress(seconds=1_500.0, cancel_seconds=100.0),
}
FIRST = ("upload", "create", "create", "create", "create")
LATER = ("create", "find", "discard", "poll", "results", "cancel")


def faults(methods: tuple[str, ...]) -> Any:
    """Method, effect, whether the process dies of it, when a late effect happens, how often."""
    return st.tuples(
        st.just("fault"),
        st.sampled_from(methods),
        st.sampled_from(("before", "after", "late", "late")),
        st.sampled_from((False, False, True)),
        st.sampled_from((0, 1, 100.0, 650.0, 1_500.0, 2_500.0, 7_000.0)),
        st.sampled_from((1, 1, 3)),
    )


def traps(methods: tuple[str, ...]) -> Any:
    """Seam, its number, and how many seams after it; what happens there, how much time passes, and
    who else goes on."""
    calls = [f"{name} {when}" for name in methods for when in ("before", "after")]
    seams = st.one_of(
        st.tuples(st.sampled_from(calls), st.integers(1, 2), st.integers(0, 6)),
        st.tuples(st.sampled_from(("state before", "state after")), st.integers(1, 60), st.just(0)),
        st.tuples(
            st.sampled_from(("vectors before", "vectors after", "file before", "file after")),
            st.integers(1, 4),
            st.integers(0, 2),
        ),
    )
    return st.tuples(
        st.just("trap"),
        seams,
        st.sampled_from(("die", "die", "land", "overtaken", "overtaken", "look")),
        st.sampled_from((0, 130, 130, 1_000)),
        st.integers(1, 2),
    )


def troubles(methods: tuple[str, ...]) -> Any:
    return st.one_of(st.none(), faults(methods), traps(methods))


lost_creates = st.tuples(
    st.just("fault"),
    st.just("create"),
    st.sampled_from(("late", "late", "late", "after")),
    st.booleans(),
    st.sampled_from((100.0, 1_500.0, 2_500.0, 7_000.0, 7_000.0)),
    st.just(1),
)


# It is written down that the input is deleted: what is late may still be in time.
behind_the_fence = st.tuples(
    st.just("trap"),
    st.tuples(st.just("discard before"), st.just(1), st.sampled_from((0, 0, 0, 1, 2, 3))),
    st.sampled_from(("land", "land", "die", "overtaken")),
    st.sampled_from((0, 130)),
    st.just(1),
)


dies_while_storing = st.tuples(
    st.just("trap"),
    st.tuples(
        st.sampled_from(("vectors before", "vectors before", "results after")),
        st.just(1),
        st.sampled_from((0, 0, 1, 2, 3, 4)),
    ),
    st.just("die"),
    st.just(0),
    st.just(1),
)
overtaken = st.tuples(
    st.just("trap"),
    # Between one thing that is written down and the next.
    st.tuples(st.just("upload after"), st.just(1), st.integers(0, 6)),
    st.sampled_from(("overtaken", "overtaken", "look")),
    st.just(130),
    st.just(1),
)


class Machine(RuleBasedStateMachine):
    """What all machines share: trouble, what must hold, and the end."""

    def __init__(self) -> None:
        super().__init__()
        self.world: Any = None

    def _meet(self, who: int, trouble: Any) -> None:
        """What is going to happen to a process."""
        if trouble is None:
            return
        kind, *how = trouble
        (self._fault if kind == "fault" else self._trap)(self.world.processes[who], *how)

    def _trap(
        self, process: Any, seam: tuple[str, int, int], what: str, seconds: int, other: int
    ) -> None:
        world = self.world
        if what == "die":
            trap = process.seams.die
        elif what == "land":
            trap = world.land(seconds)
        else:
            other = (world.processes.index(process) + other) % len(world.processes)
            trap = world.stall(seconds, other, 1 if what == "overtaken" else 12)
        name, at, more = seam
        process.seams.set(name, at, trap, more)

    def _fault(
        self, process: Any, method: Any, effect: Any, crash: bool, later: float, times: int
    ) -> None:
        lateness = {"seconds": later} if isinstance(later, float) else {"requests": later}
        faults = process.wire.faults
        if method == "results":
            faults.push("results", "before", crash=crash, at=times - 1, times=times)
        else:
            faults.push(method, effect, crash=crash, times=times, **lateness)

    # What must hold

    @invariant()
    def nothing_is_wrong(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            if sys.exc_info()[0] is None:
                self.world.end()
        finally:
            self.world.close()


class Parts(Machine):
    """What can become of a remote job that is known."""

    @rule(
        which=which,
        what=st.sampled_from(
            (
                *("step", "run", "finish", "partly", "hide", "no_file"),
                *("expire", "fail", "end_cancel", "cancel"),
            )
        ),
        done=st.integers(0, 2),
    )
    def job_goes_on(self, which: int, what: str, done: int) -> None:
        jobs = [job for job in self.world.service.jobs if not job.ended and not job.gone]
        if jobs:
            with contextlib.suppress(ApiError):
                self._move(jobs[which % len(jobs)], what, done)

    def _move(self, job: Job, what: str, done: int) -> None:
        service = self.world.service
        if what == "step":
            service.step(job.id)
        elif what == "run":
            service.step(job.id, done=done)
        elif what == "finish":
            service.finish(job.id)
        elif what == "partly":
            service.finish(job.id, done=done)
        elif what == "expire":
            service.expire(job.id, done=done)
        elif what == "end_cancel" and job.status == "cancelling":
            service.end_cancel(job.id, done=done)
        elif what == "fail" and job.status == "validating":
            service.fail(job.id, "server_error", "An internal error.")
        elif what == "cancel":
            self.world.cancel_elsewhere(job)
        elif what in ("hide", "no_file"):
            self._hide(job, what)

    @rule(which=which)
    def outputs_are_exchanged(self, which: int) -> None:
        """Two jobs whose results nobody has read yet complete, each with the output of the other.
        There is a second one as soon as a batch has more texts than go into one."""
        service = self.world.service
        awaited = [one for one in service.jobs if not one.gone and self.world.is_awaited(one)]
        live = [one for one in awaited if not one.ended]
        if not live or len(awaited) < 2:
            return
        one = live[which % len(live)]
        other = next(job for job in awaited if job is not one)
        with contextlib.suppress(ApiError):
            for job in (one, other):
                if not job.ended:
                    service.finish(job.id)
            if one.output_file_id and other.output_file_id:
                self.world.swap(one, other)

    def _hide(self, job: Job, what: str) -> None:
        """It completes, and lines that were billed are in no file."""
        quirks, texts = self.world.service.settings.quirks, self.world.texts_of(job)
        hidden = set(texts[:1]) if what == "hide" else set(texts)
        quirks.missing, quirks.no_output_file = texts[0], what == "no_file"
        if what == "hide":
            hidden = {text for text in texts if texts[0] in text}
        self.world.service.finish(job.id)
        self.world.hidden[job.id] = hidden
        quirks.missing, quirks.no_output_file = None, False

    @rule(
        late=st.sampled_from((None, "no file", "missing", "empty", "first line", "error")),
        seconds=st.sampled_from((1.0, 100.0, 250.0, 2_000.0, 1e9)),
    )
    def results_are_late(self, late: Any, seconds: float) -> None:
        self.world.be_late(late, seconds)

    @rule(
        which=which,
        what=st.sampled_from(("job", "output", "lines", "lines")),
        text=st.sampled_from(TEXTS),
        status=st.sampled_from((400, 500, 429)),
        http=st.booleans(),
        times=st.sampled_from((1, 2, 4, None)),
        billed=st.booleans(),
    )
    def provider_fails(
        self,
        which: int,
        what: str,
        text: str,
        status: int,
        http: bool,
        times: int | None,
        billed: bool,
    ) -> None:
        service = self.world.service
        if what == "lines":
            service.fail_lines(text, status=status, http=http, times=times, billed=billed)
            return
        ended = [job for job in service.jobs if not job.gone and job.ended]
        jobs = [job for job in ended if self.world.is_awaited(job)]
        if not jobs:
            return
        self.world.lose(jobs[which % len(jobs)], output=what == "output")


class BatchMachine(Parts):
    """Everything that can happen."""

    @initialize(
        limit=st.sampled_from((None, None, 12, 40)),
        skew=st.sampled_from((0.0, 0.0, -1_800.0, 1_800.0)),
        keeps_deleted=st.sampled_from((False, False, False, True)),
        deaths_are_seen=st.booleans(),
        progress=st.sampled_from(("polls", "by hand", "by time")),
        texts=some_texts,
        trouble=troubles(FIRST),
    )
    def open(
        self,
        limit: int | None,
        skew: float,
        keeps_deleted: bool,
        deaths_are_seen: bool,
        progress: str,
        texts: list[str],
        trouble: Any,
    ) -> None:
        self.world = world_of.World(
            limit=limit,
            skew=skew,
            keeps_deleted=keeps_deleted,
            deaths_are_seen=deaths_are_seen,
            progress=PROGRESS[progress](),
        )
        self._meet(0, trouble)
        self.world.submit(0, texts)

    # What users and their processes do

    @rule(
        who=who,
        texts=some_texts,
        waits=st.booleans(),
        patient=st.booleans(),
        trouble=troubles(FIRST),
    )
    def submit(self, who: int, texts: list[str], waits: bool, patient: bool, trouble: Any) -> None:
        self._meet(who, trouble)
        on_budget = "wait" if patient else "raise"
        self.world.submit(who, texts, waits=waits, on_budget=on_budget)

    @rule(who=who, trouble=troubles(LATER))
    def advance(self, who: int, trouble: Any) -> None:
        self._meet(who, trouble)
        self.world.advance(who)

    @rule(who=who, which=which, trouble=troubles(LATER))
    def look(self, who: int, which: int, trouble: Any) -> None:
        self._meet(who, trouble)
        self.world.look(who, which)

    @rule(who=who, which=which, trouble=troubles(LATER))
    def advance_one(self, who: int, which: int, trouble: Any) -> None:
        self._meet(who, trouble)
        self.world.advance(who, which)

    @rule(
        who=who,
        rounds=st.integers(2, 5),
        seconds=st.sampled_from((61, 130, 700, 700)),
        trouble=st.one_of(st.none(), traps(("find", "discard", "discard", "results"))),
    )
    def go_on(self, who: int, rounds: int, seconds: int, trouble: Any) -> None:
        """Somebody looks after everything for a while."""
        for _ in range(rounds):
            self._meet(who, trouble)
            self.world.advance(who)
            self.world.pass_time(seconds)

    @rule(who=who, which=which, trouble=troubles(LATER), by_hand=st.booleans())
    def give_up(self, who: int, which: int, trouble: Any, by_hand: bool) -> None:
        self._meet(who, trouble)
        if by_hand:
            self.world.abandon(who, which)
        else:
            self.world.cancel(who, which)

    @rule(
        who=who,
        what=st.sampled_from(
            ("suspect", "limit", "limit", "full", "full", "buy_lost", "send_again", "queue", "slow")
        ),
        limit=st.sampled_from((None, 5, 12, 40)),
        full=st.booleans(),
        queue=st.sampled_from((None, 8, 12)),
    )
    def circumstances(
        self, who: int, what: str, limit: int | None, full: bool, queue: int | None
    ) -> None:
        if what == "suspect":
            # Others take a process for dead that is not.
            self.world.ended.add(self.world.processes[who].name)
        elif what == "limit":
            self.world.set_limit(limit)
        elif what == "full":
            self.world.processes[who].store.full = full
        elif what == "buy_lost":
            self.world.buy_lost()
        elif what == "send_again":
            self.world.send_again()
        elif what == "slow":
            # Inputs that were just uploaded cannot be used at once.
            settings = self.world.service.settings
            settings.not_ready_seconds = 0.0 if settings.not_ready_seconds else 90.0
        else:
            self.world.service.settings.enqueued_token_limit = queue

    # What the network and the provider do

    @rule(seconds=st.sampled_from(SECONDS), land=st.booleans())
    def time_passes(self, seconds: int, land: bool) -> None:
        if land:
            self.world.service.land()
        self.world.pass_time(seconds)

    @rule(seconds=st.sampled_from((0.0, 30.0, 300.0, 550.0)), listings=st.integers(0, 2))
    def list_lags(self, seconds: float, listings: int) -> None:
        self.world.service.settings.listing = Listing(lag_seconds=seconds, lag_listings=listings)


class LostAnswers(Machine):
    """Only what can become of a ``create`` that nobody heard the end of: deep, where the other
    machine is broad."""

    keeps_deleted = False

    @initialize(
        progress=st.sampled_from(("by hand", "by time", "by time")),
        texts=some_texts,
        lag=st.sampled_from((0.0, 0.0, 300.0, 550.0)),
        trouble=st.one_of(
            *[lost_creates] * 3,
            overtaken,
        ),
    )
    def open(self, progress: str, texts: list[str], lag: float, trouble: Any) -> None:
        self.world = world_of.World(keeps_deleted=self.keeps_deleted, progress=PROGRESS[progress]())
        self.world.service.settings.listing = Listing(lag_seconds=lag)
        self._meet(0, trouble)
        self.world.submit(0, texts)

    @rule(
        who=who,
        rounds=st.sampled_from((2, 4, 6)),
        seconds=st.sampled_from((61, 700, 700, 700)),
        trouble=st.one_of(st.none(), behind_the_fence, behind_the_fence, traps(("find",))),
    )
    def go_on(self, who: int, rounds: int, seconds: int, trouble: Any) -> None:
        for _ in range(rounds):
            self._meet(who, trouble)
            self.world.advance(who)
            self.world.pass_time(seconds)

    @rule(
        who=who, texts=some_texts, later=st.sampled_from((2_000.0, 7_000.0)), fence=behind_the_fence
    )
    def is_written_off(self, who: int, texts: list[str], later: float, fence: Any) -> None:
        self._meet(who, ("fault", "create", "late", False, later, 1))
        self.world.submit(who, texts)
        for _ in range(4):
            self._meet(who, fence)
            self.world.advance(who)
            self.world.pass_time(700)

    @rule(who=who, texts=some_texts, trouble=st.one_of(overtaken, overtaken, troubles(("create",))))
    def submit(self, who: int, texts: list[str], trouble: Any) -> None:
        self._meet(who, trouble)
        self.world.submit(who, texts)

    @rule(seconds=st.sampled_from((700, 4_000)), lands=st.sampled_from(("wait", "wait", "land")))
    def time_passes(self, seconds: int, lands: str) -> None:
        if lands == "land":
            self.world.service.land()
        self.world.pass_time(seconds)


class LostAnswersWithoutFence(LostAnswers):
    """The same where the provider takes inputs that were deleted: texts may be billed twice there,
    and the ledger must know."""

    keeps_deleted = True


class Results(Parts):
    """Only what jobs can bring, and what can happen while it is collected."""

    @initialize(texts=some_texts, progress=st.sampled_from(("by hand", "soon", "soon")))
    def open(self, texts: list[str], progress: str) -> None:
        self.world = world_of.World(progress=PROGRESS[progress]())
        self.world.submit(0, texts)

    @rule(who=who, texts=some_texts)
    def submit(self, who: int, texts: list[str]) -> None:
        self.world.submit(who, texts)

    @rule(
        who=who,
        trouble=st.one_of(st.none(), faults(("results",)), dies_while_storing, dies_while_storing),
        seconds=st.sampled_from((61, 130)),
        rounds=st.sampled_from((1, 1, 1, 8)),
    )
    def advance(self, who: int, trouble: Any, seconds: int, rounds: int) -> None:
        self._meet(who, trouble)
        for _ in range(rounds):
            self.world.advance(who)
            self.world.pass_time(seconds)


# The same examples each time, unless --hypothesis-seed names others.
FIXED = core.global_force_seed is None


# An example is a whole life of several batches.
EXAMPLES = settings.default.max_examples


def plan(examples: int, steps: int = 30, **more: Any) -> settings:
    return settings(
        # Shrinking takes minutes and a failure is found in seconds: add Phase.shrink to study one.
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        report_multiple_bugs=False,
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **more,
    )


MARKS = [pytest.mark.fault(row) for row in (56, 57, 58, 60, 61, 63, 64, 75, 76, 77)]

TestBatch = BatchMachine.TestCase
TestBatch.settings = plan(EXAMPLES * 2 // 5, derandomize=FIXED)
TestBatch.pytestmark = MARKS

TestLostAnswers = LostAnswers.TestCase
TestLostAnswers.settings = plan(EXAMPLES // 5, 12, derandomize=FIXED)
TestLostAnswers.pytestmark = MARKS

TestLostAnswersWithoutFence = LostAnswersWithoutFence.TestCase
TestLostAnswersWithoutFence.settings = plan(EXAMPLES // 5, 12, derandomize=FIXED)
TestLostAnswersWithoutFence.pytestmark = MARKS

TestResults = Results.TestCase
TestResults.settings = plan(EXAMPLES // 5, 12, derandomize=FIXED)
TestResults.pytestmark = MARKS

MACHINES = {
    "lost answers": (LostAnswers, 12),
    "lost answers without fence": (LostAnswersWithoutFence, 12),
    "results": (Results, 12),
    "everything": (BatchMachine, 30),
}


@pytest.mark.campaign
@pytest.mark.parametrize("machine", [machine for machine, _ in MACHINES.values()])
def test_campaign(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=plan(4_000, 50, database=None))


@pytest.mark.campaign(short=True)
@pytest.mark.parametrize("name", sorted(mutants.MUTANTS))
def test_mutant_is_found(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Break the code, and see it fail."""
    caplog.set_level(logging.CRITICAL, logger="embedcore")
    machine, steps = MACHINES[mutants.FOUND_BY[name]]
    chosen = plan(1_000, steps, derandomize=FIXED, database=None)
    with mutants.MUTANTS[name](), pytest.raises((AssertionError, StorageError)):
        run_state_machine_as_test(machine, settings=chosen)


def test_a_seed_that_is_given_chooses_the_examples(request: pytest.FixtureRequest) -> None:
    given = request.config.getoption("--hypothesis-seed") is not None
    for machine in (TestBatch, TestLostAnswers, TestLostAnswersWithoutFence, TestResults):
        assert machine.settings.derandomize == (not given)
