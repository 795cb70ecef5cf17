"""A run over files: plan, embedding, journal and output.

read and check everything → what is there already → the plan, and leave to go on
→ embed what is missing, block by block, each into the journal before the next
→ write the output in the order of the input → put it in place → drop what the journal has of it
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from embedcore import Arrival, Spending
from embedcore.errors import (
    BudgetExceeded,
    ConfigurationError,
    EmbeddingError,
    InputRejected,
    InvalidResponse,
    StorageError,
)
from embedcore.events import Progress
from embedcore.files.cuts import codes_of
from embedcore.files.disk import display
from embedcore.files.inputs import Inputs
from embedcore.files.journal import Journal
from embedcore.files.output import Written, stays, write_list, write_output
from embedcore.files.resume import Existing, Target, require_free_names
from embedcore.files.scan import Scan, blocks, rows_at, scan
from embedcore.files.types import (
    Columns,
    DigestIndex,
    FilePlan,
    FileProgress,
    InputFormat,
    OnBudget,
    OnError,
    Row,
    RunReport,
    Source,
    Stage,
    StoppedRow,
    as_digests,
    content_digest,
)

if TYPE_CHECKING:
    from embedcore import EmbeddingClient, EmbeddingResult, TextCut
    from embedcore.files.types import Vectors


DEFAULT_BLOCK = 8192


def plan_files(
    client: EmbeddingClient,
    inputs: Sequence[Source],
    output: str | PathLike[str] | None = None,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    keep: Sequence[str] = (),
    input_type: str | None = None,
    input_format: InputFormat | None = None,
    on_empty: OnError = "raise",
    overwrite: bool = False,
    block: int = DEFAULT_BLOCK,
    stdin: BinaryIO | None = None,
) -> FilePlan:
    """What ``embed_files`` with the same arguments would do now. ``output`` None: all is missing.

    Raises what ``embed_files`` would raise before it sends anything. Standard input is used up: to
    plan and run in one go, give ``on_plan`` to ``embed_files``.
    """
    columns = Columns(text=text_column, id=id_column, keep=tuple(keep))
    require_free_names(columns.keep)
    target = None if output is None else Target.at(Path(output))
    with Inputs(inputs, columns=columns, input_format=input_format, stdin=stdin) as rows:
        if target is None:
            found = scan(rows, on_empty=on_empty)
            return planned(client, rows, found, found.firsts, input_type=input_type, block=block)
        target.require_free()
        target.require_apart_from(rows)
        if rows.are_empty():
            return FilePlan()
        existing = Existing(target, client, input_type=input_type, overwrite=overwrite)
        found = scan(rows, on_empty=on_empty)
        missing = existing.missing(found)
        plan = planned(client, rows, found, missing, input_type=input_type, block=block)
        return replace(plan, damaged=existing.damaged)


def planned(
    client: EmbeddingClient,
    inputs: Inputs,
    found: Scan,
    missing: NDArray[np.intp],
    *,
    input_type: str | None,
    block: int,
    batch: bool = False,
) -> FilePlan:
    """The plan for the rows at the positions ``missing``, summed block by block.

    ``missing``: those whose vectors are not at hand; what the cache has of them costs nothing.
    ``batch``: what a batch would submit, and its price.
    """
    plans = [
        client.plan([row.text for row in rows], input_type=input_type, batch=batch)
        for rows in blocks(rows_at(inputs, found, missing), max_rows=block)
    ]
    reused = len(found.firsts) - len(missing)
    plan = FilePlan(
        rows=found.rows,
        empty=int(found.empty.sum()),
        reused=reused,
        rejected=sum(one.rejected for one in plans),
        cached=sum(one.cached for one in plans),
        in_flight=sum(one.in_flight for one in plans),
        to_embed=sum(one.to_embed for one in plans),
        tokens=sum(one.tokens for one in plans),
        exact=all(one.exact for one in plans),
        cost=_total([one.cost for one in plans]),
        requests=sum(one.requests for one in plans),
        truncated=sum(one.truncated for one in plans),
        perhaps_long=sum(one.perhaps_long for one in plans),
    )
    # Two texts that are equal only once they are cut are sent once as well.
    return replace(plan, duplicates=plan.rows - plan.empty - plan.rejected - plan.texts)


def _total(costs: Sequence[Decimal | None]) -> Decimal | None:
    known = [cost for cost in costs if cost is not None]
    return sum(known, Decimal(0)) if len(known) == len(costs) else None


_ROWS_OF_CALL: Final = re.compile(r"rows? \d+(?: to \d+)?: ")


class Work:
    """Embeds blocks of rows with distinct texts into the journal, and counts.

    ``embedded``: texts embedded now; ``arrived``: those and what the cache had; ``usage``: what
    they cost; ``reasons``: digest → why it failed; ``retryable``: those of them that may have a
    vector later; ``stopped_at``: where the budget ended it.
    """

    def __init__(
        self,
        client: EmbeddingClient,
        journal: Journal,
        *,
        input_type: str | None,
        on_error: OnError,
        on_budget: OnBudget = "raise",
    ) -> None:
        self._client = client
        self._journal = journal
        self._input_type = input_type
        self._on_error = on_error
        self._on_budget: OnBudget = on_budget
        self.embedded = self.arrived = 0
        self.stopped_at: StoppedRow | None = None
        self.usage = Spending()
        self.reasons: dict[bytes, str] = {}
        self.retryable: dict[bytes, str] = {}

    def embed(self, rows: Sequence[Row], *, progress: Callable[[Progress], None]) -> None:
        """Embed one block; its vectors are on the disk, from each request on as it finishes.

        Raises what the client raises, with a note naming the row; the error of the first row that
        failed, unless failed rows are kept; ``StorageError`` with the vectors as its ``partial``.
        """
        block = _Block(rows, self._journal)
        try:
            result = self._client.embed(
                [row.text for row in rows],
                input_type=self._input_type,
                on_error="keep",
                on_budget=self._on_budget,
                progress=progress,
                on_arrival=block.arrived,
            )
        except BaseException as error:
            partial: EmbeddingResult | None = getattr(error, "partial", None)
            if partial is not None:
                self._keep(block, partial)
            if isinstance(error, InputRejected) and error.position is not None:
                _locate(error, rows[error.position])
            raise
        self._keep(block, result)
        stopped = result.stopped_at
        if stopped is not None:
            self.stopped_at = _stopped_row(rows[stopped.position], stopped.error)
        for number in np.flatnonzero(~result.ok).tolist():
            reason = result.errors.get(number)
            if stopped is None or not isinstance(reason, BudgetExceeded):
                self._failed(rows[number], reason)

    def _keep(self, block: _Block, result: EmbeddingResult) -> None:
        self.usage += result.usage
        block.complete(result)
        self.embedded += int(np.count_nonzero(result.ok & ~result.reused))
        self.arrived += int(np.count_nonzero(result.ok))

    def _failed(self, row: Row, error: EmbeddingError | None) -> None:
        error = error or EmbeddingError("the client gave no reason")
        if self._on_error == "raise":
            # What names no row, say that no server can be reached, is no fault of this one.
            named = error.position is not None or error.message.startswith(("row ", "rows "))
            if named or isinstance(error, InputRejected):
                _locate(error, row)
            raise error
        # Rows of the call, which are not those of the file.
        said = _ROWS_OF_CALL.sub("", str(error))
        reason = error.reason if isinstance(error, InputRejected) else said
        digest = content_digest(row.text)
        self.reasons[digest] = reason
        if error.retryable:
            self.retryable[digest] = reason


class _Block:
    """The rows of one call, and which of them are in the journal."""

    def __init__(self, rows: Sequence[Row], journal: Journal) -> None:
        self._rows = rows
        self._journal = journal
        self._written: NDArray[np.bool_] = np.zeros(len(rows), dtype=np.bool_)
        self._complete = False
        self._lock = threading.Lock()

    def arrived(self, arrival: Arrival) -> None:
        """Write down what one request brought. Called in a thread of the client's."""
        with self._lock:
            # A reply that comes after the end of the call is in its result, or was given up.
            if not self._complete:
                _require_sound(len(arrival.rows), arrival.vectors)
                self._append(arrival.rows, arrival.vectors, arrival.cuts)

    def complete(self, result: EmbeddingResult) -> None:
        """Write down what is not there yet. ``StorageError`` has the vectors as its ``partial``."""
        with self._lock:
            self._complete = True
            if not len(self._rows) == len(result.ok) == len(result.reused):
                raise _unsound(len(self._rows), result.vectors)
            missing = np.flatnonzero(result.ok & ~self._written)
            _require_sound(len(self._rows), result.vectors, missing)
            try:
                self._append(missing, result.vectors[missing], result.cuts)
            except KeyboardInterrupt:
                # The block is paid for: it is written once more, then the interrupt goes on.
                self._append(missing, result.vectors[missing], result.cuts)
                raise
            except StorageError as error:
                error.partial = result
                raise

    def _append(
        self, numbers: NDArray[np.intp], vectors: Vectors, cuts: Mapping[int, TextCut]
    ) -> None:
        texts = (self._rows[number].text for number in numbers.tolist())
        digests = as_digests(b"".join(map(content_digest, texts)))
        self._journal.append(digests, codes_of(cuts, numbers.tolist()), vectors)
        self._written[numbers] = True


