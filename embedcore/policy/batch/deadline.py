"""Embeds at once the texts of a batch that cannot wait any longer.

What is embedded here is cached under the same keys as what a job brings: after a crash in between
it is found there. A job is stopped, and has brought what it has, before its texts are sent.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from embedcore import money
from embedcore.errors import BudgetExceeded, EmbeddingError, TransientProviderError
from embedcore.policy.immediate.recipe import embed_now
from embedcore.policy.planning import priced
from embedcore.storage.amounts import Amount
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.keys import Origin
from embedcore.storage.manifest import Shortened

if TYPE_CHECKING:
    from decimal import Decimal

    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.result import Arrival, TextCut
    from embedcore.storage.batches import BatchRecord
    from embedcore.storage.manifest import Manifest
    from embedcore.storage.standing import Standing


logger = logging.getLogger("embedcore")

_TEXTS_PER_CALL: Final = 4_096


def choose_now(
    context: BatchContext, *, texts: int, tokens: int, strategy: str, deadline: float | None
) -> str | None:
    """Why so many texts are embedded at once instead of as a batch; None: they are not.

    ``deadline``: seconds from now. What is chosen is logged.
    """
    if strategy == "immediate":
        return "strategy is immediate"
    if strategy != "auto" or not texts:
        return None
    settings, saved = context.settings, _saved(context, tokens)
    reason = None
    if deadline is not None and deadline < settings.quickest:
        reason = f"a batch may take longer than the {deadline:.0f} s that are left"
    elif texts <= settings.small_texts and (saved is None or float(saved) < settings.worth):
        little = "nothing that is known" if saved is None else f"only {money.shown(saved)}"
        reason = f"a batch of so few texts ({texts:,}) would save {little}"
    if reason is None:
        until = ""
        if deadline is not None:
            begins = max(deadline - settings.drain_before, 0.0)
            until = f"; what is missing {begins:.0f} s from now is embedded at once"
        saves = "" if saved is None else f", which saves {money.shown(saved)}"
        logger.info("auto: %s texts go as a batch%s%s", f"{texts:,}", saves, until)
    else:
        logger.info("auto: embedded now, since %s", reason)
    return reason


def what_fits(context: BatchContext, batch: BatchRecord, *, now: bool) -> bool:
    """Whether ``strategy="auto"`` embeds at once, once the limits have been asked as well.

    ``now``: what it would choose. Where the limits allow only the other way, that is taken.
    """
    cut = context.cut(batch.created)
    as_batch = context.cutter.whole(batch, cut)
    at_once = replace(cut, price=_immediate_price(context))
    ways = {False: as_batch, True: context.cutter.whole(batch, at_once)}
    if context.cutter.affords(ways[now], waits=True) or ways[now] == ways[not now]:
        return now
    if not context.cutter.affords(ways[not now], waits=True):
        return now
    other = "as a batch, which may be later than wanted" if now else "at once"
    logger.info("auto: the limits allow this only %s", other)
    return not now


def _immediate_price(context: BatchContext) -> Decimal | None:
    price = context.engine.info.price
    return None if price is None else price.immediate


def _saved(context: BatchContext, tokens: int) -> Decimal | None:
    price = context.engine.info.price
    if price is None or price.batch is None:
        return None
    return money.in_dollars(price.picodollars(tokens) - price.picodollars(tokens, batch=True))


def is_due(context: BatchContext, batch: BatchRecord, now: int) -> bool:
    """Whether the deadline is so near that what is missing must be embedded at once, and may be."""
    if batch.state != "open" or batch.draining or batch.deadline is None:
        return False
    left = (batch.deadline - now) / MICROSECONDS
    if left > context.settings.drain_before:
        return False
    tokens = context.batches.open_tokens(batch)
    price = context.engine.info.price
    # The tokens are reserved already, and so is the price of the batch: only the rest is new.
    at_once = priced(tokens, price).cost
    cut = context.cut(now)
    then = cut.amount(tokens).cost
    if not tokens:
        return False
    # Where the budget is waited for, what is in no job has no money yet.
    unheld = context.cutter.whole(batch, cut) if batch.grant is None else Amount()
    if not context.cutter.affords(
        Amount(tokens=unheld.tokens, cost=max(at_once - then, 0) + unheld.cost)
    ):
        _warn(
            context,
            batch,
            f"the budget does not allow to embed what is missing at once, "
            f"{max(left, 0):.0f} s before its deadline: its jobs go on",
        )
        return False
    logger.info(
        "batch %s: %.0f s before its deadline, what is missing is embedded at once: its jobs are "
        "stopped first, so that nothing is paid for twice",
        batch.name,
        left,
    )
    return True


def is_late(context: BatchContext, batch: BatchRecord, found: Standing) -> bool:
    """Whether a deadline was not kept; said once, of the batch as it was before this look."""
    if batch.deadline is None or batch.state != "open" or not batch.draining:
        return False
    is_late = found.now > batch.deadline and batch.blocked is None
    if not is_late or not found.counts.open or not found.parts:
        return False
    _warn(context, batch, "its deadline has passed, and its jobs have not stopped yet")
    return True


def _warn(context: BatchContext, batch: BatchRecord, why: str) -> None:
    if batch.blocked is None:
        logger.warning("batch %s: %s", batch.name, why)
        context.batches.block(batch, f"deadline: {why}")


def take_what_is_there(context: BatchContext, batch: BatchRecord) -> bool:
    """Texts that others embedded since they were asked for need no job. Returns whether there
    were any."""
    after, found = 0, False
    while some := context.batches.to_submit(batch, _TEXTS_PER_CALL, after=after, stopped=True):
        after = some[-1][0]
        there = context.stored([key for _, key in some])
        if there:
            context.store.keep(there, context.keep_until(context.jobs.now()))
            context.batches.settle_now(batch, stored=list(there))
            found = True
        if len(some) < _TEXTS_PER_CALL:
            break
    shortened = context.batches.shortened(batch)
    if not shortened:
        return found
    there = context.stored([sent.key for _, sent in shortened])
    if cut := [(key, sent) for key, sent in shortened if sent.key in there]:
        context.store.keep(there, context.keep_until(context.jobs.now()))
        context.note_cuts(batch.pool, cut)
        context.batches.settle_now(batch, stored=[key for key, _ in cut])
    return found or bool(cut)


def drain(context: BatchContext, batch: BatchRecord, problems: list[EmbeddingError]) -> bool:
    """Embed the texts that are in no job, at the immediate price. Returns whether any was.

    Raises ``StorageError``; a refusal of the budget leaves the batch blocked.
    """
    done, after = take_what_is_there(context, batch), 0
    while some := context.batches.to_submit(batch, _TEXTS_PER_CALL, after=after):
        # What fails is tried again at the next look, and not at once.
        after = some[-1][0]
        try:
            _embed(context, batch, [key for _, key in some], batch.input_type or None)
        except BudgetExceeded as error:
            context.batches.block(batch, f"budget: {error}", until=context.later(60.0))
            if error.never_fits or not context.jobs.of_batch(batch):
                problems.append(error)
            break
        except EmbeddingError as error:
            logger.warning("batch %s: %s", batch.name, error)
            if not isinstance(error, TransientProviderError):
                problems.append(error)
            break
        done = True
        if batch.blocked is not None:
            context.batches.block(batch, None)
    return done


def _embed(
    context: BatchContext, batch: BatchRecord, keys: Sequence[bytes], input_type: str | None
) -> None:
    manifest, engine = context.manifest(batch), context.engine
    if engine.cache is not None:
        # What a batch brings is kept beyond the cap: there is nothing to warn of.
        engine = replace(engine, cache=engine.cache.pinned(context.keep_until(context.jobs.now())))
    try:
        found = manifest.texts(keys)
        names = [key for key in keys if key in found]
        arriving = _Arriving(context, manifest, names, [found[key] for key in names], input_type)
        result = embed_now(
            engine,
            arriving.texts,
            input_type=input_type,
            on_error="keep",
            on_arrival=arriving.keep,
        )
    finally:
        manifest.close()
    lost = [(key, "its text is no longer in the batch's file") for key in keys if key not in found]
    failed = [(names[row], error.message) for row, error in result.errors.items()]
    context.batches.settle_now(
        batch,
        stored=[key for key, ok in zip(names, result.ok.tolist(), strict=True) if ok],
        failed=[*failed, *lost],
        most_tries=context.settings.attempts,
        tokens=result.usage.tokens,
        cost=money.in_picodollars(result.usage.cost),
    )


class _Arriving:
    """Stores what comes, as it comes: a process that is killed now has lost no finished request."""

    def __init__(
        self,
        context: BatchContext,
        manifest: Manifest,
        names: Sequence[bytes],
        texts: Sequence[str],
        input_type: str | None,
    ) -> None:
        self.texts = texts
        self._context, self._manifest, self._names = context, manifest, names
        self._keys = context.keys(input_type)
        engine = context.engine
        self._origin = Origin(
            model=engine.label, fingerprint=engine.fingerprint, input_type=input_type
        )
        self._until = context.keep_until(context.jobs.now())

    def keep(self, arrival: Arrival) -> None:
        rows = arrival.rows.tolist()
        keys = [self._key(row, arrival.cuts.get(row)) for row in rows]
        self._context.keep(keys, arrival.vectors, self._origin, self._until)
        for row, key in zip(rows, keys, strict=True):
            if key != self._names[row]:
                cut = arrival.cuts[row]
                characters = None if cut.tokens is not None else cut.characters
                self._manifest.shorten(self._names[row], Shortened(key, cut.tokens, characters))

    def _key(self, row: int, cut: TextCut | None) -> bytes:
        """Under which key a vector is stored: that of a shortened text is none of the whole one."""
        if cut is None or not cut.characters:
            return self._names[row]
        text = self.texts[row]
        return self._keys.of([text[: len(text) - cut.characters]])[0]
