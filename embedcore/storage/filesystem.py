"""File-system checks: network file systems, what is at a path, atomic replacement."""

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
from typing import Final

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "lustre"}
    | {"glusterfs", "beegfs", "gpfs", "davfs", "ncpfs", "webdav", "afpfs"}
)
# SQLite takes this much at once, for the index of its log.
_ROOM = 32 * 1024
_MOUNTS = Path("/proc/self/mountinfo")
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})


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
