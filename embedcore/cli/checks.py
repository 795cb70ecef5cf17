"""What can be looked at on this machine without sending anything?

No check ends the others: what it cannot find out becomes a finding.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal, TypeAlias

from embedcore.choice import choose
from embedcore.cli.providers import Found, found_providers, nothing_installed
from embedcore.cli.settings import environment_settings
from embedcore.config import Config
from embedcore.errors import EmbeddingError
from embedcore.provider import registry
from embedcore.provider.options import environment_options, is_secret

Level: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact. A ``problem`` needs mending; a ``note`` is only unusual."""

    section: str
    name: str
    value: str
    level: Level = "ok"


def findings() -> Iterator[Finding]:
    """Everything, section by section. Never raises an ``EmbeddingError``."""
    from embedcore.cli.cachechecks import cache
    from embedcore.cli.statechecks import state
    from embedcore.cli.surroundings import configuration, network

    config, problem = _config()
    providers = found_providers()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", lambda: _versions(providers)),
        ("providers", lambda: _providers(providers)),
        ("settings", lambda: configuration(config, problem)),
        ("keys", lambda: _keys(config, providers)),
        ("network", network),
        ("state", lambda: state(config)),
        ("cache", lambda: cache(config)),
    ]
    for section, check in checks:
        yield from _guarded(section, check)


def _guarded(section: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except EmbeddingError as error:
        yield Finding(section=section, name="error", value=str(error), level="problem")


def _config() -> tuple[Config, EmbeddingError | None]:
    """The configuration; the defaults if it is wrong."""
    try:
        return Config.load(), None
    except EmbeddingError as error:
        return Config(), error


def _versions(providers: list[Found]) -> Iterator[Finding]:
    yield _version("python", f"{platform.python_version()} ({sys.executable})")
    yield _version("platform", platform.platform())
    shown = {"embedcore": version("embedcore")}
    for name in ["embedcore", *(one.distribution for one in providers)]:
        shown[name] = _installed_version(name)
        # The parts each is made of: a provider's SDK above all.
        for part in _requirements(name):
            shown.setdefault(part, _installed_version(part))
    for name, found in shown.items():
        yield _version(name, found)


def _version(name: str, value: str) -> Finding:
    level: Level = "problem" if value == "not installed" else "ok"
    return Finding(section="versions", name=name, value=value, level=level)


def _requirements(distribution: str) -> list[str]:
    try:
        needed = requires(distribution) or []
    except PackageNotFoundError:
        return []
    # What hangs on an extra or a platform may be absent for good reasons.
    return [re.split(r"[^A-Za-z0-9._-]", need, maxsplit=1)[0] for need in needed if ";" not in need]


def _installed_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _providers(providers: list[Found]) -> Iterator[Finding]:
    for one in providers:
        what = one.problem or f"{one.distribution} {one.version}"
        level: Level = "problem" if one.problem else "ok"
        yield Finding(section="providers", name=one.name, value=what, level=level)
    if not providers:
        yield Finding(section="providers", name="none", value=nothing_installed(), level="problem")


def _keys(config: Config, providers: list[Found]) -> Iterator[Finding]:
    """Which variable supplies each key, and whether it is set; never what it holds."""
    for name in dict.fromkeys(one.name for one in providers if not one.problem):
        provider = registry.load(name)
        secret = [
            f"options.{name}.{option}"
            for option, _ in environment_options(provider.options)
            if is_secret(provider.options, option)
        ]
        for setting in environment_settings(provider, config.options.get(name, {})):
            if setting.path in secret:
                value = setting.value or setting.origin.replace("default; ", "not set: ")
                yield Finding(section="keys", name=name, value=value)
    yield from _references(config)


def _references(config: Config) -> Iterator[Finding]:
    """The variables that the settings refer to."""
    for name in [None, *config.profiles]:
        choice = choose(name, config=config, scope=None, options={})
        resolved = choice.resolve(registry.load(choice.provider))
        for option, variable in resolved.missing.items():
            yield Finding(
                section="keys",
                name=name or choice.provider,
                value=f"{option} refers to ${variable}, which is not set",
                level="problem",
            )
