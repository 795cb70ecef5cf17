"""Locks, lazily made things and the number of the process, on both sides of a fork."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from embedcore import forksafe
from embedcore.forksafe import Lazy, Lock, cached, in_child, process

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

REFUSED, HANGS = 3, -signal.SIGALRM


def in_c() -> int:
    """A fork that no handler sees."""
    return int(ctypes.PyDLL(None).fork())


def child(work: Callable[[], object], how: Callable[[], int] = os.fork) -> int:
    """The exit code of a child: 0 if what ``work`` says is true, 3 if not."""
    pid = how()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            os._exit(0 if work() else REFUSED)
        except BaseException:  # noqa: BLE001 - told by the code
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Guarded:
    """Notes what it is told."""

    def __init__(self, name: str = "", told: list[str] | None = None) -> None:
        self.name, self.told = name, [] if told is None else told
        self.was_at_rest: list[bool] = []
        self.lock = Lock(self)

    def rest(self) -> None:
        self.told.append(f"rest {self.name}")

    def is_at_rest(self) -> bool:
        self.told.append(f"rested {self.name}")
        return True

    def forked(self, *, at_rest: bool) -> None:
        self.was_at_rest.append(at_rest)


class Holder:
    """Another thread that holds a lock until it is told to leave."""

    def __init__(self, lock: Lock) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._hold, args=[lock])
        self.thread.start()
        assert self.inside.wait(60)

    def _hold(self, lock: Lock) -> None:
        with lock:
            self.inside.set()
            self.leave.wait(60)

    def end(self) -> None:
        self.leave.set()
        self.thread.join()


def is_free(lock: Lock) -> bool:
    """Whether another thread could have it."""
    got: list[bool] = []

    def look() -> None:
        got.append(lock.acquire(blocking=False))
        if got[0]:
            lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return got[0]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forksafe, "WAIT_SECONDS", 0.05)


def test_all_locks_are_taken_in_the_order_in_which_they_were_made() -> None:
    told: list[str] = []
    things = [Guarded(name, told) for name in "abc"]
    assert (
        child(lambda: all(one.was_at_rest == [True] and is_free(one.lock) for one in things)) == 0
    )
    # Nobody is asked before all have let go: two may have one file open.
    assert told == [f"{what} {name}" for what in ("rest", "rested") for name in "abc"]
    assert all(is_free(one.lock) and one.was_at_rest == [] for one in things)


def test_a_fork_waits_for_who_is_inside() -> None:
    thing = Guarded()
    holder = Holder(thing.lock)
    threading.Timer(0.02, holder.leave.set).start()
    assert child(lambda: thing.was_at_rest == [True]) == 0
    holder.end()


def test_a_lock_that_is_made_meanwhile_is_taken_as_well() -> None:
    """By who holds another one: as a client that is being opened opens its files."""
    outer, inner = Guarded(), []
    inside = threading.Event()

    def work() -> None:
        with outer.lock:
            inside.set()
            while not forksafe.forking.is_near:
                pass
            inner.append(Guarded())
            with inner[0].lock:
                pass

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    assert child(lambda: inner[0].was_at_rest == [True]) == 0
    thread.join()


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_is_not_had_is_free_in_the_child_and_held_in_the_parent() -> None:
    thing, other = Guarded(), Guarded()
    holder = Holder(thing.lock)
    assert child(lambda: thing.was_at_rest == [False] and is_free(thing.lock)) == 0
    assert child(lambda: other.was_at_rest == [True]) == 0
    assert not is_free(thing.lock)
    assert "rest " not in thing.told
    holder.end()
    assert is_free(thing.lock)


def test_what_the_thread_that_forks_holds_itself_costs_no_time_and_stays_its_own() -> None:
    thing = Guarded()

    def work() -> bool:
        return thing.was_at_rest == [False] and not is_free(thing.lock)

    with thing.lock:
        assert child(work) == 0
        assert not is_free(thing.lock)
    assert is_free(thing.lock)


def test_new_entrants_wait_until_the_fork_has_passed() -> None:
    """Otherwise threads that come and go would keep a lock from it for ever."""
    first, last = Guarded(), Guarded()
    codes: list[int] = []
    entered, nested, go_on = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        # While the fork waits for this one, it has not come to the other yet.
        with first.lock:
            go_on.wait(60)
            # Whoever holds one of them may take another: the fork waits for both.
            with Lock():
                nested.set()
            assert not entered.wait(0.05)

    def enter() -> None:
        while not forksafe.forking.is_near:
            pass
        go_on.set()
        with last.lock:
            entered.set()

    work = [hold, enter, lambda: codes.append(child(lambda: True))]
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0]
    assert entered.is_set()
    assert nested.is_set()


def test_two_threads_may_fork_at_once() -> None:
    things = [Guarded() for _ in range(3)]
    codes: list[int] = []

    def work() -> None:
        for _ in range(4):
            code = child(lambda: all(one.was_at_rest == [True] for one in things))
            codes.append(code)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 12
    assert all(is_free(one.lock) for one in things)


def test_what_cannot_rest_is_not_at_rest_in_the_child() -> None:
    thing, other = Guarded(), Guarded()

    def fail() -> None:
        raise OSError("no")

    thing.rest = fail  # type: ignore[method-assign]
    other.is_at_rest = lambda: False  # type: ignore[method-assign]
    assert child(lambda: thing.was_at_rest == [False] and other.was_at_rest == [False]) == 0
    assert is_free(thing.lock)
    assert is_free(other.lock)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_a_fork_is_prepared_leaves_no_lock_behind() -> None:
    thing, other = Guarded(), Guarded()

    def interrupted() -> None:
        raise KeyboardInterrupt

    thing.rest = interrupted  # type: ignore[method-assign]
    assert child(lambda: thing.was_at_rest == [False]) == 0
    assert is_free(thing.lock)
    assert is_free(other.lock)
    assert not forksafe.forking.is_near


@pytest.mark.case("C2")
@pytest.mark.parametrize("moment", ["rest", "is_at_rest", "before and after"])
@pytest.mark.parametrize("held", [False, True])
def test_a_signal_forks_while_a_fork_is_under_way(
    monkeypatch: pytest.MonkeyPatch, moment: str, held: bool
) -> None:
    """As masters of worker processes do that replace a worker when one has ended."""
    things = [Guarded() for _ in range(3)]
    own = Lock()
    codes: list[int] = []
    depth = 0

    def good() -> bool:
        # What was taken for the outer fork is at rest and free, as for any other.
        return all(set(one.was_at_rest) == {True} and is_free(one.lock) for one in things)

    def fork_again(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            codes.append(child(good))

    def signalled(*_: object, **__: object) -> bool:
        signal.raise_signal(signal.SIGUSR1)
        return True

    before = signal.signal(signal.SIGUSR1, fork_again)
    try:
        if moment in ("rest", "is_at_rest"):
            monkeypatch.setattr(things[1], moment, signalled)
        else:
            real = forksafe._all
            monkeypatch.setattr(forksafe, "_all", lambda forks: (signalled(), real(forks))[1])
        for _ in range(2):
            if held:
                with own:
                    codes.append(child(good))
                    assert not is_free(own)
            else:
                codes.append(child(good))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert codes == [0] * len(codes)
    assert len(codes) == 3
    assert all(is_free(one.lock) for one in things)
    assert is_free(own)
    assert not forksafe.forking.is_near
    assert not forksafe._prepared.forks


FORKS_BY_A_SIGNAL = """
import os, signal
from embedcore.forksafe import Lock
import concurrent.futures.thread

