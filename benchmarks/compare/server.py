"""A fake OpenAI server that outruns every client from one core.

One thread, one selector, no framework: requests are read whole, replies are handed to the kernel in
the pieces they are prepared in. HTTP/1.1 with keep-alive; never compressed. With a certificate it
has a second port, where it speaks TLS.

``POST /v1/embeddings`` and, for the harness, ``GET /control`` (the meter) and ``POST
/control`` (``{"latency": seconds, "limit": {…} or null}``: sets both and starts the meter again).

    python -m compare.server --texts 20000

prints its ports, that for TLS second: 0 without a certificate.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import selectors
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from typing import IO, Final

import orjson

from compare import corpus
from compare.answers import Answer, Answers
from compare.limits import Limit
from compare.tokens import Counter

_PIECES: Final = 512
_RECORD: Final = 1 << 14
_ENDED: Final = object()
_REASONS: Final = {200: b"OK", 400: b"Bad Request", 404: b"Not Found", 429: b"Too Many Requests"}


class Connection:
    """One client's socket: what came in and is not yet a whole request, and what must go out."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.inbox = bytearray()
        self.outbox: deque[memoryview] = deque()

    def receive(self) -> bool:
        """Read what is there. False when the other side has closed."""
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return True
        self.inbox += data
        return bool(data)

    def request(self) -> tuple[bytes, bytes] | None:
        """The next whole request as its first line and body; None while some of it is missing."""
        end = self.inbox.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = bytes(self.inbox[:end])
        length = _content_length(head)
        if len(self.inbox) < end + 4 + length:
            return None
        body = bytes(memoryview(self.inbox)[end + 4 : end + 4 + length])
        del self.inbox[: end + 4 + length]
        return head.partition(b"\r\n")[0], body

    def queue(self, answer: Answer) -> None:
        size = sum(map(len, answer.parts))
        head = (
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
            % (
                answer.status,
                _REASONS[answer.status],
                answer.headers,
                size,
            )
        )
        self.outbox.append(memoryview(head))
        self.outbox.extend(map(memoryview, answer.parts))

    def flush(self) -> bool:
        """Send what the kernel takes. True when all of it is out."""
        outbox = self.outbox
        while outbox:
            pieces = [outbox[place] for place in range(min(_PIECES, len(outbox)))]
            try:
                sent = self.socket.sendmsg(pieces)
            except BlockingIOError:
                return False
            for piece in pieces:
                if sent < len(piece):
                    outbox[0] = piece[sent:]
                    break
                sent -= len(piece)
                outbox.popleft()
        return True


class TlsConnection(Connection):
    """The same through TLS: the handshake happens at the first reading, and pieces are joined."""

    socket: ssl.SSLSocket

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(sock)
        self.socket = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def receive(self) -> bool:
        # Until it is empty: what TLS has read already, the selector does not show again.
        try:
            while data := self.socket.recv(_RECORD):
                self.inbox += data
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return True
        return False

    def queue(self, answer: Answer) -> None:
        super().queue(answer)
        joined = memoryview(b"".join(self.outbox))
        self.outbox.clear()
        self.outbox.append(joined)

    def flush(self) -> bool:
        outbox = self.outbox
        while outbox:
            try:
                sent = self.socket.send(outbox[0])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            if sent < len(outbox[0]):
                outbox[0] = outbox[0][sent:]
            else:
                outbox.popleft()
        return True


