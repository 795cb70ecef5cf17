"""Modes of failure of the fake: refusals, broken replies, silence.

A mode is a function of an ``Exchange`` that returns the reply to send instead. Modes register
themselves in ``MODES``.

All of these bill: the work was done.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import cache
from time import time
from typing import TYPE_CHECKING, TypeAlias

from embedcore.testing.openai import http as wire
from embedcore.testing.openai.embeddings import ApiError
from embedcore.testing.openai.http import HttpReply

if TYPE_CHECKING:
    from embedcore.testing.openai.embeddings import Answer, Embeddings
    from embedcore.testing.openai.http import Delivery, HttpRequest


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request, the answer it would get, and the options of the fault that befell it.

    ``elsewhere``: the URL of the listener that stands for another server.
    ``marker``: the marker that chose this request, if one did.
    """

    request: HttpRequest
    answer: Answer
    options: Mapping[str, object]
    elsewhere: str
    marker: str | None = None

    def honest(self, *, deliver: Delivery | None = None) -> HttpReply:
        """The answer written as it is, by another delivery if one is given."""
        return replace(self.answer.written(), deliver=deliver)

    def body(self) -> bytes:
        """The honest reply's body, in memory."""
        return b"".join(self.honest().blocks())

    def embeddings(self) -> Embeddings | None:
        """The honest reply in pieces; None if the request gets no embeddings anyway."""
        return self.answer.embeddings() if self.answer.embeddings else None

    def rewritten(self, body: bytes, **headers: str) -> HttpReply:
        """A successful reply of the API's own with another body."""
        headers = {"content-type": "application/json", **headers}
        return HttpReply(headers={**self.answer.headers, **headers}, body=body)

    def refused(self, error: ApiError) -> HttpReply:
        """An error reply of the API's own."""
        reply = error.reply()
        return replace(reply, headers={**self.answer.headers, **reply.headers})

    def replied(
        self,
        body: bytes = b"",
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        deliver: Delivery | None = None,
    ) -> HttpReply:
        """A reply that is not the API's own: that of a proxy, say."""
        return HttpReply(status=status, headers=headers or {}, body=body, deliver=deliver)

    @property
    def position(self) -> int:
        """Where in the request the first text with the marker is; 0 without a marker."""
        for place, text in enumerate(self.answer.texts):
            if self.marker is not None and self.marker in text:
                return place
        return 0

    def number(self, name: str, default: float) -> float:
        value = self.options.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"the fault's option {name!r} must be a number, not {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.options.get(name, default)
        if not isinstance(value, str):
            raise TypeError(f"the fault's option {name!r} must be a string, not {value!r}")
        return value


Apply: TypeAlias = Callable[[Exchange], HttpReply]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """A way to go wrong. ``bills``: whether the request costs its tokens, unless the fault says
    otherwise; a request that would have been refused anyway never does."""

    name: str
    bills: bool
    options: frozenset[str]
    apply: Apply
    summary: str


MODES: dict[str, Mode] = {}


def mode(*, bills: bool, options: tuple[str, ...] = ()) -> Callable[[Apply], Apply]:
    """Registers a function under its own name; its docstring becomes the summary."""

    def register(function: Apply) -> Apply:
        name = function.__name__
        summary = " ".join((function.__doc__ or "").split())
        MODES[name] = Mode(
            name=name, bills=bills, options=frozenset(options), apply=function, summary=summary
        )
        return function

    return register


def table() -> str:
    """Every mode with what it bills and takes, as text."""
    lines = ["mode                 bills  options and meaning"]
    for each in MODES.values():
        options = f"({', '.join(sorted(each.options))}) " if each.options else ""
        bills = "yes" if each.bills else "no"
        lines.append(f"{each.name:20} {bills:6} {options}{each.summary}")
    return "\n".join(lines)


_MEGABYTE = 1 << 20


# The way it travels


@mode(bills=True, options=("seconds",))
def late(exchange: Exchange) -> HttpReply:
    """The honest reply after ``seconds`` (1)."""
    return exchange.honest(deliver=wire.late(exchange.number("seconds", 1)))


