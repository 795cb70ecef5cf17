"""Resolves a model's name to profile, provider, model and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pydantic import SecretStr

from embedcore.config import DEFAULT_PROVIDER, Config, layered, validated
from embedcore.errors import ConfigurationError
from embedcore.provider import registry
from embedcore.provider.options import (
    OptionLayer,
    ResolvedOptions,
    resolve_options,
    without_secrets,
)
from embedcore.settings import ModelFacts, Profile, Rules, Settings, Table

if TYPE_CHECKING:
    from embedcore.provider.hookspecs import Provider
    from embedcore.storage.amounts import Limit

AnyTable = TypeVar("AnyTable", bound=Table)
Key: TypeAlias = str | SecretStr | Callable[[], str]


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
    def settings(self) -> Settings:
        """Each one as the profile says, else as the configuration says, else by default."""
        rules = {
            name: value
            for layer in (self.config, self.profile)
            for name in Rules.model_fields
            if (value := getattr(layer, name)) is not None
        }
        return Settings(
            **rules,
            retry=_over(self.config.retry, self.profile.retry),
            batch=_over(self.config.batch, self.profile.batch),
        )

    @property
    def budget(self) -> tuple[tuple[Limit, ...], float]:
        """The limits that hold, and the seconds to wait while others have more reserved than they
        will need."""
        budget = self.config.budget.tightened_by(self.profile.budget)
        return budget.limits(self.scope), budget.wait

    @property
    def facts(self) -> ModelFacts:
        """What the settings say of this model."""
        return facts_of(self.provider, self.model, self.config)

    def resolve(self, provider: Provider) -> ResolvedOptions:
        """This choice's options for its provider, from every layer.

        A fact of the model goes over what the provider is told of all its models.
        """
        config, known = self.config, provider.options.model_fields
        facts = {name: value for name, value in self.facts.stated().items() if name in known}
        return resolve_options(
            provider,
            [
                _in_file(config, config.options.get(self.provider, {})),
                _in_file(config, facts),
                _in_file(config, self.profile.options),
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


def facts_of(provider: str, model: str, config: Config) -> ModelFacts:
    """What the settings say of a model."""
    bare = config.models.get(model) if provider == config.provider else None
    return config.models.get(f"{provider}:{model}") or bare or ModelFacts()


def _over(lower: AnyTable, upper: AnyTable | None) -> AnyTable:
    """The lower layer's settings with those that the upper one sets."""
    table = upper.model_dump(exclude_unset=True) if upper is not None else {}
    return lower.model_copy(update=table)


def _in_file(config: Config, values: Mapping[str, Any]) -> OptionLayer:
    """Options of the settings: no variable of embedcore's own sets any."""
    return OptionLayer(
        origin=config.file or "the configuration",
        values=values,
        # Settings made in Python may hold a key; those read from a file must not.
        plain_keys=not config.origins,
        trusted=config.standing != "found",
    )


def choose(
    model: str | None,
    *,
    config: Config | Mapping[str, Any] | Path | str | None,
    scope: str | None,
    options: Mapping[str, Any],
) -> Choice:
    """Find the profile, the provider and the model that a name means."""
    settings = as_config(config)
    profile = settings.profile(_default_name(settings) if model is None else model)
    provider, name = full_name(profile.model, settings)
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


def _default_name(settings: Config) -> str | None:
    """The configured model; where only a provider is configured, that provider's own default."""
    if "model" in settings.model_fields_set or settings.provider == DEFAULT_PROVIDER:
        return None
    return ":".join((settings.provider, _default_model(settings.provider)))


def full_name(model: str, settings: Config) -> tuple[str, str]:
    """Provider and model of a name. That of an installed provider alone is its default model.

    Raises ``ConfigurationError``.
    """
    # With a colon it is no provider's name, and the installed ones need not be looked through.
    if ":" not in model and any(model == found.name for found in registry.installed()):
        return model, _default_model(model)
    return registry.split_model(model, default_provider=settings.provider)


def _default_model(provider: str) -> str:
    default = registry.load(provider).default_model
    if default is None:
        raise ConfigurationError(
            f"{provider!r} is a provider without a default model: set model = "
            f'"{provider}:MODEL" (embedcore models {provider} lists them)'
        )
    return default


def as_config(
    config: Config | Mapping[str, Any] | Path | str | None, *, limited: bool = False
) -> Config:
    """A ``Config`` from whatever the caller has.

    Settings made in Python take the place of the files and the environment, except that the limits
    of the machine, the user and the environment hold as well. ``limited``: the caller sets a limit
    beside them, which a file that was only found must not evade (``ConfigurationError``).
    """
    if config is None or isinstance(config, (Path, str)):
        settings = Config.load(config)
    else:
        settings = config if isinstance(config, Config) else validated(config, "config argument")
        settings = layered(settings)
    if limited and settings.under_limit is not None:
        raise ConfigurationError(settings.under_limit)
    return settings


def check_scope(scope: str) -> None:
    """Raise ``ConfigurationError`` for a name that no scope may have."""
    validated({"scope": scope}, "scope argument")
