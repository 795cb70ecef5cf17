"""How does the fake refuse, break off or keep silent?"""

from __future__ import annotations

import base64
import json
from email.utils import formatdate
from time import time
from typing import TYPE_CHECKING

from embedcore.testing import wire
from embedcore.testing.api import ApiError
from embedcore.testing.modes import Exchange, mode

if TYPE_CHECKING:
    from embedcore.testing.wire import HttpReply

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
