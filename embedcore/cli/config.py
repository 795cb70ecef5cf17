"""``embedcore config``: every setting, and the layer that set it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from embedcore.cli.options import talking
from embedcore.cli.screen import Screen
from embedcore.cli.text import without_credentials
from embedcore.config import Config, state_folder
from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.provider import registry
from embedcore.provider.options import ADDRESS, environment_options, is_secret

if TYPE_CHECKING:
    from embedcore.provider.hookspecs import Provider


_DEFAULT = "default"
_HIDDEN = "(hidden)"
_NO_STATE = "There is no folder for state: set EMBEDCORE_HOME"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value in force. ``value`` never shows a key; None: not set.

    ``trust``: whether its layer was named by the user, or is a file that was found, and then
    perhaps trusted; None for a default.
    """

    path: str
    value: str | None
    origin: str
    trust: str | None = None


@click.command(name="config")
@click.option("--explain", is_flag=True, help="Also show which layer set each value.")
@talking
@click.pass_obj
def command(screen: Screen, explain: bool) -> None:
    """Every setting that is in force.

    The environment goes over one file: $EMBEDCORE_CONFIG, else the nearest embedcore.toml upwards,
    else [tool.embedcore] of the nearest pyproject.toml, else the user's own. Limits are different:
    those of every layer hold, and the tightest is shown. Keys are never shown. What a file may set
    that was found and not named: embedcore trust --help.
    """
    config = Config.load()
    settings = [*_in_config(config), *_in_environment(config)]
    state = _state_folder(config)
    screen.json(
        {
            "settings": [asdict(one) for one in settings],
            "state_folder": state,
        }
    )
    heads = ("SETTING", "VALUE", "TRUST", "SET BY") if explain else ("SETTING", "VALUE")
    screen.table(heads, [_row(one)[: len(heads)] for one in settings])
    screen.result(f"\n{_NO_STATE if state is None else f'All state is in {state}'}")


def _state_folder(config: Config) -> str | None:
    try:
        return str(state_folder(config))
    except ConfigurationError:
        # Not set, and without a home folder there is no place of its own.
        return None


def _row(one: Setting) -> tuple[str, ...]:
    value = "not set" if one.value is None else one.value
    return one.path, value, one.trust or "", one.origin


def _in_config(config: Config) -> Iterator[Setting]:
    for path, value in _leaves(config, ()):
        dotted = ".".join(path)
        origin = config.origins.get(dotted)
        yield Setting(
            path=dotted,
            value=shown_value(config, path, value),
            origin=origin or _DEFAULT,
            trust=None if origin is None else trust_of(config, origin),
        )


def trust_of(config: Config, origin: str) -> str:
    """Whether the user named this layer, or it was found, or trusted after that."""
    return config.standing if origin == config.file else "named"


def _leaves(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, BaseModel):
        own = value.__class__.__annotations__
        # What a model adds itself comes before what it inherits.
        for name in sorted(type(value).model_fields, key=lambda name: name not in own):
            yield from _leaves(getattr(value, name), (*path, name))
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, str(name)))
    else:
        yield path, value


def shown_value(config: Config, path: tuple[str, ...], value: object) -> str | None:
    """A value without the key that it may be; None if there is none."""
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    owner = _option(config, path)
    if owner is None:
        return without_credentials(str(value))
    provider, name = owner
    if isinstance(value, str) and value.startswith("$"):
        state = "set" if os.environ.get(value[1:]) else "not set"
        return f"{value} ({state})"
    loaded = _loaded(provider)
    # Of a provider that cannot be asked, any value may be a key.
    if loaded is None or is_secret(loaded.options, name):
        return _HIDDEN
    shown = without_credentials(str(value))
    return _unmistakable(shown) if name == ADDRESS else shown


def _unmistakable(address: str) -> str:
    """Letters that look like others, or cannot be seen, must not hide which host it is."""
    return "".join(one if "!" <= one <= "~" else ascii(one)[1:-1] for one in address)


def _option(config: Config, path: tuple[str, ...]) -> tuple[str, str] | None:
    """Provider and name, if the path is that of a provider's option."""
    if path[0] == "options" and len(path) >= 3:
        return path[1], path[2]
    if path[0] == "profiles" and len(path) >= 4 and path[2] == "options":
        model = config.profiles[path[1]].model
        return _provider_of(model, config), path[3]
    return None


def _provider_of(model: str, config: Config) -> str:
    if any(model == found.name for found in registry.installed()):
        return model
    return registry.split_model(model, default_provider=config.provider)[0]


def _in_environment(config: Config) -> Iterator[Setting]:
    """The options that providers take from variables of their own."""
    for name in sorted({one.name for one in registry.installed()}):
        provider = _loaded(name)
        if provider is not None:
            yield from environment_settings(provider, config.options.get(name, {}))


def environment_settings(provider: Provider, written: Mapping[str, Any]) -> Iterator[Setting]:
    """Each option with a variable, unless the configuration has it ``written`` as a reference."""
    for option, variable in environment_options(provider.options):
        if str(written.get(option, "")).startswith("$"):
            continue
        value = os.environ.get(variable)
        shown = None
        if value:
            secret = is_secret(provider.options, option)
            shown = f"set by {variable}" if secret else without_credentials(value)
        elif option in written:
            continue
        yield Setting(
            path=f"options.{provider.name}.{option}",
            value=shown,
            origin=f"environment {variable}" if value else f"{_DEFAULT}; {variable} would set it",
            trust="named" if value else None,
        )


def _loaded(name: str) -> Provider | None:
    try:
        return registry.load(name)
    except EmbeddingError:
        return None
