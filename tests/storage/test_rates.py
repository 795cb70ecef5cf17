"""Is no more let through than a limit allows, whatever processes reserve, return and leave?"""

from __future__ import annotations

import itertools
import math
import os
import threading

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from embedcore.errors import StorageCorrupt, StorageError
from embedcore.storage import rates
from embedcore.storage.database import Database
from embedcore.storage.rate_buckets import (
    REQUESTS,
    TOKENS,
    Amounts,
    Facts,
    RateBucket,
    Remaining,
    kind_set,
    trial,
)
from embedcore.storage.rates import Key, News, RateShare, Wanted, share_for
from embedcore.storage.schema import RATES

KEY = Key("https://api", "account", "model")
RATE, SIZE = 10.0, 10.0
TOKEN_RATE, TOKEN_SIZE = 1000.0, 2000.0


def known(left: float = SIZE, tokens: float = TOKEN_SIZE) -> News:
    """What a process says that is alone: 600 requests and 60,000 tokens per minute."""
    return News(
        facts={
            REQUESTS: Facts(600, RATE, SIZE, left),
            TOKENS: Facts(60_000, TOKEN_RATE, TOKEN_SIZE, tokens),
        }
    )


def folder(count: int = 3) -> list[RateShare]:
    """So many processes with one state folder."""
    database = Database(None, RATES)
    return [
        RateShare(database, owner=lambda name=f"host:{number}": name) for number in range(count)
    ]


def crowd(count: int = 3, **left: float) -> list[RateShare]:
    """The same, when the first one knows the limits, and the others are there."""
    shares = folder(count)
    shares[0].look(KEY, 0.0, known(**left))
    for share in shares:
        share.look(KEY, 1.0, News())
    return shares


def due(share: RateShare, now: float, *tokens: int, rates=()) -> list[float]:
    slots, _ = share.reserve(KEY, now, [Wanted(one, rates) for one in tokens], News())
    return [slot.due for slot in slots]


class Processes(RuleBasedStateMachine):
    """They reserve, use, return and die. What has a turn is used at its time, or never."""

    def __init__(self):
        super().__init__()
        self.shares, self.now = crowd(4), 1.0
        self.turns: list[tuple[float, int]] = []
        self.unused: list[tuple[RateShare, rates.Slot, int]] = []

    @rule(which=st.integers(0, 3), tokens=st.lists(st.integers(1, 2000), min_size=1, max_size=6))
    def reserve(self, which, tokens):
        share = self.shares[which]
        slots, _ = share.reserve(KEY, self.now, [Wanted(one) for one in tokens], News())
        assert len(slots) == len(tokens)
        assert all(slot.due >= self.now for slot in slots)
        for slot, amount in zip(slots, tokens, strict=True):
            self.turns.append((slot.due, amount))
            self.unused.append((share, slot, amount))

    @rule(which=st.integers(0, 30))
    def give_up(self, which):
        waiting = [one for one in self.unused if one[1].due >= self.now]
        if waiting:
            share, slot, amount = one = waiting[which % len(waiting)]
            self.unused.remove(one)
            self.turns.remove((slot.due, amount))
            share.returned(KEY, self.now, slot, Amounts(1, amount, 1))

    @rule(which=st.integers(0, 3))
    def die(self, which):
        share = self.shares[which]
        for one in [one for one in self.unused if one[0] is share and one[1].due > self.now]:
            self.unused.remove(one)
            self.turns.remove((one[1].due, one[2]))
        name = f"host:{id(self)}-{self.now}"
        self.shares[which] = RateShare(share._database, owner=lambda: name)

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds):
        self.now += seconds

    @invariant()
    def never_more_than_the_bucket_and_what_comes_in(self):
        turns = sorted(self.turns)
        for first in range(len(turns)):
            count = tokens = 0
            for when, amount in turns[first:]:
                passed = when - turns[first][0]
                count, tokens = count + 1, tokens + amount
                assert count <= SIZE + RATE * passed + 1e-6
                assert tokens <= TOKEN_SIZE + TOKEN_RATE * passed + 1e-3


