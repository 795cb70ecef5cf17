"""``embedcore batch fetch``: the vectors of a batch beside the columns of what was submitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embedcore.cli.batchbooks import Clients, books_of
from embedcore.cli.batchnotes import Note, read_digests, same_files
from embedcore.cli.batchoutput import BatchOutput, Fetched
from embedcore.cli.batchtext import change_text, commonest, report_fields
from embedcore.cli.batchwatch import watch_command
from embedcore.cli.exits import FAILED, OK, TRY_AGAIN
from embedcore.cli.progress import Shown
from embedcore.cli.summary import next_command
from embedcore.cli.text import (
    dollars,
    facts,
    one_line,
    perhaps_cut_text,
    plural,
    shown_path,
    tokens,
)
from embedcore.errors import ConfigurationError, EmbeddingError, StorageError
from embedcore.files.disk import display
from embedcore.files.origin import origin_of, require_same_maker
from embedcore.files.resume import Target, require_free_names

if TYPE_CHECKING:
    from embedcore.cli.screen import Screen
    from embedcore.client import EmbeddingClient
    from embedcore.files.inputs import Inputs
    from embedcore.files.scan import Scan
    from embedcore.files.types import Origin
    from embedcore.policy.batchjob import BatchJob
    from embedcore.policy.batchreport import BatchReport


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
    target = Target.at(wish.output)
    with (
        books_of(wish.name) as (books, record),
        Clients(books=books, model=wish.model) as clients,
        ExitStack() as held,
    ):
        client = clients.of(record)
        job = client.batch_job(wish.name)
        note = books.note(record)
        origin = _origin(client, note, record.input_type)
        # Before the batch is looked after, which may buy what is missing.
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
            digests=read_digests(books.folder, record.name, record.rows),
            source=source,
            keep_text=not wish.no_text,
            on_progress=shown.draw,
        )
        fetched = output.write()
    _say(screen, wish, report, fetched)
    if fetched.pending:
        return TRY_AGAIN
    return FAILED if fetched.failed else OK


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


def _read_again(screen: Screen, job: BatchJob, wish: FetchWish) -> int:
    """What was not to be had before may be there by now; the rest is read again when asked for."""
    try:
        texts = job.read_again(lost=not wish.again)
    except StorageError:
        raise
    except EmbeddingError as error:
        screen.complain(f"warning: results cannot be read again: {one_line(str(error), 500)}")
        return 0
    if texts:
        screen.say(f"{plural(texts, 'text')} found in the results, which were read again")
    elif wish.again:
        screen.say("nothing more was found in the results, which were read again")
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
    """Vectors that were bought from somebody else are not overwritten unasked."""
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
        screen.complain(
            "warning: where the rows came from was not remembered: the output has their ids and "
            "vectors only"
        )
        return None
    require_free_names(note.keep)
    found = held.enter_context(same_files(note, wish.files))
    if isinstance(found, str):
        screen.complain(
            f"warning: {one_line(found, 500)}: the output has ids and vectors only. --source says "
            "where it is now"
        )
        return None
    return found


def _say(screen: Screen, wish: FetchWish, report: BatchReport, fetched: Fetched) -> None:
    screen.answer(
        {
            **report_fields(report),
            "output": str(wish.output),
            "written": fetched.written,
            "failed_rows": fetched.failed,
            "pending_rows": fetched.pending,
            "truncated_rows": fetched.truncated,
            "perhaps_cut_rows": fetched.perhaps_cut,
            "zero_rows": fetched.zeros,
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
    if fetched.written:
        lines += ["Ask it something:", f"  {next_command(wish.output)}"]
    screen.show("\n".join(lines))


def _facts(report: BatchReport, fetched: Fetched) -> Iterator[tuple[str, str]]:
    usage = report.usage
    yield "cost", f"{dollars(usage.picodollars)} for {tokens(usage.tokens, exact=usage.exact)}"
    if fetched.truncated:
        yield "truncated", f"{plural(fetched.truncated, 'row')} cut to fit the model"
    if fetched.perhaps_cut:
        yield "perhaps cut", perhaps_cut_text(fetched.perhaps_cut)
    if fetched.zeros:
        yield "zeros", f"{plural(fetched.zeros, 'row')} with a vector of zeros, which finds nothing"
    if fetched.pending:
        yield "under way", plural(fetched.pending, "row")
    if fetched.failed_path is not None:
        listed = shown_path(fetched.failed_path)
        yield "failed", f"{plural(fetched.failed, 'row')}; every missing row is listed in {listed}"
    for line in commonest(fetched.reasons):
        yield "", line
    if usage.uncertain_tokens:
        yield "uncertain", f"{dollars(usage.uncertain_picodollars)} of the cost may not be billed"
