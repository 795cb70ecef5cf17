"""What does the body of a refusal say, and did the provider itself write it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorBody:
    """``own``: the shape is one that OpenAI or a compatible server writes itself, which proves
    that the request got there and was refused, and not by something on the way."""

    own: bool = False
    message: str = ""
    kind: str = ""
    code: str = ""
    parameter: str = ""

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.code, self.kind})


def read_body(body: bytes) -> ErrorBody:
    """The error in a body: nested (OpenAI), flat (vLLM, TEI, Mistral), a bare string, or none."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ErrorBody()
    return error_in(document)


def error_in(document: object) -> ErrorBody:
    """The error in a document that was parsed already."""
    if not isinstance(document, dict):
        return ErrorBody()
    error = document.get("error")
    if isinstance(error, dict) and error:
        return _fields(error)
    if isinstance(error, str) and error:
        return ErrorBody(own=True, message=error, kind=_text(document.get("error_type")))
    if document.keys() >= {"message"} and document.keys() & {"code", "type"}:
        return _fields(document)
    return _validation(document.get("detail"))


def _fields(error: dict[str, Any]) -> ErrorBody:
    return ErrorBody(
        own=True,
        message=_text(error.get("message")),
        kind=_text(error.get("type")),
        code=_text(error.get("code")),
        parameter=_text(error.get("param")),
    )


def _validation(detail: object) -> ErrorBody:
    """FastAPI's form. Of a list only the reasons: its entries repeat the input."""
    if isinstance(detail, str) and detail:
        return ErrorBody(own=True, message=detail)
    if isinstance(detail, list) and detail:
        reasons = [_text(item.get("msg")) for item in detail[:3] if isinstance(item, dict)]
        return ErrorBody(own=True, message="; ".join(filter(None, reasons)))
    return ErrorBody()


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return str(value)
