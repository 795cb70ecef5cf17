"""Options of a provider: where they come from, and which of them change its vectors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import ConfigurationError, PluginError
from embedcore.provider.hookspecs import FromEnvironment, KeepsVectors

if TYPE_CHECKING:
    from pydantic import BaseModel

    from embedcore.provider.hookspecs import Provider
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import ModelInfo

# The options that have a meaning for the core, whatever the provider.
ADDRESS: Final = "base_url"
HEADERS: Final = "headers"

_REFERENCE: Final = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
# As a shell would read it. "$5" and "$$NAME" name no variable.
_INSIDE: Final = re.compile(r"(?<!\$)\$(?:[A-Za-z_]|\{[A-Za-z_][A-Za-z0-9_]*\})")
_KEY_NAME: Final = re.compile(r"(?:^|_)(?:key|secret|password|token)$")
_FINGERPRINT_VERSION: Final = 1
_FINGERPRINT_LENGTH: Final = 32


class HiddenValues(dict[str, Any]):
    """Values by option, none of which shows: a traceback with variables must not print a key."""

    def __repr__(self) -> str:
        return f"<values of {', '.join(self) or 'no options'}>"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionLayer:
    """Options from one place. ``plain_keys``: whether a key may be written there in plain.

    ``trusted``: False for a file that was only found, whose address gets no key.
    """

    origin: str
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    plain_keys: bool = False
    trusted: bool = True

    def leaves_to_environment(self, name: str) -> bool:
        """Whether a variable named by ``FromEnvironment`` goes over what this layer says."""
        return not (self.plain_keys or _is_reference(self.values[name]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedOptions:
    """The values to validate, where each comes from, and the references that lead nowhere.

    ``missing``: option → name of an environment variable that is not set. ``withheld``: option →
    name of one that is set and not read, since a file that was only found names the address.
    """

    values: HiddenValues
    origins: dict[str, str]
    missing: dict[str, str]
    withheld: dict[str, str] = field(default_factory=dict)


def resolve_options(provider: Provider, layers: Sequence[OptionLayer]) -> ResolvedOptions:
    """Lay the layers over one another, the last on top, and the environment over the files.

    A variable named by ``FromEnvironment`` goes over what a file says, but neither over what was
    passed in Python nor over a ``"$NAME"`` reference, which is the environment already. A key from
    such a variable goes to the provider's own address or to one that a trusted layer names.
    Raises ``ConfigurationError`` for a key written in plain in a file, for a reference in an option
    that holds no key, and for one that is only a part of a value.
    """
    values, origins, missing, withheld = HiddenValues(), {}, {}, {}
    for each in layers:
        for name in each.values:
            _refuse_part_reference(provider, each, name)
            _refuse_plain_key(provider, each, name)
            _refuse_reference(provider, each, name)
    supplied = {
        name: variable
        for name, variable in environment_options(provider.options)
        if os.environ.get(variable) and _leaves_to_environment(layers, name)
    }
    keyless = ADDRESS not in supplied and not _names_trusted(layers, ADDRESS)
    for name, variable in supplied.items():
        if keyless and is_secret(provider.options, name):
            withheld[name] = variable
        else:
            values[name], origins[name] = os.environ[variable], f"environment {variable}"
    for layer in reversed(layers):
        for name in layer.values:
            if name in origins:
                continue
            origins[name] = layer.origin
            values[name], unset = _looked_up(layer.values[name])
            if unset is not None:
                missing[name] = unset
    return ResolvedOptions(values=values, origins=origins, missing=missing, withheld=withheld)


def _on_top(layers: Sequence[OptionLayer], name: str) -> OptionLayer | None:
    return next((layer for layer in reversed(layers) if name in layer.values), None)


def _leaves_to_environment(layers: Sequence[OptionLayer], name: str) -> bool:
    layer = _on_top(layers, name)
    return layer is None or layer.leaves_to_environment(name)


def _names_trusted(layers: Sequence[OptionLayer], name: str) -> bool:
    """Whether a layer that may do so decides about an option; the provider itself may."""
    layer = _on_top(layers, name)
    return layer is None or layer.trusted


def _refuse_reference(provider: Provider, layer: OptionLayer, name: str) -> None:
    """A variable is sent only where one that is sent is expected."""
    if name != HEADERS and not is_secret(provider.options, name):
        variable = _reference_in(layer.values[name])
        if variable is not None:
            raise ConfigurationError(
                f"{name} of provider {provider.name!r} ({layer.origin}) is ${variable}: a variable "
                "is read for options that hold a key, and for headers; write the value itself"
            )


def _refuse_part_reference(provider: Provider, layer: OptionLayer, name: str) -> None:
    """A variable inside a longer text is not read: the text would be sent as it stands."""
    if name != HEADERS and not is_secret(provider.options, name):
        return
    place = _place(name, layer.values[name], _holds_part_reference)
    if place is not None:
        # Nothing of the value is quoted: what looks like a name may be a part of a key.
        raise ConfigurationError(
            f'{place} of provider {provider.name!r} ({layer.origin}) has a "$NAME" as a part of '
            "its value: a variable is read only where it is the whole value. Set one to all of it, "
            f'"Bearer " and the key for instance, and write {place.rpartition(".")[2]} = '
            '"$THAT_VARIABLE". In Python an f-string does the same, and a pydantic.SecretStr is '
            "taken as it is"
        )


def _place(name: str, value: object, holds: Callable[[object], bool]) -> str | None:
    """Where in an option there is such a value, as ``headers.Authorization``."""
    if isinstance(value, Mapping):
        found = (_place(f"{name}.{key}", inner, holds) for key, inner in value.items())
        return next((one for one in found if one is not None), None)
    return name if holds(value) else None


def _holds_part_reference(value: object) -> bool:
    return isinstance(value, str) and not _is_reference(value) and _INSIDE.search(value) is not None


def _reference_in(value: object) -> str | None:
    if isinstance(value, Mapping):
        found = (_reference_in(inner) for inner in value.values())
        return next((one for one in found if one is not None), None)
    return value[1:] if isinstance(value, str) and _is_reference(value) else None


def _refuse_plain_key(provider: Provider, layer: OptionLayer, name: str) -> None:
    if layer.plain_keys or not is_secret(provider.options, name):
        return
    place = _place(name, layer.values[name], _has_plain_text)
    if place is not None:
        raise ConfigurationError(
            f"{place} of provider {provider.name!r} is written in plain in {layer.origin}: keys do "
            f'not belong there. Write {place.rpartition(".")[2]} = "$YOUR_VARIABLE" and set that '
            "variable"
        )


def _has_plain_text(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_has_plain_text(inner) for inner in value.values())
    return isinstance(value, (str, bytes)) and not _is_reference(value)


def _is_reference(value: object) -> bool:
    return isinstance(value, str) and _REFERENCE.fullmatch(value) is not None


def _looked_up(value: Any) -> tuple[Any, str | None]:
    """The value with its references replaced, and a variable of them that is not set."""
    if isinstance(value, Mapping):
        found = {key: _looked_up(inner) for key, inner in value.items()}
        unset = next((unset for _, unset in found.values() if unset is not None), None)
        return {key: inner for key, (inner, _) in found.items()}, unset
    if not _is_reference(value):
        return value, None
    text = os.environ.get(value[1:])
    return (text, None) if text else (None, value[1:])


def require_secret_keys(options: type[BaseModel], origin: str) -> None:
    """Refuse a provider whose option is named like a key and may be shown like any other.

    Raises ``PluginError``.
    """
    for name, described in options.model_fields.items():
        shown = described.annotation is str or str in typing.get_args(described.annotation)
        if shown and _KEY_NAME.search(name) and not is_secret(options, name):
            raise PluginError(
                f"{origin}: its option {name!r} is named like a key and is a plain str, which "
                "would be shown in messages and reports: declare it as pydantic.SecretStr"
            )


def without_secrets(options: type[BaseModel], values: Mapping[str, Any]) -> HiddenValues:
    """What of these options may be pickled: no key and no callable; references by name stay."""
    return HiddenValues(
        (name, value)
        for name, value in values.items()
        if not _holds_key(value) and not (is_secret(options, name) and _has_plain_text(value))
    )


def _holds_key(value: object) -> bool:
    from pydantic import SecretBytes, SecretStr

    if isinstance(value, Mapping):
        return any(_holds_key(inner) for inner in value.values())
    return callable(value) or isinstance(value, (SecretStr, SecretBytes))


def environment_options(options: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """The options that an environment variable supplies, with the variable's name."""
    for name, described in options.model_fields.items():
        for mark in described.metadata:
            if isinstance(mark, FromEnvironment):
                yield name, mark.name


