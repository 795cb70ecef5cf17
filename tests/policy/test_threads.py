"""Does the pool run everything, in a bounded number of threads, also when some of them hang?"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import random
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.policy import threads as pools
from embedcore.policy.threads import Pool


class Crowd:
    """Counts how many tasks run at once."""

    def __init__(self):
        self.lock = threading.Lock()
        self.now = self.most = self.done = 0

    def task(self, seconds=0.0):
        def run():
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(seconds)
            with self.lock:
                self.now -= 1
                self.done += 1

        return run

    def wait_for(self, done, seconds=120.0):
        return until(lambda: self.done >= done, seconds)


def until(true, seconds=120.0):
    ends = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends:
            return False
        time.sleep(0.001)
    return True


def threads_of(pool):
    return sum(thread.name == "embedcore" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _nobody_left():
    until(lambda: threads_of(None) == 0, 10)
    before = threads_of(None)
    yield
    gc.collect()
    assert until(lambda: threads_of(None) <= before), "threads outlive their pool"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.lists(st.sampled_from([0.0, 0.0, 0.0005]), max_size=60))
def test_every_task_runs_once_in_no_more_threads_than_allowed(size, tasks):
    with contextlib.closing(Pool(size)) as pool:
        crowd = Crowd()
        for seconds in tasks:
            pool.submit(crowd.task(seconds))
        assert crowd.wait_for(len(tasks))
        assert crowd.most <= size
        assert threads_of(pool) <= size
    assert until(lambda: threads_of(pool) == 0)
    assert crowd.done == len(tasks)


def test_threads_are_started_only_when_none_is_idle():
    pool, crowd = Pool(8), Crowd()
    for number in range(1, 30):
        pool.submit(crowd.task())
        assert crowd.wait_for(number)
        assert until(lambda: pool._free == len(pool._threads))
    assert threads_of(pool) == 1
    pool.close()


def test_tasks_that_could_run_at_once_do():
    pool, together = Pool(6), threading.Barrier(6)
    results = []
    for _ in range(3):
        for _ in range(6):
            pool.submit(lambda: results.append(together.wait(120)))
        assert until(lambda: len(results) % 6 == 0 and results)
        results.clear()
    pool.close()


def test_submitting_from_many_threads_loses_nothing():
    pool, crowd = Pool(5), Crowd()

    def submit():
        for _ in range(200):
            pool.submit(crowd.task())
            if random.random() < 0.05:
                time.sleep(0.001)

    submitters = [threading.Thread(target=submit) for _ in range(8)]
    for each in submitters:
        each.start()
    for each in submitters:
        each.join()
    assert crowd.wait_for(1600)
    assert crowd.most <= 5
    pool.close()


def meet(pool, count):
    """So many tasks can run at once."""
    together, met = threading.Barrier(count), []
    for _ in range(count):
        pool.submit(lambda: met.append(together.wait(120)))
    assert until(lambda: len(met) == count)


def hang_in(pool, count):
    """Tasks that hang until told otherwise: their threads, and what lets them go."""
    release, stuck = threading.Event(), []
    for _ in range(count):
        pool.submit(lambda: (stuck.append(threading.current_thread()), release.wait(120)))
    assert until(lambda: len(stuck) == count)
    return stuck, release


@pytest.mark.fault(127)
def test_a_thread_that_hangs_is_replaced():
    pool, crowd = Pool(3), Crowd()
    stuck, release = hang_in(pool, 3)
    for thread in stuck:
        pool.replace(thread)
    for _ in range(20):
        pool.submit(crowd.task(0.001))
    assert crowd.wait_for(20)
    assert crowd.most <= 3
    meet(pool, 3)
    release.set()
    pool.close()


@pytest.mark.fault(127)
def test_threads_that_come_back_do_not_add_up():
    pool, crowd = Pool(3), Crowd()
    for _ in range(5):
        stuck, release = hang_in(pool, 3)
        for thread in stuck:
            pool.replace(thread)
        release.set()
        assert until(lambda stuck=stuck: not any(thread.is_alive() for thread in stuck))
        assert threads_of(pool) == 3
    for _ in range(30):
        pool.submit(crowd.task(0.002))
    assert crowd.wait_for(30)
    assert crowd.most <= 3
    meet(pool, 3)
    pool.close()
    assert until(lambda: threads_of(pool) == 0)


def test_replacing_a_thread_twice_or_a_stranger_changes_nothing():
    pool, crowd = Pool(2), Crowd()
    stuck, release = hang_in(pool, 1)
    pool.replace(stuck[0])
    pool.replace(stuck[0])
    for _ in range(10):
        pool.submit(crowd.task(0.002))
    assert crowd.wait_for(10)
    assert crowd.most <= 2
    release.set()
    pool.close()


@pytest.mark.fault(127)
def test_a_thread_that_is_back_before_it_is_replaced_stays():
    """Given up at the very moment when its answer came: the pool must not lose count."""
    for _ in range(20):
        pool, crowd = Pool(2), Crowd()
        stuck, release = hang_in(pool, 2)
        release.set()
        if random.random() < 0.5:
            time.sleep(0.001)
        for thread in stuck:
            pool.replace(thread)
        pool.submit(crowd.task())
        assert crowd.wait_for(1)
        pool.close()
        assert until(lambda: threads_of(None) == 0)


def test_closing_lets_what_was_submitted_finish_and_refuses_more():
    pool, crowd = Pool(2), Crowd()
    for _ in range(20):
        pool.submit(crowd.task(0.001))
    pool.close()
    pool.close()
    with pytest.raises(ConfigurationError, match="closed"):
        pool.submit(crowd.task())
    assert crowd.wait_for(20)
    assert until(lambda: threads_of(pool) == 0)


def test_a_pool_that_is_forgotten_ends_its_threads():
    pool, crowd = Pool(3), Crowd()
    for _ in range(6):
        pool.submit(crowd.task())
    assert crowd.wait_for(6)
    del pool
    gc.collect()
    assert until(lambda: threads_of(None) == 0)


def test_a_thread_that_cannot_be_started_leaves_the_count_right(monkeypatch):
    pool, crowd = Pool(2), Crowd()
    pool.submit(crowd.task())
    assert crowd.wait_for(1)
    _, release = hang_in(pool, 1)

    def cannot(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", cannot)
        pool.submit(crowd.task())
    release.set()
    assert crowd.wait_for(2)
    meet(pool, 2)
    pool.close()


def test_a_pool_without_any_thread_says_so(monkeypatch):
    pool, crowd = Pool(2), Crowd()

    def cannot(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", cannot)
        with pytest.raises(EmbeddingError, match="no thread can be started") as caught:
            pool.submit(crowd.task())
        assert caught.value.retryable
    pool.submit(crowd.task())
    assert crowd.wait_for(1)
    pool.close()


@pytest.mark.case("H4")
@pytest.mark.parametrize(("affordable", "started"), [(None, 4), (0, 1), (1, 1), (3, 3), (9, 4)])
def test_no_more_threads_are_started_than_there_are_addresses_for(monkeypatch, affordable, started):
    asked = []
    monkeypatch.setattr(
        pools, "affordable_threads", lambda: asked.append(threads_of(None)) or affordable
    )
    pool, crowd = Pool(4), Crowd()
    before = threads_of(pool)
    for _ in range(40):
        pool.submit(crowd.task(0.005))
    assert crowd.wait_for(40)
    assert threads_of(pool) - before == started
    assert crowd.most <= started
    # Counted once: those that were started have not yet taken what is theirs.
    assert asked == [before]
    pool.close()


@pytest.mark.case("H4")
@pytest.mark.skipif(sys.platform != "linux", reason="nothing else says how many are used")
def test_addresses_are_counted_as_the_system_counts_them(monkeypatch, tmp_path):
    import resource

    memory, mib = tmp_path / "statm", 1 << 20
    memory.write_text(f"{300 * mib // resource.getpagesize()} 1 1 1 0 1 0\n")
    for limit, threads in ((resource.RLIM_INFINITY, None), (700, 3), (430, 0), (100, 0)):
        soft = limit if limit == resource.RLIM_INFINITY else limit * mib
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert pools.affordable_threads(memory=memory) == threads
    assert pools.affordable_threads(memory=tmp_path / "absent") is None


@pytest.mark.case("H8")
def test_what_an_interpreter_refuses_is_named_and_not_tried_again(monkeypatch):
    def refuse(self):
        raise RuntimeError("daemon threads are disabled in this interpreter")

    pool = Pool(2)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(EmbeddingError, match="daemon threads are disabled") as caught:
        pool.submit(lambda: None)
    assert "sub-interpreter" in str(caught.value)
    assert not caught.value.retryable
    pool.close()


SUBINTERPRETER = """
import sys
sys.path[:0] = {path!r}
from embedcore import EmbeddingClient, EmbeddingError
try:
    assert len(EmbeddingClient("hashing:64").embed_text("a")) == 64
    print("works")
except EmbeddingError as error:
    print("says", "sub-interpreter" in str(error))
except ImportError as error:
    print("says", "interpreter" in str(error))
"""


@pytest.mark.case("H8")
def test_a_sub_interpreter_works_or_says_why_not():
    """In a process of its own: an interpreter that ends badly takes everything with it."""
    found = [importlib.util.find_spec(name) for name in ("_interpreters", "_xxsubinterpreters")]
    name = next((spec.name for spec in found if spec is not None), None)
    if name is None:
        pytest.skip("this Python has no sub-interpreters")
    code = SUBINTERPRETER.format(path=sys.path)
    program = f"""
import {name} as interpreters
import os
one = interpreters.create()
failed = interpreters.run_string(one, {code!r})
if failed:
    print("says", "interpreter" in str(failed))
sys = __import__("sys")
sys.stdout.flush()
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout in ("works\n", "says True\n"), (done.stdout, done.stderr)
