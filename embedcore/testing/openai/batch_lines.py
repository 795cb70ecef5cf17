"""Input and output lines of the fake's jobs.

The codes are those reported of OpenAI and listed by Azure as of 2026; OpenAI publishes no list.

The form is that of a recorded batch of 2026-08-19 and of OpenAI's published line schemas of 2025.
A number of a float list has 15 decimals and always the same width: enough to give the float32 back
exactly, and the size of a file is known before a line of it is written.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from embedcore.testing.openai.batch_settings import FileLimits, Quirks
from embedcore.testing.openai.embeddings import ApiError, Asked, EmbeddingsApi
from embedcore.testing.vectors import vectors_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedcore.provider.types import Vectors


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


_ROWS = 64
_NUMBER = 19  # sign, digit, point, 15 digits, comma
_DECIMALS = 10**15
_GROUP = 10**5


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a line has no vector. ``http``: as the endpoint refused it, else without a response.

    ``usage``: its body says what the line cost all the same.
    """

    http: bool = True
    status: int = 400
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    message: str = ""
    usage: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of a line. ``salt``: of its vectors; ``custom_id``: None to write none."""

    line: Line
    custom_id: str | None
    failure: Failure | None = None
    salt: str = ""


class OutputContent:
    """The bytes of an output or error file, made as they are read."""

    def __init__(self, results: Sequence[Result], quirks: Quirks) -> None:
        self.results = results
        self.quirks = quirks
        self._end = quirks.line_end.encode() * (2 if quirks.blank_lines else 1)
        self._mark = b"\xef\xbb\xbf" if quirks.bom else b""

    @cached_property
    def size(self) -> int:
        whole = len(self._mark) + sum(self._sizes)
        if self.results and not self.quirks.final_newline:
            whole -= len(self._end)
        if self.quirks.cut is None or not self.results:
            return whole
        full = min(int(len(self.results) * self.quirks.cut), len(self.results) - 1)
        return len(self._mark) + sum(self._sizes[:full]) + self._sizes[full] // 2

    @cached_property
    def _sizes(self) -> list[int]:
        return [self._size_of(result) for result in self.results]

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        place = 0
        for block in self._all_blocks(start):
            # A block that lies before ``start`` is only as long as it would be, not written.
            size = block if isinstance(block, int) else len(block)
            begin, end = max(start - place, 0), min(self.size - place, size)
            place += size
            if not isinstance(block, int) and begin < end:
                yield block[begin:end]
            if place >= self.size:
                return

    def _all_blocks(self, start: int) -> Iterator[bytes | int]:
        if self._mark:
            yield self._mark
        place = len(self._mark)
        for first in range(0, len(self.results), _ROWS):
            size = sum(self._sizes[first : first + _ROWS])
            if place + size <= start:
                yield size
            else:
                yield from self._written(self.results[first : first + _ROWS])
            place += size

    def _written(self, results: Sequence[Result]) -> Iterator[bytes]:
        for kind, group in groupby(results, self.kind):
            rows = list(group)
            if kind is None:
                yield b"".join(frame(row, self.quirks)[0] + self._end for row in rows)
                continue
            width, salt, encoding = kind
            texts = [text for row in rows for text in row.line.texts]
            vectors = iter(written(vectors_of(texts, width, salt=salt), encoding))
            parts = []
            for row in rows:
                pieces = frame(row, self.quirks)
                for piece in pieces[:-1]:
                    parts += [piece, next(vectors)]
                parts += [pieces[-1], self._end]
            yield b"".join(parts)

    def kind(self, result: Result) -> tuple[int, str, str] | None:
        """Width, salt and encoding of a line's vectors; None for a line without any."""
        if result.failure is not None or result.line.asked is None:
            return None
        return result.line.asked.width, result.salt, encoding_of(result, self.quirks)

    def _size_of(self, result: Result) -> int:
        pieces = frame(result, self.quirks)
        size = sum(map(len, pieces)) + len(self._end)
        kind = self.kind(result)
        return size if kind is None else size + (len(pieces) - 1) * written_size(kind[0], kind[2])


