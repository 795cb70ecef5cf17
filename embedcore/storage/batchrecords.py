"""What is written down of batches, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

BatchPhase: TypeAlias = Literal["preparing", "open", "cancelling", "done", "cancelled", "abandoned"]
ENDED: Final = ("done", "cancelled", "abandoned")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """What batches share: one scope, one model, one way to make vectors, one account."""

    id: int
    scope: str
    model: str
    fingerprint: str
    endpoint: str
    account: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRecord:
    """One batch as it is written down. Times are microseconds since 1970.

    - ``rows``, ``texts``: of the caller, and different ones. ``reused``: texts bought before.
    - ``stored``, ``failed``: texts with a vector and without, once it has ended.
    - ``deadline``: when everything should be there; ``draining``: the rest is bought at once.
    - ``blocked``: why nothing new is sent; not before ``retry`` that may change.
    """

    id: int
    name: str
    pool: int
    input_type: str
    asked_as: str
    state: BatchPhase
    rows: int
    texts: int
    reused: int
    stored: int
    failed: int
    resubmits_lost: bool
    deadline: int | None
    draining: bool
    grant: int | None
    blocked: str | None
    retry: int
    created: int
    ended: int | None

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A text that is to be bought: its key, its tokens, and its bytes in the job's input."""

    key: bytes
    tokens: int
    in_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Texts of a batch by what became of them.

    ``stopped``: their job was cancelled at the provider by somebody else, and they are not sent
    again until a person says so.
    """

    to_submit: int = 0
    in_flight: int = 0
    stored: int = 0
    failed: int = 0
    stopped: int = 0

    @property
    def open(self) -> int:
        return self.to_submit + self.in_flight + self.stopped
