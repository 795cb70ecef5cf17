"""The configuration: its files and layers, and which one wins.

Settings: the environment over one file (``$EMBEDCORE_CONFIG``, else the nearest ``embedcore.toml``
upwards, else ``[tool.embedcore]`` of the nearest ``pyproject.toml`` that has it, else the user's).
Upwards ends at the top of the repository or at the home folder; outside of both, only the working
directory is looked at. What a file may set that was only found there, ``embedcore.trust`` decides.
Limits: those of the machine's policy (``$EMBEDCORE_POLICY``), the user, the project and the
environment hold together, so that a lower layer can only tighten them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from difflib import get_close_matches
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from embedcore import folders
from embedcore.errors import ConfigurationError
from embedcore.provider.registry import LOAD_PLUGINS_VARIABLE, explain_validation
from embedcore.settings import (
    BatchSettings,
    Budget,
    Dollars,
    Limits,
    ModelFacts,
    Policy,
    Profile,
    RetrySettings,
    Rules,
    ScopeName,
)
from embedcore.storage.amounts import Limit
from embedcore.trust import (
    LOWERED_KEYS,
    NOT_NAMED,
    RECORDS_FOLDER,
    TRUST_VARIABLE,
    UNDER_A_LIMIT,
    Entry,
    FoundFile,
    Others,
    Records,
    Standing,
    bounded,
    entries,
    may_set,
    parsed,
    read_found,
    sensitive,
    standing_of,
)

DEFAULT_MODEL: Final = "text-embedding-3-small"
DEFAULT_PROVIDER: Final = "openai"
FILE_NAME: Final = "embedcore.toml"
PYPROJECT: Final = "pyproject.toml"
CONFIG_VARIABLE: Final = "EMBEDCORE_CONFIG"
POLICY_VARIABLE: Final = "EMBEDCORE_POLICY"
HOME_VARIABLE: Final = "EMBEDCORE_HOME"
_TABLE: Final = " [tool.embedcore]"
_NO_FILE: Final = "defaults"
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
VARIABLES: Final = (*_SETTINGS, *_LIMITS, CONFIG_VARIABLE, POLICY_VARIABLE, TRUST_VARIABLE)
_LIMIT_NAMES: Final = frozenset((*Limits.model_fields, "query_share"))
_READ: Final = (*VARIABLES, LOAD_PLUGINS_VARIABLE)


logger = logging.getLogger("embedcore")


class Config(Rules):
    """Everything that can be set. Use ``Config.load()`` for what this machine says.

    - ``model``: a profile's name, ``provider:model``, or a model of the default provider.
    - ``options``: per provider, over which a profile's own options go.
    - ``models``: facts of a model by its name, ``provider:model``: price, longest text, width.
    - ``scope``: the project that spends; limits and reports are per scope.
    - ``timezone``: where days and months begin; fixed when the state file is made (default UTC).
    - ``home``: the folder of all state; None: the platform's own place for it.
    - ``confirm_above``: the command line asks before it spends more than this, in US dollars.
    """

    model: Annotated[str, Field(min_length=1)] = DEFAULT_MODEL
    provider: Annotated[str, Field(min_length=1)] = DEFAULT_PROVIDER
    scope: ScopeName = "default"
    timezone: str | None = None
    options: dict[str, dict[str, Any]] = Field(default={}, repr=False)
    profiles: dict[str, Profile] = Field(default={})
    models: dict[str, ModelFacts] = Field(default={})
    budget: Budget = Budget()
    retry: RetrySettings = RetrySettings()
    batch: BatchSettings = BatchSettings()
    home: Path | None = None
    allow_network_filesystem: bool = False
    confirm_above: Dollars = Decimal(1)

    # Where each value came from, by its path, and the budgets that ``budget`` was made from; the
    # file among the layers, what it may do (``embedcore.trust``), and what is wrong with that once
    # a limit is set. Not settings.
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _layers: tuple[tuple[str, Budget], ...] = PrivateAttr(default=())
    _file: str | None = PrivateAttr(default=None)
    _standing: Literal["named", "found", "trusted"] = PrivateAttr(default="named")
    _under_limit: str | None = PrivateAttr(default=None)

    @classmethod
    def load(cls, path: Path | str | None = None) -> Config:
        """Read the files and the environment. ``path`` names the file instead of looking for it.

        Raises ``ConfigurationError`` with the file, the path of the value and the nearest valid
        name.
        """
        return load(path)

    @property
    def origins(self) -> dict[str, str]:
        """Path of each value that was set → the layer that set it; of a limit, the tightest one."""
        return dict(self._origins)

    @property
    def file(self) -> str | None:
        """The file that was read, as ``origins`` names it. None: there is none."""
        return self._file

    @property
    def standing(self) -> Literal["named", "found", "trusted"]:
        """Whether the user named that file, or it was found; "trusted" if it was, and is trusted.

        Every other layer was named.
        """
        return self._standing

    @property
    def under_limit(self) -> str | None:
        """What is wrong with these settings once a limit is set beside them; None: nothing."""
        return self._under_limit

    @property
    def layers(self) -> tuple[tuple[str, Budget], ...]:
        """Where limits are set and to what, the highest layer first; ``budget`` is all of them."""
        return self._layers

    def profile(self, name: str | None) -> Profile:
        """The profile of that name, or one made for a model's name."""
        chosen: object = self.model if name is None else name
        if not isinstance(chosen, str) or not chosen:
            raise ConfigurationError(f"model = {chosen!r} is not a model's name")
        return self.profiles.get(chosen) or Profile(model=chosen)

    def limits(self, profile: Profile, scope: str) -> tuple[Limit, ...]:
        """The tightest limit for each window and unit, those of the profile included."""
        return self.budget.tightened_by(profile.budget).limits(scope)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """The one layer that is a file. ``found``: it was not named by the user."""

    origin: str
    table: dict[str, Any] = field(default_factory=dict, repr=False)
    found: FoundFile | None = None


