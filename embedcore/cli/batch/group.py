"""``embedcore batch``: files into vectors within a day, for half the price."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from embedcore.cli.batch.submit import SubmitArguments
from embedcore.cli.options import (
    Group,
    age,
    id_option,
    input_format_option,
    input_type_option,
    keep_option,
    model_option,
    quiet_option,
    scope_option,
    talking,
    text_option,
    yes_option,
)
from embedcore.cli.screen import Screen
from embedcore.cli.text import one_line

if TYPE_CHECKING:
    pass


_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LOOK_SECONDS: Final = 30.0
_TIME: Final = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)\s*([smhd])", re.IGNORECASE)
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def existing(_: click.Context, __: click.Parameter, files: tuple[Path, ...]) -> tuple[Path, ...]:
    for file in files:
        if str(file) != "-" and not file.exists():
            raise click.BadParameter(f"{click.format_filename(file)!r}: there is no such file.")
    return files


def batch_id(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    """Checked before it becomes a part of any path."""
    if name is None or _ID.fullmatch(name):
        return name
    raise click.BadParameter(
        f"{one_line(name, 40)!r} is not the id of a batch: embedcore batch list shows them"
    )


def seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """``90m``, ``6h``, ``2d``, as seconds."""
    if value is None:
        return None
    found = _TIME.fullmatch(value.strip())
    if found is None or not float(found[1]):
        raise click.BadParameter(f"{one_line(value, 40)!r}: write it like 90m, 6h or 2d")
    return float(found[1]) * _UNITS[found[2].lower()]


id_argument = click.argument("name", metavar="ID", callback=batch_id)
client_option = click.option(
    "-m", "--model", metavar="MODEL", help="The profile to look with; default: found by itself."
)
interval_option = click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=_LOOK_SECONDS,
    show_default=True,
    help="Between two looks.",
)


_CODES: Final = (
    "\b\nExit codes: 0 it ended and every row has its vector, 1 it ended otherwise or cannot go on,"
    "\n3 it waits for the budget, 4 it has not ended yet. The others are in embedcore --help."
)


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
@text_option
@id_option
@keep_option
@input_format_option
@model_option
@input_type_option
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
@click.option("--resubmit-lost", is_flag=True, help="Pay again for results that the provider lost.")
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
    """Submit FILEs as one batch.

    A FILE is .txt (a text on each line), .jsonl or .csv; - is standard input. The price is shown
    first. Texts that are cached, or are under way in another batch, are not paid again. FILE is
    read again by fetch: leave it as it is until then.
    """
    from embedcore.cli.batch.submit import submit_files

    return submit_files(screen, SubmitArguments(**given))


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
    from embedcore.cli.batch.status import look

    return look(screen, name, model=model, interval=interval if watch else None)


@command.command(name="list")
@click.option("--all", "everything", is_flag=True, help="Also those that ended over a week ago.")
@talking
@click.pass_obj
def listing(screen: Screen, everything: bool) -> None:
    """The batches of every model and scope, as they are written down. Asks nothing."""
    from embedcore.cli.batch.status import show_list

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
    """Write the vectors of a batch.

    They are written with the columns of the files that were submitted. Rows without a vector are
    left out and listed in <output>.failed.jsonl, with the reason of each.
    """
    from embedcore.cli.batch.fetch import FetchWish, fetch_vectors

    return fetch_vectors(screen, FetchWish(**given))


@command.command(name="cancel")
@id_argument
@client_option
@talking
@click.pass_obj
def cancel(screen: Screen, name: str, model: str | None) -> int:
    """Cancel a batch.

    Nothing more is sent, and jobs that no other batch waits for are stopped. What was done by then
    is paid, and is still collected: look with status, then fetch.
    """
    from embedcore.cli.batch.cleanup import cancel_batch

    return cancel_batch(screen, name, model)


@command.command(name="forget")
@id_argument
@client_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@talking
@click.pass_obj
def forget(screen: Screen, name: str, model: str | None, yes: bool) -> int:
    """End a batch here without asking the provider.

    For a batch that cannot end otherwise. Whatever may have been billed counts as spent.
    """
    from embedcore.cli.batch.cleanup import forget_batch

    return forget_batch(screen, name, model, yes=yes)


@command.command(name="resume")
@click.option(
    "--resubmit-lost",
    metavar="ID",
    callback=batch_id,
    help="Pay again for results of that batch that the provider lost.",
)
@click.option(
    "--resubmit-cancelled",
    metavar="ID",
    callback=batch_id,
    help="Send again what was cancelled at the provider.",
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
    from embedcore.cli.batch.cleanup import resume_all

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
    """Delete what batches have left behind.

    That is input files at the provider that no job uses, and what is kept here of old batches. Old
    are those that ended keep_days ago ([batch] in the settings), or --older-than: their rows cannot
    be fetched any more. Vectors stay: see embedcore cache prune.
    """
    from embedcore.cli.batch.cleanup import collect_garbage

    return collect_garbage(screen, older_than=older_than, dry_run=dry_run, model=model)
