"""HTTP of the fake: listener, replies whole or broken on purpose, a record of requests.

What a reply says and how it is delivered are apart: a delivery is a function of the connection and
the reply.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import socketserver
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias, cast

if TYPE_CHECKING:
    from collections.abc import Iterable


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

    def hold_back(self) -> None:
        """Send the last packet only with the end, where the system can: who has read the reply
        has the end as well, however slow this thread is."""
        cork = getattr(socket, "TCP_CORK", None)
        if cork is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, cork, 1)

    def end_now(self) -> None:
        """As ``end``, before the thread goes on."""
        self.end()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

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
    connection.hold_back()
    whole(connection, reply)
    connection.end_now()


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


_BLOCK = 1 << 20


class Readable(Protocol):
    """What a request is read from."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...


class BadRequestLine(Exception):
    """What arrived is not HTTP."""


class CutRequest(Exception):
    """The client went away before its request was whole: there is nothing to answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestHead:
    """A request whose body was not read yet."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


def read_head(stream: Readable) -> RequestHead | None:
    """The next request's head, or None at the end of the connection."""
    line = stream.readline(65537)
    if not line:
        return None
    words = line.decode("latin-1").split()
    if len(words) != 3:
        raise BadRequestLine(line)
    path, _, query = words[1].partition("?")
    headers = {}
    while (line := stream.readline(65537)) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return RequestHead(method=words[0], path=path, query=query, headers=headers)


def body_blocks(stream: Readable, headers: Mapping[str, str]) -> Iterator[bytes]:
    """The body as it arrives; raises ``CutRequest`` if the client goes away in the middle of it."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        yield from _exactly(stream, int(headers.get("content-length", "0")))
        return
    while size := int(stream.readline(100).split(b";")[0], 16):
        yield from _exactly(stream, size)
        stream.readline(3)
    while stream.readline(65537) not in (b"\r\n", b"\n", b""):
        pass


def _exactly(stream: Readable, size: int) -> Iterator[bytes]:
    while size:
        block = stream.read(min(size, _BLOCK))
        if not block:
            raise CutRequest
        size -= len(block)
        yield block


def spooled(blocks: Iterable[bytes]) -> mmap.mmap | None:
    """A body in a temporary file that has no name; None for an empty one."""
    with tempfile.TemporaryFile() as file:
        for block in blocks:
            file.write(block)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else None


class Application(Protocol):
    """What answers. Called from many threads; must not raise."""

    def unread(self, head: RequestHead) -> Delivery | None:
        """What to do before the body is read; None: read it."""
        ...

    def spools(self, head: RequestHead) -> bool:
        """Whether the body is an upload, to be kept out of memory."""
        ...

    def answer(self, request: HttpRequest) -> HttpReply: ...


class Listener:
    """An application on a free local port. ``close`` ends every connection of it."""

    def __init__(self, application: Application, *, port: int = 0) -> None:
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", port), application, self.closing)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Wake what waits, refuse new connections, end the open ones. Callable once."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()
        self._thread.join(5)


class OnSocket:
    """An application that answers on a local port inside its block, and reads each body first."""

    _listener: Listener | None = None

    @property
    def url(self) -> str:
        """Its address."""
        assert self._listener is not None, "use it as a context manager"
        return self._listener.url

    def __enter__(self) -> Self:
        self._listener = Listener(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listener is not None:
            self._listener.close()

    def unread(self, head: RequestHead) -> Delivery | None:  # noqa: ARG002
        return None

    def spools(self, head: RequestHead) -> bool:  # noqa: ARG002
        return False

    def answer(self, request: HttpRequest) -> HttpReply:
        raise NotImplementedError(f"{type(self).__name__} must define answer(request)")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 512

    def __init__(
        self, address: tuple[str, int], application: Application, closing: threading.Event
    ) -> None:
        self.application = application
        self.closing = closing
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def keep(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.add(sock)

    def forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(sock)

    def drop_connections(self) -> None:
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


class _Handler(socketserver.StreamRequestHandler):
    rbufsize = 1 << 16

    def handle(self) -> None:
        server = cast(_Server, self.server)
        server.keep(self.request)
        connection = Connection(self.request, server.closing)
        # A client that went away is its own business, here as on any server.
        with contextlib.suppress(OSError, BadRequestLine, CutRequest, ValueError):
            while connection.open and self._exchange(connection, server.application):
                pass
        server.forget(self.request)

    def _exchange(self, connection: Connection, application: Application) -> bool:
        head = read_head(self.rfile)
        if head is None:
            return False
        early = application.unread(head)
        if early is not None:
            early(connection, HttpReply())
            return True
        blocks = body_blocks(self.rfile, head.headers)
        spool = spooled(blocks) if application.spools(head) else None
        body = b"".join(blocks) if spool is None else b""
        reply = application.answer(
            HttpRequest(
                method=head.method,
                path=head.path,
                query=head.query,
                headers=head.headers,
                body=body,
                spool=spool,
            )
        )
        (reply.deliver or whole)(connection, reply)
        return head.headers.get("connection", "").lower() != "close"


@dataclass(frozen=True, kw_only=True, slots=True)
class Received(HttpRequest):
    """A request that arrived: what met it, what it was answered and what it was billed.

    ``status`` is that of the reply, also when it did not get through.
    """

    fault: str | None = None
    status: int = 0
    billed_tokens: int = 0

    @property
    def texts(self) -> list[str]:
        """The texts of an embeddings request; empty for any other."""
        try:
            body = self.json()
        except ValueError:
            return []
        given = body.get("input", []) if isinstance(body, dict) else []
        return [given] if isinstance(given, str) else list(given)


def received(request: HttpRequest, fault: str | None, status: int, billed: int) -> Received:
    return Received(
        method=request.method,
        path=request.path,
        headers=request.headers,
        body=request.body,
        query=request.query,
        fault=fault,
        status=status,
        billed_tokens=billed,
    )
