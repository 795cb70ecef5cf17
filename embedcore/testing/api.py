"""What do the fake's endpoints have in common: errors, answers, models, and who answers a path?"""

from __future__ import annotations

import hmac
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from embedcore.testing.wire import HttpReply, HttpRequest

if TYPE_CHECKING:
    from embedcore.testing.embeddings_api import Embeddings


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeModel:
    """A model the fake serves.

    ``shortens``: it accepts the ``dimensions`` parameter. ``openai_tokens``: it bills as OpenAI's
    models do; else a token is four bytes, as for ``tokens_of``.
    """

    dimensions: int
    shortens: bool = True
    openai_tokens: bool = False


OPENAI_MODELS: Mapping[str, FakeModel] = {
    "text-embedding-3-small": FakeModel(dimensions=1536, openai_tokens=True),
    "text-embedding-3-large": FakeModel(dimensions=3072, openai_tokens=True),
    "text-embedding-ada-002": FakeModel(dimensions=1536, shortens=False, openai_tokens=True),
}


class ApiError(Exception):
    """A request that is answered with an error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def reply(self) -> HttpReply:
        body: dict[str, object] = {"error": self.error}
        if self.status == 401:  # reported bodies of recent date carry it beside the error
            body["status"] = self.status
        return json_reply(body, status=self.status, headers=self.headers)


def json_reply(
    body: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> HttpReply:
    return HttpReply(
        status=status,
        headers={"content-type": "application/json", **(headers or {})},
        body=json.dumps(body, separators=(",", ":")).encode(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an endpoint has to say, before it is written and before anything goes wrong.

    ``texts`` and ``tokens``: what it bills, if it is sent. ``embeddings`` computes the vectors.
    """

    reply: HttpReply | None = None
    embeddings: Callable[[], Embeddings] | None = None
    texts: Sequence[str] = ()
    tokens: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def bills(self) -> bool:
        return bool(self.texts)

    def written(self) -> HttpReply:
        if self.embeddings is None:
            reply = self.reply or HttpReply()
            return replace(reply, headers={**self.headers, **reply.headers})
        headers = {"content-type": "application/json", **self.headers}
        return HttpReply(headers=headers, body=self.embeddings().body())


def check_key(request: HttpRequest, expected: str | None) -> None:
    """Raises ``ApiError`` (401) unless the request has this key. None: no key is needed."""
    if expected is None:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme != "Bearer" or not key:
        raise ApiError(401, "No API key was sent. It belongs in an Authorization header.")
    if not hmac.compare_digest(key.encode(), expected.encode()):
        masked = f"{key[:7]}****{key[-4:]}" if len(key) > 16 else "****"
        message = (
            f"Incorrect API key provided: {masked}. You can find your API key at "
            "https://platform.openai.com/account/api-keys."
        )
        raise ApiError(401, message, code="invalid_api_key")


Endpoint: TypeAlias = Callable[[HttpRequest, Mapping[str, str]], Answer]


def path_pattern(path: str) -> re.Pattern[str]:
    """Matches a path with values for its ``{names}``."""
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


class Router:
    """Which endpoint answers a path. ``/v1/files/{id}`` binds ``id``."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Endpoint]] = []

    def add(self, method: str, path: str, endpoint: Endpoint) -> None:
        self._routes.append((method, path_pattern(path), endpoint))

    def answer(self, request: HttpRequest) -> Answer:
        """The endpoint's answer; an ``ApiError`` of it, or of finding none, as its reply."""
        try:
            for method, pattern, endpoint in self._routes:
                match = pattern.fullmatch(request.path)
                if match and method == request.method:
                    return endpoint(request, match.groupdict())
            raise ApiError(404, f"Invalid URL ({request.method} {request.path})")
        except ApiError as error:
            return Answer(reply=error.reply())


class ModelsApi:
    """``GET /v1/models`` and ``/v1/models/{model}``."""

    def __init__(self, models: Mapping[str, FakeModel]) -> None:
        self._models = models
        self._created = int(time.time())

    def register(self, router: Router) -> None:
        router.add("GET", "/v1/models", self.list)
        router.add("GET", "/v1/models/{model}", self.retrieve)

    def list(self, request: HttpRequest, parameters: Mapping[str, str]) -> Answer:  # noqa: ARG002
        data = [self._described(name) for name in self._models]
        return Answer(reply=json_reply({"object": "list", "data": data}))

    def retrieve(self, request: HttpRequest, parameters: Mapping[str, str]) -> Answer:  # noqa: ARG002
        model_named(self._models, parameters["model"])
        return Answer(reply=json_reply(self._described(parameters["model"])))

    def _described(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "fake"}


def model_named(models: Mapping[str, FakeModel], name: str) -> FakeModel:
    if name not in models:
        message = f"The model `{name}` does not exist or you do not have access to it."
        raise ApiError(404, message, code="model_not_found")
    return models[name]