def _stopped_row(row: Row, error: BudgetExceeded) -> StoppedRow:
    return StoppedRow(
        id=row.id,
        position=row.position,
        where=row.where,
        reason=error.message.removeprefix("not sent: "),
        resets_at=error.resets_at,
    )


def _require_sound(
    rows: int, vectors: Vectors, used: NDArray[np.intp] | slice = slice(None)
) -> None:
    if vectors.ndim != 2 or len(vectors) != rows:
        raise _unsound(rows, vectors)
    if not np.isfinite(vectors[used]).all():
        raise InvalidResponse("a vector came back with numbers that are not finite; none is used")


def _unsound(rows: int, vectors: Vectors) -> InvalidResponse:
    return InvalidResponse(
        f"{rows} texts came back as vectors of shape {vectors.shape}; none is used"
    )


def _locate(error: EmbeddingError, row: Row) -> None:
    """Say which row of the input it is: the client only knows the place within its block."""
    if isinstance(error, InputRejected):
        error.position = row.position
    error.add_note(f"this is row {row.position} of the input, {row.where}")


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
    the vectors embedded so far stay in ``<output>.journal``, and a note on the error says so; there
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
        reporting = _Reporting(on_progress)
        existing = Existing(target, client, input_type=input_type, overwrite=overwrite)
        found = scan(rows, on_empty=on_empty, on_rows=reporting.reading)
        if on_plan is not None:
            missing = existing.missing(found)
            plan = planned(client, rows, found, missing, input_type=input_type, block=block)
            plan = replace(plan, damaged=existing.damaged)
            if not on_plan(plan):
                return _declined(target, plan)
        with _kept(existing.collect(found), target) as journal:
            work = Work(
                client, journal, input_type=input_type, on_error=on_error, on_budget=on_budget
            )
            _embed_missing(work, rows, found, journal, block, reporting)
            stopped, embedded = work.stopped_at, _embedded(found, journal)
            if stopped is not None and not work.arrived:
                reasons, why = work.reasons, stopped.reason
                left_out = write_list(target, rows, found, journal, reasons, stopped=why)
                return replace(
                    _report(target, found, work, left_out, embedded),
                    damaged=existing.damaged,
                    seconds=time.monotonic() - started,
                    unchanged=True,
                )
            unchanged = stays(target, _rows_with(found, journal))
            written = write_output(
                target,
                rows,
                found,
                journal,
                work.reasons,
                stopped=None if stopped is None else stopped.reason,
                keep_text=keep_text,
                on_rows=lambda done: reporting.at("writing", done, found.rows, work.usage),
            )
            left = journal.settle(found.digests)
    return replace(
        _report(target, found, work, written, embedded),
        damaged=existing.damaged,
        journaled=left,
        unchanged=unchanged,
        seconds=time.monotonic() - started,
    )


