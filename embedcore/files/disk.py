"""Files beside an output: opened safely, locked, replaced at once.

Another user of a folder can put something else under the names of the lock, the journal and the
list of failures: a link to another file, or a file of the user's own. What is not a plain file that
embedcore wrote is never opened for writing, replaced or deleted, and stops a run before anything is
paid for.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from embedcore.errors import (
    ConfigurationError,
    StorageBusy,
    StorageError,
    StorageFull,
    StorageReadOnly,
)
from embedcore.storage.filesystem import sync_folder

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


_FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_ENDING = ".partial"
_RANDOM_BYTES = 8
_DESCRIPTORS = Path("/proc/self/fd")
_WITHOUT_WAITING = (
    getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)


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

    To open a pipe would wait for a writer, and a device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return os.fdopen(descriptor, "rb")


def random_name(path: Path) -> str:
    """A name beside ``path`` that no process can have used before; ``sweep`` knows it again."""
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


class Spool:
    """Holds bytes until it is closed, and gives them to any number of readers. Raises
    ``StorageError`` where the temporary folder cannot hold them.

    The bytes may be texts: they are gone with the process, however that ends. POSIX files lose
    their name as soon as they are open; Windows deletes the file when the last handle is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder = Path("the folder for temporary files")
        with storage_errors(self._folder):
            self._folder = Path(tempfile.gettempdir())
        with storage_errors(self._folder):
            self._file = tempfile.TemporaryFile(prefix="embedcore-")  # noqa: SIM115
        self.size = 0

    def fill(self, parts: Iterable[bytes]) -> None:
        """Write all of it. What ``parts`` raises is raised as it is."""
        for part in parts:
            with storage_errors(self._folder):
                self._file.write(part)
            self.size += len(part)
        with storage_errors(self._folder):
            self._file.flush()

    def reader(self) -> BinaryIO:
        """All of it from the start, independent of other readers."""
        return io.BufferedReader(_Reader(self))

    def read_at(self, start: int, into: WriteableBuffer) -> int:
        """How many bytes from ``start`` on there were for ``into``."""
        with self._lock:
            self._file.seek(start)
            return self._file.readinto(into)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()


class _Reader(io.RawIOBase):
    def __init__(self, spool: Spool) -> None:
        self._spool, self._at = spool, 0

    def readable(self) -> bool:
        return True

    def readinto(self, into: WriteableBuffer) -> int:
        size = self._spool.read_at(self._at, into)
        self._at += size
        return size


# A link is refused by the system, to open a pipe does not wait, and no child inherits.
_SAFELY: Final = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_LINK_ERRORS: Final = frozenset({errno.ELOOP, errno.EMLINK})
_KIND_ERRORS: Final = frozenset({errno.EISDIR, errno.ENXIO, errno.ENODEV})
_LISTED: Final = frozenset({"id", "position", "where", "text_sha256", "reason"})


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a plain file of the caller's with one name; it is made if ``flags`` say so.

    Raises ``ConfigurationError`` for anything else, and ``OSError``.
    """
    if path.is_symlink():
        raise not_own(path, "is a link")
    try:
        descriptor = os.open(path, flags | _SAFELY, 0o666)
    except OSError as error:
        if error.errno in _LINK_ERRORS:
            raise not_own(path, "is a link") from None
        if error.errno in _KIND_ERRORS:
            raise not_own(path, "is no plain file") from None
        raise
    problem = _problem(os.fstat(descriptor), path)
    if problem is not None:
        os.close(descriptor)
        raise not_own(path, problem)
    return descriptor


def not_own(path: Path, problem: str) -> ConfigurationError:
    """The error for a file under a name that a run needs, which embedcore did not leave there."""
    return ConfigurationError(
        f"{display(path)} {problem}, and a run needs that name for a file of its own: move it "
        "away, or choose another output"
    )


def open_own_file(path: Path, flags: int) -> BinaryIO:
    """``open_own`` as an unbuffered file."""
    writes = flags & (os.O_RDWR | os.O_WRONLY)
    return os.fdopen(open_own(path, flags), "r+b" if writes else "rb", buffering=0)


def require_own_list(path: Path) -> None:
    """Raise ``ConfigurationError`` unless ``path`` is free, or a list of failed rows of ours."""
    try:
        descriptor = open_own(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as file:
        if not all(map(_is_listed_row, file)):
            raise not_own(path, "is not a list of failed rows of embedcore")


def _problem(found: os.stat_result, path: Path) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return "is no plain file"
    if _is_of_another(found, path):
        return "belongs to another user"
    # None while another run is removing it.
    if found.st_nlink > 1:
        return "is a hard link: the file has another name as well"
    return None


def _is_of_another(found: os.stat_result, path: Path) -> bool:
    if not hasattr(os, "geteuid") or found.st_uid == os.geteuid():
        return False
    # Some file systems give everything that is made in them to one user, not to its maker.
    probe = path.with_name(random_name(path))
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFELY, 0o600)
    try:
        return os.fstat(descriptor).st_uid != found.st_uid
    finally:
        os.close(descriptor)
        probe.unlink()


def _is_listed_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() == _LISTED


_NAME_LIMIT = 200
_CONTENT = b"process "


@contextmanager
def output_lock(lock: Path, output: Path) -> Iterator[None]:
    """Hold ``lock`` for the block; the system releases it when the process dies.

    Raises ``StorageBusy`` naming the process that holds it.
    """
    with storage_errors(lock):
        descriptor = _acquired(lock, output)
    holder = os.getpid()
    try:
        yield
    finally:
        # Removed before it is released: a process that opened it meanwhile sees that its name is
        # gone. A child that was forked off in the block does not hold it.
        is_ours = os.getpid() == holder
        if os.name == "posix" and is_ours and _still_named(descriptor, lock):
            with suppress(OSError):
                lock.unlink()
        os.close(descriptor)


def _acquired(lock: Path, output: Path) -> int:
    while True:
        descriptor = open_own(lock, os.O_RDWR | os.O_CREAT)
        try:
            if not _try_lock(descriptor):
                holder = os.pread(descriptor, _NAME_LIMIT, 0) if os.name == "posix" else b""
                raise _busy(output, holder.decode("utf-8", "replace").strip())
            if _still_named(descriptor, lock):
                _require_own(descriptor, lock)
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(
                    descriptor, _CONTENT + f"{os.getpid()} on {socket.gethostname()}\n".encode()
                )
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def require_own_lock(lock: Path) -> None:
    """Raise ``ConfigurationError`` if there is a file under the name of the lock that is none."""
    try:
        descriptor = open_own(lock, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        _require_own(descriptor, lock)
    finally:
        os.close(descriptor)


def _require_own(descriptor: int, lock: Path) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = os.read(descriptor, _NAME_LIMIT)
    if content and not content.startswith(_CONTENT):
        raise not_own(lock, "is not a lock of embedcore")


def _busy(output: Path, holder: str) -> StorageBusy:
    who = f" ({holder})" if holder else ""
    return StorageBusy(
        f"another run{who} is writing {display(output)}; wait for it to end, or choose another "
        "output"
    )


def _still_named(descriptor: int, lock: Path) -> bool:
    """False if the former holder removed the file between our opening and our locking it."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
