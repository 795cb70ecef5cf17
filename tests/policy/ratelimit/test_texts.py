"""A service that limits texts: no more leave than it takes, in one process and in several."""

from __future__ import annotations

from typing import Any

import pytest

from embedcore.policy.ratelimit.pace import Configured, Rates
from embedcore.storage.rate_buckets import Amounts

ENDLESS = {"tpm": 1e12, "burst": 1e12, "rpm": 1e9, "rburst": 1e9}
RATE = 2_000
TEXTS = 4_000


def world_of(
    simulation: Any,
    texts: int,
    *,
    processes: int = 1,
    window: float | None = None,
    sizes: int = 50,
    **how: Any,
) -> Any:
    """``TEXTS`` texts to a service like Cohere, whose headers do not say what is left."""
    meter = simulation.Meter(per_minute=RATE, size=RATE, window=window)
    service = simulation.bucket(**ENDLESS, texts=meter, headers=False, retry_after="none")
    world = simulation.World(service)
    how = {"threads": 4, **how}
    for _ in range(processes):
        world.process([texts * sizes] * (TEXTS // texts // processes), texts=texts, **how)
    return world.run()


def share_used(world: Any) -> float:
    """Of what the rate allows in the time that it took."""
    used: float = world.server.taken_texts / (RATE / 60 * world.server.taken_at[-1][0])
    return used


@pytest.mark.parametrize("texts", [10, 96])
def test_one_process_uses_all_of_a_limit_in_texts(simulation: Any, texts: int) -> None:
    world = world_of(simulation, texts, rates=Rates(texts_per_minute=RATE))
    assert share_used(world) >= 0.98
    assert world.server.refusals == 0


def test_a_window_that_holds_no_more_whole_requests_is_used(simulation: Any) -> None:
    """Twenty of 96 texts: 0.96 of the rate is all that can be had."""
    world = world_of(simulation, 96, window=60.0, rates=Rates(texts_per_minute=RATE))
    assert share_used(world) >= 0.93
    assert simulation.outcome(world).refused <= 0.06


def test_several_processes_share_a_limit_in_texts(simulation: Any) -> None:
    world = world_of(simulation, 10, processes=4, rates=Rates(texts_per_minute=RATE), shares=True)
    assert share_used(world) >= 0.9
    assert world.server.refusals <= 2


def test_a_limit_in_texts_counts_texts_and_not_tokens(simulation: Any) -> None:
    """Two of another kind and one of it: with a fifth of the tokens it is as slow."""
    small, large = (
        world_of(simulation, 96, sizes=sizes, rates=Rates(texts_per_minute=RATE))
        for sizes in (10, 500)
    )
    assert small.server.taken_at[-1][0] == pytest.approx(large.server.taken_at[-1][0], rel=0.01)


def test_the_next_request_waits_for_the_texts_of_those_before() -> None:
    configured, rates = Configured(), Rates(texts_per_minute=60)
    assert configured.delay(0.0, rates, Amounts(), {}) == 0
    configured.leave(0.0, Amounts(1, 5_000, 30))
    # A burst of one second is free.
    assert configured.delay(0.0, rates, Amounts(), {}) == pytest.approx(29)
    assert configured.delay(0.0, rates, Amounts(2, 10, 10), {}) == pytest.approx(39)
    assert rates.kinds == ("texts:60",)
