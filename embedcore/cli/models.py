"""``embedcore models`` and ``embedcore providers``: what is known and installed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

import click

from embedcore import prices as price_table
from embedcore.choice import facts_of
from embedcore.cli.options import talking
from embedcore.cli.screen import Screen
from embedcore.cli.text import plural
from embedcore.config import Config
from embedcore.errors import ConfigurationError, EmbeddingError, PluginError, UnknownProvider
from embedcore.facts import as_listed
from embedcore.provider import registry
from embedcore.provider.known import how_to_install
from embedcore.provider.types import ModelInfo

if TYPE_CHECKING:
    from decimal import Decimal

NOT_INSTALLED: Final = "not installed"


@dataclass(frozen=True, kw_only=True)
class Found:
    """An installed provider. ``problem``: why it cannot be used, or None.

    ``known_failures``: what its author knows that it does not keep of the contract, by test.
    ``missing``: distributions that it is made of, and that are not installed.
    """

    name: str
    distribution: str
    version: str
    problem: str | None
    known_failures: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


@click.command(name="providers")
@talking
@click.pass_obj
def providers(screen: Screen) -> int:
    """The installed providers and observers, and why a broken one is broken."""
    found, observers = found_providers(), found_observers()
    screen.json(
        {
            "providers": [asdict(one) for one in found],
            "observers": [asdict(one) for one in observers],
        }
    )
    if found:
        heads = ("PROVIDER", "DISTRIBUTION", "VERSION", "STATE")
        screen.table(heads, [_provider_row(one) for one in found])
    else:
        screen.result(nothing_installed())
    if observers:
        heads = ("OBSERVER", "DISTRIBUTION", "VERSION", "STATE")
        screen.table(heads, [_provider_row(one) for one in observers], title="\n")
    for one in (*found, *observers):
        for test, reason in one.known_failures.items():
            screen.result(f"{one.name}: {test}: {reason}")
        if one.problem:
            screen.error(f"\n{one.problem}")
    return int(any(one.problem for one in (*found, *observers)))


def found_observers() -> list[Found]:
    """Every installed observer."""
    problems = registry.load_observers()
    return [
        Found(
            name=one.name,
            distribution=one.distribution,
            version=one.version,
            problem=problems.get(one.name),
        )
        for one in registry.installed_observers()
    ]


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
        missing=tuple(
            part
            for part in requirements_of(one.distribution)
            if installed_version(part) == NOT_INSTALLED
        ),
    )


def requirements_of(distribution: str) -> list[str]:
    """The distributions that one always needs."""
    try:
        needed = requires(distribution) or []
    except PackageNotFoundError:
        return []
    # What hangs on an extra or a platform may be absent for good reasons.
    return [re.split(r"[^A-Za-z0-9._-]", need, maxsplit=1)[0] for need in needed if ";" not in need]


def installed_version(distribution: str) -> str:
    """Or ``NOT_INSTALLED``."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return NOT_INSTALLED


def nothing_installed() -> str:
    """What to say when there is no provider at all."""
    return f"no provider is installed, openai for instance. {how_to_install('openai')}"


def _provider_row(one: Found) -> tuple[str, ...]:
    known = len(one.known_failures)
    state = f"ok, {known} known failure{'s' if known > 1 else ''}" if known else "ok"
    if one.missing:
        state = f"without {', '.join(one.missing)}"
    return one.name, one.distribution, one.version, "broken" if one.problem else state


_HEADS = ("MODEL", "WIDTH", "MAX TOKENS", "PRICE", "IN BATCH", "FROM")
_LARGEST_TABLE: Final = 32_000_000
_SECONDS: Final = 60.0


