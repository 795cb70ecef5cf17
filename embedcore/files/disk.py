"""How does a file take its place only when it is complete, and what is said when it cannot?"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from embedcore.errors import StorageError, StorageFull, StorageReadOnly

_FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_ENDING = ".partial"
_RANDOM_BYTES = 8
_DESCRIPTORS = Path("/proc/self/fd")
_WITHOUT_WAITING = (
    getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})


def display(path: str | os.PathLike[str]) -> str:
    """A path fit for messages and JSON: bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def beside(path: Path, suffix: str) -> Path:
    """The file that belongs to ``path`` and has its whole name plus ``suffix``."""
    return path.with_name(path.name + suffix)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Whatever the system refuses while ``path`` is written, as a ``StorageError``."""
    try:
        yield
    except OSError as error:
        raise _translated(error, path) from error


def _translated(error: OSError, path: Path) -> StorageError:
    cause = error.strerror or str(error)
    if error.errno in _FULL:
        return StorageFull(
            f"{display(path)} cannot be written: {cause}. Free some space or choose another "
            "folder, then run the same again"
        )
    if error.errno in _READ_ONLY:
        return StorageReadOnly(
            f"{display(path)} cannot be written: {cause}. Choose a folder that you may write to"
        )
    return StorageError(f"{display(path)} cannot be written: {cause}")


def opened_file(path: Path) -> BinaryIO:
    """A file open to be read, links followed. Raises ``OSError`` if it is none.

    To open a pipe would wait for somebody who writes, and a device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return os.fdopen(descriptor, "rb")


def random_name(path: Path) -> str:
    """A name beside ``path`` that nobody can have put there before; ``sweep`` knows it again."""
    return f"{_prefix_of(path)}{secrets.token_hex(_RANDOM_BYTES)}{_ENDING}"


def sweep(path: Path) -> None:
    """Delete what killed runs left beside ``path`` under random names. Needs its lock."""
    size = len(random_name(path))
    for one in path.parent.glob(f"{_prefix_of(path)}*{_ENDING}"):
        if len(one.name) == size:
            with suppress(OSError):
                one.unlink()


def _prefix_of(path: Path) -> str:
    # Not the name itself: with more behind it, a long one would be too long for the file system.
    return f".embedcore-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


@contextmanager
def replacing(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Files that take the places of ``paths`` together when the block ends without an error.

    They are synced to disk, and only when all of them are complete do they take their places, in
    the order given. On an error nothing of them is left. Nor after a kill, where the system has
    files without a name; elsewhere they are written under random names in the same folder, and
    ``sweep`` of the first finds what is left of all.
    """
    if not paths:
        yield []
        return
    with ExitStack() as stack:
        temporaries = [path.with_name(random_name(paths[0])) for path in paths]
        files: list[BinaryIO] = []
        for temporary in temporaries:
            stack.callback(_discard, temporary)
            file = _nameless(temporary) or temporary.open("xb")
            stack.callback(_close_quietly, file)
            files.append(file)
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        for file, temporary in zip(files, temporaries, strict=True):
            _name(file, temporary)
            file.close()
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
        sync_folder(paths[0].parent)


def _nameless(path: Path) -> BinaryIO | None:
    """A file beside ``path`` that no listing shows and that is gone with the process; None where
    there is no such thing, or no way to give it that name afterwards."""
    try:
        with _unlisted(path.parent) as probe:
            _name(probe, path)
        path.unlink()
        return _unlisted(path.parent)
    except (AttributeError, OSError):
        # Only some systems and file systems have it. If it is something else, one with a name says.
        return None


def _unlisted(folder: Path) -> BinaryIO:
    return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666), "w+b")


def _name(file: BinaryIO, path: Path) -> None:
    """Give a file that has no name this one."""
    if not os.fstat(file.fileno()).st_nlink:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # With a folder it is linkat(), which follows the link to the file.
            source = _DESCRIPTORS / str(file.fileno())
            os.link(source, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(folder)


def _close_quietly(file: BinaryIO) -> None:
    with suppress(OSError):
        file.close()


def _discard(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


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
