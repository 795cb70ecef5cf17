"""What does a wait that is interrupted say, and what is lost by it?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

TEXTS = 60
PROGRAM = """
import json, sys
from embedcore import EmbeddingClient

settings = json.loads(sys.argv[1])
client = EmbeddingClient(
    "text-embedding-3-small",
    options={"batch": True, "dimensions": 8, **settings["options"]},
    config={"home": settings["home"], "batch": settings["batch"]},
)
texts = [f"text {number}" for number in range(60)]
print("ready", flush=True)
print(len(client.batch_embed_texts(texts, poll_interval=settings["poll"])))
"""


def start(forks, scene, poll):
    given = {"options": scene.server.options, "home": str(scene.home), "batch": scene.batch}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = forks(PROGRAM, json.dumps({**given, "poll": poll}), **streams)
    assert process.stdout.readline() == "ready\n"
    return process


def until_submitted(scene, count):
    """So many jobs are there, and written down."""
    ends = time.monotonic() + 120
    states = "SELECT count(*) FROM part WHERE state = 'submitted'"
    while len(scene.server.jobs) < count or scene.rows(states) != [(count,)]:
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.fault(142)
@pytest.mark.parametrize(
    ("number", "poll"), [(signal.SIGINT, 0.05), (signal.SIGINT, 3600), (signal.SIGTERM, 3600)]
)
def test_a_wait_that_is_ended_by_a_signal_ends_soon_and_loses_nothing(
    open_scene, tokens_of_texts, forks, number, poll
):
    scene = open_scene("--batch-by-hand")
    process = start(forks, scene, poll)
    until_submitted(scene, 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -number, err
    assert len(scene.server.jobs) == 3
    for job in scene.server.jobs:
        scene.server.drive(jobs=[{"id": job["id"], "do": "finish"}])
    scene.server.drive(set={"progress": {"polls": 1}})
    assert scene.do("embed", ("text", 0, TEXTS, 0))["right"]
    scene.check(TEXTS, tokens_of_texts("text", 0, TEXTS))
