"""Files that one run leaves beside an output and another one finds again.

Whoever may write to a folder can put something else under their names: a link to another file, or
a file of the user's own. What is not a plain file that embedcore wrote is never opened for writing,
replaced or deleted, and stops a run before anything is paid for.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from embedcore.errors import ConfigurationError
from embedcore.files.disk import display, random_name

# A link is refused by the system, a pipe does not hold up whoever opens it, and no child inherits.
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
    # Some file systems give everything that is made in them to one user, whoever made it.
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
