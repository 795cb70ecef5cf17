"""How does the fake listen: HTTP/1.1 with keep-alive, a thread per connection, no OpenAI in it."""

from __future__ import annotations

import contextlib
import mmap
import socket
import socketserver
import tempfile
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from embedcore.testing.wire import Connection, Delivery, HttpReply, HttpRequest, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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