@mode(bills=True, options=("seconds",))
def slow(exchange: Exchange) -> HttpReply:
    """The honest reply after ``seconds`` (0.05) for each text."""
    seconds = exchange.number("seconds", 0.05) * len(exchange.answer.texts)
    return exchange.honest(deliver=wire.late(seconds))


@mode(bills=True, options=("interval",))
def drip(exchange: Exchange) -> HttpReply:
    """The honest reply with ``interval`` seconds (1) before every byte of its body."""
    return exchange.honest(deliver=wire.drip(exchange.number("interval", 1)))


@mode(bills=True, options=("share",))
def truncated(exchange: Exchange) -> HttpReply:
    """A ``share`` (0.5) of the body that content-length announced, then the end."""
    return exchange.honest(deliver=wire.cut_off(exchange.number("share", 0.5)))


@mode(bills=True, options=("share",))
def short_chunk(exchange: Exchange) -> HttpReply:
    """As ``truncated``, inside a chunk of a chunked body."""
    return exchange.honest(deliver=wire.cut_off(exchange.number("share", 0.5), chunked=True))


@mode(bills=True, options=("limit",))
def endless(exchange: Exchange) -> HttpReply:
    """The honest body, then white space without end (``limit`` bytes, 4 GB, end the fake's)."""
    return exchange.honest(deliver=wire.endless(int(exchange.number("limit", 1 << 32))))


@mode(bills=True)
def close_after(exchange: Exchange) -> HttpReply:
    """The honest reply, then the connection ends unannounced: the next call finds it closed."""
    return exchange.honest(deliver=wire.whole_then_close)


# The body as bytes


@mode(bills=True, options=("body", "status", "content_type"))
def raw(exchange: Exchange) -> HttpReply:
    """``body`` to the letter, with ``status`` (200) and ``content_type``."""
    return exchange.replied(
        exchange.text("body", "").encode("utf-8", "surrogatepass"),
        status=int(exchange.number("status", 200)),
        headers={"content-type": exchange.text("content_type", "application/json")},
    )


@mode(bills=True, options=("share",))
def cut_json(exchange: Exchange) -> HttpReply:
    """A whole reply whose JSON stops after a ``share`` (0.5)."""
    body = exchange.body()
    return exchange.rewritten(body[: int(len(body) * exchange.number("share", 0.5))])


@mode(bills=True)
def broken_json(exchange: Exchange) -> HttpReply:
    """Honest but for a bracket in the wrong place."""
    return exchange.rewritten(exchange.body().replace(b"]", b"}", 1))


@mode(bills=True)
def html(exchange: Exchange) -> HttpReply:
    """The page of a proxy, with status 200, the request's key in it."""
    key = exchange.request.headers.get("authorization", "")
    page = f"<!doctype html><title>Welcome</title><p>{key}</p>" + "<p>please log in</p>" * 200
    return exchange.replied(page.encode(), headers={"content-type": "text/html"})


@mode(bills=True, options=("content_type",))
def wrong_type(exchange: Exchange) -> HttpReply:
    """The honest reply called ``content_type`` (text/plain); "" leaves the header out."""
    reply = exchange.honest()
    media = exchange.text("content_type", "text/plain")
    headers = {name: value for name, value in reply.headers.items() if name != "content-type"}
    headers |= {"content-type": media} if media else {}
    return replace(reply, headers=headers)


@mode(bills=True, options=("size",))
def gzip_bomb(exchange: Exchange) -> HttpReply:
    """The honest reply behind ``size`` bytes (256 MB) of white space, compressed a thousandfold."""
    size = int(exchange.number("size", 256 * _MEGABYTE))
    body = _compressed_space(size) + gzip.compress(exchange.body())
    return exchange.rewritten(body, **{"content-encoding": "gzip"})


@cache
def _compressed_space(size: int) -> bytes:
    # Members of a gzip stream may follow one another, so one block is compressed and repeated.
    whole, rest = divmod(size, _MEGABYTE)
    return gzip.compress(b" " * _MEGABYTE) * whole + gzip.compress(b" " * rest)


