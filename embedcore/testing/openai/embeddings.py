"""Endpoint ``/v1/embeddings`` of the fake, its models and its errors.

Follows the published API description, recorded replies and reported error wordings of OpenAI as of
November 2026.
"""

from __future__ import annotations

import base64
import hmac
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from embedcore.testing.openai.http import HttpReply, HttpRequest
from embedcore.testing.vectors import BYTES_PER_TOKEN, counted_by_bytes, openai_tokens, vectors_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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

    def __init__(self, models: Mapping[str, FakeModel], *, owner: str = "fake") -> None:
        self._models = models
        self._owner = owner
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
        return {"id": name, "object": "model", "created": self._created, "owned_by": self._owner}


def model_named(models: Mapping[str, FakeModel], name: str) -> FakeModel:
    if name not in models:
        message = f"The model `{name}` does not exist or you do not have access to it."
        raise ApiError(404, message, code="model_not_found")
    return models[name]


EMBEDDINGS = "/v1/embeddings"

Count: TypeAlias = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest request. ``max_request_tokens`` is gauged as UTF-8 bytes / 4, as OpenAI does."""

    max_texts: int = 2048
    max_text_tokens: int = 8192
    max_request_tokens: int = 300_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a request for embeddings asks, checked: ``width`` numbers for each text."""

    model: str
    texts: Sequence[str]
    tokens: int
    width: int
    encoding: str


@dataclass(kw_only=True, slots=True)
class Embeddings:
    """The body of a successful reply, in pieces that a fault may change before it is written.

    ``vectors`` holds the true ones; ``items`` pairs an ``index`` with the place of its vector in
    ``vectors``, or with any other JSON value.
    """

    vectors: NDArray[np.float32]
    encoding: str
    items: list[dict[str, object]]
    rest: dict[str, object]

    def body(self) -> bytes:
        data = [{**item, "embedding": self.encoded(item["embedding"])} for item in self.items]
        reply = {"object": "list", "data": data, **self.rest}
        return json.dumps(reply, separators=(",", ":")).encode()

    def encoded(self, value: object) -> object:
        """A place in ``vectors`` as its vector in the encoding asked for; the rest unchanged."""
        if not isinstance(value, int):
            return value
        return encode(self.vectors[value], self.encoding)


def encode(vector: NDArray[np.float32], encoding: str) -> object:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


class EmbeddingsApi:
    """``POST /v1/embeddings``. ``count`` says what each text costs; None: as its model bills."""

    def __init__(
        self,
        *,
        models: Mapping[str, FakeModel] = OPENAI_MODELS,
        limits: Limits | None = None,
        count: Count | None = None,
        salt: str = "",
    ) -> None:
        self._models = models
        self._limits = limits or Limits()
        self._count = count
        self.salt = salt

    def register(self, router: Router) -> None:
        router.add("POST", EMBEDDINGS, self.create)

    def create(self, request: HttpRequest, parameters: Mapping[str, str]) -> Answer:  # noqa: ARG002
        asked = self.asked(fields_of(request))

        def embeddings() -> Embeddings:
            return Embeddings(
                vectors=vectors_of(asked.texts, asked.width, salt=self.salt),
                encoding=asked.encoding,
                items=[
                    {"object": "embedding", "index": place, "embedding": place}
                    for place in range(len(asked.texts))
                ],
                rest={
                    "model": asked.model,
                    "usage": {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens},
                },
            )

        return Answer(
            embeddings=embeddings,
            texts=asked.texts,
            tokens=asked.tokens,
            headers={"openai-model": asked.model},
        )

    def asked(self, fields: Mapping[str, object]) -> Asked:
        """The body of a request, read; raises ``ApiError`` for what the API would refuse."""
        for given in fields:
            if given not in _FIELDS:
                raise ApiError(400, f"Unrecognized request argument supplied: {given}")
        name = fields.get("model")
        if not isinstance(name, str):
            raise ApiError(400, "you must provide a model parameter")
        model = model_named(self._models, name)
        encoding = fields.get("encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise ApiError(400, f"Invalid value: {encoding!r}.", param="encoding_format")
        texts, counted = self._texts(fields.get("input"))
        width = self._width(fields.get("dimensions"), model)
        if counted is None:
            counts = self._counts(texts, model)
            gauge = math.ceil(sum(len(text.encode()) for text in texts) / BYTES_PER_TOKEN)
        else:
            counts, gauge = counted, sum(counted)
        tokens = self._check_size(counts, gauge)
        return Asked(model=name, texts=texts, tokens=tokens, width=width, encoding=str(encoding))

    def _texts(self, given: object) -> tuple[list[str], list[int] | None]:
        """The texts, and their tokens where these were given instead.

        A token array stands for the text that spells its numbers.
        """
        inputs = given if isinstance(given, list) else [given]
        if inputs and all(_is_integer(value) for value in inputs):
            inputs = [inputs]
        if not inputs:
            raise _invalid_input()
        if len(inputs) > self._limits.max_texts:
            most = self._limits.max_texts
            raise ApiError(
                400,
                f"Invalid 'input': array too long. Expected an array with maximum length {most}, "
                f"but got an array with length {len(inputs)} instead.",
                param="input",
                code="array_above_max_length",
            )
        arrays = [value for value in inputs if isinstance(value, list)]
        if not arrays:
            return _checked(inputs), None
        well_formed = all(array and all(map(_is_integer, array)) for array in arrays)
        if len(arrays) < len(inputs) or not well_formed:
            raise _invalid_input()
        return [str(array) for array in arrays], [len(array) for array in arrays]

    def _width(self, dimensions: object, model: FakeModel) -> int:
        if dimensions is None:
            return model.dimensions
        if not model.shortens:
            message = "This model does not support specifying dimensions."
            raise ApiError(400, message, param="dimensions")
        if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1:
            raise ApiError(400, "Invalid 'dimensions': must be at least 1.", param="dimensions")
        if dimensions > model.dimensions:
            message = f"Invalid 'dimensions': Must be less than or equal to {model.dimensions}."
            raise ApiError(400, message, param="dimensions")
        return dimensions

    def _counts(self, texts: Sequence[str], model: FakeModel) -> Sequence[int]:
        if self._count is not None:
            return self._count(texts)
        return openai_tokens(texts) if model.openai_tokens else counted_by_bytes(texts)

    def _check_size(self, counts: Sequence[int], gauge: int) -> int:
        most = self._limits.max_text_tokens
        for place, tokens in enumerate(counts):
            if tokens > most:
                raise ApiError(
                    400, f"Invalid 'input[{place}]': maximum input length is {most} tokens."
                )
        most = self._limits.max_request_tokens
        if gauge > most:
            code = "max_tokens_per_request"
            message = f"Requested {gauge} tokens, max {most} tokens per request"
            raise ApiError(400, message, kind=code, code=code)
        return sum(counts)


_FIELDS = {"input", "model", "dimensions", "encoding_format", "user"}


def fields_of(request: HttpRequest) -> Mapping[str, object]:
    try:
        asked = request.json()
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise ApiError(400, "We could not parse the JSON body of your request.")
    return asked


def _checked(inputs: Sequence[object]) -> list[str]:
    texts = []
    for place, value in enumerate(inputs):
        if not isinstance(value, str) or not _is_unicode(value):
            raise _invalid_input()
        if not value:
            message = f"Invalid 'input[{place}]': input cannot be an empty string."
            raise ApiError(400, message, param="input")
        texts.append(value)
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _invalid_input() -> ApiError:
    return ApiError(
        400,
        "'$.input' is invalid. Please check the API reference: "
        "https://platform.openai.com/docs/api-reference.",
    )
