"""Options that several commands share, each in one place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from embedcore.cli.screen import Screen

Command = TypeVar("Command", bound=Callable[..., Any])


def _flag(attribute: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_it(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted:
            setattr(ctx.ensure_object(Screen), attribute, True)

    return set_it


def _set_verbose(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from embedcore.cli.logs import attach

        screen = ctx.ensure_object(Screen)
        screen.verbose = True
        attach(screen)


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Log every request to standard error, and show where an error came from.",
)
json_option = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_flag("json"),
    help="One JSON object on standard output; messages stay on standard error.",
)
quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_flag("quiet"),
    help="Say nothing but the result and what is wrong.",
)
model_option = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="A profile, provider:model, or a model of the default provider.",
)
scope_option = click.option("--scope", metavar="NAME", help="The project whose budget is used.")
yes_option = click.option(
    "-y", "--yes", is_flag=True, help="Do not ask, whatever it costs; limits still hold."
)


_AGE: Final = re.compile(r"(\d+)\s*(d|w|)", re.IGNORECASE)
_DAYS: Final = {"": 1, "d": 1, "w": 7}
_DAY_SECONDS: Final = 86_400.0


def age(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """``90d`` or ``12w``, as seconds."""
    if value is None:
        return None
    found = _AGE.fullmatch(value.strip())
    if found is None:
        raise click.BadParameter(f"{value!r}: write it in days or weeks, like 90d or 12w")
    return int(found[1]) * _DAYS[found[2].lower()] * _DAY_SECONDS


def talking(command: Command) -> Command:
    """The options of every command that reports something."""
    wrapped: Command = json_option(verbose_option(command))
    return wrapped