def load(path: Path | str | None = None) -> Config:
    """Read every layer. See ``Config.load``."""
    source = _source(path)
    origin = source.origin
    # Mistakes first: a key that is misspelt is no key that needs trust.
    config = validated(source.table, origin)
    user = _user_layer(origin)
    upper, variables = list(_upper_layers(user)), list(_environment())
    settings, under_limit = source.table, None
    standing: Standing = "named"
    origins = {".".join(keys): origin for keys in _leaves(settings)}
    if source.found is not None:
        others = _others(user, [*upper, *variables])
        standing, under_limit = _checked(source.found, settings, others)
        settings, changed = bounded(settings, others, standing)
        origins |= {".".join(keys): whose for keys, whose in changed.items()}
        config = validated(settings, origin)
    for variable, name in _SETTINGS.items():
        if os.environ.get(variable):
            settings[name] = _variable_value(variable, name)
            # One by one, so that a mistake is laid at the door of its own variable.
            config = validated(settings, f"environment variable {variable}")
            origins[name] = f"environment {variable}"
    layers = [*upper, (origin, config.budget), *variables]
    budget, limit_origins = _tightest(layers)
    config = config.model_copy(update={"budget": budget, **_folders(config, origins)})
    config._layers = tuple(layers)
    config._origins = {**origins, **limit_origins}
    config._file = None if origin == _NO_FILE else origin
    config._standing = standing
    config._under_limit = under_limit
    return config


def _variable_value(variable: str, name: str) -> object:
    text = os.environ[variable]
    return _whole_number(variable, text) if name == "concurrency" else text


