"""Batch servers that nobody here wrote, each as a process of its own on a free port.

`make test-batch-servers` installs them; where one is absent, its tests are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from embedcore import EmbeddingClient
from embedcore.provider.protocol import BatchStrategy

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".venv-batch-servers"
KEY = "sk-nobody-checks-this-one"
# Looks for a lost job at once, and gives it up after a second.
HASTY = {"grace": 1.0, "look_again": 0.2}
_STARTS_WITHIN = 60.0

Json = dict[str, Any]


def ask(method: str, url: str, body: object = None) -> Json:
    """The JSON that a server answers, whatever its status."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, method=method, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            read = answer.read()
    except urllib.error.HTTPError as error:
        read = error.read()
    found: Json = json.loads(read)
    return found


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until


@pytest.fixture
def hour_ago() -> datetime:
    return datetime.now(UTC) - timedelta(hours=1)


@pytest.fixture
def in_an_hour() -> datetime:
    return datetime.now(UTC) + timedelta(hours=1)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


@dataclass(kw_only=True)
class Server:
    """A process with an OpenAI-like API below ``base_url``; ``model``: as it names it."""

    command: list[str]
    folder: Path
    port: int
    model: str
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._answers, _STARTS_WITHIN)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it and whatever it started, at once unless another signal is given."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait(timeout=30)
            self._process = None

    def jobs(self) -> list[Json]:
        """All batches, read in other steps than ours."""
        found: list[Json] = []
        after = ""
        while page := ask("GET", f"{self.base_url}/batches?limit=37{after}")["data"]:
            found += page
            after = f"&after={page[-1]['id']}"
        return found

    def job(self, name: str) -> Json:
        return ask("GET", f"{self.base_url}/batches/{name}")

    def content(self, file: str) -> bytes:
        with urllib.request.urlopen(f"{self.base_url}/files/{file}/content", timeout=30) as answer:
            read: bytes = answer.read()
            return read

    def inputs(self) -> set[str]:
        """Files that embedcore uploaded, and nobody deleted."""
        files: list[Json] = ask("GET", f"{self.base_url}/files?purpose=batch&limit=100")["data"]
        return {file["id"] for file in files if file["filename"].startswith("embedcore-")}

    def upload(self, lines: Iterable[object]) -> str:
        """A file as nobody of ours would write it. Returns its id."""
        text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
        parts = (
            '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
            'Content-Disposition: form-data; name="file"; filename="foreign.jsonl"\r\n'
            f"Content-Type: application/octet-stream\r\n\r\n{text}\r\n--x--\r\n"
        )
        request = urllib.request.Request(
            f"{self.base_url}/files",
            method="POST",
            data=parts.encode(),
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.loads(answer.read())["id"])

    def create(self, file: str) -> Json:
        body = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        return ask("POST", f"{self.base_url}/batches", body)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
        try:
            return "data" in ask("GET", f"{self.base_url}/batches")
        except (OSError, ValueError):
            return False


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """The fake OpenAI in a process of its own: the vectors behind a server that has none.

    As it names itself: ``tokens`` says how it counts.
    """

    url: str
    base_url: str
    api_key: str
    tokens: str

    def meter(self) -> Json:
        return ask("GET", f"{self.url}/_meter")

    def faults(self, **script: object) -> None:
        answer = ask("POST", f"{self.url}/_faults", {"clear": True, **script})
        assert "error" not in answer, answer


