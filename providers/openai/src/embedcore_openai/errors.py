"""What does a failure mean? The one place where vendor errors become embedcore's.

Judged by status, code and type, and by OpenAI's own wording only where no code tells cases apart
(API reference, and error bodies reported from live calls in 2025 and 2026), never by the text of an
exception. No exception of the SDK is kept as a cause: their frames hold the key.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

import openai

from embedcore.errors import (
    AuthenticationFailed,
    Billed,
    ConfigurationError,
    EmbeddingError,
    InputTooLong,
    InvalidResponse,
    ModelNotFound,
    OutcomeUnknown,
    PermanentProviderError,
    PermissionDenied,
    ProviderError,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    RemoteGone,
    RequestRejected,
    RequestTooLarge,
)
from embedcore_openai import errorwords as words, headers, scrub
from embedcore_openai.capped import UnreadableBody
from embedcore_openai.errorbody import ErrorBody, read_body
from embedcore_openai.errorcontext import BATCH_API, Context, describe, facts, request_id
from embedcore_openai.transport import Answer
from embedcore_openai.wire import BadReply

_UNKNOWN_OUTCOME: Final = frozenset({408, 409, 502, 504})
_NOT_SENT: Final = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError"})
_HTTP_LIBRARIES: Final = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
_NOT_SENDABLE: Final = frozenset({"LocalProtocolError", "UnsupportedProtocol", "InvalidURL"})


def from_answer(answer: Answer, context: Context) -> EmbeddingError:
    """The error for an HTTP answer that is not a success."""
    body = read_body(bytes(answer.body))
    if 300 <= answer.status < 400:
        return _redirected(answer, context)
    if answer.status == 407:
        return ConfigurationError(
            "the HTTP proxy wants a password: put it into HTTPS_PROXY (http://user:password@host)"
        )
    return (
        _about_the_account(answer, body, context)
        or _about_the_size(answer, body, context)
        or _about_the_moment(answer, body, context)
        or RequestRejected(
            describe(answer, body, context, "refused the request"),
            billed="no" if body.own else "unknown",
            **facts(answer, body, context),
        )
    )


def from_batch_answer(answer: Answer, context: Context) -> EmbeddingError:
    """The error for an answer of the batch API that is not a success.

    Proof that no job was started is only a refusal that the API itself wrote.
    """
    body = read_body(bytes(answer.body))
    status = answer.status
    error = _about_a_job(answer, body, context) or from_answer(answer, context)
    refused = body.own and 400 <= status < 500 and status not in _UNKNOWN_OUTCOME
    error.billed = "no" if refused or not context.creates else "unknown"
    return error


def _about_a_job(answer: Answer, body: ErrorBody, context: Context) -> EmbeddingError | None:
    kind: type[PermanentProviderError]
    if answer.status in (404, 410) and context.batch == BATCH_API:
        kind, what = RequestRejected, f"has no {BATCH_API} under this address; set batch = false"
    elif answer.status in (404, 410):
        kind = RemoteGone
        what = (
            f"has no {context.batch}: gone, or of another project than the key with the "
            f"fingerprint {context.key_print}"
        )
    elif answer.status == 403 and not body.names & words.QUOTA:
        kind, what = PermissionDenied, f"does not let this key use {context.batch}"
    elif answer.status == 413:
        kind, what = RequestTooLarge, f"finds {context.batch} too large"
    elif answer.status in (400, 405, 422) and not body.names & words.QUOTA:
        kind, what = RequestRejected, f"refused the request for {context.batch}"
    else:
        return None
    return kind(describe(answer, body, context, what), **facts(answer, body, context))


def _about_the_account(answer: Answer, body: ErrorBody, context: Context) -> EmbeddingError | None:
    status, model = answer.status, context.model
    kind: type[PermanentProviderError]
    if status == 402 or (status in (400, 403, 429) and body.names & words.QUOTA):
        kind, what = QuotaExhausted, "has no quota left for this account; waiting does not help"
    elif status == 401:
        kind, what = AuthenticationFailed, "does not accept the API key; check OPENAI_API_KEY"
    elif status == 403:
        kind, what = PermissionDenied, f"does not let this key use {model!r}"
    elif status == 404:
        kind, what = ModelNotFound, f"does not know the model {model!r}, or base_url is wrong"
    else:
        return None
    proven = body.own or status in (401, 403, 404)
    return kind(
        describe(answer, body, context, what),
        billed="no" if proven else "unknown",
        **facts(answer, body, context),
    )


def _about_the_size(answer: Answer, body: ErrorBody, context: Context) -> EmbeddingError | None:
    if answer.status == 429:
        too_large = body.own and bool(words.NEVER_FITS_WORDS.search(body.message))
    elif answer.status in (400, 413, 422, 500):
        if body.names & words.TOO_LONG or words.TOO_LONG_WORDS.search(body.message):
            return _too_long(answer, body, context)
        too_large = answer.status == 413 or (
            answer.status != 500
            and bool(body.names & words.TOO_LARGE or words.TOO_LARGE_WORDS.search(body.message))
        )
    else:
        too_large = False
    if not too_large:
        return None
    return RequestTooLarge(
        describe(answer, body, context, f"finds {len(context.texts)} texts too much at once"),
        billed="no",
        **facts(answer, body, context),
    )


def _too_long(answer: Answer, body: ErrorBody, context: Context) -> InputTooLong:
    found = words.POSITION.search(body.parameter) or words.POSITION.search(body.message)
    position = int(found[1]) if found else (0 if len(context.texts) == 1 else None)
    if position is not None and position >= len(context.texts):
        position = None
    which = "a text" if position is None else f"text {position} of the request"
    return InputTooLong(
        describe(answer, body, context, f"finds {which} too long; set max_input_tokens lower"),
        position=position,
        reason="longer than the model takes",
        billed="no",
    )


def _about_the_moment(answer: Answer, body: ErrorBody, context: Context) -> EmbeddingError | None:
    billed: Billed = "no" if body.own else "unknown"
    wait: dict[str, Any] = {
        "retry_after": headers.retry_after(answer.headers),
        "limits": headers.rate_limits(answer.headers),
        **facts(answer, body, context),
    }
    if answer.status == 429:
        return RateLimited(
            describe(answer, body, context, "gets requests too fast"), billed=billed, **wait
        )
    if answer.status in _UNKNOWN_OUTCOME:
        return OutcomeUnknown(
            describe(answer, body, context, "did not finish; the request may have been billed"),
            **wait,
        )
    if answer.status == 424 or answer.status >= 500:
        certain = body.own and answer.status in (424, 500, 503, 529)
        return ProviderUnavailable(
            describe(answer, body, context, "cannot serve at the moment"),
            billed=context.server_errors_billed if certain else "unknown",
            **wait,
        )
    return None


def _redirected(answer: Answer, context: Context) -> ConfigurationError:
    try:
        target = urlsplit(answer.headers.get("location", ""))
        host = context.shown(target.hostname or urlsplit(context.endpoint).hostname or "")
    except ValueError:
        host = "an unreadable address"
    return ConfigurationError(
        f"{context.endpoint} redirects (HTTP {answer.status}) to {host}. Redirects are not "
        "followed, so that the key goes nowhere else: set base_url to the final address"
    )


def from_setup(error: Exception, context: Context) -> ConfigurationError:
    """The error for a connection that could not even be prepared: nothing was sent."""
    return ConfigurationError(
        f"a connection to {context.endpoint} cannot be set up "
        f"({type(error).__name__}: {context.shown(str(error))}). Check the proxy (HTTPS_PROXY, "
        "ALL_PROXY; SOCKS needs the package socksio) and the certificates (SSL_CERT_FILE)"
    )


def from_exception(error: Exception, context: Context) -> EmbeddingError:
    """The error for an exchange that brought no HTTP answer.

    Only what fails before the connection stands is certain not to be billed.
    """
    translated = _from_exception(error, context)
    if context.batch and not context.creates:
        translated.billed = "no"
    elif context.batch and translated.billed == "yes":
        translated.billed = "unknown"
    return translated


def from_download(error: Exception, context: Context) -> EmbeddingError:
    """The error for a body that was cut off. Reading it again costs nothing."""
    if isinstance(error, UnreadableBody):
        return InvalidResponse(f"{context.batch} cannot be read: {error}", billed="no")
    library = type(error).__module__.partition(".")[0]
    if not isinstance(error, openai.OpenAIError | OSError) and library not in _HTTP_LIBRARIES:
        return ProviderError(f"{context.batch} cannot be read ({type(error).__name__})")
    cause = f"{type(error).__name__}: {context.shown(str(error))}".rstrip(": ")
    return ProviderUnavailable(f"the download of {context.batch} broke off ({cause})", billed="no")


def from_bad_batch_reply(reply: BadReply, answer: Answer, context: Context) -> InvalidResponse:
    """The error for a success of the batch API whose body is not one."""
    return InvalidResponse(
        f"what {context.endpoint} says of {context.batch} cannot be trusted: {reply.reason}",
        billed="unknown" if context.creates else "no",
        status=answer.status,
        request_id=request_id(answer, context),
    )


def _from_exception(error: Exception, context: Context) -> EmbeddingError:
    chain = _chain(error)
    names = {type(link).__name__ for link in chain}
    cause = f"{type(chain[-1]).__name__}: {context.shown(str(chain[-1]))}".rstrip(": ")
    for link in chain:
        if isinstance(link, UnreadableBody):
            return InvalidResponse(f"the reply of {context.endpoint} cannot be read: {link}")
    if names & _NOT_SENT:
        return ProviderUnavailable(
            f"{context.endpoint} cannot be reached ({cause}). Check the address, the network, "
            "the proxy (HTTPS_PROXY, NO_PROXY) and the certificates (SSL_CERT_FILE)",
            billed="no",
        )
    if names & _NOT_SENDABLE:
        return ConfigurationError(f"the request to {context.endpoint} cannot be sent ({cause})")
    if isinstance(error, openai.APITimeoutError):
        return OutcomeUnknown(f"{context.endpoint} did not answer in time ({cause})")
    if isinstance(error, openai.APIConnectionError):
        return OutcomeUnknown(f"the connection to {context.endpoint} broke ({cause})")
    return ProviderError(f"the request to {context.endpoint} failed ({cause})", billed="unknown")


def _chain(error: BaseException) -> list[BaseException]:
    """The exception and its causes, down to the HTTP library's own."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links and len(links) < 10:
        links.append(link)
        link = link.__cause__
    return links


def from_bad_reply(reply: BadReply, answer: Answer, context: Context) -> InvalidResponse:
    """The error for a success whose body is not one."""
    body = read_body(bytes(answer.body))
    said = ""
    if body.own:
        said = f"; it says: {context.shown(body.message)}"
    elif reply.not_json:
        start = bytes(answer.body[:2_000]).decode("utf-8", "replace")
        content = scrub.clean(answer.headers.get("content-type", "of unknown type"))[:60]
        said = f"; {content}: {context.shown(start)[:200]}"
    return InvalidResponse(
        f"the reply of {context.endpoint} for {context.model!r} cannot be trusted: "
        f"{reply.reason}{said}",
        status=answer.status,
        code=context.shown(body.code)[:80] or None,
        request_id=request_id(answer, context),
    )
