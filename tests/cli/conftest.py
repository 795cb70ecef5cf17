"""Ways to run the command line: in this process, in one of its own, and on a terminal."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from embedcore.cli import main
from embedcore.testing import FakeOpenAI

PROGRAM = """
import sys
from embedcore.cli.app import main
from embedcore.policy.engine import Engine

# What is under way when a command is stopped is waited for so long.
Engine.__init__.__kwdefaults__["grace"] = float(sys.argv.pop(1))
exec(sys.argv.pop(1))
sys.exit(main())
"""
# For what takes as long as the machine takes, and does happen.
SECONDS = 120.0
GRACE = 5.0


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
def begun(forks: Any) -> Callable[..., Any]:
    """``begun("embed", …)``: a command under way in a process of its own, without a terminal.

    ``grace``: seconds for which a command that is stopped waits for its replies. ``first``: what
    is executed before the command.
    """

    def begin(*arguments: str, grace: float = GRACE, first: str = "", **how: Any) -> Any:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return forks(PROGRAM, grace, first, *arguments, **streams | how)

    return begin


@pytest.fixture
def shell(begun: Callable[..., Any]) -> Callable[..., Ran]:
    """``shell("embed", …)``: run in a process of its own, without a terminal."""

    def run(*arguments: str, stdin: bytes = b"", **environment: str) -> Ran:
        streams = {"stdin": subprocess.PIPE, "env": {**os.environ, **environment}, "text": False}
        process = begun(*arguments, **streams)
        out, err = process.communicate(stdin, timeout=SECONDS)
        return Ran(process.returncode, out.decode(), err.decode())

    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    """An OpenAI that every command of the test talks to."""
    with FakeOpenAI() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        yield fake


class HeldServer(FakeOpenAI):
    """Answers so many requests, and holds what it replies to the others until it is let go. What
    is held back is billed already."""

    def __init__(self, answers: int) -> None:
        self._left = itertools.count(answers, -1)
        self.go = threading.Event()
        super().__init__(record=False)

    def answer(self, request: Any) -> Any:
        left, reply = next(self._left), super().answer(request)
        assert left > 0 or self.go.wait(SECONDS)
        return reply

    def wait_for(self, requests: int) -> None:
        """Until so many have arrived."""
        end = time.monotonic() + SECONDS
        while self.meter.requests < requests:
            assert time.monotonic() < end, f"{self.meter.snapshot()} after {SECONDS} s"
            time.sleep(0.005)


@pytest.fixture
def held_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], HeldServer]]:
    """``held_server(5)``: one that holds everything but five replies back."""
    with contextlib.ExitStack() as started:

        def start(answers: int) -> HeldServer:
            server = started.enter_context(HeldServer(answers))
            started.callback(server.go.set)
            monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
            monkeypatch.setenv("OPENAI_API_KEY", str(server.api_key))
            return server

        yield start


class Terminal:
    """A command on a pseudo-terminal of its own. ``shown``: all that was written to it."""

    def __init__(
        self, forks: Any, arguments: Sequence[str], *, columns: int = 100, grace: float = GRACE
    ) -> None:
        import pty

        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
        self._descriptor, theirs = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self._process = forks(
            PROGRAM, grace, "", *arguments, env=environment, terminal=True, **streams
        )
        os.close(theirs)
        self.shown = ""

    def send(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def kill(self, number: int) -> None:
        self._process.send_signal(number)

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
        os.close(self._descriptor)
        return int(self._process.wait(SECONDS))

    @property
    def plain(self) -> str:
        """Without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown).replace("\r", "")

    def _read(self, end: float) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], max(end - time.monotonic(), 0))
        if not ready:
            self._process.kill()
            raise AssertionError(f"nothing came for {SECONDS} s after:\n{self.plain}")
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # Linux says so when the other end is closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)


@pytest.fixture
def terminal(forks: Any) -> Callable[..., Terminal]:
    return lambda *arguments, **options: Terminal(forks, arguments, **options)


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