@pytest.fixture(scope="session")
def _upstream() -> Iterator[Upstream]:
    command = [sys.executable, "-m", "embedcore.testing.openai.server", "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield Upstream(**json.loads(process.stdout.readline()))
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def upstream(_upstream: Upstream) -> Iterator[Upstream]:
    """Without faults before and after each test."""
    _upstream.faults()
    yield _upstream
    _upstream.faults()


@pytest.fixture(scope="session")
def _ogx(_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = _installed("ogx/bin/ogx")
    folder, port = tmp_path_factory.mktemp("ogx"), _free_port()
    config = str(Path(__file__).parent / "ogx.yaml")
    yield from _running(
        Server(
            command=[str(program), "run", config, "--port", str(port), "--insecure"],
            folder=folder,
            port=port,
            model="upstream/text-embedding-3-small",
            environment={
                "STATE_FOLDER": str(folder),
                "UPSTREAM_URL": _upstream.base_url,
                "UPSTREAM_KEY": _upstream.api_key,
                "OTEL_SDK_DISABLED": "true",
            },
        )
    )


@pytest.fixture
def ogx(_ogx: Server, upstream: Upstream) -> Server:
    return _ogx


@pytest.fixture(scope="session")
def aibrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = _installed("aibrix/bin/aibrix_metadata")
    folder, port = tmp_path_factory.mktemp("aibrix"), _free_port()
    place = ["--host", "127.0.0.1", "--port", str(port)]
    yield from _running(
        Server(
            command=[str(program), "--dry-run", *place],
            folder=folder,
            port=port,
            model="text-embedding-3-small",
        )
    )


@pytest.fixture(scope="session")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = _installed("aimock/node_modules/.bin/aimock")
    folder, port = tmp_path_factory.mktemp("aimock"), _free_port()
    (folder / "aimock.json").write_text("{}")
    yield from _running(
        Server(
            command=[str(program), "-c", "aimock.json", "-p", str(port)],
            folder=folder,
            port=port,
            model="text-embedding-3-small",
        )
    )


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Makes clients, closes them at the end, and runs programs that have one and are to die."""

    home: Path
    _made: list[EmbeddingClient] = field(default_factory=list)

    def settings(self, server: Server, options: Mapping[str, object] = {}) -> Json:
        """The arguments of ``EmbeddingClient`` that a server like this one needs."""
        return {
            "model": f"openai:{server.model}",
            "api_key": KEY,
            "options": {
                "base_url": server.base_url,
                "batch": True,
                "base_model": "text-embedding-3-small",
                **options,
            },
            "config": {"home": str(self.home), "batch": HASTY},
        }

    def make(self, server: Server, **options: object) -> EmbeddingClient:
        return self.of(self.settings(server, options))

    def of(self, settings: Json) -> EmbeddingClient:
        client = EmbeddingClient(**settings)
        self._made.append(client)
        return client

    def strategy(self, server: Server) -> BatchStrategy:
        """What the recipe calls, to be called by itself."""
        context = self.make(server)._context()
        return context.strategy

    def die(self, server: Server, program: str, *, at: str, before: bool = False) -> None:
        """Run a program with ``client`` in a process that is killed when ``at``, a method of the
        batch strategy, has done its work, and before its answer is seen; or ``before`` that work.
        """
        work = "pass" if before else f"OpenAIBatch.honest_{at}(*args, **kwargs)"
        code = (
            "import json, os, signal, sys\n"
            "from embedcore import EmbeddingClient\n"
            "from embedcore_openai.batch import OpenAIBatch\n"
            f"OpenAIBatch.honest_{at} = OpenAIBatch.{at}\n"
            "def last(*args, **kwargs):\n"
            f"    {work}\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            f"OpenAIBatch.{at} = last\n"
            "client = EmbeddingClient(**json.loads(sys.argv[1]))\n"
            f"{program}\n"
        )
        settings = json.dumps(self.settings(server))
        done = subprocess.run(
            [sys.executable, "-c", code, settings], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    def file(self, server: Server) -> str:
        """The settings as ``embedcore.toml``."""
        settings = self.settings(server)
        options = "\n".join(f"{n} = {json.dumps(v)}" for n, v in settings["options"].items())
        return f'model = "{settings["model"]}"\n\n[options.openai]\n{options}\n'

    def run(self, *arguments: str) -> str:
        """What a command prints, in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "embedcore.cli", *arguments],
            env={**os.environ, "OPENAI_API_KEY": KEY},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def close(self) -> None:
        for client in self._made:
            client.close()


@pytest.fixture
def clients(state_home: Path) -> Iterator[Clients]:
    made = Clients(home=state_home)
    yield made
    made.close()


def _running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill(signal.SIGTERM)


def _installed(path: str) -> Path:
    program = INSTALLED / path
    if not program.exists():
        pytest.skip(f"{path} is not there: make test-batch-servers")
    return program


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
