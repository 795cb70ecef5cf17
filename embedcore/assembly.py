"""From settings to something that runs: which provider, which options, whose money."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic import BaseModel, SecretStr, ValidationError

from embedcore.config import Config, Profile, Retry
from embedcore.configfile import layered, state_folder, validated
from embedcore.errors import ConfigurationError, StorageReadOnly, UnsafeStorage
from embedcore.events import Event, Observer
from embedcore.observers import log
from embedcore.policy.engine import Engine
from embedcore.policy.limiter import gate_for
from embedcore.policy.pool import Pool
from embedcore.policy.purse import Account
from embedcore.policy.retry import RetryQuota
from embedcore.provider import registry
from embedcore.provider.options import (
    OptionLayer,
    ResolvedOptions,
    embedder_fingerprint,
    options_fingerprint,
    resolve_options,
    without_secrets,
)
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger

if TYPE_CHECKING:
    from embedcore.provider.hookspecs import Provider
    from embedcore.provider.protocol import Embedder
    from embedcore.storage.amounts import Limit

STATE_FILE: Final = "state.db"
Key: TypeAlias = str | SecretStr | Callable[[], str]

logger = logging.getLogger("embedcore")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a client was asked for, before anything of it is built."""

    config: Config
    profile: Profile
    provider: str
    model: str
    scope: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def limits(self) -> tuple[Limit, ...]:
        return self.config.limits(self.profile, self.scope)

    @property
    def retry(self) -> Retry:
        """The profile's settings over those of the configuration, one by one."""
        own = self.profile.retry
        table = own.model_dump(exclude_unset=True) if own is not None else {}
        return self.config.retry.model_copy(update=table)

    @property
    def patience(self) -> float:
        """Seconds to wait while others hold more than they will need."""
        return self.config.budget.tightened_by(self.profile.budget).wait

    def resolve(self, provider: Provider) -> ResolvedOptions:
        """This choice's options for its provider, from every layer."""
        config = self.config
        # Settings made in Python may hold a key; those read from a file must not.
        by_hand = not config.origins
        return resolve_options(
            provider,
            [
                OptionLayer(
                    origin=_origin(config, f"options.{self.provider}."),
                    values=config.options.get(self.provider, {}),
                    plain_keys=by_hand,
                ),
                OptionLayer(
                    origin=_origin(config, "profiles."),
                    values=self.profile.options,
                    plain_keys=by_hand,
                ),
                OptionLayer(origin="Python", values=self.options, plain_keys=True),
            ],
        )

    def without_keys(self) -> Choice:
        """The same to be pickled: of the settings only those this choice needs, and no key."""
        kind = registry.load(self.provider).options
        config = self.config.model_copy(
            update={
                "options": {
                    name: without_secrets(kind, values)
                    for name, values in self.config.options.items()
                    if name == self.provider
                },
                "profiles": {},
            }
        )
        options = without_secrets(kind, self.profile.options)
        return replace(
            self,
            config=config,
            profile=self.profile.model_copy(update={"options": options}),
            options=without_secrets(kind, self.options),
        )


def _origin(config: Config, prefix: str) -> str:
    """The file that the settings under ``prefix`` were read from."""
    found = (origin for path, origin in config.origins.items() if path.startswith(prefix))
    return next(found, "the configuration")


def choose(
    model: str | None,
    *,
    config: Config | Mapping[str, Any] | Path | str | None,
    scope: str | None,
    options: Mapping[str, Any],
) -> Choice:
    """Find the profile, the provider and the model that a name means."""
    settings = as_config(config)
    profile = settings.profile(model)
    provider, name = registry.split_model(profile.model, default_provider=settings.provider)
    chosen_scope = scope or profile.scope or settings.scope
    if scope is not None:
        check_scope(scope)
    return Choice(
        config=settings,
        profile=profile,
        provider=provider,
        model=name,
        scope=chosen_scope,
        options=options,
    )


def as_config(config: Config | Mapping[str, Any] | Path | str | None) -> Config:
    """A ``Config`` from whatever the caller has.

    Settings made in Python take the place of the files and the environment, except that the limits
    of the machine, the user and the environment hold as well.
    """
    if config is None or isinstance(config, (Path, str)):
        return Config.load(config)
    settings = config if isinstance(config, Config) else validated(config, "config argument")
    return layered(settings)


