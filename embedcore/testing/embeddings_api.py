"""What does the fake answer on ``/v1/embeddings`` when nothing goes wrong?

Follows the published API description, recorded replies and reported error wordings of OpenAI as of
November 2026.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from embedcore.testing.api import OPENAI_MODELS, Answer, ApiError, FakeModel, Router, model_named
from embedcore.testing.billing import counted_by_bytes, openai_tokens
from embedcore.testing.vectors import BYTES_PER_TOKEN, vectors_of
from embedcore.testing.wire import HttpRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
        asked = self.asked(_fields(request))

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
        for field in fields:
            if field not in _FIELDS:
                raise ApiError(400, f"Unrecognized request argument supplied: {field}")
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


def _fields(request: HttpRequest) -> Mapping[str, object]:
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
