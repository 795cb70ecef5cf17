"""``embedcore providers``: what is installed, and does it work?"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import click

from embedcore.cli.options import talking
from embedcore.cli.screen import Screen
from embedcore.cli.text import table
from embedcore.errors import EmbeddingError
from embedcore.provider import registry
from embedcore.provider.known import how_to_install


@dataclass(frozen=True, kw_only=True)
class Found:
    """An installed provider. ``problem``: why it cannot be used, or None."""

    name: str
    distribution: str
    version: str
    problem: str | None


@click.command(name="providers")
@talking
@click.pass_obj
def command(screen: Screen) -> int:
    """The installed providers with their versions, and why a broken one is broken."""
    found = found_providers()
    screen.answer({"providers": [asdict(one) for one in found]})
    if found:
        heads = ("PROVIDER", "DISTRIBUTION", "VERSION", "STATE")
        screen.show(table(heads, [_row(one) for one in found]))
    else:
        screen.show(nothing_installed())
    for one in found:
        if one.problem:
            screen.complain(f"\n{one.problem}")
    return int(any(one.problem for one in found))


def found_providers() -> list[Found]:
    """Every installed provider, each tried on its own."""
    return [
        Found(
            name=one.name,
            distribution=one.distribution,
            version=one.version,
            problem=_problem(one.name),
        )
        for one in registry.installed()
    ]


def nothing_installed() -> str:
    """What to say when there is no provider at all."""
    return f"no provider is installed, openai for instance. {how_to_install('openai')}"


def _problem(name: str) -> str | None:
    try:
        registry.load(name)
    except EmbeddingError as error:
        return str(error)
    return None


def _row(one: Found) -> tuple[str, ...]:
    return one.name, one.distribution, one.version, "broken" if one.problem else "ok"
