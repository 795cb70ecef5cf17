"""How is a second run on the same output kept out?"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from embedcore.errors import StorageBusy
from embedcore.files.disk import display, storage_errors
from embedcore.files.own import not_own, open_own

_NAME_LIMIT = 200
_CONTENT = b"process "


@contextmanager
def output_lock(lock: Path, output: Path) -> Iterator[None]:
    """Hold ``lock`` for the block; the system releases it when the process dies.

    Raises ``StorageBusy`` naming the process that holds it.
    """
    with storage_errors(lock):
        descriptor = _acquired(lock, output)
    try:
        yield
    finally:
        # Removed before it is released: who opened it meanwhile sees that its name is gone.
        if os.name == "posix" and _still_named(descriptor, lock):
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
