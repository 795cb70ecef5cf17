"""Arguments and options that the commands of batches share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import click

from embedcore.cli.text import one_line

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
