"""Error bodies of OpenAI-like servers: reason, codes and waits, whatever their shape.

Servers that speak the same API agree on successes and on no shape of an error. So a body is not
matched against shapes: every field is looked at, wherever it is nested and however it is spelled,
and the names of the fields tell what each value is. What it means, ``refusals`` decides.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final

import orjson

from embedcore.provider import rate_headers

# More fields than this, or deeper ones, are no error that a person should read.
_MOST_FIELDS: Final = 2_000
_MOST_PARTS: Final = 20_000
_LONGEST_NAME: Final = 80
_LONGEST_PLAIN: Final = 4_000
_MOST_REASONS: Final = 3

_BOM: Final = b"\xef\xbb\xbf"
_WORD: Final = re.compile(r"[^\W\d_]{3,}")
_MARKUP: Final = re.compile(r"<(script|style|head)\b.*?</\1\s*>|<[^>]*>", re.S | re.I)
_TITLE: Final = re.compile(r"<(title|message)[^>]*>(.*?)</\1", re.S | re.I)
_JSON_WITHIN: Final = (re.compile(r"\{.*\}", re.S), re.compile(r"\[.*\]", re.S))
_STATUS: Final = re.compile(r"\s*([45]\d\d)(?:\.0*)?\s*")
# "HTTP 429", "status code: 429", "Error code: 429 - …", "HTTP/1.1 429"; "429 Too Many Requests".
_STATUS_IN_WORDS: Final = re.compile(
    r"\b(?:http(?:/[\d.]+)?(?: error| status)?|status(?:[ _-]?code)?|error[ _-]?code|code)"
    r"\W{1,4}([45]\d\d)\b",
    re.I,
)
_STATUS_FIRST: Final = re.compile(r"\W*([45]\d\d)\W{1,3}(.*)", re.S)

# Names of fields without upper case and separators: "errorMessage" and "error_message" are one.
_REASONS: Final = {
    name: rank
    for rank, names in enumerate(
        (
            ("message", "msg", "errormessage", "errormsg", "errmsg", "statusmsg", "faultstring"),
            ("statusmessage", "errordescription", "errordetail", "detail", "description"),
            ("error", "errors", "details", "reason", "cause", "explanation", "info", "text"),
            ("title", "statustext", "summary", "hint"),
        )
    )
    for name in names
}
_OTHER_SENTENCE: Final = 10
_OTHER_WORD: Final = 20
_CODES: Final = frozenset({"code", "errorcode", "errcode", "errorno", "errno", "internalcode"})
_KINDS: Final = frozenset(
    {"type", "errortype", "kind", "status", "reason", "error", "name", "errorname", "title"}
    | {"exception", "errorclass", "errorstatus", "amzntype"}
)
_STATUSES: Final = _CODES | {
    "status",
    "statuscode",
    "httpstatus",
    "httpcode",
    "httpstatuscode",
    "rawstatuscode",
    "originalstatuscode",
    "errorstatus",
}
_PARAMETERS: Final = frozenset({"param", "parameter", "field", "target", "argument"})
_WAITS: Final = {
    "retrydelay": 1.0,
    "retryafter": 1.0,
    "retryafterseconds": 1.0,
    "retryaftersec": 1.0,
    "retryafterms": 1e-3,
    "retryinms": 1e-3,
    "retryin": 1.0,
    "waitseconds": 1.0,
    "waittime": 1.0,
    "waitms": 1e-3,
    "estimatedtime": 1.0,
    "cooldown": 1.0,
    "resetafter": 1.0,
    "resetin": 1.0,
}
# What repeats the request, or says where in a program it happened.
_ECHOES: Final = frozenset(
    {"input", "inputs", "texts", "documents", "prompt", "prompts", "ctx", "url", "request", "path"}
    | {"headers", "stack", "stacktrace", "traceback", "trace", "data", "embedding", "embeddings"}
    | {"model", "instance", "timestamp", "documentationurl", "requestid", "traceid", "id", "help"}
)
# Of a usage: OpenAI's names first, then those of others for the same.
_TOKENS: Final = frozenset(
    {"prompttokens", "totaltokens", "inputtokens", "tokens", "prompttokencount", "totaltokencount"}
    | {"inputtokencount", "inputtexttokencount", "tokencount", "billedtokens", "promptevalcount"}
)
# Where a reply may have its usage, if it is not where OpenAI has it.
_USAGES: Final = frozenset({"usagemetadata", "usageinfo", "tokenusage", "meta", "billedunits"})
# Larger numbers of tokens are no numbers of tokens, and do not fit a database column.
_MOST_TOKENS: Final = 2**63 - 1
_NUMBER: Final = re.compile(r"(?:\d{1,3}(?:,\d{3}){1,6}|\d{1,20})(?:\.\d{1,20})?", re.ASCII)
_FIELDS: Final = frozenset({"input", "inputs", "texts", "documents", "prompt", "model"})
_NO_ERROR: Final = frozenset({"", "ok", "success", "succeeded", "error", "errors", "null", "none"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorBody:
    """What was found. Texts are as the server wrote them: clean them before they are shown.

    ``known``: there is an error in it, so that the request was refused by what wrote it. ``own``:
    in a shape that the API itself writes, and not a gateway before it. ``parsed``: it is a document
    of JSON, not a page or plain text. ``message``: the reason;
    "" if none is given. ``code`` and ``kind``: the server's first name for the error, and its
    class; ``names``: all such names. ``status``: an HTTP status named within. ``wait``: seconds,
    from a field for them. ``parameter``: the field of the request that it is about. ``charged``:
    it has ``usage``, or vectors, so that work was done; ``tokens``: so many, by its ``usage``.
    """

    own: bool = False
    parsed: bool = False
    known: bool = False
    message: str = ""
    kind: str = ""
    code: str = ""
    parameter: str = ""
    names: frozenset[str] = frozenset()
    status: int | None = None
    wait: float | None = None
    charged: bool = False
    tokens: int | None = None


def read_body(body: bytes | memoryview, content_type: str = "") -> ErrorBody:
    """The error in a body: JSON of any shape, a page, or plain text."""
    raw = bytes(body).lstrip(b" \t\r\n" + _BOM)
    document = json_in(raw)
    if document is not None:
        return error_in(document)
    # A person reads no more of it, and neither need this.
    text = raw[: 4 * _LONGEST_PLAIN].decode("utf-8", "replace").strip()
    if text.startswith("<"):
        text = text[:_LONGEST_PLAIN]
        title = _TITLE.search(text)
        words = _MARKUP.sub(" ", title[2] if title else text).split()
        return ErrorBody(message=" ".join(words)[:_LONGEST_PLAIN])
    if not _WORD.search(text):
        return ErrorBody()
    known = len(raw) <= _LONGEST_PLAIN and "html" not in content_type.lower()
    return ErrorBody(known=known, message=text[:_LONGEST_PLAIN])


def json_in(raw: bytes) -> Any:
    """The document, also with NaN or in another Unicode encoding; None for anything else."""
    if raw.count(b"[") + raw.count(b"{") > _MOST_PARTS:
        return None
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def error_in(document: object) -> ErrorBody:
    """The error in a document that was parsed already."""
    found = _Found()
    for name, value, depth in _fields(document):
        found.take(name, value, depth)
    message = found.reason()
    own = _is_own(document)
    charged, tokens = _charge(document)
    return ErrorBody(
        own=own,
        parsed=True,
        known=own or bool(message or found.codes or found.status),
        message=message,
        kind=next(iter(found.kinds), ""),
        code=next(iter(found.codes), ""),
        parameter=found.parameter,
        names=frozenset([*found.codes, *found.kinds]),
        status=found.status,
        wait=found.wait,
        charged=charged,
        tokens=tokens,
    )


def tokens_in(usage: object) -> int | None:
    """What was billed, by a reply's ``usage``; None where it is missing, zero or nonsense.

    Numbers may be written as text or with a fraction, which is rounded up.
    """
    if isinstance(usage, dict):
        fields = ((plain(str(name)), value) for name, value in usage.items())
        sound = [_amount(value) for name, value in fields if name in _TOKENS]
        return max(filter(None, sound), default=None)
    return _amount(usage)


def usage_of(document: dict[str, Any]) -> int | None:
    """What was billed, by a whole reply: in its ``usage``, else where servers of others have it.

    ``usageMetadata`` and the like, ``meta.billed_units``, or a number of tokens at the top.
    """
    tokens = tokens_in(document.get("usage"))
    if tokens is not None:
        return tokens
    fields = {plain(str(name)): value for name, value in document.items()}
    others = [value for name, value in fields.items() if name in _USAGES]
    for part in others:
        if isinstance(part, dict):
            others += [each for name, each in part.items() if plain(str(name)) in _USAGES]
    numbers = {name: value for name, value in fields.items() if name in _TOKENS}
    found = (tokens_in(part) for part in (*others, numbers) if isinstance(part, dict))
    return max(filter(None, found), default=None)


def _amount(value: object) -> int | None:
    if isinstance(value, str) and _NUMBER.fullmatch(digits := value.strip()):
        digits = digits.replace(",", "")
        value = float(digits) if "." in digits else int(digits)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not 0 < value <= _MOST_TOKENS:
        return None
    return math.ceil(value)


def _charge(document: object) -> tuple[bool, int | None]:
    """Does a refusal say that work was done, and for how many tokens?"""
    if not isinstance(document, dict):
        return False, None
    usage, data = document.get("usage"), document.get("data")
    vectors = isinstance(data, list) and any(
        isinstance(item, dict) and item.get("embedding") for item in data[:_MOST_FIELDS]
    )
    tokens = tokens_in(usage)
    return vectors or tokens is not None or _is_odd_usage(usage), tokens


def _is_odd_usage(usage: object) -> bool:
    """A usage that says something, and neither how many tokens nor that there were none."""
    if not isinstance(usage, dict):
        return _says_anything(usage)
    named = [value for name, value in usage.items() if plain(str(name)) in _TOKENS]
    return any(map(_says_anything, named)) or (not named and _says_anything(usage))


@dataclass(slots=True)
class _Found:
    """What the fields seen so far say. The first of a kind counts, from the outside inwards."""

    codes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    parameter: str = ""
    status: int | None = None
    wait: float | None = None
    reasons: list[tuple[int, int, str]] = field(default_factory=list)

    def take(self, name: str, value: object, depth: int) -> None:
        if name in _WAITS and self.wait is None:
            self.wait = _seconds(value, _WAITS[name])
        if name in _PARAMETERS and not self.parameter and isinstance(value, str | int):
            self.parameter = str(value)
        number = status_of(value) if name in _STATUSES else None
        if number is not None and self.status is None:
            self.status = number
        if isinstance(value, bool) or not isinstance(value, str | int):
            return
        text = str(value)
        word = len(text) <= _LONGEST_NAME and len(text.split()) == 1
        if word and text.lower() not in _NO_ERROR:
            if name in _CODES:
                self.codes.append(text)
            elif name in _KINDS and isinstance(value, str):
                self.kinds.append(text)
        if isinstance(value, str) and value.strip() and name not in _CODES | _PARAMETERS:
            rank = _REASONS.get(name, _OTHER_SENTENCE)
            # A lone word is the name of an error rather than the reason for it.
            rank += _OTHER_WORD if word and (name in _KINDS or name not in _REASONS) else 0
            self.reasons.append((rank, depth, value.strip()))

    def reason(self) -> str:
        """The best of the reasons, and those beside it of the same rank in a list of errors."""
        if not self.reasons:
            return ""
        rank, depth, _ = min(self.reasons, key=lambda one: one[:2])
        if rank >= _OTHER_WORD and not self.codes and not self.kinds:
            return ""
        best = [text for *place, text in self.reasons if place == [rank, depth]]
        return "; ".join(list(dict.fromkeys(best))[:_MOST_REASONS])


def _fields(document: object) -> Iterator[tuple[str, object, int]]:
    """Every field that is no container, with its plain name; nearer ones first.

    What stands in a list has the name of the list. What may repeat the request is left out, but for
    a field of it in ``errors``: that tells what is wrong with it.
    """
    pending: deque[tuple[str, object, int]] = deque([("error", document, 0)])
    for _ in range(_MOST_FIELDS):
        if not pending:
            return
        name, value, depth = pending.popleft()
        if isinstance(value, dict):
            inner = ((plain(str(key)), each) for key, each in value.items())
            pending.extend(
                (name if key in _ECHOES else key, each, depth + 1)
                for key, each in inner
                if key not in _ECHOES or (name == "errors" and key in _FIELDS)
            )
        elif isinstance(value, list):
            pending.extend((name, each, depth) for each in value[:_MOST_FIELDS])
            if name == "loc":
                yield "param", ".".join(map(str, value)), depth
        elif name != "loc":
            yield name, value, depth


def plain(name: str) -> str:
    """A name without case and separators."""
    return _plain(name) if len(name) <= _LONGEST_NAME else "".join(filter(str.isalnum, name))


@lru_cache(maxsize=512)
def _plain(name: str) -> str:
    # Thousands of lines of a batch have the same few.
    return "".join(filter(str.isalnum, name)).lower()


def status_of(value: object) -> int | None:
    """An HTTP status of an error, as a number or as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    found = _STATUS.fullmatch(str(value))
    return int(found[1]) if found else None


