"""Is nearly all that a server allows used, with few refusals, whatever shape its limit has?"""

from __future__ import annotations

import random
from itertools import repeat

import pytest

FIFTY = [50_000] * 58
TWO = [2_000] * 4_000
LONG = [50_000] * 240


def mixed(seed: int) -> list[int]:
    luck = random.Random(seed)
    return [int(10 ** luck.uniform(3, 5.47)) for _ in range(60)]


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.campaign(short=True))])
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def ran(simulation, server, sizes, seed, *, processes=1, latency=(0.1, 0.5), **how):
    world = simulation.World(server, seed=seed, latency=latency)
    for _ in range(processes):
        world.process(sizes, **how)
    world.run()
    assert server.served == len(sizes) * processes
    for limiter in world.limiters:
        state = limiter.state(world.now)
        assert (state.in_flight, state.tokens_in_flight, state.waiting) == (0, 0, 0)
    return simulation.outcome(world)


@pytest.mark.parametrize("latency", [(0.1, 0.1), (0.1, 0.5), (0.5, 0.5)])
@pytest.mark.parametrize(("sizes", "burst"), [(FIFTY, 3000), (TWO, 100)], ids=["50k", "2k"])
def test_a_bucket_smaller_than_the_limit_per_minute(simulation, seed, sizes, burst, latency):
    # 16 threads at 0.5 s send at most 32 requests/s, less than 50: time is then the latency's.
    if len(sizes) > 1000 and latency[0] == 0.5:
        latency = (0.2, 0.3)
    outcome = ran(simulation, simulation.bucket(rburst=burst), sizes, seed, latency=latency)
    assert outcome.goodput >= 0.98
    assert outcome.refused <= 0.02


def test_a_bucket_of_a_minute_of_requests(simulation, seed):
    outcome = ran(simulation, simulation.bucket(), TWO * 2, seed, latency=(0.05, 0.1))
    assert outcome.goodput >= 0.98
    assert outcome.refused <= 0.02


@pytest.mark.parametrize("retry_after", ["exact", "seconds", "none"])
@pytest.mark.parametrize("digits", [3, 0, None])
def test_however_coarsely_the_server_speaks(simulation, seed, retry_after, digits):
    server = simulation.bucket(retry_after=retry_after, reset_digits=digits)
    outcome = ran(simulation, server, FIFTY, seed)
    assert outcome.goodput >= 0.97
    assert outcome.refused <= 0.06


def test_the_size_of_the_bucket_named_as_the_limit(simulation, seed):
    server = simulation.bucket(named_limit=(3000, 500_000))
    outcome = ran(simulation, server, FIFTY, seed)
    assert outcome.goodput >= 0.98
    assert outcome.refused <= 0.02


@pytest.mark.parametrize("times", [(0.7, 0.7), (1.3, 1.3), (0.7, 1.3)], ids=str)
def test_guesses_that_are_wrong_by_a_third(simulation, seed, times):
    luck = random.Random(seed)

    def guess(tokens: int) -> int:
        return int(tokens * luck.uniform(*times))

    outcome = ran(simulation, simulation.bucket(), FIFTY, seed, guess=guess)
    assert outcome.goodput >= 0.97
    assert outcome.refused <= 0.10


def test_requests_of_all_sizes(simulation, seed):
    outcome = ran(simulation, simulation.bucket(), mixed(seed), seed)
    assert outcome.goodput >= 0.97
    assert outcome.refused <= 0.10


def test_a_request_larger_than_the_bucket_is_not_overtaken_for_ever(simulation, seed):
    sizes = [20_000] * 40 + [700_000] + [20_000] * 200
    server = simulation.bucket()
    world = simulation.World(server, seed=seed)
    world.process(sizes)
    world.run()
    (when,) = [time for time, amount in server.taken_at if amount == 700_000]
    # 40 small ones take 0.8M; a full bucket is at most 5 s of refilling away from then on.
    assert when <= 15
    assert server.served == len(sizes)


@pytest.mark.parametrize(
    ("period", "tokens", "requests", "sizes", "goodput"),
    [
        (60, 6e6, 3000, [50_000] * 300, 0.97),
        (1, 1e5, 50, TWO, 0.96),
        (1, 1e5, 50, [50_000] * 100, 0.97),
        (1, 1e5, 50, [30_000] * 90, 0.86),  # three of them fit into a window: 0.90 at most
    ],
    ids=["minute", "second-2k", "second-50k", "second-30k"],
)
@pytest.mark.parametrize("headers", [True, False])
def test_windows(simulation, seed, period, tokens, requests, sizes, goodput, headers):
    server = simulation.windows(tokens, requests, period, headers=headers)
    outcome = ran(simulation, server, sizes, seed)
    # Without headers a window looks like a bucket: it is enough that it flows.
    assert outcome.goodput >= (goodput if headers or period == 60 else 0.7)
    assert outcome.refused <= (0.10 if headers else 0.35)


