"""A server on a real socket that answers as a test says, byte by byte, and keeps a bill."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedcore.provider import http
from embedcore.provider.refusals import Asked

KEY = "sk-CANARY7d1f0e5b9a4c48229be3"
# Of a certificate: the second is reached by a proxy only.
NAMES = "DNS:localhost,DNS:elsewhere.example"
TEXT = "a sentence that only the server may read"

Script = Callable[["Peer"], object]


class Peer:
    """One connection, as the server sees it. ``number`` counts from 0."""

    def __init__(self, connection: socket.socket, number: int, server: Server) -> None:
        self.connection = connection
        self.number = number
        self.server = server
        self._received = b""

    def read(self) -> bytes | None:
        """The body of the next request, which is billed; None if there is none."""
        while b"\r\n\r\n" not in self._received:
            if not self._more():
                return None
        head, _, rest = self._received.partition(b"\r\n\r\n")
        self.server.heads.append(head.decode("latin-1"))
        length = re.search(rb"(?im)^content-length: *(\d+)", head)
        size = int(length[1]) if length else 0
        while len(rest) < size:
            if not self._more():
                return None
            rest = self._received.partition(b"\r\n\r\n")[2]
        self._received = rest[size:]
        with self.server.lock:
            self.server.billed += 1
        return rest[:size]

    def read_head(self) -> None:
        """No more than the head, so that nothing is billed."""
        while b"\r\n\r\n" not in self._received and self._more():
            pass

    def write(self, data: bytes) -> None:
        self.connection.sendall(data)

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()

    def until_left(self) -> bool:
        """Wait until the client has gone; True if it sent nothing more."""
        self.connection.settimeout(60)
        try:
            return not self.connection.recv(1 << 16)
        except ConnectionError:
            return True

    def _more(self) -> bool:
        try:
            data = self.connection.recv(1 << 16)
        except ConnectionError:
            return False
        self._received += data
        return bool(data)


class Server:
    """Runs ``script`` for every connection, each in a thread of its own. ``billed``: requests that
    were read to their end."""

    def __init__(self, script: Script, context: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.lock = threading.Lock()
        self.billed = 0
        self.connections = 0
        self.heads: list[str] = []
        self.failures: list[BaseException] = []
        self._context = context
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        scheme = "http" if self._context is None else "https"
        return f"{scheme}://localhost:{self.port}/v1"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection, self.connections))
            self.connections += 1
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(60)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                try:
                    self.script(Peer(connection, number, self))
                except OSError:
                    pass
                except BaseException as failure:  # noqa: BLE001 - shown by the test
                    self.failures.append(failure)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for thread in self._threads:
            thread.join(timeout=60)
        assert not self.failures, self.failures


def asked(endpoint: str = "http://here") -> Asked:
    return Asked(model="m", endpoint=endpoint, texts=[TEXT], secrets=[KEY])


def call(body: Any = b'{"input":[]}', **more: Any) -> http.Call:
    headers = {"Authorization": f"Bearer {KEY}", **more.pop("headers", {})}
    given = {"path": "/embeddings", "timeout": 30.0, "max_bytes": 1_000_000, **more}
    return http.Call(headers=headers, body=body, **given)


def sent(session: http.Session, *args: Any, **more: Any) -> bytes:
    """The body of an answer."""
    with session.send(call(*args, **more), asked()) as answer:
        assert answer.status == 200
        return bytes(answer.body)


def reply(body: bytes = b"{}", *head: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *head]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*chunks: bytes) -> bytes:
    pieces = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks if chunk]
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    return b"".join([head, *pieces, b"0\r\n\r\n"])


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path] | None:
    """A server's context and the certificate that it shows; None where openssl is not there."""
    import subprocess

    key, shown = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", f"subjectAltName={NAMES}"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", shown], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown, key)
    return context, shown
