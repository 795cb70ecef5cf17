"""Events for observers, as plain values. No event carries a text, a vector or a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSent:
    """One HTTP attempt is about to leave. ``tokens`` is the amount reserved for it."""

    provider: str
    model: str
    inputs: int
    tokens: int
    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestFinished:
    """One attempt was answered with vectors. ``tokens`` is what was billed, in ``seconds``.

    ``reported``: the provider named the tokens itself. ``exact``: it did, or they were counted;
    otherwise they are the amount reserved, and at most so many. ``endpoint``: where it was sent,
    without credentials.
    """

    provider: str
    model: str
    inputs: int
    tokens: int
    reported: bool
    request_id: str | None
    seconds: float
    endpoint: str = ""
    exact: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestFailed:
    """One attempt ended in an error. ``wait``: seconds until it is retried; None: it is not."""

    provider: str
    model: str
    inputs: int
    error: str
    status: int | None
    request_id: str | None
    billed: str
    seconds: float
    wait: float | None
    endpoint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throttled:
    """The provider names a rate limit: nothing is sent to ``endpoint`` for ``seconds``."""

    endpoint: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsLearned:
    """The provider named its limits, or changed them; None: it names no such limit."""

    endpoint: str
    model: str
    requests_per_minute: int | None
    tokens_per_minute: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cached:
    """Nothing is sent for these ``texts``: their vectors are cached, or are being embedded
    by another call at this moment."""

    provider: str
    model: str
    texts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheProblem:
    """The cache could not help or keep everything; the call went on without."""

    path: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """Cost was reserved for a call or a batch, before anything of it is sent."""

    scope: str
    tokens: int
    cost: Decimal
    provider: str = ""
    model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """What an attempt, or a job of a batch, cost in the end; the sum of all is what was spent.

    ``unconfirmed``: charged without proof that it was billed. An amount below zero takes back such
    a charge, since what became of it is known by now. ``exact``: the tokens were counted;
    otherwise they are at most so many.
    """

    scope: str
    tokens: int
    cost: Decimal
    unconfirmed: bool
    provider: str = ""
    model: str = ""
    exact: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A limit refused a call. ``message`` is that of the error."""

    scope: str
    message: str
    provider: str = ""
    model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetWait:
    """A stream waits for its budget: until the window ends, or room is made. ``message`` is that
    of the error."""

    scope: str
    until: datetime
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitNear:
    """A limit's used share passed the warning mark; sent once per window."""

    scope: str
    period: str
    unit: str
    used: int | Decimal
    limit: int | Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundViolated:
    """The provider billed more than was reserved: its plugin's count is wrong."""

    provider: str
    model: str
    reserved: int
    billed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchChanged:
    """A remote batch job has another state, or has done more, by what the provider says.

    ``status``: the provider's own word. ``completed``, ``failed``, ``total``: its texts.
    """

    job: str
    status: str
    completed: int
    failed: int
    total: int
    scope: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchDuplicate:
    """A remote job that was created a second time, or after it was given up. It was told to stop,
    and what it may cost at most counts as spent."""

    job: str
    scope: str
    tokens: int
    cost: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStopped:
    """A remote job was cancelled at the provider, and not by embedcore. What it had done is
    collected; ``texts`` of this batch are not sent again until a person says so."""

    batch: str
    job: str
    texts: int
    scope: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchWaits:
    """Texts of a batch cannot be submitted now: for want of budget, until then at least."""

    batch: str
    scope: str
    until: datetime | None
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Texts of the running call that have their outcome, out of ``total``; None: of a stream whose
    end is not known. ``tokens``: at most so many, unless ``exact``."""

    done: int
    total: int | None
    tokens: int
    cost: Decimal
    exact: bool = True


Event: TypeAlias = (
    RequestSent
    | RequestFinished
    | RequestFailed
    | Throttled
    | LimitsLearned
    | Cached
    | CacheProblem
    | Reserved
    | Settled
    | Refused
    | BudgetWait
    | LimitNear
    | BoundViolated
    | BatchChanged
    | BatchDuplicate
    | BatchStopped
    | BatchWaits
    | Progress
)

Observer: TypeAlias = Callable[[Event], None]
