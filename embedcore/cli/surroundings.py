"""Which files and variables decide how embedcore behaves here?"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from embedcore.cli.checks import Finding, Level
from embedcore.cli.text import without_credentials
from embedcore.cli.trust import record_state
from embedcore.config import Config
from embedcore.configfile import (
    CONFIG_VARIABLE,
    beyond_message,
    limits_beyond,
    nearest_variable,
    policy_budget,
    records,
    search_folders,
    unread_variables,
    user_file,
)
from embedcore.errors import EmbeddingError
from embedcore.trust import TRUST_VARIABLE, trusted_by_environment

_STANDINGS: Final = {
    "named": "named by you: may set everything",
    "found": "found, not named: may set no address elsewhere and no key",
    "trusted": "found, and trusted by you: may set everything",
}
_CERTIFICATES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def configuration(config: Config, problem: EmbeddingError | None) -> Iterator[Finding]:
    """The files that were read, what they choose, and variables that nothing reads."""
    if problem is not None:
        yield _setting("configuration", str(problem), "problem")
    files = [] if config.file is None else [config.file.split(" [")[0]]
    if config.file is None:
        yield _setting("file", "none found: defaults and the environment hold")
    else:
        yield _setting("file", f"{config.file} ({_STANDINGS[config.standing]})")
    mine = user_file()
    if mine is not None and mine.is_file() and str(mine) not in files:
        yield _setting("file", f"{mine} (its limits hold as well)")
        files.append(str(mine))
    policy = policy_budget()
    if policy is not None:
        yield _setting("policy", f"{policy[0]} (its limits hold over every setting)")
        files.append(policy[0])
    for file in files:
        yield from _who_may_write(Path(file))
    yield from _trust()
    yield _setting("model", config.profile(None).model)
    yield _setting("scope", config.scope)
    yield from _unknown_variables()


def network() -> Iterator[Finding]:
    """Proxies and certificates, without the passwords in their addresses."""
    proxies = urllib.request.getproxies()
    for scheme, address in sorted(proxies.items()):
        shown = address if scheme == "no" else without_credentials(address)
        yield Finding(section="network", name=f"{scheme} proxy", value=shown)
    if not proxies:
        yield Finding(section="network", name="proxy", value="none")
    for variable in _CERTIFICATES:
        for path in filter(None, os.environ.get(variable, "").split(_separator(variable))):
            there = Path(path).exists()
            yield Finding(
                section="network",
                name=variable,
                value=path if there else f"{path} does not exist",
                level="ok" if there else "problem",
            )


def _separator(variable: str) -> str:
    """OpenSSL takes several folders; a file's name may hold the separator."""
    return os.pathsep if variable.endswith("_DIR") else "\0"


def _who_may_write(path: Path) -> Iterator[Finding]:
    if os.name != "posix" or not path.is_file():
        return
    mode = path.stat().st_mode
    if mode & 0o002:
        yield _setting("file", f"{path} can be changed by everybody: chmod o-w {path}", "problem")
    elif mode & 0o020:
        yield _setting("file", f"{path} can be changed by its group", "note")
    elif mode & 0o004:
        yield _setting("file", f"{path} can be read by everybody: keep keys out of it", "note")


def _trust() -> Iterator[Finding]:
    """Which files may set everything, and limits that do not hold."""
    for one in records().all():
        state = record_state(one)
        level: Level = "ok" if state == "trusted" else "note"
        yield _setting("trust", f"{one.path} ({state}: {', '.join(one.keys)})", level)
    for path in trusted_by_environment():
        yield _setting("trust", f"{path} ({TRUST_VARIABLE})")
    _, beyond = search_folders()
    path_beyond = None if os.environ.get(CONFIG_VARIABLE) else limits_beyond(beyond)
    if path_beyond is not None:
        yield _setting("limits", beyond_message(path_beyond), "note")


def _unknown_variables() -> Iterator[Finding]:
    for variable in unread_variables():
        near = nearest_variable(variable)
        hint = f"; did you mean {near}?" if near else ""
        yield _setting("environment", f"nothing reads {variable}{hint}", "problem")


def _setting(name: str, value: str, level: Level = "ok") -> Finding:
    return Finding(section="settings", name=name, value=value, level=level)
