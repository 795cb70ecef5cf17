"""The plan of a call: the same steps without the wire, and what they would cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from embedcore import money
from embedcore.policy.immediate.reuse import former_keys_of, keys_of, vector_width
from embedcore.policy.texts import Prepared, resolve_input_type

if TYPE_CHECKING:
    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a call would do, without doing it.

    - ``rows``: all of them; ``rejected``: those that cannot be sent; ``truncated``: those whose
      text will be cut; ``perhaps_long``: those that may be over the model's limit and cannot be
      counted: they are sent whole, and cut only if the server refuses them.
    - ``unique``: different texts, of which ``cached`` are in the cache and cost nothing, and
      ``to_embed`` are sent. The rest (``in_flight``; plans of batches only) is under way in another
      batch.
    - ``tokens``: of what is sent; an upper bound unless ``exact``.
    - ``cost``: in US dollars; None if the price is not known.
    """

    rows: int
    unique: int
    rejected: int
    truncated: int
    requests: int
    tokens: int
    exact: bool
    cost: Decimal | None
    cached: int = 0
    in_flight: int = 0
    to_embed: int = 0
    perhaps_long: int = 0


def plan_now(
    engine: Engine,
    texts: Iterable[object],
    *,
    input_type: str | None = None,
    exact: bool = True,
    context: BatchContext | None = None,
) -> Plan:
    """The same steps without the wire: how many requests, tokens and dollars.

    ``exact``: count with the tokenizer where it can; otherwise a bound is enough. ``context``: plan
    a batch, with its cache, its price, and without what is under way in another batch. The cache
    is read and checked, never changed or claimed.
    """
    resolved = resolve_input_type(engine, input_type)
    prepared = Prepared(engine, texts, keep=True)
    cached, in_flight = _free(engine, context, prepared.texts, resolved)
    free = cached | in_flight
    missing = [place for place in range(len(prepared.texts)) if place not in free]
    counted = exact and engine.tokenizer.exact
    requests = prepared.plan(counted, missing)
    tokens = sum(request.amount.tokens for request in requests)
    price, cost = engine.info.price, sum(request.amount.cost for request in requests)
    if context is not None and price is not None:
        cost = price.picodollars(tokens, batch=True)
        checked = _checked(context, len(missing), tokens)
        tokens, cost = tokens + checked, cost + price.picodollars(checked)
    return Plan(
        rows=len(prepared.taken.rows),
        unique=len(prepared.texts),
        rejected=len(prepared.taken.rejected),
        truncated=sum(cut.is_known for cut in prepared.cuts().values()),
        requests=len(requests),
        tokens=tokens,
        exact=counted or not missing,
        cost=None if price is None and missing else money.in_dollars(cost),
        cached=len(cached),
        in_flight=len(in_flight),
        to_embed=len(missing),
        perhaps_long=prepared.perhaps_long_rows,
    )


def _checked(context: BatchContext, texts: int, tokens: int) -> int:
    """Tokens of the rows of all jobs that are compared with single requests: of as many texts of
    the usual length, since they are chosen at random."""
    rows = min(-(-texts // context.most_items) * context.strategy.limits.verify_rows, texts)
    return -(-tokens * rows // texts) if rows else 0


def _free(
    engine: Engine, context: BatchContext | None, texts: Sequence[str], input_type: str | None
) -> tuple[set[int], set[int]]:
    """Which texts cost nothing: those in the cache, and those in a job of another batch."""
    width = vector_width(engine)
    names = [keys_of(engine, input_type), *former_keys_of(engine, input_type)]
    if context is None:
        cache = engine.cache
        if cache is None:
            return set(), set()
        return {place for one in names for place in cache.look(one.of(texts), width)}, set()
    cached = {place for one in names for place in context.store.look(one.of(texts), width).there}
    keys = names[0].of(texts)
    left = [place for place in range(len(keys)) if place not in cached]
    under_way = context.batches.in_flight(context.pool, [keys[place] for place in left])
    return cached, {place for place in left if keys[place] in under_way}
