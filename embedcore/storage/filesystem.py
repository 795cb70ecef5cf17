"""State files in the file system: where they may be, what is at their path, how they come to be."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from embedcore.errors import (
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageReadOnly,
    UnsafeStorage,
)

if TYPE_CHECKING:
    import sqlite3

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "lustre"}
    | {"glusterfs", "beegfs", "gpfs", "davfs", "ncpfs", "webdav", "afpfs"}
)
# SQLite takes this much at once, for the index of its log.
_ROOM = 32 * 1024
_MOUNTS = Path("/proc/self/mountinfo")
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
_LOGS: Final = ("-wal", "-shm", "-journal")


class Contents(NamedTuple):
    """What a file holds, in the words of the errors about it.

    ``differs``: asked when it is opened, in a transaction; what is wrong in it, if anything.
    """

    what: str
    without: str
    loss: str
    differs: Callable[[sqlite3.Connection], str | None] | None = None


def require_place(path: Path, contents: Contents, *, network: bool) -> None:
    """A folder for the file, on a disk of this machine unless ``network``, and nothing else of its
    name or of those of its logs. Raises ``StorageError`` and ``OSError``."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    kind = None if network else network_filesystem(path.parent)
    if kind is not None:
        raise UnsafeStorage(
            f"{path} is on a network file system ({kind}), where file locks cannot be "
            f"trusted with {contents.what}: set EMBEDCORE_HOME to a local folder, or "
            "allow_network_filesystem = true if only one machine uses it",
            reason="network",
        )
    for one in (path, *(path.with_name(path.name + end) for end in _LOGS)):
        wrong = in_the_way(one)
        if wrong is None:
            continue
        if not os.path.exists(one):  # noqa: PTH110 - also for links in a circle
            raise StorageCorrupt(
                f"{one} {wrong}. It is not recreated, since that would {contents.loss}. "
                f"Restore the file, or delete the link to start with {contents.without}"
            )
        raise StorageError(
            f"{one} {wrong}, and {contents.what} needs a file of that name. Move it "
            "away, or set EMBEDCORE_HOME to another folder"
        )


def require_file(path: Path, contents: Contents, fill: Callable[[Path], None] | None) -> None:
    """The file itself, whole, under one name and for this user to write; ``fill`` fills a new one.

    ``fill`` None: none is made. Raises ``StorageError`` and ``OSError``.
    """
    _require_whole(path, contents)
    if not path.exists():
        if fill is None:
            raise StorageError(f"{path} is not there any more")
        place_once(path, fill)
    refused = refused_access(path)
    if refused is not None and not os.access(path, os.R_OK | os.W_OK):
        raise StorageReadOnly(
            f"{path} {refused}. Change that, or set EMBEDCORE_HOME to a folder of yours"
        )
    if other_names(path) or is_mount_point(path):
        raise several_names(path)


def _require_whole(path: Path, contents: Contents) -> None:
    # Files come into being whole: an empty one was cut off, and beside a missing one SQLite
    # would take the old log for the log of the new file.
    logs = [path.with_name(path.name + end) for end in ("-wal", "-journal")]
    left = [log for log in logs if size_of(log)]
    if left and path.is_symlink():
        raise StorageCorrupt(
            f"{path} leads to {path.resolve()}, but {left[0]} lies beside the link: the file "
            "was moved and its log was not. Stop every program that uses it, and move the log "
            f"beside the file, as {path.resolve()}{left[0].name.removeprefix(path.name)}"
        )
    size = size_of(path)
    # SQLite takes a file of a single byte for an empty one.
    if (size or 0) > 1 or (size is None and not left):
        return
    what, which = ("is gone but its log is not", left[0]) if size is None else ("is empty", path)
    raise StorageCorrupt(
        f"{path} {what}: restore a copy, or delete {which} to start with {contents.without}"
    )


def several_names(path: Path | str) -> UnsafeStorage:
    """The error about a file that has them."""
    return UnsafeStorage(
        f"{path} is one file under several names (hard links, or a mount of this file "
        "alone). Its log lies beside one of them, so that programs which use different names "
        "do not see each other. Nothing was sent. Delete the other names "
        f"(find / -samefile {path} shows them), or mount the whole folder",
        reason="links",
    )


