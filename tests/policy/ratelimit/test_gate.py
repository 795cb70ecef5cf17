"""Do all threads wait while the gate is closed, and does every one of them get through?"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time

import pytest
from hypothesis import given, settings, strategies as st
from waiting import until

from embedcore.policy.ratelimit.pace import Rates
from embedcore.policy.ratelimit.queue import Gate, gate_for
from embedcore.provider.types import RateLimits
from embedcore.testing import FakeClock


def nothing() -> None:
    """Nobody has a lease to keep alive."""


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
    gate.admit(1, clock.sleep, meanwhile=nothing)
    assert clock.monotonic() >= opens - 1e-6
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

    gate.admit(1, pause, meanwhile=nothing)
    assert gate.closed_for == 0


def test_a_lease_is_kept_alive_while_waiting():
    clock, renewed = FakeClock(), []
    gate = Gate(monotonic=clock.monotonic)
    gate.close(100)
    gate.admit(1, clock.sleep, meanwhile=lambda: renewed.append(clock.monotonic()))
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
        gate.admit(1, pause, meanwhile=nothing)
    assert gate.state().waiting == 0


def test_a_lease_that_is_lost_ends_the_wait():
    class Lost(Exception):
        pass

    def renew():
        raise Lost

    clock = FakeClock()
    gate = Gate(monotonic=clock.monotonic)
    gate.close(100)
    with pytest.raises(Lost):
        gate.admit(1, clock.sleep, meanwhile=renew)
    assert gate.state().waiting == 0


def test_what_cannot_be_queued_leaves_nobody_behind():
    gate = Gate(monotonic=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gate.admit(1, nothing, meanwhile=nothing)
    gate._monotonic = lambda: 0.0
    assert gate.state().waiting == 0


def test_a_closing_holds_back_all_others_and_a_pass_that_ends_is_counted():
    clock = FakeClock()
    gate = Gate(monotonic=clock.monotonic, jitter=lambda low, high: low)
    first = gate.admit(10, clock.sleep, meanwhile=nothing)
    second = gate.admit(20, clock.sleep, meanwhile=nothing)
    assert (gate.state().in_flight, gate.state().tokens_in_flight) == (2, 30)
    clock.advance(0.1)
    gate.refused(first, 30.0, None)
    assert gate.closed_for == pytest.approx(30)
    began = clock.monotonic()
    third = gate.admit(10, clock.sleep, meanwhile=nothing)
    assert clock.monotonic() >= began + 30 - 1e-6
    gate.answered(second, None, tokens=20)
    gate.lost(third)
    state = gate.state()
    assert (state.in_flight, state.sent, state.refusals) == (0, 3, 1)


def test_a_rate_of_the_caller_is_kept():
    clock = FakeClock()
    gate, rates = Gate(monotonic=clock.monotonic), Rates(requests_per_minute=60)
    began = clock.monotonic()
    for _ in range(31):
        one = gate.admit(10, clock.sleep, meanwhile=nothing, rates=rates)
        gate.answered(one, None, tokens=10)
    assert clock.monotonic() - began == pytest.approx(30, abs=1.5)


def test_threads_share_what_remains():
    """A bucket of 100 requests and no refill to speak of: no more than that leave."""
    gate, gone, stop = Gate(monotonic=FakeClock().monotonic), [], threading.Event()
    one = gate.admit(1, time.sleep, meanwhile=nothing)
    left = RateLimits(limit_requests=100, remaining_requests=50, reset_requests=50.0)
    gate.answered(one, left, tokens=1)

    class Stopped(Exception):
        pass

    def pause(seconds: float) -> None:
        if stop.wait(0.001):
            raise Stopped

    def go() -> None:
        with contextlib.suppress(Stopped):
            while True:
                gone.append(gate.admit(1, pause, meanwhile=nothing))

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: gate.state().waiting == 8)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert 48 <= len(gone) <= 51
    assert gate.state().waiting == 0


def test_many_threads_all_wait_and_all_get_through():
    clock, left = FakeClock(), []
    gate = Gate(monotonic=clock.monotonic)
    gate.close(30)

    def go():
        gate.admit(1, lambda _: time.sleep(0.001), meanwhile=nothing)
        left.append(clock.monotonic())

    threads = [threading.Thread(target=go) for _ in range(32)]
    for thread in threads:
        thread.start()
    until(lambda: gate.state().waiting == 32)
    clock.advance(29)
    assert left == []
    clock.advance(2)
    for thread in threads:
        while thread.is_alive():
            clock.advance(1)
            thread.join(0.001)
    assert len(left) == 32
    assert min(left) >= 1000 + 30


def test_one_gate_for_each_endpoint_and_model():
    assert gate_for("https://a") is gate_for("https://a")
    assert gate_for("https://a") is not gate_for("https://b")
    assert gate_for("https://a", "small") is gate_for("https://a", "small")
    assert gate_for("https://a", "small") is not gate_for("https://a", "large")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_has_gates_of_its_own():
    mine = gate_for("https://forked")
    child = os.fork()
    if child == 0:
        os._exit(0 if gate_for("https://forked") is not mine else 1)
    assert os.waitpid(child, 0)[1] == 0
