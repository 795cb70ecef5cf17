"""What is in a form with files, without a copy of it in memory?"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass

from embedcore.testing.api import ApiError
from embedcore.testing.batchfiles import Stored, whole

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