def checked_options(choice: Choice, provider: Provider) -> BaseModel | None:
    """The validated options; None while a ``"$NAME"`` reference leads nowhere yet."""
    resolved = choice.resolve(provider)
    if resolved.missing:
        return None
    return _valid_options(provider, resolved)


def create_embedder(choice: Choice) -> tuple[Embedder, str, _Secrets]:
    """The embedder, its fingerprint, and the secrets that must never be shown."""
    provider = registry.load(choice.provider)
    resolved = choice.resolve(provider)
    if resolved.missing:
        name, variable = next(iter(resolved.missing.items()))
        raise ConfigurationError(
            f"{name} of provider {choice.provider!r} is ${variable} "
            f"({resolved.origins[name]}), and that variable is not set: export {variable}=…"
        )
    options = _valid_options(provider, resolved)
    embedder = registry.build(provider, choice.model, options)
    fingerprint = options_fingerprint(choice.provider, choice.model, options, embedder.info)
    return embedder, fingerprint, _secrets(options)


def _valid_options(provider: Provider, resolved: ResolvedOptions) -> BaseModel:
    try:
        return provider.options.model_validate(resolved.values)
    except ValidationError as error:
        sources = ", ".join(sorted(set(resolved.origins.values())))
        where = f"options of provider {provider.name!r} ({sources})"
        message = registry.explain_validation(error, where, provider.options)
    # Outside of the handler: the original error quotes values, and one may be a key.
    raise ConfigurationError(message)


def build_engine(
    choice: Choice, embedder: Embedder | None, observers: Sequence[Observer]
) -> tuple[Engine, Ledger | None]:
    """Everything a recipe needs, and the ledger to close with it."""
    secrets = _Secrets()
    if embedder is None:
        embedder, fingerprint, secrets = create_embedder(choice)
    else:
        fingerprint = embedder_fingerprint(embedder.info)
    info, config, profile = embedder.info, choice.config, choice.profile
    ledger = None if info.local else open_ledger(config, choice.limits)
    retry = choice.retry.settings()
    concurrency = profile.concurrency or config.concurrency or info.max_concurrency
    engine = Engine(
        embedder=embedder,
        account=Account(
            ledger=ledger, scope=choice.scope, limits=choice.limits, wait=choice.patience
        ),
        pool=Pool(max(min(concurrency, info.max_concurrency), 1)),
        gate=gate_for(info.endpoint or f"{info.provider}:{info.model}"),
        quota=RetryQuota(retry.quota, retry.quota_ratio),
        retry=retry,
        overlong=profile.overlong or config.overlong or "truncate",
        keep_empty=(profile.on_empty or config.on_empty) == "keep",
        reject_zero=(profile.on_zero or config.on_zero) == "reject",
        label=f"{info.provider}:{info.model}",
        fingerprint=fingerprint,
        secrets=secrets,
        observe=told(observers),
    )
    return engine, ledger


def told(observers: Sequence[Observer]) -> Observer:
    """One observer for the log, the plugins and these; none can disturb the others."""

    def observe(event: Event) -> None:
        log(event)
        registry.observe(event)
        for observer in observers:
            registry.notify(observer, event)

    return observe


def open_ledger(config: Config, limits: Sequence[Limit]) -> Ledger:
    """The ledger of this state folder.

    Where it cannot be kept safely and there is no limit to keep, the books are in memory.
    """
    # Loads sqlite-utils: a client that is only built needs none of it.
    from embedcore.storage.schema import STATE, STATE_VERSION

    path = state_folder(config) / STATE_FILE
    database = Database(
        path,
        STATE,
        version=STATE_VERSION,
        allow_network_filesystem=config.allow_network_filesystem,
    )
    try:
        database.open()
    except (StorageReadOnly, UnsafeStorage) as error:
        if limits:
            raise
        logger.warning("usage is not recorded: %s", error)
        database = Database(None, STATE, version=STATE_VERSION)
    return Ledger(database, zone=config.timezone)


class _Secrets(tuple[str, ...]):
    """Keys to look for in what is shown; not shown themselves, not even among local variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} secrets>"


def _secrets(options: BaseModel) -> _Secrets:
    values = [getattr(options, name) for name in type(options).model_fields]
    tables = [value.values() for value in values if isinstance(value, Mapping)]
    return _Secrets(
        value.get_secret_value()
        for value in chain(values, *tables)
        if isinstance(value, SecretStr) and value.get_secret_value()
    )


def check_scope(scope: str) -> None:
    """Raise ``ConfigurationError`` for a name that no scope may have."""
    validated({"scope": scope}, "scope argument")