TestProcesses = Processes.TestCase
TestProcesses.settings = settings(
    max_examples=settings.default.max_examples // 2, deadline=None, stateful_step_count=30
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 3000), st.floats(0, 1)), min_size=1, max_size=40
    )
)
def test_whoever_is_first_has_the_first_turn(steps):
    """By requests: what comes later is never so much earlier that the large ones wait for ever."""
    shares, now, last = crowd(3), 1.0, 0.0
    for which, tokens, passed in steps:
        now += passed
        (when,) = due(shares[which], now, tokens)
        # A small one needs less spare room in the bucket of tokens than the one before it.
        assert when >= last - (TOKEN_SIZE * 0.25 + 0.02 * TOKEN_RATE) / TOKEN_RATE
        last = max(last, when)
    total = sum(tokens for _, tokens, _ in steps)
    assert (
        last
        <= 1.0
        + sum(passed for *_, passed in steps)
        + len(steps) / RATE
        + (total + 2 * TOKEN_SIZE) / TOKEN_RATE
    )


@pytest.mark.parametrize("amount", [TOKEN_SIZE, 2 * TOKEN_SIZE, 10 * TOKEN_SIZE])
def test_what_is_larger_than_the_bucket_leaves_when_it_is_full(amount):
    first, second, _ = crowd(3)
    assert due(first, 1.0, 2000)[0] <= 2.0
    (large,) = due(second, 1.0, int(amount))
    assert large == pytest.approx(3.0, abs=1.1)
    assert due(first, 1.0, 1)[0] >= large


def test_the_last_turn_that_is_returned_is_free_again():
    first, second, _ = crowd(3)
    due(first, 1.0, *[1] * 20)
    (slot,), _ = first.reserve(KEY, 1.0, [Wanted(1)], News())
    first.returned(KEY, 1.0, slot, Amounts(1, 1, 1))
    assert due(second, 1.0, 1) == [pytest.approx(slot.due)]


def test_a_turn_that_others_are_behind_is_not_given_twice():
    first, second, _ = crowd(3)
    due(first, 1.0, *[1] * 20)
    (slot,), _ = first.reserve(KEY, 1.0, [Wanted(1)], News())
    (behind,) = due(second, 1.0, 1)
    first.returned(KEY, 1.0, slot, Amounts(1, 1, 1))
    assert due(second, 1.0, 1)[0] > behind


def test_two_begin_with_what_the_first_has_left():
    shares = folder(2)
    shares[0].look(KEY, 0.0, known(left=3.0))
    times = due(shares[1], 0.05, *[1] * 6)
    # One is spare: two leave now.
    assert [when <= 0.06 for when in times] == [True] + [False] * 5
    assert times[-1] == pytest.approx(0.05 + (6 + 1.2 - 3.0) / RATE)


def test_what_left_without_a_turn_is_counted():
    shares = crowd(2)
    before = due(shares[1], 1.0, *[1] * 10)[-1]
    shares[0].look(KEY, 1.0, News(sent=Amounts(5, 50)))
    assert due(shares[1], 1.0, 1)[0] == pytest.approx(before + 0.6)


def test_a_closing_holds_for_all_and_not_for_hours():
    shares = crowd(2)
    shares[0].look(KEY, 1.0, News(closed_until=8.0))
    assert due(shares[1], 2.0, 1) == [8.0]
    shares[0].look(KEY, 3.0, News(closed_until=1e9))
    assert due(shares[1], 3.0, 1)[0] <= 3.0 + 330


def test_after_a_minute_one_leaves_whatever_was_learned():
    shares = folder(2)
    slow = Facts(1, 1e-6, 1.0, -5.0)
    shares[0].look(KEY, 0.0, News(facts={REQUESTS: slow}))
    shares[1].look(KEY, 1.0, News())
    times = [due(shares[number % 2], 1.0, 1)[0] for number in range(4)]
    assert times[0] <= 61
    assert all(later - sooner <= 60 for sooner, later in itertools.pairwise(times))


