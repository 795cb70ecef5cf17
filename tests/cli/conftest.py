"""Ways to run the command line: in this process, in one of its own, and on a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from embedcore.cli import main
from embedcore.testing import FakeOpenAI

COMMAND = [sys.executable, "-m", "embedcore.cli"]
SECONDS = 60.0


@dataclass(frozen=True)
class Ran:
    """How a command ended. ``json``: its answer to a machine."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "more than one object on standard output"
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """``cli("embed", …, stdin=b"…")``: run in this process."""

    def run(*arguments: str, stdin: bytes = b"") -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(list(arguments))
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return run


@pytest.fixture
def shell() -> Callable[..., Ran]:
    """``shell("embed", …)``: run in a process of its own, without a terminal."""

    def run(*arguments: str, stdin: bytes = b"", **environment: str) -> Ran:
        done = subprocess.run(
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            env={**os.environ, **environment},
            timeout=SECONDS,
            check=False,
        )
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    """An OpenAI that every command of the test talks to."""
    with FakeOpenAI() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        yield fake


class FarServer:
    """The fake in a process of its own; its meter is the truth about what was bought."""

    def __init__(self, place: dict[str, str]) -> None:
        self.base_url, self._url, self.api_key = place["base_url"], place["url"], place["api_key"]

    @property
    def meter(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self._url}/_meter") as reply:
            found: dict[str, int] = json.load(reply)
        return found

    def wait_for(self, texts: int) -> None:
        end = time.monotonic() + SECONDS
        while self.meter["billed_texts"] < texts:
            assert time.monotonic() < end, f"{self.meter} after {SECONDS} s"
            time.sleep(0.02)


@pytest.fixture
def far_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], FarServer]]:
    """``far_server(latency)`` starts one."""
    started: list[subprocess.Popen[str]] = []

    def start(latency: float) -> FarServer:
        command = [sys.executable, "-m", "embedcore.testing.server", "--until-eof"]
        process = subprocess.Popen(
            [*command, "--latency", str(latency)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        server = FarServer(json.loads(process.stdout.readline()))
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
        return server

    yield start
    for process in started:
        process.communicate(timeout=SECONDS)


class Terminal:
    """A command on a pseudo-terminal of its own. ``shown``: all that was written to it."""

    def __init__(self, arguments: Sequence[str], columns: int = 100) -> None:
        import pty

        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.execve(COMMAND[0], [*COMMAND, *arguments], environment)
        self.shown = ""

    def send(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until the pattern was shown."""
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.plain)):
            assert self._read(end), f"{pattern!r} is not in:\n{self.plain}"
        return found

    def close(self) -> int:
        """Read to the end; the exit code."""
        end = time.monotonic() + SECONDS
        while self._read(end):
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(status)

    @property
    def plain(self) -> str:
        """Without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown).replace("\r", "")

    def _read(self, end: float) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], max(end - time.monotonic(), 0))
        if not ready:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"nothing came for {SECONDS} s after:\n{self.plain}")
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # Linux says so when the other end is closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)


@pytest.fixture
def terminal() -> Callable[..., Terminal]:
    return lambda *arguments, **options: Terminal(arguments, **options)


@pytest.fixture
def texts_file() -> Callable[..., Path]:
    """``texts_file(n)``: a file with n different texts."""

    def write(count: int, name: str = "texts.jsonl", start: int = 0) -> Path:
        path = Path(name)
        numbers = range(start, start + count)
        lines = [json.dumps({"id": f"row-{n}", "text": f"text number {n}"}) for n in numbers]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def read_output() -> Callable[[Path], list[dict[str, Any]]]:
    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    return read
