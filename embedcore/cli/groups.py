"""What does a command do that only has others below it? It shows them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click


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
