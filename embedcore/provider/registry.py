"""Finds the installed provider of a name and imports only that one; and the installed observers."""

from __future__ import annotations

import functools
import logging
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import ConfigurationError, EmbeddingError, PluginError, UnknownProvider
from embedcore.provider.known import IN_REPOSITORY, how_to_install, near_models
from embedcore.provider.options import require_secret_keys

if TYPE_CHECKING:
    import pluggy

    from embedcore.events import Event, Observer
    from embedcore.provider.hookspecs import Provider
    from embedcore.provider.protocol import Embedder

GROUP: Final = "embedcore"
OBSERVERS: Final = "embedcore.observers"
LOAD_PLUGINS_VARIABLE: Final = "EMBEDCORE_LOAD_PLUGINS"

logger = logging.getLogger("embedcore")


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """An entry point of the group, before its module is imported."""

    name: str
    distribution: str
    version: str
    module: str


def split_model(name: str, *, default_provider: str) -> tuple[str, str]:
    """``provider:model``, split at the first colon; a bare name belongs to the default provider."""
    provider, colon, model = name.partition(":")
    provider, model = (provider, model) if colon else (default_provider, name)
    if not provider or not model.strip():
        raise ConfigurationError(
            f"model = {name!r} is not a model's name: write a bare name or provider:model, "
            "for instance openai:text-embedding-3-small"
        )
    return provider, model


def installed() -> list[Installed]:
    """The providers whose distributions are installed and allowed to load. Imports none of them."""
    return sorted((_describe(point) for point in _entry_points()), key=lambda found: found.name)


def installed_observers() -> list[Installed]:
    """The observers whose distributions are installed and allowed to load. Imports none."""
    return sorted((_describe(one) for one in _entry_points(OBSERVERS)), key=lambda one: one.name)


def load_observers() -> Mapping[str, str]:
    """Import every installed observer, once, and have it told of events from then on.

    What cannot be used is left out: its name and why.
    """
    return _load_observers(os.environ.get(LOAD_PLUGINS_VARIABLE))


def load(name: str) -> Provider:
    """Import the one distribution that offers ``name`` and return its provider.

    Raises ``UnknownProvider`` when there is none and ``PluginError`` when there are two or it
    cannot be used.
    """
    return _load(name, os.environ.get(LOAD_PLUGINS_VARIABLE))


def meant(provider: str, model: str) -> str | None:
    """The name, ``provider:model``, that was perhaps meant by a model that its provider does not
    list; several of them with "or" between. None: it is listed, or nothing is near to it."""
    head, slash, tail = model.partition("/")
    if slash and head != provider and any(head == found.name for found in installed()):
        return f"{head}:{tail}"
    near = near_models(model, load(provider).models)
    return " or ".join(f"{provider}:{name}" for name in near) or None


def create(name: str, model: str, options: Mapping[str, Any]) -> Embedder:
    """Validate ``options`` with the provider's own model and build one of its embedders.

    Raises ``ConfigurationError`` naming the option at fault.
    """
    provider = load(name)
    return build(provider, model, validate_options(provider, options))


