"""A simulated world for tests of batches: processes that can be killed anywhere, and a provider.

Everything is in one Python process, and nothing takes real time. The world has

- a state folder (``state.db``, ``vectors/``, ``batches/``), as a user has it;
- a provider, ``world.service``: it creates jobs, runs them and bills. Its meter is the truth;
- a clock that only ``pass_time`` moves;
- processes, ``world.processes``: what ``EmbeddingClient`` is for batches, each with connections of
  its own. Every commit and every call to the provider is a *seam*: before or after it a process can
  die, or stand still while time passes and others continue. One that dies is replaced by another.

A test says what processes do (``submit``, ``advance``, ``cancel``, ``abandon``, ``look``) and
what goes wrong: ``wire.faults`` of a process for calls, ``seams`` for kills, ``lose`` and
``be_late`` for the provider. ``end`` lets everything come to its end. ``check`` looks for what
must not be: a text paid for twice without an excuse, a wrong vector, a cost that is not the
provider's bill.

A process is killed after its job was created, and before it knows that::

    world = World(processes=2)
    world.processes[0].wire.faults.push("create", "after", crash=True)
    world.submit(0, ["a text", "another one"])
    assert len(world.service.jobs) == 1
    world.pass_time(700)
    world.advance(1)
    assert len(world.service.jobs) == 1, "it was found, and not created again"
    world.end()
    assert not world.service.meter.billed_twice
    world.close()

``batch_desk.py`` is the smaller rig: whole clients, without deaths, for the result of one batch.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from embedcore import EmbeddingClient
from embedcore.assembly import Running
from embedcore.errors import BudgetExceeded, EmbeddingError, StorageCorrupt, StorageFull
from embedcore.policy.batch.context import BatchContext
from embedcore.policy.batch.job import BatchJob
from embedcore.policy.batch.result import blocks_of
from embedcore.policy.batch.submit import Submission
from embedcore.policy.budget import Account
from embedcore.policy.engine import Engine
from embedcore.policy.ratelimit.queue import Gate
from embedcore.policy.retry import RetryQuota
from embedcore.policy.threads import Pool
from embedcore.settings import BatchSettings as Rules
from embedcore.storage import batches as batches_module, grants as ownership
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.batches import BatchRecord
from embedcore.storage.database import Database
from embedcore.storage.inspection import faults
from embedcore.storage.ledger import Ledger
from embedcore.storage.manifest import Manifest
from embedcore.storage.parts import Parts
from embedcore.storage.schema import STATE
from embedcore.storage.vectors import VectorStore
from embedcore.testing import FakeEmbedder, vectors_of
from embedcore.testing.fakes.batch import KEY, Crashed, FakeBatch
from embedcore.testing.fakes.embedder import FAKE_INFO
from embedcore.testing.openai.batch_jobs import Job
from embedcore.testing.openai.batches import BatchService, BatchSettings, Listing, Progress
from embedcore.testing.openai.embeddings import ApiError, FakeModel
from embedcore.testing.vectors import tokens_of

SCOPE = "default"
WIDTH = 8
START = 1_795_550_400.0  # 2026-11-24 20:00 UTC: four hours to midnight
RULES = Rules(parts=3, part_texts=2, attempts=3, grace=600.0, look_again=60.0, watch=90_000.0)
INFO = replace(FAKE_INFO, dimensions=WIDTH)
CAP = 10**9
# Late effects land within this time: an answer that is days late is nothing to be tested for.
LATEST = 7_200.0


class Seams:
    """Where one process can be interrupted: before and after each commit and each remote call.

    ``set`` says what happens at the ``at``-th seam of this name, or ``more`` seams of any name
    after it. Names are "state", "vectors" and "file" for what is committed, and those of the calls,
    with "before" or "after". Who is dead does nothing more, whatever ``finally`` does.
    """

    def __init__(self) -> None:
        self.dead = False
        self.working = False
        self._name = ""
        self._left = self._more = 0
        self._trap: Callable[[], None] | None = None

    def set(self, name: str, at: int, trap: Callable[[], None], more: int = 0) -> None:
        self._name, self._left, self._more, self._trap = name, at, more, trap

    def clear(self) -> None:
        self._trap = None

    def die(self) -> None:
        self.dead = True
        raise Crashed("killed")

    def reach(self, name: str) -> None:
        if self.dead:
            raise Crashed("dead already")
        if self._trap is None or not self.working or self._name not in (name, "any"):
            return
        self._left -= 1
        if self._left <= 0 and self._more:
            self._name, self._left, self._more = "any", self._more, 0
        elif self._left <= 0:
            trap, self._trap = self._trap, None
            trap()

    def sew(self, database: Database, name: str) -> None:
        """Interrupt before and after every transaction of a database."""
        plain = database.transaction

        @contextmanager
        def transaction() -> Iterator[Any]:
            self.reach(f"{name} before")
            with plain() as connection:
                yield connection
            self.reach(f"{name} after")

        database.transaction = transaction  # type: ignore[method-assign]


class Wire(FakeBatch):
    """What one process has of the provider. Its faults are its own."""

    def __init__(
        self, service: BatchService, seams: Seams, told_to_stop: Callable[[str], None]
    ) -> None:
        super().__init__(service, model=INFO.model)
        self._seams = seams
        self.told_to_stop = told_to_stop

    def upload(self, items: Any, *, key: str) -> str:
        return self._at_seams("upload", lambda: super(Wire, self).upload(items, key=key))

    def create(self, input_ref: str, *, key: str) -> str:
        return self._at_seams("create", lambda: super(Wire, self).create(input_ref, key=key))

    def find(self, **what: Any) -> Any:
        return self._at_seams("find", lambda: super(Wire, self).find(**what))

    def discard(self, input_ref: str) -> None:
        self._at_seams("discard", lambda: super(Wire, self).discard(input_ref))

    def poll(self, job_id: str) -> Any:
        return self._at_seams("poll", lambda: super(Wire, self).poll(job_id))

    def cancel(self, job_id: str) -> None:
        self.told_to_stop(job_id)
        self._at_seams("cancel", lambda: super(Wire, self).cancel(job_id))

    def results(self, job_id: str) -> Iterator[Any]:
        outcomes, error = self._at_seams("results", lambda: self._read_all(job_id))
        for outcome in outcomes:
            yield outcome
            self._seams.reach("results after")
        if error is not None:
            raise error

    def _read_all(self, job_id: str) -> tuple[list[Any], Exception | None]:
        outcomes: list[Any] = []
        try:
            outcomes.extend(super().results(job_id))
        except Exception as error:  # noqa: BLE001 - raised once what came before it was given
            return outcomes, error
        return outcomes, None

    def _at_seams(self, name: str, call: Callable[[], Any]) -> Any:
        self._seams.reach(f"{name} before")
        try:
            answer = call()
        except Crashed:
            self._seams.dead = True
            raise
        self._seams.reach(f"{name} after")
        return answer


class Truth(BatchService):
    """The provider, who tells the world of every job that it takes."""

    taken: Callable[[Job], None]

    def create(self, *args: Any, **more: Any) -> dict[str, object]:
        answer = super().create(*args, **more)
        self.taken(self.job(str(answer["id"])))
        return answer


class Context(BatchContext):
    """With seams in the files of batches too, which are closed when the process ends."""

    def manifest(self, batch: BatchRecord) -> Manifest:
        manifest = super().manifest(batch)
        seams: Seams = self.strategy._seams  # type: ignore[attr-defined]
        seams.sew(manifest.database, "file")
        return manifest


class VectorCache(VectorStore):
    """May have no room left on its disk."""

    full = False

    def put(self, *args: Any, **more: Any) -> str | None:
        if self.full:
            raise StorageFull(f"{self.path} cannot grow")
        return super().put(*args, **more)


class Process(EmbeddingClient):
    """One process of a user, as far as batches are concerned."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.seams = Seams()
        self.wire = Wire(world.service, self.seams, world.ours.add)
        database = Database(world.folder / "state.db", STATE, timeout=5)
        # A cap of nothing: it is for what nobody waits for.
        self.store = VectorCache(world.folder / "vectors", cap=0, busy_timeout=5, now=world.now)
        self.ledger = Ledger(database, clock=world.now)
        self.context = self._new_context()
        self.seams.sew(database, "state")
        self.seams.sew(self.store.database, "vectors")

    @property
    def _running(self) -> Running:
        return Running(choice=_CHOICE, engine=self.context.engine, context=self.context)

    def _new_context(self) -> Context:
        world = self.world
        context = Context(
            engine=Engine(
                embedder=FakeEmbedder(info=INFO, batch=self.wire),
                account=Account(ledger=self.ledger, scope=SCOPE, limits=world.limits, wait=0.0),
                pool=_POOL,
                gate=_GATE,
                quota=_QUOTA,
                label="fake:fake-embedding",
                fingerprint="f",
                monotonic=world.now,
            ),
            strategy=self.wire,
            store=self.store,
            folder=world.folder / "batches",
            asked_as="fake:fake-embedding",
            settings=world.rules,
            jitter=lambda _, high: high,
        )
        context.__dict__["jobs"] = Parts(self.ledger, owner=lambda: self.name)
        return context

    def limits_changed(self) -> None:
        self.context = self._new_context()

    def run(self, work: Callable[[], Any]) -> Any:
        """Do something as this process; None if it died of it, and then another one has come."""
        world = self.world
        world.running.append(self)
        self.seams.working = True
        try:
            return work()
        except Crashed:
            return None
        finally:
            world.running.pop()
            self.seams.working = False
            self.seams.clear()
            if self.seams.dead:
                world.bury(self)

    def close(self) -> None:
        self.ledger.database.close()
        self.store.database.close()


