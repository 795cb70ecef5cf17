"""What does the fake make of a batch's input file: its lines, or the reasons to refuse it?

The codes are those reported of OpenAI and listed by Azure as of 2026; OpenAI publishes no list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from embedcore.testing.api import ApiError
from embedcore.testing.batchsettings import FileLimits
from embedcore.testing.embeddings_api import Asked, EmbeddingsApi

_MOST_ERRORS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class LineError:
    """A reason why a file is refused. ``line`` counts from 1; None: the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def described(self) -> dict[str, object]:
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "line": self.line,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One request of a file, ``number`` counting from 1. ``refused``: the API will not run it."""

    number: int
    custom_id: str
    asked: Asked | None = None
    refused: ApiError | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.asked.texts) if self.asked is not None else ()

    @property
    def tokens(self) -> int:
        return self.asked.tokens if self.asked is not None else 0


@dataclass(kw_only=True, slots=True)
class Parsed:
    """A file's lines; ``errors`` refuse all of it."""

    lines: list[Line] = field(default_factory=list)
    errors: list[LineError] = field(default_factory=list)
    model: str | None = None

    @property
    def tokens(self) -> int:
        return sum(line.tokens for line in self.lines)


class Refusal(Exception):
    """One line refuses the file."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class FileReader:
    """Reads input files for one endpoint."""

    def __init__(self, api: EmbeddingsApi, limits: FileLimits, *, endpoint: str) -> None:
        self._api = api
        self._limits = limits
        self._endpoint = endpoint

    def read(self, raw: Iterable[bytes], size: int) -> Parsed:
        """``raw``: the file's lines, ``size``: its bytes."""
        parsed = Parsed()
        if size > self._limits.max_bytes:
            message = f"The file is larger than {self._limits.max_bytes} bytes."
            parsed.errors.append(LineError(code="file_too_large", message=message))
            return parsed
        seen: set[str] = set()
        for number, text in _numbered(raw):
            if len(parsed.errors) >= _MOST_ERRORS:
                return parsed
            try:
                parsed.lines.append(self._line(number, text, parsed, seen))
            except Refusal as why:
                parsed.errors.append(
                    LineError(code=why.code, message=why.message, line=number, param=why.param)
                )
        parsed.errors.extend(self._too_many(parsed))
        return parsed

    def _line(self, number: int, text: bytes, parsed: Parsed, seen: set[str]) -> Line:
        given = _object(text)
        custom_id = given.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            message = "Missing required parameter: 'custom_id'."
            raise Refusal("missing_required_parameter", message, "custom_id")
        if custom_id in seen:
            message = f"The custom_id '{custom_id}' is used by more than one line."
            raise Refusal("duplicate_custom_id", message, "custom_id")
        seen.add(custom_id)
        self._check_target(given)
        body = given.get("body")
        if not isinstance(body, dict):
            raise Refusal(
                "missing_required_parameter", "Missing required parameter: 'body'.", "body"
            )
        try:
            asked = self._api.asked(body)
        except ApiError as error:
            self._check_model(body.get("model"), error, parsed)
            return Line(number=number, custom_id=custom_id, refused=error)
        self._check_model(asked.model, None, parsed)
        return Line(number=number, custom_id=custom_id, asked=asked)

    def _check_target(self, given: Mapping[str, object]) -> None:
        if given.get("method") != "POST":
            raise Refusal("invalid_method", "The method of a line must be POST.", "method")
        if given.get("url") != self._endpoint:
            message = f"The url of a line must be the endpoint of the batch, {self._endpoint}."
            raise Refusal("url_mismatch", message, "url")

    def _check_model(self, model: object, error: ApiError | None, parsed: Parsed) -> None:
        if not isinstance(model, str):
            raise Refusal(
                "missing_required_parameter", "Missing required parameter: 'model'.", "body.model"
            )
        if error is not None and error.error["code"] == "model_not_found":
            raise Refusal("model_not_found", str(error), "body.model")
        if parsed.model is None:
            parsed.model = model
        if model != parsed.model:
            message = f"This line names the model '{model}', another one '{parsed.model}'."
            raise Refusal("model_mismatch", message, "body.model")

    def _too_many(self, parsed: Parsed) -> Iterator[LineError]:
        lines, inputs = len(parsed.lines), sum(len(line.texts) for line in parsed.lines)
        if not lines and not parsed.errors:
            yield LineError(code="empty_file", message="The file has no requests.")
        if lines > self._limits.max_lines:
            message = (
                f"The file has {lines} requests; at most {self._limits.max_lines} are allowed."
            )
            yield LineError(code="too_many_tasks", message=message)
        if inputs > self._limits.max_inputs:
            message = (
                f"The file has {inputs} inputs; at most {self._limits.max_inputs} are allowed."
            )
            yield LineError(code="too_many_inputs", message=message)


def _numbered(raw: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, text in enumerate(raw, 1):
        if text.strip():
            yield number, text


def _object(text: bytes) -> dict[str, object]:
    # Bytes would be decoded leniently: a byte-order mark must not pass, as it does not there.
    try:
        given = json.loads(text.decode("utf-8"))
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise Refusal("invalid_json_line", "This line is not parseable as valid JSON.")
    return given
