"""What is written down of the parts of batches, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal, TypeAlias

from embedcore.storage.amounts import Amount

PartPhase: TypeAlias = Literal[
    "planned", "creating", "fenced", "lost", "stray", "submitted", "collecting", "done"
]
ACTIVE: Final = ("creating", "fenced", "submitted", "collecting", "stray")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part as it is written down. Times are microseconds since 1970.

    - ``key``: marks its remote job as ours. ``batch``: whose file has its texts; None: no more.
    - ``tokens``, ``cost``: held for it. ``price``: dollars per million tokens when it was held.
    - ``input``, ``job``: the provider's names. ``jobs``: further jobs, comma-separated.
    - ``asked``: when the job was to be created; ``looks``: how often none was found long after.
    - ``tries``: errors in a row. ``next``: nothing is due before. ``trouble``: for a person.
    - ``status``, ``completed``, ``failed``, ``total``: as the provider last said.
    """

    id: int
    key: str
    pool: int
    batch: int | None
    state: PartPhase
    input_type: str
    items: int
    tokens: int
    cost: int
    price: str | None
    grant: int
    attempt: int | None
    input: str | None
    job: str | None
    jobs: str
    asked: int | None
    looks: int
    tries: int
    next: int
    status: str
    completed: int | None
    failed: int | None
    total: int | None
    trouble: str | None
    epoch: int
    created: int
    ended: int | None


_NAMES: Final = tuple(one.name for one in fields(Part))
COLUMNS: Final = ", ".join(f'"{name}"' for name in _NAMES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """``limit``: tokens that may be enqueued, learned; ``until``: nothing is enqueued before."""

    limit: int | None
    until: int
    refusals: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Money of a batch. ``actual`` includes ``uncertain``: charged without proof."""

    actual: Amount
    uncertain: Amount
    held: Amount
    reported: bool


class Superseded(Exception):
    """Another process owns the part by now: whoever meets this leaves it alone."""


def read_part(row: Sequence[object]) -> Part:
    return Part(**dict(zip(_NAMES, row, strict=True)))  # type: ignore[arg-type]
