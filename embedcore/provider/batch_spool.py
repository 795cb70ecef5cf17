"""The input of a batch on its way: a temporary file, and the form in which it is uploaded."""

from __future__ import annotations

import contextlib
import io
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from embedcore.errors import ConfigurationError

_PIECE: Final = 1 << 16


class Spool(io.BufferedRandom):
    """A temporary file to send."""

    def close(self) -> None:
        # What could not be written, for want of room, need not be written now.
        with contextlib.suppress(OSError):
            super().close()


def spool() -> Spool:
    """An empty one, without a name: it ends with the process.

    Raises ``ConfigurationError`` where the temporary folder takes none.
    """
    try:
        return Spool(tempfile.TemporaryFile(buffering=0))
    except OSError as error:
        raise no_room(error) from None


def no_room(error: OSError) -> ConfigurationError:
    """The error for a file that cannot be written."""
    return ConfigurationError(
        f"the temporary folder {tempfile.gettempdir()} cannot hold a batch's input "
        f"({error.strerror}): make room, or set TMPDIR"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A body of several parts, the last of which is a file. Iterating gives it from its beginning,
    and memory holds a piece of the file.

    ``kind``: "form-data" or "related". ``more``: further headers.
    """

    head: bytes
    file: Spool
    tail: bytes
    boundary: str
    kind: str = "form-data"
    more: tuple[tuple[str, str], ...] = ()

    @property
    def headers(self) -> dict[str, str]:
        size = len(self.head) + self.file.seek(0, io.SEEK_END) + len(self.tail)
        return {
            "Content-Type": f"multipart/{self.kind}; boundary={self.boundary}",
            "Content-Length": str(size),
            **dict(self.more),
        }

    def __iter__(self) -> Iterator[bytes]:
        yield self.head
        self.file.seek(0)
        while piece := self.file.read(_PIECE):
            yield piece
        yield self.tail


_FILE: Final = "file"


def form_of(name: str, file: Spool, **fields: str) -> Form:
    """The form that a browser would send: ``fields``, and a file of that name."""
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'
        for field, value in fields.items()
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{_FILE}"; filename="{name}"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    )
    return Form(
        head="".join(parts).encode(),
        file=file,
        tail=f"\r\n--{boundary}--\r\n".encode(),
        boundary=boundary,
    )


def related(description: bytes, file: Spool, *, more: dict[str, str]) -> Form:
    """Google's form: a description as JSON, and the file. ``more``: headers."""
    boundary = secrets.token_hex(16)
    head = (
        f"--{boundary}\r\nContent-Type: application/json; charset=utf-8\r\n\r\n".encode()
        + description
        + f"\r\n--{boundary}\r\nContent-Type: application/jsonl\r\n\r\n".encode()
    )
    return Form(
        head=head,
        file=file,
        tail=f"\r\n--{boundary}--\r\n".encode(),
        boundary=boundary,
        kind="related",
        more=tuple(more.items()),
    )
