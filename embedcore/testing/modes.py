"""What is a fault of the fake server, and what may it look at?

A mode is a function of an ``Exchange`` that returns the reply to send instead. Modes register
themselves in ``MODES``; ``modes_refusals`` and ``modes_replies`` hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from embedcore.testing.wire import HttpReply

if TYPE_CHECKING:
    from embedcore.testing.api import Answer, ApiError
    from embedcore.testing.embeddings_api import Embeddings
    from embedcore.testing.wire import Delivery, HttpRequest


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
