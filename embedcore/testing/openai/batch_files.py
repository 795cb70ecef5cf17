"""Files that the fake holds, and multipart uploads."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from embedcore.testing.openai.embeddings import ApiError

_BLOCK = 1 << 18
MONTH = 30 * 86400


class Content(Protocol):
    """Bytes that need not be in memory; callable from several threads."""

    @property
    def size(self) -> int: ...

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """The bytes from ``start`` on."""
        ...


class Stored:
    """A range of bytes in memory, or of a file mapped into it."""

    def __init__(self, data: bytes | mmap.mmap, start: int = 0, end: int | None = None) -> None:
        self._data = data
        self._start = start
        self._end = len(data) if end is None else end

    @property
    def size(self) -> int:
        return self._end - self._start

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        for place in range(self._start + start, self._end, _BLOCK):
            yield self._data[place : min(place + _BLOCK, self._end)]

    def lines(self) -> Iterator[bytes]:
        """Its lines, without their ends."""
        place = self._start
        while place < self._end:
            stop = self._data.find(b"\n", place, self._end)
            stop = self._end if stop < 0 else stop
            yield self._data[place:stop]
            place = stop + 1


def whole(content: Content) -> bytes:
    """All of it, in memory."""
    return b"".join(content.blocks())


@dataclass(kw_only=True, slots=True)
class StoredFile:
    """A file, also after it was deleted: ``gone`` says so, and keeps what it held.

    ``refused``: creates on it that were refused because it was not ready.
    """

    id: str
    content: Content
    filename: str
    purpose: str
    created_at: int
    expires_at: int | None
    gone: bool = False
    refused: int = 0

    def described(self, status: str = "processed") -> dict[str, object]:
        return {
            "object": "file",
            "id": self.id,
            "purpose": self.purpose,
            "filename": self.filename,
            "bytes": self.content.size,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "status": status,
            "status_details": None,
        }


class FileStore:
    """Files by id, in the order of their creation. Not locked: its owner is."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._files: dict[str, StoredFile] = {}

    def add(
        self, content: Content, *, filename: str, purpose: str, expires_after: int | None = None
    ) -> StoredFile:
        now = int(self._clock())
        lives = MONTH if expires_after is None and purpose.startswith("batch") else expires_after
        file = StoredFile(
            id=f"file-{len(self._files) + 1:022d}",
            content=content,
            filename=filename,
            purpose=purpose,
            created_at=now,
            expires_at=None if lives is None else now + lives,
        )
        self._files[file.id] = file
        return file

    def put(self, file: StoredFile) -> None:
        """Keep a file that was made elsewhere."""
        self._files[file.id] = file

    def get(self, file_id: str, *, param: str = "id", status: int = 404) -> StoredFile:
        """Raises ``ApiError`` with ``status`` if it is not there, or no more."""
        file = self.once(file_id)
        if file is None or not self._there(file):
            raise missing(file_id, param=param, status=status)
        return file

    def once(self, file_id: str) -> StoredFile | None:
        """The file, even if it is gone by now."""
        return self._files.get(file_id)

    def delete(self, file_id: str) -> None:
        self.get(file_id).gone = True

    def newest_first(self, purpose: str | None = None) -> list[StoredFile]:
        return [
            file
            for file in reversed(self._files.values())
            if self._there(file) and purpose in (None, file.purpose)
        ]

    def _there(self, file: StoredFile) -> bool:
        return not file.gone and (file.expires_at is None or self._clock() < file.expires_at)


def missing(file_id: str, *, param: str, status: int) -> ApiError:
    return ApiError(status, f"No such File object: {file_id}", param=param)


_BOUNDARY = re.compile(r'boundary="?([^";]+)"?')
_PARAMETER = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One field of a form: ``filename`` is None unless it is a file."""

    name: str
    filename: str | None
    content: Stored

    @property
    def text(self) -> str:
        return whole(self.content).decode("utf-8", "replace")


def parts(content_type: str, data: bytes | mmap.mmap) -> dict[str, Part]:
    """The fields by name; raises ``ApiError`` (400) if the body is not such a form, or cut off."""
    found = _BOUNDARY.search(content_type)
    if not content_type.startswith("multipart/form-data") or found is None:
        raise ApiError(400, "We expected a multipart/form-data body.")
    return {part.name: part for part in _parts(b"--" + found[1].encode("latin-1"), data)}


def _parts(delimiter: bytes, data: bytes | mmap.mmap) -> Iterator[Part]:
    place = data.find(delimiter)
    while place >= 0:
        start = place + len(delimiter)
        if data[start : start + 2] == b"--":
            return
        blank, end = data.find(b"\r\n\r\n", start), data.find(b"\r\n" + delimiter, start)
        if blank < 0 or end < blank:
            break
        head = data[start:blank].decode("utf-8", "replace")
        yield _part(head, Stored(data, blank + 4, end))
        place = end + 2
    raise ApiError(400, "We could not parse the multipart form of your request.")


def _part(head: str, content: Stored) -> Part:
    for line in head.split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            parameters = dict(_PARAMETER.findall(value))
            return Part(
                name=parameters.get("name", ""),
                filename=parameters.get("filename"),
                content=content,
            )
    raise ApiError(400, "A part of the form has no name.")
