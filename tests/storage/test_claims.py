"""Is a text claimed by one process at a time, and free as soon as that one will not pay for it?"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from keeping import ORIGIN, TEXTS, buy, change, found, keys_of

from embedcore.errors import StorageBusy, StorageCorrupt, StorageFull
from embedcore.storage import claims as module
from embedcore.storage.claims import Claims, Taken
from embedcore.storage.database import driver
from embedcore.storage.vectors import VectorStore
from embedcore.testing import vectors_of

LEASE = 20.0
NOON = 1_768_478_400.0
KEYS = keys_of(TEXTS)


class Processes:
    """Claimants over one folder, as if each were a process of its own that can die."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.now, self.dead = NOON, set[str]()
        self.folder, self._speaks = folder, ""
        self.names: dict[VectorStore, str] = {}
        patch.setattr(module, "myself", lambda: self._speaks)
        patch.setattr(
            module, "is_free", lambda owner, until, now: until < now or owner in self.dead
        )

    def start(self) -> VectorStore:
        store = VectorStore(self.folder, cap=10**9, busy_timeout=5.0, now=lambda: self.now)
        assert store.claims.lease == LEASE
        self.names[store] = f"process {len(self.names)}"
        return store

    def of(self, store: VectorStore) -> Claims:
        self._speaks = self.names[store]
        return store.claims

    def kill(self, store: VectorStore) -> None:
        self.dead.add(self.names[store])

    def close(self) -> None:
        for store in self.names:
            store.close()

    def rows(self) -> tuple[int, int]:
        """How many claimants, and rows of claims, there are."""
        connection = driver().connect(self.folder / "index.db")
        with contextlib.closing(connection):
            counts = [
                connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in ("claimant", "claim")
            ]
        return counts[0], counts[1]


@pytest.fixture
def processes(vectors_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    made = Processes(vectors_path, monkeypatch)
    yield made
    made.close()


def taken(*elsewhere: bytes, there: tuple[bytes, ...] = ()) -> Taken:
    return Taken(frozenset(elsewhere), frozenset(there))


def test_what_one_process_has_no_other_gets(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    assert processes.of(one).take(KEYS[:3]) == taken()
    assert processes.of(other).take(KEYS[1:5]) == taken(*KEYS[1:3])
    assert processes.of(one).gone(KEYS[:6]) == {*KEYS[:3], KEYS[5]}
    assert processes.of(other).gone(KEYS[:6]) == set(KEYS[3:6])


def test_what_is_kept_is_there_and_leaves_no_claim(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:3])
    buy(one, TEXTS[:2])
    assert processes.of(other).gone(KEYS[:3]) == set(KEYS[:2])
    assert processes.of(other).take(KEYS[:4]) == taken(KEYS[2], there=(KEYS[0], KEYS[1]))
    buy(one, TEXTS[2:3])
    buy(other, TEXTS[3:4])
    assert processes.rows() == (2, 0)


def test_two_threads_that_keep_the_last_ones_at_once_leave_no_row(processes: Processes) -> None:
    one = processes.start()
    claims = processes.of(one)
    claims.take(KEYS[:2])
    with one.database.transaction() as connection:
        claims.kept(connection, KEYS[:1])
    with one.database.transaction() as connection:
        claims.kept(connection, KEYS[1:2])
    claims.forget(KEYS[:1])
    claims.forget(KEYS[1:2])
    claims.write_down()
    assert processes.rows() == (1, 0)


def test_threads_that_give_up_at_once_are_all_heard(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    keys = [number.to_bytes(8, "little") * 4 for number in range(400)]
    claims = processes.of(one)
    claims.take(keys)

    def give_up(some: list[bytes]) -> None:
        for key in some:
            claims.give_up([key])
            claims.write_down()

    threads = [threading.Thread(target=give_up, args=(keys[at:300:8],)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert processes.of(other).take(keys) == taken(*keys[300:])


def test_zeros_are_no_vectors_for_others(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:1])
    nothing = np.zeros((1, 8), dtype=np.float32)
    one.put(KEYS[:1], nothing, ORIGIN, zeros=True)
    assert processes.of(other).take(KEYS[:1]) == taken(*KEYS[:1])
    one.put(KEYS[:1], nothing, ORIGIN)
    assert processes.of(other).gone(KEYS[:1]) == set(), "it may yet be paid for"
    assert processes.of(one).give_up(KEYS[:1])
    processes.of(one).write_down()
    assert processes.of(other).take(KEYS[:1]) == taken()


def test_what_was_given_up_another_may_have_and_the_rest_not(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:4])
    assert processes.of(one).give_up([KEYS[1], KEYS[9]])
    assert not processes.of(one).give_up([KEYS[1], KEYS[9]]), "it has them no more"
    assert processes.of(other).take(KEYS[1:2]) == taken(KEYS[1]), "not written down yet"
    processes.of(one).write_down()
    assert processes.of(other).take(KEYS[:4]) == taken(KEYS[0], *KEYS[2:4])
    assert processes.of(one).take(KEYS[1:2]) == taken(KEYS[1])


def test_the_claims_of_the_dead_are_free_at_once(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:3])
    processes.of(other).take(KEYS[3:4])
    processes.kill(one)
    assert processes.of(other).gone(KEYS[:4]) == set(KEYS[:4])
    assert processes.of(other).take(KEYS[1:3]) == taken()
    assert processes.rows() == (1, 2), "nothing stays of the dead"


def test_a_lease_ends_unless_it_is_renewed(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:1])
    processes.now += 19
    processes.of(one).renew()
    processes.now += 19
    assert processes.of(other).take(KEYS[:1]) == taken(KEYS[0])
    processes.now += 2
    assert processes.of(other).gone(KEYS[:1]) == {KEYS[0]}
    assert processes.of(other).take(KEYS[:1]) == taken()
    # The first one was only stopped. What it has to do with its claim harms none.
    processes.of(one).renew()
    processes.of(one).give_up(KEYS[:1])
    processes.of(one).write_down()
    third = processes.start()
    assert processes.of(third).take(KEYS[:1]) == taken(KEYS[0])


