"""``embedcore embed``: files, standard input or literal texts into vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from embedcore.cli.options import (
    json_option,
    model_option,
    quiet_option,
    scope_option,
    verbose_option,
    yes_option,
)
from embedcore.cli.screen import Screen

if TYPE_CHECKING:
    from embedcore.files.types import InputFormat, OnBudget


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What was asked for on the command line."""

    files: tuple[Path, ...]
    texts: tuple[str, ...]
    text: str
    id: str | None
    keep: tuple[str, ...]
    input_format: InputFormat | None
    model: str | None
    output: Path | None
    keep_text: bool
    input_type: str | None
    on_error: Literal["raise", "keep"]
    on_budget: OnBudget
    scope: str | None
    overwrite: bool
    dry_run: bool
    yes: bool


def _existing(_: click.Context, __: click.Parameter, files: tuple[Path, ...]) -> tuple[Path, ...]:
    for file in files:
        if str(file) != "-" and not file.exists():
            name = click.format_filename(file)
            raise click.BadParameter(f"{name!r}: there is no such file. A text goes after -c.")
    return files


@click.command(name="embed")
@click.argument(
    "files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path), callback=_existing
)
@click.option("-c", "texts", multiple=True, metavar="TEXT", help="A text itself. Repeatable.")
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
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A .parquet, .jsonl or .npy file."
)
@click.option(
    "--no-text",
    "keep_text",
    flag_value=False,
    default=True,
    type=bool,
    help="Leave the texts out of the output.",
)
@click.option("--input-type", metavar="TYPE", help="For instance document or query.")
@click.option(
    "--on-error",
    type=click.Choice(["raise", "keep"]),
    default="raise",
    show_default=True,
    help="End at the first row that fails, or list them and go on.",
)
@click.option(
    "--on-budget",
    type=click.Choice(["raise", "stop", "wait"]),
    default="raise",
    show_default=True,
    help="What a limit does not allow: refuse it; embed as many rows as it does allow, in their "
    "order; or wait for the rest until the limit resets.",
)
@scope_option
@click.option(
    "--overwrite", "--force", is_flag=True, help="Replace an output that another model made."
)
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop there.")
@yes_option
@quiet_option
@json_option
@verbose_option
@click.pass_obj
def command(screen: Screen, /, **given: Any) -> int:
    """Embed FILES into one output: .txt (a text on each line), .jsonl or .csv; - is standard input.

    The price is shown first. Stop it at any time and run it again: what was bought is not bought
    again, and only texts that are missing or changed are sent.
    """
    wish = Wish(**given)
    if bool(wish.files) == bool(wish.texts):
        raise click.UsageError(
            "Name files, or texts with -c."
            if not wish.files
            else "Files and texts (-c) do not go together."
        )
    if wish.output is None and wish.files and not wish.dry_run:
        raise click.UsageError("Name the file for the vectors: -o vectors.npy (.jsonl, .parquet).")
    if wish.texts and wish.output is None:
        from embedcore.cli.literal import embed_literally

        return embed_literally(screen, wish)
    from embedcore.cli.filerun import run_files

    return run_files(screen, wish)
