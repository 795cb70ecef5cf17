"""Embedders with other options: how one is built again, and which values are tried."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from embedcore.provider.hookspecs import KeepsVectors
from embedcore.provider.options import (
    embedder_fingerprint,
    environment_options,
    is_secret,
    options_fingerprint,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

    from embedcore.provider.protocol import Embedder

_ABSENT: Final = object()

# A made-up value of these could reach another machine, or no file.
_LEADS_ELSEWHERE: Final = re.compile(
    r"url|host|port|endpoint|address|server|proxy|path|file|folder|dir|region|cert|verify|version"
)
_WIDTH: Final = re.compile(r"dimension|width")


def options_of(embedder: Embedder) -> BaseModel | None:
    """The options that an embedder keeps in its attribute ``options``, if they are a model."""
    from pydantic import BaseModel

    options = getattr(embedder, "options", None)
    return options if isinstance(options, BaseModel) else None


def fingerprint(embedder: Embedder) -> str:
    """The name that embedcore gives to the set of its vectors."""
    info, options = embedder.info, options_of(embedder)
    if options is None:
        return embedder_fingerprint(embedder)
    return options_fingerprint(info.provider, info.model, options, info)


def keeps_vectors(options: type[BaseModel], name: str) -> bool:
    """Whether an option has the mark ``KeepsVectors``."""
    return any(isinstance(mark, KeepsVectors) for mark in options.model_fields[name].metadata)


def rebuilt(embedder: Embedder, changed: Mapping[str, Any]) -> Embedder | None:
    """An embedder built as this one was, with other options; None if it does not tell how."""
    options = options_of(embedder)
    if options is None or not changed.keys() <= type(options).model_fields.keys():
        return None
    given = {name: getattr(options, name) for name in options.model_fields_set}
    arguments = _arguments(embedder, type(options)(**{**given, **changed}))
    return None if arguments is None else type(embedder)(*arguments)


def _arguments(embedder: Embedder, options: BaseModel) -> list[Any] | None:
    """What its constructor takes: by the names of its own parameters, or of a parent's."""
    for kind in type(embedder).__mro__:
        if "__init__" not in vars(kind):
            continue
        found = _named(embedder, kind, options)
        if found is not None:
            return found
    return None


def _named(embedder: Embedder, kind: type, options: BaseModel) -> list[Any] | None:
    arguments: list[Any] = []
    for parameter in list(inspect.signature(vars(kind)["__init__"]).parameters.values())[1:]:
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            return None
        value = _value(embedder, parameter.name, options)
        if value is _ABSENT:
            return None
        arguments.append(value)
    return arguments if any(each is options for each in arguments) else None


def _value(embedder: Embedder, name: str, options: BaseModel) -> Any:
    if name == "options":
        return options
    if name == "model":
        return embedder.info.model
    return getattr(embedder, name, getattr(embedder, f"_{name}", _ABSENT))


def other_values(embedder: Embedder, named: Mapping[str, Any]) -> dict[str, Any]:
    """Another value for every option that has one which is safe to try; ``named`` goes first.

    An option that ``named`` gives None for is left out.
    """
    options = options_of(embedder)
    if options is None:
        return {}
    found, width = {}, embedder.info.dimensions
    for name in type(options).model_fields:
        value = named[name] if name in named else other_value(options, name, width)
        if value is not None and value != getattr(options, name):
            found[name] = value
    return found


def is_width(name: str) -> bool:
    """Whether an option of this name says how wide vectors are."""
    return _WIDTH.search(name) is not None


def other_value(options: BaseModel, name: str, width: int | None) -> Any:
    """Another value for an option that is safe to try, or None; ``width``: that of the vectors."""
    kind, now = type(options), getattr(options, name)
    if is_secret(kind, name) or _LEADS_ELSEWHERE.search(name):
        return None
    types_there = list(types_of(kind.model_fields[name].annotation))
    for each in types_there:
        if typing.get_origin(each) is Literal:
            return next((value for value in typing.get_args(each) if value != now), None)
    if bool in types_there:
        return not now
    if int in types_there:
        return _other_number(now, width if is_width(name) else None)
    if float in types_there and now is not None:
        return now * 2 or 0.5
    if str in types_there:
        return f"{now}2" if now else "other"
    return None


def _other_number(now: int | None, width: int | None) -> int | None:
    if width is not None:
        return max((now or width) // 2, 1)
    return None if now is None else now + 1


def types_of(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the type itself; what ``Annotated`` adds is left out."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for each in typing.get_args(annotation):
            yield from types_of(each)
    elif origin is typing.Annotated:
        yield from types_of(typing.get_args(annotation)[0])
    else:
        yield annotation


def secret_options(embedder: Embedder) -> list[str]:
    """The names of its options that hold a key."""
    from pydantic import SecretStr

    options = options_of(embedder)
    if options is None:
        return []
    return [
        name for name in type(options).model_fields if isinstance(getattr(options, name), SecretStr)
    ]


def variables(embedder: Embedder) -> list[str]:
    """The environment variables that supply options which this embedder was given by hand."""
    options = options_of(embedder)
    if options is None:
        return []
    return [
        variable
        for name, variable in environment_options(type(options))
        if name in options.model_fields_set
    ]
