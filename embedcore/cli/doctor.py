"""``embedcore doctor``: what is installed and set here, and what is wrong or unusual about it.

No check ends the others: what it cannot find out becomes a finding.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import click

from embedcore import money
from embedcore.assembly import STATE_FILE, create_embedder, keeps_vectors, open_ledger, vector_store
from embedcore.choice import Choice, choose
from embedcore.cli.budget import CLOCK_TOLERANCE_SECONDS
from embedcore.cli.config import environment_settings
from embedcore.cli.models import (
    NOT_INSTALLED,
    Found,
    found_providers,
    installed_version,
    nothing_installed,
    requirements_of,
)
from embedcore.cli.options import talking
from embedcore.cli.screen import Screen
from embedcore.cli.text import duration, facts, one_line, plural, size, without_credentials
from embedcore.cli.trust import record_state
from embedcore.config import (
    CONFIG_VARIABLE,
    Config,
    beyond_message,
    limits_beyond,
    nearest_variable,
    policy_budget,
    records,
    state_folder,
    unread_variables,
    user_file,
)
from embedcore.errors import EmbeddingError
from embedcore.folders import search_folders
from embedcore.policy.cache import room_for
from embedcore.provider import registry
from embedcore.provider.options import environment_options, is_secret
from embedcore.storage.batches import Batches
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.database import SPENDING, driver, engine_version, wal_is_safe
from embedcore.storage.filesystem import network_filesystem
from embedcore.storage.inspection import faults
from embedcore.storage.parts import Parts
from embedcore.storage.standing import standing
from embedcore.storage.usage import named_rates
from embedcore.storage.vector_upkeep import contents
from embedcore.trust import TRUST_VARIABLE, trusted_by_environment

if TYPE_CHECKING:
    from embedcore.provider.types import ModelInfo
    from embedcore.storage.database import Database
    from embedcore.storage.ledger import Ledger
    from embedcore.storage.vectors import VectorStore


Level: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact. A ``problem`` needs mending; a ``note`` is only unusual."""

    section: str
    name: str
    value: str
    level: Level = "ok"


# A problem that is told in a sentence, and recognised where it comes again.
_SENTENCE: Final = 40


def findings() -> Iterator[Finding]:
    """Everything, section by section. Never raises an ``EmbeddingError``."""

    config, problem = _config()
    providers = found_providers()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", lambda: _versions(config, providers)),
        ("providers", lambda: _providers(providers)),
        ("settings", lambda: configuration(config, problem)),
        ("keys", lambda: _keys(config, providers)),
        ("network", network),
        ("state", lambda: state(config)),
        ("cache", lambda: cache(config)),
    ]
    problems: list[str] = []
    for section, check in checks:
        for found in _guarded(section, check):
            # What one thing breaks is found in several places, and is one thing to mend.
            if not any(problem in found.value for problem in problems):
                yield found
            if found.level == "problem" and len(found.value) > _SENTENCE:
                problems.append(found.value)


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


def _versions(config: Config, providers: list[Found]) -> Iterator[Finding]:
    yield _version("python", f"{platform.python_version()} ({sys.executable})")
    yield _version("platform", platform.platform())
    shown = {"embedcore": version("embedcore")}
    used = _in_use(config)
    # A provider that is installed without what it is made of harms those only who use it.
    needed = {"embedcore", *(one.distribution for one in providers if one.name in used)}
    missing: dict[str, Level] = {}
    for name in ["embedcore", *(one.distribution for one in providers)]:
        shown[name] = installed_version(name)
        # The parts each is made of: a provider's SDK above all.
        for part in requirements_of(name):
            shown.setdefault(part, installed_version(part))
            if name in needed or part not in missing:
                missing[part] = "problem" if name in needed else "note"
    for name, found in shown.items():
        yield _version(name, found, missing.get(name, "problem"))


def _version(name: str, value: str, missing: Level = "problem") -> Finding:
    level: Level = missing if value == NOT_INSTALLED else "ok"
    return Finding(section="versions", name=name, value=value, level=level)


def _in_use(config: Config) -> set[str]:
    """The providers that the settings name, as far as that can be said."""
    found = set()
    for profile in [None, *config.profiles]:
        with suppress(EmbeddingError):
            found.add(chosen(profile, config).provider)
    return found


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


