"""How is the state file made, found, shared and kept from others?"""

from __future__ import annotations

import functools
import os
import pickle
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlite_utils
import sqlite_utils.plugins
from hypothesis import given, settings, strategies as st

from embedcore import forksafe
from embedcore.errors import (
    ConfigurationError,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageTooNew,
    UnsafeStorage,
)
from embedcore.storage import database as databases, filesystem, usage
from embedcore.storage.amounts import Amount
from embedcore.storage.database import Database, driver, engine_version, wal_is_safe
from embedcore.storage.filesystem import is_mount_point
from embedcore.storage.ledger import Ledger
from embedcore.storage.manifest import Manifest
from embedcore.storage.schema import (
    STATE,
    VECTOR_INDEX,
)

ONE = Amount(tokens=1)
OLD_ENGINE = "3.40.1"


def spent(ledger: Ledger) -> int:
    return usage.of_scope(ledger, "s").spent.tokens


# Where it is


@pytest.mark.fault(149)
@pytest.mark.parametrize(
    "name",
    ["a b.db", "a?mode=memory#c%20.db", "file:x?mode=memory", ":memory:", "é\n.db", b"\xff\xfe.db"],
)
@pytest.mark.parametrize("relative", [False, True])
def test_any_path_is_a_path(
    tmp_path: Path,
    open_ledger: Callable[..., Ledger],
    monkeypatch: pytest.MonkeyPatch,
    name: str | bytes,
    relative: bool,
) -> None:
    name = os.fsdecode(name)
    monkeypatch.chdir(tmp_path)
    path = Path(name) if relative else tmp_path / "a folder" / name
    open_ledger(path).record("s", ONE)
    assert path.stat().st_size > 0
    other = open_ledger(path)
    assert spent(other) == 1
    other.database.close()
    made = {entry.name.removesuffix("-wal").removesuffix("-shm") for entry in path.parent.iterdir()}
    assert made <= {name, "a folder"}


