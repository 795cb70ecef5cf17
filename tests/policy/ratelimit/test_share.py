"""Do processes that share a state folder keep to one rate limit together?"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from embedcore import EmbeddingClient
from embedcore.errors import StorageBusy, StorageCorrupt, StorageFull, StorageReadOnly
from embedcore.policy.ratelimit.pace import Rates
from embedcore.policy.ratelimit.queue import Gate, RateLimiter
from embedcore.provider.types import RateLimits
from embedcore.storage.database import Database
from embedcore.storage.rates import Key, News, RateShare, Standing, Wanted, file_in, share_for
from embedcore.storage.schema import RATES
from embedcore.testing import FakeClock, FakeOpenAI

STRICT = {"rpm": 600, "rburst": 10, "tpm": 6e6, "burst": 5e5, "refused_count": True}
# Eight processes of eight threads, a dozen requests each: as benchmarks/compare has it.
REQUESTS = [1_400] * 14


def ran(simulation, seed, *, processes=8, sizes=REQUESTS, starts=0.0, limit=STRICT, **how):
    """``starts``: one process after the other, so many seconds apart."""
    server = simulation.bucket(**limit)
    world = simulation.World(server, seed=seed, latency=(0.1, 0.12), way=(0.001, 0.015))
    for number in range(processes):
        world.process(sizes, threads=8, shares=True, starts=number * starts, **how)
    world.run()
    assert server.served == len(sizes) * processes
    return world, simulation.outcome(world)


@pytest.mark.case("G5")
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", [1, 2])
def test_processes_that_share_are_hardly_ever_refused(simulation, seed, processes):
    sizes = [1_400] * (112 // processes)
    _, outcome = ran(simulation, seed, processes=processes, sizes=sizes)
    assert outcome.refused <= 0.01
    assert outcome.goodput >= 0.95


@pytest.mark.parametrize("seed", [1, 2])
def test_who_comes_later_does_not_begin_by_being_refused(simulation, seed):
    _, outcome = ran(simulation, seed, starts=0.7, sizes=[1_400] * 40)
    assert outcome.refused <= 0.01
    assert outcome.goodput >= 0.95


@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_are_shared_as_well(simulation, seed):
    limit = {**STRICT, "rpm": 3000, "rburst": 250}
    luck = random.Random(seed)
    sizes = [luck.randint(5_000, 60_000) for _ in range(40)]
    _, outcome = ran(simulation, seed, sizes=sizes, processes=4, limit=limit)
    assert outcome.refused <= 0.02
    assert outcome.goodput >= 0.95


@pytest.mark.parametrize("seed", [1, 2])
def test_what_a_killed_process_had_reserved_is_lost_for_a_moment_only(simulation, seed):
    server = simulation.bucket(**STRICT)
    world = simulation.World(server, seed=seed, latency=(0.1, 0.12))
    for number in range(8):
        limiter = world.process([1_400] * 40, threads=8, shares=True)
        if number % 2:
            world.kill(limiter, 5.0 + number / 10)
    world.run()
    assert server.refusals <= 0.01 * server.served
    assert simulation.outcome(world).goodput >= 0.95


@pytest.mark.parametrize("seed", [1, 2])
def test_a_large_request_is_not_overtaken_for_ever(simulation, seed):
    server = simulation.bucket(rburst=100)
    world = simulation.World(server, seed=seed)
    # Without their turn it would be last, after 55 seconds.
    for _ in range(3):
        world.process([20_000] * 100, shares=True)
    world.process([20_000] * 10 + [450_000] + [20_000] * 10, shares=True)
    world.run()
    (when,) = [time for time, amount in server.taken_at if amount == 450_000]
    assert when <= 15


@pytest.mark.parametrize("processes", [1, 4])
def test_a_rate_that_was_set_holds_for_all_together(simulation, processes):
    server = simulation.bucket(tpm=1e12, burst=1e12, rpm=1e9, rburst=1e9, headers=False)
    world = simulation.World(server, latency=(0.01, 0.01), way=(0.001, 0.001))
    for number in range(processes):
        world.process(
            [10_000] * (300 // processes),
            rates=simulation.Rates(requests_per_minute=600),
            shares=True,
            starts=number * 0.3,
        )
    world.run()
    # Ten a second, and what may leave at once in the first.
    assert 28.8 <= server.taken_at[-1][0] <= 31


def test_a_refusal_closes_for_all(simulation):
    """The server is out of order for five seconds, and says so to who asks."""
    server = simulation.bucket(**STRICT)
    as_before, refused = server.ask, []

    def ask(now, tokens, texts):
        if 2.0 < now < 7.0:
            refused.append(now)
            return simulation.Said(refused=True, seconds=5.0)
        return as_before(now, tokens, texts)

    server.ask = ask
    world = simulation.World(server, seed=1, latency=(0.1, 0.12))
    for _ in range(8):
        world.process([1_400] * 14, threads=8, shares=True)
    world.run()
    # One by one they come by, until the first is back and has told.
    assert len(refused) <= 4
    assert server.served == 8 * 14


def test_without_a_limit_all_are_soon_at_full_speed(simulation):
    server = simulation.bucket(tpm=1e12, burst=1e12, rpm=1e9, rburst=1e9, headers=False)
    world = simulation.World(server, seed=1, latency=(0.1, 0.1), way=(0.001, 0.001))
    for _ in range(4):
        world.process([10_000] * 800, shares=True)
    world.run()
    # 16 threads each, a tenth of a second for a request.
    assert world.now <= 50 * 0.101 + 1.5


def test_a_limit_that_is_named_no_longer_is_forgotten(simulation):
    server = simulation.bucket(**STRICT)
    as_before = server.ask

    def ask(now, tokens, texts):
        return as_before(now, tokens, texts) if now < 5 else simulation.Said()

    server.ask = ask
    world = simulation.World(server, seed=1, latency=(0.1, 0.1), way=(0.001, 0.001))
    for _ in range(4):
        world.process([1_400] * 500, shares=True)
    world.run()
    # With the limit: 200 seconds.
    assert world.now <= 90


# Threads, and the file


class Broken:
    """A state folder that cannot be written, or is damaged."""

    def __init__(self, error: Exception) -> None:
        self.error, self.asked, self.mended = error, 0, 0

    def look(self, *_: object) -> Standing:
        self.asked += 1
        raise self.error

    reserve = returned = answered = forget = look

    def mend(self) -> None:
        self.mended += 1


def nothing() -> None:
    """There is no lease to keep alive."""


@pytest.mark.parametrize(
    "error", [StorageReadOnly("no"), StorageBusy("later"), StorageFull("full"), OSError(28, "full")]
)
def test_a_file_that_cannot_be_used_is_no_error_of_a_call(error):
    clock, broken = FakeClock(), Broken(error)
    gate = Gate(monotonic=clock.monotonic)
    rates = Rates(requests_per_minute=6_000)
    for _ in range(50):
        one = gate.admit(10, clock.sleep, meanwhile=nothing, rates=rates, share=broken)
        gate.answered(one, RateLimits(limit_requests=600, remaining_requests=9), tokens=10)
    refused = gate.admit(10, clock.sleep, meanwhile=nothing, rates=rates, share=broken)
    gate.refused(refused, 1.0, None)
    assert gate.closed_for > 0
    # It is tried again now and then, not for each request.
    assert broken.asked <= 3
    clock.advance(100)
    gate.admit(10, clock.sleep, meanwhile=nothing, rates=rates, share=broken)
    assert broken.asked >= 2


def test_a_damaged_file_is_deleted_unless_another_process_has_just_done_so():
    clock, broken = FakeClock(), Broken(StorageCorrupt("damaged"))
    gate = Gate(monotonic=clock.monotonic)
    for mended in (0, 1, 1, 2):
        gate.lost(gate.admit(10, clock.sleep, meanwhile=nothing, share=broken))
        assert broken.mended == mended
        clock.advance(100)


def test_a_stopped_call_returns_its_turn():
    class Stopped(Exception):
        pass

    def pause(seconds):
        raise Stopped

    clock, database = FakeClock(), Database(None, RATES)
    mine, other = (RateShare(database, owner=lambda name=name: name) for name in ("a:1", "a:2"))
    gate = Gate(monotonic=clock.monotonic)
    key = Key("", "", "")
    limits = RateLimits(limit_requests=60, remaining_requests=59, reset_requests=1.0)
    first = gate.admit(10, clock.sleep, meanwhile=nothing, share=mine)
    gate.answered(first, limits, tokens=10)
    clock.advance(1)
    other.look(key, clock.monotonic(), News())
    clock.advance(1)
    taken, _ = other.reserve(key, clock.monotonic(), [Wanted(10)] * 80, News())
    clock.advance(1)
    other.look(key, clock.monotonic(), News())
    with pytest.raises(Stopped):
        gate.admit(10, pause, meanwhile=nothing, share=mine)
    assert gate.state().waiting == 0
    ((next_one,), _) = other.reserve(key, clock.monotonic(), [Wanted(10)], News())
    assert next_one.due == pytest.approx(taken[-1].due + 1, abs=0.01)


def test_one_that_comes_later_starts_from_what_the_first_has_learned():
    clock, database = FakeClock(), Database(None, RATES)
    gates = [Gate(monotonic=clock.monotonic) for _ in range(2)]
    shares = [RateShare(database, owner=lambda name=name: name) for name in ("a:1", "a:2")]
    one = gates[0].admit(10, clock.sleep, meanwhile=nothing, share=shares[0])
    limits = RateLimits(limit_requests=600, remaining_requests=0, reset_requests=1.0)
    gates[0].answered(one, limits, tokens=10)
    clock.advance(0.05)
    began = clock.monotonic()
    gates[1].admit(10, clock.sleep, meanwhile=nothing, share=shares[1])
    assert gates[1].state().requests_limit == 600
    assert clock.monotonic() - began >= 0.1


def test_what_one_was_told_to_wait_holds_for_one_that_comes_later():
    clock, database = FakeClock(), Database(None, RATES)
    gates = [Gate(monotonic=clock.monotonic, jitter=lambda low, _: low) for _ in range(2)]
    shares = [RateShare(database, owner=lambda name=name: name) for name in ("a:1", "a:2")]
    one = gates[0].admit(10, clock.sleep, meanwhile=nothing, share=shares[0])
    gates[0].refused(one, 20.0, None)
    began = clock.monotonic()
    gates[1].admit(10, clock.sleep, meanwhile=nothing, share=shares[1])
    assert clock.monotonic() - began >= 20


# The whole client


def client_of(server: FakeOpenAI, home: Path, **config: object) -> EmbeddingClient:
    options = {"openai": {"base_url": server.base_url, "api_key": server.api_key}}
    return EmbeddingClient(
        "openai:text-embedding-3-small", config={"home": home, "options": options, **config}
    )


def test_a_client_takes_part_in_the_rate_of_its_state_folder(tmp_path):
    with FakeOpenAI() as server, client_of(server, tmp_path) as client:
        client.embed(["a"])
        share = share_for(tmp_path)
        key = Key(client._running.engine.info.endpoint, "", "text-embedding-3-small")
        other = RateShare(file_in(tmp_path), owner=lambda: "host:1")
        standing = other.look(key, time.monotonic(), News())
        assert standing.others == 1
        assert standing.buckets["requests"].named == 5000
        other.close()
        assert share is share_for(tmp_path)
    other = RateShare(file_in(tmp_path), owner=lambda: "host:1")
    assert other.look(key, time.monotonic(), News()).others == 0
    other.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_registers_itself(tmp_path):
    share, key = share_for(tmp_path), Key("https://forked", "", "")
    share.look(key, 1.0, News())
    child = os.fork()
    if child == 0:
        os._exit(share_for(tmp_path).look(key, 1.1, News()).others)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert share.look(key, 1.2, News()).others == 1
    # It ended, as anybody can see.
    assert share.look(key, 2.0, News()).others == (0 if sys.platform == "linux" else 1)
    share.close()


def test_in_another_state_folder_is_another_rate(tmp_path):
    with FakeOpenAI() as server:
        for name in ("a", "b"):
            with client_of(server, tmp_path / name) as client:
                client.embed([name])
        assert share_for(tmp_path / "a") is not share_for(tmp_path / "b")


@pytest.mark.parametrize("what", [b"not a database" * 100, None])
def test_a_client_works_whatever_lies_where_its_file_should_be(tmp_path, what):
    path = tmp_path / "rates.db"
    if what is None:
        path.mkdir()
    else:
        path.write_bytes(what)
    with FakeOpenAI() as server, client_of(server, tmp_path, cache=False) as client:
        for number in range(3):
            assert client.embed([f"text {number}"]).ok.all()


def test_a_turn_that_was_slept_through_is_not_taken_later():
    """The process was stopped; those that came meanwhile have the time in which it wakes up."""
    database, key = Database(None, RATES), Key("", "", "")
    mine, other = (RateShare(database, owner=lambda name=name: name) for name in ("a:1", "a:2"))
    limiter = RateLimiter(jitter=lambda low, _: low)
    part = limiter.part_in(mine, key)
    first = limiter.arrive(10, Rates(), part)
    assert limiter.delay(1.0, first) == 0
    limits = RateLimits(limit_requests=60, remaining_requests=0, reset_requests=1.0)
    limiter.answered(1.0, first, limits, tokens=10)
    other.look(key, 1.3, News())
    second = limiter.arrive(10, Rates(), part)
    assert 0 < limiter.delay(1.5, second) < 4
    other.reserve(key, 9.9, [Wanted(10)] * 12, News())
    assert limiter.delay(10.0, second) > 1