def build(provider: Provider, model: str, options: Any) -> Embedder:
    """Call the provider's ``create``; whatever untyped it raises becomes a ``PluginError``."""
    try:
        return provider.create(model, options)
    except (EmbeddingError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(
            f"provider {provider.name!r} failed to create {model!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def validate_options(provider: Provider, options: Mapping[str, Any]) -> Any:
    """The provider's options model, filled; a mistake is an error with its path."""
    from pydantic import ValidationError

    try:
        return provider.options(**options)
    except ValidationError as error:
        raise ConfigurationError(
            explain_validation(error, f"options of provider {provider.name!r}", provider.options)
        ) from None


def explain_validation(error: Any, where: str, model: type[Any]) -> str:
    """A pydantic error as one sentence for each mistake, with the nearest valid name.

    The offending value is left out: it may be a key.
    """
    lines = []
    for mistake in error.errors(include_url=False, include_context=False, include_input=False):
        path = ".".join(str(part) for part in mistake["loc"]) or "(all)"
        if mistake["type"] == "extra_forbidden":
            valid = _names_at(model, mistake["loc"][:-1])
            near = get_close_matches(str(mistake["loc"][-1]), valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(valid)}"
            lines.append(f"{path}: unknown key; {hint}")
        else:
            lines.append(f"{path}: {mistake['msg']}")
    return f"{where}: " + "; ".join(lines)


def _names_at(model: type[Any], path: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = _model_in(fields[part].annotation)
    return sorted(getattr(current, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    """The pydantic model inside ``dict[str, Model]`` or ``Model | None``, if there is one."""
    if hasattr(annotation, "model_fields"):
        return annotation
    inner = (_model_in(argument) for argument in typing.get_args(annotation))
    return next((found for found in inner if found is not None), None)


plugin_observers: Final[list[Observer]] = []
"""One for each loaded plugin that observes. Any of them may raise."""


@functools.cache
def _manager() -> pluggy.PluginManager:
    import pluggy

    from embedcore.provider import hookspecs

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugin_observers.clear()
    return manager


def _call_hook(function: Callable[..., Any], event: Event) -> None:
    function(event=event)


@functools.cache
def _load(name: str, allowed: str | None) -> Provider:
    found = [point for point in _entry_points() if point.name == name]
    if not found:
        raise _unknown(name, allowed)
    if len(found) > 1:
        owners = " and ".join(sorted(_describe(point).distribution for point in found))
        raise PluginError(
            f"provider {name!r} is offered by {owners}: uninstall all but one of them"
        )
    described = _describe(found[0])
    origin = f"provider {name!r} (distribution {described.distribution} {described.version})"
    plugin = _import(found[0], origin, described.distribution)
    provider = _register(plugin, name, origin, described.distribution)
    require_secret_keys(provider.options, origin)
    return provider


@functools.cache
def _load_observers(allowed: str | None) -> Mapping[str, str]:  # noqa: ARG001 - a key of the cache
    problems = {}
    for point in _entry_points(OBSERVERS):
        described = _describe(point)
        origin = (
            f"observer {point.name!r} (distribution {described.distribution} {described.version})"
        )
        try:
            _register_observer(_import(point, origin, described.distribution), origin, described)
        except PluginError as error:
            problems[point.name] = str(error)
            logger.warning("%s", error)
    return problems


def _register_observer(plugin: object, origin: str, described: Installed) -> None:
    with _registered(plugin, described.name, origin, described.distribution) as manager:
        hooks = [hook.name for hook in manager.get_hookcallers(plugin) or ()]
        if hooks != ["embedcore_observe"]:
            raise PluginError(
                f"{origin} must have the hook embedcore_observe, and no other: it has "
                f"{', '.join(sorted(hooks)) or 'none'}",
                distribution=described.distribution,
            )


def _import(point: EntryPoint, origin: str, distribution: str) -> object:
    try:
        plugin = point.load()
        # pluggy registers a class as a bag of unbound functions; its author meant an instance.
        return plugin() if isinstance(plugin, type) else plugin
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # SystemExit included: a plugin's import must not end the host program.
        raise PluginError(
            f"{origin} cannot be imported: {type(error).__name__}: {error}. "
            f"Reinstall or upgrade {distribution} from where it came",
            distribution=distribution,
        ) from error


def _register(plugin: object, name: str, origin: str, distribution: str) -> Provider:
    with _registered(plugin, name, origin, distribution):
        return _ask(plugin, name, origin, distribution)


@contextmanager
def _registered(
    plugin: object, name: str, origin: str, distribution: str
) -> Iterator[pluggy.PluginManager]:
    """The plugin's hooks are called from now on, unless the block refuses it. Raises
    ``PluginError``."""
    manager = _manager()
    try:
        if not manager.is_registered(plugin):
            manager.register(plugin, name=f"{distribution}:{name}")
            manager.check_pending()
        yield manager
        # pluggy stops at the first implementation that raises: each is called on its own.
        plugin_observers[:] = [
            functools.partial(_call_hook, implementation.function)
            for implementation in manager.hook.embedcore_observe.get_hookimpls()
        ]
    except BaseException as error:
        # What was refused must not observe either.
        if manager.is_registered(plugin):
            manager.unregister(plugin)
        if isinstance(error, (PluginError, KeyboardInterrupt)):
            raise
        raise PluginError(
            f"{origin} does not fit the hooks: {type(error).__name__}: {error}",
            distribution=distribution,
        ) from error


def _ask(plugin: object, name: str, origin: str, distribution: str) -> Provider:
    from embedcore.provider.hookspecs import Provider

    answers = [
        implementation.function()
        for implementation in _manager().hook.embedcore_provider.get_hookimpls()
        if implementation.plugin is plugin
    ]
    provider = answers[0] if answers else None
    if not isinstance(provider, Provider):
        raise PluginError(
            f"{origin}: its hook embedcore_provider returned "
            f"{type(provider).__name__}, not a Provider",
            distribution=distribution,
        )
    if provider.name != name:
        raise PluginError(
            f"{origin} calls itself {provider.name!r}: entry point and name must agree",
            distribution=distribution,
        )
    return provider


def _unknown(name: str, allowed: str | None) -> UnknownProvider:
    names = [found.name for found in installed()]
    there = f"installed: {', '.join(names)}" if names else "no provider is installed"
    known = [*names, *IN_REPOSITORY]
    near = [] if name in IN_REPOSITORY else get_close_matches(name.lower(), known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else how_to_install(name)
    blocked = f" ({LOAD_PLUGINS_VARIABLE}={allowed!r} hides the others)" if allowed else ""
    return UnknownProvider(
        f"provider {name!r} is not installed; {there}{blocked}. {hint}",
        installed=names,
    )


def _entry_points(group: str = GROUP) -> Iterator[EntryPoint]:
    allowed = os.environ.get(LOAD_PLUGINS_VARIABLE)
    names = None if allowed is None else {name.strip() for name in allowed.split(",")}
    for point in _points(group, _places()):
        if names is None or point.name in names:
            yield point


def _places() -> tuple[object, ...]:
    """Where distributions are looked for, and when each folder last got or lost one."""
    found: list[object] = [tuple(map(id, sys.meta_path))]
    for place in sys.path:
        try:
            folder = place or os.getcwd()  # noqa: PTH109 - objects for paths take longer
            found.append((folder, os.stat(folder).st_mtime_ns))  # noqa: PTH116
        except OSError:
            found.append((place, None))
    return tuple(found)


@functools.lru_cache(maxsize=2)
def _points(group: str, places: tuple[object, ...]) -> tuple[EntryPoint, ...]:  # noqa: ARG001 - key
    """All of a group, read once for as long as nothing is installed: it takes longer than the
    rest of a new client."""
    found: dict[tuple[str, str, str], EntryPoint] = {}
    for point in entry_points(group=group):
        # An editable install may list its metadata twice on sys.path: same owner, same target.
        owner = point.dist.name if point.dist else ""
        found.setdefault((point.name, point.value, owner), point)
    return tuple(found.values())


@functools.lru_cache(maxsize=64)
def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    return distribution.name, distribution.version


def _describe(point: EntryPoint) -> Installed:
    distribution, version = _name_and_version(point.dist) if point.dist else ("(unknown)", "")
    return Installed(
        name=point.name,
        distribution=distribution,
        version=version,
        module=point.value,
    )