@mode(bills=True)
def leading_space(exchange: Exchange) -> HttpReply:
    """The honest reply behind white space, as keep-alive padding puts it there."""
    return exchange.rewritten(b" \n" * 6 + exchange.body())


@mode(bills=True)
def duplicate_keys(exchange: Exchange) -> HttpReply:
    """An ``index`` twice in one object; a reader that takes the last one finds nothing amiss."""
    return exchange.rewritten(exchange.body().replace(b'"index":0', b'"index":1,"index":0', 1))


_STATUS_ERRORS = {
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "unsupported_country_region_territory", "Not permitted."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist."),
    408: ("timeout", None, "The request timed out."),
    409: ("conflict", None, "Another request is changing the resource."),
    413: ("invalid_request_error", "request_too_large", "The request body is too large."),
    422: ("invalid_request_error", None, "The request could not be processed."),
    500: ("server_error", None, "The server had an error while processing your request."),
    502: ("server_error", None, "Bad gateway."),
    503: ("service_unavailable_error", "server_is_overloaded", "The server is overloaded."),
    504: ("server_error", None, "The upstream did not answer in time."),
    529: ("server_error", "overloaded", "Overloaded."),
}


@mode(bills=True)
def ok(exchange: Exchange) -> HttpReply:
    """No fault at all; keeps a place in a script."""
    return exchange.honest()


def _retry_headers(exchange: Exchange) -> dict[str, str]:
    headers = {}
    for option in ("retry_after", "retry_after_ms"):
        if option in exchange.options:
            headers[option.replace("_", "-")] = str(exchange.options[option])
    if "retry_after_date" in exchange.options:
        seconds = exchange.number("retry_after_date", 0)
        headers["retry-after"] = formatdate(time() + seconds, usegmt=True)
    return headers


@mode(bills=False, options=("retry_after", "retry_after_ms", "retry_after_date", "code", "kind"))
def rate_limited(exchange: Exchange) -> HttpReply:
    """429. The headers hold what is given, garbage included; ``retry_after_date`` is in seconds
    from now and becomes an HTTP date."""
    return exchange.refused(
        ApiError(
            429,
            "Rate limit reached. Please try again later.",
            kind=exchange.text("kind", "requests"),
            code=exchange.text("code", "rate_limit_exceeded"),
            headers=_retry_headers(exchange),
        )
    )


@mode(bills=False)
def over_rate(exchange: Exchange) -> HttpReply:
    """429 for one request larger than a minute's tokens: waiting does not help."""
    tokens = exchange.answer.tokens
    message = (
        "Request too large for text-embedding-3-small in organization org-fake on tokens per min "
        f"(TPM): Limit {max(tokens - 1, 0)}, Requested {tokens}. The input or output tokens must "
        "be reduced in order to run successfully."
    )
    return exchange.refused(ApiError(429, message, kind="tokens", code="rate_limit_exceeded"))


@mode(bills=False, options=("code", "kind"))
def quota_exhausted(exchange: Exchange) -> HttpReply:
    """429 that means: no money left. ``code`` may be any of the newer ones."""
    return exchange.refused(
        ApiError(
            429,
            "You exceeded your current quota, please check your plan and billing details.",
            kind=exchange.text("kind", "insufficient_quota"),
            code=exchange.text("code", "insufficient_quota"),
        )
    )


@mode(bills=False, options=("status", "body", "retry_after", "retry_after_ms", "retry_after_date"))
def status(exchange: Exchange) -> HttpReply:
    """Any ``status`` (500). ``body``: "error" (OpenAI's), "none", "html", "text", "string"
    (``{"error": "…"}``), "list" or "huge" (a message of 1 MB)."""
    number = int(exchange.number("status", 500))
    kind, code, message = _STATUS_ERRORS.get(number, ("server_error", None, f"Status {number}."))
    error = ApiError(number, message, kind=kind, code=code, headers=_retry_headers(exchange))
    body = exchange.text("body", "error")
    if body == "error":
        return exchange.refused(error)
    if body == "huge":
        error.error["message"] = "x" * 1_000_000
        return exchange.refused(error)
    content, media = {
        "none": ("", "text/plain"),
        "html": (f"<html><body><h1>{number}</h1></body></html>", "text/html"),
        "text": (f"upstream error {number}", "text/plain"),
        "string": (json.dumps({"error": message}), "application/json"),
        "list": (json.dumps({"detail": [message]}), "application/json"),
    }[body]
    headers = {"content-type": media, **error.headers}
    return exchange.replied(content.encode(), status=number, headers=headers)


