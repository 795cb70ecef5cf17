"""What observers are told, as plain values. No event carries a text, a vector or a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSent:
    """One HTTP attempt is about to leave. ``tokens`` is the amount held for it."""

    provider: str
    model: str
    inputs: int
    tokens: int
    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestFinished:
    """One attempt was answered with vectors. ``tokens`` is what was billed, in ``seconds``.

    ``reported``: the provider named the tokens itself; otherwise they are the amount held.
    """

    provider: str
    model: str
    inputs: int
    tokens: int
    reported: bool
    request_id: str | None
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestFailed:
    """One attempt ended in an error. ``wait``: seconds until it is tried again; None: it is not."""

    provider: str
    model: str
    inputs: int
    error: str
    status: int | None
    request_id: str | None
    billed: str
    seconds: float
    wait: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Throttled:
    """The provider closed the gate: nothing is sent to ``endpoint`` for ``seconds``."""

    endpoint: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Money was set aside for a call, before anything of it is sent."""

    scope: str
    tokens: int
    picodollars: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """What an attempt cost in the end. ``uncertain``: charged without proof that it was billed."""

    scope: str
    tokens: int
    picodollars: int
    uncertain: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A limit refused a call. ``message`` is that of the error."""

    scope: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitNear:
    """A limit's used share passed the warning mark; told once per window."""

    scope: str
    period: str
    unit: str
    used: int
    limit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundViolated:
    """The provider billed more than was held: its plugin's count is wrong."""

    provider: str
    model: str
    held: int
    billed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Rows of the running call that have their outcome, out of ``total``."""

    done: int
    total: int
    tokens: int
    picodollars: int


Event: TypeAlias = (
    RequestSent
    | RequestFinished
    | RequestFailed
    | Throttled
    | Held
    | Settled
    | Refused
    | LimitNear
    | BoundViolated
    | Progress
)

Observer: TypeAlias = Callable[[Event], None]
