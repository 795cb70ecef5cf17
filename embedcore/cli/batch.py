"""``embedcore batch``: files into vectors within a day, for less money, from any process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from embedcore.cli.batchoptions import (
    batch_id,
    client_option,
    existing,
    id_argument,
    interval_option,
    seconds,
)
from embedcore.cli.groups import Group
from embedcore.cli.options import (
    age,
    model_option,
    quiet_option,
    scope_option,
    talking,
    yes_option,
)
from embedcore.cli.screen import Screen

if TYPE_CHECKING:
    from embedcore.files.types import InputFormat

_CODES: Final = (
    "\b\nExit codes: 0 it ended and every row has its vector, 1 it ended otherwise or cannot go on,"
    "\n3 it waits for the budget, 4 it has not ended yet; the others as in embedcore --help."
)


@dataclass(frozen=True, kw_only=True)
class BatchWish:
    """What ``batch submit`` was asked for on the command line."""

    files: tuple[Path, ...]
    text: str
    id: str | None
    keep: tuple[str, ...]
    input_format: InputFormat | None
    model: str | None
    input_type: str | None
    on_error: Literal["raise", "keep"]
    on_budget: Literal["raise", "wait"]
    resubmit_lost: bool
    deadline: float | None
    scope: str | None
    dry_run: bool
    yes: bool
    wait: bool
    interval: float


@click.group(cls=Group, name="batch")
def command() -> None:
    """Vectors within a day, for less money: submit files, look after them, fetch the vectors.

    \b
      embedcore batch submit texts.jsonl           shows the price first
      embedcore batch status --watch               until all have ended
      embedcore batch fetch ID -o vectors.npy

    Everything is written down: each command works in any process, days later.
    """


@command.command(name="submit")
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(path_type=Path),
    callback=existing,
)
@click.option("--text", default="text", show_default=True, help="The column with the text.")
@click.option("--id", help='The column with the id; default "id" if there is one.')
@click.option("--keep", multiple=True, metavar="COLUMN", help="A column to keep. Repeatable.")
@click.option(
    "--format",
    "input_format",
    type=click.Choice(["txt", "jsonl", "csv"]),
    help="The format of standard input, or of files whose names do not say.",
)
@model_option
@click.option("--input-type", metavar="TYPE", help="For instance document or query.")
@click.option(
    "--on-error",
    type=click.Choice(["raise", "keep"]),
    default="raise",
    show_default=True,
    help="Refuse a row that cannot be sent, or list it among the failed ones.",
)
@click.option(
    "--on-budget",
    type=click.Choice(["raise", "wait"]),
    default="raise",
    show_default=True,
    help="Refuse what is over a limit, or submit the rest when there is budget again.",
)
@click.option("--resubmit-lost", is_flag=True, help="Buy again what was lost at the provider.")
@click.option(
    "--deadline",
    metavar="TIME",
    callback=seconds,
    help="90m or 6h: embed at once, at the full price, what is not worth a batch, cannot wait for "
    "one, or is missing shortly before then; --wait, or resume by cron, sees to that.",
)
@scope_option
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop there.")
@click.option("--wait", is_flag=True, help="Watch it until it has ended.")
@interval_option
@yes_option
@quiet_option
@talking
@click.pass_obj
def submit(screen: Screen, /, **given: Any) -> int:
    """Submit FILEs as one batch: .txt (a text on each line), .jsonl or .csv; - is standard input.

    The price is shown first. Texts that were bought before, or are under way in another batch, are
    not paid again. FILE is read again by fetch: leave it as it is until then.
    """
    from embedcore.cli.batchsubmit import submit_files

    return submit_files(screen, BatchWish(**given))


@command.command(name="status", epilog=_CODES)
@click.argument("name", metavar="[ID]", required=False, callback=batch_id)
@click.option("--watch", is_flag=True, help="Look again until all have ended.")
@interval_option
@client_option
@quiet_option
@talking
@click.pass_obj
def status(
    screen: Screen, name: str | None, watch: bool, interval: float, model: str | None
) -> int:
    """How a batch stands, or every open one. Asks the provider, and does whatever is due.

    With --watch a line is written for every change; Ctrl-C ends the looking, not the batch.
    """
    from embedcore.cli.batchwatch import look

    return look(screen, name, model=model, interval=interval if watch else None)


@command.command(name="list")
@click.option("--all", "everything", is_flag=True, help="Also those that ended over a week ago.")
@talking
@click.pass_obj
def listing(screen: Screen, everything: bool) -> None:
    """The batches of every model and scope, as they are written down. Asks nobody."""
    from embedcore.cli.batchlist import show_list

    show_list(screen, everything=everything)


@command.command(name="fetch", epilog=_CODES)
@id_argument
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A .parquet, .jsonl or .npy file.",
)
@click.option("--partial", is_flag=True, help="Write what there is, though it has not ended.")
@click.option(
    "--again",
    is_flag=True,
    help="Read the provider's results again for rows that were paid for and have no vector.",
)
@click.option(
    "--source",
    "files",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where a submitted file is now, if it was moved. Repeatable, in their order.",
)
@click.option("--no-text", is_flag=True, help="Leave the texts out of the output.")
@click.option("--overwrite", "--force", is_flag=True, help="Replace an output of another model.")
@client_option
@quiet_option
@talking
@click.pass_obj
def fetch(screen: Screen, /, **given: Any) -> int:
    """Write the vectors of a batch, with the columns of the files that were submitted.

    Rows without a vector are left out and listed in <output>.failed.jsonl, with the reason of each.
    """
    from embedcore.cli.batchfetch import FetchWish, fetch_vectors

    return fetch_vectors(screen, FetchWish(**given))


@command.command(name="cancel")
@id_argument
@client_option
@talking
@click.pass_obj
def cancel(screen: Screen, name: str, model: str | None) -> int:
    """Send nothing more of a batch, and stop what nobody else waits for.

    What was done by then is paid, and is still collected: look with status, then fetch.
    """
    from embedcore.cli.batchend import cancel_batch

    return cancel_batch(screen, name, model)


@command.command(name="abandon")
@id_argument
@client_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@talking
@click.pass_obj
def abandon(screen: Screen, name: str, model: str | None, yes: bool) -> int:
    """End a batch here and now without asking the provider, if it cannot end otherwise.

    Whatever may have been billed counts as spent.
    """
    from embedcore.cli.batchend import abandon_batch

    return abandon_batch(screen, name, model, yes=yes)


@command.command(name="resume")
@click.option(
    "--resubmit-lost",
    metavar="ID",
    callback=batch_id,
    help="Buy again what that batch paid for and lost at the provider.",
)
@click.option(
    "--resubmit-cancelled",
    metavar="ID",
    callback=batch_id,
    help="Send again what somebody cancelled at the provider.",
)
@client_option
@quiet_option
@talking
@click.pass_obj
def resume(
    screen: Screen, resubmit_lost: str | None, resubmit_cancelled: str | None, model: str | None
) -> int:
    """Do whatever is due for every open batch, once. Fit for cron: quiet unless something changed.

    Ends with 0 if nothing needs mending, whether or not batches are still open.
    """
    from embedcore.cli.batchresume import resume_all

    return resume_all(
        screen, model=model, resubmit_lost=resubmit_lost, resubmit_cancelled=resubmit_cancelled
    )


@command.command(name="gc")
@click.option(
    "--older-than",
    callback=age,
    metavar="AGE",
    help="Batches that ended before, 7d; 0d: all that ended. Default: keep_days.",
)
@click.option("--dry-run", is_flag=True, help="List what would go, and stop.")
@client_option
@quiet_option
@talking
@click.pass_obj
def gc(screen: Screen, older_than: float | None, dry_run: bool, model: str | None) -> int:
    """Delete input files at the provider that no job uses, and what is kept here of old batches.

    Old are those that ended keep_days ago ([batch] in the settings), or --older-than: their rows
    cannot be fetched any more. Vectors stay: see embedcore cache prune.
    """
    from embedcore.cli.batchgc import collect_garbage

    return collect_garbage(screen, older_than=older_than, dry_run=dry_run, model=model)