def from_os_error(error: OSError, path: Path) -> StorageError:
    """Why a file could not be prepared, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(f"no room for {path}: free some disk space ({error.strerror})")
    blocked = no_folder(path)
    if blocked is not None:
        return StorageReadOnly(
            f"{path} cannot be written: {blocked} is no folder. Move it away, or set "
            "EMBEDCORE_HOME to a folder of yours"
        )
    return StorageReadOnly(
        f"{path} cannot be written ({error.strerror}): set EMBEDCORE_HOME to a folder of yours"
    )


def network_filesystem(folder: Path, *, mounts: Path = _MOUNTS) -> str | None:
    """The kind of network file system that holds ``folder``, or None for a local one.

    Read from the mount table on Linux. Elsewhere only a Windows UNC path is recognised: neither
    Python nor its standard library tells more there.
    """
    if sys.platform == "win32":
        return "UNC share" if str(folder.resolve()).startswith("\\\\") else None
    try:
        table = mounts.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    kind = _kind_of(str(folder.resolve()), table)
    if kind in _NETWORK or kind.startswith("fuse.") or kind == "fuse":
        return kind
    return None


def is_mount_point(path: Path, *, mounts: Path = _MOUNTS) -> bool:
    """Whether this very file was mounted, apart from its folder. Known on Linux only."""
    try:
        table = mounts.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    name = os.path.realpath(path)
    points = (line.split(" ")[4:5] for line in table.splitlines())
    return any(_unescape(point[0]) == name for point in points if point)


def _kind_of(folder: str, table: str) -> str:
    best, kind = "", ""
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        point = _unescape(fields[4])
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        # Later lines of the table lie on top of earlier ones.
        if inside and len(point) >= len(best):
            best, kind = point, right.split(" ")[0]
    return kind


def _unescape(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


_OTHER_KINDS: Final = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def in_the_way(path: Path) -> str | None:
    """What is wrong with what is at a path where a file should be, as "is a folder".

    None: there is a file, or nothing. Raises ``OSError`` where the system does not tell.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        return f"is a link to {path.readlink()}, where there is nothing"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "is a link that leads back to itself"
    return _OTHER_KINDS.get(stat.S_IFMT(found.st_mode))


def refused_access(path: Path) -> str | None:
    """What the system does not allow this user with a file, as "cannot be read"; None: nothing.

    The file is not opened: to close it drops every lock that this process has on it.
    """
    folder = Path(os.path.realpath(path)).parent
    if not os.access(path, os.F_OK):
        return f"cannot be looked at: {folder} is closed to this user"
    if not os.access(path, os.R_OK):
        return "cannot be read by this user"
    if not os.access(path, os.W_OK):
        return "is read-only for this user"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"needs a log beside it, and {folder} is read-only for this user"
    return None


def no_folder(path: Path) -> Path | None:
    """The nearest of the folders above a path that is there and is no folder; None: all are."""
    for one in path.parents:
        if os.path.lexists(one):
            return None if one.is_dir() else one
    return None


def size_of(path: Path) -> int | None:
    """The size of a file in bytes; None if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def is_open_here(device: int, number: int) -> bool:
    """Whether anything in this process has that file open. False where the system does not tell."""
    try:
        descriptors = [int(name) for name in os.listdir("/dev/fd")]  # noqa: PTH208
    except OSError:
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            found = os.fstat(descriptor)
            if (found.st_dev, found.st_ino) == (device, number):
                return True
    return False


def other_names(path: Path) -> int:
    """How many hard links a file has beside this one. A draft that was left behind is removed."""
    if path.stat().st_nlink > 1:
        # A process that places a file has two names for it for a moment: for ever, if killed then.
        for draft in path.parent.glob(".*.new"):
            with contextlib.suppress(OSError):
                if draft.samefile(path):
                    draft.unlink(missing_ok=True)
    return max(path.stat().st_nlink - 1, 0)


def has_room(path: Path) -> bool:
    """Whether a file beside ``path``, as large as the largest of its kind, could still grow."""
    draft = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        size = max(file.stat().st_size for file in path.parent.glob(f"{glob.escape(path.name)}*"))
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.lseek(descriptor, size, os.SEEK_SET)
            return os.write(descriptor, b"\1" * _ROOM) == _ROOM
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return False
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def place_once(path: Path, fill: Callable[[Path], None]) -> None:
    """Create ``path`` complete and readable by its owner only, unless another process was first.

    ``fill`` gets the path of an empty draft beside it. Raises ``OSError``.
    """
    draft = path.with_name(f".{secrets.token_hex(8)}.new")
    # An interrupt may come as soon as there is a file.
    try:
        os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        fill(draft)
        with contextlib.suppress(FileExistsError):
            try:
                os.link(draft, path)
            except FileExistsError:
                raise
            except OSError:
                # No hard links here, as on FAT.
                if not path.exists():
                    draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