@pytest.mark.parametrize("retry_after", ["exact", "seconds", "none"])
def test_without_headers_the_rate_is_found_by_trial(simulation, seed, retry_after):
    server = simulation.bucket(headers=False, retry_after=retry_after)
    outcome = ran(simulation, server, LONG, seed)
    assert outcome.goodput >= 0.95
    assert outcome.refused <= 0.15


@pytest.mark.parametrize("headers", [True, False])
def test_a_limit_that_drops_and_rises_midway(simulation, seed, headers):
    server = simulation.bucket(headers=headers)
    as_before = server.ask

    def ask(now: float, tokens: int, texts: int) -> object:
        server.tokens.pass_to(now)
        server.tokens.per_minute = 3e6 if 20 < now < 50 else 6e6
        return as_before(now, tokens, texts)

    server.ask = ask
    outcome = ran(simulation, server, LONG, seed)
    # 30 s at half the rate cost 15 s.
    assert outcome.seconds <= (115 + 15) / 0.95
    assert outcome.refused <= 0.15


def test_full_speed_again_after_an_outage(simulation, seed):
    server = simulation.bucket(tpm=1e12, burst=1e12, rpm=1e9, rburst=1e9, headers=False)
    as_before = server.ask
    refused = simulation.Said(refused=True)
    server.ask = lambda now, *asked: refused if 2 < now < 20 else as_before(now, *asked)
    world = simulation.World(server, seed=seed, latency=(0.1, 0.1), way=(0.001, 0.001))
    world.process(repeat(20_000, 20_000))
    world.run()
    calm = [when for when, _ in server.taken_at if 81 < when < 91]
    # 16 threads, one request in a tenth of a second each.
    assert len(calm) >= 0.9 * 10 * 16 / 0.101


@pytest.mark.parametrize(
    ("sizes", "goodput"),
    [(FIFTY, 0.95), ([20_000] * 145, 0.97), ([2_000] * 600, 0.97)],
    ids=["50k", "20k", "2k"],
)
@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_four_processes_that_know_nothing_of_one_another(simulation, seed, sizes, goodput, wrong):
    luck = random.Random(seed)

    def guess(tokens: int) -> int:
        return int(tokens * luck.uniform(1 - wrong, 1 + wrong))

    outcome = ran(simulation, simulation.bucket(rburst=100), sizes, seed, processes=4, guess=guess)
    assert outcome.goodput >= goodput
    assert outcome.refused <= 0.18


@pytest.mark.parametrize("size", [20_000, 50_000])
def test_four_processes_share_one_short_job(simulation, seed, size):
    sizes = [size] * (725_000 // size)
    outcome = ran(simulation, simulation.bucket(), sizes, seed, processes=4)
    assert outcome.goodput >= 0.90


def test_who_stays_alone_takes_all(simulation, seed):
    server = simulation.bucket()
    world = simulation.World(server, seed=seed)
    for _ in range(3):
        world.process([20_000] * 100)
    world.process([20_000] * 400)
    world.run()
    assert simulation.outcome(world).goodput >= 0.96


def test_no_limit_means_no_delay(simulation, seed):
    server = simulation.bucket(tpm=1e12, burst=1e12, rpm=1e9, rburst=1e9, headers=False)
    world = simulation.World(server, seed=seed, latency=(0.1, 0.1), way=(0.001, 0.001))
    world.process([10_000] * 1600)
    world.run()
    # The first 16 leave at once, and every next one when one came back.
    assert [when < 0.01 for when, _ in server.taken_at].count(True) == 16
    assert world.now <= 100 * 0.101 + 0.02


def test_configured_rates_hold_on_a_server_that_has_none(simulation, seed):
    server = simulation.bucket(tpm=1e12, burst=1e12, rpm=1e9, rburst=1e9, headers=False)
    rates = simulation.Rates(requests_per_minute=600, tokens_per_minute=60_000_000)
    outcome = ran(simulation, server, [10_000] * 300, seed, rates=rates)
    # 300 requests at 10 a second, of which one second's worth may leave at once.
    assert 28.8 <= outcome.seconds <= 29.5
