"""A process with few addresses left (``ulimit -v``): it embeds more slowly, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Server

PROGRAM = """
import json, resource, sys
from pathlib import Path
from embedcore import EmbeddingClient

client = EmbeddingClient("openai:text-embedding-3-small", options=json.loads(sys.argv[1]))
client.open()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
# The vectors need 36 MiB, and each thread's heap wants 64.
most = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
result = client.embed([f"text {number}" for number in range(6000)])
print(json.dumps([bool(result.ok.all()), *result.vectors.shape]))
"""


@pytest.mark.case("H4")
@pytest.mark.skipif(sys.platform != "linux", reason="addresses are counted on Linux")
@pytest.mark.parametrize(
    "mebibytes", [250, pytest.param(400, marks=pytest.mark.campaign(short=True))]
)
def test_six_thousand_texts_with_few_addresses_left(
    open_server: Callable[..., Server], state_home: Path, mebibytes: int
) -> None:
    server = open_server()
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, server.options_json, str(mebibytes)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [True, 6000, 1536]
    bill = server._ask("/_meter")
    assert bill["distinct_texts"] == bill["billed_texts"] == 6000