_MILLION: Final = 1_000_000
_NEARLY_FULL: Final = 0.9


def cache(config: Config) -> Iterator[Finding]:
    """The cache, for the model that the settings name."""
    choice = chosen(None, config)
    store = vector_store(choice.config, choice.settings)
    info, on = whether_on(choice)
    yield _cache_finding("vectors", on)
    yield _cache_finding("place", str(store.path))
    width = info.dimensions if info is not None else None
    each = f"; a million vectors take about {size(room_for(_MILLION, width))}" if width else ""
    yield _cache_finding("cap", f"{size(store.cap)}{each}")
    yield from _place(store, config)
    if store.files:
        yield from _inside(store)


def chosen(model: str | None, config: Config | None = None) -> Choice:
    """What a client of this model would be made from."""
    return choose(model, config=config, scope=None, options={})


def whether_on(choice: Choice) -> tuple[ModelInfo | None, str]:
    """What is known of the model that is chosen, and whether its vectors are kept, with the why."""
    name = f"{choice.provider}:{choice.model}"
    try:
        embedder, *_ = create_embedder(choice)
    except EmbeddingError as error:
        return None, f"not known for {name}: {error}"
    with closing(embedder):
        info = embedder.info
    on = "kept" if keeps_vectors(choice.settings, info) else "not kept"
    return info, f"{on} for {name}: {_why(choice, info)}"


def _why(choice: Choice, info: ModelInfo) -> str:
    wanted = choice.settings.cache
    if wanted is not None:
        return f"cache = {str(wanted).lower()}"
    if info.local:
        return "it is computed here (cache = true keeps them)"
    if info.price is None:
        return "its price is not known (cache = true keeps them)"
    return "it is free (cache = true keeps them)" if info.price.free else "they cost money"


def _place(store: VectorStore, config: Config) -> Iterator[Finding]:
    folder = next(one for one in store.path.absolute().parents if one.exists())
    kind = None if config.allow_network_filesystem else network_filesystem(folder)
    if kind is not None:
        yield _cache_finding(
            "place",
            f"it is on a network file system ({kind}), where it is not used: set cache_dir to a "
            "local folder, or allow_network_filesystem = true if only one machine uses it",
            "problem",
        )
    elif not os.access(folder, os.W_OK):
        yield _cache_finding("place", f"{folder} cannot be written: nothing is kept", "problem")


def _inside(store: VectorStore) -> Iterator[Finding]:
    for path in store.files:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            yield _cache_finding(
                "file", f"{path} can be read by others: chmod 600 {path}", "problem"
            )
    with closing(store):
        found = contents(store)
    full = found.used > found.cap * _NEARLY_FULL
    room = " and takes no more soon: raise cache_cap, or embedcore cache prune" if full else ""
    level: Level = "note" if full else "ok"
    vectors = sum(found.vectors.values())
    yield _cache_finding("file", f"{vectors:,} vectors, {size(found.used)}{room}", level)
    if found.not_moved is not None:
        yield _cache_finding(
            "old file",
            f"{found.not_moved:,} vectors are in {store.old.path}: they are found there, and "
            "embedcore cache migrate moves them",
            "note",
        )


def _cache_finding(name: str, value: str, level: Level = "ok") -> Finding:
    return Finding(section="cache", name=name, value=value, level=level)


_LONGEST: Final = 300
_MOST_FAULTS: Final = 20


def state(config: Config) -> Iterator[Finding]:
    """SQLite and the state file."""
    engine, name = engine_version(), driver().__name__
    yield _state_finding("SQLite", f"{engine} ({name})")
    if not wal_is_safe(engine):
        yield _state_finding(
            "journal",
            "TRUNCATE instead of WAL, correct but slower: this SQLite can corrupt a WAL file that "
            "several processes write (mended in 3.51.3); pip install pysqlite3 brings a newer one",
            "note",
        )
    folder = state_folder(config)
    path = folder / STATE_FILE
    yield _state_finding("folder", str(folder))
    if not path.exists():
        yield _state_finding("state file", "none yet: nothing was spent from here")
        return
    yield from _who_may_read(path)
    limits = config.limits(config.profile(None), config.scope)
    ledger = open_ledger(config, limits, compare=False)
    with closing(ledger.database):
        yield _state_finding("state file", f"{path}, journal {ledger.database.journal_mode}")
        yield from _agreement(ledger.database)
        moment = ledger.moment()
        yield from _clock(moment.now / MICROSECONDS, moment.zone)
        yield from _batches(ledger)
        yield from _rates(ledger)