def test_the_program_may_change_its_directory(
    tmp_path: Path, open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = open_ledger(Path("state.db"))
    ledger.record("s", ONE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    ledger.record("s", ONE)
    ledger.database.close()
    assert spent(ledger) == 2


@pytest.mark.fault(137)
def test_only_its_owner_can_read_it(tmp_path: Path, open_ledger: Callable[..., Ledger]) -> None:
    umask = os.umask(0)
    try:
        ledger = open_ledger(tmp_path / "home" / "state.db")
        ledger.record("s", ONE)
    finally:
        os.umask(umask)
    files = list((tmp_path / "home").iterdir())
    assert {file.name for file in files} >= {"state.db"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700


def test_nothing_is_on_disk_before_the_first_use(
    state_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    ledger = open_ledger()
    assert not state_path.exists()
    ledger.database.open()
    assert [entry.name for entry in state_path.parent.glob("*.new*")] == []
    assert state_path.stat().st_size > 0


def test_a_ledger_in_memory_leaves_no_file(
    tmp_path: Path, open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = open_ledger(None)
    ledger.record("s", ONE)
    assert spent(ledger) == 1
    assert not list(tmp_path.iterdir())


# Which engine, which journal


@pytest.mark.fault(111)
@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ("3.6.23", False),
        ("3.40.1", False),
        ("3.44.5", False),
        ("3.44.6", True),
        ("3.44.10", True),
        ("3.45.0", False),
        ("3.50.6", False),
        ("3.50.7", True),
        ("3.51.0", False),
        ("3.51.2", False),
        ("3.51.3", True),
        ("3.52.0", True),
        ("3.53.4", True),
    ],
)
def test_wal_is_used_only_where_its_bug_is_fixed(version: str, safe: bool) -> None:
    assert wal_is_safe(version) is safe


@pytest.mark.fault(111)
def test_an_old_engine_uses_a_rollback_journal(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wal_is_safe(engine_version()):
        modern = open_ledger()
        modern.record("s", ONE)
        assert modern.database.journal_mode == "wal"
        modern.database.close()
    monkeypatch.setattr(databases, "engine_version", lambda: OLD_ENGINE)
    old = open_ledger()
    old.record("s", ONE)
    assert old.database.journal_mode == "truncate"
    with old.database.read() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2


@pytest.mark.fault(111)
@pytest.mark.skipif(not wal_is_safe(engine_version()), reason="this SQLite never uses WAL")
def test_an_old_engine_does_not_join_others_in_wal(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ledger().record("s", ONE)
    monkeypatch.setattr(databases, "engine_version", lambda: OLD_ENGINE)
    with pytest.raises(StorageBusy, match="WAL"):
        open_ledger(timeout=0.1).record("s", ONE)


@pytest.mark.fault(110)
@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "fuse.sshfs", "smb3", "ceph"])
def test_locks_of_a_network_file_system_are_not_trusted(
    tmp_path: Path,
    open_ledger: Callable[..., Ledger],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    home = tmp_path / "far away"
    fake_mounts(monkeypatch, tmp_path, home, kind)
    with pytest.raises(UnsafeStorage) as refused:
        open_ledger(home / "state.db").record("s", ONE)
    for told in (kind, "EMBEDCORE_HOME", "allow_network_filesystem"):
        assert told in str(refused.value)
    assert not (home / "state.db").exists()
    allowed = open_ledger(home / "state.db", allow_network_filesystem=True)
    allowed.record("s", ONE)
    assert allowed.database.journal_mode == "truncate"


@pytest.mark.fault(110)
@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "overlay", "fuseblk", "zfs"])
def test_a_local_file_system_below_a_network_mount_is_local(
    tmp_path: Path,
    open_ledger: Callable[..., Ledger],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    fake_mounts(monkeypatch, tmp_path, tmp_path, "nfs", also=(tmp_path / "here", kind))
    open_ledger(tmp_path / "here" / "state.db").record("s", ONE)
    with pytest.raises(UnsafeStorage):
        open_ledger(tmp_path / "hereabouts" / "state.db").record("s", ONE)


def fake_mounts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    point: Path,
    kind: str,
    also: tuple[Path, str] | None = None,
) -> None:
    lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw", "not a mount"]
    for where, what in [(point, kind), *([also] if also else [])]:
        escaped = str(where.resolve()).replace(" ", "\\040")
        lines.append(f"40 22 0:50 / {escaped} rw,relatime shared:9 - {what} server:/x rw")
    table = tmp_path / "mountinfo"
    table.write_text("\n".join(lines))
    found = functools.partial(filesystem.network_filesystem, mounts=table)
    monkeypatch.setattr(filesystem, "network_filesystem", found)


def test_without_a_mount_table_a_folder_counts_as_local(tmp_path: Path) -> None:
    assert filesystem.network_filesystem(tmp_path, mounts=tmp_path / "nothing") is None


def test_a_file_appears_even_where_there_are_no_hard_links(
    state_path: Path, open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    open_ledger().record("s", ONE)
    assert spent(open_ledger()) == 1


# Schema


@pytest.mark.fault(108)
def test_a_newer_schema_is_left_alone(state_path: Path, open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger()
    ledger.record("s", ONE)
    with ledger.database.transaction() as connection:
        connection.execute(f"PRAGMA user_version = {STATE.version + 1}")
    ledger.database.close()
    before = state_path.read_bytes()
    with pytest.raises(StorageTooNew, match="use a newer embedcore"):
        open_ledger().record("s", ONE)
    assert state_path.read_bytes() == before


def test_all_tables_are_strict_and_migrations_are_on_record(ledger: Ledger) -> None:
    with ledger.database.read() as connection:
        tables = connection.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main'"
            " AND name NOT LIKE 'sqlite%' AND name NOT LIKE '~_sqlite%' ESCAPE '~'"
        ).fetchall()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        names = connection.execute("SELECT name FROM _sqlite_migrations").fetchall()
    ledger_file = {"book", "window", "grant", "attempt", "warning", "rate"}
    batches = {"pool", "batch", "part", "item", "wish", "unread"}
    assert {name for name, _ in tables} == ledger_file | batches
    assert {strict for _, strict in tables} == {1}
    assert version == STATE.version == len(names)


@pytest.mark.fault(128)
def test_plugins_of_sqlite_utils_stay_outside(open_ledger: Callable[..., Ledger]) -> None:
    seen = []

    class Plugin:
        @sqlite_utils.hookimpl
        def prepare_connection(self, conn: Any) -> None:
            seen.append(conn)

    sqlite_utils.plugins.pm.register(Plugin(), name="nosy")
    try:
        sqlite_utils.Database(memory=True)
        assert len(seen) == 1, "the plugin works"
        ledger = open_ledger()
        ledger.record("s", ONE)
        usage.audit(ledger)
        assert len(seen) == 1
    finally:
        sqlite_utils.plugins.pm.unregister(name="nosy")


# Sharing it


@pytest.mark.fault(113)
def test_threads_never_share_a_transaction(ledger: Ledger) -> None:
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        try:
            with ledger.database.transaction() as connection:
                connection.execute("INSERT INTO book (id, zone, clock) VALUES (1, 'UTC', 0)")
                inside.set()
                go_on.wait(120)
                raise KeyError("rolled back")
        except KeyError:
            pass

    def second() -> None:
        ledger.record("s", ONE)
        seen.append(spent(ledger))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(120)
    threads[1].start()
    threads[1].join(0.1)
    assert not seen
    go_on.set()
    for thread in threads:
        thread.join()
    assert seen == [1], "the other thread's roll-back took nothing of this one's"


@pytest.mark.fault(113)
@pytest.mark.parametrize("engine", [None, OLD_ENGINE])
def test_opening_the_file_again_keeps_the_locks_of_the_first(
    open_ledger: Callable[..., Ledger],
    run_python: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    engine: str | None,
) -> None:
    """POSIX drops every lock of a process on a file when it closes any descriptor of it."""
    if engine:
        monkeypatch.setattr(databases, "engine_version", lambda: engine)
    first, second = open_ledger(), open_ledger(timeout=0)
    first.record("s", ONE)
    write = f"""
databases.engine_version = lambda: {engine or engine_version()!r}
try:
    new_ledger(timeout=0.2).record("s", Amount(tokens=1))
except StorageBusy:
    print("busy")
"""
    with first.database.transaction():
        try:
            second.database.open()
        except StorageBusy:
            assert engine
        assert run_python(write) == "busy"
    assert run_python(write) == ""
    assert usage.of_scope(first, "s", "total").spent.tokens == 2


@pytest.mark.fault(121)
def test_no_read_leaves_the_log_blocked(open_ledger: Callable[..., Ledger], ledger: Ledger) -> None:
    for number in range(20):
        ledger.settle(ledger.hold_and_send("s", ONE, model=f"m{number}"), ONE, close=True)
    kept = [
        usage.windows_now(ledger),
        usage.by_model(ledger),
        usage.audit(ledger),
        usage.of_scope(ledger, "s"),
        usage.limits_now(ledger, "s", [], "all"),
    ]
    assert not any(isinstance(one, Iterator) for one in kept)
    if ledger.database.journal_mode != "wal":
        pytest.skip("no log to block: this SQLite does not use WAL")
    with open_ledger().database._exclusive() as connection:
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


@pytest.mark.fault(105)
def test_a_lock_that_outlasts_the_time_out_is_an_error_worth_a_retry(
    open_ledger: Callable[..., Ledger],
) -> None:
    holder, other = open_ledger(), open_ledger(timeout=0.1)
    other.database.open()
    with holder.database.transaction(), pytest.raises(StorageBusy) as busy:
        other.hold_and_send("s", ONE)
    assert busy.value.retryable
    assert busy.value.billed == "no"
    assert usage.audit(other) == []


@pytest.mark.fault(107)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_gone_or_another_is_noticed_before_anything_is_held(
    state_path: Path, open_ledger: Callable[..., Ledger], replaced: bool
) -> None:
    ledger = open_ledger()
    ledger.record("s", ONE)
    state_path.rename(state_path.with_suffix(".old"))
    if replaced:
        open_ledger(state_path.with_suffix(".new")).record("s", ONE)
        state_path.with_suffix(".new").rename(state_path)
    with pytest.raises(StorageCorrupt, match="deleted or replaced"):
        ledger.hold("s", ONE)
    assert state_path.exists() is replaced


@pytest.mark.case("C2")
@pytest.mark.fault(107)
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("end", ["-wal", "-shm"])
def test_the_log_is_watched_as_well(
    state_path: Path, open_ledger: Callable[..., Ledger], end: str, replaced: bool
) -> None:
    """Whoever lost its locks deletes it under the hands of others, who would write to nothing."""
    ledger = open_ledger()
    ledger.record("s", ONE)
    if ledger.database.journal_mode != "wal":
        pytest.skip("no log to watch: this SQLite does not use WAL")
    log = state_path.with_name(f"state.db{end}")
    old = log.rename(f"{log}.old")
    if replaced:
        log.write_bytes(old.read_bytes())
    for spend in (ledger.hold, ledger.hold_and_send):
        with pytest.raises(StorageCorrupt, match=f"{log.name} was deleted or replaced"):
            spend("s", ONE)
    with pytest.raises(StorageCorrupt), ledger.database.read():
        pass


@pytest.mark.case("C2")
def test_a_log_that_goes_in_the_middle_of_a_transaction_ends_it(
    state_path: Path, ledger: Ledger
) -> None:
    ledger.record("s", ONE)
    if ledger.database.journal_mode != "wal":
        pytest.skip("no log to watch: this SQLite does not use WAL")
    with (
        pytest.raises(StorageCorrupt, match="deleted or replaced"),
        ledger.database.transaction() as connection,
    ):
        connection.execute("UPDATE window SET requests = requests + 100")
        state_path.with_name("state.db-wal").unlink()


def test_the_log_lies_beside_the_file_that_a_link_leads_to(
    tmp_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    (tmp_path / "real").mkdir()
    open_ledger(tmp_path / "real" / "state.db").record("s", ONE)
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "state.db")
    linked = open_ledger(tmp_path / "link.db")
    linked.record("s", ONE)
    assert len(linked.database._files) in (2, 4)
    assert usage.of_scope(open_ledger(tmp_path / "real" / "state.db"), "s").spent.tokens == 2


OPENERS: dict[str, Callable[[Path], Database]] = {
    "state": lambda path: Database(path, STATE),
    "vectors": lambda path: Database(path, VECTOR_INDEX, contents=databases.VECTORS),
    "batch": lambda path: Manifest(path).database,
}


@pytest.mark.case("C5")
@pytest.mark.parametrize("what", OPENERS)
def test_a_file_with_two_names_is_refused(tmp_path: Path, what: str) -> None:
    """Each name has a log of its own, so that two programs would not see each other."""
    path, other = tmp_path / "a.db", tmp_path / "other" / "b.db"
    other.parent.mkdir()
    database = OPENERS[what](path)
    database.open()
    database.close()
    other.hardlink_to(path)
    for place in (path, other):
        with pytest.raises(UnsafeStorage, match="several names") as refused:
            OPENERS[what](place).open()
        assert refused.value.reason == "links"
    other.unlink()
    database.open()
    other.hardlink_to(path)
    with pytest.raises(UnsafeStorage, match="several names"), database.transaction():
        pass
    other.unlink()
    database.open()
    database.close()


@pytest.mark.case("C5")
@pytest.mark.parametrize("what", OPENERS)
def test_a_file_that_was_moved_and_linked_while_it_was_open_is_used_by_nobody(
    tmp_path: Path, what: str
) -> None:
    """Who opens it through the link would have another log than who had it open before."""
    path, moved = tmp_path / "a.db", tmp_path / "other" / "a.db"
    moved.parent.mkdir()
    before = OPENERS[what](path)
    before.open()
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(StorageCorrupt, match="deleted or replaced"), before.transaction():
        pass
    log = path.with_name("a.db-wal")
    if log.exists() and log.stat().st_size:
        with pytest.raises(StorageCorrupt, match="its log was not"):
            OPENERS[what](path).open()
    before.close()
    log.unlink(missing_ok=True)
    path.with_name("a.db-shm").unlink(missing_ok=True)
    OPENERS[what](path).open()


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        # Names of sockets are short.
        os.chdir(path.parent)
        made.bind(path.name)
        os.chdir(here)


WRONG_KINDS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "folder": (Path.mkdir, StorageError, "is a folder, and .* needs a file of that name"),
    "pipe": (os.mkfifo, StorageError, "is a pipe, and"),
    "socket": (a_socket, StorageError, "is a socket, and"),
    "device": (lambda path: path.symlink_to("/dev/null"), StorageError, "is a device, and"),
    "dangling": (
        lambda path: path.symlink_to("gone.db"),
        StorageCorrupt,
        "is a link to gone.db, where there is nothing. .*delete the link",
    ),
    "circle": (
        lambda path: path.symlink_to(path.name),
        StorageCorrupt,
        "is a link that leads back to itself",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="these are POSIX kinds")
@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("kind", WRONG_KINDS)
@pytest.mark.parametrize("what", OPENERS)
def test_what_is_no_file_is_named_as_what_it_is(
    tmp_path: Path, what: str, kind: str, end: str
) -> None:
    path = tmp_path / "a.db"
    if end:
        database = OPENERS[what](path)
        database.open()
        database.close()
    wrong = path.with_name(f"a.db{end}")
    make, error, said = WRONG_KINDS[kind]
    make(wrong)
    # Without the time at which a link was followed.
    before = wrong.lstat()[:7], wrong.lstat().st_mtime_ns
    with pytest.raises(StorageError, match=f"{wrong.name} {said}") as refused:
        OPENERS[what](path).open()
    assert type(refused.value) is error
    assert (wrong.lstat()[:7], wrong.lstat().st_mtime_ns) == before
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(StorageError, match=r"state is no folder\. Move it away"):
        OPENERS["state"](tmp_path / "state" / "deeper" / "a.db").open()


@pytest.mark.case("C5")
def test_a_name_that_its_maker_left_behind_is_no_second_one(
    state_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    """Killed at the wrong moment, or a moment before it would have removed it."""
    open_ledger().record("s", ONE)
    draft = state_path.with_name(".0123456789abcdef.new")
    draft.hardlink_to(state_path)
    stranger = state_path.with_name(".fedcba9876543210.new")
    stranger.touch()
    open_ledger().record("s", ONE)
    assert not draft.exists()
    assert stranger.exists()


@pytest.mark.case("C5")
def test_a_file_that_was_mounted_alone_is_refused(
    state_path: Path, open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log would stay in the container."""
    open_ledger().record("s", ONE)
    table = state_path.with_name("mounts")
    name = str(state_path).replace(" ", "\\040")
    table.write_text(f"1 2 0:1 / / rw - ext4 /dev/a rw\n3 2 0:1 /x {name} rw - ext4 /dev/a rw\n")
    found = functools.partial(is_mount_point, mounts=table)
    monkeypatch.setattr(filesystem, "is_mount_point", found)
    with pytest.raises(UnsafeStorage, match="mount the whole folder"):
        open_ledger().database.open()
    assert not found(state_path.with_name("other.db"))
    assert not is_mount_point(state_path, mounts=table.with_name("none"))


# What is put into it


texts = st.text(max_size=30) | st.sampled_from(
    ["'; DROP TABLE attempt; --", '"', "\0", "*", "1,2) OR (1", "%s{}?", "\ud800", "Ünïcødé"]
)


@pytest.mark.fault(138)
@settings(max_examples=settings.default.max_examples // 2)
@given(scope=texts, model=texts, note=texts)
def test_names_are_only_ever_values(scope: str, model: str, note: str) -> None:
    ledger = Ledger(Database(None, STATE))
    ledger.record("bystander", ONE, model="m")
    try:
        attempt = ledger.hold_and_send(scope, ONE, model=model)
    except ConfigurationError:
        with pytest.raises(UnicodeEncodeError):
            (scope + model).encode()
    else:
        ledger.settle(attempt, ONE, request_id=note, close=True)
        ledger.charge(ledger.hold_and_send(scope, ONE, model=model), note=note, request_id=note)
        ledger.reset(scope)
        rows = [row for row in usage.audit(ledger) if row["scope"] == scope]
        assert [row["model"] for row in rows] == [model, model, ""]
        storable = note.encode("utf-8", "backslashreplace").decode()
        assert rows[0]["request_id"] == rows[1]["note"] == storable
        assert usage.of_scope(ledger, scope, "month").spent.tokens == 2 + (scope == "*")
    assert usage.of_scope(ledger, "bystander").spent == ONE


def test_a_database_is_not_pickled(ledger: Ledger) -> None:
    with pytest.raises(TypeError, match="pickle its path"):
        pickle.dumps(ledger.database)


def test_closing_twice_and_using_again(ledger: Ledger) -> None:
    ledger.record("s", ONE)
    ledger.database.close()
    ledger.database.close()
    ledger.record("s", ONE)
    assert spent(ledger) == 2


def test_the_driver_is_the_one_that_sqlite_utils_chose():
    assert driver() is sqlite_utils.utils.sqlite3


def test_errors_of_the_driver_in_use_are_the_ones_translated(ledger: Ledger) -> None:
    with pytest.raises(Exception, match="no such table") as failed, ledger.database.read() as open_:
        open_.execute("SELECT * FROM nowhere")
    assert isinstance(failed.value.__cause__, driver().OperationalError)


def test_transactions_do_not_nest(open_ledger: Callable[..., Ledger]) -> None:
    database = open_ledger().database
    with database.transaction(), pytest.raises(RuntimeError), database.read():
        raise AssertionError("it was let in")


def test_a_transaction_lets_a_fork_that_is_near_pass(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_ledger().database
    database.open()
    waited: list[float] = []
    monkeypatch.setattr(forksafe.forking, "is_near", True)
    monkeypatch.setattr(forksafe.forking, "passed", SimpleNamespace(wait=waited.append))
    with database.read():
        assert waited == [forksafe.WAIT_SECONDS]
