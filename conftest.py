"""What holds for the tests of the core and of every provider."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# What a shell runs in the background ignores interrupts, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a test writes need not outlive the machine. In memory, where there is room for a whole run, a
# sync costs nothing.
_MEMORY, _ROOM = Path("/dev/shm"), 2 << 30  # noqa: S108 - only the parent of what is made there
if "TMPDIR" not in os.environ and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM:
    os.environ["TMPDIR"], tempfile.tempdir = str(_MEMORY), None

# For the fakes of services, which stand beside the tests of their providers.
sys.path.extend(map(str, Path(__file__).parent.glob("providers/*/tests")))

_FOREIGN = ("EMBEDCORE_", "OPENAI_", "AZURE_OPENAI_")
_FOREIGN += ("CO_API_", "GEMINI_", "MISTRAL_", "OLLAMA_", "VOYAGE_")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

# A busy machine draws an example as slowly as it does everything else: that is no failure.
settings.register_profile(
    "lean", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25
)
# Forty times the examples, for `make campaign`. A test that needs more names them as a multiple of
# ``settings.default.max_examples``; it has a number of its own only where an example is slow.
settings.register_profile("wide", settings.get_profile("lean"), max_examples=1_000)
settings.load_profile("lean")

# Tables of Unicode take a process a second to make: those that tests start find them made.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parent / ".hypothesis"))


def pytest_sessionstart() -> None:
    # The tests themselves are there to the end: no collection of garbage need look through them.
    gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()
    # Nor every few hundred objects through what a test itself has made: 6 % of all CPU.
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def _no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No certificate of the machine: nothing asks the world, and each client reads all of them."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("SSL_CERT_FILE", raising=False)
        environment.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("certificates")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_left(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Of a run that passes: its folders may be in memory."""
    yield
    if not request.session.testsfailed:
        shutil.rmtree(tmp_path_factory.getbasetemp(), ignore_errors=True)


@pytest.fixture(scope="session")
def _empty_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new folder, and one more, …: there are thousands of tests, and pytest looks through all
    that it has made before it makes one."""
    folder = tmp_path_factory.mktemp("isolated")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, _empty_folders: Iterator[Path]) -> None:
    """An empty state folder, no settings file in reach, and no variable that anybody exported."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name.upper() in _PROXIES:
            monkeypatch.delenv(name)
    empty = next(_empty_folders)
    for name in ("XDG_CONFIG_HOME", "XDG_CONFIG_DIRS", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(empty / name.lower()))
    monkeypatch.setenv("EMBEDCORE_HOME", str(empty / "home"))
    empty.mkdir()
    (empty / "work").mkdir()
    monkeypatch.chdir(empty / "work")


def _statements(connection: Any) -> Iterator[tuple[str, tuple[object, ...]]]:
    """What makes the tables of a file, and their rows, which are those that name migrations."""
    made = connection.execute(
        "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND substr(name, 1, 7) <> "
        "'sqlite_' ORDER BY rowid"
    ).fetchall()
    yield from ((sql, ()) for _, _, sql in made)
    for kind, name, _ in made:
        if kind == "table":
            for row in connection.execute(f"SELECT * FROM {name}").fetchall():  # noqa: S608
                marks = ", ".join("?" * len(row))
                yield f"INSERT INTO {name} VALUES ({marks})", tuple(row)  # noqa: S608


@pytest.fixture(scope="session", autouse=True)
def _tables_as_before() -> Iterator[None]:
    """A new file gets its tables as the first of its kind got them from the migrations, which take
    ten times as long: tests and their examples make tens of thousands of files."""
    from embedcore.storage.schema import Schema

    made: dict[Schema, list[tuple[str, tuple[object, ...]]]] = {}
    migrate = Schema.apply

    def apply(self: Schema, database: Any) -> None:
        is_new = not database.conn.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
        if is_new and self in made:
            for statement, values in made[self]:
                database.conn.execute(statement, values)
            return
        migrate(self, database)
        if is_new:
            made[self] = list(_statements(database.conn))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Schema, "apply", apply)
        yield


@pytest.fixture(autouse=True)
def _nothing_shared() -> Iterator[None]:
    """What is kept for the length of a process must not pass from one test to the next."""
    yield
    functions = sys.modules.get("embedcore.functions")
    if functions is not None:
        for made in (functions.default_client, functions.default_tracker):
            if made.cache_info().currsize:
                made().close()
            made.cache_clear()
    for name, made_once in (
        ("embedcore.policy.ratelimit.queue", "gate_for"),
        ("embedcore.storage.rates", "share_for"),
        ("embedcore.policy.planning", "sizes_for"),
        ("embedcore.policy.cache", "in_flight_keys_for"),
    ):
        if name in sys.modules:
            getattr(sys.modules[name], made_once).cache_clear()
    encodings = sys.modules.get("embedcore_openai.encodings")
    if encodings is not None:
        encodings.forget()
    # A command of the test showed the log on its own screen.
    log = logging.getLogger("embedcore")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
