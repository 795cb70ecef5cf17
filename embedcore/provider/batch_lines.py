"""Lines of the results of a batch: bytes as they arrive in, one outcome for each text out."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
import pybase64

from embedcore.errors import Billed, InputTooLong, RequestRejected, RequestTooLarge
from embedcore.provider import refusals
from embedcore.provider.batch_objects import Advice, no_advice
from embedcore.provider.error_bodies import ErrorBody, error_in, tokens_in
from embedcore.provider.http import UnreadableBody
from embedcore.provider.payloads import strings_in
from embedcore.provider.refusals import Asked, says_quota
from embedcore.provider.replies import (
    NUMBERS,
    BadReply,
    name_in,
    refuse_constant,
    row_of,
    without_repetition,
)
from embedcore.provider.size_hints import SizeHints, size_hints
from embedcore.provider.types import BatchOutcome

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors

# Of any honest line: a vector of 16,384 dimensions as text, and as much again.
_LONGEST: Final = 1_000_000
_BOM: Final = b"\xef\xbb\xbf"
# A line in another form than OpenAI's, in that.
AsLine = Callable[[dict[str, Any]], dict[str, Any]]


class HalfLine(Exception):
    """A body has come to its end in the middle of a line."""


def whole_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a body that comes in pieces of any size, without blank ones and line ends.

    Keeps no more than one piece and one line. Raises ``HalfLine`` instead of giving half a last
    line, and ``UnreadableBody`` for a line without end.
    """
    begun: list[bytes] = []
    size = 0
    first = True
    for piece in pieces:
        at = 0
        while (end := piece.find(b"\n", at)) >= 0:
            line = piece[at:end]
            at = end + 1
            if begun:
                line = b"".join((*begun, line))
                begun, size = [], 0
            if first:
                line, first = line.removeprefix(_BOM), False
            # A vector's line has nothing to strip, and is not copied.
            if line := line.strip():
                yield line
        begun.append(piece[at:])
        size += len(piece) - at
        if size > _LONGEST:
            raise UnreadableBody(f"a line of it is longer than {_LONGEST:,} bytes")
    last = b"".join(begun)
    last = (last.removeprefix(_BOM) if first else last).strip()
    if last:
        if not _is_whole(last):
            raise HalfLine
        yield last