class Server:
    """Serves one address, whose ports are known before ``serve``."""

    def __init__(
        self, answers: Answers, port: int = 0, context: ssl.SSLContext | None = None
    ) -> None:
        self._answers = answers
        self._latency = 0.0
        self._due: list[tuple[float, int, Connection, Answer]] = []
        self._order = count()
        self._selector = selectors.DefaultSelector()
        self._context = context
        self._plain = self._listen(port)
        self._tls = None if context is None else self._listen(0)
        self._cpu_at_reset = time.process_time()

    @property
    def ports(self) -> tuple[int, int]:
        """Of HTTP and of HTTPS; the second is 0 where there is no certificate."""
        plain: int = self._plain.getsockname()[1]
        tls: int = 0 if self._tls is None else self._tls.getsockname()[1]
        return plain, tls

    def serve(self, until_closed: IO[str] | None = None) -> None:
        """Returns when ``until_closed`` ends, as it does with the process at its other end."""
        if until_closed is not None:
            self._selector.register(until_closed, selectors.EVENT_READ, _ENDED)
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for key, events in self._selector.select(wait):
                if key.data is _ENDED:
                    return
                if not isinstance(key.data, Connection):
                    self._accept(key.data)
                elif events & selectors.EVENT_WRITE:
                    self._send(key.data)
                else:
                    self._receive(key.data)
            self._send_due()

    def _listen(self, port: int) -> socket.socket:
        # A thousand questions at once open a thousand connections: none may find the queue full.
        listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, listener)
        return listener

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        if listener is self._tls and self._context is not None:
            connection: Connection = TlsConnection(sock, self._context)
        else:
            connection = Connection(sock)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _receive(self, connection: Connection) -> None:
        try:
            there = connection.receive()
        except OSError:
            there = False
        if not there:
            self._close(connection)
            return
        while (request := connection.request()) is not None:
            self._handle(connection, *request)

    def _handle(self, connection: Connection, line: bytes, body: bytes) -> None:
        method, path, _ = line.split(b" ", 2)
        if path.startswith(b"/control"):
            if method == b"POST":
                self._control(body)
            self._reply(connection, Answer(status=200, parts=[self._report()]))
        elif path.endswith(b"/embeddings") and method == b"POST":
            self._embed(connection, body)
        else:
            self._reply(connection, Answer(status=404, parts=[b'{"error":null}']))

    def _embed(self, connection: Connection, body: bytes) -> None:
        answer = self._answers.answer(body)
        # Refusals come at once: they never reach the model.
        if answer.status != 200:
            self._reply(connection, answer)
            return
        due = time.monotonic() + self._latency
        heapq.heappush(self._due, (due, next(self._order), connection, answer))
        meter = self._answers.meter
        meter.most_in_flight = max(meter.most_in_flight, len(self._due))

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, connection, answer = heapq.heappop(self._due)
            self._reply(connection, answer)

    def _reply(self, connection: Connection, answer: Answer) -> None:
        if connection.socket.fileno() < 0:
            return
        connection.queue(answer)
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        try:
            done = connection.flush()
        except OSError:
            self._close(connection)
            return
        wanted = selectors.EVENT_READ if done else selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.modify(connection.socket, wanted, connection)

    def _close(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _control(self, body: bytes) -> None:
        wanted = orjson.loads(body)
        self._latency = wanted.get("latency", 0.0)
        limit = wanted.get("limit")
        self._answers.reset(None if limit is None else Limit(**limit))
        self._cpu_at_reset = time.process_time()

    def _report(self) -> bytes:
        cpu = time.process_time() - self._cpu_at_reset
        counted = self._answers.counted
        return orjson.dumps({**asdict(self._answers.meter), "cpu": cpu, "counted": counted})


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _allow_many_files() -> None:
    """A socket is a file, and the usual limit is about as many as some clients open."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=20_000, help="how many to prepare answers to")
    parser.add_argument("--short", type=int, default=0, help="how many short ones besides")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--certificate", help="file with a certificate and its key, for TLS")
    parser.add_argument("--attached", action="store_true", help="end when the input is closed")
    given = parser.parse_args(arguments)
    texts = list(dict.fromkeys(corpus.texts(given.texts)))
    texts += corpus.short_texts(given.short)
    context = None
    if given.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(given.certificate)
    server = Server(Answers(texts, Counter()), given.port, context)
    _allow_many_files()
    # What is here stays here: the collector need not walk through it again.
    gc.collect()
    gc.freeze()
    print(*server.ports, flush=True)
    server.serve(sys.stdin if given.attached else None)


if __name__ == "__main__":
    main()
