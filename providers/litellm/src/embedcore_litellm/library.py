"""The package litellm: imported once and without the network, its errors, and its prices."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from decimal import Decimal
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    OutcomeUnknown,
    ProviderError,
    ProviderUnavailable,
    RequestRejected,
    TimedOut,
)
from embedcore.forksafe import Lazy
from embedcore.provider.refusals import Asked, translate
from embedcore.provider.types import Price

# At its import it would read prices and other lists from the net.
_OFFLINE: Final = (
    "LITELLM_LOCAL_MODEL_COST_MAP",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS",
    "LITELLM_LOCAL_BLOG_POSTS",
)
# Of exceptions of the libraries below it, by their names: they are several.
_UNREACHABLE: Final = frozenset(
    {"ConnectError", "ConnectTimeout", "ClientConnectorError", "ConnectionRefusedError", "gaierror"}
)
_LATE: Final = frozenset(
    {"ReadTimeout", "WriteTimeout", "PoolTimeout", "APITimeoutError", "TimeoutError", "Timeout"}
)
_MILLION: Final = 1_000_000
# No model costs so much for a million tokens: the table has some prices in other units.
_DEAREST: Final = Decimal(10)

_module: Lazy[ModuleType] = Lazy(shared=True)


def load() -> Any:
    """The module. Raises ``ConfigurationError`` where it is not installed."""
    return _module.get(_imported)


def _imported() -> ModuleType:
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update(dict.fromkeys(_OFFLINE, "True"))
    try:
        module = import_module("litellm")
    except ImportError as error:
        raise ConfigurationError(
            f"litellm:… needs the package litellm ({error}): pip install litellm"
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    # It would print advice on standard output when a request fails. And of several services it
    # takes no number of retries but this one, for which it has 2: each may be billed.
    module.suppress_debug_info = True  # type: ignore[attr-defined]
    module.DEFAULT_MAX_RETRIES = 0  # type: ignore[attr-defined]
    logging.getLogger("LiteLLM").addFilter(_asked_for)
    return module


def _asked_for(record: logging.LogRecord) -> bool:
    """Its lines below WARNING have texts in them, and a handler of its own prints them on standard
    output: only for a program that gave its logger a level, not for one that debugs itself."""
    own = logging.getLogger(record.name).level
    return record.levelno >= logging.WARNING or own != logging.NOTSET


def price_of(model: str) -> Price | None:
    """What its own table says; None if it says nothing, or what cannot be right."""
    table = load().model_cost
    entry = table.get(model) or table.get(model.partition("/")[2]) or {}
    said = entry.get("input_cost_per_token")
    if entry.get("mode") != "embedding" or said is None:
        return None
    price = Decimal(str(said)) * _MILLION
    if not 0 < price <= _DEAREST:
        return None
    return Price(immediate=price, source="the table of the installed litellm")


def translated(error: Exception, asked: Asked) -> EmbeddingError:
    """One of embedcore's errors: by the answer of the service, where there was one.

    litellm gives errors a status of its own, and a response that no one sent: what the service
    answered is at the bottom of the chain.
    """
    chain = list(_causes(error))
    for one in reversed(chain):
        response: Any = getattr(one, "response", None)
        if getattr(response, "headers", None):
            return translate(response.status_code, dict(response.headers), _body(response), asked)
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    what = f"{asked.model} over litellm: {type(chain[-1]).__name__}"
    if names & _UNREACHABLE:
        return ProviderUnavailable(f"{asked.endpoint} cannot be reached ({what})", billed="no")
    if names & _LATE:
        return TimedOut(f"{asked.endpoint} did not answer in time ({what})")
    if "APIConnectionError" in names or "TransportError" in names:
        return OutcomeUnknown(f"the connection to {asked.endpoint} broke ({what})")
    # What it refuses by itself was not sent.
    if "AuthenticationError" in names:
        return AuthenticationFailed(f"{what}: {asked.key_hint}", billed="no")
    if names & {"BadRequestError", "UnsupportedParamsError", "NotFoundError"}:
        said = asked.shown(str(error))
        return RequestRejected(f"{what}: {said}", billed="no")
    return ProviderError(f"the request failed ({what})", billed="unknown")


def _body(response: Any) -> bytes:
    try:
        return bytes(response.content)
    except Exception:  # noqa: BLE001 - it was not read, and cannot be any more
        return b""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
