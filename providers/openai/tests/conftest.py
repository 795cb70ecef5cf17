"""What the tests of this provider share: a server, an embedder, a key that must not be seen."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from embedcore_openai.batch import OpenAIBatch
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.encodings import forget
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from embedcore_openai.tokenizer import Cl100kTokenizer

from embedcore.errors import EmbeddingError
from embedcore.testing import FakeOpenAI

CANARY = "sk-CANARY7d1f0e5b9a4c48229be3"
MODEL = "text-embedding-3-small"


def pytest_report_header() -> str:
    import openai

    return f"openai {openai.__version__}"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("API_KEY", "BASE_URL", "ORG_ID", "PROJECT_ID", "ADMIN_KEY", "LOG"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)


@pytest.fixture(autouse=True)
def _nothing_learned() -> Iterator[None]:
    """What is learned of an endpoint must not pass to the next server on the same port."""
    yield
    forget()


@pytest.fixture
def canary() -> str:
    return CANARY


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(api_key=CANARY, count=Cl100kTokenizer().count) as server:
        yield server


@pytest.fixture
def make(server: FakeOpenAI) -> Iterator[Callable[..., OpenAIEmbedder]]:
    """Embedders that talk to ``server``, with the right key, unless options say otherwise."""
    with contextlib.ExitStack() as made:

        def make(model: str = MODEL, **options: object) -> OpenAIEmbedder:
            given = {"base_url": server.base_url, "api_key": CANARY, **options}
            embedder = create(model, OpenAIOptions(**given))  # type: ignore[arg-type]
            made.callback(embedder.close)
            return embedder

        yield make


def read_request(connection: socket.socket, most: int = 1_000_000) -> None:
    """Read a request, or ``most`` bytes of it.

    Its head and its body may come apart. Who closes a connection and has not read all of it
    resets it, and the client may lose the reply.
    """
    received = connection.recv(most)
    while received and b"\r\n\r\n" not in received:
        received += (more := connection.recv(most))
        if not more:
            return
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    left = min(int(length[1]) if length else 0, most) - len(body)
    while left > 0 and (more := connection.recv(left)):
        left -= len(more)


@pytest.fixture
def listen() -> Iterator[Callable[[bytes | Callable[[socket.socket], None]], str]]:
    """Starts a server that answers every connection with these bytes; gives its base URL."""
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def listen(reply: bytes | Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    read_request(connection)
                    if callable(reply):
                        reply(connection)
                    else:
                        connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        threads.append(thread)
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield listen
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
    for thread in threads:
        thread.join(timeout=10)


@pytest.fixture(scope="session")
def too_late() -> Callable[[Callable[[float], EmbeddingError]], EmbeddingError]:
    """``too_late(attempt)``: the error of ``attempt(seconds)`` where time is up once it was sent.

    A machine that stands still while it connects is given longer.
    """

    def error_of(attempt: Callable[[float], EmbeddingError]) -> EmbeddingError:
        for seconds in (0.4, 2.0, 10.0):
            error = attempt(seconds)
            if getattr(error, "billed", "no") != "no":
                return error
        return attempt(50.0)

    return error_of


@pytest.fixture
def recordings() -> Callable[[str], list[dict[str, object]]]:
    """Exchanges with the real API that others recorded; skips where they are absent."""

    def load(name: str) -> list[dict[str, object]]:
        path = Path(__file__).parents[4] / "shared" / "fixtures" / name
        if not path.is_file():
            pytest.skip(f"recording {name} is not here")
        document = json.loads(path.read_text())
        return document.get("interactions") or document["items"]  # type: ignore[no-any-return]

    return load


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request that reached the scripted server."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


Reply = dict[str, Any] | bytes | tuple[int, Any] | Callable[[Asked], Any]


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that leaves early is part of the tests."""


class Scripted:
    """A server that answers ``"GET /v1/batches"`` as ``routes`` says, and notes what it was asked.

    A reply is a document, bytes, a status with one of both, or a function of the request that gives
    one; bytes that begin with ``HTTP/`` are sent as they are, and the connection is closed.
    """

    def __init__(self) -> None:
        self.routes: dict[str, Reply] = {}
        self.asked: list[Asked] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Tests need no log."""

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                parts = urlsplit(self.path)
                headers = {name.lower(): value for name, value in self.headers.items()}
                query = dict(parse_qsl(parts.query))
                asked = Asked(
                    method=self.command, path=parts.path, query=query, headers=headers, body=body
                )
                outer.asked.append(asked)
                reply = outer.routes.get(f"{self.command} {parts.path}", (404, NOT_FOUND))
                reply = reply(asked) if callable(reply) else reply
                status, content = reply if isinstance(reply, tuple) else (200, reply)
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                if raw.startswith(b"HTTP/"):
                    self.wfile.write(raw)
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - the names that it looks for

        self._server = _Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


NOT_FOUND = {"error": {"message": "No such object", "type": "invalid_request_error", "code": None}}


@pytest.fixture
def api() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


@pytest.fixture
def batch_of(api: Scripted) -> Iterator[Callable[..., OpenAIBatch]]:
    """Batch strategies that talk to ``api``."""
    with contextlib.ExitStack() as made:

        def batch_of(**options: object) -> OpenAIBatch:
            given = {"base_url": api.base_url, "api_key": CANARY, "batch": True, **options}
            embedder = create(MODEL, OpenAIOptions(**given))  # type: ignore[arg-type]
            made.callback(embedder.close)
            batch = embedder.batch
            assert isinstance(batch, OpenAIBatch)
            return batch

        yield batch_of


@pytest.fixture(scope="session")
def conforms() -> Callable[[str, object], None]:
    """``conforms("Name", value)``: a value is what OpenAI publishes under that name."""
    path = Path(__file__).parents[4] / "shared" / "spec" / "openai-cut.json"
    if not path.is_file():
        pytest.skip("the official API description is not beside the repository")
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    components = json.loads(path.read_text())["components"]

    def check(name: str, value: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": components}
        errors = list(jsonschema_rs.Draft202012Validator(schema).iter_errors(value))
        assert not errors, f"not a {name}: {errors[0].message}"

    return check
