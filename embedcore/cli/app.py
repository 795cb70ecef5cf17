"""The command group, and how a failure becomes a message and an exit code.

Only the command that is asked for is imported: ``embedcore --help`` costs click and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Final

import click

from embedcore.cli.options import Group, reads_text, verbose_option
from embedcore.cli.process import BROKEN_PIPE, FAULT, STORAGE, Signals, code_of, codes_table
from embedcore.cli.screen import Screen

# Name → its module, and the line that --help shows without importing it.
COMMANDS: Final = {
    "embed": ("embed", "Embed files into one output; run again, it sends only what is missing."),
    "batch": ("batch.group", "The same within a day, for less money: submit, look after, fetch."),
    "similar": ("similar", "Find the rows of an output that are nearest to a question."),
    "models": ("models", "The models that are known, with their prices."),
    "providers": (
        "models:providers",
        "The providers that are installed, and those that are broken.",
    ),
    "provider": ("provider:group", "Write a provider, test one, or ask a server for its options."),
    "usage": ("usage", "What was spent: today, this month and in total."),
    "budget": ("budget", "The limits: what is left of them, and when they reset."),
    "cache": ("cache", "The cache: its size, and making room in it."),
    "config": ("config", "Every setting, and with --explain the layer that set it."),
    "trust": ("trust", "Let a settings file that is only found set addresses and keys, too."),
    "demo": ("demo", "Embed and search the docstrings of your own Python, offline."),
    "doctor": ("doctor", "Look at this installation for what is wrong or unusual."),
}
ALIASES: Final = {"plugins": "providers"}


class LazyGroup(Group):
    """Knows the names of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        place, _, attribute = COMMANDS[name][0].partition(":")
        module = import_module(f"embedcore.cli.{place}")
        return reads_text(getattr(module, attribute or "command"))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in COMMANDS | ALIASES:
            near = get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        ctx.ensure_object(Screen).result(f"embedcore {version('embedcore')}")
        ctx.exit()


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"\b\nExit codes:\n{codes_table()}",
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version)
@verbose_option
@click.pass_context
def group(ctx: click.Context) -> None:
    """Text to vectors, with the price first and a spending limit that holds.

    \b
      embedcore demo                          works offline, without a key
      embedcore embed texts.jsonl -o out.npy  shows the price first
      embedcore similar -c "a question" -i out.npy
    """
    from embedcore.cli.process import attach

    attach(ctx.ensure_object(Screen))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Never raises, but for what no code can hold."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    screen = Screen(given)
    with Signals(screen) as signals:
        try:
            code = group.main(given, prog_name="embedcore", standalone_mode=False, obj=screen)
            screen.flush()
            return int(code or 0)
        except BaseException as error:  # noqa: BLE001 - each way to end has its code
            return _ended_by(error, screen, signals)


def _ended_by(error: BaseException, screen: Screen, signals: Signals) -> int:
    """Say what ended the command and return the code for it."""
    try:
        code = _reported(error, screen, signals)
    except BrokenPipeError:
        code = BROKEN_PIPE
    try:
        screen.flush()
    except OSError:
        # It was said, or no program reads it.
        screen.abandon_output()
    return code


def _reported(error: BaseException, screen: Screen, signals: Signals) -> int:
    from embedcore.errors import EmbeddingError

    # click ends the program on a broken pipe, and on nothing else when it is not standalone.
    if isinstance(error, BrokenPipeError | SystemExit):
        return BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt | click.Abort):
        # click puts an Abort, which knows nothing, over the interrupt.
        screen.stopped(error.__cause__ or error)
        return signals.code
    if isinstance(error, click.ClickException):
        if isinstance(error, click.UsageError) and error.ctx is not None:
            screen.error(error.ctx.get_usage())
        screen.fail(error, error.format_message())
        return error.exit_code
    if isinstance(error, EmbeddingError):
        screen.fail(error, str(error))
        return code_of(error)
    if isinstance(error, OSError):
        screen.fail(error, f"the system refused: {error}")
        return STORAGE
    if isinstance(error, Exception):
        screen.fail(
            error,
            f"a fault in embedcore: {type(error).__name__}: {error}. Please report it, with what "
            "embedcore --verbose shows",
        )
        return FAULT
    raise error