@pytest.mark.parametrize("kind", [REQUESTS, TOKENS])
def test_a_rate_that_was_set_counts_what_all_send_and_delays_only_who_set_it(kind):
    shares, rate = folder(3), kind_set(kind, 60)
    for share in shares:
        share.look(KEY, 0.0, News(facts={REQUESTS: Facts(60_000, 1000.0, 1000.0, 1000.0)}))
    tokens = 10 if kind == TOKENS else 1
    times = [due(shares[number % 2], 1.0, tokens, rates=[rate])[0] for number in range(5)]
    assert times == [pytest.approx(1.0 + number * tokens) for number in range(5)]
    assert due(shares[2], 1.0, tokens) == [1.0]
    assert due(shares[0], 1.0, tokens, rates=[rate]) == [pytest.approx(1.0 + 6 * tokens)]


def test_more_tokens_than_were_reserved_delay_a_rate_that_was_set():
    shares, rate = crowd(2), [kind_set(TOKENS, 600)]
    assert due(shares[0], 1.0, 10, rates=rate) == [1.0]
    shares[0].look(KEY, 1.0, News(more_tokens=20))
    assert due(shares[1], 1.0, 10, rates=rate) == [pytest.approx(4.0)]


def test_headers_correct_what_is_believed_in_either_direction():
    shares = crowd(2)
    (slot,), _ = shares[0].reserve(KEY, 1.0, [Wanted(1)], News())

    def after(remaining: float) -> float:
        """When one of the other process may leave, if a server says so twenty times."""
        seen = Remaining(1.0, slot.requests, 1, remaining)
        for _ in range(20):
            shares[0].look(KEY, 1.0, News(seen={REQUESTS: seen}))
        (slot_,), _ = shares[1].reserve(KEY, 1.0, [Wanted(1)], News())
        shares[1].returned(KEY, 1.0, slot_, Amounts(1, 1, 1))
        return slot_.due

    assert after(9) == 1.0
    assert after(0) == pytest.approx(1.0 + 2.2 / RATE, abs=0.05)
    assert after(9) == pytest.approx(1.0, abs=0.05)


def test_who_is_silent_or_was_seen_to_end_takes_no_part(monkeypatch):
    shares = crowd(3)
    assert shares[0].look(KEY, 1.4, News()).others == 2
    monkeypatch.setattr(rates, "has_ended", lambda owner: owner == "host:2")
    assert shares[0].look(KEY, 1.8, News()).others == 1
    assert shares[0].look(KEY, 4.5, News()).others == 0
    shares[1].look(KEY, 4.6, News())
    assert shares[0].look(KEY, 4.7, News()).others == 1
    shares[1].close()
    assert shares[0].look(KEY, 4.8, News()).others == 0


# While no limit is known


def test_a_salvo_is_shared_by_all_until_one_is_answered():
    shares = folder(3)
    for share in shares:
        share.look(KEY, 0.0, News())
    left = [len(due(share, 0.0, *[10] * 6)) for share in shares]
    assert left == [6, 2, 0]
    for _ in range(6):
        standing = shares[0].answered(KEY, 0.1, 10)
    assert not standing.is_free
    assert 6 <= len(due(shares[2], 0.1, *[10] * 40)) <= 13
    assert standing.is_unknown


def test_who_takes_much_without_a_word_of_limits_is_free():
    shares, now = folder(2), 0.0
    for share in shares:
        share.look(KEY, now, News())
    for _ in range(12):
        now += 0.1
        taken = len(due(shares[0], now, *[10] * 500))
        for _ in range(taken):
            standing = shares[0].answered(KEY, now, 10)
    assert standing.is_free
    assert len(due(shares[1], now, *[10] * 500)) == 500


