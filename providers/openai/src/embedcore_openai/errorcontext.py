"""What is told of a failure, and what must not be shown with it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from embedcore.errors import Billed
from embedcore_openai import headers, scrub
from embedcore_openai.errorbody import ErrorBody
from embedcore_openai.transport import Answer

BATCH_API: Final = "batch API"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Context:
    """What the request was, for messages. ``secrets`` and ``texts`` are what must not be shown.

    ``batch``: what a request of the batch API is about, such as a job and its id. ``creates``: it
    starts a job, which costs; the others cost nothing. ``key_print``: tells keys apart.
    """

    model: str
    endpoint: str
    texts: Sequence[str] = ()
    secrets: Sequence[str] = ()
    server_errors_billed: Billed = "no"
    batch: str = ""
    creates: bool = False
    key_print: str = ""

    def shown(self, message: str) -> str:
        return scrub.clean(message, secrets=self.secrets, texts=self.texts)


def request_id(answer: Answer, context: Context) -> str | None:
    """The server's name for the request; None if the server put a secret there."""
    name = headers.request_id(answer.headers)
    return None if name and any(secret in name for secret in context.secrets) else name


def facts(answer: Answer, body: ErrorBody, context: Context) -> dict[str, Any]:
    return {
        "status": answer.status,
        "code": context.shown(body.code or body.kind)[:80] or None,
        "request_id": request_id(answer, context),
    }


def describe(answer: Answer, body: ErrorBody, context: Context, what: str) -> str:
    said = context.shown(body.message)
    return f"{context.endpoint} {what} (HTTP {answer.status}{': ' if said else ''}{said})"
