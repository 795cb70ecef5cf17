"""Is what one call buys billed by no other, and does nobody wait for what will not come?"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.policy.cache import Follower, InFlightKeys, in_flight_keys_for

KEYS = [bytes([number]) * 32 for number in range(8)]


class Caller(Follower):
    """A follower that notes what it gets, as ``(index, first component)``."""

    def __init__(self, error=None):
        super().__init__(self.note)
        self.got, self.times = [], 0
        self.error = error

    def note(self, indices, vectors):
        if self.error is not None:
            raise self.error
        self.times += 1
        self.got += zip(indices, vectors[:, 0].tolist(), strict=True)


def vectors(*numbers):
    return np.array([[number] for number in numbers], dtype=np.float32)


def never(_):
    raise AssertionError("nobody has to wait here")


def test_what_is_free_is_claimed_and_what_is_not_is_waited_for():
    claims, one, other = InFlightKeys(), Caller(), Caller()
    assert claims.take(KEYS[:3], [0, 1, 2], one) == []
    assert claims.take(KEYS[1:5], [7, 8, 9, 10], other) == [7, 8]
    claims.fulfil(KEYS[:3], vectors(0, 1, 2), one)
    assert other.got == [(7, 1), (8, 2)]
    assert other.times == 1, "what comes together is handed over together"
    assert other.wait(never) == []
    assert claims.take(KEYS[:3], [0, 1, 2], Caller()) == [], "what is done is free again"


def test_what_was_not_billed_is_lost_to_all_who_wait_and_free_again():
    claims, one, second, third = InFlightKeys(), Caller(), Caller(), Caller()
    claims.take(KEYS[:2], [0, 1], one)
    claims.take(KEYS[:2], [5, 4], second)
    claims.take(KEYS[:1], [3], third)
    claims.release(KEYS[:2], one)
    assert second.wait(never) == [4, 5]
    assert third.wait(never) == [3]
    assert claims.take(KEYS[:2], [5, 4], second) == []
    assert claims.take(KEYS[:1], [3], third) == [3]


def test_nobody_ends_the_claim_of_another():
    claims, one, other = InFlightKeys(), Caller(), Caller()
    claims.take(KEYS[:1], [0], one)
    claims.release(KEYS, other)
    claims.fulfil(KEYS[:1], vectors(9), other)
    assert claims.take(KEYS[:1], [1], other) == [1]
    claims.fulfil(KEYS[:1], vectors(1), one)
    assert other.got == [(1, 1)]


def test_one_key_twice_in_a_call_is_not_waited_for():
    claims, one = InFlightKeys(), Caller()
    assert claims.take([KEYS[0], KEYS[0]], [0, 1], one) == []


def test_what_a_receiver_raises_is_its_own_trouble():
    claims, one, bad, good = InFlightKeys(), Caller(), Caller(ZeroDivisionError("mine")), Caller()
    for index, caller in enumerate([one, bad, good]):
        claims.take(KEYS[:2], [index, index + 10], caller)
    claims.fulfil(KEYS[:2], vectors(1, 2), one)
    assert good.got == [(2, 1), (12, 2)]
    assert good.wait(never) == []
    with pytest.raises(ZeroDivisionError, match="mine"):
        bad.wait(never)


def test_what_is_handed_over_is_a_copy():
    def spoil(indices, vectors):
        vectors[:] = 0

    claims, one, spoiler, other = InFlightKeys(), Caller(), Follower(spoil), Caller()
    for caller in (one, spoiler, other):
        claims.take(KEYS[:2], [0, 1], caller)
    mine = vectors(1, 2)
    claims.fulfil(KEYS[:2], mine, one)
    assert mine.tolist() == [[1], [2]]
    assert other.got == [(0, 1), (1, 2)]


def test_a_call_that_has_ended_gets_nothing_more():
    claims, one, gone = InFlightKeys(), Caller(), Caller()
    claims.take(KEYS[:1], [0], one)
    claims.take(KEYS[:1], [0], gone)
    gone.close()
    claims.fulfil(KEYS[:1], vectors(1), one)
    assert gone.got == []


def test_the_end_of_a_call_waits_for_what_it_is_being_given():
    entered, leave, ended = threading.Event(), threading.Event(), []

    def slow(indices, vectors):
        entered.set()
        assert leave.wait(120)
        assert not ended

    claims, one, follower = InFlightKeys(), Caller(), Follower(slow)
    claims.take(KEYS[:1], [0], one)
    claims.take(KEYS[:1], [0], follower)
    giver = threading.Thread(target=claims.fulfil, args=(KEYS[:1], vectors(1), one))
    giver.start()
    assert entered.wait(120)
    closer = threading.Thread(target=lambda: (follower.close(), ended.append(True)))
    closer.start()
    time.sleep(0.05)
    assert not ended
    leave.set()
    for thread in (giver, closer):
        thread.join(120)
    assert ended == [True]
    assert follower.wait(never) == [], "nothing was raised in it"


def test_waiting_can_be_ended_from_outside():
    class Stopped(Exception):
        pass

    def stop(seconds):
        assert seconds == 0
        raise Stopped

    claims, one, other = InFlightKeys(), Caller(), Caller()
    claims.take(KEYS[:1], [0], one)
    claims.take(KEYS[:1], [0], other)
    with pytest.raises(Stopped):
        other.wait(stop)


def test_each_store_has_claims_of_its_own():
    assert in_flight_keys_for("/a/vectors") is in_flight_keys_for("/a/vectors")
    assert in_flight_keys_for("/a/vectors") is not in_flight_keys_for("/b/vectors")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 7), unique=True, min_size=1), min_size=2, max_size=6),
    st.lists(st.booleans(), min_size=64, max_size=64),
)
def test_in_any_interleaving_each_key_is_billed_once_or_by_whoever_comes_after_a_failure(
    wants, fails
):
    claims, lock = InFlightKeys(), threading.Lock()
    billed, failed, ends = [], [], []
    chances = iter(fails)

    def call(wanted):
        caller, left = Caller(), wanted
        while left:
            keys = [KEYS[number] for number in left]
            theirs = claims.take(keys, left, caller)
            for number in left:
                if number in theirs:
                    continue
                with lock:
                    fail = next(chances, False)
                    (failed if fail else billed).append(number)
                if fail:
                    # As a call whose request failed for good: it does without this one.
                    claims.release([KEYS[number]], caller)
                    caller.got.append((number, number))
                else:
                    claims.fulfil([KEYS[number]], vectors(number), caller)
                    caller.got.append((number, number))
            left = caller.wait(lambda _: None)
        caller.close()
        with lock:
            ends.append(sorted(caller.got) == sorted((number, number) for number in wanted))

    threads = [threading.Thread(target=call, args=(wanted,)) for wanted in wants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "it waits for ever"
    assert ends == [True] * len(wants)
    assert claims._owners == {}
    assert claims._waiting == {}
