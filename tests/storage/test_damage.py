"""What does the user see when the disk is full, the file is damaged or may not be written?"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from embedcore.errors import (
    EmbeddingError,
    StorageCorrupt,
    StorageError,
    StorageFull,
)
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.storage.database import SPENDING, Database, driver, from_sqlite
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE

TEN = Amount(tokens=10)
NOW = 1_768_478_400.0


def use_everything(path: Path) -> None:
    """Every kind of statement that the ledger has."""
    database = Database(path, STATE, timeout=1)
    try:
        ledger = Ledger(database, clock=lambda: NOW + 1000)
        ledger.record("s", TEN)
        grant = ledger.hold("s", TEN)
        ledger.give_back(ledger.send(grant, TEN))
        ledger.settle(ledger.send(grant, TEN), TEN, close=True)
        ledger.charge(ledger.hold_and_send("new", TEN, lane="query"))
        ledger.reset("s")
        usage.windows_now(ledger)
        usage.by_model(ledger)
        usage.audit(ledger)
    finally:
        database.close()


@functools.cache
def sound() -> bytes:
    """A file with a bit of everything in it, closed in good order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        ledger = Ledger(Database(path, STATE), clock=lambda: NOW)
        for number in range(40):
            attempt = ledger.hold_and_send(f"s{number % 3}", TEN, model="fake:m", inputs=2)
            ledger.settle(attempt, TEN, request_id=f"req-{number}", close=number % 2 == 0)
        ledger.hold_and_send("s", TEN)
        ledger.database.close()
        return path.read_bytes()


@functools.cache
def written() -> list[int]:
    """Where the file holds something: most of it is room to grow."""
    return [place for place, byte in enumerate(sound()) if byte]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


flips = st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=3)


