"""How does a reply travel, whole or in one of the ways that go wrong?

What a reply says and how it is delivered are apart: a delivery is a function of the connection and
the reply.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import threading

DRIP_BYTES = 1
_LINGER_NONE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpRequest:
    """One request as it arrived. Header names are in lower case; the path has no query.

    ``spool``: the body of an upload, which may be too large for memory; ``body`` is then empty.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    query: str = ""
    spool: mmap.mmap | None = None

    def json(self) -> object:
        """The body as JSON; raises ``ValueError`` if it is none."""
        return json.loads(self.body)


class Stream(Protocol):
    """A body that is made as it is sent."""

    @property
    def size(self) -> int: ...

    def blocks(self, start: int = 0) -> Iterator[bytes]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpReply:
    """One reply and its way to the client. ``content-length`` is added where it is due.

    ``stream`` stands for ``body`` where that would be too large for memory.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    deliver: Delivery | None = None
    stream: Stream | None = None

    @property
    def size(self) -> int:
        return len(self.body) if self.stream is None else self.stream.size

    def blocks(self, stop: int | None = None) -> Iterator[bytes]:
        """The body as far as byte ``stop``."""
        left = self.size if stop is None else stop
        for block in [self.body] if self.stream is None else self.stream.blocks():
            if left <= 0:
                return
            yield block[:left]
            left -= len(block)


class Connection:
    """One accepted socket, and what can be done to the client at its other end."""

    def __init__(self, sock: socket.socket, closing: threading.Event) -> None:
        self._socket = sock
        self._closing = closing
        self.open = True
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def wait(self, seconds: float) -> bool:
        """Let time pass. False if the server closed meanwhile."""
        return not self._closing.wait(seconds)

    def end(self) -> None:
        """Close after this exchange, in good order."""
        self.open = False

    def reset(self) -> None:
        """Drop the connection at once: the client sees a reset, not an end."""
        self.open = False
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        # Closing the descriptor itself, now: whatever else holds the socket would first end it in
        # good order, and the client would see that instead.
        socket.close(self._socket.detach())


Delivery: TypeAlias = Callable[[Connection, HttpReply], None]


def head_of(reply: HttpReply, **extra: str) -> bytes:
    """Status line and headers, with ``extra`` (underscores for hyphens) over the reply's own."""
    try:
        phrase = HTTPStatus(reply.status).phrase
    except ValueError:
        phrase = "Unassigned"
    headers = {"date": formatdate(usegmt=True), **reply.headers}
    headers.update({name.replace("_", "-"): value for name, value in extra.items()})
    lines = [f"HTTP/1.1 {reply.status} {phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def whole(connection: Connection, reply: HttpReply) -> None:
    """As it should be."""
    head = head_of(reply, content_length=str(reply.size))
    if reply.stream is None:
        connection.send(head + reply.body)
        return
    connection.send(head)
    for block in reply.blocks():
        connection.send(block)


def whole_then_close(connection: Connection, reply: HttpReply) -> None:
    """Whole, and the connection closed without having said so: the client may reuse it."""
    whole(connection, reply)
    connection.end()


def reset(connection: Connection, reply: HttpReply) -> None:  # noqa: ARG001
    """Nothing, and a reset."""
    connection.reset()


def close(connection: Connection, reply: HttpReply) -> None:  # noqa: ARG001
    """Nothing, and an orderly end."""
    connection.end()


def hang(seconds: float) -> Delivery:
    """Nothing for that long, then a reset."""

    def deliver(connection: Connection, reply: HttpReply) -> None:
        connection.wait(seconds)
        reset(connection, reply)

    return deliver


def late(seconds: float) -> Delivery:
    """Whole, after that long."""

    def deliver(connection: Connection, reply: HttpReply) -> None:
        if connection.wait(seconds):
            whole(connection, reply)

    return deliver


def drip(interval: float) -> Delivery:
    """The head, then the body byte by byte with a pause before each."""

    def deliver(connection: Connection, reply: HttpReply) -> None:
        connection.send(head_of(reply, content_length=str(reply.size)))
        for block in reply.blocks():
            for start in range(0, len(block), DRIP_BYTES):
                if not connection.wait(interval):
                    return connection.reset()
                connection.send(block[start : start + DRIP_BYTES])
        return None

    return deliver


def cut_off(share: float, *, chunked: bool = False) -> Delivery:
    """Only this share of the body that was announced, then the end of the connection."""

    def deliver(connection: Connection, reply: HttpReply) -> None:
        if chunked:
            head = head_of(reply, transfer_encoding="chunked") + f"{reply.size:x}\r\n".encode()
        else:
            head = head_of(reply, content_length=str(reply.size))
        connection.send(head)
        for block in reply.blocks(int(reply.size * share)):
            connection.send(block)
        connection.end()

    return deliver


def endless(limit: int) -> Delivery:
    """The body, then white space until the client has gone or ``limit`` bytes were sent."""
    block = b" " * 65536

    def deliver(connection: Connection, reply: HttpReply) -> None:
        head = head_of(reply, transfer_encoding="chunked")
        connection.send(head + f"{reply.size:x}\r\n".encode())
        for part in reply.blocks():
            connection.send(part)
        connection.send(b"\r\n")
        sent = 0
        while sent < limit and connection.wait(0):
            connection.send(f"{len(block):x}\r\n".encode() + block + b"\r\n")
            sent += len(block)
        connection.reset()

    return deliver
