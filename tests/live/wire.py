"""What a service answered, read apart from the code that is tested: models, rows and tokens."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from embedcore.provider import http

# Where services write the tokens of an answer.
TOKENS = (
    ("usage", "total_tokens"),
    ("usage", "prompt_tokens"),
    ("meta", "billed_units", "input_tokens"),
    ("usageMetadata", "promptTokenCount"),
    ("prompt_eval_count",),
)


@dataclass(kw_only=True)
class Exchange:
    """One request and its answer, without texts, vectors and headers.

    ``document``: the JSON of an answer that has no vectors; ``rows``: vectors in it.
    """

    method: str
    path: str
    status: int
    asked_model: str = ""
    rows: int = 0
    tokens: int | None = None
    model: str | None = None
    document: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Line:
    """One line of a batch's results. ``form``: "numbers", "base64", or "none" without a vector."""

    tokens: int | None
    form: str


@dataclass
class Wire:
    """All exchanges so far; ``results``: path of a file → its lines, as last read. ``asked_model``:
    that of the requests that are sent now."""

    asked_model: str = ""
    exchanges: list[Exchange] = field(default_factory=list)
    results: dict[str, list[Line]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note what every session of this process sends and receives."""
        send = http.Session.send

        def noted(session: http.Session, call: http.Call, asked: Any) -> http.Answer:
            answer = send(session, call, asked)
            self._note(call, answer)
            return answer

        http.Session.send = noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            http.Session.send = send  # type: ignore[method-assign]

    @contextmanager
    def named(self, model: str) -> Iterator[None]:
        """Requests meanwhile are of this model."""
        before, self.asked_model = self.asked_model, model
        try:
            yield
        finally:
            self.asked_model = before

    def tokens_by_model(self) -> dict[str, int | None]:
        """Model → the tokens that its answers name; None where one of them names none."""
        found: dict[str, int | None] = {}
        for each in self.answered:
            so_far = found.get(each.asked_model, 0)
            known = so_far is not None and each.tokens is not None
            found[each.asked_model] = so_far + each.tokens if known else None  # type: ignore[operator]
        return found

    @property
    def answered(self) -> list[Exchange]:
        """Answers with vectors."""
        return [each for each in self.exchanges if each.rows]

    @property
    def refused(self) -> list[Exchange]:
        return [each for each in self.exchanges if each.status >= 400]

    def _note(self, call: http.Call, answer: http.Answer) -> None:
        if answer.download is not None:
            answer.download = Copied(answer.download, self, call.path)  # type: ignore[assignment]
            return
        document = as_object(bytes(answer.body))
        rows = vectors_in(document)
        each = Exchange(
            method=call.method,
            path=call.path,
            status=answer.status,
            asked_model=self.asked_model,
            rows=rows,
            tokens=tokens_in(document) if answer.status < 300 else None,
            model=document.get("model") if isinstance(document.get("model"), str) else None,
            document={} if rows else document,
        )
        with self._lock:
            self.exchanges.append(each)


class Copied:
    """A download, of which a copy is read line by line once it is complete."""

    def __init__(self, download: http.Download, wire: Wire, path: str) -> None:
        self._download, self._wire, self._path = download, wire, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._download, name)

    def pieces(self) -> Iterator[bytes]:
        whole = bytearray()
        for piece in self._download.pieces():
            whole += piece
            yield piece
        self._wire.results[self._path] = [line_of(each) for each in whole.splitlines() if each]


def line_of(raw: bytes) -> Line:
    document = as_object(raw)
    response = document.get("response")
    body = response.get("body", response) if isinstance(response, dict) else {}
    body = body if isinstance(body, dict) else {}
    first = _first_vector(body)
    form = {list: "numbers", str: "base64"}.get(type(first), "none")
    return Line(tokens=tokens_in(body), form=form)


def _first_vector(document: dict[str, Any]) -> object:
    data = document.get("data")
    if isinstance(data, list) and data and isinstance(data[0], dict):
        return data[0].get("embedding")
    one = document.get("embedding")
    return one.get("values") if isinstance(one, dict) else one


def vectors_in(document: dict[str, Any]) -> int:
    """How many vectors an answer has, in the forms of the services there are."""
    data, several = document.get("data"), document.get("embeddings")
    if isinstance(data, list):
        return sum(isinstance(each, dict) and "embedding" in each for each in data)
    if isinstance(several, dict):
        several = several.get("float")
    if isinstance(several, list):
        return len(several)
    return int("embedding" in document)


def tokens_in(document: dict[str, Any]) -> int | None:
    """The tokens that an answer names, or None."""
    for path in TOKENS:
        found: Any = document
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    return None


def as_object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