def _is_whole(line: bytes) -> bool:
    """No part of a JSON object from its beginning on is itself one."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


_KEY: Final = b'"embedding":'
_MARK: Final = b'"#"'
_WIDEST: Final = 1 << 16
_NOTHING: Final = frozenset({"", "null", "none", "nil", "undefined"})
_NEVER_RUN: Final = frozenset({"batch_expired", "batch_cancelled"})
_PASSING: Final = _NEVER_RUN | {
    "rate_limit_exceeded",
    "rate_limit_error",
    "server_error",
    "internal_error",
    "internal_server_error",
    "service_unavailable",
    "overloaded_error",
    "timeout",
    "request_timeout",
}


# What a line had is not known here: a text of which no named length is too much.
_ANY_TEXT: Final = "\0" * 200_000


class LineReader:
    """Reads lines; one per download, from one thread.

    ``shown`` cleans what a server says for showing it. ``errors_billed``: whether a line that was
    answered with an error cost anything. ``advice``: what to add to a reason, by what is said.
    ``asked``: what each line was, as far as they are alike. ``as_line``: puts a line into OpenAI's
    form, for a service with another one.
    """

    def __init__(
        self,
        *,
        shown: Callable[[str], str],
        errors_billed: Billed,
        advice: Advice = no_advice,
        asked: Asked | None = None,
        as_line: AsLine | None = None,
    ) -> None:
        self._asked = asked or Asked(model="", endpoint="")
        self._length = lru_cache(maxsize=64)(self._judge_length)
        # Thousands of lines fail for the same reason.
        self._shown = lru_cache(maxsize=64)(shown)
        self._errors_billed = errors_billed
        self._advice = advice
        self._as_line = as_line

    def read(self, line: bytes) -> BatchOutcome:
        """The line's outcome; never raises. Without ``custom_id`` that is an error of no text."""
        found = _apart(line) if self._as_line is None else None
        if found is not None:
            document, vector = found
            body = document["response"]["body"]
            return BatchOutcome(
                id=document["custom_id"],
                vector=vector,
                tokens=tokens_in(body.get("usage")),
                model=self._model(body),
            )
        try:
            document = _document(line)
        except BadReply as bad:
            return BatchOutcome(
                id=_only_id(line), error=f"its line: {bad.reason}", billed="unknown"
            )
        return self.of(document)

    def of(self, document: object) -> BatchOutcome:
        """The outcome of a line that has been read already; never raises."""
        if self._as_line is not None:
            try:
                document = self._as_line(document)  # type: ignore[arg-type]
            except (LookupError, TypeError, ValueError, AttributeError):
                return BatchOutcome(error="a line has another form", billed="unknown")
        item = document.get("custom_id") if isinstance(document, dict) else None
        if not isinstance(item, str) or not isinstance(document, dict):
            return BatchOutcome(error="a line has no custom_id", billed="unknown")
        return self._outcome(item, document)

    def _outcome(self, item: str, document: dict[str, Any]) -> BatchOutcome:
        response, error = document.get("response"), document.get("error")
        response = response if isinstance(response, dict) else {}
        body = _body(response)
        status = _number(response.get("status_code"))
        if (
            not _says_nothing(error)
            or not _is_success(status, body)
            or ("data" not in body and error_in(body).own)
        ):
            # Some say in the place of the body itself what is wrong.
            return self._failure(item, status, error, body or response)
        tokens = tokens_in(body.get("usage"))
        try:
            vector = _vector(body)
        except BadReply as bad:
            return BatchOutcome(id=item, error=bad.reason, tokens=tokens, billed="unknown")
        return BatchOutcome(id=item, vector=vector, tokens=tokens, model=self._model(body))

    def _failure(
        self, item: str, status: object, error: object, body: dict[str, Any]
    ) -> BatchOutcome:
        said = error_in(body) if _says_nothing(error) else error_in({"error": error})
        status = status if type(status) is int else _status_in(said)
        words = ": ".join(dict.fromkeys(filter(None, (said.code or said.kind, said.message))))
        reason = self._shown(words) or "no reason given"
        reason = f"{reason} (HTTP {status})" if status else reason
        hint = self._advice(f"{words} {said.parameter}")
        too_long, named = (False, SizeHints()) if hint else self._length(status, said)
        return BatchOutcome(
            id=item,
            error=reason + hint,
            too_long=too_long,
            max_tokens=named.max_tokens,
            text_tokens=named.tokens,
            code=self._shown(said.code or said.kind) or None,
            tokens=tokens_in(body.get("usage")),
            billed="no" if said.names & _NEVER_RUN else self._errors_billed,
            retryable=_may_pass(status, said),
            ran=not said.names & _NEVER_RUN,
        )

    def _judge_length(self, status: int | None, said: ErrorBody) -> tuple[bool | None, SizeHints]:
        """Whether a line was refused for its length (None: it may be), and what is named of it."""
        error = refusals.error_of(status or 400, said, self._asked)
        if isinstance(error, InputTooLong):
            named = size_hints(said.message, (_ANY_TEXT,), self._asked.model)
            return True, named or SizeHints()
        may_be = isinstance(error, RequestRejected | RequestTooLarge)
        return (None if may_be else False), SizeHints()

    def _model(self, body: dict[str, Any]) -> str | None:
        name = name_in(body.get("model"))
        return None if name is None else self._shown(name)


def _apart(line: bytes) -> tuple[dict[str, Any], Vectors] | None:
    """The line of a vector, read the fast way: the vector apart from the rest.

    None for any line in which something is unusual; read as a whole, it is judged then.
    """
    begin = line.find(_KEY) + len(_KEY)
    if line[begin : begin + 1] == b" ":
        begin += 1
    digits = line[begin : begin + 1] == b'"'
    end = line.find(b'"' if digits else b"]", begin + 1) + 1
    skeleton = line[:begin] + _MARK + line[end:]
    if begin < len(_KEY) or not end or skeleton.count(_MARK) != 1:
        return None
    try:
        document = orjson.loads(skeleton)
        if not _is_plain(document, skeleton):
            return None
        return document, (_from_digits if digits else _from_numbers)(line, begin, end)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, struct.error):
        return None


def _is_plain(document: dict[str, Any], skeleton: bytes) -> bool:
    """True for a success with the mark as its one vector, and without a repeated key.

    Every string has two quotation marks: fewer strings in the document than in its bytes mean a
    key that occurs twice, or an escaped quotation mark.
    """
    response = document["response"]
    body = response["body"]
    (entry,) = body["data"]
    if type(entry) is not dict:
        return False
    index = entry.get("index", 0)
    return (
        response["status_code"] == 200
        and _says_nothing(document.get("error"))
        and entry["embedding"] == "#"
        and type(index) is int
        and index == 0
        and type(document["custom_id"]) is str
        and skeleton.count(b'"') == 2 * _strings(document, response, body, entry)
    )


