"""Is this folder on a file system whose locks cannot be trusted?"""

from __future__ import annotations

import sys
from pathlib import Path

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "lustre"}
    | {"glusterfs", "beegfs", "gpfs", "davfs", "ncpfs", "webdav", "afpfs"}
)
_MOUNTS = Path("/proc/self/mountinfo")


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
