"""Objects of the Batch API, in OpenAI's form and in those of servers like it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
import pybase64

from embedcore.errors import Billed, InputTooLong, RequestRejected, RequestTooLarge
from embedcore.provider import refusals
from embedcore.provider.batchstates import batch_state
from embedcore.provider.error_bodies import ErrorBody, error_in, tokens_in
from embedcore.provider.refusals import Asked, says_quota
from embedcore.provider.replies import (
    NUMBERS,
    BadReply,
    name_in,
    refuse_constant,
    row_of,
    strings_in,
    without_repetition,
)
from embedcore.provider.size_hints import SizeHints, size_hints
from embedcore.provider.types import BatchOutcome, BatchStatus, FoundJob
from embedcore_openai.encodings import advice

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors


MARK: Final = "embedcore"
_PREFIX: Final = "embedcore-"
_SUFFIX: Final = ".jsonl"
_FILE_NAME: Final = re.compile(rf"{_PREFIX}(.*){re.escape(_SUFFIX)}", re.S)

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
# Named with a line, and yet true of all lines: every line of ours has the same model and address.
_OF_THE_JOB: Final = frozenset({"model_not_found", "url_mismatch", "invalid_url", "invalid_method"})
_QUEUE_CODE: Final = "token_limit_exceeded"
# "Limit: 20,000,000 enqueued tokens."
_QUEUE_LIMIT: Final = re.compile(r"Limit:?\s*(\d{1,3}(?:,\d{3})+|\d{1,15})\s+enqueued", re.I)
_MOST: Final = 2**63 - 1

Shown = Callable[[str], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One entry of the list of batches.

    ``found``: None where it has no id that can be used. ``key``: our mark in its metadata; empty
    where these have others only. ``is_clear``: False where nothing that it says tells whose it is.
    """

    found: FoundJob | None = None
    key: str | None = None
    input_ref: str | None = None
    created_at: datetime | None = None
    is_clear: bool = True

    def is_of(self, key: str, input_ref: str) -> bool | None:
        """Whether it is the job of that key or that input; None: it may be, and cannot be used."""
        if key == self.key or input_ref == self.input_ref:
            return True if self.found is not None else None
        named = self.key is not None or self.input_ref is not None
        return False if named or self.is_clear else None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One entry of the list of files. ``key``: the mark in its name, if it is one of ours."""

    id: str
    key: str | None = None
    created_at: datetime | None = None


def is_id(value: object) -> bool:
    """True for what may stand in the path of a URL as an id."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def file_name(mark: str) -> str:
    return f"{_PREFIX}{mark}{_SUFFIX}"


def id_of(document: dict[str, Any]) -> str:
    """Raises ``BadReply`` for an id of any other shape than ids have."""
    value = document.get("id")
    if not isinstance(value, str) or not is_id(value):
        raise BadReply("its 'id' is missing, or is no id")
    return value


def status_of(
    document: dict[str, Any], *, job_id: str, shown: Shown, encoding: str = "omit"
) -> BatchStatus:
    """The state of the job ``job_id``; errors by line are given by the item's place.

    ``encoding``: how its lines asked for their vectors, which may be what is wrong with them.

    Line n belongs to the item at the place ``str(n - 1)`` among those that were uploaded. Raises
    ``BadReply`` for the state of another job or none.
    """
    word = document.get("status")
    if not isinstance(word, str) or not word:
        raise BadReply("it has no 'status'")
    if id_of(document) != job_id:
        raise BadReply("it is another job")
    state = batch_state(word)
    completed, failed, total = _counts(document.get("request_counts"))
    listed = document.get("errors") if state == "failed" else None
    errors, queue_full, queue_limit = _errors(listed, shown, encoding)
    return BatchStatus(
        state=state,
        detail=shown(word)[:80],
        completed=completed,
        failed=failed,
        total=total,
        tokens=None if state == "running" else _tokens(document.get("usage")),
        errors=errors,
        queue_full=queue_full,
        queue_limit=queue_limit,
    )


def result_files(document: dict[str, Any], *, job_id: str, shown: Shown) -> list[str] | None:
    """The files with the results, none of which need exist; None while the job runs."""
    if status_of(document, job_id=job_id, shown=shown).state == "running":
        return None
    files = [document.get("output_file_id"), document.get("error_file_id")]
    given = [file for file in files if file is not None and file != ""]
    if not all(map(is_id, given)):
        raise BadReply("the id of a result file is no id")
    return list(dict.fromkeys(given))


