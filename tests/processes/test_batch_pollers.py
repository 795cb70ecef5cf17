"""Two machines' worth of processes look after the same batches at once: who collects, who pays?"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

LEASE = 0.6
TEXTS = 200


def start_pollers(scene, machines=("one", "two")):
    """Four processes, two on each machine; they want overlapping texts, or whatever is open."""
    wanted = [
        ("embed", ("text", 0, TEXTS, 2)),
        ("resume", ("", 0, 0, 0)),
        ("submit", ("text", 50, 150, 0)),
        ("embed", ("text", 100, TEXTS, 5)),
    ]
    return [
        scene.start(deed, texts, host=machines[number % 2], lease=LEASE, chunk=4)
        for number, (deed, texts) in enumerate(wanted)
    ]


@pytest.mark.fault(75)
@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=pytest.mark.campaign(short=n < 2)) for n in range(30)]
)
def test_pollers_that_stand_still_and_die_disturb_nobody(open_scene, tokens_of_texts, seed):
    """Some are stopped for longer than the lease, wherever they are, and one is killed."""
    chance = random.Random(seed)
    scene = open_scene("--batch-seconds", 0.3, "--latency", 0.01)
    scene.server.faults(
        when=[
            {"mode": "late", "seconds": 0.3, "path": path, "probability": 0.4}
            for path in (
                "POST /v1/files",
                "/v1/files/{id}/content",
                "POST /v1/batches",
                "/v1/batches/{id}",
            )
        ]
    )
    workers = start_pollers(scene)
    killed = chance.randrange(4)
    for number in (killed, *chance.choices(range(4), k=3)):
        time.sleep(chance.uniform(0, 0.5))
        if number == killed:
            workers[number].signal(signal.SIGKILL)
            killed = -1
            continue
        if workers[number].code is None:
            workers[number].signal(signal.SIGSTOP)
            time.sleep(LEASE * 1.5)
            workers[number].signal(signal.SIGCONT)
    for worker in workers:
        found = worker.end()
        assert found is None or (found.get("right", True) and "error" not in found), found
    assert scene.do("embed", ("text", 0, TEXTS, 0), lease=LEASE)["right"]
    # The texts of whoever was killed before anything of his was written down are billed here.
    scene.do("resume", ("", 0, 0, 0), lease=LEASE)
    scene.check(TEXTS, tokens_of_texts("text", 0, TEXTS))
