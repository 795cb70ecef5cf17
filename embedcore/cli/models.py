"""``embedcore models``: which models are known, and what do they cost?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from embedcore.cli.options import talking
from embedcore.cli.providers import nothing_installed
from embedcore.cli.screen import Screen
from embedcore.cli.text import table
from embedcore.errors import PluginError, UnknownProvider
from embedcore.provider import registry

if TYPE_CHECKING:
    from decimal import Decimal

    from embedcore.provider.types import ModelInfo

_HEADS = ("MODEL", "DIMENSIONS", "MAX TOKENS", "$/M TOKENS", "$/M IN BATCH", "AS OF")


@click.command(name="models")
@click.argument("provider", required=False)
@talking
@click.pass_obj
def command(screen: Screen, provider: str | None) -> None:
    """The models that the installed providers know, or those of one PROVIDER.

    Prices are those of the provider's own table, which the configuration can override. Other models
    may still work.
    """
    found = [info for name in _providers(provider) for info in _models(screen, name)]
    screen.answer({"models": [_fields(info) for info in found]})
    if found:
        screen.show(table(_HEADS, [_row(info) for info in found], numbers={1, 2, 3, 4}))
    else:
        screen.show("no provider names its models in advance")


def _providers(only: str | None) -> list[str]:
    if only is not None:
        registry.load(only)
        return [only]
    names = sorted({found.name for found in registry.installed()})
    if not names:
        raise UnknownProvider(nothing_installed())
    return names


def _models(screen: Screen, name: str) -> list[ModelInfo]:
    try:
        return list(registry.load(name).models.values())
    except PluginError as error:
        screen.complain(f"left out: {error}")
        return []


def _row(info: ModelInfo) -> tuple[str, ...]:
    price = info.price
    return (
        f"{info.provider}:{info.model}",
        str(info.dimensions or "?"),
        f"{info.max_input_tokens:,}" if info.max_input_tokens else "no limit",
        "?" if price is None else _price(price.immediate),
        "-" if price is None or price.batch is None else _price(price.batch),
        "-" if price is None or price.as_of is None else price.as_of.isoformat(),
    )


def _price(amount: Decimal) -> str:
    return f"{amount.normalize():f}" if amount else "free"


def _fields(info: ModelInfo) -> dict[str, Any]:
    price = info.price
    known = (
        {
            "dollars_per_million_tokens": float(price.immediate),
            "dollars_per_million_tokens_in_batch": None
            if price.batch is None
            else float(price.batch),
            "as_of": price.as_of,
            "source": price.source or None,
        }
        if price is not None
        else None
    )
    return {
        "model": f"{info.provider}:{info.model}",
        "dimensions": info.dimensions,
        "max_input_tokens": info.max_input_tokens,
        "local": info.local,
        "price": known,
    }
