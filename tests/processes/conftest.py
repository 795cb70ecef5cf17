"""What the tests with real processes share: a fake server of its own, workers, and the ledger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import openai_tokens
from embedcore.testing.openai import server as serving

WORKER = Path(__file__).with_name("batch_worker.py")
# For what takes as long as the machine takes, and does happen.
SECONDS = 120.0
# A provider's list is as quick here as everything else.
QUICK = {"parts": 3, "part_texts": 20, "grace": 0.3, "look_again": 0.05, "watch": 3600}


class Server:
    """The fake server, started as its command would start it, in threads of this process."""

    def __init__(self, *arguments: object) -> None:
        self._fake = serving.server_of(list(map(str, arguments)))
        self.place = {
            "url": self._fake.url,
            "base_url": self._fake.base_url,
            "api_key": str(self._fake.api_key),
        }

    @property
    def options(self) -> dict[str, str]:
        return {name: self.place[name] for name in ("base_url", "api_key")}

    @property
    def options_json(self) -> str:
        return json.dumps(self.options)

    @property
    def bill(self) -> dict[str, int]:
        """Of the Batch API."""
        found: dict[str, int] = self._ask("/_meter")["batches"]
        return found

    @property
    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("/_batches")["jobs"]
        return found

    def drive(self, **script: object) -> dict[str, Any]:
        return self._ask("/_batches", script)

    def faults(self, **script: object) -> None:
        self._ask("/_faults", script)

    def close(self) -> None:
        self._fake.close()

    def _ask(self, path: str, script: object = None) -> dict[str, Any]:
        data = None if script is None else json.dumps(script).encode()
        with urllib.request.urlopen(self.place["url"] + path, data=data, timeout=SECONDS) as reply:
            found: dict[str, Any] = json.loads(reply.read())
        return found


class Workshop:
    """Makes workers: one process that has everything imported, and forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **what: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=SECONDS)
        self._process.stdout.close()


@dataclass
class Worker:
    """A process at work, and the file of what it says."""

    pid: int
    said: Path
    workshop: Workshop
    code: int | None = None

    def lines(self) -> list[str]:
        return self.said.read_text().splitlines() if self.said.exists() else []

    def until_said(self, word: str, seconds: float = SECONDS) -> None:
        ends = time.monotonic() + seconds
        while not any(word in line for line in self.lines()):
            assert time.monotonic() < ends, self.lines()
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, seconds: float = 2 * SECONDS) -> dict[str, Any] | None:
        """What it found; None if it was killed before it could say."""
        hangs = threading.Timer(seconds, lambda: self.signal(signal.SIGABRT))
        hangs.start()
        if self.code is None:
            self.code = self.workshop.ask(wait=self.pid)
        hangs.cancel()
        if self.code == -signal.SIGKILL:
            return None
        lines = self.lines()
        assert self.code == 0, lines
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def kill(self) -> None:
        if self.code is None:
            self.signal(signal.SIGKILL)
            self.code = self.workshop.ask(wait=self.pid)


@dataclass
class Scene:
    """One state folder, one account, and whoever works with them."""

    home: Path
    server: Server
    workshop: Workshop
    batch: dict[str, object] = field(default_factory=lambda: dict(QUICK))
    more: dict[str, Any] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)

    def start(self, deed: str, texts: tuple[str, int, int, int], **more: Any) -> Worker:
        """Texts: their prefix, the first number, the one after the last, and how many of them
        come a second time."""
        more = {**self.more, **more}
        options = {**self.server.options, **more.pop("options", {})}
        given = {"deed": deed, "texts": texts, "home": str(self.home), "batch": self.batch}
        said = self.home.with_name(f"said{len(self.workers)}")
        pid = self.workshop.ask(**given, options=options, said=str(said), **more)
        worker = Worker(pid, said, self.workshop)
        self.workers.append(worker)
        return worker

    def do(self, deed: str, texts: tuple[str, int, int, int], **more: Any) -> dict[str, Any]:
        found = self.start(deed, texts, **more).end()
        assert found is not None
        return found

    def ledger(self) -> Ledger:
        return Ledger(Database(self.home / "state.db", STATE))

    def amounts(self) -> tuple[int, int, int]:
        """Tokens spent, those of them that are unconfirmed, and held."""
        ledger = self.ledger()
        try:
            used = usage.of_scope(ledger, "default", "total")
            unconfirmed = sum(
                one.unconfirmed.tokens for one in usage.by_model(ledger) if one.period == "total"
            )
        finally:
            ledger.database.close()
        return used.spent.tokens, unconfirmed, used.held.tokens

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        ledger = self.ledger()
        try:
            with ledger.database.read() as connection:
                found = [tuple(row) for row in connection.execute(statement)]
        finally:
            ledger.database.close()
        return found

    def until_landed(self, seconds: float = SECONDS) -> None:
        """Until everything late has happened, and every job that came of it has run."""
        ends = time.monotonic() + seconds
        while (told := self.server.drive())["pending"] or not all(
            job["status"] in ("completed", "cancelled", "failed") for job in told["jobs"]
        ):
            assert time.monotonic() < ends, told
            time.sleep(0.1)

    def check(self, texts: int, tokens: int) -> None:
        """Everything was billed, nothing twice, nothing is held, and the ledger equals the bill."""
        bill = self.server.bill
        assert (bill["distinct_texts"], bill["billed_texts"]) == (texts, texts)
        assert bill["billed_tokens"] == tokens
        spent, unconfirmed, held = self.amounts()
        assert held == 0
        assert spent - unconfirmed == tokens
        ledger = self.ledger()
        try:
            assert usage.of_scope(ledger, "default", "total").held == Amount()
        finally:
            ledger.database.close()
        # An attempt that was charged keeps its grant, empty, for as long as it is looked for.
        live = "SELECT \"grant\" FROM part WHERE state <> 'done'"
        assert self.rows(f'SELECT * FROM "grant" WHERE id NOT IN ({live})') == []
        states = self.rows("SELECT state, count(*) FROM part GROUP BY 1")
        assert {state for state, _ in states} <= {"done", "lost", "stray"}
        assert self.rows("SELECT count(*) FROM item WHERE state = 'open'") == [(0,)]
        assert (
            self.rows("SELECT name FROM batch WHERE state IN ('new', 'open', 'cancelling')") == []
        )


def tokens_in(prefix: str, first: int, end: int) -> int:
    return sum(openai_tokens([f"{prefix} {number}" for number in range(first, end)]))


@pytest.fixture
def open_server() -> Iterator[Callable[..., Server]]:
    opened: list[Server] = []

    def open_one(*arguments: object) -> Server:
        opened.append(Server(*arguments))
        return opened[-1]

    yield open_one
    for server in opened:
        server.close()


@pytest.fixture(scope="session")
def workshop() -> Iterator[Workshop]:
    """One for all tests: what it makes is told everything that a test decides."""
    made = Workshop()
    yield made
    made.close()


@pytest.fixture
def open_scene(
    tmp_path: Path, open_server: Callable[..., Server], workshop: Workshop
) -> Iterator[Callable[..., Scene]]:
    """A state folder and a server; arguments: those of the server, and ``batch`` settings."""
    opened: list[Scene] = []

    def open_one(*arguments: object, **batch: object) -> Scene:
        home = tmp_path / f"home{len(opened)}"
        scene = Scene(home, open_server(*arguments), workshop, {**QUICK, **batch})
        opened.append(scene)
        return scene

    yield open_one
    for scene in opened:
        for worker in scene.workers:
            worker.kill()


@pytest.fixture(scope="session")
def tokens_of_texts() -> Callable[[str, int, int], int]:
    return tokens_in