def quoted_in(text: str) -> ErrorBody:
    """The error in a document of JSON that a text quotes: one server's in another's reason."""
    for form in _JSON_WITHIN:
        quoted = form.search(text[:_LONGEST_PLAIN])
        document = json_in(quoted[0].encode("utf-8", "replace")) if quoted else None
        if isinstance(document, dict | list) and document:
            return error_in(document)
    return ErrorBody()


def status_in_words(text: str) -> int | None:
    """An HTTP status of an error that a text names: "HTTP 429", "502 Bad Gateway"."""
    text = text[:_LONGEST_PLAIN]
    found = _STATUS_IN_WORDS.search(text)
    if found is not None:
        return int(found[1])
    first = _STATUS_FIRST.match(text)
    try:
        phrase = HTTPStatus(int(first[1])).phrase if first else ""
    except ValueError:
        return None
    named = first is not None and phrase and first[2].lower().startswith(phrase.lower())
    return int(first[1]) if first is not None and named else None


def _seconds(value: object, unit: float) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        seconds = value * unit if math.isfinite(value) else 0.0
    elif isinstance(value, str):
        number = rate_headers.duration(value)
        bare = number is not None and not value.strip()[-1:].isalpha()
        seconds = (number or 0.0) * (unit if bare else 1.0)
    else:
        return None
    return seconds if seconds > 0 else None


