"""How a provider is found: one entry point, one hook, one value.

A distribution ``embedcore-acme`` declares ::

    [project.entry-points.embedcore]
    acme = "embedcore_acme.plugin"

and that module holds ::

    from embedcore.provider.hookspecs import Provider, hookimpl

    @hookimpl
    def embedcore_provider():
        return Provider(name="acme", options=AcmeOptions, create=create)

A distribution that only observes declares ``[project.entry-points."embedcore.observers"]`` instead,
and its module holds ``embedcore_observe``. It is loaded with the first client of a process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import pluggy

from embedcore.provider.types import ModelInfo

if TYPE_CHECKING:
    from pydantic import BaseModel

    from embedcore.events import Event
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import Price

PROJECT: Final = "embedcore"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True)
class FromEnvironment:
    """Marks an option that an environment variable supplies.

    Written ``api_key: Annotated[SecretStr, FromEnvironment("ACME_KEY")]``. The core
    reads it, shows it in ``embedcore config --explain`` and names it when it is missing.
    """

    name: str


@dataclass(frozen=True, slots=True)
class KeepsVectors:
    """Marks an option that cannot change the vectors, such as a time-out.

    Every option without this mark becomes part of the fingerprint, so that vectors made with
    different values never meet in one set. Secrets are left out without a mark.

    ``counted_as``: for an option that was part of it in an earlier version, the default of then, as
    JSON has it: it is hashed in place of every value, so that the sets that exist keep their name.
    """

    counted_as: Any = None


class Probing(Protocol):
    """Finds the options that fit one server. Nothing is sent before ``choose_model``.

    ``reach``: "loopback", "private" or "public". ``most_requests`` and ``most_tokens``: what it may
    take in all; ``tokens``: what it has taken so far.
    """

    tokens: int

    @property
    def most_requests(self) -> int: ...

    @property
    def most_tokens(self) -> int: ...

    @property
    def address(self) -> str: ...

    @property
    def reach(self) -> str: ...

    def choose_model(self) -> tuple[str, list[str]]:
        """The model that is asked, and those that the server lists; this is free."""

    def price_of(self, model: str) -> Price | None: ...

    def run(self) -> dict[str, Any]:
        """What was found: ``options``, ``findings``, ``preset``, ``requests``, ``tokens``, …"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """What a plugin returns.

    ``options``: a pydantic model with ``extra="forbid"``; keys are ``SecretStr``. ``create`` gets
    the model's name and validated options and returns an ``Embedder`` without touching the network.
    ``default_model``: used where the configuration names only the provider.
    ``models``: the models it knows by name, for ``embedcore models``; others may still work.
    ``probe``: called as ``probe(url, model=…, key=…)`` for ``embedcore provider probe``, where a
    server can be asked which options fit it.
    ``known_failures``: tests of ``embedcore.testing`` that it is known to fail, with the reasons.
    """

    name: str
    options: type[BaseModel]
    create: Callable[[str, Any], Embedder]
    models: Mapping[str, ModelInfo] = field(default_factory=dict)
    default_model: str | None = None
    known_failures: Mapping[str, str] = field(default_factory=dict)
    probe: Callable[..., Probing] | None = None


@hookspec
def embedcore_provider() -> Provider:  # type: ignore[empty-body]
    """Return this distribution's provider."""


@hookspec
def embedcore_observe(event: Event) -> None:
    """Be told what happens. An error raised here is logged and changes nothing."""
