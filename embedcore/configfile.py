"""Where settings come from, and which one wins.

Settings: the environment over one file (``$EMBEDCORE_CONFIG``, else the nearest ``embedcore.toml``
upwards, else ``[tool.embedcore]`` of the nearest ``pyproject.toml`` that has it, else the user's).
Limits: those of the machine's policy (``$EMBEDCORE_POLICY``), the user, the project and the
environment hold together, so that a lower layer can only tighten them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from embedcore import folders
from embedcore.config import Budget, Config, Limits
from embedcore.errors import ConfigurationError
from embedcore.provider.registry import LOAD_PLUGINS_VARIABLE, explain_validation

FILE_NAME: Final = "embedcore.toml"
CONFIG_VARIABLE: Final = "EMBEDCORE_CONFIG"
POLICY_VARIABLE: Final = "EMBEDCORE_POLICY"
HOME_VARIABLE: Final = "EMBEDCORE_HOME"
_TABLE: Final = " [tool.embedcore]"
_SETTINGS: Final = {
    "EMBEDCORE_MODEL": "model",
    "EMBEDCORE_PROVIDER": "provider",
    "EMBEDCORE_SCOPE": "scope",
    "EMBEDCORE_TIMEZONE": "timezone",
    "EMBEDCORE_OVERLONG": "overlong",
    "EMBEDCORE_CONCURRENCY": "concurrency",
    "EMBEDCORE_CONFIRM_ABOVE": "confirm_above",
    "EMBEDCORE_CACHE": "cache",
    "EMBEDCORE_CACHE_DIR": "cache_dir",
    HOME_VARIABLE: "home",
}
_LIMITS: Final = {
    **{f"EMBEDCORE_{name.upper()}": (name,) for name in Limits.model_fields},
    **{
        f"EMBEDCORE_ALL_SCOPES_{name.upper()}": ("all_scopes", name) for name in Limits.model_fields
    },
}
VARIABLES: Final = (*_SETTINGS, *_LIMITS, CONFIG_VARIABLE, POLICY_VARIABLE)
_READ: Final = (*VARIABLES, LOAD_PLUGINS_VARIABLE)


class _Policy(BaseModel):
    """What an administrator may set for everybody: limits, and nothing else."""

    model_config = ConfigDict(extra="forbid")

    budget: Budget = Budget()


def load(path: Path | str | None = None) -> Config:
    """Read every layer. See ``Config.load``."""
    origin, settings = _settings(path)
    config = validated(settings, origin)
    origins = {".".join(keys): origin for keys in _leaves(settings)}
    for variable, name in _SETTINGS.items():
        if os.environ.get(variable):
            value: object = os.environ[variable]
            if name == "concurrency":
                value = _whole_number(variable, os.environ[variable])
            settings[name] = value
            # One by one, so that a mistake is laid at the door of its own variable.
            config = validated(settings, f"environment variable {variable}")
            origins[name] = f"environment {variable}"
    layers = [*_upper_layers(origin), (origin, config.budget), *_environment()]
    budget, limit_origins = _tightest(layers)
    config = config.model_copy(update={"budget": budget, **_folders(config, origins)})
    config._layers = tuple(layers)
    config._origins = {**origins, **limit_origins}
    return config


def layered(config: Config) -> Config:
    """Settings made in Python under the limits of the layers above them; the caller's stay as
    they are."""
    if config.layers:
        return config
    layers = [*_upper_layers(""), *_environment(), ("Python", config.budget)]
    config = config.model_copy(update={"budget": _tightest(layers)[0]})
    config._layers = tuple(layers)
    return config


def validated(settings: Mapping[str, Any], origin: str) -> Config:
    """A ``Config`` of these settings, or ``ConfigurationError`` naming every mistake in them."""
    return _valid(Config, settings, origin)


def policy_budget() -> tuple[str, Budget] | None:
    """The limits that the machine's administrator set, if any."""
    named = os.environ.get(POLICY_VARIABLE)
    path = Path(named) if named else folders.site_config() / "policy.toml"
    if not named and not _is_there(path):
        return None
    return str(path), _valid(_Policy, _read(path), str(path)).budget


def state_folder(config: Config) -> Path:
    """Where the ledger and all other state live.

    Raises ``ConfigurationError`` if none is set and there is no home folder.
    """
    home = config.home or os.environ.get(HOME_VARIABLE)
    if home:
        return folders.expanded(home)
    found = folders.user_data()
    if found is None:
        raise ConfigurationError(
            "there is no home folder here, and so no place for the ledger and the cache: set "
            f"{HOME_VARIABLE} to a folder that can be written"
        )
    return found


def user_file() -> Path | None:
    """The user's own settings, used where no project has any. None: there is no such user."""
    folder = folders.user_config()
    return folder and folder / FILE_NAME