def _is_own(document: object) -> bool:
    """Is this a shape that the server of the API writes itself?

    Nested (OpenAI), flat with a code or type (vLLM, Text Embeddings Inference, Mistral), a bare
    string (TEI, Ollama), FastAPI's ``detail``, or one of these in a list (Gemini). A ``message``
    alone, or with a ``statusCode``, is what gateways write.
    """
    if isinstance(document, list):
        document = next(iter(document), None)
    if not isinstance(document, dict):
        return False
    fields = {plain(str(name)): value for name, value in document.items()}
    error, detail = fields.get("error"), fields.get("detail")
    if isinstance(error, dict):
        return _says_anything(error)
    if isinstance(error, list):
        return any(_says_anything(each) for each in error)
    if isinstance(error, str) and error:
        return True
    if "message" in fields and fields.keys() & {"code", "type"}:
        return _says_anything({name: fields.get(name) for name in ("message", "code", "type")})
    return isinstance(detail, str | list | dict) and bool(detail)


def _says_anything(error: object) -> bool:
    """False for an error whose fields are all empty: that means that there is none."""
    if isinstance(error, dict):
        return any(map(_says_anything, error.values()))
    if isinstance(error, list):
        return any(map(_says_anything, error))
    return error not in (None, "", "0", 0, False)
