"""Do all threads wait while the gate is closed, and does every one of them get through?"""

from __future__ import annotations

import itertools
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcore.policy.limiter import Gate, gate_for
from embedcore.testing import FakeClock


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 300)), max_size=8),
    st.floats(0, 1),
)
def test_nobody_leaves_before_the_latest_closing_ends(closings, luck):
    clock = FakeClock()
    gate = Gate(monotonic=clock.monotonic, jitter=lambda low, high: low + (high - low) * luck)
    opens = clock.monotonic()
    for passed, seconds in closings:
        clock.advance(passed)
        gate.close(seconds)
        opens = max(opens, clock.monotonic() + seconds)
    assert gate.closed_for == pytest.approx(max(opens - clock.monotonic(), 0.0))
    gate.wait(clock.sleep, meanwhile=lambda: None)
    assert clock.monotonic() >= opens - 1e-6
    assert clock.monotonic() <= max(opens + 1.0 + 1e-6, clock.monotonic())
    assert all(0 <= slept <= 15 for slept in clock.sleeps)


@settings(deadline=None)
@given(st.floats(0.1, 200), st.floats(0.1, 200))
def test_a_gate_that_closes_again_meanwhile_is_waited_for_as_well(first, second):
    clock = FakeClock()
    gate = Gate(monotonic=clock.monotonic, jitter=lambda *_: 0.0)
    gate.close(first)
    again = [second]

    def pause(seconds):
        clock.sleep(seconds)
        if again:
            gate.close(again.pop())

    gate.wait(pause, meanwhile=lambda: None)
    assert gate.closed_for == 0


def test_a_lease_is_kept_alive_while_waiting():
    clock, renewed = FakeClock(), []
    gate = Gate(monotonic=clock.monotonic)
    gate.close(100)
    gate.wait(clock.sleep, meanwhile=lambda: renewed.append(clock.monotonic()))
    gaps = [later - sooner for sooner, later in itertools.pairwise(renewed)]
    assert len(renewed) >= 5
    assert max(gaps) <= 16


def test_a_stopped_call_leaves_the_gate_at_once():
    class Stopped(Exception):
        pass

    def pause(seconds):
        raise Stopped

    gate = Gate()
    gate.close(1000)
    with pytest.raises(Stopped):
        gate.wait(pause, meanwhile=lambda: None)


def test_many_threads_all_wait_and_all_get_through():
    import time

    gate, left = Gate(), []
    gate.close(0.2)
    opens = time.monotonic() + 0.19

    def go():
        gate.wait(time.sleep, meanwhile=lambda: None)
        left.append(time.monotonic())

    threads = [threading.Thread(target=go) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(left) == 32
    assert min(left) >= opens


def test_one_gate_for_each_endpoint():
    assert gate_for("https://a") is gate_for("https://a")
    assert gate_for("https://a") is not gate_for("https://b")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_has_gates_of_its_own():
    mine = gate_for("https://forked")
    child = os.fork()
    if child == 0:
        os._exit(0 if gate_for("https://forked") is not mine else 1)
    assert os.waitpid(child, 0)[1] == 0
