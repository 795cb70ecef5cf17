"""Who works on something, and is he still there?"""

from __future__ import annotations

import os

from embedcore.storage.entries import owner_name


def myself() -> str:
    """Host and process."""
    return owner_name(os.getpid())


def is_free(owner: str | None, until: int | None, now: int) -> bool:
    """Whether what ``owner`` held ``until`` then may be taken: at the end of its lease, or once its
    process has ended.

    Where two machines have one host name a living owner may be taken for dead: what is owned must
    be safe against two owners, and is only quicker with one.
    """
    return owner is None or until is None or until < now or _has_ended(owner)


def _has_ended(owner: str) -> bool:
    host, _, number = owner.rpartition(":")
    if owner_name(os.getpid()).rpartition(":")[0] != host or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