def test_a_limit_of_which_nothing_is_said_any_more_is_forgotten():
    shares = crowd(2)
    assert not shares[0].look(KEY, 1.0, News()).is_unknown
    for kind in (REQUESTS, TOKENS):
        shares[0].forget(KEY, 61.0, kind)
    assert shares[1].look(KEY, 61.0, News()).is_unknown


@given(st.floats(1, 100), st.integers(1, 30), st.lists(st.floats(0, 90), max_size=20))
def test_a_window_fills_all_at_once(window, size, passing):
    bucket = RateBucket(
        kind=REQUESTS, rate=size / window, size=size, level=size, at=0.0, named=60, window=window,
        ends=window,
    )  # fmt: skip
    now, turns = 0.0, []
    for passed in passing * 5:
        now += passed / 20
        turns.append(bucket.due(now, 1))
        bucket.take(1)
    for which in range(len(turns)):
        number = math.floor(turns[which] / window)
        inside = [one for one in turns if math.floor(one / window) == number]
        assert len(inside) <= size


def test_times_of_another_start_of_the_machine_close_nothing_for_long():
    bucket = trial(REQUESTS, 1e7)
    bucket.named, bucket.level, bucket.rate = 600, 0.0, 10.0
    assert bucket.due(5.0, 1) <= 6.0
    bucket.window, bucket.ends = 60.0, 1e7
    bucket.level = -1.0
    bucket.advance(20.0)
    assert bucket.due(20.0, 1) <= 20.0 + 61


# The file


def test_two_processes_at_once_each_see_what_the_other_took(tmp_path):
    names = iter(("host:1", "host:2"))
    shares = [RateShare(rates.file_in(tmp_path), owner=lambda name=name: name) for name in names]
    shares[0].look(KEY, 0.0, known())
    shares[1].look(KEY, 1.0, News())
    found: list[float] = []

    def go(share):
        for _ in range(20):
            found.extend(due(share, 1.0, 1))

    threads = [threading.Thread(target=go, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for share in shares:
        share.close()
    # 1.2 of the bucket are spare.
    expected = [1.0 + max(0.0, number + 1.2 - SIZE) / RATE for number in range(1, 41)]
    assert sorted(found) == pytest.approx(expected, abs=1e-6)


def test_what_was_not_used_for_a_day_is_deleted(tmp_path):
    old = RateShare(rates.file_in(tmp_path), owner=lambda: "host:1")
    old.look(KEY, 0.0, known())
    old.close()
    new = RateShare(rates.file_in(tmp_path), owner=lambda: "host:2")
    assert not new.look(KEY, 80_000.0, News()).is_unknown
    new.close()
    new = RateShare(rates.file_in(tmp_path), owner=lambda: "host:2")
    new.look(Key("https://other", "", ""), 100_000.0, News())
    assert new.look(KEY, 100_000.0, News()).is_unknown
    new.close()


def test_a_damaged_file_is_an_error_until_it_is_mended(tmp_path):
    share = share_for(tmp_path)
    share.look(KEY, 0.0, known())
    share.close()
    (tmp_path / "rates.db").write_bytes(os.urandom(8192))
    with pytest.raises(StorageError):
        share.look(KEY, 0.0, News())
    share.mend()
    assert share.look(KEY, 0.0, News()).is_unknown
    share.close()


@pytest.mark.parametrize("what", ["rate = 0", "size = -1", '"window" = 0'])
def test_a_rate_of_nothing_is_damage(tmp_path, what):
    share = share_for(tmp_path)
    share.look(KEY, 0.0, known())
    with share._database.transaction() as connection:
        connection.execute(f"UPDATE bucket SET {what}")
    with pytest.raises(StorageCorrupt):
        share.look(KEY, 1.0, News())
    share.mend()
    assert share.look(KEY, 1.0, News()).is_unknown
    share.close()


def test_nothing_waits_for_the_disk(tmp_path):
    share = share_for(tmp_path)
    share.look(KEY, 0.0, News())
    with share._database.read() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 0
    share.close()
