"""Exceptions of the SDK as errors of embedcore.

``embedcore.provider.refusals`` reads status, headers and body. No exception of the SDK is kept as
a cause: their frames hold the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import openai

from embedcore.errors import (
    Billed,
    ConfigurationError,
    EmbeddingError,
    InvalidResponse,
    OutcomeUnknown,
    PermanentProviderError,
    PermissionDenied,
    ProviderError,
    ProviderUnavailable,
    RemoteGone,
    RequestRejected,
    RequestTooLarge,
    TimedOut,
)
from embedcore.provider import refusals
from embedcore.provider.refusals import Asked, Refused, describe, facts
from embedcore.provider.replies import BadReply
from embedcore_openai.bodies import CutOff, UnreadableBody
from embedcore_openai.http import Answer

BATCH_API: Final = "batch API"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Context(Asked):
    """A request of the batch API has more to say.

    ``batch``: what it is about, such as a job and its id. ``creates``: it starts a job, which
    costs; the others cost nothing. ``downloads``: it asks for the content of a file.
    ``key_print``: tells keys apart.
    """

    batch: str = ""
    creates: bool = False
    downloads: bool = False
    key_print: str = ""


# Answers after which a job may be there all the same.
_UNKNOWN_OUTCOME: Final = frozenset({408, 409})
_NOT_SENT: Final = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError"})
_HTTP_LIBRARIES: Final = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
_NOT_SENDABLE: Final = frozenset({"LocalProtocolError", "UnsupportedProtocol", "InvalidURL"})


def from_batch_answer(answer: Answer, context: Context) -> EmbeddingError:
    """The error for an answer of the batch API that is not a success.

    Proof that no job was started is a refusal that the API itself wrote. That nothing reached it is
    taken from a status with which gateways refuse, and counted as such.
    """
    refused = refusals.read(answer.status, answer.headers, answer.body, context)
    error = _about_a_job(refused, context)
    if error is None:
        error = refusals.translate(answer.status, answer.headers, answer.body, context)
    error.billed, by_status = _started(refused, context) if context.creates else ("no", False)
    if isinstance(error, ProviderError):
        error.free_by_status = by_status
    return error


def _started(refused: Refused, context: Context) -> tuple[Billed, bool]:
    """Whether a refused ``create`` may have started a job, and whether only its status says not."""
    status, body = refused.status, refused.body
    if not 400 <= status < 500 or status in _UNKNOWN_OUTCOME or body.charged:
        return "unknown", False
    if body.own:
        return "no", False
    if status not in refusals.FREE_BY_STATUS:
        return "unknown", False
    billed = context.refusals_billed
    return billed, billed == "no" and not body.known


def _about_a_job(refused: Refused, context: Context) -> EmbeddingError | None:
    kind: type[PermanentProviderError]
    status, of_the_account = refused.status, refusals.kind_of(refused) in ("quota", "key")
    if status in (404, 410) and context.batch == BATCH_API:
        kind, what = RequestRejected, f"has no {BATCH_API} under this address; set batch = false"
    elif status in (404, 410):
        kind = RemoteGone
        what = (
            f"has no {context.batch}: gone, or of another project than the key with the "
            f"fingerprint {context.key_print}"
        )
    elif status == 403 and not of_the_account:
        kind, what = PermissionDenied, f"does not let this key use {context.batch}"
    elif status == 413:
        kind, what = RequestTooLarge, f"finds {context.batch} too large"
    elif context.downloads and 300 <= status < 400:
        # The same address answered for the job itself: no setting is wrong.
        kind, what = RequestRejected, _elsewhere(refused, context)
    elif status in (400, 405, 422) and not of_the_account:
        kind, what = RequestRejected, f"refused the request for {context.batch}"
    else:
        return None
    return kind(describe(refused, what), **facts(refused))


def _elsewhere(refused: Refused, context: Context) -> str:
    place = refusals.redirected_to(refused.headers, context)
    return (
        f"gives no {context.batch} but a redirect to {place}, which is not followed, so that the "
        "key goes nowhere else: let the server give its files itself, and read the results again "
        "with embedcore batch fetch"
    )


def from_setup(error: Exception, context: Context) -> ConfigurationError:
    """The error for a connection that could not even be prepared: nothing was sent."""
    if isinstance(error, ConfigurationError):
        return error
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
        request_id=refusals.request_id(answer.headers, context),
    )


def _from_exception(error: Exception, context: Context) -> EmbeddingError:
    chain = _chain(error)
    names = {type(link).__name__ for link in chain}
    cause = f"{type(chain[-1]).__name__}: {context.shown(str(chain[-1]))}".rstrip(": ")
    for link in chain:
        if isinstance(link, UnreadableBody):
            return InvalidResponse(
                f"the reply of {context.endpoint} cannot be read: {link}", billed="unknown"
            )
    if names & _NOT_SENT:
        return ProviderUnavailable(
            f"{context.endpoint} cannot be reached ({cause}). Check the address, the network, "
            "the proxy (HTTPS_PROXY, NO_PROXY) and the certificates (SSL_CERT_FILE)",
            billed="no",
        )
    if names & _NOT_SENDABLE:
        return ConfigurationError(f"the request to {context.endpoint} cannot be sent ({cause})")
    if isinstance(error, openai.APITimeoutError):
        return TimedOut(
            f"{context.endpoint} did not answer in time ({cause}); the option timeout says how "
            "long that is"
        )
    if isinstance(error, openai.APIConnectionError | CutOff):
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