def test_what_was_taken_over_does_not_come_back_with_the_rest(processes: Processes) -> None:
    one, other, third = (processes.start() for _ in range(3))
    processes.of(one).take(KEYS[:2])
    processes.now += 21
    processes.of(other).take(KEYS[:1])
    processes.of(one).give_up(KEYS[1:2])
    processes.of(one).write_down()
    processes.kill(other)
    assert processes.of(third).take(KEYS[:2]) == taken()


def test_the_lease_is_written_only_when_it_is_time_and_there_is_something(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = processes.start()
    claims, written = processes.of(one), []
    transaction = one.database.transaction

    def counted(**how: Any) -> Any:
        written.append(how)
        return transaction(**how)

    monkeypatch.setattr(one.database, "transaction", counted)
    claims.renew()
    assert not written, "nothing is claimed"
    claims.take(KEYS[:1])
    processes.now += 4.9
    claims.renew()
    assert len(written) == 1
    processes.now += 0.2
    claims.renew()
    claims.renew()
    assert len(written) == 2
    processes.now -= 3600
    claims.renew()
    assert len(written) == 3, "the clock was set back"
    assert {how["durable"] for how in written} == {False}


def test_a_clock_that_is_set_back_does_not_keep_claims_for_ever(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:1])
    processes.now -= 15
    assert processes.of(other).take(KEYS[:1]) == taken(KEYS[0])
    processes.now -= 3600
    assert processes.of(other).take(KEYS[:1]) == taken()


