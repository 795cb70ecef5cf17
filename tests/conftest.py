"""What the tests of the core share."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

# For what tests of several folders share.
sys.path.append(str(Path(__file__).parent))

LARGEST_FAULT = 149


def pytest_report_header() -> str:
    from embedcore.storage.database import driver, engine_version

    python = ".".join(map(str, sys.version_info[:3]))
    names = ("openai", "pluggy", "pydantic", "sqlite-utils")
    libraries = ", ".join(f"{name} {_version(name)}" for name in names)
    return f"python {python}, {libraries}, SQLite {engine_version()} ({driver().__name__})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("fault"):
            (number,) = marker.args
            if type(number) is not int or not 1 <= number <= LARGEST_FAULT:
                raise pytest.UsageError(f"{item.nodeid}: no fault row {number!r}")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``once("name", make)``: the folder that ``make(folder)`` filled, once for all processes of
    a run: what takes many seconds must not be made by each of them at the same time."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / f"once-{name}"
        with (shared / f"once-{name}.lock").open("w") as lock:
            if sys.platform != "win32":
                import fcntl

                # Released with the file, also where the process is killed.
                fcntl.flock(lock, fcntl.LOCK_EX)
            else:
                folder = tmp_path_factory.mktemp(name)
            done = folder / "made"
            if not done.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture
def name_settings(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``name_settings(text)``: the user's own settings of this test, which may set everything."""

    def write(text: str) -> Path:
        path = Path("embedcore.toml").absolute()
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv("EMBEDCORE_CONFIG", str(path))
        return path

    return write


@pytest.fixture(scope="session")
def start_forks() -> Iterator[Callable[..., Any]]:
    """``start_forks(env)``: what the fixture ``forks`` is, with its imports made in ``env``."""
    if os.name != "posix":
        yield lambda env=None: _started
        return
    spec = importlib.util.spec_from_file_location("forks", Path(__file__).with_name("forks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.ExitStack() as started:

        def start(env: dict[str, str] | None = None) -> Any:
            forks = module.Forks(env)
            started.callback(forks.close)
            return forks

        yield start


@pytest.fixture(scope="session")
def forks(start_forks: Callable[..., Any]) -> Any:
    """``forks(code, *arguments, stdout=PIPE, …)``: a program under way, as of ``python -c``."""
    return start_forks()


def _started(code: str, *arguments: object, terminal: bool = False, **how: Any) -> Any:
    """The same where nothing forks, and more slowly."""
    assert not terminal
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, **{"stdin": subprocess.DEVNULL, "text": True} | how)


@pytest.fixture
def state_home() -> Path:
    """The state folder of this test."""
    return Path(os.environ["EMBEDCORE_HOME"])


@pytest.fixture(scope="session")
def canary() -> str:
    """A key that must be seen nowhere but in a request."""
    return "sk-CANARY4b1d9c7e2f8a4065b3d1"


@pytest.fixture
def flip_vectors() -> Callable[..., None]:
    """Change a bit of the vector of each row of a cache's index that a condition names."""
    return _flip_vectors


def _flip_vectors(folder: Path, where: str, *values: object) -> None:
    from embedcore.storage.database import driver

    connection = driver().connect(folder / "index.db")
    rows = connection.execute(
        f"SELECT segment, offset FROM vector WHERE {where}", values
    ).fetchall()
    connection.close()
    for number, offset in rows:
        with (folder / f"{number:08}.seg").open("r+b") as file:
            file.seek(offset + 3)
            (byte,) = file.read(1)
            file.seek(offset + 3)
            file.write(bytes([byte ^ 4]))
