"""``embedcore models`` and ``embedcore providers``: what is known and installed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import click

from embedcore.cli.options import talking
from embedcore.cli.screen import Screen
from embedcore.errors import EmbeddingError, PluginError, UnknownProvider
from embedcore.provider import registry
from embedcore.provider.known import how_to_install

if TYPE_CHECKING:
    from decimal import Decimal

    from embedcore.provider.types import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Found:
    """An installed provider. ``problem``: why it cannot be used, or None.

    ``known_failures``: what its author knows that it does not keep of the contract, by test.
    """

    name: str
    distribution: str
    version: str
    problem: str | None
    known_failures: dict[str, str] = field(default_factory=dict)


@click.command(name="providers")
@talking
@click.pass_obj
def providers(screen: Screen) -> int:
    """The installed providers with their versions, and why a broken one is broken."""
    found = found_providers()
    screen.json({"providers": [asdict(one) for one in found]})
    if found:
        heads = ("PROVIDER", "DISTRIBUTION", "VERSION", "STATE")
        screen.table(heads, [_provider_row(one) for one in found])
    else:
        screen.result(nothing_installed())
    for one in found:
        for test, reason in one.known_failures.items():
            screen.result(f"{one.name}: {test}: {reason}")
        if one.problem:
            screen.error(f"\n{one.problem}")
    return int(any(one.problem for one in found))


def found_providers() -> list[Found]:
    """Every installed provider, each tried on its own."""
    return [_found(one) for one in registry.installed()]


def _found(one: registry.Installed) -> Found:
    problem, known = None, {}
    try:
        known = dict(registry.load(one.name).known_failures)
    except EmbeddingError as error:
        problem = str(error)
    return Found(
        name=one.name,
        distribution=one.distribution,
        version=one.version,
        problem=problem,
        known_failures=known,
    )


def nothing_installed() -> str:
    """What to say when there is no provider at all."""
    return f"no provider is installed, openai for instance. {how_to_install('openai')}"


def _provider_row(one: Found) -> tuple[str, ...]:
    known = len(one.known_failures)
    sound = f"ok, {known} known failure{'s' if known > 1 else ''}" if known else "ok"
    return one.name, one.distribution, one.version, "broken" if one.problem else sound


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
    screen.json({"models": [_fields(info) for info in found]})
    if found:
        rows = [_row(info) for info in found]
        screen.table(_HEADS, rows, numbers={1, 2, 3, 4}, spare=("AS OF",))
    else:
        screen.result("no provider names its models in advance")


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
        screen.error(f"left out: {error}")
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
            "dollars_per_million_tokens": price.immediate,
            "dollars_per_million_tokens_in_batch": price.batch,
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
        "truncation": info.truncation,
        "input_types": info.input_types,
        "local": info.local,
        "price": known,
    }