def test_vectors_that_came_from_others_are_asked_for_only_if_any_can_have_come(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = processes.start(), processes.start()
    asked = []
    there = module._there
    monkeypatch.setattr(module, "_there", lambda *how: asked.append(how) or there(*how))
    since = processes.of(one).changes()
    assert processes.of(one).take(KEYS[:1], since) == taken()
    assert not asked
    since = processes.of(one).changes()
    buy(one, TEXTS[:1])
    assert processes.of(one).take(KEYS[1:2], since) == taken()
    assert not asked, "the calls of one process know of each other"
    since = processes.of(one).changes()
    buy(other, TEXTS[2:3])
    assert processes.of(one).take(KEYS[2:4], since) == taken(there=(KEYS[2],))
    since = processes.of(one).changes()
    one.database.close()
    buy(other, TEXTS[4:5])
    assert processes.of(one).take(KEYS[4:5], since) == taken(there=(KEYS[4],))


def test_keys_that_begin_alike_wait_for_each_other_and_no_more(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    alike = [b"the same" + bytes([number]) * 24 for number in range(2)]
    processes.of(one).take(alike[:1])
    assert processes.of(other).take(alike[1:]) == taken(alike[1])
    one.put(alike[:1], vectors_of(["a"], 8), ORIGIN)
    assert processes.of(other).gone(alike[1:]) == {alike[1]}
    assert processes.of(other).take(alike[1:]) == taken()


@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_an_interrupt_leaves_no_claim_that_cannot_be_given_up(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    one, other = processes.start(), processes.start()
    transaction = one.database.transaction

    @contextlib.contextmanager
    def interrupted(**how: Any) -> Iterator[Any]:
        with transaction(**how) as connection:
            yield connection
            if moment == "before the commit":
                raise KeyboardInterrupt
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one.database, "transaction", interrupted)
        with pytest.raises(KeyboardInterrupt):
            processes.of(one).take(KEYS[:3])
    assert processes.of(one).give_up(KEYS[:3])
    processes.of(one).write_down()
    assert processes.of(other).take(KEYS[:3]) == taken()


def test_what_could_not_be_written_is_written_with_the_next(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:3])
    processes.of(one).give_up(KEYS[:1])

    def full(**_: Any) -> Any:
        raise StorageFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(one.database, "transaction", full)
        with pytest.raises(StorageFull):
            processes.of(one).write_down()
        with pytest.raises(StorageFull):
            processes.of(one).take(KEYS[5:7])
    assert not processes.of(one).give_up(KEYS[5:7]), "nothing was claimed"
    processes.of(one).take(KEYS[7:8])
    assert processes.of(other).take(KEYS[:8]) == taken(*KEYS[1:3], KEYS[7])


def test_a_file_that_stays_locked_is_no_claim(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    one.database.open()
    one.database.close()
    one.database._timeout = 0.01
    with other.database.transaction(), pytest.raises(StorageBusy):
        processes.of(one).take(KEYS[:2])
    assert processes.of(other).take(KEYS[:2]) == taken()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_a_fork_has_claimed_nothing_and_gives_up_nothing(vectors_path: Path) -> None:
    store = VectorStore(vectors_path, cap=10**9)
    store.claims.take(KEYS[:2])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert not store.claims.give_up(KEYS[:2])
            store.claims.write_down()
            store.claims.renew()
            assert store.claims.take(KEYS[:3]) == taken(*KEYS[:2])
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    other = VectorStore(vectors_path, cap=10**9)
    assert other.claims.take(KEYS[:3]) == taken(*KEYS[:2]), "and the child has ended"
    store.close()
    other.close()


def test_at_no_moment_are_both_claim_and_vector_missing(processes: Processes) -> None:
    """Another process looks before every statement of the one that keeps what it paid for."""
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:6])
    seen = []

    def look(_: str) -> None:
        gone = processes.of(other).gone(KEYS[:6])
        # What is raised here is raised nowhere.
        seen.append((len(gone), gone <= set(keys_of(sorted(found(other, TEXTS))))))

    with one.database.read() as connection:
        connection.set_trace_callback(look)
    for start in (0, 3):
        buy(one, TEXTS[start : start + 3])
    with one.database.read() as connection:
        connection.set_trace_callback(None)
    look("")
    assert {*seen} == {(0, True), (3, True), (6, True)}