def _says_nothing(error: object) -> bool:
    """An error that is missing, or of which every part is: some servers send it with each line.

    Some write it as text, as their language shows what is missing.
    """
    if isinstance(error, dict):
        return all(map(_says_nothing, error.values()))
    if isinstance(error, list):
        return all(map(_says_nothing, error))
    return not error or (isinstance(error, str) and error.strip().casefold() in _NOTHING)


def _strings(document: dict[str, Any], *inner: dict[str, Any]) -> int:
    """``strings_in`` of a document with these objects and ``usage`` in it, in half the time."""
    usage = inner[1].get("usage")
    if type(usage) is dict:
        kinds = [type(value) for part in (document, *inner, usage) for value in part.values()]
        # No others within it than the response, its body, the usage, and the list of the entry.
        if kinds.count(dict) == 3 and kinds.count(list) == 1:
            return len(kinds) + kinds.count(str)
    return strings_in(document)


def _from_digits(line: bytes, begin: int, end: int) -> Vectors:
    raw = pybase64.b64decode(memoryview(line)[begin + 1 : end - 1], validate=True)
    if not raw:
        raise ValueError("empty")
    return np.frombuffer(raw, dtype="<f4")


def _from_numbers(line: bytes, begin: int, end: int) -> Vectors:
    # The packer takes true and false for numbers; it refuses null and texts itself.
    if line.find(b"u", begin, end) >= 0 or line.find(b"l", begin, end) >= 0:
        raise ValueError("not all of it are numbers")
    numbers = orjson.loads(memoryview(line)[begin:end])
    return np.frombuffer(_packer(len(numbers)).pack(*numbers), dtype="<f4")


@lru_cache(maxsize=8)
def _packer(width: int) -> struct.Struct:
    if not 0 < width <= _WIDEST:
        raise ValueError("no vector has that many components")
    return struct.Struct(f"<{width}f")


def _document(text: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
        if not isinstance(document, dict):
            raise BadReply("it is not a JSON object")
        if text.count(b'"') != 2 * strings_in(document):
            json.loads(text, object_pairs_hook=without_repetition, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        raise BadReply("it is not valid JSON") from None
    return document


def _only_id(line: bytes) -> str:
    """The id of a line that cannot be trusted otherwise, if it names one only.

    Read by a parser that takes NaN and the like for numbers: whose vector has them is known then.
    """
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    item = document.get("custom_id") if isinstance(document, dict) else None
    return item if isinstance(item, str) and line.count(b"custom_id") == 1 else ""


def _body(response: dict[str, Any]) -> dict[str, Any]:
    """The body, which one server (OGX) sends as a string of JSON."""
    body = response.get("body")
    if isinstance(body, str):
        try:
            return _document(body.encode())
        except (BadReply, UnicodeEncodeError):
            return {}
    return body if isinstance(body, dict) else {}


def _is_success(status: object, body: dict[str, Any]) -> bool:
    if type(status) is int:
        return 200 <= status < 300
    return status is None and "data" in body


def _vector(body: dict[str, Any]) -> Vectors:
    data = body.get("data")
    if not isinstance(data, list):
        raise BadReply("its answer has no list of embeddings under 'data'")
    if len(data) != 1 or not isinstance(data[0], dict):
        raise BadReply(f"its answer has {len(data)} embeddings for one text")
    index = data[0].get("index", 0)
    if index is not None and (type(index) is not int or index != 0):
        raise BadReply("its answer has an 'index' that is not 0")
    embedding = data[0].get("embedding")
    if isinstance(embedding, list) and not NUMBERS.issuperset(map(type, embedding)):
        raise BadReply("its embedding has components that are not numbers")
    return row_of(embedding)


def _number(status: object) -> object:
    """A status that is written as text is that number."""
    if isinstance(status, str) and status.isascii() and status.isdigit() and len(status) == 3:
        return int(status)
    return status


def _status_in(said: ErrorBody) -> int | None:
    """An HTTP status given as the error's code, as some servers do."""
    return int(said.code) if len(said.code) == 3 and said.code.isdecimal() else None


def _may_pass(status: int | None, said: ErrorBody) -> bool:
    """Whether the same text may be embedded by a new job."""
    if says_quota(said.names):
        return False
    if said.names & _PASSING:
        return True
    return status is not None and (status in (408, 409, 425, 429) or status >= 500)
