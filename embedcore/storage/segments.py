"""Segment files: vectors one after another, only ever added to.

Which bytes of them belong to which vector is in the index. Nothing in them is locked: a writer
holds the write lock of the index, and a reader nothing. What is there stays as it is, and its place
is never used again, even if no row names it: SQLite can bring back a commit of a process that was
killed, as long as there was no other commit since.

No file is held open for longer than one look-up. To open one costs microseconds, and nothing then
is shared across a fork, changes under a reader, or keeps Windows from deleting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from collections.abc import Collection, Iterable, Iterator
from io import FileIO
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from embedcore.errors import StorageError
from embedcore.storage.filesystem import from_os_error, sync_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEGMENT_BYTES: Final = 2**28
"""A segment that is as long takes no more."""

HEADER_BYTES: Final = 64
ALIGNMENT: Final = 8
"""Every vector begins at a multiple of it: sums are taken over whole words."""

_MAGIC: Final = b"embedcore vectors\0"
_VERSION: Final = 1
_NAME: Final = re.compile(r"(\d{8,})\.seg")
_PIECE: Final = 2**20
# Without waiting: at the place there may be a pipe.
_SAFELY: Final = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def header(number: int) -> bytes:
    """The first bytes of a segment."""
    return struct.pack(f"<{len(_MAGIC)}sIQ", _MAGIC, _VERSION, number).ljust(HEADER_BYTES, b"\0")


def padded(in_bytes: int) -> int:
    """What a vector of so many bytes takes."""
    return -(-in_bytes // ALIGNMENT) * ALIGNMENT


class Segments:
    """The segment files of one folder. Errors are ``StorageError``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08}.seg"

    def create(self, after: int) -> int:
        """Make a file, for the owner only; returns its number.

        It is above ``after`` and that of no file, also of none that a failed transaction left.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFELY
        for number in count(after + 1):
            path = self.path(number)
            with self._translated(path):
                try:
                    descriptor = os.open(path, flags, 0o600)
                except FileExistsError:
                    continue
                with FileIO(descriptor, "r+") as file:
                    _write(file, header(number))
                sync_folder(self.folder)
            break
        return number

    def append(self, number: int, tail: int, block: NDArray[Any]) -> int | None:
        """Write at the end, down to the disk, with the write lock of the index held.

        Returns where it begins, which is never before ``tail``. None: what is there is not the file
        that the index means, and nothing was written.
        """
        path = self.path(number)
        with self._translated(path):
            try:
                file = _opened(path, os.O_RDWR)
            except _NoPlainFile:
                return None
            if file is None:
                return None
            with file:
                found = os.fstat(file.fileno())
                # A file with a second name may belong to a copy of this folder.
                if found.st_nlink != 1 or found.st_size < tail or not _is_ours(found):
                    return None
                if file.read(HEADER_BYTES) != header(number):
                    return None
                start = padded(found.st_size)
                file.seek(start)
                try:
                    _write(file, block.data.cast("B"))
                    _sync(file)
                except BaseException:
                    # As on a full disk: others need the room, and nothing names it yet.
                    file.truncate(found.st_size)
                    raise
        return start

    def read(self) -> Reader:
        """Segments to read from, open until the end of the block."""
        return Reader(self)

    def erase(self, number: int, gaps: Iterable[tuple[int, int]]) -> None:
        """Write zeros from each first place to the one behind the last, if it is not zeros yet."""
        path = self.path(number)
        with self._translated(path):
            file = _opened(path, os.O_RDWR)
            if file is None:
                return
            with file:
                size = os.fstat(file.fileno()).st_size
                for start, end in gaps:
                    _erase(file, start, min(end, size))
                _sync(file)

    def size(self, number: int) -> int:
        """Bytes of a segment; 0: it is not there."""
        with self.read() as reader:
            return reader.size(number)

    def others(self, known: Collection[int]) -> list[Path]:
        """The segments that are not known."""
        with self._translated(self.folder):
            return [
                path
                for path in self.folder.iterdir()
                if (match := _NAME.fullmatch(path.name))
                and int(match[1]) not in known
                and _is_segment(path)
            ]

    def remove(self, paths: Iterable[Path]) -> None:
        """Delete segments. What another process reads at this moment stays on Windows."""
        for path in paths:
            with self._translated(path), contextlib.suppress(PermissionError):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translated(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise from_os_error(error, path) from error


class Reader:
    """Segments that are open for the length of a block; those that are gone have no bytes."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._files: dict[int, tuple[FileIO | None, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for file, _size in self._files.values():
            if file is not None:
                file.close()

    def size(self, number: int) -> int:
        """Bytes of a segment; 0: it is not there."""
        return self._file(number)[1]

    def fill(self, number: int, offset: int, into: memoryview) -> None:
        """Read so many bytes. What lies past the end of the file is left as it was."""
        file, _ = self._file(number)
        if file is None:
            return
        try:
            file.seek(offset)
            while into and (read := file.readinto(into)):
                into = into[read:]
        except OSError as error:
            raise _unreadable(self._segments.path(number), error) from error

    def _file(self, number: int) -> tuple[FileIO | None, int]:
        found = self._files.get(number)
        if found is None:
            path = self._segments.path(number)
            try:
                file = _opened(path, os.O_RDONLY)
            except OSError as error:
                raise _unreadable(path, error) from error
            size = 0 if file is None else os.fstat(file.fileno()).st_size
            found = self._files[number] = (file, size)
        return found


class _NoPlainFile(OSError):
    """A link, which is not followed, or something else that is no file."""


def _opened(path: Path, flags: int) -> FileIO | None:
    """None: there is nothing of that name."""
    try:
        descriptor = os.open(path, flags | _SAFELY)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _NoPlainFile(error.errno, "it is no plain file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _NoPlainFile(errno.EINVAL, "it is no plain file")
    return FileIO(descriptor, "r" if flags == os.O_RDONLY else "r+")


def _is_ours(found: os.stat_result) -> bool:
    return os.name != "posix" or found.st_uid == os.geteuid()


def _is_segment(path: Path) -> bool:
    """A file that embedcore made, however little of it had been written."""
    with contextlib.suppress(OSError):
        file = _opened(path, os.O_RDONLY)
        if file is not None:
            with file:
                begins = file.read(len(_MAGIC))
                return begins == _MAGIC[: len(begins)]
    return False


def _write(file: FileIO, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _sync(file: FileIO) -> None:
    getattr(os, "fdatasync", os.fsync)(file.fileno())


def _erase(file: FileIO, start: int, end: int) -> None:
    for first in range(start, end, _PIECE):
        length = min(_PIECE, end - first)
        file.seek(first)
        if file.read(length).count(0) < length:
            file.seek(first)
            _write(file, bytes(length))


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be read ({error.strerror}): change that, or set EMBEDCORE_HOME to a folder "
        "of yours"
    )