def _checked(
    file: FoundFile, table: Mapping[str, Any], others: Others
) -> tuple[Standing, str | None]:
    """Whether the user trusts a file, and what is wrong with it once Python sets a limit, too.

    Raises ``ConfigurationError`` if it sets what it may not set.
    """
    asked = sensitive(table)
    if asked and standing_of(file, asked, records()) == "trusted":
        return "trusted", None
    refused = [one for one in asked if not may_set("found", one, others)]
    if refused:
        # Which lines those are is only looked for where it is said.
        only_limits = all(may_set("found", one, Others()) for one in refused)
        raise ConfigurationError(file.refusal(refused, UNDER_A_LIMIT if only_limits else NOT_NAMED))
    under_limit = [one for one in asked if not may_set("found", one, Others(limited=True))]
    return "found", file.refusal(under_limit, UNDER_A_LIMIT) if under_limit else None


def _others(user: tuple[str, Config] | None, layers: Sequence[tuple[str, Budget]]) -> Others:
    """What the layers beside a found file say."""
    limited = any(budget.has_limits for _, budget in layers)
    lowest: dict[tuple[str, ...], tuple[float, str]] = {}
    if user is not None:
        limited = limited or any(one.budget.has_limits for one in user[1].profiles.values())
        for keys in LOWERED_KEYS:
            value = _set_in(user[1], keys)
            if value is not None:
                lowest[keys] = (value, user[0])
    variable = "EMBEDCORE_CONCURRENCY"
    if os.environ.get(variable):
        value = _whole_number(variable, os.environ[variable])
        # It goes over the user's file, as everywhere; what is wrong in one is said there.
        if value > 0:
            lowest["concurrency",] = (value, f"environment {variable}")
    return Others(limited=limited, lowest=lowest)


def _set_in(model: BaseModel, keys: Sequence[str]) -> Any:
    """The value that settings give a key; None if they do not."""
    for key in keys[:-1]:
        model = getattr(model, key)
    return getattr(model, keys[-1]) if keys[-1] in model.model_fields_set else None


def records() -> Records:
    """Where it is written down which files this user trusts."""
    folder = folders.user_config()
    return Records(folder and folder / RECORDS_FOLDER)


def layered(config: Config) -> Config:
    """Settings made in Python under the limits of the layers above them; the caller's stay as
    they are."""
    if config.layers:
        return config
    layers = [*_upper_layers(_user_layer("")), *_environment(), ("Python", config.budget)]
    config = config.model_copy(update={"budget": _tightest(layers)[0]})
    config._layers = tuple(layers)
    return config


def validated(settings: Mapping[str, Any], origin: str) -> Config:
    """A ``Config`` of these settings, or ``ConfigurationError`` naming every mistake in them."""
    return _valid(Config, settings, origin)


def policy_budget() -> tuple[str, Budget] | None:
    """The limits that the machine's administrator set, if any."""
    named = os.environ.get(POLICY_VARIABLE)
    path = folders.in_full(named) if named else folders.site_config() / "policy.toml"
    if not named and not _is_there(path):
        return None
    return str(path), _valid(Policy, _read(path), str(path)).budget


def state_folder(config: Config) -> Path:
    """Where the ledger and all other state live.

    Raises ``ConfigurationError`` if none is set and there is no home folder.
    """
    home = config.home or os.environ.get(HOME_VARIABLE)
    if home:
        return folders.in_full(home)
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


def _source(path: Path | str | None) -> _Source:
    named = path or os.environ.get(CONFIG_VARIABLE)
    if named:
        return _named_source(str(named))
    inside, beyond = folders.search_folders()
    found = nearest_settings(inside)
    _say_what_is_beyond(beyond)
    # The user's own file is named by its place, wherever the program was started.
    if found is not None and not _is_users(found.path):
        if found.owner_problem is not None:
            raise ConfigurationError(f"{found.path} {found.owner_problem}")
        return _Source(origin=origin_of(found), table=found.table, found=found)
    mine = user_file()
    if mine is not None and _is_there(mine):
        return _Source(origin=str(mine), table=_read(mine))
    return _Source(origin=_NO_FILE)