def job_of(entry: object) -> Job:
    """An entry of the list of batches, whatever it is: one that cannot be used hides no other."""
    if not isinstance(entry, dict):
        return Job(is_clear=False)
    key, has_key = _mark_in(entry.get("metadata"))
    input_ref = entry.get("input_file_id")
    has_input = input_ref is None or isinstance(input_ref, str)
    created_at, word, name = _moment(entry.get("created_at")), entry.get("status"), entry.get("id")
    found = None
    if isinstance(name, str) and is_id(name):
        found = FoundJob(
            id=name,
            created_at=created_at,
            state=batch_state(word) if isinstance(word, str) else "running",
        )
    return Job(
        found=found,
        key=key,
        input_ref=input_ref if isinstance(input_ref, str) else None,
        created_at=created_at,
        is_clear=found is not None and has_key and has_input,
    )


def _mark_in(metadata: object) -> tuple[str | None, bool]:
    """Our mark, and whether that could be read."""
    if metadata is None or metadata == {}:
        return None, True
    if not isinstance(metadata, dict):
        return None, False
    key = metadata.get(MARK, "")
    return (key, True) if isinstance(key, str) else (None, False)


def file_of(entry: object) -> StoredFile | None:
    """An entry of the list of files; None for one that cannot be used, which is no file of ours
    that could be deleted."""
    name = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(name, str) or not is_id(name):
        return None
    key, called = None, entry.get("filename")
    if entry.get("purpose", "batch") == "batch" and isinstance(called, str):
        found = _FILE_NAME.fullmatch(called)
        key = None if found is None else found[1]
    return StoredFile(id=name, key=key, created_at=_moment(entry.get("created_at")))


def size_of(document: dict[str, Any]) -> int | None:
    return _count(document.get("bytes"))


def _counts(counts: object) -> tuple[int | None, int | None, int | None]:
    """Completed, failed, total. Before a job is validated all of them are 0, or missing."""
    if not isinstance(counts, dict):
        return None, None, None
    total = _count(counts.get("total")) or None
    return _count(counts.get("completed")), _count(counts.get("failed")), total


def _tokens(usage: object) -> int | None:
    """What was billed. Nothing but zeros is what servers send that do not count."""
    if not isinstance(usage, dict):
        return None
    names = ("input_tokens", "prompt_tokens", "total_tokens")
    return max((_count(usage.get(name)) or 0 for name in names), default=0) or None


def _errors(errors: object, shown: Shown, encoding: str) -> tuple[dict[str, str], bool, int | None]:
    """Reasons by place, whether they all are that the queue is full, and how much it takes."""
    entries = errors.get("data") if isinstance(errors, dict) else errors
    reasons: dict[str, str] = {}
    full: list[bool] = []
    limit = None
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        code, message = _text(entry.get("code")), _text(entry.get("message"))
        line = entry.get("line")
        item = ""
        if type(line) is int and line > 0 and code not in _OF_THE_JOB:
            item = str(line - 1)
        reason = shown(": ".join(filter(None, (code, message)))) or "no reason given"
        said = f"{code} {message} {_text(entry.get('param'))}"
        reasons.setdefault(item, reason + advice(said, encoding))
        full.append(code == _QUEUE_CODE)
        if full[-1] and (found := _QUEUE_LIMIT.search(message)):
            limit = int(found[1].replace(",", ""))
    queue_full = bool(full) and all(full)
    return reasons, queue_full, limit if queue_full else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST else None


def _moment(value: object) -> datetime | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        return None


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
    answered with an error cost anything. ``encoding``: how the lines asked for their vectors.
    ``asked``: what each line was, as far as they are alike.
    """

    def __init__(
        self,
        *,
        shown: Callable[[str], str],
        errors_billed: Billed,
        encoding: str = "omit",
        asked: Asked | None = None,
    ) -> None:
        self._asked = asked or Asked(model="", endpoint="")
        self._length = lru_cache(maxsize=64)(self._judge_length)
        # Thousands of lines fail for the same reason.
        self._shown = lru_cache(maxsize=64)(shown)
        self._errors_billed = errors_billed
        self._encoding = encoding

    def read(self, line: bytes) -> BatchOutcome:
        """The line's outcome; never raises. Without ``custom_id`` that is an error of no text."""
        found = _apart(line)
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
        item = document.get("custom_id")
        if not isinstance(item, str):
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
            return self._failure(item, status, error, body)
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
        hint = advice(f"{words} {said.parameter}", self._encoding)
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
