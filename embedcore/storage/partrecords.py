"""What is written down of the parts of batches, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, TypeAlias

from embedcore.storage.amounts import Amount

PartPhase: TypeAlias = Literal[
    "planned", "creating", "fenced", "lost", "stray", "submitted", "collecting", "done"
]
IdForm: TypeAlias = Literal["ordinal", "key"]
ACTIVE: Final = ("creating", "fenced", "submitted", "collecting", "stray")

# Of a part's key, in the ids of its items: 60 random bits, and every line is a little shorter.
_KEY_LENGTH: Final = 16
_LONGEST_ORDINAL: Final = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part as it is written down. Times are microseconds since 1970.

    - ``key``: marks its remote job as ours. ``batch``: whose file has its texts; None: no more.
    - ``tokens``, ``cost``: held for it. ``price``: dollars per million tokens when it was held.
    - ``input``, ``job``: the provider's names. ``jobs``: further jobs, comma-separated.
    - ``asked``: when the job was to be created; ``looks``: how often none was found long after.
    - ``tries``: errors in a row. ``next``: nothing is due before. ``trouble``: for a person.
    - ``status``, ``completed``, ``failed``, ``total``: as the provider last said.
    - ``ids``: the form of the ids of its items. ``since``: when the wait for something of the
      provider began that should be there already; None: it waits for nothing of that kind.
    - ``cancelled``: embedcore told its job to stop.
    - ``not_before``: the provider asked to be left alone until then, so that even who asks for it
      waits, which ``next`` is not for.
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
    ids: IdForm = "key"
    since: int | None = None
    cancelled: bool = False
    not_before: int = 0

    def item_id(self, ordinal: int) -> str:
        """What the item at this place is called in the part's input, and so in its results.

        It names the part as well: a line of any other job is nobody's.
        """
        return str(ordinal) if self.ids == "ordinal" else f"{self.key[:_KEY_LENGTH]}-{ordinal}"

    def ordinal_of(self, item: object) -> int | None:
        """The place that an id names; None for one that no item of this part can have."""
        if not isinstance(item, str):
            return None
        ordinal = ordinal_in(item.rpartition("-")[2])
        return ordinal if ordinal is not None and item == self.item_id(ordinal) else None


def ordinal_in(text: str) -> int | None:
    """A place written as a number, in the one way in which that is done: "07" is none."""
    if not (text.isascii() and text.isdigit() and len(text) < _LONGEST_ORDINAL):
        return None
    return int(text) if str(int(text)) == text else None


def longest_id(items: int) -> str:
    """As long as any id in a part of so many items."""
    return f"{'9' * _KEY_LENGTH}-{'9' * len(str(items))}"


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
    found: dict[str, Any] = dict(zip(_NAMES, row, strict=True))
    return Part(**{**found, "cancelled": bool(found["cancelled"])})
