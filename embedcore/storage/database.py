"""SQLite files: one connection per process, transactions, and what is checked before either.

One connection for each process, one transaction at a time on it, and every write starts with
``BEGIN IMMEDIATE``: a deferred transaction that reads before it writes fails at once when another
process has written meanwhile, whatever the time-out.

Before a fork the connection is closed, and both sides open their own. SQLite keeps a table of the
locks that its process has on a file. In a child that table says that they are held, and they are
not: the process that closes the file last deletes the log while the child uses it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from embedcore.errors import (
    ConfigurationError,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageReadOnly,
    StorageTooNew,
    UnsafeStorage,
)
from embedcore.forksafe import Lock, forking, keep_for_ever, process
from embedcore.storage.crosscheck import held_differs
from embedcore.storage.filesystem import (
    Contents,
    from_os_error,
    has_room,
    is_open_here,
    refused_access,
    require_file,
    require_place,
    several_names,
)

if TYPE_CHECKING:
    import sqlite3
    from types import ModuleType

    from sqlite_utils import Database as SqliteUtils

    from embedcore.storage.schema import Schema


_FIXED: Final = (((3, 51, 3), (4,)), ((3, 50, 7), (3, 51)), ((3, 44, 6), (3, 45)))

_NO_ROOM: Final = frozenset(
    {"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_SHMSIZE"}
)


class Identity(NamedTuple):
    """Which file it is, by whatever name, and how many names it has."""

    device: int
    number: int
    names: int


def identity_of(path: str | Path, *, links: bool = True) -> Identity | None:
    """None if there is no such file. ``links``: followed."""
    try:
        found = os.stat(path, follow_symlinks=links)  # noqa: PTH116 - in every transaction
    except OSError:
        return None
    return Identity(found.st_dev, found.st_ino, found.st_nlink)


class Changes(NamedTuple):
    """Equal at two moments: no other connection has committed anything between them."""

    connection: int
    version: int


SPENDING: Final = Contents("a budget", "nothing spent", "reset the budget", held_differs)
VECTORS: Final = Contents("cached vectors", "no cached vectors", "have them embedded again")
BATCH: Final = Contents("a batch", "no such batch", "lose the rows of the batch")


@cache
def driver() -> ModuleType:
    """pysqlite3 where it is installed, else the standard module: as sqlite-utils chooses.

    Each has exception classes of its own, so no module may import either directly.
    """
    try:
        return import_module("pysqlite3")
    except ImportError:
        return import_module("sqlite3")


def engine_version() -> str:
    """The version of the SQLite library behind ``driver``."""
    return str(driver().sqlite_version)


def wal_is_safe(version: str) -> bool:
    """Whether this SQLite is free of the WAL-reset bug.

    From 3.7.0 to 3.51.2 two connections that write and checkpoint at once can corrupt a WAL
    database; fixed in 3.51.3, 3.50.7 and 3.44.6 (sqlite.org/wal.html, "The WAL-reset bug").
    """
    parts = tuple(int(part) for part in version.split("."))
    return any(first <= parts < end for first, end in _FIXED)


def from_sqlite(error: sqlite3.Error, path: Path | None, contents: Contents) -> StorageError:
    """SQLite's own error as one of ours, by its name rather than its text."""
    name = getattr(error, "sqlite_errorname", "")
    where = str(path) if path else "the in-memory ledger"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
        return StorageBusy(f"{where} stayed locked by another process: try again ({error})")
    # pysqlite3 does not say which input or output failed.
    if name in _NO_ROOM or (name == "SQLITE_IOERR" and path and not has_room(path)):
        return StorageFull(f"{where} cannot grow: free some disk space ({error})")
    if name == "SQLITE_READONLY_DBMOVED":
        return StorageCorrupt(f"{where} was deleted or replaced while it was open: restore it")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        why = None if path is None else refused_access(path)
        return StorageReadOnly(
            f"{where} {why or 'cannot be written: check its permissions'} ({error}). Change that, "
            "or set EMBEDCORE_HOME to a folder of yours"
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return damaged(error, path, contents)
    return StorageError(f"{where}: {error}")


def damaged(error: Exception, path: Path | None, contents: Contents) -> StorageCorrupt:
    """The file cannot be read as what it should be."""
    return StorageCorrupt(
        f"{path} is damaged ({error}). It is not recreated, since that would {contents.loss}. "
        f"Repair it with: sqlite3 {path} .recover, or restore a copy"
    )


def is_sound(connection: sqlite3.Connection) -> bool:
    """Whether SQLite finds no damage; takes as long as reading the whole file."""
    try:
        return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except (driver().Error, UnicodeDecodeError):
        return False


# Under load from 64 processes SQLite's busy handler was seen to starve one of them for up to 40 s.
BUSY_TIMEOUT_SECONDS = 60.0


def _busy_timeout(seconds: float) -> str:
    return f"PRAGMA busy_timeout={round(seconds * 1000)}"


# Files that were open at a fork, in this process and its forefathers: SQLite's table of locks has
# them for as long as the process lives. By identity, and by path where none was known yet.
_unsafe: set[tuple[int, int] | str] = set()


class Database:
    """A state file, opened at its first use.

    ``path`` None keeps everything in memory. Safe to share between threads, and across a fork:
    where one could not be prepared for, the child gets ``UnsafeStorage``. ``creates``: whether a
    file that is not there is made. ``is_durable``: what is committed survives the machine's end.
    Every error is a ``StorageError``, save for a name that is no
    Unicode text: that is a ``ConfigurationError``.
    Transactions and reads do not nest.
    """

    def __init__(
        self,
        path: Path | None,
        schema: Schema,
        *,
        timeout: float = BUSY_TIMEOUT_SECONDS,
        allow_network_filesystem: bool = False,
        at_creation: Sequence[str] = (),
        contents: Contents = SPENDING,
        creates: bool = True,
        is_durable: bool = True,
    ) -> None:
        # The program may change its directory while the file is open.
        self.path = path and path.absolute()
        self._schema = schema
        self._timeout = timeout
        self._allow_network_filesystem = allow_network_filesystem
        self._at_creation, self._contents = at_creation, contents
        self._creates, self._is_durable = creates, is_durable
        self._lock = Lock(self)
        self._connection: sqlite3.Connection | None = None
        self._opened = 0
        # While it is open: the file, and in WAL mode its log and the log's index.
        self._files: dict[str, Identity] = {}
        # Closed for a fork only: it must be the same when it is opened again.
        self._expected: Identity | None = None
        self._is_opening = self._is_lost = self._has_log = False
        self._beside = ""

    def open(self) -> None:
        """Open the file now instead of at the first transaction."""
        with self.read():
            pass

    @property
    def _synchronous(self) -> str:
        return f"PRAGMA synchronous={'FULL' if self._is_durable else 'OFF'}"

    @property
    def journal_mode(self) -> str:
        with self.read() as connection:
            return self._ask_journal(connection)

    @contextlib.contextmanager
    def transaction(
        self, *, durable: bool = True, within: float | None = None
    ) -> Iterator[sqlite3.Connection]:
        """A write transaction: committed at the end of the block, rolled back if it raises.

        ``durable``: on the disk by then. Else a power failure may take it back, and nothing more.
        ``within``: seconds for which it is waited for other threads, and for other processes, at
        most; None: as long as the file was opened for.
        """
        with self._exclusive(within) as connection, self._translated(connection):
            here = os.getpid()
            # Without a log the whole file could be lost.
            hurried = not durable and self._is_durable and self._has_log
            try:
                if hurried:
                    connection.execute("PRAGMA synchronous=NORMAL")
                if within is not None:
                    connection.execute(_busy_timeout(within))
                connection.execute("BEGIN IMMEDIATE")
                self._check_still_the_same_files()
                yield connection
                self._check_still_the_same_process(here)
                self._check_still_the_same_files()
                connection.execute("COMMIT")
            except BaseException:
                if os.getpid() == here and connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            finally:
                if hurried and os.getpid() == here:
                    connection.execute("PRAGMA synchronous=FULL")
                if within is not None and os.getpid() == here:
                    connection.execute(_busy_timeout(self._timeout))

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A consistent view for the length of the block, without the write lock."""
        with self._exclusive() as connection, self._translated(connection):
            here = os.getpid()
            self._check_still_the_same_files()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                if os.getpid() == here and connection.in_transaction:
                    connection.execute("ROLLBACK")

    def changes(self, connection: sqlite3.Connection) -> Changes:
        """What others have changed until now, as ``transaction`` or ``read`` sees it."""
        return Changes(self._opened, connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        with self._lock:
            connection, self._connection = self._connection, None
            self._files, self._expected = {}, None
            if connection is not None:
                connection.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Database holds a connection: pickle its path instead")

    @contextlib.contextmanager
    def _exclusive(self, within: float | None = None) -> Iterator[sqlite3.Connection]:
        # Before the lock: the child of a signal handler may have been forked while this very thread
        # held it. And only then, since to look at the file takes longer than a lock.
        if os.getpid() != forking.process:
            process()
        if _unsafe or self._is_lost:
            self._check_fork_was_safe()
        lock = self._lock
        if forking.is_near or lock.is_mine():
            lock.approach()
        if not lock.acquire(timeout=-1 if within is None else within):
            raise StorageBusy(f"{self.path} is in use by another thread: try again")
        try:
            if self._connection is None:
                self._connection = self._connect()
            yield self._connection
        finally:
            lock.release()

    # Before a fork, and in the child

    def rest(self) -> None:
        """Close the file, and remember which it was. What is only in memory stays."""
        if self.path is not None and self._connection is not None:
            self._connection.close()
            self._connection = None
            self._expected, self._files = self._files[str(self.path)], {}

    def is_at_rest(self) -> bool:
        """Whether nothing in this process has the file open: a cursor that outlived its connection,
        or the program itself, would be in SQLite's table of locks as well."""
        if self.path is None or self._expected is None:
            return self.path is None or self._connection is None
        return not is_open_here(self._expected.device, self._expected.number)

    def forked(self, *, at_rest: bool) -> None:
        """What was open is neither used nor closed here, not even at the end of the program."""
        if at_rest:
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            keep_for_ever(connection)
        if self.path is None:
            self._is_lost = True
            return
        known = self._files.pop(str(self.path), self._expected)
        if known is not None:
            _unsafe.add((known.device, known.number))
        if self._is_opening:
            _unsafe.add(os.path.realpath(self.path))

    def _check_fork_was_safe(self) -> None:
        path = self.path
        if path is None:
            is_safe = not self._is_lost
        else:
            now = identity_of(path)
            known = os.path.realpath(path) if now is None else (now.device, now.number)
            is_safe = _unsafe.isdisjoint((known, os.path.realpath(path)))
        if not is_safe:
            raise UnsafeStorage(
                f"{path or 'the in-memory ledger'} was in use when this process was forked off, "
                "and SQLite's locks do not survive that: nothing was sent. Start processes with "
                'multiprocessing.set_start_method("spawn") or "forkserver", or fork before '
                "anything is embedded",
                reason="fork",
            )

    def _check_still_the_same_process(self, here: int) -> None:
        # A signal handler forked in the middle of it: the transaction is the parent's.
        if os.getpid() != here:
            self._check_fork_was_safe()

    def _connect(self) -> sqlite3.Connection:
        with self._translated():
            self._check_fork_was_safe()
            self._is_opening = True
            self._opened += 1
            try:
                target = ":memory:" if self.path is None else self._prepare_file(self.path)
                connection: sqlite3.Connection = driver().connect(
                    target, timeout=self._timeout, isolation_level=None, check_same_thread=False
                )
                try:
                    # Columns are read by their names.
                    connection.row_factory = driver().Row
                    self._configure(connection)
                    self._migrate(connection)
                    self._compare(connection)
                    self._recognise_files(connection)
                except BaseException:
                    connection.close()
                    raise
            finally:
                self._is_opening = False
            return connection

    def _prepare_file(self, path: Path) -> str:
        try:
            require_place(path, self._contents, network=self._allow_network_filesystem)
            if self._expected is not None:
                self._check_same(str(path), self._expected)
            fill = self._fill if self._creates else None
            require_file(path, self._contents, fill)
        except OSError as error:
            raise from_os_error(error, path) from error
        return os.fspath(path)

    def _recognise_files(self, connection: sqlite3.Connection) -> None:
        if self.path is None:
            return
        # The log lies beside the file that a link leads to. Where that file is moved, and a
        # link left in its place, it has another log for those who open it from now on.
        beside = os.path.realpath(self.path)
        names = [str(self.path), beside]
        self._has_log = self._ask_journal(connection) == "wal"
        if self._has_log:
            # No process deletes these while this connection is open, unless locks were lost.
            names += [f"{beside}-wal", f"{beside}-shm"]
        self._beside = beside
        found = {name: self._identity_now(name) for name in names}
        self._files = {name: known for name, known in found.items() if known is not None}
        self._expected = None

    def _fill(self, draft: Path) -> None:
        connection: sqlite3.Connection = driver().connect(draft, isolation_level=None)
        try:
            connection.row_factory = driver().Row
            connection.execute(self._synchronous)
            for pragma in self._at_creation:
                connection.execute(f"PRAGMA {pragma}")
            self._migrate(connection)
        finally:
            connection.close()

    def _configure(self, connection: sqlite3.Connection) -> None:
        connection.execute(self._synchronous)
        if self.path is None:
            return
        safe = wal_is_safe(engine_version()) and not self._allow_network_filesystem
        wanted, current = ("wal" if safe else "truncate"), self._ask_journal(connection)
        if current == wanted:
            return
        got = self._set_journal(connection, wanted)
        if got == "wal" and not safe:
            raise StorageBusy(
                f"{self.path} is in use by a program whose SQLite writes WAL, which this SQLite "
                f"({engine_version()}) must not: stop it first, or install pysqlite3 here"
            )

    def _ask_journal(self, connection: sqlite3.Connection) -> str:
        return str(connection.execute("PRAGMA journal_mode").fetchone()[0])

    def _set_journal(self, connection: sqlite3.Connection, mode: str) -> str:
        try:
            return str(connection.execute(f"PRAGMA journal_mode={mode}").fetchone()[0])
        except driver().OperationalError as error:
            # Others have it open; a rollback journal is correct for every process, only slower.
            if "BUSY" not in error.sqlite_errorname and "LOCKED" not in error.sqlite_errorname:
                raise
            return self._ask_journal(connection)

    def _migrate(self, connection: sqlite3.Connection) -> None:
        found, known = self._user_version(connection), self._schema.version
        if found == known:
            return
        # The set of pending migrations is only true under the write lock: another process may be
        # opening the file for the first time as well.
        try:
            connection.execute("BEGIN IMMEDIATE")
            found = self._user_version(connection)
            if found > known:
                raise StorageTooNew(
                    f"{self.path} has schema {found}, this embedcore knows up to {known}: use a "
                    "newer embedcore, or set EMBEDCORE_HOME to another folder"
                )
            if found < known:
                self._schema.apply(self.utilities(connection))
                connection.execute(f"PRAGMA user_version={known}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _compare(self, connection: sqlite3.Connection) -> None:
        """Whether the contents agree with themselves, as far as that is found out quickly."""
        differs = self._contents.differs
        if differs is None or self.path is None:
            return
        with self._translated(connection):
            connection.execute("BEGIN")
            try:
                found = differs(connection)
            finally:
                connection.execute("ROLLBACK")
        if found is not None:
            raise StorageCorrupt(f"{self.path}: {found}")

    def _user_version(self, connection: sqlite3.Connection) -> int:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])

    def utilities(self, connection: sqlite3.Connection) -> SqliteUtils:
        """The sqlite-utils view of a connection that ``transaction`` or ``read`` handed out."""
        from sqlite_utils import Database as SqliteUtils

        # Other people's sqlite-utils plugins have no business in the ledger.
        return SqliteUtils(connection, execute_plugins=False, recursive_triggers=False)

    def _check_still_the_same_files(self) -> None:
        for name, known in self._files.items():
            self._check_same(name, known)

    def _identity_now(self, name: str) -> Identity | None:
        return identity_of(name, links=name != self._beside)

    def _check_same(self, name: str, known: Identity) -> None:
        now = self._identity_now(name)
        if now == known:
            return
        if now is not None and (now.device, now.number) == (known.device, known.number):
            raise several_names(self.path or name)
        raise StorageCorrupt(
            f"{name} was deleted or replaced while it was open. Stop every program that uses it, "
            f"and restore it if you can; a new one starts with {self._contents.without}. Then "
            "start this program again"
        )

    @contextlib.contextmanager
    def _translated(self, connection: sqlite3.Connection | None = None) -> Iterator[None]:
        try:
            yield
        except driver().Error as error:
            raise from_sqlite(error, self.path, self._contents) from error
        except UnicodeDecodeError as error:
            # The driver's own messages quote what is in a damaged file.
            raise damaged(error, self.path, self._contents) from error
        except UnicodeEncodeError as error:
            raise ConfigurationError(
                f"{error.object!r} cannot be stored: it is not valid Unicode text"
            ) from error
        except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
            # A damaged file can hold what its columns forbid, such as NULL for a number.
            if connection is None or is_sound(connection):
                raise
            raise damaged(error, self.path, self._contents) from error
