"""A ledger over a file of the test's own, a clock that is set by hand, and other processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.storage.vectors import VectorStore

# For ``keeping.py``, which several files here share.
sys.path.insert(0, str(Path(__file__).parent))

PRELUDE = """
import contextlib, os, signal, sys, time
from pathlib import Path
import sqlite_utils.migrations
from embedcore.errors import *
from embedcore.storage import database as databases, usage
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.database import Database
from embedcore.storage.database import driver
from embedcore.storage.ledger import Ledger
from embedcore.storage.keys import Keys, Origin
from embedcore.storage.schema import STATE
from embedcore.storage.vectors import VectorStore
from embedcore.testing import vectors_of

driver()
PATH = Path(sys.argv[1])

def new_ledger(path=PATH, *, timeout=60.0, **rest):
    return Ledger(Database(path, STATE, timeout=timeout), **rest)

def day_limit(amount, *, scope="s"):
    return (Limit(scope=scope, period="day", unit="tokens", amount=amount),)

def new_store(path=PATH, *, cap=10**9, timeout=60.0, **rest):
    return VectorStore(path, cap=cap, busy_timeout=timeout, **rest)

def keys_of(texts):
    return Keys(provider="p", model="m", fingerprint="f", input_type=None).of(texts)

def buy(store, texts, *, width=8, salt=""):
    store.put(keys_of(texts), vectors_of(texts, width, salt=salt),
              Origin(model="p:m", fingerprint="f"))

def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.002)
"""


class Clock:
    """Seconds since 1970, moved by the test."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def noon() -> Clock:
    """Noon of 15 January 2026, UTC."""
    return Clock(1_768_478_400.0)


@pytest.fixture(scope="session")
def new_clock() -> Callable[[], Clock]:
    """For a fixture that outlives one test: each call makes another clock."""
    return noon


@pytest.fixture
def clock() -> Clock:
    return noon()


@pytest.fixture
def state_path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def open_ledger(state_path: Path, clock: Clock) -> Iterator[Callable[..., Ledger]]:
    """Another ledger over the same file, with connections of its own."""
    databases = []

    def opened(path: Path | None = state_path, *, timeout: float = 60.0, **rest: Any) -> Ledger:
        zone = rest.pop("zone", None)
        databases.append(Database(path, STATE, timeout=timeout, **rest))
        return Ledger(databases[-1], zone=zone, clock=clock)

    yield opened
    for database in databases:
        database.close()


@pytest.fixture
def ledger(open_ledger: Callable[..., Ledger]) -> Ledger:
    return open_ledger()


@pytest.fixture
def start_python(
    state_path: Path, forks: Callable[..., Any]
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run lines of Python in another process, which finds the state file as ``PATH``."""
    started = []

    def start(code: str, *arguments: object, path: Path = state_path) -> subprocess.Popen[str]:
        started.append(forks(PRELUDE + code, path, *arguments, stdout=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        if process.stdout is not None and not process.stdout.closed:
            process.communicate()


@pytest.fixture
def run_python(start_python: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """The same, waited for; returns what it printed."""

    def run(code: str, *arguments: object, **rest: Any) -> str:
        process = start_python(code, *arguments, **rest)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        return printed.strip()

    return run


@pytest.fixture
def vectors_path(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


@pytest.fixture
def index_path(vectors_path: Path) -> Path:
    return vectors_path / "index.db"


@pytest.fixture
def open_store(vectors_path: Path, clock: Clock) -> Iterator[Callable[..., VectorStore]]:
    """Another store over the same file, with connections of its own."""
    opened = []

    def open_one(path: Path = vectors_path, *, cap: int = 10**9, **rest: Any) -> VectorStore:
        opened.append(VectorStore(path, cap=cap, **{"busy_timeout": 60.0, "now": clock} | rest))
        return opened[-1]

    yield open_one
    for store in opened:
        store.database.close()


@pytest.fixture
def store(open_store: Callable[..., VectorStore]) -> VectorStore:
    return open_store()