def _agreement(database: Database) -> Iterator[Finding]:
    """Whether everything in the file agrees with everything else."""
    found = faults(database)
    for fault in [*map(str, found.counters), *found.others][:_MOST_FAULTS]:
        yield _state_finding("counters", one_line(fault, _LONGEST), "problem")
    more = len(found.counters) + len(found.others) - _MOST_FAULTS
    if more > 0:
        yield _state_finding("counters", f"and {more:,} more", "problem")
    if found.counters:
        yield _state_finding(
            "remedy",
            "embedcore budget recount --repair sets the counters to what the entries add up to, "
            "on the record; or restore a copy",
            "note",
        )
    if found.others:
        yield _state_finding(
            "remedy",
            f"an entry was altered or lost: restore a copy of {database.path}, or delete it while "
            f"no program uses it, to start with {SPENDING.without}",
            "note",
        )
    if not found.counters and not found.others:
        yield _state_finding("counters", "counters and entries agree")


def _rates(ledger: Ledger) -> Iterator[Finding]:
    for one in named_rates(ledger.database):
        parts = [
            f"{number:,} {what}"
            for number, what in (
                (one.requests_per_minute, "requests"),
                (one.tokens_per_minute, "tokens"),
            )
            if number is not None
        ]
        day = datetime.fromtimestamp(one.named, UTC).date()
        yield Finding(
            section="rate limits",
            name=one.model,
            value=f"{' and '.join(parts) or 'none'} per minute, as {one.endpoint} said on {day}",
            level="ok",
        )


def _batches(ledger: Ledger) -> Iterator[Finding]:
    """Those that are open: what is reserved for them, and what they wait for."""
    jobs = Parts(ledger)
    found = [record for record in Batches(ledger).all() if not record.has_ended]
    if not found:
        return
    held = money.in_dollars(sum(standing(ledger, record).spent.held.cost for record in found))
    yield _state_finding(
        "batches",
        f"{len(found):,} open, {money.shown(held)} reserved for them: "
        "embedcore batch status --watch, or embedcore batch resume in a cron job, continues them",
    )
    for record in found:
        troubles = [part.trouble for part in jobs.of_batch(record) if part.trouble]
        for why in dict.fromkeys([*filter(None, [record.blocked]), *troubles]):
            yield _state_finding(record.name, one_line(why, _LONGEST), "note")


def _who_may_read(path: Path) -> Iterator[Finding]:
    if os.name == "posix" and path.stat().st_mode & 0o077:
        yield _state_finding(
            "state file", f"{path} can be read by others: chmod 600 {path}", "problem"
        )


def _clock(now: float, zone: str) -> Iterator[Finding]:
    ahead = now - time.time()
    if ahead > CLOCK_TOLERANCE_SECONDS:
        yield _state_finding(
            "clock",
            f"the clock of the state file is {duration(ahead)} ahead of this computer: everything "
            "is counted by it. If this computer is right: embedcore budget clock --repair",
            "problem",
        )
    else:
        yield _state_finding("clock", f"right; days begin at midnight in {zone}")


def _state_finding(name: str, value: str, level: Level = "ok") -> Finding:
    return Finding(section="state", name=name, value=value, level=level)


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


_MARKS = {"ok": "", "note": "  (note)", "problem": "  (PROBLEM)"}


@click.command(name="doctor")
@talking
@click.pass_obj
def command(screen: Screen) -> int:
    """Versions, providers, settings, keys (never their values), proxies, state and clock.

    Sends nothing. Ends with 1 if it found a problem.
    """
    found = list(findings())
    problems = [one for one in found if one.level == "problem"]
    screen.json({"problems": len(problems), "findings": [asdict(one) for one in found]})
    for section, group in groupby(found, key=lambda one: one.section):
        screen.result(f"{section}\n{facts([_line(one) for one in group], indent='  ')}")
    screen.result(plural(len(problems), "problem") if problems else "no problem found")
    return int(bool(problems))


def _line(one: Finding) -> tuple[str, str]:
    return one.name, f"{one.value}{_MARKS[one.level]}"
