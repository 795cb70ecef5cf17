"""Which options does a provider get, from where, and which of them change its vectors?"""

from __future__ import annotations

import hashlib
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import ConfigurationError
from embedcore.provider.hookspecs import FromEnvironment, KeepsVectors

if TYPE_CHECKING:
    from pydantic import BaseModel

    from embedcore.provider.hookspecs import Provider
    from embedcore.provider.types import ModelInfo

_REFERENCE: Final = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_FINGERPRINT_VERSION: Final = 1
_FINGERPRINT_LENGTH: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionLayer:
    """Options from one place. ``plain_keys``: whether a key may be written there in plain."""

    origin: str
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    plain_keys: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedOptions:
    """The values to validate, where each comes from, and the references that lead nowhere.

    ``missing``: option → name of an environment variable that is not set.
    """

    values: dict[str, Any] = field(repr=False)
    origins: dict[str, str]
    missing: dict[str, str]


def resolve_options(
    provider: Provider, layers: Sequence[OptionLayer], environ: Mapping[str, str] = os.environ
) -> ResolvedOptions:
    """Lay the layers over one another, the last on top, and the environment over the files.

    A variable named by ``FromEnvironment`` goes over what a file says, but neither over what was
    passed in Python nor over a ``"$NAME"`` reference, which is the environment already.
    Raises ``ConfigurationError`` for a key written in plain in a file.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name, variable in environment_options(provider.options):
        layer = next((one for one in reversed(layers) if name in one.values), None)
        if layer is None or not (layer.plain_keys or _is_reference(layer.values[name])):
            if environ.get(variable):
                values[name], origins[name] = environ[variable], f"environment {variable}"
    for layer in reversed(layers):
        for name, value in layer.values.items():
            if name not in values and name not in missing:
                _take(provider, layer, name, value, environ, values, missing)
                origins[name] = layer.origin
    return ResolvedOptions(values=values, origins=origins, missing=missing)


def _take(
    provider: Provider,
    layer: OptionLayer,
    name: str,
    value: Any,
    environ: Mapping[str, str],
    values: dict[str, Any],
    missing: dict[str, str],
) -> None:
    if _is_reference(value):
        variable = _REFERENCE.fullmatch(value).group(1)  # type: ignore[union-attr]
        if environ.get(variable):
            values[name] = environ[variable]
        else:
            missing[name] = variable
    elif not layer.plain_keys and isinstance(value, str) and is_secret(provider.options, name):
        raise ConfigurationError(
            f"{name} of provider {provider.name!r} is written in plain in {layer.origin}: keys do "
            f'not belong there. Write {name} = "$YOUR_VARIABLE" and set that variable'
        )
    else:
        values[name] = value


def _is_reference(value: object) -> bool:
    return isinstance(value, str) and _REFERENCE.fullmatch(value) is not None


def environment_options(options: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """The options that an environment variable supplies, with the variable's name."""
    for name, described in options.model_fields.items():
        for mark in described.metadata:
            if isinstance(mark, FromEnvironment):
                yield name, mark.name


def is_secret(options: type[BaseModel], name: str) -> bool:
    """Whether an option holds a key, by its type: SecretStr, or a callable that returns one."""
    described = options.model_fields.get(name)
    return described is not None and any(_secret_types(described.annotation))


def _secret_types(annotation: Any) -> Iterator[bool]:
    from pydantic import SecretBytes, SecretStr

    yield annotation in (SecretStr, SecretBytes)
    yield typing.get_origin(annotation) is Callable or annotation is Callable
    for argument in typing.get_args(annotation):
        if not isinstance(argument, list):
            yield from _secret_types(argument)


def options_fingerprint(provider: str, model: str, options: BaseModel, info: ModelInfo) -> str:
    """A name for everything that decides the vectors, so that two sets never mix unnoticed.

    Every option counts, the base URL included, but secrets and those marked ``KeepsVectors``: a
    mark that is forgotten costs a cache miss, never a mixed set.
    """
    kind = type(options)
    left_out = {
        name
        for name, described in kind.model_fields.items()
        if is_secret(kind, name) or any(isinstance(m, KeepsVectors) for m in described.metadata)
    }
    return _digest(provider, model, info, options.model_dump(mode="json", exclude=left_out))


def embedder_fingerprint(info: ModelInfo) -> str:
    """The same for an embedder built by hand, of which only the ``ModelInfo`` is known."""
    by_hand = {"dimensions": info.dimensions, "endpoint": info.endpoint}
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