@pytest.mark.fault(106)
@settings(
    max_examples=settings.default.max_examples,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(flips=flips)
@example(flips=[(7740, 128)])
def test_flipped_bytes_are_a_typed_error_or_harmless(
    folder: Path, flips: list[tuple[int, int]]
) -> None:
    damaged = bytearray(sound())
    for place, change in flips:
        damaged[written()[place % len(written())]] ^= change
    path = fresh(folder, bytes(damaged))
    inode = path.stat().st_ino
    try:
        use_everything(path)
    except EmbeddingError:
        pass
    else:
        assert path.stat().st_size >= len(sound())
    assert path.stat().st_ino == inode, "it was not recreated"


@pytest.mark.fault(106)
@settings(
    max_examples=settings.default.max_examples // 2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
@example(share=2.7e-5)
@example(share=1e-4)
@example(share=0.5)
def test_a_file_that_was_cut_off_does_not_start_a_new_budget(folder: Path, share: float) -> None:
    path = fresh(folder, sound()[: int((len(sound()) - 4096) * share)])
    size = path.stat().st_size
    with pytest.raises(StorageCorrupt) as corrupt:
        use_everything(path)
    assert "restore a copy" in str(corrupt.value)
    assert path.stat().st_size == size


@pytest.mark.fault(106)
@pytest.mark.parametrize("content", [b"hello, world\n" * 1000, b"\0" * 8192])
def test_a_file_of_something_else_is_left_alone(folder: Path, content: bytes) -> None:
    path = fresh(folder, content)
    with pytest.raises(StorageCorrupt, match="not recreated"):
        use_everything(path)
    assert path.read_bytes() == content


@pytest.mark.fault(107)
@pytest.mark.parametrize("log", ["-wal", "-journal"])
def test_a_log_without_its_file_is_not_taken_for_that_of_a_new_one(folder: Path, log: str) -> None:
    path = fresh(folder, b"")
    path.unlink()
    left = path.with_name(path.name + log)
    left.write_bytes(b"frames")
    with pytest.raises(StorageCorrupt, match="is gone but its log is not"):
        use_everything(path)
    assert not path.exists()
    left.write_bytes(b"")
    use_everything(path)


def fresh(folder: Path, content: bytes) -> Path:
    """The same name each time, so that left-over logs would be found out."""
    path = folder / "state.db"
    for old in folder.iterdir():
        old.unlink()
    path.write_bytes(content)
    return path


# Permissions


needs_other_user = pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX ones")
AS_NOBODY = """
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
"""
TRY = """
try:
    new_ledger(timeout=1).hold_and_send("s", Amount(tokens=1), day_limit(10))
    print("held")
except EmbeddingError as error:
    print(type(error).__name__, "|", error)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "home"
        folder.mkdir()
        Path(name).chmod(0o755)
        yield folder
        folder.chmod(0o755)


@needs_other_user
@pytest.mark.fault(101)
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_may_not_be_written(
    open_folder: Path, run_python: Callable[..., str], exists: bool
) -> None:
    path = open_folder / "state.db"
    if exists:
        run_python("new_ledger().record('s', Amount(tokens=1))", path=path)
        path.chmod(0o666)
    open_folder.chmod(0o555)
    said = run_python(AS_NOBODY + TRY, path=path)
    assert said.startswith("StorageReadOnly |")
    assert str(path) in said
    assert "EMBEDCORE_HOME" in said
    assert not exists or f"{open_folder} is read-only for this user" in said


@needs_other_user
@pytest.mark.fault(101)
def test_a_file_that_may_not_be_written(open_folder: Path, run_python: Callable[..., str]) -> None:
    path = open_folder / "state.db"
    run_python("new_ledger().record('s', Amount(tokens=1))", path=path)
    open_folder.chmod(0o777)
    path.chmod(0o444)
    said = run_python(AS_NOBODY + TRY, path=path)
    assert said.startswith(f"StorageReadOnly | {path} is read-only for this user. Change that")
    path.chmod(0o200)
    said = run_python(AS_NOBODY + TRY, path=path)
    assert said.startswith(f"StorageReadOnly | {path} cannot be read by this user")
    path.chmod(0o666)
    open_folder.chmod(0o600)
    said = run_python(AS_NOBODY + TRY, path=path)
    assert said.startswith(f"StorageReadOnly | {path} cannot be")


@pytest.mark.fault(101)
@pytest.mark.parametrize("what", ["folder", "below a file"])
def test_a_path_that_cannot_be_a_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "state.db"
    if what == "folder":
        path.mkdir()
    else:
        path.write_text("")
        path = path / "state.db"
    with pytest.raises(StorageError):
        use_everything(path)


# Disk full


FILE_SIZE = """
import resource
PART = Amount(tokens=10)
def total():
    with ledger.database.read() as connection:
        return tuple(connection.execute(
            "SELECT tokens_spent, tokens_held FROM window WHERE scope = 's' AND period = 'day'"
        ).fetchone())
def largest_file(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def largest_is_here():
    return max(path.stat().st_size for path in PATH.parent.iterdir())
ENGINE = sys.argv[2]
if ENGINE != "own":
    databases.engine_version = lambda: ENGINE
now = 1768478400.0
ledger = new_ledger(clock=lambda: now)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
@pytest.mark.fault(102)
@pytest.mark.fault(104)
@pytest.mark.parametrize("engine", ["own", "3.40.1"])
@pytest.mark.parametrize("step", ["hold", "send", "hold_and_send"])
def test_no_room_before_sending_means_nothing_is_sent(
    run_python: Callable[..., str], engine: str, step: str
) -> None:
    code = f"""
{FILE_SIZE}
grant = ledger.hold("s", Amount(tokens=10**6))
largest_file(largest_is_here() + 5000)
steps = 0
try:
    while True:
        before = total(), len(usage.audit(ledger))
        if "{step}" == "send":
            ledger.send(grant, PART)
        else:
            ledger.{step}("s", PART)
        steps += 1
except StorageFull as error:
    assert error.billed == "no", error.billed
    assert (total(), len(usage.audit(ledger))) == before
largest_file(resource.RLIM_INFINITY)
ledger.send(grant, PART)
print("ok", steps > 0)
"""
    assert run_python(code, engine).startswith("ok")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
@pytest.mark.fault(103)
@pytest.mark.fault(104)
@pytest.mark.parametrize("engine", ["own", "3.40.1"])
def test_no_room_to_settle_leaves_the_attempt_sent_and_charges_it_later(
    run_python: Callable[..., str], engine: str
) -> None:
    code = f"""
{FILE_SIZE}
attempts = [ledger.hold_and_send("s", PART) for _ in range(200)]
largest_file(4096)
for end in (ledger.settle, ledger.charge, ledger.give_back):
    try:
        end(attempts[0], *([PART] if end == ledger.settle else []))
        print("it was settled")
    except StorageFull:
        pass
largest_file(resource.RLIM_INFINITY)
assert usage.audit(ledger)[0]["state"] == "sent"
assert total() == (0, 2000), total()
now += 661
ledger.hold("t", Amount())
assert total() == (2000, 0), total()
ledger.settle(attempts[0], Amount(tokens=1))
print(*total())
"""
    assert run_python(code, engine) == "1991 0"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    point = tmp_path / "disk"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(point)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system here: {error}")
    yield point
    subprocess.run(["umount", str(point)], check=True)


@pytest.mark.fault(102)
@pytest.mark.fault(103)
def test_a_disk_that_fills_up_and_is_emptied_again(
    small_disk: Path, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger(small_disk / "state.db")
    attempts = [ledger.hold_and_send("s", TEN)]
    ballast = small_disk / "ballast"
    with pytest.raises(StorageFull):
        fill(ballast)
        while len(attempts) < 5000:
            attempts.append(ledger.hold_and_send("s", TEN))
    with pytest.raises(StorageFull):
        while attempts:
            ledger.settle(attempts[-1], TEN, close=True)
            attempts.pop()
    ballast.unlink()
    held = usage.of_scope(ledger, "s").held
    assert held == Amount(tokens=10 * len(attempts))
    for attempt in attempts:
        ledger.settle(attempt, TEN, close=True)
    assert usage.of_scope(ledger, "s").held == Amount()


@pytest.mark.fault(102)
@pytest.mark.parametrize("room", [0, 4096, 16384, 40960, 65536, 73728])
def test_a_disk_too_full_to_open_the_file(
    small_disk: Path, open_ledger: Callable[..., Ledger], room: int
) -> None:
    ballast = small_disk / "ballast"
    fill(ballast)
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - room)
    ledger = open_ledger(small_disk / "state.db")
    with pytest.raises(StorageFull):
        while True:
            ledger.hold("s", TEN)
    ballast.unlink()
    ledger.hold("s", TEN)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\1" * 4096)
        except OSError:
            os.fsync(file.fileno())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SQLITE_PROTOCOL", "StorageBusy"),
        ("SQLITE_BUSY_SNAPSHOT", "StorageBusy"),
        ("SQLITE_IOERR_SHMSIZE", "StorageFull"),
        ("SQLITE_FULL", "StorageFull"),
        ("SQLITE_READONLY_DBMOVED", "StorageCorrupt"),
        ("SQLITE_READONLY_DIRECTORY", "StorageReadOnly"),
        ("SQLITE_CORRUPT_INDEX", "StorageCorrupt"),
        ("SQLITE_NOTADB", "StorageCorrupt"),
        ("SQLITE_IOERR_READ", "StorageError"),
        ("", "StorageError"),
    ],
)
def test_errors_go_by_sqlites_names(name: str, expected: str) -> None:
    error = driver().OperationalError("said SQLite")
    error.sqlite_errorname = name
    translated = from_sqlite(error, Path("state.db"), SPENDING)
    assert type(translated).__name__ == expected
    assert "state.db" in str(translated)
