"""What the tests of this provider share: a server, an embedder, a key that must not be seen."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.plugin import create
from embedcore_openai.tokenizer import Cl100kTokenizer

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
            from embedcore_openai.options import OpenAIOptions

            given = {"base_url": server.base_url, "api_key": CANARY, **options}
            embedder = create(model, OpenAIOptions(**given))  # type: ignore[arg-type]
            made.callback(embedder.close)
            return embedder

        yield make


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
                    connection.recv(1_000_000)
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
