"""What would a call do, and what would it cost? The same steps, without the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from embedcore.errors import ConfigurationError
from embedcore.policy.preparing import Prepared

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine

_PLAIN_INPUT_TYPES: Final = frozenset({"query", "document"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a call would do, without doing it.

    ``tokens``: exact, or an upper bound. ``picodollars``: None if the price is not known.
    """

    rows: int
    unique: int
    rejected: int
    truncated: int
    requests: int
    tokens: int
    exact: bool
    picodollars: int | None


def plan_now(
    engine: Engine, texts: Iterable[object], *, input_type: str | None = None, exact: bool = True
) -> Plan:
    """The same steps without the wire: how many requests, tokens and dollars.

    ``exact``: count with the tokenizer where it can; otherwise a bound is enough.
    """
    resolve_input_type(engine, input_type)
    prepared = Prepared(engine, texts, keep=True)
    counted = exact and engine.tokenizer.exact
    requests = prepared.plan(counted)
    tokens = sum(request.amount.tokens for request in requests)
    price = engine.info.price
    return Plan(
        rows=len(prepared.taken.rows),
        unique=len(prepared.texts),
        rejected=len(prepared.taken.rejected),
        truncated=len(prepared.tokens_cut()),
        requests=len(requests),
        tokens=tokens,
        exact=counted,
        picodollars=None if price is None else sum(one.amount.cost for one in requests),
    )


def resolve_input_type(engine: Engine, input_type: str | None) -> str | None:
    """What the provider is told: nothing if the model makes no difference between the types."""
    known = engine.info.input_types
    if input_type is None or input_type in known:
        return input_type
    if not known and input_type in _PLAIN_INPUT_TYPES:
        return None
    choices = ", ".join(known) or "query, document"
    raise ConfigurationError(
        f"{engine.label} knows no input_type {input_type!r}; it takes: {choices}"
    )
