"""Answers and failures of the batch API as errors of embedcore.

``embedcore.provider.refusals`` reads status, headers and body, and ``embedcore.provider.http`` says
what became of a request without an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from http.client import HTTPException
from typing import Final

from embedcore.errors import (
    Billed,
    EmbeddingError,
    InvalidResponse,
    PermanentProviderError,
    PermissionDenied,
    ProviderError,
    ProviderUnavailable,
    RemoteGone,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.provider import refusals
from embedcore.provider.http import Answer, CutOff, UnreadableBody
from embedcore.provider.refusals import Asked, Refused, describe, facts
from embedcore.provider.replies import BadReply

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


def of_batch(error: EmbeddingError, context: Context) -> EmbeddingError:
    """The error of a request to the batch API that brought no answer: only a new job costs."""
    if not context.creates:
        error.billed = "no"
    elif error.billed == "yes":
        error.billed = "unknown"
    return error


def from_download(error: Exception, context: Context) -> EmbeddingError:
    """The error for a body that was cut off. Reading it again costs nothing."""
    if isinstance(error, UnreadableBody):
        return InvalidResponse(f"{context.batch} cannot be read: {error}", billed="no")
    if not isinstance(error, CutOff | OSError | HTTPException):
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