def _check_arguments(columns: Columns, block: int) -> None:
    require_free_names(columns.keep)
    if block < 1:
        raise ConfigurationError(f"block = {block}: it must be at least 1")


def _embed_missing(
    work: Work,
    inputs: Inputs,
    found: Scan,
    journal: Journal,
    block: int,
    reporting: _Reporting,
) -> None:
    positions = found.firsts
    positions = positions[journal.index().find(found.digests[positions]) < 0]
    done = 0
    for rows in blocks(rows_at(inputs, found, positions), max_rows=block):
        within = reporting.within(done, len(positions), work.usage)
        within(Progress(done=0, total=len(rows), tokens=0, cost=Decimal(0)))
        work.embed(rows, progress=within)
        done += len(rows)
        if work.stopped_at is not None:
            return
    reporting.at("embedding", done, len(positions), work.usage)


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


class _Reporting:
    """Passes on how far the run is."""

    def __init__(self, on_progress: Callable[[FileProgress], None] | None) -> None:
        self._on_progress = on_progress

    def reading(self, done: int) -> None:
        self.at("reading", done, 0, Spending())

    def within(self, done: int, total: int, usage: Spending) -> Callable[[Progress], None]:
        """Passes on the progress of one call of the client, which begins where ``done`` is."""

        def tell(progress: Progress) -> None:
            now = Spending(tokens=progress.tokens, cost=progress.cost, exact=progress.exact)
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
                    cost=usage.cost,
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


def _rows_of(found: Scan, digests: Collection[bytes]) -> int:
    """How many rows have one of these texts."""
    index = DigestIndex(as_digests(b"".join(digests)))
    return int((index.find(found.digests[~found.empty]) >= 0).sum())


def _report(target: Target, found: Scan, work: Work, written: Written, embedded: int) -> RunReport:
    empty = int(found.empty.sum())
    texts = len(found.firsts)
    reasons = set(work.reasons.values())
    only = reasons.pop() if len(reasons) == 1 and not empty else None
    return RunReport(
        output=target.path,
        rows=found.rows,
        empty=empty,
        duplicates=found.rows - empty - texts,
        reused=embedded - work.embedded,
        embedded=work.embedded,
        truncated=written.truncated,
        tokens_cut=written.tokens_cut,
        characters_cut=written.characters_cut,
        perhaps_cut=written.perhaps_cut,
        failed=written.failed,
        retryable=_rows_of(found, work.retryable),
        not_done=written.not_done,
        failed_path=target.failed if written.failed or written.not_done else None,
        reason=only or next(iter(work.retryable.values()), None),
        stopped_at=work.stopped_at,
        usage=work.usage,
    )
