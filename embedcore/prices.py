"""The user's table of prices, over those that providers bring along.

A table is a TOML or JSON file: a date and a source, and the prices of each model in US dollars per
million tokens, by the words of the settings::

    as_of = 2026-11-29
    source = "https://example.org/prices"

    [models."cohere:embed-v5.0-pro"]
    price = 0.12
    batch_price = 0.06

Or it is litellm's ``model_prices_and_context_window.json``, of which embedding models with a price
per token above zero are taken. It is read where the user names it, kept as JSON in the user's
configuration folder, and never fetched by itself.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from embedcore import folders
from embedcore.errors import ConfigurationError
from embedcore.provider.registry import explain_validation
from embedcore.provider.types import Price
from embedcore.settings import Dollars, Table
from embedcore.trust import write_privately

FILE_NAME: Final = "prices.json"
_PER_MILLION: Final = 10**6
_OF_LITELLM: Final = "litellm_provider"


class Listed(Table):
    """The prices of one model. ``as_of`` and ``source``: those of the table, unless it has some."""

    price: Dollars
    batch_price: Dollars | None = None
    as_of: date | None = None
    source: str | None = None


class PriceTable(Table):
    """A file of prices."""

    as_of: date | None = None
    source: str = ""
    models: dict[str, Listed]


def table_of(content: bytes, *, origin: str, read_on: date) -> dict[str, Price]:
    """The prices in a file, by ``provider:model``. ``origin``: its name, the source where it names
    none; ``read_on``: its date, where it has none.

    Raises ``ConfigurationError`` for what is no table of prices.
    """
    found = _parsed(content, origin)
    if "models" in found:
        problem = None
        try:
            table = PriceTable.model_validate(found)
        except ValidationError as error:
            problem = explain_validation(error, origin, PriceTable)
        if problem is not None:
            raise ConfigurationError(problem)
    else:
        table = PriceTable(models=dict(_of_litellm(found, origin)))
    return {
        name: Price(
            immediate=one.price,
            batch=one.batch_price,
            as_of=one.as_of or table.as_of or read_on,
            source=one.source or table.source or origin,
        )
        for name, one in table.models.items()
    }


def _parsed(content: bytes, origin: str) -> dict[str, Any]:
    try:
        text = content.decode("utf-8-sig")
        if text.lstrip().startswith(("{", "[")):
            found = json.loads(text, parse_float=Decimal)
        else:
            found = tomllib.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not found:
        raise ConfigurationError(f"{origin} is no table of prices: neither TOML nor JSON with any")
    return found


def _of_litellm(found: Mapping[str, Any], origin: str) -> Iterator[tuple[str, Listed]]:
    """Zero stands there for "free" and for "not known": it is not taken."""
    if not any(isinstance(one, dict) and _OF_LITELLM in one for one in found.values()):
        raise ConfigurationError(
            f'{origin} is no table of prices: it has neither [models."provider:model"] nor '
            "litellm's entries"
        )
    for key, one in found.items():
        if not isinstance(one, dict) or one.get("mode") != "embedding":
            continue
        provider = one.get(_OF_LITELLM)
        price = _per_million(one.get("input_cost_per_token"))
        if not isinstance(provider, str) or not price:
            continue
        batch = _per_million(one.get("input_cost_per_token_batches"))
        model = key.removeprefix(f"{provider}/")
        yield f"{provider}:{model}", Listed(price=price, batch_price=batch or None)


def _per_million(value: object) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    amount = Decimal(value) * _PER_MILLION
    return amount.normalize() if amount.is_finite() and amount >= 0 else None


def place() -> Path | None:
    """Where the table is kept; None where the user has no configuration folder."""
    folder = folders.user_config()
    return folder and folder / FILE_NAME


def kept() -> dict[str, Price]:
    """The table as it was last read in; empty if there is none. Raises ``ConfigurationError``."""
    path = place()
    try:
        content = None if path is None else path.read_bytes()
    except FileNotFoundError:
        content = None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    if content is None:
        return {}
    try:
        return table_of(content, origin=str(path), read_on=date.min)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error.message}. Read it in again with embedcore models --prices FILE, or delete it"
        ) from None


def keep(prices: Mapping[str, Price]) -> Path:
    """Put this table in the place of the one that is kept; all of it or nothing."""
    path = place()
    if path is None:
        raise ConfigurationError(
            "there is no home folder to keep prices in: set XDG_CONFIG_HOME, or write them into "
            'the settings, [models."provider:model"] price = …'
        )
    models = {
        name: {
            "price": str(one.immediate),
            **({} if one.batch is None else {"batch_price": str(one.batch)}),
            **({} if one.as_of is None else {"as_of": one.as_of.isoformat()}),
            "source": one.source,
        }
        for name, one in sorted(prices.items())
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_privately(path, json.dumps({"models": models}, indent=1))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
    return path


def newer(own: Price | None, listed: Price | None) -> Price | None:
    """Of a provider's price and the table's the one with the later date; of one day the table's."""
    if own is None or listed is None:
        return own if listed is None else listed
    if own.as_of is not None and listed.as_of is not None and own.as_of > listed.as_of:
        return own
    return listed
