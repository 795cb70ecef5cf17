"""The templates of ``embedcore provider new``, and a service for the one of the how-to."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from embedcore.cli.authors import write
from embedcore.testing.openai.http import Delivery, HttpReply, HttpRequest, Listener, RequestHead
from embedcore.testing.vectors import tokens_of, vectors_of

DIMENSIONS = 16


class AcmeService:
    """Answers as the how-to says, or with ``reply`` where that is set. Keeps what it was sent."""

    def __init__(self) -> None:
        self.reply: HttpReply | None = None
        self.delivery: Delivery | None = None
        self.requests: list[HttpRequest] = []
        self._lock = threading.Lock()

    def unread(self, head: RequestHead) -> Delivery | None:
        return None

    def spools(self, head: RequestHead) -> bool:
        return False

    def answer(self, request: HttpRequest) -> HttpReply:
        with self._lock:
            self.requests.append(request)
        if self.reply is not None:
            return self.reply
        question = json.loads(request.body)
        answer = {
            "model": question["model"],
            "vectors": vectors_of(question["texts"], DIMENSIONS).tolist(),
            "tokens": sum(map(tokens_of, question["texts"])),
        }
        return HttpReply(body=json.dumps(answer).encode(), deliver=self.delivery)


@pytest.fixture
def service() -> AcmeService:
    return AcmeService()


@pytest.fixture
def url(service: AcmeService) -> Iterator[str]:
    listener = Listener(service)
    yield listener.url
    listener.close()


@pytest.fixture(scope="session")
def how_to() -> Path:
    return Path(__file__).parents[2] / "docs" / "how-to"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``template("http")``: what ``embedcore provider new acme --http`` writes."""

    @cache
    def written(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(f"new-{kind}") / "embedcore-acme"
        write("acme", kind, folder)
        return folder

    return written


@pytest.fixture(scope="session")
def plugin(template: Callable[[str], Path]) -> ModuleType:
    """The module of the template that does everything by hand, not installed."""
    path = template("plain") / "src" / "embedcore_acme" / "plugin.py"
    spec = importlib.util.spec_from_file_location("embedcore_acme.plugin", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
