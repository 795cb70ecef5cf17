"""Submits a batch: writes its rows, texts and money down before anything is sent.

Rows are read block by block: memory does not grow with their number.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal

from embedcore.errors import ConfigurationError, EmbeddingError, InputRejected, StorageFull
from embedcore.policy.batch.cleanup import forget, sweep
from embedcore.policy.batch.collect import read_again
from embedcore.policy.batch.deadline import choose_now, take_what_is_there, what_fits
from embedcore.policy.budget import hold_when_free, require_price
from embedcore.policy.cache import room_for, shown_size
from embedcore.policy.immediate.recipe import check_on_error
from embedcore.policy.sources import plain
from embedcore.policy.stream.rows import Row, RowReader, name_rows
from embedcore.policy.texts import Prepared, resolve_input_type
from embedcore.policy.threads import Pause
from embedcore.provider.types import BatchItem
from embedcore.settings import Strategy
from embedcore.storage.batches import BatchRecord, Wanted
from embedcore.storage.manifest import Manifest, ManifestRow
from embedcore.storage.parts import longest_id

if TYPE_CHECKING:
    from embedcore.policy.batch.context import BatchContext


logger = logging.getLogger("embedcore")

_BLOCK_ROWS: Final = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """How rows become a batch.

    ``on_error="keep"`` notes bad rows instead of raising. ``on_budget="wait"`` submits what fits
    and the rest when there is budget again. ``strategy`` and ``deadline`` (seconds from now)
    decide what is embedded at once; None: as the context says. ``waiting``: seconds for which the
    call that waits for the batch is believed alive; None: none waits.
    """

    text: str | int | None = None
    key: str | int | None = None
    input_type: str | None = None
    on_error: Literal["raise", "keep"] = "raise"
    on_budget: Literal["raise", "wait"] = "raise"
    resubmit_lost: bool = False
    strategy: Strategy | None = None
    deadline: float | None = None
    waiting: float | None = None


def _pace(context: BatchContext, how: Submission) -> tuple[Strategy, float | None]:
    """Strategy and deadline. Raises ``ConfigurationError`` for what no submission may say."""
    check_on_error(how.on_error)
    if how.on_budget not in ("raise", "wait"):
        raise ConfigurationError(f'on_budget = {how.on_budget!r} must be "raise" or "wait"')
    chosen = how.strategy or context.default_strategy
    if chosen not in ("immediate", "batch", "auto"):
        raise ConfigurationError(f'strategy = {chosen!r} must be "immediate", "batch" or "auto"')
    wanted = context.default_deadline if how.deadline is None else how.deadline
    if wanted is not None and not wanted > 0:
        raise ConfigurationError(f"deadline = {wanted} must be above 0 seconds")
    if how.deadline is not None and chosen != "auto":
        raise ConfigurationError(
            f'a deadline needs strategy = "auto", not {chosen!r}: a batch may take a day'
        )
    return chosen, wanted


def submit(context: BatchContext, rows: Iterable[Any], how: Submission) -> BatchRecord:
    """Write down a batch of these rows and reserve its money, or raise and leave nothing behind.

    Raises ``InputRejected``, ``BudgetExceeded`` with ``on_budget="raise"``, ``StorageFull`` if its
    vectors would not fit the disk, and any other ``StorageError``.
    """
    strategy, deadline = _pace(context, how)
    sweep(context)
    input_type = resolve_input_type(context.engine, how.input_type)
    batch = context.batches.begin(
        context.pool,
        input_type=input_type,
        asked_as=context.asked_as,
        resubmits_lost=how.resubmit_lost,
        deadline=deadline if strategy == "auto" else None,
        waiting=how.waiting,
    )
    manifest = context.manifest(batch)
    try:
        writer = _Writer(context, batch, manifest, input_type, keep=how.on_error == "keep")
        reader = RowReader(text=how.text, key=how.key)
        for block in _blocks(reader.elements(rows), reader):
            writer.write(block)
        writer.missing -= _found_again(context, batch)
        if writer.missing:
            require_price(context.engine.account, context.engine.info)
        _require_room(context, writer.missing)
        digest = manifest.digest()
        twin = context.batches.take_over(batch, digest)
        if twin is not None:
            manifest.delete()
            return twin
        why = choose_now(
            context,
            texts=writer.missing,
            tokens=context.batches.open_tokens(batch) if strategy == "auto" else 0,
            strategy=strategy,
            deadline=deadline,
        )
        now = why is not None
        if strategy == "auto" and writer.missing:
            now = what_fits(context, batch, now=now)
        if now:
            context.batches.drain(batch)
        elif how.on_budget == "raise":
            _hold(context, batch)
        context.batches.complete(batch, digest)
    except BaseException:
        manifest.close()
        forget(context, batch)
        raise
    finally:
        manifest.close()
    return context.batches.again(batch)


def _found_again(context: BatchContext, batch: BatchRecord) -> int:
    """What an earlier batch paid for and has no vector of may be there, or be believed, by now: its
    results are read before it is paid for once more. Returns how many texts need not be sent."""
    if not context.jobs.unread(batch):
        return 0
    texts, problems = read_again(context, batch)
    for problem in problems:
        logger.info("results of an earlier batch cannot be read again: %s", problem)
    if not texts:
        return 0
    logger.info("%d texts were found in the results of an earlier batch, read again", texts)
    before = context.batches.counts(batch).to_submit
    take_what_is_there(context, batch)
    return before - context.batches.counts(batch).to_submit


class _Writer:
    """Writes block after block of rows, and what of them must be paid for."""

    def __init__(
        self,
        context: BatchContext,
        batch: BatchRecord,
        manifest: Manifest,
        input_type: str | None,
        *,
        keep: bool,
    ) -> None:
        self._context = context
        self._batch = batch
        self._manifest = manifest
        self._input_type = input_type
        self._keep = keep
        self._first = 0
        self.missing = 0
        # The id of an item is not known before its part is: the longest one is counted.
        self._longest_id = longest_id(context.most_items)
        self._keep_until = context.keep_until(batch.created)

    def write(self, rows: Sequence[Row]) -> None:
        context = self._context
        bad = {place: row.problem for place, row in enumerate(rows) if row.problem is not None}
        if bad and not self._keep:
            raise next(iter(bad.values()))
        names = [_name_of(row, self._first + place) for place, row in enumerate(rows)]
        try:
            prepared = Prepared(
                context.engine,
                [row.text for row in rows],
                keep=self._keep,
                first_row=self._first,
            )
        except EmbeddingError as error:
            name_rows(error, rows, self._first)
            raise
        for problem in prepared.taken.rejected.values():
            name_rows(problem, rows, self._first)
        keys = context.keys(self._input_type).of(prepared.texts)
        written = self._rows(names, bad, prepared)
        fresh = self._manifest.add(written, keys, prepared.texts)
        self._want(prepared, keys, fresh, rows=len(rows))
        self._first += len(rows)

    def _rows(
        self,
        names: Sequence[str | None],
        bad: dict[int, InputRejected],
        prepared: Prepared,
    ) -> list[ManifestRow]:
        problems: dict[int, EmbeddingError] = {**prepared.taken.rejected, **bad}
        cuts = prepared.cuts()
        return [
            ManifestRow(
                self._first + place,
                None if place in problems else index,
                names[place],
                (cuts[place].tokens or 0) if place in cuts else 0,
                str(problems[place]) if place in problems else None,
            )
            for place, index in enumerate(prepared.taken.rows)
        ]

    def _want(
        self, prepared: Prepared, keys: Sequence[bytes], fresh: Sequence[int], *, rows: int
    ) -> None:
        context = self._context
        chosen = [keys[place] for place in fresh]
        context.take_former([prepared.texts[place] for place in fresh], chosen, self._input_type)
        # Pinned before it is counted on: it must not be pruned meanwhile.
        context.store.keep(chosen, self._keep_until)
        there = context.stored(chosen)
        missing = [place for place in fresh if keys[place] not in there]
        if there:
            self._manifest.mark_reused(there)
        if long := prepared.perhaps_long:
            self._manifest.mark_long([keys[place] for place in long])
        tokens = prepared.measured(exact=context.engine.tokenizer.exact, indices=missing).tokens
        sizes = context.strategy.sizes(
            [
                BatchItem(
                    id=self._longest_id, text=prepared.texts[place], input_type=self._input_type
                )
                for place in missing
            ]
        )
        context.batches.want(
            self._batch,
            [
                Wanted(key=keys[place], tokens=tokens[place], in_bytes=size)
                for place, size in zip(missing, sizes, strict=True)
            ],
            rows=rows,
            texts=len(fresh),
            reused=len(fresh) - len(missing),
        )
        self.missing += len(missing)


def _blocks(rows: Iterable[Any], reader: RowReader) -> Iterator[list[Row]]:
    source = iter(rows)
    while block := [reader.row(item) for item in islice(source, _BLOCK_ROWS)]:
        yield block


def _name_of(row: Row, number: int) -> str | None:
    """The caller's key for a row as JSON; None where it has none but its number."""
    key = plain(row.key)
    if row.key is row.item or (type(key) is int and key == number):
        return None
    try:
        name = json.dumps(key, ensure_ascii=False, allow_nan=False)
        name.encode()
        # What JSON would change is another key afterwards: a tuple, or a number as a name.
        if json.loads(name) == key:
            return name
    except (TypeError, ValueError):
        pass
    raise InputRejected(
        f"row {number} has a key of type {type(row.key).__name__} that a batch cannot keep for "
        "another process: use a string or an integer",
        position=number,
        reason="a key that is no JSON",
    )


def _require_room(context: BatchContext, missing: int) -> None:
    """Better now than when they are paid for: the cache is where vectors arrive.

    ``cache_cap`` is no reason: what a batch brings is kept beyond it until it was fetched.
    """
    width = context.engine.info.dimensions or context.engine.learned.width
    if not missing or width is None:
        return
    needed = room_for(missing, width)
    free = shutil.disk_usage(context.store.path.parent).free
    if needed > free:
        raise StorageFull(
            f"{missing} vectors take about {shown_size(needed)}, and the disk has "
            f"{shown_size(free)} left for {context.store.path}: nothing was submitted. Make room, "
            "or submit fewer texts"
        )


def _hold(context: BatchContext, batch: BatchRecord) -> None:
    """Reserve the money of the whole batch; wait while only loose bounds of others forbid it."""
    engine, cut = context.engine, context.cut(batch.created)
    amount = hold_when_free(
        lambda: context.cutter.hold(batch, cut),
        engine.account,
        engine.observe,
        pause=Pause(wait_for=engine.wait_for),
        monotonic=engine.monotonic,
    )
    engine.observe(engine.account.held(amount))