def model_of(result: Result, quirks: Quirks) -> str | None:
    asked = result.line.asked
    return quirks.reply_model or (asked.model if asked else None)


def encoding_of(result: Result, quirks: Quirks) -> str:
    asked = result.line.asked
    return "float" if asked is None or quirks.ignores_base64 else asked.encoding


def frame(result: Result, quirks: Quirks) -> list[bytes]:
    """A line in pieces: a vector belongs between each two of them."""
    number = result.line.number
    head = f'{{"id":"batch_req_{number:032x}",'
    if quirks.numeric_ids:
        head += f'"custom_id":{number - 1},'
    elif result.custom_id is not None:
        head += f'"custom_id":{json.dumps(result.custom_id)},'
    failure = result.failure
    if failure is not None and not failure.http:
        error = {"code": failure.code, "message": failure.message}
        return [f'{head}"response":null,"error":{json.dumps(error)}}}'.encode()]
    body = _body(result, quirks) if failure is None else [_error_body(failure, result.line)]
    if quirks.string_body:
        body = [json.dumps(piece)[1:-1] for piece in body]
        body = ['"' + body[0], *body[1:]]
        body[-1] += '"'
    status = 200 if failure is None else failure.status
    body[0] = (
        f'{head}"response":{{"status_code":{status},"request_id":"{number:032x}","body":{body[0]}'
    )
    said = '{"code":"","message":""}' if quirks.empty_error and failure is None else "null"
    body[-1] += f'}},"error":{said}}}'
    return [piece.encode() for piece in body]


def _body(result: Result, quirks: Quirks) -> list[str]:
    asked = result.line.asked
    if asked is None:
        raise TypeError("a line that was not understood cannot have been run")
    opened, closed = '""' if encoding_of(result, quirks) == "base64" else "[]"
    item = f'{{"object":"embedding","embedding":{opened}'
    pieces = [f'{{"object":"list","data":[{item}']
    pieces += [f'{closed},"index":{place}}},{item}' for place in range(len(asked.texts) - 1)]
    rest: dict[str, object] = {"model": model_of(result, quirks)}
    if quirks.line_usage:
        rest["usage"] = {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens}
    pieces.append(f'{closed},"index":{len(asked.texts) - 1}}}],{json.dumps(rest)[1:]}')
    return pieces


def _error_body(failure: Failure, line: Line) -> str:
    error = {
        "message": failure.message,
        "type": failure.kind,
        "param": failure.param,
        "code": failure.code,
    }
    usage = {"prompt_tokens": line.tokens, "total_tokens": line.tokens}
    return json.dumps({"error": error, **({"usage": usage} if failure.usage else {})})


def written_size(width: int, encoding: str) -> int:
    """Bytes of a vector in a line, without quotes or brackets."""
    return -(-4 * width // 3) * 4 if encoding == "base64" else width * _NUMBER - 1


def written(vectors: Vectors, encoding: str) -> list[bytes]:
    """Each vector as it stands in a line: base64, or numbers with commas."""
    if encoding == "base64":
        return [base64.b64encode(row) for row in vectors.astype("<f4", copy=False)]
    rows, width = vectors.shape
    digits = np.empty((rows, width, _NUMBER), dtype=np.uint8)
    numbers = np.rint(np.abs(vectors.astype(np.float64)) * _DECIMALS).astype(np.int64)
    table = _five_digits()
    for end in (18, 13, 8):
        numbers, last = np.divmod(numbers, _GROUP)
        digits[:, :, end - 5 : end] = table[last]
    digits[:, :, 2] = ord(".")
    digits[:, :, 1] = numbers + ord("0")
    digits[:, :, 0] = np.where(vectors < 0, ord("-"), ord(" "))
    digits[:, :, 18] = ord(",")
    return [row.tobytes()[:-1] for row in digits]


@cache
def _five_digits() -> NDArray[np.uint8]:
    """The five digits of every number below 100,000."""
    numbers = np.arange(_GROUP)
    places = [numbers // 10**power % 10 for power in (4, 3, 2, 1, 0)]
    return (np.stack(places, axis=1) + ord("0")).astype(np.uint8)
