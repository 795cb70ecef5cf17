"""A strict JSON service on a real socket, for the tests of a provider: it counts and bills.

::

    class FakeAcme(FakeService):
        def reply(self, question):
            self.take(question, {"model": str, "texts": list})
            ...
            return {"vectors": [...], "tokens": self.bill(texts)}

What the service refuses, ``reply`` raises as ``Refused``. ``ServiceContract`` is the contract of a
provider over it. A recording of a real service is played
by ``Recorded``, which compares what it was asked with what was asked then.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from embedcore.testing.contract import EmbedderContract
from embedcore.testing.meter import Meter
from embedcore.testing.openai.http import (
    HttpReply,
    HttpRequest,
    OnSocket,
    late,
)
from embedcore.testing.vectors import tokens_of, vectors_of

if TYPE_CHECKING:
    from embedcore.provider.protocol import Embedder


class Refused(Exception):
    """A refusal: its status, the JSON of its body, and headers of its own."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.headers = dict(headers or {})


class TextQuota:
    """So many texts a minute, refilled steadily; the first minute's are there at once."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left, self._seen = float(per_minute), clock()
        self._lock = threading.Lock()

    def take(self, texts: int) -> bool:
        """Whether so many are left; if they are, they are taken."""
        with self._lock:
            now = self._clock()
            filled = self._left + (now - self._seen) * self._per_minute / 60
            self._left, self._seen = min(filled, float(self._per_minute)), now
            granted = self._left >= texts
            self._left -= texts if granted else 0
            return granted


class FakeService(OnSocket):
    """Use as a context manager. ``url``: its address.

    ``key_header``: where the key is, with what stands before it. ``always``: what each request is
    refused with; ``next_refusals``: what the next ones are refused with, first to last. ``echoes``:
    each request is answered with 503 and all that it was sent. ``delay``: seconds before each
    answer. ``seen``: requests so far, as JSON; ``texts``: those in them. ``quota``: in texts, of a
    service that counts those; what is beyond it is refused as ``too_fast`` says.
    """

    path: str = "/"
    key_header: tuple[str, str] = ("authorization", "Bearer ")

    def __init__(self, *, key: str | None = None) -> None:
        self.key = key
        self.meter = Meter()
        self.seen: list[Any] = []
        self.paths: list[str] = []
        self.always: Refused | None = None
        self.next_refusals: list[Refused] = []
        self.echoes = False
        self.delay = 0.0
        self.texts: list[str] = []
        self.quota: TextQuota | None = None
        self._lock = threading.RLock()

    def reply(self, question: dict[str, Any]) -> object:
        """The JSON that answers a request, or ``Refused``. Called from several threads."""
        raise NotImplementedError

    def headers_of_reply(self) -> Mapping[str, str]:
        """Beside those of HTTP."""
        return {}

    def wrong_key(self) -> Refused:
        """What a request without the key is refused with."""
        return Refused(401, {"message": "invalid api token"})

    def wrong_path(self) -> Refused:
        return Refused(404, {"message": "not found"})

    def wrong_body(self, why: str) -> Refused:
        """What a request is refused with that the specification does not allow."""
        return Refused(400, {"message": why})

    def too_fast(self) -> Refused:
        """What is beyond ``quota`` is refused with."""
        return Refused(429, {"message": "too many requests"})

    def take(self, question: Mapping[str, Any], fields: Mapping[str, object]) -> None:
        """Refuse a field that is not among ``fields``, is missing, or is none of its values.

        A field's values are a type or a tuple of types, or the values themselves as a list; the
        name of one that may be left out ends with a question mark.
        """
        known = {name.rstrip("?"): (name.endswith("?"), kind) for name, kind in fields.items()}
        for name in question:
            if name not in known:
                raise self.wrong_body(f"unknown field '{name}'")
        for name, (optional, kind) in known.items():
            if name not in question:
                if optional:
                    continue
                raise self.wrong_body(f"'{name}' is required")
            value = question[name]
            if isinstance(kind, list):
                fits = value in kind and type(value) in map(type, kind)
            else:
                fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # type: ignore[arg-type]
            if not fits:
                raise self.wrong_body(f"invalid value for '{name}'")

    def strings(self, texts: object) -> list[str]:
        """A string, or a list of them, as a list; anything else is refused."""
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.wrong_body("texts must be a list of strings")
        with self._lock:
            self.texts += texts
        return texts

    def bill(self, texts: Sequence[str]) -> int:
        """The tokens of these texts, a token for four bytes, which the customer pays.

        Raises ``too_fast`` for texts beyond the quota.
        """
        if self.quota is not None and not self.quota.take(len(texts)):
            raise self.too_fast()
        tokens = sum(map(tokens_of, texts))
        self.meter.bill(texts, tokens)
        return tokens

    def vectors(self, texts: Sequence[str], width: int, *, salt: str = "") -> list[list[float]]:
        """One vector of length 1 for each text; ``salt``: what else decides it."""
        rows: list[list[float]] = vectors_of(texts, width, salt=salt).tolist()
        return rows

    def answer(self, request: HttpRequest) -> HttpReply:
        with self.meter.one_request():
            try:
                found = self._answered(request)
                if isinstance(found, HttpReply):
                    return found
                reply = in_json(200, found, self.headers_of_reply())
                return replace(reply, deliver=late(self.delay)) if self.delay else reply
            except Refused as refused:
                self.meter.reject()
                return in_json(refused.status, refused.body, refused.headers)

    def _answered(self, request: HttpRequest) -> object:
        if self.echoes:
            told = {**request.headers, "body": request.body.decode("utf-8", "replace")}
            raise Refused(503, {"message": json.dumps(told)})
        if request.method != "POST" or not self.is_path(request.path):
            raise self.wrong_path()
        self.check_key(request)
        try:
            question = request.json()
        except ValueError:
            raise self.wrong_body("invalid JSON") from None
        if not isinstance(question, dict):
            raise self.wrong_body("no JSON object")
        with self._lock:
            self.seen.append(question)
            self.paths.append(request.path)
            refusal = self.next_refusals.pop(0) if self.next_refusals else self.always
        if refusal is not None:
            raise refusal
        return self.reply(question)

    def check_key(self, request: HttpRequest) -> None:
        """Refuse a request without the key."""
        name, before = self.key_header
        if self.key is not None and request.headers.get(name) != before + self.key:
            raise self.wrong_key()

    def is_path(self, path: str) -> bool:
        return path == self.path


def in_json(status: int, body: object, headers: Mapping[str, str]) -> HttpReply:
    """A reply with this body."""
    return HttpReply(
        status=status,
        headers={"content-type": "application/json", **headers},
        body=json.dumps(body).encode(),
    )


class Recorded(FakeService):
    """Plays one exchange of a recording. ``question``: what was asked; ``answer_body``: the answer;
    ``is_whole``: none of its vectors was cut short. A test that asks for a recording that is not
    there is skipped.

    ``file``: JSON with a list ``interactions`` of ``request`` (``uri``, ``body``), ``status``,
    ``headers`` and ``body``. Vectors that the recording has cut short are completed with zeros by
    ``completed``, which a class for recordings of its own form may replace.
    """

    def __init__(self, file: Path, *, number: int = 0) -> None:
        super().__init__()
        if not file.is_file():
            pytest.skip(f"the recording {file.name} is not beside the repository")
        text = file.read_text(encoding="utf-8")
        exchange = json.loads(text)["interactions"][number]
        self.is_whole = json.dumps(exchange, ensure_ascii=False).count("…cut: ") == 0
        self.question: dict[str, Any] = exchange["request"]["body"]
        self.uri: str = exchange["request"]["uri"]
        self.status: int = exchange["status"]
        self._headers: dict[str, str] = exchange["headers"]
        self.answer_body = self.completed(exchange["body"])
        self.path = "/" + self.uri.split("/", 3)[3]

    def headers_of_reply(self) -> Mapping[str, str]:
        return {name: value for name, value in self._headers.items() if name != "content-length"}

    def reply(self, question: dict[str, Any]) -> object:  # noqa: ARG002
        if self.status != 200:
            raise Refused(self.status, self.answer_body, self.headers_of_reply())
        return self.answer_body

    def completed(self, value: Any) -> Any:
        """With every vector as long as it says that it was ("…cut: 1536 numbers in all")."""
        if isinstance(value, str) and "…cut: " in value:
            start, _, told = value.partition("…cut: ")
            size = int(told.split()[0])
            # Base64 of float32: as many signs at its end as make whole numbers.
            padding = "=" * (size * 3 // 4 % 4)
            return start + "A" * (size - len(start) - len(padding)) + padding
        if isinstance(value, dict):
            return {name: self.completed(each) for name, each in value.items()}
        if not isinstance(value, list):
            return value
        if value and isinstance(value[-1], str) and "numbers in all" in value[-1]:
            width = int(value[-1].split()[1])
            return value[:-1] + [0.0] * (width - len(value) + 1)
        return [self.completed(each) for each in value]


class ServiceContract(EmbedderContract):
    """The contract over a fixture ``server`` that is a ``FakeService``: define ``embedder_of``."""

    server: FakeService

    @pytest.fixture(autouse=True)
    def _of_a_service(self, server: FakeService) -> None:
        self.server = server

    def embedder_of(self, server: Any) -> Embedder:
        """An embedder that asks this server."""
        raise NotImplementedError(f"{type(self).__name__} must define embedder_of(server)")

    def make_embedder(self) -> Embedder:
        return self.embedder_of(self.server)

    def make_broken_embedder(self) -> Embedder:
        # It repeats the key and the texts.
        self.server.echoes = True
        return self.make_embedder()

    def make_limited_embedder(self) -> Embedder:
        refused = self.server.too_fast()
        headers = {**refused.headers, "retry-after": f"{self.retry_after:g}"}
        self.server.always = Refused(refused.status, refused.body, headers)
        return self.make_embedder()

    def make_slow_embedder(self) -> Embedder:
        self.server.delay = 10.0
        return self.make_embedder()

    def server_texts(self) -> list[str]:
        return self.server.texts

    def server_bill(self) -> int:
        return self.server.meter.billed_tokens

    def server_requests(self) -> int:
        return self.server.meter.requests
