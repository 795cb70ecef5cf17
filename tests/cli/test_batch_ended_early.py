"""What is left when the command that submits or looks is interrupted or killed?"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

SECONDS = 120.0


@pytest.fixture
def server(monkeypatch, name_settings):
    """An OpenAI whose batches move only by hand."""
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        name_settings("[options.openai]\nbatch = true\n[batch]\ngrace = 0.2\nlook_again = 0.1\n")
        yield fake


def wait_for(what):
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, f"nothing after {SECONDS} s"
        time.sleep(0.01)


def finish(server):
    for job in server.batches.jobs:
        if job.status not in ("completed", "failed", "expired", "cancelled"):
            server.batches.finish(job.id)


def asked(server, method, path):
    return [one for one in server.requests if (one.method, one.path) == (method, path)]


@pytest.mark.fault(142)
@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_an_interrupted_submission_says_how_it_goes_on(
    cli, server, texts_file, read_output, begun, path
):
    server.faults.push("late", path=f"POST {path}", seconds=60.0)
    process = begun("batch", "submit", str(texts_file(20)))
    wait_for(lambda: asked(server, "POST", path))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, said
    (batch,) = cli("batch", "list", "--json").json["batches"]
    name = batch["id"]
    assert f"Batch {name} is written down" in said
    assert f"embedcore batch status {name} --watch" in said
    cli("batch", "status", name)
    watching = begun("batch", "status", name, "--watch", "--interval", "0.1")
    wait_for(lambda: server.batches.jobs)
    finish(server)
    _, said = watching.communicate(timeout=SECONDS)
    assert watching.returncode == 0, said
    assert cli("batch", "fetch", name, "-o", "v.jsonl").code == 0
    assert [row["text"] for row in read_output(Path("v.jsonl"))] == [
        f"text number {n}" for n in range(20)
    ]
    assert server.batches.meter.billed_texts.total() == 20


# It never comes to the end of what it reads.
ENDLESS = """
import time
from embedcore.storage.manifest import Manifest

def add(self, *arguments, **more):
    written(self, *arguments, **more)
    time.sleep(3600)

written, Manifest.add = Manifest.add, add
"""


def test_an_interrupt_while_it_reads_leaves_nothing(cli, server, state_home, begun):
    Path("many.txt").write_text("".join(f"line {n}\n" for n in range(300)))
    process = begun("batch", "submit", "many.txt", "--yes", first=ENDLESS)
    wait_for(lambda: (state_home / "batches").is_dir())
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, said
    assert "nothing was sent" in said
    assert cli("batch", "list", "--json").json == {"batches": []}
    assert not list((state_home / "batches").iterdir())
    assert not asked(server, "POST", "/v1/files")


MOMENTS = ["begun", "/v1/files", "/v1/batches", "submitted"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_submission_is_gone_or_goes_on(
    cli, server, texts_file, moment, read_output, begun, state_home
):
    path = str(texts_file(200))
    if moment.startswith("/"):
        server.faults.push("late", path=f"POST {moment}", seconds=60.0)
    process = begun("batch", "submit", path, "--yes")
    wait_for(
        {
            "begun": lambda: list(state_home.glob("batches/*")),
            "submitted": lambda: server.batches.jobs,
        }.get(moment, lambda: asked(server, "POST", moment))
    )
    process.kill()
    process.communicate(timeout=SECONDS)
    goes_on(cli, server, path, 200, read_output)


@pytest.mark.campaign(short=True)
@pytest.mark.parametrize("delay", [0.02, 0.06, 0.1, 0.2, 0.4])
def test_a_submission_that_is_killed_at_any_time_is_gone_or_goes_on(
    cli, server, texts_file, delay, read_output, begun
):
    path = str(texts_file(500))
    server.latency = 0.1
    process = begun("batch", "submit", path, "--yes")
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=SECONDS)
    goes_on(cli, server, path, 500, read_output)


def goes_on(cli, server, path, rows, read_output):
    found = cli("batch", "list", "--json").json["batches"]
    again = cli("batch", "submit", path, "--yes", "--json")
    assert again.code == 0, again.err
    end = time.monotonic() + SECONDS
    code = 4
    while code == 4 and time.monotonic() < end:
        finish(server)
        code = cli("batch", "status").code
    assert code == 0
    for name in {again.json["id"], *(one["id"] for one in found)}:
        assert cli("batch", "fetch", name, "-o", "v.jsonl", "--json").json["written"] == rows
    assert [row["id"] for row in read_output(Path("v.jsonl"))] == [f"row-{n}" for n in range(rows)]
    assert server.batches.meter.billed_texts.total() == rows, "nothing is paid twice"
    held = json.loads(cli("usage", "--json").out)["scopes"][0]["reserved_tokens"]
    assert held == 0
