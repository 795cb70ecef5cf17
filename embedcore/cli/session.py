"""What a command opens: settings, a client, the state file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from embedcore.assembly import create_embedder, open_ledger
from embedcore.choice import choose
from embedcore.client import EmbeddingClient
from embedcore.config import Config
from embedcore.errors import StorageError
from embedcore.settings import Limits, Profile
from embedcore.storage.amounts import ALL_SCOPES
from embedcore.trust import PRICES

if TYPE_CHECKING:
    from embedcore.events import Observer
    from embedcore.provider.types import Price
    from embedcore.storage.amounts import Limit
    from embedcore.storage.ledger import Ledger


_PERIODS: Final = {"day": "daily", "month": "monthly", "total": "total"}


@dataclass(frozen=True, kw_only=True)
class Session:
    """A client, with the settings it was made from."""

    config: Config
    profile: Profile
    client: EmbeddingClient
    model: str | None

    @cached_property
    def name(self) -> str:
        return f"{self.client.provider}:{self.client.model}"

    @property
    def price_without_found(self) -> Price | None:
        """The price where no settings file that was only found says one; None: nothing else does.

        Such a file may set a price, which must not keep the question about money from being asked.
        """
        config = self.config
        if config.standing != "found":
            return None
        choice = choose(
            self.model, config=_without_prices(config), scope=self.client.scope, options={}
        )
        embedder, *_ = create_embedder(choice)
        with closing(embedder):
            return embedder.info.price

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits that its calls must keep; none for what is computed on this machine."""
        if self.client.info.local:
            return ()
        return self.config.limits(self.profile, self.client.scope)


def _without_prices(config: Config) -> Config:
    """The same settings without what they say of prices."""

    def unpriced(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name not in PRICES}

    profiles = {
        name: one.model_copy(update={"options": unpriced(one.options)})
        for name, one in config.profiles.items()
    }
    options = {name: unpriced(one) for name, one in config.options.items()}
    models = {
        name: one.model_copy(update=dict.fromkeys(PRICES)) for name, one in config.models.items()
    }
    return config.model_copy(update={"options": options, "profiles": profiles, "models": models})


@contextmanager
def opened(
    model: str | None, scope: str | None, observers: Sequence[Observer] = ()
) -> Iterator[Session]:
    """A client for the length of the block."""
    config = Config.load()
    with EmbeddingClient(model, config=config, scope=scope, observers=observers) as client:
        yield Session(config=config, profile=config.profile(model), client=client, model=model)


@contextmanager
def state_ledger(
    config: Config, limits: Sequence[Limit] = (), *, compare: bool = True
) -> Iterator[Ledger]:
    """The ledger of the state folder. Raises ``StorageError`` where none can be kept.

    ``compare=False``: also if its counters do not agree with its entries.
    """
    ledger = open_ledger(config, limits, compare=compare)
    with closing(ledger.database):
        if ledger.database.path is None:
            raise StorageError("there is no usage to show here: see the warning above")
        yield ledger


def set_by(limit: Limit, config: Config) -> str:
    """The layer that a limit comes from."""
    budget = config.budget
    if limit.scope == ALL_SCOPES:
        holders = {"all_scopes.": budget.all_scopes}
    else:
        own = budget.scopes.get(limit.scope, Limits())
        holders = {"": budget, f"scopes.{limit.scope}.": own}
    name = f"{_PERIODS[limit.period]}_{'token' if limit.unit == 'tokens' else 'cost'}_limit"
    for place, holder in holders.items():
        if holder.amount(limit.period, limit.unit) == limit.amount:
            return config.origins.get(f"budget.{place}{name}", "the configuration")
    return "the profile"
