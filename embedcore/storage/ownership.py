"""Who works on something, and is he still there?

A number of a process says little: it is used again, and means another process in another container
or on another machine that has the same folder. On Linux an owner is named by what tells them apart:
the boot of the kernel, the namespaces of its numbers and of its clock, and when it started.
Elsewhere only host and number are known, and that proves nothing.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final, NamedTuple

from embedcore.forksafe import in_child, process

_PROC: Final = Path("/proc")
_NAMESPACES: Final = ("pid", "time")
# After the name in /proc/PID/stat: the state, the number of threads, when it started.
_STATE, _THREADS, _STARTED = 0, 17, 19

_own: dict[int, str] = {}
# A child may get a number that its parent's parent had.
in_child(_own.clear)


class Owner(NamedTuple):
    """``name``: host and process. ``kernel``, ``namespaces`` and ``started``: empty if unknown."""

    name: str
    kernel: str = ""
    namespaces: str = ""
    started: str = ""

    @property
    def number(self) -> int | None:
        number = self.name.rpartition(":")[2]
        return int(number) if number.isascii() and number.isdigit() else None


class _Seen(NamedTuple):
    started: str
    is_over: bool


def myself() -> str:
    """This process, in the words by which others find out whether it has ended."""
    here = process()
    known = _own.get(here)
    if known is None:
        known = _own[here] = " ".join(filter(None, _identity(here)))
    return known


def has_ended(owner: str) -> bool:
    """Whether it is proved that this process has ended. Never of one that cannot be seen from here:
    of another machine, another container or an earlier boot."""
    his, mine = _read(owner), _read(myself())
    if not his.started or (his.kernel, his.namespaces) != (mine.kernel, mine.namespaces):
        return False
    if his.number is None:
        return False
    if not _exists(his.number):
        return True
    seen = _look(his.number)
    return seen is not None and (seen.is_over or seen.started != his.started)


def is_free(owner: str | None, until: int | None, now: int) -> bool:
    """Whether what ``owner`` held ``until`` then may be taken: at the end of its lease, or once its
    process has ended.

    Where two machines have one host name a living owner may be taken for dead: what is owned must
    be safe against two owners, and is only quicker with one.
    """
    if owner is None or until is None or until < now:
        return True
    return has_ended(owner) or _is_missing_here(owner)


def _is_missing_here(owner: str) -> bool:
    """Whether this host has no process of that number. No proof: there are hosts of one name."""
    his, mine = _read(owner), _read(myself())
    if his.name.rpartition(":")[0] != mine.name.rpartition(":")[0] or his.number is None:
        return False
    return not _exists(his.number)


def _identity(number: int) -> Owner:
    name = f"{socket.gethostname()}:{number}"
    try:
        # A /proc of another container would show other processes by these numbers.
        if _PROC.joinpath("self").readlink() != Path(str(number)):
            return Owner(name)
        kernel = _PROC.joinpath("sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        namespaces = ",".join(_namespace(kind) for kind in _NAMESPACES)
    except (OSError, ValueError):
        return Owner(name)
    seen = _look(number)
    if seen is None or not kernel or namespaces.startswith(","):
        return Owner(name)
    return Owner(name, kernel, namespaces, seen.started)


def _namespace(kind: str) -> str:
    try:
        return str(_PROC.joinpath("self/ns", kind).readlink())
    except FileNotFoundError:
        # A kernel without namespaces of that kind: there is only one.
        return ""


def _read(owner: str) -> Owner:
    parts = owner.split(" ")
    return Owner(*parts) if len(parts) == len(Owner._fields) else Owner(parts[0])


def _exists(number: int) -> bool:
    """Whether there is such a process; also where nothing can be found out."""
    if os.name != "posix" or number <= 0:
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # Somebody else's.
        return True
    return True


def _look(number: int) -> _Seen | None:
    """What the system says of a process; None: nothing."""
    try:
        # Its name may hold anything, brackets as well.
        fields = _PROC.joinpath(f"{number}/stat").read_bytes().rpartition(b")")[2].split()
        state, threads, started = (fields[one] for one in (_STATE, _THREADS, _STARTED))
    except (OSError, IndexError):
        return None
    # Killed, and its parent has not asked yet. With other threads it lives on.
    is_over = state in (b"Z", b"X", b"x") and int(threads) <= 1
    return _Seen(started.decode(), is_over)
