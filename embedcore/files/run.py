"""How do files become vectors, so that a run can be killed at any moment and nothing is paid twice?

read and check everything → what was bought before → the plan, and leave to go on
→ embed what is missing, block by block, each into the journal before the next
→ write the output in the order of the input → put it in place → drop what the journal has of it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from embedcore import Spending
from embedcore.errors import ConfigurationError
from embedcore.events import Progress
from embedcore.files.disk import display
from embedcore.files.inputs import Inputs
from embedcore.files.journal import Journal
from embedcore.files.output import Written, stays, write_output
from embedcore.files.plan import DEFAULT_BLOCK, planned
from embedcore.files.purchase import Purchase
from embedcore.files.resume import Bought, Target, require_free_names
from embedcore.files.scan import Scan, blocks, rows_at, scan
from embedcore.files.types import (
    Columns,
    FilePlan,
    FileProgress,
    InputFormat,
    OnBudget,
    OnError,
    RunReport,
    Source,
    Stage,
)

if TYPE_CHECKING:
    from embedcore import EmbeddingClient


def embed_files(
    client: EmbeddingClient,
    inputs: Sequence[Source],
    output: str | PathLike[str],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    keep: Sequence[str] = (),
    keep_text: bool = True,
    input_type: str | None = None,
    input_format: InputFormat | None = None,
    on_error: OnError = "raise",
    on_budget: OnBudget = "raise",
    on_empty: OnError = "raise",
    overwrite: bool = False,
    block: int = DEFAULT_BLOCK,
    on_plan: Callable[[FilePlan], bool] | None = None,
    on_progress: Callable[[FileProgress], None] | None = None,
    stdin: BinaryIO | None = None,
) -> RunReport:
    """Embed every row of ``inputs`` into ``output`` (.parquet, .jsonl or .npy), paying once.

    Texts whose vectors are in ``output`` or in its journal already are not embedded again. Rows
    that fail are left out and listed in ``<output>.failed.jsonl``; with ``on_error="raise"`` the
    first of them ends the run instead. Empty texts are refused, or fail with ``on_empty="keep"``.
    ``on_budget`` is as for ``embed``: with "stop" what the limits allow is written, and the other
    rows are listed as not done. An output is never replaced by one without rows: where that would
    be so, for instance where ``inputs`` have none, it stays as it is. ``overwrite`` allows
    replacing an output of another model. ``block`` texts at most go to the client in one call: what
    a kill can lose. ``on_plan`` is asked before anything is sent.

    Raises ``ConfigurationError`` and ``InputRejected`` before anything is sent, ``StorageBusy``
    while another run writes the same output, and what the client raises. Whatever ends a run early,
    the vectors bought so far stay in ``<output>.journal``, and a note on the error says so; there
    they stay until an output has them.
    """
    started = time.monotonic()
    columns = Columns(text=text_column, id=id_column, keep=tuple(keep))
    _check_arguments(columns, block)
    target = Target.at(Path(output))
    with (
        Inputs(inputs, columns=columns, input_format=input_format, stdin=stdin) as rows,
        target.claimed(),
    ):
        target.require_apart_from(rows)
        if rows.are_empty():
            return RunReport(output=target.path, unchanged=True)
        told = _Told(on_progress)
        bought = Bought(target, client, input_type=input_type, overwrite=overwrite)
        found = scan(rows, on_empty=on_empty, on_rows=told.reading)
        if on_plan is not None:
            missing = bought.missing(found)
            plan = planned(client, rows, found, missing, input_type=input_type, block=block)
            plan = replace(plan, damaged=bought.damaged)
            if not on_plan(plan):
                return _declined(target, plan)
        with _kept(bought.collect(found), target) as journal:
            purchase = Purchase(
                client, journal, input_type=input_type, on_error=on_error, on_budget=on_budget
            )
            _embed_missing(purchase, rows, found, journal, block, told)
            stopped, embedded = purchase.stopped_at, _embedded(found, journal)
            if stopped is not None and not purchase.arrived:
                return replace(
                    _report(target, found, purchase, Written(), embedded),
                    damaged=bought.damaged,
                    not_done=found.rows - int(found.empty.sum()) - _rows_with(found, journal),
                    seconds=time.monotonic() - started,
                    unchanged=True,
                )
            unchanged = stays(target, _rows_with(found, journal))
            written = write_output(
                target,
                rows,
                found,
                journal,
                purchase.reasons,
                stopped=None if stopped is None else stopped.reason,
                keep_text=keep_text,
                on_rows=lambda done: told.at("writing", done, found.rows, purchase.usage),
            )
            left = journal.settle(found.digests)
    return replace(
        _report(target, found, purchase, written, embedded),
        damaged=bought.damaged,
        journaled=left,
        unchanged=unchanged,
        seconds=time.monotonic() - started,
    )


def _check_arguments(columns: Columns, block: int) -> None:
    require_free_names(columns.keep)
    if block < 1:
        raise ConfigurationError(f"block = {block}: it must be at least 1")


def _embed_missing(
    purchase: Purchase, inputs: Inputs, found: Scan, journal: Journal, block: int, told: _Told
) -> None:
    positions = found.firsts
    positions = positions[journal.index().find(found.digests[positions]) < 0]
    done = 0
    for rows in blocks(rows_at(inputs, found, positions), max_rows=block):
        within = told.within(done, len(positions), purchase.usage)
        within(Progress(done=0, total=len(rows), tokens=0, picodollars=0))
        purchase.embed(rows, progress=within)
        done += len(rows)
        if purchase.stopped_at is not None:
            return
    told.at("embedding", done, len(positions), purchase.usage)


@contextmanager
def _kept(journal: Journal, target: Target) -> Iterator[Journal]:
    """The journal for the block; an error that leaves it says what was kept."""
    try:
        yield journal
    except BaseException as error:
        if len(journal):
            error.add_note(
                f"{len(journal):,} vectors are kept in {display(target.journal)}: run the same "
                "again, and only what is missing is embedded"
            )
        raise
    finally:
        journal.close()


class _Told:
    """Passes on how far the run is."""

    def __init__(self, on_progress: Callable[[FileProgress], None] | None) -> None:
        self._on_progress = on_progress

    def reading(self, done: int) -> None:
        self.at("reading", done, 0, Spending())

    def within(self, done: int, total: int, usage: Spending) -> Callable[[Progress], None]:
        """Passes on the progress of one call of the client, which begins where ``done`` is."""

        def tell(progress: Progress) -> None:
            now = Spending(
                tokens=progress.tokens, picodollars=progress.picodollars, exact=progress.exact
            )
            self.at("embedding", done + progress.done, total, usage + now)

        return tell

    def at(self, stage: Stage, done: int, total: int, usage: Spending) -> None:
        if self._on_progress is not None:
            self._on_progress(
                FileProgress(
                    stage=stage,
                    done=done,
                    total=total,
                    tokens=usage.tokens,
                    picodollars=usage.picodollars,
                    exact=usage.exact,
                )
            )


def _declined(target: Target, plan: FilePlan) -> RunReport:
    return RunReport(
        output=target.path,
        rows=plan.rows,
        empty=plan.empty,
        duplicates=plan.duplicates,
        reused=plan.reused,
        declined=True,
    )


def _embedded(found: Scan, journal: Journal) -> int:
    """How many of the distinct texts have a vector."""
    return int((journal.index().find(found.digests[found.firsts]) >= 0).sum())


def _rows_with(found: Scan, journal: Journal) -> int:
    """How many rows have a vector."""
    return int((journal.index().find(found.digests[~found.empty]) >= 0).sum())


def _report(
    target: Target, found: Scan, purchase: Purchase, written: Written, embedded: int
) -> RunReport:
    empty = int(found.empty.sum())
    texts = len(found.firsts)
    return RunReport(
        output=target.path,
        rows=found.rows,
        empty=empty,
        duplicates=found.rows - empty - texts,
        reused=embedded - purchase.bought,
        bought=purchase.bought,
        truncated=written.truncated,
        tokens_cut=written.tokens_cut,
        characters_cut=written.characters_cut,
        perhaps_cut=written.perhaps_cut,
        failed=written.failed,
        not_done=written.not_done,
        failed_path=target.failed if written.failed or written.not_done else None,
        stopped_at=purchase.stopped_at,
        usage=purchase.usage,
    )