_CHOICE: Any = None
_POOL, _GATE, _QUOTA = Pool(1), Gate(), RetryQuota(1000.0, 1.0)


@dataclass(kw_only=True)
class Submitted:
    """A batch that somebody submitted: its texts by row, and whether a call waited for it."""

    texts: tuple[str, ...]
    waited_for: bool
    given_up: bool = False
    buys_lost: bool = False
    sends_again: bool = False


@cache
def _templates() -> Path:
    """Empty files of state, made once: migrations are slow."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    state = Database(folder / "state.db", STATE)
    for database in (state, VectorStore(folder / "vectors", cap=CAP).database):
        database.open()
        # Whole only once its log is gone.
        database.close()
    return folder


class World:
    """The state folder, the provider, the clock, the processes, and what must always hold."""

    def __init__(
        self,
        *,
        processes: int = 3,
        limit: int | None = None,
        rules: Rules = RULES,
        skew: float = 0.0,
        keeps_deleted: bool = False,
        deaths_are_seen: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.time = START
        self.rules = rules
        self.limit = limit
        self.highest_limit = limit
        self.deaths_are_seen = deaths_are_seen
        self.folder = Path(tempfile.mkdtemp())
        shutil.copytree(_templates(), self.folder, dirs_exist_ok=True)
        self.service = Truth(
            models={INFO.model: FakeModel(dimensions=WIDTH)},
            count=lambda texts: [tokens_of(text) for text in texts],
            settings=BatchSettings(
                progress=progress or Progress(polls=3), accepts_deleted_input=keeps_deleted
            ),
            clock=lambda: self.time + skew,
        )
        self.service.taken = self._taken
        self.running: list[Process] = []
        self.ended: set[str] = set()
        self.submitted: dict[str, Submitted] = {}
        # Keys whose jobs may do what others may not, and the jobs whose lines nobody can have.
        self.excused: dict[str, str] = {}
        self.hidden: dict[str, set[str]] = {}
        self.lost: set[str] = set()
        # Parts that embedcore told to stop, and those that somebody else did.
        self.ours: set[str] = set()
        self.elsewhere: set[str] = set()
        self.violations: list[str] = []
        self._lines: dict[str, list[str]] = {}
        self._number = 0
        self._stack = ExitStack()
        patch = self._stack.enter_context
        patch(mock.patch.object(ownership, "has_ended", self.ended.__contains__))
        patch(mock.patch.object(batches_module, "myself", self._whoever_runs))
        self.processes = [self._process() for _ in range(processes)]
        self.judge = Database(self.folder / "state.db", STATE, timeout=5)
        self.cache = VectorStore(self.folder / "vectors", cap=CAP, now=self.now)

    def close(self) -> None:
        self._stack.close()
        for process in self.processes:
            process.close()
        self.judge.close()
        self.cache.database.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # The world

    def now(self) -> float:
        return self.time

    @property
    def limits(self) -> tuple[Limit, ...]:
        if self.limit is None:
            return ()
        return (Limit(scope=SCOPE, period="day", unit="tokens", amount=self.limit),)

    def set_limit(self, limit: int | None) -> None:
        self.limit = limit
        if limit is None or self.highest_limit is None:
            self.highest_limit = None
        else:
            self.highest_limit = max(self.highest_limit, limit)
        for process in self.processes:
            process.limits_changed()

    def _whoever_runs(self) -> str:
        return self.running[-1].name

    def _process(self) -> Process:
        self._number += 1
        return Process(self, f"host-{self._number}:{self._number}")

    def bury(self, process: Process) -> None:
        """It is dead; another one comes in its place."""
        if self.deaths_are_seen:
            self.ended.add(process.name)
        process.close()
        self.processes[self.processes.index(process)] = self._process()

    def pass_time(self, seconds: float) -> None:
        while seconds > 0:
            step = min(seconds, LATEST)
            self.time += step
            seconds -= step
            self.service.refresh()
            if step == LATEST:
                self.service.land()

    def lose(self, job: Job, *, output: bool) -> None:
        """The provider has a job no more, or what it left."""
        self.lost.add(job.id)
        self.hidden[job.id] = set(self.texts_of(job))
        with suppress(ApiError):
            (self.service.vanish_output if output else self.service.vanish)(job.id)

    def cancel_elsewhere(self, job: Job) -> None:
        """Somebody cancels a job at the provider, of which embedcore knows."""
        with suppress(ApiError):
            self.service.cancel(job.id)
        if self.is_awaited(job) and job.id not in self.ours:
            self.elsewhere.add(job.id)

    def be_late(self, late: Any, seconds: float) -> None:
        """From now on results are there only so long after a job's end."""
        quirks = self.service.settings.quirks
        quirks.late, quirks.late_looks, quirks.late_seconds = late, None, seconds
        if self._is_too_late():
            for job in self.service.jobs:
                if not job.ended or self.is_awaited(job):
                    self.give_up(job)

    def _is_too_late(self) -> bool:
        """For some results: what is not read in time is lost."""
        quirks = self.service.settings.quirks
        return quirks.late is not None and quirks.late_seconds >= self.rules.output_wait / 2

    def give_up(self, job: Job) -> None:
        """What it brings may be lost."""
        self.lost.add(job.id)
        self.hidden[job.id] = set(self.texts_of(job))

    def swap(self, one: Job, other: Job) -> None:
        """Two jobs have the output of the other. Whoever reads them has nothing."""
        self.service.swap_outputs(one.id, other.id)
        for job in (one, other):
            self.give_up(job)

    # What the processes do

    def submit(
        self,
        who: int,
        texts: Sequence[str],
        *,
        waits: bool = False,
        on_budget: Any = "raise",
    ) -> None:
        process = self.processes[who]
        how = Submission(on_budget=on_budget, waiting=420.0 if waits else None)
        with self._noticing(texts, waits), suppress(BudgetExceeded):
            process.run(lambda: self._tolerant(lambda: process._submit(texts, how)))

    @contextmanager
    def _noticing(self, texts: Sequence[str], waits: bool) -> Iterator[None]:
        before = set(self._names())
        try:
            yield
        finally:
            for name in self._names():
                if name not in before:
                    self.submitted[name] = Submitted(texts=tuple(texts), waited_for=waits)

    def advance(self, who: int, which: int | None = None) -> None:
        """Do what is due for one batch, or for everything."""
        process = self.processes[who]
        if which is None:
            process.run(lambda: self._tolerant(process.resume_batches))
            return
        jobs = self._open_jobs(process)
        if jobs:
            job = jobs[which % len(jobs)]
            process.run(lambda: self._tolerant(lambda: job.advance(), job))

    def cancel(self, who: int, which: int) -> None:
        process = self.processes[who]
        if jobs := self._open_jobs(process):
            job = jobs[which % len(jobs)]
            self.submitted[job.id].given_up = True
            process.run(lambda: self._tolerant(job.cancel, job))

    def abandon(self, who: int, which: int) -> None:
        process = self.processes[who]
        if jobs := self._open_jobs(process):
            job = jobs[which % len(jobs)]
            self.submitted[job.id].given_up = True
            before = self._unended()
            process.run(lambda: self._tolerant(job.forget, job))
            for key in before - self._unended():
                self.excused[key] = "abandoned"

    def buy_lost(self) -> None:
        process = self.processes[0]
        for job in self._open_jobs(process):
            self.submitted[job.id].buys_lost = True
            process.run(job.resubmit_lost)

    def send_again(self) -> None:
        """A person says that what was cancelled elsewhere is wanted all the same."""
        process = self.processes[0]
        for job in self._open_jobs(process):
            self.submitted[job.id].sends_again = True
            process.run(job.resubmit_cancelled)

    def look(self, who: int, which: int) -> None:
        """Somebody asks how a batch stands."""
        process = self.processes[who]
        if jobs := self._open_jobs(process):
            job = jobs[which % len(jobs)]
            process.run(lambda: self._tolerant(job.status, job))

    def stall(self, seconds: float, other: int, rounds: int) -> Callable[[], None]:
        """A trap: time passes and another process goes on, in the middle of what one does."""

        def trap() -> None:
            busy = self.running[-1]
            self.pass_time(seconds)
            process = self.processes[other]
            if process is busy or process in self.running:
                return
            for _ in range(rounds):
                try:
                    self.advance(other)
                except Exception as error:  # noqa: BLE001 - must not be taken for a plugin's error
                    self.violations.append(f"while another one stood still: {error!r}")
                self.pass_time(self.rules.look_again + 1 if rounds > 1 else 0)

        return trap

    def land(self, seconds: float) -> Callable[[], None]:
        """A trap: what is late happens just now, and the provider is quick to begin with it."""

        def trap() -> None:
            self.service.land()
            for job in self.service.jobs:
                if job.status == "validating" and not job.gone:
                    self.service.step(job.id)
            self.pass_time(seconds)

        return trap

    def _tolerant(self, work: Callable[[], Any], job: BatchJob | None = None) -> Any:
        try:
            found = work()
        except StorageFull:
            if not any(process.store.full for process in self.processes):
                raise
            return None
        except StorageCorrupt:
            if job is None or not self._was_taken_over(job.id):
                raise
            return None
        except EmbeddingError as error:
            self._believable(error)
            return None
        for problem in found if isinstance(found, list) else []:
            self._believable(problem)
        return found

    def _believable(self, error: EmbeddingError) -> None:
        if "report this" in str(error):
            self.violations.append(f"an error of the core or of the fake: {error.__cause__!r}")

    def _was_taken_over(self, name: str) -> bool:
        return self.submitted[name].waited_for and name not in self._names()

    def _open_jobs(self, process: Process) -> list[BatchJob]:
        return process.batch_jobs(ended=False)

    # The truth

    def _taken(self, job: Job) -> None:
        """The provider took a job: is that one that should be?"""
        if self._is_too_late():
            self.give_up(job)
        key = self.key_of(job)
        rows = self._rows("SELECT asked, state FROM part WHERE key = ?", key)
        if not rows or rows[0][0] is None:
            self.violations.append(f"{job.id} was created, and no part says that it would be")
            return
        listing, late = self.service.settings.listing, self.time - rows[0][0] / 1e6
        lag = listing.lag_seconds + (1 if listing.lag_listings else 0)
        looked_for = rows[0][1] in ("creating", "fenced")
        if looked_for and lag and late + lag > self.rules.grace and key not in self.excused:
            self.excused[key] = "came late, and the list hid it: the fence cannot save that"
        self.violations += self.overlaps()
        if key not in self.excused and not self.service.settings.accepts_deleted_input:
            self.violations += self._unasked(job)

    def _unasked(self, new: Job) -> Iterator[str]:
        """Texts of a new job that only a person may have sent again."""
        wishes = self.submitted.values()
        for text in self.texts_of(new):
            mine = [one for one in wishes if text in one.texts]
            if any(one.given_up for one in mine):
                # What nobody wanted any more is like new for the next one.
                continue
            for old in self.service.jobs:
                if old is new or text not in self.texts_of(old) or self.key_of(old) in self.excused:
                    continue
                ran = [one for one in old.results if one.line.texts == (text,)]
                paid = bool(ran) and ran[0].failure is None and not old.gone
                if paid and not any(one.buys_lost for one in mine):
                    yield f"{text!r} was paid for in {old.id}, and is paid again in {new.id}"
                stopped = old.id in self.elsewhere - self.ours and not ran
                if stopped and not any(one.sends_again for one in mine):
                    yield f"{text!r} of {old.id} was cancelled elsewhere, and is in {new.id}"

    def key_of(self, job: Job) -> str:
        return (job.metadata or {})[KEY]

    def texts_of(self, job: Job) -> list[str]:
        if job.id not in self._lines:
            lines = self.service.input_lines(job.input_file_id)
            self._lines[job.id] = [json.loads(line)["body"]["input"] for line in lines]
        return self._lines[job.id]

    def live(self) -> list[Job]:
        """Parts that may still run lines, of those that obey the rules."""
        return [
            job
            for job in self.service.jobs
            if not job.ended and not job.gone and self.key_of(job) not in self.excused
        ]

    def overlaps(self) -> list[str]:
        if self.service.settings.accepts_deleted_input:
            return []
        found = Counter(text for job in self.live() for text in set(self.texts_of(job)))
        return [
            f"{text!r} is in {times} live jobs: {[job.id for job in self.live()]}"
            for text, times in found.items()
            if times > 1
        ]

    def paid_twice(self) -> dict[str, int]:
        """Texts whose vector was paid more than once, without an excuse."""
        if self.service.settings.accepts_deleted_input:
            return {}
        paid: Counter[str] = Counter()
        for job in self.service.jobs:
            if self.key_of(job) in self.excused or job.gone:
                continue
            hidden = self.hidden.get(job.id, set())
            for result in job.results:
                (text,) = result.line.texts
                if result.failure is None and text not in hidden:
                    paid[text] += 1
        return {text: times for text, times in paid.items() if times > 1}

    def is_awaited(self, job: Job) -> bool:
        """Whether somebody knows of the job and has not yet all that it left."""
        return bool(self._rows("SELECT 1 FROM part WHERE job = ? AND state <> 'done'", job.id))

    # The ledger

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self.judge.read() as connection:
            return [tuple(row) for row in connection.execute(query, values)]

    def _names(self) -> list[str]:
        return [name for (name,) in self._rows("SELECT name FROM batch WHERE state <> 'preparing'")]

    def _unended(self) -> set[str]:
        return {key for (key,) in self._rows("SELECT key FROM part WHERE state <> 'done'")}

    def check(self) -> None:
        """What holds at every moment."""
        assert not self.violations, self.violations
        assert not self.overlaps()
        assert not self.paid_twice()
        self._check_money()
        self._check_vectors()
        self._check_stopped()
        self._check_wanted()

    def _check_wanted(self) -> None:
        """What only batches know that have ended is tried by nobody: it has its outcome."""
        left = self._rows(
            "SELECT i.id, i.reason FROM item i WHERE i.state = 'open' AND i.part IS NULL "
            "AND EXISTS (SELECT 1 FROM wish w WHERE w.item = i.id) AND NOT EXISTS "
            "(SELECT 1 FROM wish w JOIN batch b ON b.id = w.batch "
            "WHERE w.item = i.id AND b.ended IS NULL)"
        )
        assert not left, f"texts of ended batches are left open: {left}"

    def _check_money(self) -> None:
        days = self._rows(
            "SELECT period, tokens_spent, tokens_held FROM window WHERE scope = ? AND lane = 'all'",
            SCOPE,
        )
        for period, spent, held in days:
            if period == "total":
                billed = self.service.meter.billed_tokens
                assert spent + held >= billed, f"{spent} spent and {held} held, {billed} billed"
            if period == "day" and self.highest_limit is not None:
                assert spent + held <= self.highest_limit, "over the limit"
        (counted,) = self._rows(
            'SELECT (SELECT coalesce(sum(tokens), 0) FROM "grant"), '
            "(SELECT coalesce(sum(tokens), 0) FROM attempt WHERE state = 'sent')"
        )
        total = [held for period, _, held in days if period == "total"]
        assert sum(counted) == sum(total), f"grants and attempts {counted} are not held {total}"
        assert faults(self.judge, sqlite=False) == ([], [])

    def _check_stopped(self) -> None:
        """Only what somebody else cancelled waits for a person."""
        keys = {key for (key,) in self._rows("SELECT key FROM item WHERE stopped")}
        if keys:
            known = self._keys()
            jobs = [job for job in self.service.jobs if job.id in self.elsewhere]
            texts = {text for job in jobs for text in self.texts_of(job)}
            assert {known[key] for key in keys} <= texts, "nobody cancelled the job of these"

    def _check_vectors(self) -> None:
        stored = {key for (key,) in self._rows("SELECT key FROM item WHERE state = 'stored'")}
        known = self._keys()
        found: dict[bytes, np.ndarray] = {}
        keys = list(known)

        def take(places: Sequence[int], vectors: Any) -> None:
            found.update((keys[place], vectors[row]) for row, place in enumerate(places))

        assert not self.cache.get(keys, WIDTH, take)
        for key, vector in found.items():
            expected = vectors_of([known[key]], WIDTH)[0]
            assert (vector == expected).all(), f"the vector of {known[key]!r} is another one's"
        lacking = [known[key] for key in stored - set(found)]
        assert not lacking, f"no vector for {lacking}, which count as stored"

    def _keys(self) -> dict[bytes, str]:
        texts = sorted({text for job in self.service.jobs for text in self.texts_of(job)})
        keys = self.processes[0].context.keys(None).of(texts)
        return dict(zip(keys, texts, strict=True))

    # The end

    def end(self) -> None:
        """Nothing goes wrong any more: everything must come to its end, in so many rounds."""
        self.service.land()
        self.service.settings.listing = Listing()
        self.service.settings.enqueued_token_limit = None
        self.service.settings.progress.polls = 2
        self.service.settings.quirks.late = None
        self.service.settings.not_ready_seconds = 0.0
        self.set_limit(None)
        for process in self.processes:
            process.wire.faults.clear()
            process.seams.clear()
            process.store.full = False
        self.buy_lost()
        self.send_again()
        # Whoever submits drops what a process left that died while it submitted, a day later.
        self.pass_time(90_000)
        self.submit(0, ["the last"])
        for number in range(150):
            self.pass_time(61 if number < 25 else 4_000)
            self.advance(number % len(self.processes))
            self.send_again()
            if number % 5 == 0:
                self.check()
            if number > 25 and self._is_quiet():
                break
        else:
            raise AssertionError(f"no end: {self._what_goes_on()}")
        self._check_end()

    def _is_quiet(self) -> bool:
        open_batches = self._rows("SELECT 1 FROM batch WHERE ended IS NULL")
        return not open_batches and not self._unended()

    def _what_goes_on(self) -> str:
        parts = self._rows("SELECT * FROM part WHERE state <> 'done'")
        batches = self._rows("SELECT * FROM batch WHERE ended IS NULL")
        return f"parts {parts}, batches {batches}"

    def _check_end(self) -> None:
        assert not self._rows('SELECT * FROM "grant"')
        assert not self._rows("SELECT * FROM attempt WHERE state = 'sent'")
        held = self._rows("SELECT tokens_held, cost_held FROM window")
        assert set(held) <= {(0, 0)}
        left = self._rows(
            "SELECT i.id, i.part, w.batch FROM item i LEFT JOIN wish w ON w.item = i.id "
            "WHERE i.state = 'open'"
        )
        assert not left, f"texts are left open (their parts, and who wishes for them): {left}"
        waiting = [job.id for job in self.live()]
        assert not waiting, f"nobody waits for {waiting}, which are alive"
        self._check_bill()
        self._check_results()

    def _check_bill(self) -> None:
        """Each part cost what its job was billed at, or what was held where that is unconfirmed."""
        billed: Counter[str] = Counter()
        for job in self.service.jobs:
            billed[self.key_of(job)] += job.billed_tokens
        parts = self._rows(
            "SELECT p.key, a.state, a.actual_tokens, p.tokens FROM part p "
            "LEFT JOIN attempt a ON a.id = p.attempt"
        )
        for key, state, actual, held in parts:
            if state == "settled":
                assert actual == billed[key], f"{actual} spent on a job of {billed[key]}"
            elif state == "charged":
                assert actual == held >= billed[key]
            else:
                assert billed[key] == 0, f"{billed[key]} tokens that are not in the ledger"
        (spent,) = self._rows(
            "SELECT coalesce(sum(tokens_spent), 0) FROM window WHERE period = 'total' "
            "AND lane = 'all' AND scope = ?",
            SCOPE,
        )
        assert spent[0] == sum(actual or 0 for _, _, actual, _ in parts)

    def _check_results(self) -> None:
        context = self.processes[0].context
        for name, submitted in self.submitted.items():
            record = context.batches.named(name)
            if record is None:
                assert submitted.waited_for, f"batch {name} is gone"
                continue
            assert record.rows == len(submitted.texts)
            for block in blocks_of(context, record, 100):
                for row, text in enumerate(submitted.texts):
                    self._check_row(block, row, text, submitted)

    def _check_row(self, block: Any, row: int, text: str, submitted: Submitted) -> None:
        if block.ok[row]:
            assert (block.vectors[row] == vectors_of([text], WIDTH)[0]).all()
            return
        assert np.isnan(block.vectors[row]).all()
        reason = str(block.errors[row])
        assert reason
        if submitted.given_up:
            return
        failures = self._failures(text)
        assert failures >= self.rules.attempts, (
            f"{text!r} was given up after {failures} jobs failed it: {reason}"
        )

    def _failures(self, text: str) -> int:
        """Parts that ended without a vector for this text; a permanent error counts for many."""
        failures = 0
        for job in self.service.jobs:
            if not (job.ended or job.gone) or text not in self.texts_of(job):
                continue
            results = [one for one in job.results if one.line.texts == (text,)]
            hidden = job.gone or text in self.hidden.get(job.id, set())
            failure = results[0].failure if results else None
            if job.id in self.lost or hidden:
                # Paid for and lost: it is paid again only for those who say so.
                failures += 1_000
            if failure is not None and failure.http and failure.status < 429:
                failures += 1_000
            elif failure is not None or not results or hidden:
                failures += 1
        return failures


def spent(world: World) -> Amount:
    """What the ledger says was spent in all."""
    rows = world._rows(
        "SELECT tokens_spent, cost_spent FROM window WHERE period = 'total' AND lane = 'all' "
        "AND scope = ?",
        SCOPE,
    )
    return Amount(tokens=rows[0][0], cost=rows[0][1]) if rows else Amount()
