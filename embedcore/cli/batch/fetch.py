"""``embedcore batch fetch``: the vectors of a batch beside the columns of what was submitted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click
import numpy as np

from embedcore import money
from embedcore.cli.batch.records import Clients, Note, local_batch, read_digests, same_files
from embedcore.cli.batch.status import change_text, commonest, report_fields, watch_command
from embedcore.cli.process import TRY_AGAIN, code_of_rows
from embedcore.cli.progress import Shown
from embedcore.cli.summary import ask_it
from embedcore.cli.text import (
    facts,
    one_line,
    perhaps_cut_text,
    plural,
    shown_path,
    tokens,
)
from embedcore.errors import (
    ConfigurationError,
    EmbeddingError,
    InputRejected,
    StorageError,
    TransientProviderError,
)
from embedcore.files.cuts import codes_of, tally
from embedcore.files.disk import display
from embedcore.files.formats.base import Layout, RowWriter
from embedcore.files.formats.jsonl import json_line
from embedcore.files.output import stays, writing
from embedcore.files.resume import Target, origin_of, require_free_names, require_same_maker
from embedcore.files.scan import Scan, all_rows
from embedcore.files.types import SIZE, FileProgress, Origin, Row, as_digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedcore.cli.screen import Screen
    from embedcore.client import EmbeddingClient
    from embedcore.files.inputs import Inputs
    from embedcore.policy.batch.job import BatchJob
    from embedcore.policy.batch.report import BatchReport
    from embedcore.policy.stream.rows import Block


_BLOCK_ROWS: Final = 2_048
_MOST_REASONS: Final = 1_000


@dataclass(kw_only=True)
class Fetched:
    """What became of the rows: written, failed, or still pending.

    ``truncated``: of those written, how many were cut; ``perhaps_cut``: how many may have been.
    ``zeros``: how many have a vector of zeros. ``only_here``: vectors that are in the output only.
    ``reasons``: why, of those that are not written. ``with_columns``: the columns of the input are
    in the output. ``unchanged``: there was no vector, and the output is as it was.
    """

    written: int = 0
    failed: int = 0
    pending: int = 0
    truncated: int = 0
    perhaps_cut: int = 0
    zeros: int = 0
    only_here: int = 0
    dimensions: int = 0
    with_columns: bool = False
    failed_path: Path | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    unchanged: bool = False


@dataclass(frozen=True, kw_only=True)
class BatchOutput:
    """Writes the rows of one batch. ``source``: what was submitted, if it is still there.

    ``digests``: 32 bytes for each row.
    """

    job: BatchJob
    target: Target
    origin: Origin
    digests: bytes
    source: tuple[Inputs, Scan] | None
    keep_text: bool
    on_progress: Callable[[FileProgress], None]

    def write(self) -> Fetched:
        """Replace the output as soon as all of it is on the disk. Raises ``StorageError``."""
        there, width = self._looked()
        layout = Layout(
            origin=replace(self.origin, dimensions=width or self.origin.dimensions or 0),
            rows=int(there.sum()),
            kinds={} if self.source is None else self.source[1].kinds,
            keep_text=self.keep_text and self.source is not None,
        )
        fetched = Fetched(
            dimensions=layout.origin.dimensions or 0, with_columns=self.source is not None
        )
        missing = not there.all()
        fetched.unchanged = stays(self.target, layout.rows)
        with writing(self.target, layout, listing=bool(missing)) as (writer, listed):
            self._write_all(writer, listed, there, fetched)
        fetched.failed_path = self.target.failed if missing else None
        return fetched

    def _looked(self) -> tuple[NDArray[np.bool_], int]:
        """Which rows have a vector, and its width: an output must know both before its first row,
        and more may arrive while it is written."""
        found: list[NDArray[np.bool_]] = []
        width = 0
        for block in self.job.blocks(_BLOCK_ROWS):
            found.append(block.ok)
            if block.ok.any():
                width = block.vectors.shape[1]
            self.on_progress(FileProgress(stage="reading", done=block.first + len(block)))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.bool_), width

    def _write_all(
        self,
        writer: RowWriter,
        listed: BinaryIO | None,
        there: NDArray[np.bool_],
        fetched: Fetched,
    ) -> None:
        rows = None if self.source is None else all_rows(*self.source)
        for block in self.job.blocks(_BLOCK_ROWS):
            end = block.first + len(block)
            these = _plain_rows(block) if rows is None else list(islice(rows, len(block)))
            digests = self.digests[block.first * SIZE : end * SIZE]
            _write_block(writer, block, these, digests, there[block.first : end], fetched)
            if listed is not None:
                self._list(listed, block, these, there[block.first : end], fetched)
            self.on_progress(FileProgress(stage="writing", done=end, total=len(there)))

    def _list(
        self,
        listed: BinaryIO,
        block: Block,
        rows: list[Row],
        there: NDArray[np.bool_],
        fetched: Fetched,
    ) -> None:
        for place in np.flatnonzero(~there).tolist():
            error = block.errors.get(place)
            pending = error is None or isinstance(error, TransientProviderError)
            fetched.pending += pending
            fetched.failed += not pending
            reason = _reason(error, block.first + place)
            if reason in fetched.reasons or len(fetched.reasons) < _MOST_REASONS:
                fetched.reasons[reason] += 1
            number = block.first + place
            digest = self.digests[number * SIZE : (number + 1) * SIZE]
            row = rows[place]
            listed.write(
                json_line(
                    {
                        "id": row.id,
                        "position": number,
                        "where": row.where or None,
                        "text_sha256": digest.hex() if any(digest) else None,
                        "reason": reason,
                    }
                )
            )


def _write_block(
    writer: RowWriter,
    block: Block,
    rows: list[Row],
    digests: bytes,
    there: NDArray[np.bool_],
    fetched: Fetched,
) -> None:
    places = np.flatnonzero(there)
    if not len(places):
        return
    if not block.ok[places].all():
        raise StorageError(
            "a vector that was there a moment ago is gone: the cache was pruned, or it was damaged "
            "and deleted. Run the same again, and submit what is listed as failed"
        )
    cuts = codes_of(block.cuts, places.tolist())
    writer.write(
        [rows[place] for place in places.tolist()],
        as_digests(digests)[places],
        cuts,
        block.vectors[places],
    )
    fetched.written += len(places)
    cut = tally(cuts)
    fetched.truncated += cut.rows
    fetched.perhaps_cut += cut.unknown
    fetched.zeros += int(np.count_nonzero(block.zeros[places]))


def _plain_rows(block: Block) -> list[Row]:
    return [Row(id=_id(key), position=block.first + place) for place, key in enumerate(block.keys)]


def _id(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key)


def _reason(error: EmbeddingError | None, number: int) -> str:
    if error is None:
        return "it arrived while this was written: fetch again"
    said = error.reason if isinstance(error, InputRejected) and error.reason else error.message
    return said.removeprefix(f"row {number}: ").encode("utf-8", "replace").decode()


@dataclass(frozen=True, kw_only=True)
class FetchWish:
    """What was asked for on the command line."""

    name: str
    output: Path
    partial: bool
    again: bool
    files: tuple[Path, ...]
    no_text: bool
    overwrite: bool
    model: str | None


class NotEnded(click.ClickException):
    """There are not all vectors yet."""

    exit_code = TRY_AGAIN


def fetch_vectors(screen: Screen, wish: FetchWish) -> int:
    """Write what there is of a batch."""
    try:
        return _fetch(screen, wish)
    except KeyboardInterrupt as stop:
        stop.add_note("Nothing of the batch is lost, and an output is replaced only as a whole.")
        raise


def _fetch(screen: Screen, wish: FetchWish) -> int:
    target = Target.at(wish.output)
    with (
        local_batch(wish.name) as (local, record),
        Clients(local=local, model=wish.model) as clients,
        ExitStack() as held,
    ):
        client = clients.of(record)
        job = client.batch_job(wish.name)
        note = local.note(record)
        origin = _origin(client, note, record.input_type)
        # Before the batch is advanced, which may embed what is missing at a cost.
        held.enter_context(target.claimed())
        _require_no_source(target, wish, note)
        _require_replaceable(target, client, origin.input_type, overwrite=wish.overwrite)
        report = _looked_after(screen, job, wish)
        source = _source(screen, wish, note, held)
        shown = held.enter_context(Shown(screen))
        output = BatchOutput(
            job=job,
            target=target,
            origin=origin,
            digests=read_digests(local.folder, record.name, record.rows),
            source=source,
            keep_text=not wish.no_text,
            on_progress=shown.draw,
        )
        fetched = output.write()
        # What failed may be submitted again with the same rows: the others must not be billed then.
        if report.has_ended and fetched.written and not (fetched.pending or fetched.failed):
            fetched.only_here = _delivered(screen, job)
    _say(screen, wish, report, fetched)
    return code_of_rows(failed=fetched.failed, retryable=fetched.pending)


def _looked_after(screen: Screen, job: BatchJob, wish: FetchWish) -> BatchReport:
    """How far it is. Raises ``NotEnded`` unless it has ended, or what there is is enough."""
    report = job.status()
    if _read_again(screen, job, wish):
        report = job.status(poll=False)
    if not report.has_ended and not wish.partial:
        why = f"\n{report.blocked}" if report.blocked else ""
        raise NotEnded(
            f"it has not ended yet: {change_text(report)}{why}\n--partial writes what there "
            f"is; to wait for the rest:\n  {watch_command(report.id)}"
        )
    return report


def _delivered(screen: Screen, job: BatchJob) -> int:
    """Give back the room of vectors that are not to be cached. Returns how many those were."""
    try:
        return job.deliver()
    except StorageError as error:
        screen.error(f"warning: vectors beyond cache_cap were not deleted: {error}")
        return 0


def _read_again(screen: Screen, job: BatchJob, wish: FetchWish) -> int:
    """What was not to be had before may be there by now; the rest is read again when asked for."""
    try:
        texts = job.read_again(lost=not wish.again)
    except StorageError:
        raise
    except EmbeddingError as error:
        screen.error(f"warning: results cannot be read again: {one_line(str(error), 500)}")
        return 0
    if texts:
        screen.info(f"{plural(texts, 'text')} found in the results, which were read again")
    elif wish.again:
        screen.info("nothing more was found in the results, which were read again")
    return texts


def _origin(client: EmbeddingClient, note: Note | None, input_type: str) -> Origin:
    return origin_of(client, (input_type or None) if note is None else note.input_type)


def _require_no_source(target: Target, wish: FetchWish, note: Note | None) -> None:
    """What was submitted is not overwritten, though it may have changed since."""
    files = [*wish.files, *(Path(one) for one in (() if note is None else note.files))]
    written = [*target.format.paths(target.path), target.failed]
    for file in files:
        if any(one.exists() and file.exists() and one.samefile(file) for one in written):
            raise ConfigurationError(
                f"{display(file)} was submitted and would be overwritten: choose another output"
            )


def _require_replaceable(
    target: Target, client: EmbeddingClient, input_type: str | None, *, overwrite: bool
) -> None:
    """Vectors that another model or provider made are not overwritten unasked."""
    if overwrite:
        return
    found = target.origin()
    if found is not None:
        require_same_maker(display(target.path), found, client, input_type)


def _source(
    screen: Screen, wish: FetchWish, note: Note | None, held: ExitStack
) -> tuple[Inputs, Scan] | None:
    """What was submitted, if it is still as it was; else says what the output has instead."""
    if note is None:
        screen.error(
            "warning: where the rows came from was not remembered: the output has their ids and "
            "vectors only"
        )
        return None
    require_free_names(note.keep)
    found = held.enter_context(same_files(note, wish.files))
    if isinstance(found, str):
        screen.error(
            f"warning: {one_line(found, 500)}: the output has ids and vectors only. --source says "
            "where it is now"
        )
        return None
    return found


def _say(screen: Screen, wish: FetchWish, report: BatchReport, fetched: Fetched) -> None:
    screen.json(
        {
            **report_fields(report),
            "output": str(wish.output),
            "written": fetched.written,
            "failed_rows": fetched.failed,
            "pending_rows": fetched.pending,
            "truncated_rows": fetched.truncated,
            "perhaps_cut_rows": fetched.perhaps_cut,
            "zero_rows": fetched.zeros,
            "only_in_output": fetched.only_here,
            "failed_path": None if fetched.failed_path is None else str(fetched.failed_path),
            "dimensions": fetched.dimensions,
            "unchanged": fetched.unchanged,
            "with_columns": fetched.with_columns,
            "reasons": dict(fetched.reasons),
        }
    )
    width = f" of {fetched.dimensions} dimensions" if fetched.dimensions else ""
    head = f"{plural(fetched.written, 'vector')}{width} by {report.model}"
    lines = [
        f"{shown_path(wish.output)} unchanged"
        if fetched.unchanged
        else f"{shown_path(wish.output)}: {head}",
        facts(list(_facts(report, fetched)), indent="  "),
    ]
    screen.report("\n".join(lines), failed=bool(fetched.failed or fetched.pending))
    if fetched.written:
        screen.info(ask_it(wish.output))


def _facts(report: BatchReport, fetched: Fetched) -> Iterator[tuple[str, str]]:
    usage = report.usage
    yield "cost", f"{money.shown(usage.cost)} for {tokens(usage.tokens, exact=usage.exact)}"
    if fetched.truncated:
        yield "truncated", f"{plural(fetched.truncated, 'row')} cut to fit the model"
    if fetched.perhaps_cut:
        yield "perhaps cut", perhaps_cut_text(fetched.perhaps_cut)
    if fetched.zeros:
        yield "zeros", f"{plural(fetched.zeros, 'row')} with a vector of zeros, which finds nothing"
    if fetched.only_here:
        kept = plural(fetched.only_here, "vector")
        yield "not cached", f"{kept}, only in this output (cache_cap, cache off, or free)"
    if fetched.pending:
        yield "under way", plural(fetched.pending, "row")
    if fetched.failed_path is not None:
        listed = shown_path(fetched.failed_path)
        yield "failed", f"{plural(fetched.failed, 'row')}; every missing row is listed in {listed}"
    for line in commonest(fetched.reasons):
        yield "", line
    if usage.unconfirmed_tokens:
        yield (
            "unconfirmed",
            f"{money.shown(usage.unconfirmed_cost)} of the cost may not be billed",
        )
