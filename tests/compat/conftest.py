"""A recorded folder as if it had been left a moment ago, and the provider that belongs to it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import time_machine

from embedcore import EmbeddingClient
from embedcore.config import user_file
from embedcore.storage.keys import Keys
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

RECORDED = Path(__file__).parent / "9454e67"
HOST = "recorded.internal"
OPTIONS = {"base_url": f"http://{HOST}/v1", "dimensions": 8, "batch": True}
KEY = "sk-recorded-0123456789abcdef"
RULES = {"part_texts": 2, "parts": 100, "small_texts": 0}
TOKENS = 5  # of each recorded text: its words


@dataclass
class Past:
    """What was recorded, the clock, and the provider. ``billed``: how often each text was, ever."""

    home: Path
    server: FakeOpenAI
    clock: Any
    state: dict[str, Any]
    provider: dict[str, Any]
    clients: list[EmbeddingClient] = field(default_factory=list)

    def client(self, scope: str, *, options: Any = None, **config: Any) -> EmbeddingClient:
        """One like the client that was used then."""
        rules = {**RULES, **config.pop("batch", {})}
        made = EmbeddingClient(
            self.state["models"].get(scope),
            KEY,
            scope=scope,
            options={**OPTIONS, **(options or {})},
            config={"home": self.home, "batch": rules, **config},
        )
        self.clients.append(made)
        return made

    def look(self, client: EmbeddingClient, times: int = 60) -> None:
        """What cron does, every seven minutes, until nothing is open."""
        for _ in range(times):
            client.resume_batches()
            if not client.batch_jobs(ended=False):
                return
            self.clock.shift(420)

    def close(self) -> None:
        for client in self.clients:
            client.close()

    @property
    def billed_now(self) -> Counter[str]:
        return self.server.meter.billed_texts + self.server.batches.meter.billed_texts

    @property
    def billed(self) -> Counter[str]:
        before = self.provider["billed"]
        return Counter(before["immediate"]) + Counter(before["batches"]) + self.billed_now

    def rows(self, statement: str, *values: object) -> list[list[Any]]:
        """What is written in the ledger. Nothing may have it open."""
        self.close()
        connection = sqlite3.connect(f"file:{self.home / 'state.db'}?mode=ro", uri=True)
        try:
            return [list(row) for row in connection.execute(statement, values)]
        finally:
            connection.close()

    def windows(self) -> list[list[Any]]:
        return self.rows(
            "SELECT scope, lane, period, start, tokens_spent, tokens_held, cost_spent, cost_held, "
            "requests FROM window ORDER BY scope, lane, period, start"
        )

    def total(self, scope: str) -> tuple[int, int]:
        """Tokens spent and held in all."""
        ((spent, held),) = self.rows(
            "SELECT tokens_spent, tokens_held FROM window WHERE scope = ? AND lane = 'all' "
            "AND period = 'total'",
            scope,
        )
        return spent, held


# All that is known here of what is inside.


@pytest.fixture(scope="session")
def keys_of() -> Callable[[EmbeddingClient, str | None, list[str]], list[str]]:
    """Under which keys the vectors of texts are kept."""

    def keys(client: EmbeddingClient, input_type: str | None, texts: list[str]) -> list[str]:
        known = {"provider": client.info.provider, "model": client.info.model}
        made = Keys(**known, fingerprint=client.fingerprint, input_type=input_type)
        return [key.hex() for key in made.of(texts)]

    return keys


@pytest.fixture
def users_file() -> Path:
    """Where the user's own settings are."""
    return user_file()


def count_words(texts: Any) -> list[int]:
    return [len(text.split()) for text in texts]


@pytest.fixture
def recorded_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    """The provider whose address is part of everything that was recorded."""
    settings = BatchSettings(progress=Progress(polls=1))
    with FakeOpenAI(api_key=None, count=count_words, batch=settings) as server:
        port = int(server.url.rpartition(":")[2])
        plain = socket.getaddrinfo

        def getaddrinfo(host: Any, service: Any, *rest: Any, **more: Any) -> Any:
            if host in (HOST, HOST.encode()):
                host, service = "127.0.0.1", port
            return plain(host, service, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield server


def unpack(folder: Path) -> None:
    """The recorded state folder, byte for byte."""
    folder.mkdir(mode=0o700)
    with tarfile.open(RECORDED / "state.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    (folder / "batches").chmod(0o700)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o600)
            # Its age is that of the record, whatever the machine's clock says of it.
            os.utime(path, (_state()["recorded_at"],) * 2)


def _state() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / "state.json").read_text())
    return found


@pytest.fixture
def past(tmp_path: Path, recorded_server: FakeOpenAI) -> Iterator[Past]:
    """Five seconds after the record."""
    with time_machine.travel(_state()["recorded_at"] + 5, tick=True) as clock:
        provider = json.loads((RECORDED / "provider.json").read_text())
        recorded_server.batches.restore(files=provider["files"], jobs=provider["jobs"])
        unpack(tmp_path / "past")
        found = Past(tmp_path / "past", recorded_server, clock, _state(), provider)
        yield found
        found.close()


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A copy of the recorded outputs."""
    folder = tmp_path / "outputs"
    shutil.copytree(RECORDED / "outputs", folder)
    return folder
