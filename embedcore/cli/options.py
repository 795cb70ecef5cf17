"""Options that several commands share, and groups that show their help."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar

import click

from embedcore.cli.screen import Screen


class Group(click.Group):
    """Without the name of a command it shows its help, as ``--help`` does, and all is well.

    One with ``invoke_without_command`` is a command itself, and does what it does.
    """

    group_class = type

    def __init__(self, name: str | None = None, **given: Any) -> None:
        callback = given.get("callback")
        if not given.get("invoke_without_command"):
            given |= {
                "invoke_without_command": True,
                "no_args_is_help": False,
                "subcommand_metavar": "COMMAND [ARGS]...",
                "callback": _or_help(callback or _nothing),
            }
        super().__init__(name, **given)


def _nothing() -> None:
    """What a group does before its command."""


def _or_help(callback: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(callback)
    def call(*given: Any, **named: Any) -> Any:
        ctx = click.get_current_context()
        if ctx.invoked_subcommand is None:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return callback(*given, **named)

    return call


Command = TypeVar("Command", bound=Callable[..., Any])


def _flag(attribute: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_it(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted:
            setattr(ctx.ensure_object(Screen), attribute, True)

    return set_it


def _set_verbose(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from embedcore.cli.process import attach

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
    callback=_flag("wants_json"),
    help="One JSON object on standard output; messages stay on standard error.",
)
quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_flag("quiet"),
    help="Say nothing but what was asked for and what is wrong.",
)
model_option = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="A profile, provider:model, or a model of the default provider.",
)
text_option = click.option(
    "--text", default="text", show_default=True, help="The column with the text."
)
id_option = click.option("--id", help='The column with the id; default "id" if there is one.')
keep_option = click.option(
    "--keep", multiple=True, metavar="COLUMN", help="A column to keep. Repeatable."
)
input_format_option = click.option(
    "--format",
    "input_format",
    type=click.Choice(["txt", "jsonl", "csv"]),
    help="The format of standard input, or of files whose names do not say.",
)
input_type_option = click.option(
    "--input-type", metavar="TYPE", help="For instance document or query."
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


class Text(click.types.StringParamType):
    """A text, or a name. Bytes that Python could not decode, for want of a locale, are UTF-8."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError:
            return self._decoded(text, param, ctx)
        return text

    def _decoded(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            self.fail(
                f"{ascii(text)[1:-1]!r} is neither UTF-8 nor in this system's encoding, "
                f"{sys.getfilesystemencoding()}: set LC_ALL to a UTF-8 locale such as C.UTF-8, "
                "or put the text in a file",
                param,
                ctx,
            )


def reads_text(command: click.Command) -> click.Command:
    """The command with every argument and option that is a text taken as ``Text``.

    Names of files stay as the system gave them: those are the names by which they are opened.
    """
    for param in command.params:
        if type(param.type) is click.types.StringParamType:
            param.type = _TEXT
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            reads_text(inner)
    return command


_TEXT = Text()


def talking(command: Command) -> Command:
    """The options of every command that reports something."""
    wrapped: Command = json_option(verbose_option(command))
    return wrapped