@click.command(name="models")
@click.argument("provider", required=False)
@click.option(
    "--prices",
    metavar="FILE",
    help="First read the prices of all providers from this file or https:// address.",
)
@talking
@click.pass_obj
def command(screen: Screen, provider: str | None, prices: str | None) -> None:
    """The models that the installed providers know, or those of one PROVIDER.

    A price is the newer one of the provider's own table and of the one that --prices read, unless
    the settings say another. Other models may still work.
    """
    if prices is not None:
        _read_prices(screen, prices)
    config = Config.load()
    found = [
        info
        for name in _providers(provider)
        for info in with_settings(config, name, _models(screen, name))
    ]
    screen.json({"models": [_fields(info) for info in found]})
    if not found:
        screen.result("no provider names its models in advance")
        return
    sources = list(dict.fromkeys(filter(None, map(_source, found))))
    screen.table(
        _HEADS,
        [_row(info, sources) for info in found],
        numbers={1, 2, 3, 4},
        spare=("MAX TOKENS", "WIDTH"),
    )
    listed = [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
    if listed:
        screen.result("\nPrices are US dollars per million tokens, from")
        screen.result("\n".join(listed))


def with_settings(config: Config, provider: str, known: Iterable[ModelInfo]) -> list[ModelInfo]:
    """A provider's models with the prices and facts of the user, and those that only these name."""
    table, models = price_table.kept(), {info.model: info for info in known}
    for name in (*table, *config.models):
        owner, model = registry.split_model(name, default_provider=config.provider)
        if owner == provider:
            models.setdefault(model, ModelInfo(provider=provider, model=model))
    return [
        as_listed(
            info,
            facts_of(provider, model, config),
            None if info.local else table.get(f"{provider}:{model}"),
            config.file or "the configuration",
        )
        for model, info in models.items()
    ]


def _read_prices(screen: Screen, name: str) -> None:
    """Put the table of that file or address in the place of the one before."""
    before = price_table.kept()
    content, read_on = _fetched(name) if "://" in name else _file(Path(name))
    table = price_table.table_of(content, origin=name, read_on=read_on)
    path = price_table.keep(table)
    changed = [
        f"{model}: {_price(before[model].immediate)} → {_price(price.immediate)}"
        for model, price in table.items()
        if model in before and before[model].immediate != price.immediate
    ]
    screen.info(f"{plural(len(table), 'price')} from {name} written to {path}")
    for line in changed:
        screen.info(line)


def _file(path: Path) -> tuple[bytes, date]:
    """Its content, and the day on which it was last written."""
    try:
        content, written = path.read_bytes(), path.stat().st_mtime
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    return content, datetime.fromtimestamp(written, UTC).date()


def _fetched(url: str) -> tuple[bytes, date]:
    # A command that reads no address needs none of it.
    from embedcore.provider import access, http
    from embedcore.provider.refusals import Asked

    parts = urlsplit(url)
    address = access.parse(f"{parts.scheme}://{parts.netloc}", such_as="https://example.org")
    access.refuse_plaintext(address, allowed=False)
    target = urlunsplit(("", "", parts.path, parts.query, ""))
    call = http.Call(method="GET", path=target or "/", timeout=_SECONDS, max_bytes=_LARGEST_TABLE)
    session = http.Session(address.url)
    with closing(session), session.send(call, Asked(model="", endpoint=address.url)) as answer:
        if answer.status != 200:
            raise ConfigurationError(
                f"{address.url} answered {answer.status} instead of a table of prices"
                + (": a redirect is not followed" if 300 <= answer.status < 400 else "")
            )
        return bytes(answer.body), datetime.now(UTC).date()


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


def _source(info: ModelInfo) -> str:
    """Date and source of its price; empty where there is none."""
    price = info.price
    if price is None or not price.source:
        return ""
    return price.source if price.as_of is None else f"{price.as_of.isoformat()}, {price.source}"


def _row(info: ModelInfo, sources: Sequence[str]) -> tuple[str, ...]:
    price = info.price
    return (
        f"{info.provider}:{info.model}",
        str(info.dimensions or "?"),
        f"{info.max_input_tokens:,}" if info.max_input_tokens else "no limit",
        "?" if price is None else _price(price.immediate),
        "-" if price is None or price.batch is None else _price(price.batch),
        f"[{sources.index(_source(info)) + 1}]" if _source(info) else "-",
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
