"""After any number of kills at any moment: is everything there, and is it paid for once?"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

TEXTS = 120
Tokens = Callable[[str, int, int], int]

# What a server and the way to it do to calls; each befalls some of the calls it is for.
CREATE, FILES = "POST /v1/batches", "/v1/files"
AFTER = [
    {"mode": "reset", "path": CREATE, "effect": "after"},
    {"mode": "status", "status": 502, "path": CREATE, "effect": "after"},
    {"mode": "close_silent", "path": CREATE, "effect": "after"},
    {"mode": "hang", "seconds": 3, "path": CREATE, "effect": "after"},
]
BEFORE = [
    {"mode": "reset", "path": CREATE, "effect": "before"},
    {"mode": "status", "status": 503, "path": CREATE, "effect": "before"},
    {"mode": "rate_limited", "retry_after_ms": 20, "path": CREATE, "effect": "before"},
]
LATE = [
    {"mode": "reset", "path": CREATE, "effect": "late", "after_seconds": seconds}
    for seconds in (0.05, 0.2, 0.7, 1.0, 2.0, 3.0)
]
ELSEWHERE = [
    {"mode": "reset", "path": "POST /v1/files", "effect": "after"},
    {"mode": "status", "status": 500, "path": "POST /v1/files"},
    {"mode": "status", "status": 502, "path": "GET /v1/batches"},
    {"mode": "status", "status": 503, "path": "/v1/batches/{id}"},
    {"mode": "truncated", "path": "/v1/files/{id}/content"},
    {"mode": "reset", "path": "/v1/files/{id}/content"},
    {"mode": "reset", "path": "DELETE /v1/files/{id}", "effect": "after"},
]


def deaths(chance: random.Random) -> Iterator[dict[str, Any]]:
    """Where a worker dies: at a moment, a statement of SQLite, or a call of the provider."""
    while True:
        kind = chance.choice(["moment", "statement", "call"])
        if kind == "moment":
            yield {"moment": chance.uniform(0.0, 1.2)}
        elif kind == "statement":
            yield {"statement": chance.randint(1, chance.choice([60, 600]))}
        else:
            yield {"call": chance.randint(1, 30), "after": chance.random() < 0.5}


def some_texts(chance: random.Random) -> tuple[str, int, int, int]:
    first, end = sorted(chance.sample(range(TEXTS + 1), 2))
    if chance.random() < 0.5:
        first, end = 0, TEXTS
    return "text", first, end, chance.randint(0, 5)


def kill_often(scene: Any, chance: random.Random, kills: int) -> int:
    """Let workers begin, go on and die; returns how many did."""
    killed = 0
    for death in deaths(chance):
        deed = chance.choice(["embed", "submit", "leave", "resume", "look"])
        moment = death.pop("moment", None)
        worker = scene.start(deed, some_texts(chance), **death)
        if moment is not None:
            time.sleep(moment)
            worker.signal(signal.SIGKILL)
        found = worker.end()
        killed += found is None
        assert found is None or "error" not in found, found
        assert found is None or found.get("right", True), found
        if killed == kills:
            return killed
    raise AssertionError


def finish(scene: Any, tokens_of_texts: Tokens) -> None:
    """What anybody does after a crash: the same again."""
    found = scene.do("embed", ("text", 0, TEXTS, 3))
    assert found.get("right"), found
    scene.do("resume", ("", 0, 0, 0))
    # What is still on its way when all is over must find the gate closed.
    scene.until_landed()
    scene.check(TEXTS, tokens_of_texts("text", 0, TEXTS))


def seeds(each: int, series: int, campaign: int) -> list[Any]:
    return [
        pytest.param(seed, each, id=f"{seed}", marks=pytest.mark.campaign(short=seed < series))
        for seed in range(campaign)
    ]


@pytest.mark.fault(59)
@pytest.mark.fault(80)
@pytest.mark.parametrize(("seed", "kills"), seeds(10, 1, 20))
def test_kills_at_any_moment_cost_nothing(open_scene, tokens_of_texts, seed, kills):
    """An honest server: the bill is exactly that of the texts, however often somebody died."""
    chance = random.Random(seed)
    scene = open_scene("--batch-seconds", 0.2, "--latency", 0.005)
    kill_often(scene, chance, kills)
    finish(scene, tokens_of_texts)


@pytest.mark.fault(57)
@pytest.mark.fault(61)
@pytest.mark.fault(79)
@pytest.mark.parametrize(("seed", "kills"), seeds(10, 1, 20))
def test_kills_and_lost_answers_cost_nothing_that_the_fence_can_save(
    open_scene, tokens_of_texts, seed, kills
):
    """Answers are lost, come late, or creates land seconds after they were given up."""
    chance = random.Random(1000 + seed)
    scene = open_scene("--batch-seconds", 0.2, "--latency", 0.005)
    scene.more = {"options": {"timeout": 1.0}}
    rules = [
        {**fault, "probability": share}
        for faults, share in ((AFTER + BEFORE + LATE, 0.06), (ELSEWHERE, 0.08))
        for fault in faults
    ]
    chance.shuffle(rules)
    scene.server.faults(clear=True, when=rules)
    kill_often(scene, chance, kills)
    scene.server.faults(clear=True)
    finish(scene, tokens_of_texts)