@given(
    have=st.sets(st.integers(0, 20_000), max_size=9_000),
    want=st.sets(st.integers(0, 20_000), max_size=3_000),
    gives_up=st.sets(st.integers(0, 20_000), max_size=3_000),
)
@settings(
    max_examples=settings.default.max_examples // 5,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_any_number_of_keys_is_kept_apart(
    have: set[int], want: set[int], gives_up: set[int]
) -> None:
    def keys(numbers: set[int]) -> list[bytes]:
        return [
            (number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") + bytes(24)
            for number in numbers
        ]

    with tempfile.TemporaryDirectory() as folder:
        one, other = (VectorStore(Path(folder) / "v", cap=10**9) for _ in range(2))
        one.claims.take(keys(have))
        one.claims.give_up(keys(gives_up))
        one.claims.write_down()
        assert other.claims.gone(keys(want)) == set(keys(want - (have - gives_up)))
        assert other.claims.take(keys(want)) == taken(*keys(want & (have - gives_up)))
        for store in (one, other):
            store.close()


def test_damaged_rows_claim_nothing_or_are_told_of(processes: Processes) -> None:
    one, other = processes.start(), processes.start()
    processes.of(one).take(KEYS[:2])
    change(processes.folder / "index.db", "UPDATE claim SET keys = zeroblob(16)")
    assert processes.of(other).take(KEYS[:1]) == taken()
    one.close()
    change(processes.folder / "index.db", "UPDATE claim SET keys = x'0102030405060708aa'")
    with pytest.raises(StorageCorrupt):
        processes.of(processes.start()).take(KEYS[:2])


class ClaimMachine(RuleBasedStateMachine):
    """Three processes that claim, pay, give up, pause and die, beside a dictionary of who has
    what."""

    TEXTS = TEXTS[:6]
    some = st.lists(st.sampled_from(TEXTS[:6]), unique=True, min_size=1)
    who = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._patch = pytest.MonkeyPatch()
        # Of two keys, so that there are several.
        self._patch.setattr(module, "_KEYS_PER_ROW", 2)
        self.processes = Processes(Path(self._folder.name) / "vectors", self._patch)
        self.stores = [self.processes.start() for _ in range(3)]
        # What each believes to have, what others believe of it, and until when.
        self.open: list[set[str]] = [set(), set(), set()]
        self.seen: list[set[str]] = [set(), set(), set()]
        self.until: list[float] = [0.0, 0.0, 0.0]
        self.renewed: list[float] = [0.0, 0.0, 0.0]
        self.kept: set[str] = set()

    def teardown(self) -> None:
        self.processes.close()
        self._patch.undo()
        self._folder.cleanup()

    def claims(self, who: int) -> Claims:
        return self.processes.of(self.stores[who])

    def stands(self, who: int) -> bool:
        return self.processes.now <= self.until[who] <= self.processes.now + 2 * LEASE

    def elsewhere(self, who: int) -> set[str]:
        others = [self.seen[one] for one in range(3) if one != who and self.stands(one)]
        return set().union(*others) - self.kept

    def writes(self, who: int) -> None:
        self.until[who] = self.processes.now + LEASE
        self.renewed[who] = self.processes.now

    @rule(who=who, texts=some)
    def take(self, who: int, texts: list[str]) -> None:
        texts = [text for text in texts if text not in self.open[who]]
        there = self.kept.intersection(texts)
        elsewhere = self.elsewhere(who).intersection(texts)
        assert self.claims(who).take(keys_of(texts)) == taken(
            *keys_of(sorted(elsewhere)), there=tuple(keys_of(sorted(there)))
        )
        for one in range(3):
            if one != who and not self.stands(one):
                self.seen[one] = set()
        self.open[who].update(set(texts) - there - elsewhere)
        self.seen[who].update(set(texts) - there - elsewhere)
        self.writes(who)

    @rule(who=who, texts=some)
    def pay(self, who: int, texts: list[str]) -> None:
        self.claims(who)
        buy(self.stores[who], texts)
        self.kept.update(texts)
        self.open[who].difference_update(texts)

    @rule(who=who, texts=some)
    def give_up(self, who: int, texts: list[str]) -> None:
        mine = self.open[who].intersection(texts)
        assert self.claims(who).give_up(keys_of(texts)) == bool(mine)
        self.claims(who).write_down()
        if mine:
            self.open[who] -= mine
            self.seen[who] -= mine
            self.writes(who)

    @rule(who=who)
    def renew(self, who: int) -> None:
        self.claims(who).renew()
        beat = self.renewed[who] + LEASE / 4
        if self.open[who] and not self.renewed[who] <= self.processes.now < beat:
            self.writes(who)

    @rule(who=who)
    def die(self, who: int) -> None:
        self.processes.kill(self.stores[who])
        self.stores[who] = self.processes.start()
        self.open[who], self.seen[who] = set(), set()
        self.until[who] = self.renewed[who] = 0.0

    @rule(seconds=st.sampled_from([2, 6, 19, 21]))
    def time_passes(self, seconds: int) -> None:
        self.processes.now += seconds

    @precondition(lambda self: self.processes.now > NOON - 1000)
    @rule(seconds=st.sampled_from([6, 60]))
    def the_clock_is_set_back(self, seconds: int) -> None:
        self.processes.now -= seconds

    @invariant()
    def each_sees_what_others_have(self) -> None:
        for who in range(3):
            free = [text for text in self.TEXTS if text not in self.elsewhere(who)]
            assert self.claims(who).gone(keys_of(self.TEXTS)) == set(keys_of(free))

    @invariant()
    def only_one_that_stands_has_a_text(self) -> None:
        standing = [self.seen[who] - self.kept for who in range(3) if self.stands(who)]
        assert sum(map(len, standing)) == len(set().union(*standing))


TestClaims = ClaimMachine.TestCase
TestClaims.settings = settings(
    max_examples=settings.default.max_examples // 2,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
