"""Which SQLite is this, and what do its errors mean?"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from embedcore.errors import (
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageReadOnly,
)
from embedcore.storage.crosscheck import held_differs
from embedcore.storage.filesystem import has_room

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path
    from types import ModuleType

_FIXED: Final = (((3, 51, 3), (4,)), ((3, 50, 7), (3, 51)), ((3, 44, 6), (3, 45)))

_NO_ROOM: Final = frozenset(
    {"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_SHMSIZE"}
)


class Contents(NamedTuple):
    """What a file holds, in the words of the errors about it.

    ``differs``: asked when it is opened, in a transaction; what is wrong in it, if anything.
    """

    what: str
    without: str
    loss: str
    differs: Callable[[sqlite3.Connection], str | None] | None = None


SPENDING: Final = Contents("a budget", "nothing spent", "reset the budget", held_differs)
VECTORS: Final = Contents("bought vectors", "no bought vectors", "have them bought again")
BATCH: Final = Contents("a batch", "no such batch", "lose the rows of the batch")


def driver() -> ModuleType:
    """The module that sqlite-utils chose: pysqlite3 where it is installed, else the standard one.

    Each has exception classes of its own, so nobody may import either directly.
    """
    from sqlite_utils.utils import sqlite3  # type: ignore[attr-defined]

    module: ModuleType = sqlite3
    return module


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


def from_os_error(error: OSError, path: Path) -> StorageError:
    """Why a file could not be prepared, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(f"no room for {path}: free some disk space ({error.strerror})")
    return StorageReadOnly(
        f"{path} cannot be written ({error.strerror}): set EMBEDCORE_HOME to a folder of yours"
    )


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
        return StorageReadOnly(f"{where} cannot be written: check its permissions ({error})")
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
        return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except (driver().Error, UnicodeDecodeError):
        return False
