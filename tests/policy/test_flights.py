"""Is every attempt either waited for, booked or given up, exactly one of them?"""

from __future__ import annotations

import threading

import pytest

from embedcore.policy.flights import Flight, Flights, Pause, Stopped


def flight():
    return Flight(attempt=None, indices=(0,), started=0.0)


def test_what_lands_in_time_stays_under_way_until_it_is_booked():
    flights, one = Flights(), flight()
    assert flights.start(one)
    assert flights.under_way == 1
    assert flights.land(one)
    assert flights.under_way == 1
    assert flights.give_up() == []
    flights.finish(one)
    assert flights.under_way == 0


def test_what_was_given_up_lands_too_late():
    flights, one = Flights(), flight()
    flights.start(one)
    assert flights.give_up() == [one]
    assert flights.under_way == 0
    assert not flights.land(one)
    flights.finish(one)
    assert flights.give_up() == []


def test_nothing_starts_after_the_end():
    flights = Flights()
    flights.close()
    assert not flights.start(flight())
    assert flights.under_way == 0
    flights = Flights()
    flights.give_up()
    assert not flights.start(flight())


def test_landing_and_giving_up_at_once_never_both_win():
    for _ in range(300):
        flights, one = Flights(), flight()
        flights.start(one)
        landed = []
        gate = threading.Barrier(2)

        def land(flights=flights, one=one, landed=landed, gate=gate):
            gate.wait()
            landed.append(flights.land(one))

        thread = threading.Thread(target=land)
        thread.start()
        gate.wait()
        lost = flights.give_up()
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
