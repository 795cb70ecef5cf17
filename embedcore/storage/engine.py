"""Which SQLite is this, and what do its errors mean?"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from embedcore.errors import (
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageReadOnly,
)

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path
    from types import ModuleType

_FIXED: Final = (((3, 51, 3), (4,)), ((3, 50, 7), (3, 51)), ((3, 44, 6), (3, 45)))


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


def from_sqlite(error: sqlite3.Error, path: Path | None) -> StorageError:
    """SQLite's own error as one of ours, by its name rather than its text."""
    name = getattr(error, "sqlite_errorname", "")
    where = str(path) if path else "the in-memory ledger"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageBusy(f"{where} stayed locked by another process: try again ({error})")
    if name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC"):
        return StorageFull(f"{where} cannot grow: free some disk space ({error})")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return StorageReadOnly(f"{where} cannot be written: check its permissions ({error})")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StorageCorrupt(
            f"{where} is damaged ({error}). It is not recreated, since that would reset the "
            f"budget. Repair it with: sqlite3 {where} .recover, or restore a copy"
        )
    return StorageError(f"{where}: {error}")