def _settings(path: Path | str | None) -> tuple[str, dict[str, Any]]:
    named = path or os.environ.get(CONFIG_VARIABLE)
    if named:
        return str(named), _read(folders.expanded(named))
    for path in _upwards(FILE_NAME):
        return str(path), _read(path)
    for path in _upwards("pyproject.toml"):
        tool = _read(path).get("tool")
        if isinstance(tool, dict) and "embedcore" in tool:
            return f"{path}{_TABLE}", tool["embedcore"]
    mine = user_file()
    if mine is not None and _is_there(mine):
        return str(mine), _read(mine)
    return "defaults", {}


def _upwards(name: str) -> Iterator[Path]:
    """The files of that name in the working directory and above, the nearest first."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return
    for folder in (here, *here.parents):
        if _is_there(folder / name):
            yield folder / name


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _upper_layers(origin: str) -> Iterator[tuple[str, Budget]]:
    policy = policy_budget()
    if policy is not None:
        yield policy
    path = user_file()
    if path is not None and str(path) != origin and _is_there(path):
        yield str(path), validated(_read(path), str(path)).budget


def _environment() -> Iterator[tuple[str, Budget]]:
    """The limits that the environment sets, each a layer of its own."""
    _check_spelling()
    for variable, keys in _LIMITS.items():
        if os.environ.get(variable):
            value: object = os.environ[variable]
            if "_token_" in keys[-1]:
                value = _whole_number(variable, os.environ[variable])
            limit = {keys[-1]: value}
            table = limit if len(keys) == 1 else {keys[0]: limit}
            yield (
                f"environment {variable}",
                _valid(Budget, table, f"environment variable {variable}"),
            )


def _check_spelling() -> None:
    """A limit that is misspelt would not hold, and nobody would know."""
    for variable in unread_variables():
        near = nearest_variable(variable, cutoff=0.85)
        if near is not None:
            raise ConfigurationError(
                f"the environment variable {variable} means nothing; did you mean {near}?"
            )


def unread_variables() -> list[str]:
    """The ``EMBEDCORE_*`` variables of this process that embedcore does not read, sorted."""
    return sorted(
        name for name in os.environ if name.startswith("EMBEDCORE_") and name not in _READ
    )


def nearest_variable(variable: str, *, cutoff: float = 0.6) -> str | None:
    """The variable that may have been meant; ``cutoff`` as for ``difflib.get_close_matches``."""
    return next(iter(get_close_matches(variable, _READ, n=1, cutoff=cutoff)), None)


def _tightest(layers: Iterable[tuple[str, Budget]]) -> tuple[Budget, dict[str, str]]:
    """What holds when every layer holds, and which layer each limit of it comes from."""
    result, origins = Budget(), {}
    for origin, budget in layers:
        before = _limits_in(result)
        result = result.tightened_by(budget)
        for path, value in _limits_in(result).items():
            if before.get(path) != value:
                origins[f"budget.{path}"] = origin
    return result, origins


def _limits_in(budget: Budget) -> dict[str, object]:
    table = budget.model_dump(exclude_none=True, exclude={"wait"})
    return {".".join(keys): _at(table, keys) for keys in _leaves(table)}


def _at(table: Any, keys: Sequence[str]) -> object:
    return reduce(lambda inner, key: inner[key], keys, table)


def _folders(config: Config, origins: Mapping[str, str]) -> dict[str, Any]:
    """The folders that the settings name, absolute."""
    profiles = {
        name: profile.model_copy(
            update={
                "cache_dir": _absolute(
                    profile.cache_dir, origins.get(f"profiles.{name}.cache_dir", "")
                )
            }
        )
        for name, profile in config.profiles.items()
    }
    return {
        "home": _absolute(config.home, origins.get("home", "")),
        "cache_dir": _absolute(config.cache_dir, origins.get("cache_dir", "")),
        "profiles": profiles,
    }


def _absolute(folder: Path | None, origin: str) -> Path | None:
    """A folder named in a file is meant from there, wherever the program was started."""
    folder = folder and folders.expanded(folder)
    if folder is None or folder.is_absolute():
        return folder
    origin = origin.removesuffix(_TABLE)
    start = Path() if origin.startswith("environment ") else folders.expanded(origin).parent
    return (start / folder).absolute()


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        problem = f"the configuration file {path} does not exist"
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror}"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problem = f"{path} is not valid TOML: {error}"
    # Outside of the handler: the original error and its frames hold the whole text of the file.
    raise ConfigurationError(problem)


def _leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def _whole_number(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(
            f"environment variable {variable}: {text!r} is not a whole number"
        ) from None


Valid = TypeVar("Valid", bound=BaseModel)


def _valid(kind: type[Valid], settings: object, origin: str) -> Valid:
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        message = explain_validation(error, origin, kind)
    # Outside of the handler: the original error quotes values, and one may be a key.
    raise ConfigurationError(message)
