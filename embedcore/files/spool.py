"""Where does what can be read only once wait to be read twice? In a file that has no name.

Texts lie in it: it is gone with the process, however that ends. POSIX files lose their name as soon
as they are open, or never have one; Windows deletes the file when the last handle is closed.
"""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from embedcore.files.disk import storage_errors

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class Spool:
    """Holds bytes until it is closed, and gives them to any number of readers. Raises
    ``StorageError`` where the temporary folder cannot hold them."""

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
