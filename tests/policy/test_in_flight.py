"""Is every attempt either waited for, booked or given up, exactly one of them?"""

from __future__ import annotations

import threading

import pytest

from embedcore.policy.threads import InFlight, Pause, SentRequest, Stopped


def flight():
    return SentRequest(attempt=None, texts=("a",), started=0.0)


def test_what_lands_in_time_stays_under_way_until_it_is_booked():
    in_flight, one = InFlight(), flight()
    assert in_flight.start(one)
    assert in_flight.under_way == 1
    assert in_flight.answered(one)
    assert in_flight.under_way == 1
    assert in_flight.give_up() == []
    in_flight.finish(one)
    assert in_flight.under_way == 0


def test_what_was_given_up_lands_too_late():
    in_flight, one = InFlight(), flight()
    in_flight.start(one)
    assert in_flight.give_up() == [one]
    assert in_flight.under_way == 0
    assert not in_flight.answered(one)
    in_flight.finish(one)
    assert in_flight.give_up() == []


def test_nothing_starts_after_the_end():
    in_flight = InFlight()
    in_flight.close()
    assert not in_flight.start(flight())
    assert in_flight.under_way == 0
    in_flight = InFlight()
    in_flight.give_up()
    assert not in_flight.start(flight())


def test_landing_and_giving_up_at_once_never_both_win():
    for _ in range(300):
        in_flight, one = InFlight(), flight()
        in_flight.start(one)
        landed = []
        gate = threading.Barrier(2)

        def land(in_flight=in_flight, one=one, landed=landed, gate=gate):
            gate.wait()
            landed.append(in_flight.answered(one))

        thread = threading.Thread(target=land)
        thread.start()
        gate.wait()
        lost = in_flight.give_up()
        thread.join()
        assert (lost == [one]) != landed[0]


def test_a_pause_ends_with_the_call_or_from_outside():
    for end in ("inside", "outside"):
        outside = threading.Event()
        pause = Pause(outside)
        pause(0.0)
        pause(0.001)
        threading.Timer(0.05, pause.end if end == "inside" else outside.set).start()
        with pytest.raises(Stopped):
            pause(3600.0)
        assert pause.ended
        with pytest.raises(Stopped):
            pause(0.0)
