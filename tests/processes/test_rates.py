"""Real processes under one strict limit, where what is refused counts as well: hardly any is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.server import Quota

# Each gets ready by itself, with a request; then all go at once.
PROGRAM = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from embedcore import EmbeddingClient

name, calls, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
config = {"cache": False, "options": {"openai": options}}
client = EmbeddingClient("openai:text-embedding-3-small", config=config)
client.embed([f"{name} gets ready"])
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(8) as threads:
    found = threads.map(lambda number: client.embed([f"{name} {number}"]), range(calls))
    print(sum(int(one.ok.sum()) for one in found), flush=True)
"""


@pytest.mark.case("G5")
@pytest.mark.parametrize(
    ("processes", "calls", "goodput"),
    [
        # Beside other tests: a quarter is what they had if one waited for the other.
        pytest.param(4, 25, 0.4, marks=pytest.mark.campaign(short=True)),
        # Of 0.95 and more that a machine shows which does nothing else.
        pytest.param(8, 60, 0.85, marks=pytest.mark.campaign),
    ],
)
def test_processes_of_one_state_folder_keep_a_strict_limit(
    state_home: Path, processes: int, calls: int, goodput: float
) -> None:
    quota = Quota(
        requests_per_minute=600,
        tokens_per_minute=6_000_000,
        burst_requests=10,
        enforced=True,
        refused_count=True,
    )
    with FakeOpenAI(quota=quota, latency=0.1, record=False) as server:
        options = json.dumps({"base_url": server.base_url, "api_key": server.api_key})
        children = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(number), str(calls), options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        before = server.meter.rejected_requests
        started = time.monotonic()
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        done = [child.communicate(timeout=300)[0] for child in children]
        took = time.monotonic() - started
        refused = server.meter.rejected_requests - before
    assert [int(one) for one in done] == [calls] * processes
    assert refused <= max(0.01 * calls * processes, 1)
    assert (calls * processes - 10) / 10 / took >= goodput