@mode(bills=False, options=("status", "message", "code", "kind", "param"))
def refusal(exchange: Exchange) -> HttpReply:
    """An error of the API's own, with this ``status`` (400) and ``message``."""
    return exchange.refused(
        ApiError(
            int(exchange.number("status", 400)),
            exchange.text("message", "The request is invalid."),
            kind=exchange.text("kind", "invalid_request_error"),
            code=exchange.text("code", "") or None,
            param=exchange.text("param", "") or None,
        )
    )


@mode(bills=False, options=("status",))
def echo_key(exchange: Exchange) -> HttpReply:
    """An error (401) whose message and headers repeat the key, in plain, in base64 and in part."""
    key = exchange.request.headers.get("authorization", "").removeprefix("Bearer ")
    coded = base64.b64encode(key.encode()).decode()
    message = f"Incorrect API key provided: {key}. ({coded}; {key[:-4]}****)"
    number = int(exchange.number("status", 401))
    return exchange.refused(
        ApiError(number, message, code="invalid_api_key", headers={"x-debug-key": key})
    )


@mode(bills=False)
def bad_text(exchange: Exchange) -> HttpReply:
    """400 for the whole request, as one bad text causes it, without a word on which."""
    message = (
        "'$.input' is invalid. Please check the API reference: "
        "https://platform.openai.com/docs/api-reference."
    )
    return exchange.refused(ApiError(400, message))


@mode(bills=False, options=("position", "wording", "code"))
def context_length(exchange: Exchange) -> HttpReply:
    """400 that names the text at ``position`` (that of the marker) as too long. ``wording``
    "old" names none."""
    position = int(exchange.number("position", exchange.position))
    message = f"Invalid 'input[{position}]': maximum input length is 8192 tokens."
    if exchange.text("wording", "new") == "old":
        message = (
            "This model's maximum context length is 8192 tokens, however you requested 13028 "
            "tokens (13028 in your prompt; 0 for the completion). Please reduce your prompt; or "
            "completion length."
        )
    code = exchange.text("code", "") or None
    return exchange.refused(ApiError(400, message, code=code))


@mode(bills=False)
def request_too_large(exchange: Exchange) -> HttpReply:
    """400 for too many tokens in one request, whatever there is in it."""
    code = "max_tokens_per_request"
    message = "Requested 306153 tokens, max 300000 tokens per request"
    return exchange.refused(ApiError(400, message, kind=code, code=code))


@mode(bills=False, options=("status", "location"))
def redirect(exchange: Exchange) -> HttpReply:
    """A redirect (307) to another local port, or to ``location``."""
    target = exchange.text("location", exchange.elsewhere + exchange.request.path)
    number = int(exchange.number("status", 307))
    return exchange.replied(status=number, headers={"location": target})


@mode(bills=False)
def reset(exchange: Exchange) -> HttpReply:
    """The request is read, and the connection reset without a byte in return."""
    return exchange.replied(deliver=wire.reset)


@mode(bills=True)
def reset_billed(exchange: Exchange) -> HttpReply:
    """As ``reset``, after the work was done and charged."""
    return exchange.replied(deliver=wire.reset)


@mode(bills=False)
def reset_unread(exchange: Exchange) -> HttpReply:
    """The connection is reset when the headers were read, and the body not."""
    return exchange.replied(deliver=wire.reset)


@mode(bills=False)
def close_silent(exchange: Exchange) -> HttpReply:
    """The request is read and the connection ended in good order, without a reply: what a client
    sees that reuses a connection which the server was about to close."""
    return exchange.replied(deliver=wire.close)


@mode(bills=True, options=("seconds",))
def hang(exchange: Exchange) -> HttpReply:
    """No reply for ``seconds`` (60), then a reset."""
    return exchange.replied(deliver=wire.hang(exchange.number("seconds", 60)))