def is_secret(options: type[BaseModel], name: str) -> bool:
    """Whether an option holds a key, by its type: SecretStr, or a callable that returns one."""
    from pydantic import SecretBytes, SecretStr

    kinds = _kinds(options, name)
    return any(kind in (SecretStr, SecretBytes, Callable) for kind in kinds)


def accepts_callables(options: type[BaseModel], name: str) -> bool:
    """Whether an option is declared to take a callable as it is."""
    return Callable in _kinds(options, name)


def _kinds(options: type[BaseModel], name: str) -> list[Any]:
    described = options.model_fields.get(name)
    return [] if described is None else list(_types_in(described.annotation))


def _types_in(annotation: Any) -> Iterator[Any]:
    """Each type that an annotation names; a callable by its bare name."""
    yield annotation
    if typing.get_origin(annotation) is Callable:
        yield Callable
    for argument in typing.get_args(annotation):
        if not isinstance(argument, list):
            yield from _types_in(argument)


def options_fingerprint(
    provider: str,
    model: str,
    options: BaseModel,
    info: ModelInfo,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """A name for everything that decides the vectors, so that two sets never mix unnoticed.

    Every option counts, the base URL included, but secrets and those marked ``KeepsVectors``: a
    mark that is forgotten costs a cache miss, never a mixed set. An option that is None does not
    count, so that a provider may add one without renaming every set that exists. ``facts``: what
    the settings say of the model that decides them as well; it counts as an option of that name.
    """
    counted = {**_counted(options), **_once_counted(type(options)), **facts}
    return _digest(provider, model, info, counted)


def former_fingerprints(
    provider: str,
    model: str,
    options: BaseModel,
    info: ModelInfo,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[str, ...]:
    """The name that earlier versions gave the same set, by options that counted then.

    Batches that were submitted under it are continued.
    """
    once = _once_counted(type(options))
    before = options.model_dump(mode="json", include=set(once), exclude_none=True)
    former = _digest(provider, model, info, {**_counted(options), **before, **facts})
    now = options_fingerprint(provider, model, options, info, facts)
    return () if former == now else (former,)


def _counted(options: BaseModel) -> dict[str, Any]:
    """The options that decide the vectors, as JSON has them."""
    kind = type(options)
    left_out = {
        name
        for name, described in kind.model_fields.items()
        if is_secret(kind, name) or any(isinstance(m, KeepsVectors) for m in described.metadata)
    }
    return options.model_dump(mode="json", exclude=left_out, exclude_none=True)


def _once_counted(kind: type[BaseModel]) -> dict[str, Any]:
    """What stands for the options that decided the name of a set in an earlier version."""
    return {
        name: mark.counted_as
        for name, described in kind.model_fields.items()
        for mark in described.metadata
        if isinstance(mark, KeepsVectors) and mark.counted_as is not None
    }


def embedder_fingerprint(embedder: Embedder) -> str:
    """The same for an embedder built by hand, of which only class and ``ModelInfo`` are known.

    The class, since a wrapper that adds a prefix to each text has the ``ModelInfo`` of the other.
    """
    kind, info = type(embedder), embedder.info
    by_hand = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "dimensions": info.dimensions,
        "endpoint": info.endpoint,
    }
    return _digest(info.provider, info.model, info, by_hand)


def _digest(provider: str, model: str, info: ModelInfo, options: Mapping[str, Any]) -> str:
    described = {
        "version": _FINGERPRINT_VERSION,
        "provider": provider,
        "model": model,
        "variant": info.variant,
        "options": options,
    }
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:_FINGERPRINT_LENGTH]