def _named_source(name: str) -> _Source:
    path = folders.in_full(name)
    table = _read(path)
    if path.name != PYPROJECT:
        return _Source(origin=str(path), table=table)
    own = _own_table(table)
    if own is None:
        raise ConfigurationError(f"{path} has no table [tool.embedcore]")
    return _Source(origin=f"{path}{_TABLE}", table=own)


def nearest_settings(places: Sequence[Path]) -> FoundFile | None:
    """The nearest ``embedcore.toml`` in these folders, else the nearest ``pyproject.toml`` with
    settings in it; its ``table`` is that of the settings."""
    paths = [place / name for name in (FILE_NAME, PYPROJECT) for place in places]
    # Only as far as the first of ours: what lies beyond it is not looked at.
    return next(filter(None, map(_ours, map(read_found, paths))), None)


def settings_at(path: Path) -> FoundFile | None:
    """The file at that path; None if there is none, or no settings of ours are in it."""
    return _ours(read_found(path))


def _ours(found: FoundFile | None) -> FoundFile | None:
    if found is None or found.path.name != PYPROJECT:
        return found
    own = _own_table(found.table)
    return None if own is None else replace(found, table=own, below=("tool", "embedcore"))


def _own_table(pyproject: Mapping[str, Any]) -> Any:
    tool = pyproject.get("tool")
    return tool.get("embedcore") if isinstance(tool, dict) else None


def origin_of(found: FoundFile) -> str:
    """The name of the layer that this file is."""
    return f"{found.path}{_TABLE if found.below else ''}"


def limits_beyond(places: Sequence[Path]) -> Path | None:
    """The nearest file in these folders that would set a limit if it were looked at."""
    for place in places:
        try:
            found = nearest_settings([place])
        except ConfigurationError:
            # A file of another project: what cannot be read there is no concern here.
            continue
        if found is not None and any(map(_sets_a_limit, entries(found.table))):
            return found.path
    return None


def _sets_a_limit(entry: Entry) -> bool:
    return "budget" in entry.path[:-1] and entry.path[-1] in _LIMIT_NAMES


def _say_what_is_beyond(places: Sequence[Path]) -> None:
    path = limits_beyond(places)
    if path is not None:
        _say_once(path)


@cache
def _say_once(path: Path) -> None:
    logger.warning("%s", beyond_message(path))


def beyond_message(path: Path) -> str:
    """Why the limits in that file do not hold here, and what makes them hold."""
    own = user_file()
    or_there = "" if own is None else f"\nor set the limits in {own}"
    return (
        f"{path} sets limits, and they do not hold here:\nsettings are looked for no further up "
        "than the top of the repository or the\nhome folder. If they should hold, name the file:\n"
        f"  {CONFIG_VARIABLE}={path}{or_there}"
    )


def _is_users(path: Path) -> bool:
    # By the folder: a link elsewhere to the user's own file is no place of the user's.
    own = user_file()
    return own is not None and path.name == FILE_NAME and folders.same(path.parent, own.parent)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _user_layer(origin: str) -> tuple[str, Config] | None:
    """The user's own file, unless it is the layer of that name already."""
    path = user_file()
    if path is None or str(path) == origin or not _is_there(path):
        return None
    return str(path), validated(_read(path), str(path))


def _upper_layers(user: tuple[str, Config] | None) -> Iterator[tuple[str, Budget]]:
    policy = policy_budget()
    if policy is not None:
        yield policy
    if user is not None:
        yield user[0], user[1].budget


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
    """A limit that is misspelt would not hold, and no message would say so."""
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
    """A file that was named, not found: its owner is the business of the person who named it."""
    found = _read_or_problem(path)
    if isinstance(found, str):
        raise ConfigurationError(found)
    return found


def _read_or_problem(path: Path) -> dict[str, Any] | str:
    """The frame that raises the problem must not have the file's text."""
    try:
        found = parsed(path.read_bytes())
    except FileNotFoundError:
        return f"the configuration file {path} does not exist"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return f"{path} {found}" if isinstance(found, str) else found[1]


def _leaves(table: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    return (entry.path for entry in entries(table))


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
