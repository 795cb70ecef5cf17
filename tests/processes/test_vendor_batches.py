"""The three commands against each service with batches, one of them killed: one job, one bill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.campaign(short=True),
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
]
PROVIDERS = Path(__file__).parents[2] / "providers"
KEY = "CANARY0123456789abcdefghijklmnop"
TEXTS = 40
SECONDS = 120.0
# Service → its model, the path of its address, and its price of a million tokens in a batch.
SERVICES = {
    "voyage": ("voyage-4", "/v1", "0.0402"),
    "mistral": ("mistral-embed", "/v1", "0.05"),
    "gemini": ("gemini-embedding-2", "/v1beta", "0.1"),
}


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A fake of it, and the settings that lead there, in ``tmp_path``."""
    name = request.param
    folder = str(PROVIDERS / name / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    made = getattr(import_module(f"fake_{name}"), f"Fake{name.capitalize()}")
    model, path, _ = SERVICES[name]
    with made(key=KEY) as server:
        lines = [
            f'model = "{name}:{model}"',
            f"[options.{name}]",
            f'base_url = "{server.url}{path}"',
        ]
        (tmp_path / "embedcore.toml").write_text("\n".join(lines), encoding="utf-8")
        yield name, server


@pytest.fixture
def command(service: tuple[str, Any], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    name, _ = service
    environment = {
        **os.environ,
        "EMBEDCORE_HOME": str(tmp_path / "home"),
        "EMBEDCORE_CONFIG": str(tmp_path / "embedcore.toml"),
        f"{name.upper()}_API_KEY": KEY,
    }

    def begin(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "embedcore", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def run(command: Callable[..., subprocess.Popen[str]], *arguments: str) -> Any:
    process = command(*arguments, "--json")
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    return json.loads(out)


def killed(
    command: Callable[..., subprocess.Popen[str]], server: Any, when: str, *arguments: str
) -> None:
    """Run a command and kill it when the server has done this for it, before it answers."""
    begun, fell = threading.Event(), threading.Event()
    process: subprocess.Popen[str] | None = None
    do = getattr(server, when)

    def done_and_killed(*given: Any) -> Any:
        found = do(*given)
        if not fell.is_set():
            assert begun.wait(SECONDS)
            assert process is not None
            process.send_signal(signal.SIGKILL)
            fell.set()
        return found

    setattr(server, when, done_and_killed)
    process = command(*arguments)
    begun.set()
    process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL
    setattr(server, when, do)


@pytest.mark.parametrize("when", ["uploads", "creates", "downloads"])
def test_a_kill_costs_nothing(
    service: tuple[str, Any], command: Callable[..., Any], tmp_path: Path, when: str
) -> None:
    name, server = service
    rows = [json.dumps({"id": number, "text": f"text {number:04d}"}) for number in range(TEXTS)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    if when != "downloads":
        killed(command, server, when, "batch", "submit", "corpus.jsonl", "--yes")
    batch = run(command, "batch", "submit", "corpus.jsonl", "--yes")
    assert len(server.jobs) == 1
    server.finish()
    fetch = ("batch", "fetch", batch["id"], "-o", "vectors.npy")
    if when == "downloads":
        killed(command, server, when, *fetch)
    run(command, "batch", "status")
    run(command, *fetch)
    assert np.isfinite(np.load(tmp_path / "vectors.npy")).all()
    usage = run(command, "usage")
    assert len(server.jobs) == 1
    billed = server.meter.billed_texts
    assert {text.rpartition(": ")[2] for text in billed} == {
        json.loads(row)["text"] for row in rows
    }
    # What is paid for beside the job are the rows that are compared with single requests.
    assert billed.total() == TEXTS + (16 if name == "gemini" else 0)
    (spent,) = (each for each in usage["models"] if each["period"] == "total")
    assert spent["spent_tokens"] == server.meter.billed_tokens
    assert spent["unconfirmed_tokens"] == 0
    if name != "gemini":
        price = Decimal(SERVICES[name][2])
        # Nine bytes are three tokens.
        assert Decimal(str(spent["spent_cost"])) == price * 3 * TEXTS / 1_000_000
