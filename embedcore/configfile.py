"""Where settings come from, and which one wins.

Settings: the environment over one file (``$EMBEDCORE_CONFIG``, else the nearest ``embedcore.toml``
upwards, else ``[tool.embedcore]`` of the nearest ``pyproject.toml`` that has it, else the user's).
Limits: those of the machine's policy (``$EMBEDCORE_POLICY``), the user, the project and the
environment hold together, so that a lower layer can only tighten them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from embedcore.config import Budget, Config
from embedcore.errors import ConfigurationError
from embedcore.provider.registry import explain_validation

FILE_NAME: Final = "embedcore.toml"
CONFIG_VARIABLE: Final = "EMBEDCORE_CONFIG"
POLICY_VARIABLE: Final = "EMBEDCORE_POLICY"
HOME_VARIABLE: Final = "EMBEDCORE_HOME"
_BUDGET_FIELDS: Final = tuple(
    f"{period}_{unit}_limit"
    for period in ("daily", "monthly", "total")
    for unit in ("token", "cost")
)
_VARIABLES: Final = {
    "EMBEDCORE_MODEL": ("model",),
    "EMBEDCORE_PROVIDER": ("provider",),
    "EMBEDCORE_SCOPE": ("scope",),
    "EMBEDCORE_TIMEZONE": ("timezone",),
    "EMBEDCORE_OVERLONG": ("overlong",),
    "EMBEDCORE_CONCURRENCY": ("concurrency",),
    "EMBEDCORE_CONFIRM_ABOVE": ("confirm_above",),
    HOME_VARIABLE: ("home",),
    **{f"EMBEDCORE_{name.upper()}": ("budget", name) for name in _BUDGET_FIELDS},
    **{
        f"EMBEDCORE_ALL_SCOPES_{name.upper()}": ("budget", "all_scopes", name)
        for name in _BUDGET_FIELDS
    },
}
_INTEGERS: Final = frozenset({"concurrency", *(n for n in _BUDGET_FIELDS if "_token_" in n)})


def load(path: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read every layer. See ``Config.load``."""
    origin, settings = _settings(path, environ)
    origins = {".".join(keys): origin for keys in _leaves(settings)}
    layers = list(_upper_layers(environ, origin))
    if "budget" in settings:
        # The file's limits stay in force beside those of the environment.
        layers.append((origin, _budget(settings["budget"], origin)))
    for variable, keys in _VARIABLES.items():
        if environ.get(variable):
            _put(settings, keys, _typed(variable, keys[-1], environ[variable]))
            origins[".".join(keys)] = f"environment {variable}"
    config = validated(settings, origin)
    config._layers.extend(layers)
    config._origins.update(origins)
    return config


def validated(settings: Mapping[str, Any], origin: str) -> Config:
    """A ``Config`` of these settings, or ``ConfigurationError`` naming every mistake in them."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigurationError(explain_validation(error, origin, Config)) from None


def policy_budget(environ: Mapping[str, str] = os.environ) -> tuple[str, Budget] | None:
    """The limits that the machine's administrator set, if any."""
    named = environ.get(POLICY_VARIABLE)
    path = Path(named) if named else _site_folder() / "policy.toml"
    if not named and not path.is_file():
        return None
    settings = _read(path)
    return str(path), _budget(settings.get("budget", {}), str(path))


def state_folder(config: Config) -> Path:
    """Where the ledger and all other state live."""
    if config.home is not None:
        return config.home.expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("embedcore", appauthor=False))


def user_file() -> Path:
    """The user's own settings, used where no project has any."""
    import platformdirs

    return Path(platformdirs.user_config_dir("embedcore", appauthor=False)) / FILE_NAME


def _site_folder() -> Path:
    import platformdirs

    return Path(platformdirs.site_config_dir("embedcore", appauthor=False))


def _settings(path: Path | str | None, environ: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    named = path or environ.get(CONFIG_VARIABLE)
    if named:
        return str(named), _read(Path(named))
    for folder in _upwards():
        if (folder / FILE_NAME).is_file():
            return str(folder / FILE_NAME), _read(folder / FILE_NAME)
    for folder in _upwards():
        if (folder / "pyproject.toml").is_file():
            table = _read(folder / "pyproject.toml").get("tool", {}).get("embedcore")
            if table is not None:
                return f"{folder / 'pyproject.toml'} [tool.embedcore]", table
    if user_file().is_file():
        return str(user_file()), _read(user_file())
    return "defaults", {}


def _upwards() -> Iterator[Path]:
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return
    yield here
    yield from here.parents


def _upper_layers(environ: Mapping[str, str], origin: str) -> Iterator[tuple[str, Budget]]:
    policy = policy_budget(environ)
    if policy is not None:
        yield policy
    path = user_file()
    if str(path) != origin and path.is_file():
        yield str(path), _budget(_read(path).get("budget", {}), str(path))


def _budget(table: object, origin: str) -> Budget:
    try:
        return Budget.model_validate(table)
    except ValidationError as error:
        raise ConfigurationError(explain_validation(error, f"{origin}, budget", Budget)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"the configuration file {path} does not exist") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from error


def _leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def _put(settings: dict[str, Any], keys: tuple[str, ...], value: object) -> None:
    for key in keys[:-1]:
        inner = settings.setdefault(key, {})
        if not isinstance(inner, dict):
            return  # a table is missing here: validation says so with its path
        settings = inner
    settings[keys[-1]] = value


def _typed(variable: str, name: str, text: str) -> object:
    if name not in _INTEGERS:
        return text
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise ConfigurationError(f"{variable} = {text!r} is not a whole number") from None