class Guarded:
    def rest(self):
        signal.raise_signal(signal.SIGUSR1)
    def is_at_rest(self):
        return True
    def forked(self, *, at_rest):
        pass

def fork(*_):
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)

signal.alarm(60)
signal.signal(signal.SIGUSR1, lambda *_: (signal.signal(signal.SIGUSR1, signal.SIG_IGN), fork()))
guarded = Guarded()
guarded.lock = Lock(guarded)
fork()
"""


@pytest.mark.case("C2")
def test_what_locks_for_a_fork_and_does_not_nest_is_registered_before_us() -> None:
    """The pools of ``concurrent.futures`` do, and a program may import them at any time."""
    ran = subprocess.run([sys.executable, "-c", FORKS_BY_A_SIGNAL], stderr=subprocess.PIPE)
    assert ran.returncode == 0, ran


def test_a_fork_in_c_is_noticed_by_the_first_who_asks() -> None:
    thing = Guarded()
    holder = Holder(thing.lock)

    def work() -> bool:
        told = len(thing.was_at_rest)
        with thing.lock:
            pass
        return thing.was_at_rest[told:] == [False] and process() == os.getpid()

    assert child(work, in_c) == 0
    holder.end()
    assert child(lambda: child(work, in_c) == 0) == 0, "and in what a child forks"
    assert child(lambda: child(lambda: thing.was_at_rest == [False, True]) == 0, in_c) == 0


def test_threads_of_a_child_forked_in_c_see_it_once() -> None:
    thing = Guarded()

    def work() -> bool:
        start = threading.Barrier(4)

        def enter() -> None:
            start.wait(60)
            with thing.lock:
                pass

        threads = [threading.Thread(target=enter) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return thing.was_at_rest == [False]

    assert child(work, in_c) == 0


def test_a_lock_does_not_nest_with_itself() -> None:
    lock = Lock()
    with lock:
        with pytest.raises(RuntimeError), lock:
            pass
        assert not is_free(lock)
    assert is_free(lock)


def test_nothing_is_kept_alive_by_being_known() -> None:
    gc.collect()
    before = len(forksafe._locks), len(forksafe._lazy)
    thing, lazy = Guarded(), Lazy[int]()
    assert (len(forksafe._locks), len(forksafe._lazy)) == (before[0] + 2, before[1] + 1)
    lazy.get(lambda: 1)
    del thing, lazy
    gc.collect()
    assert (len(forksafe._locks), len(forksafe._lazy)) == before


@pytest.mark.parametrize("how", [os.fork, in_c])
def test_a_child_makes_its_own(how: Callable[[], int]) -> None:
    lazy, shared = Lazy[object](), Lazy[object](shared=True)
    mine, memory = lazy.get(object), shared.get(object)

    def work() -> bool:
        return (
            not lazy.is_there
            and lazy.take() is None
            and lazy.get(object) is not mine
            and shared.get(object) is memory
        )

    assert child(work, how) == 0
    assert lazy.get(object) is mine
    assert lazy.take() is mine
    assert lazy.get(object) is not mine


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", [os.fork, in_c])
@pytest.mark.parametrize("shared", [True, False])
def test_a_child_does_not_wait_for_a_thread_of_its_parent_that_makes_it(
    how: Callable[[], int], shared: bool
) -> None:
    lazy = Lazy[int](shared=shared)
    making, go_on = threading.Event(), threading.Event()

    def make() -> int:
        making.set()
        go_on.wait(60)
        return 1

    thread = threading.Thread(target=lazy.get, args=[make])
    thread.start()
    assert making.wait(60)
    assert child(lambda: lazy.get(lambda: 2) == 2, how) == 0
    go_on.set()
    thread.join()
    assert lazy.get(lambda: 3) == 1


def test_what_fails_is_made_by_the_next() -> None:
    lazy = Lazy[int]()
    with pytest.raises(ZeroDivisionError):
        lazy.get(lambda: 1 // 0)
    assert lazy.get(lambda: 2) == 2


@pytest.mark.parametrize("how", [os.fork, in_c])
def test_what_is_to_be_forgotten_is_forgotten_first(
    how: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forksafe, "_forgets", [])
    known = ["of the parent"]
    in_child(known.clear)
    assert child(lambda: process() and not known, how) == 0
    assert known


SLOW = """
import sys
started, go_on = sys.modules["slow_events"]
started.set()
go_on.wait(60)
"""


@pytest.mark.parametrize("importer", ["embedcore.somewhere", "elsewhere"])
def test_an_import_of_ours_is_waited_for_and_no_other(
    importer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's lock on a module that a thread of the parent was importing is never released."""
    name = f"slow_module_of_{importer.partition('.')[0]}"
    (tmp_path / f"{name}.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    started, go_on = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "slow_events", (started, go_on))  # type: ignore[misc]
    where: dict[str, Any] = {"__name__": importer}
    exec(f"def work():\n    import {name}", where)
    thread = threading.Thread(target=where["work"])
    thread.start()
    assert started.wait(60)
    if importer == "elsewhere":
        assert child(lambda: not go_on.is_set()) == 0
        go_on.set()
    else:
        threading.Timer(0.02, go_on.set).start()
        assert child(lambda: import_module(name)) == 0
    thread.join()
    del sys.modules[name]


def test_what_is_computed_once_is_computed_without_a_lock_that_a_child_would_inherit() -> None:
    computing, go_on = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    class Thing:
        def __init__(self, waits: bool) -> None:
            self.waits, self.times = waits, 0

        @cached
        def value(self) -> int:
            """Documented."""
            self.times += 1
            if self.waits:
                computing.set()
                go_on.wait(60)
            return self.times

    slow, quick = Thing(True), Thing(False)
    threads.append(threading.Thread(target=lambda: slow.value))
    threads[0].start()
    assert computing.wait(60)
    assert child(lambda: quick.value == 1) == 0
    go_on.set()
    threads[0].join()
    assert (slow.value, quick.value, quick.value, quick.times) == (1, 1, 1, 1)
    assert isinstance(Thing.value, cached)
    assert Thing.value.__doc__ == "Documented."
