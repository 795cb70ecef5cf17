"""Trust: what a settings file may set, by where it comes from.

A layer is *named* by the user: Python, the environment, a file that either of them names, the
user's own configuration folder. It may set everything. Or it is a file that was *found* in the
working directory or above it: that may set what ``_ALLOWED`` lists. It is *trusted*, and may set
everything, once the user allowed its sensitive entries (``embedcore trust``, ``EMBEDCORE_TRUST``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from embedcore.errors import ConfigurationError
from embedcore.folders import expanded
from embedcore.settings import BatchSettings, Limits, RetrySettings

TRUST_VARIABLE: Final = "EMBEDCORE_TRUST"
RECORDS_FOLDER: Final = "trust"

Standing: TypeAlias = Literal["named", "found", "trusted"]
KeyPath: TypeAlias = tuple[str, ...]

_DIGEST_VERSION: Final = 1
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_MOST_SHOWN: Final = 5
_LARGEST_FILE: Final = 4_000_000
# A file whose values are longer gets a line that is before the right one.
_LONGEST_STATEMENT: Final = 500
# Only what every parser of URLs reads alike: no user name, query, fragment, backslash or escape.
_LOCAL_URL: Final = re.compile(
    r"https?://(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?:/[\w./~-]*)?",
    re.ASCII | re.IGNORECASE,
)
_LARGEST_PORT: Final = 65_535


class Permission(Enum):
    """When a found file may set a key without being trusted."""

    ALWAYS = "always"
    NUMBER = "a whole number, true or false"
    LOWERED = "not above what holds without the file"
    NO_OTHER_LIMIT = "while no other layer sets a limit"
    LOOPBACK = "an address on this machine, which is sent no key of the environment"


# The whole list: every other key, and every later one, is sensitive. ``*`` stands for a name.
_ALLOWED: Final[Mapping[KeyPath, Permission]] = {
    **{
        (key,): Permission.ALWAYS
        for key in ("model", "overlong", "on_empty", "strategy", "deadline")
    },
    **{
        (key,): Permission.LOWERED
        for key in ("concurrency", "requests_per_minute", "tokens_per_minute", "texts_per_minute")
    },
    ("scope",): Permission.NO_OTHER_LIMIT,
    # Of any provider: what it means by these, an address or a path is neither.
    ("options", "*", "dimensions"): Permission.NUMBER,
    ("options", "*", "batch"): Permission.NUMBER,
    ("options", "*", "price"): Permission.NO_OTHER_LIMIT,
    ("options", "*", "batch_price"): Permission.NO_OTHER_LIMIT,
    ("options", "*", "base_url"): Permission.LOOPBACK,
    ("models", "*", "dimensions"): Permission.NUMBER,
    ("models", "*", "price"): Permission.NO_OTHER_LIMIT,
    ("models", "*", "batch_price"): Permission.NO_OTHER_LIMIT,
    # Limits of all layers hold together, so that these can only tighten.
    **{
        ("budget", *place, limit): Permission.ALWAYS
        for place in ((), ("all_scopes",), ("scopes", "*"))
        for limit in Limits.model_fields
    },
    ("budget", "query_share"): Permission.ALWAYS,
    **{("retry", key): Permission.LOWERED for key in ("attempts", "quota", "quota_ratio")},
    **{("batch", key): Permission.LOWERED for key in ("parts", "attempts", "enqueued_tokens")},
    **{
        ("batch", key): Permission.ALWAYS
        for key in (
            *("grace", "look_again", "watch", "output_wait", "input_wait"),
            *("quickest", "drain_before"),
        )
    },
}
# A found file that says less sets this: what is believed to be lost sooner may be billed again, or
# be billed and not counted.
_LEAST_SECONDS: Final[Mapping[KeyPath, float]] = {
    ("batch", "grace"): 60.0,
    ("batch", "watch"): 3_600.0,
    ("batch", "output_wait"): 60.0,
}
_LEAST: Final = "the least that a found file may set"
# What options and facts say of prices.
PRICES: Final = frozenset({"price", "batch_price"})
LOWERED_KEYS: Final = tuple(key for key, how in _ALLOWED.items() if how is Permission.LOWERED)
_TABLES: Final = frozenset(key[:depth] for key in _ALLOWED for depth in range(1, len(key))) | {
    ("profiles",),
    ("profiles", "*"),
}
_DEFAULTS: Final = {"retry": RetrySettings(), "batch": BatchSettings()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One value of a file, by the keys that lead to it."""

    path: KeyPath
    value: Any = field(repr=False)

    @property
    def key(self) -> str:
        """The keys as TOML writes them, with dots between."""
        return ".".join(_written(part) for part in self.path)

    @property
    def permission(self) -> Permission | None:
        """When a found file may set it; None: only if it is trusted."""
        return _ALLOWED.get(_listed(self.path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Others:
    """What the layers say that the user named.

    ``limited``: one of them sets a limit. ``lowest``: of the ``LOWERED_KEYS``, the least value that
    one of them sets, and the name of that layer.
    """

    limited: bool = False
    lowest: Mapping[KeyPath, tuple[float, str]] = field(default_factory=dict)


def may_set(standing: Standing, entry: Entry, others: Others) -> bool:
    """Whether a layer of that standing may set this. Everything that asks, asks here."""
    if standing != "found" or _sets_nothing(entry):
        return True
    permission = entry.permission
    if permission is Permission.LOWERED:
        named = others.lowest.get(_listed(entry.path))
        return _within_default(entry) or (named is not None and _at_most(entry, named[0]))
    if permission is Permission.NUMBER:
        return isinstance(entry.value, int)
    if permission is Permission.NO_OTHER_LIMIT:
        return not others.limited
    if permission is Permission.LOOPBACK:
        return is_loopback(entry.value)
    return permission is Permission.ALWAYS


def entries(table: Mapping[str, Any]) -> list[Entry]:
    """Every value of a table and of the tables in it, in their order."""
    found: list[Entry] = []
    # Not by recursion: a file may nest its tables as deeply as it likes.
    waiting: list[tuple[KeyPath, Any]] = [((), table)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping) and (value or not path):
            waiting += [((*path, key), inner) for key, inner in reversed(list(value.items()))]
        else:
            found.append(Entry(path=path, value=value))
    return found


def sensitive(table: Mapping[str, Any]) -> list[Entry]:
    """What trust is about: all that some circumstances forbid a found file to set, and addresses.

    It depends on the file alone, so that what was trusted once is trusted in every environment.
    """
    strictest = Others(limited=True)
    return [
        entry
        for entry in entries(table)
        if entry.permission is Permission.LOOPBACK or not may_set("found", entry, strictest)
    ]


def digest(found: Sequence[Entry]) -> str:
    """SHA-256 of sensitive entries, as 64 hexadecimal digits; their order does not matter."""
    listed = sorted((list(entry.path), entry.value) for entry in found)
    try:
        canonical = json.dumps(
            [_DIGEST_VERSION, listed], sort_keys=True, separators=(",", ":"), default=_tagged
        )
    except ValueError:
        # Python writes no number of thousands of digits.
        raise ConfigurationError("a number in the settings is too long") from None
    return hashlib.sha256(canonical.encode()).hexdigest()


def bounded(
    table: Mapping[str, Any], others: Others, standing: Standing
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The table of a found file within its bounds, and whose each number is that was changed.

    Those are the numbers of the other layers where they are lower, and the least times of a batch.
    What was trusted stays as it is.
    """
    granted = {one.path for one in sensitive(table)} if standing == "trusted" else set()
    settings: dict[str, Any] = deepcopy(dict(table))
    origins: dict[KeyPath, str] = {}
    least = _LEAST_SECONDS if standing == "found" else {}
    for entry in entries(table):
        key = _listed(entry.path)
        lowest = others.lowest.get(key)
        if key in least and _at_most(entry, least[key]):
            bound = least[key], _LEAST
        elif lowest and entry.path not in granted and not _at_most(entry, lowest[0]):
            bound = lowest
        else:
            continue
        inner = reduce(lambda outer, name: outer[name], entry.path[:-1], settings)
        inner[entry.path[-1]], origins[entry.path] = bound
    return settings, origins


def is_loopback(url: object) -> bool:
    """Whether an address surely leads to this machine, whatever parser of URLs reads it."""
    found = _LOCAL_URL.fullmatch(url) if isinstance(url, str) else None
    if found is None or (found["port"] and not 0 < int(found["port"]) <= _LARGEST_PORT):
        return False
    host = found["host"].lower().strip("[]")
    if host == "localhost":
        return True
    import ipaddress

    try:
        # Takes no address in a spelling of its own: 127.1, 0x7f000001, 2130706433, 0177.0.0.1.
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _sets_nothing(entry: Entry) -> bool:
    return entry.value == {} and _listed(entry.path) in _TABLES


def _listed(path: KeyPath) -> KeyPath:
    """The path as ``_ALLOWED`` has it: a profile may set what may be set outside of one."""
    if path[:1] == ("profiles",):
        if len(path) <= 2:
            return ("profiles", "*")[: len(path)]
        path = path[2:]
        if path[0] == "options":
            return ("options", "*", *path[1:])
    elif path[:1] in (("options",), ("models",)) and len(path) > 1:
        return (path[0], "*", *path[2:])
    if path[:2] == ("budget", "scopes") and len(path) > 2:
        return ("budget", "scopes", "*", *path[3:])
    return path


def _within_default(entry: Entry) -> bool:
    section, *keys = _listed(entry.path)
    default: Any = reduce(getattr, keys, _DEFAULTS[section]) if section in _DEFAULTS else None
    return _at_most(entry, math.inf if default is None else default)


def _at_most(entry: Entry, bound: float) -> bool:
    value = entry.value
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= bound


def _tagged(value: object) -> dict[str, str]:
    """A date or a time, so that it is no text of the same letters."""
    return {type(value).__name__: str(value)}


def _written(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else json.dumps(key)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFile:
    """A settings file that was found, as it was read: one look decides about all of it.

    ``table``: the settings in it; ``below``: the keys that lead to them. ``owner_problem``: why it
    must not be used, by its owner and its permissions.
    """

    path: Path
    text: str = field(repr=False)
    table: dict[str, Any] = field(repr=False)
    below: KeyPath = ()
    owner_problem: str | None = None

    def line_of(self, path: KeyPath) -> int:
        """The line, counted from 1, on which the statement begins that sets this key."""
        return line_of(self.text, (*self.below, *path))

    def refusal(self, refused: Sequence[Entry], why: str) -> str:
        """The message for entries that it may not set. Names no value: it may be a key."""
        shown = [f"{one.key} (line {self.line_of(one.path)})" for one in refused[:_MOST_SHOWN]]
        more = f" and {len(refused) - _MOST_SHOWN} more" if len(refused) > _MOST_SHOWN else ""
        quoted = shlex.quote(str(self.path))
        lines = [
            f"{self.path} sets {', '.join(shown)}{more}.",
            "Nothing was sent: the file was found in the working directory or above it.",
            f"Such a file may not set that {why}.",
            "If you trust it, look at it and run:",
            f"  embedcore trust {quoted}",
            "In CI, containers and cron name it instead:",
            f"  EMBEDCORE_CONFIG={quoted}",
        ]
        return "\n".join(lines)


NOT_NAMED: Final = "unasked"
UNDER_A_LIMIT: Final = "while there are limits that it did not set itself"


def read_found(path: Path) -> FoundFile | None:
    """The file of that name, opened once, with its owner checked; None if there is none.

    ``table`` holds the whole file. Raises ``ConfigurationError`` for one that cannot be read.
    """
    found = _looked_at(path)
    if isinstance(found, str):
        raise ConfigurationError(f"{path} {found}")
    return found


def _looked_at(path: Path) -> FoundFile | str | None:
    """The file, or what is wrong with it: the frame that raises that must not have its text."""
    try:
        # A pipe would wait for a writer.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            os.close(descriptor)
            return None if stat.S_ISDIR(info.st_mode) else "is not a regular file"
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        problem = _owner_problem(path, info)
    except FileNotFoundError:
        return "is a link to a file that does not exist" if path.is_symlink() else None
    except OSError as error:
        # Windows opens no folder.
        return None if path.is_dir() else f"cannot be read: {error.strerror}"
    if len(content) > _LARGEST_FILE:
        return problem or f"is larger than {_LARGEST_FILE:,} bytes, which no settings are"
    read = parsed(content)
    if isinstance(read, str):
        return problem or read
    return FoundFile(path=path, text=read[0], table=read[1], owner_problem=problem)


def parsed(content: bytes) -> tuple[str, dict[str, Any]] | str:
    """A file's text and its table, or why it has none, in words that quote nothing of it."""
    try:
        text = content.decode("utf-8-sig")
        return text, tomllib.loads(text)
    except RecursionError:
        return "is not valid TOML: its values are nested too deeply"
    except ValueError as error:
        return f"is not valid TOML: {error}"


def _owner_problem(path: Path, info: os.stat_result) -> str | None:
    """Why a found file must not be used: another user could have written it."""
    if os.name != "posix":
        return None
    problem = owner_problem(info.st_uid, info.st_mode, user=os.geteuid())
    link = path.lstat()
    if problem is None and stat.S_ISLNK(link.st_mode):
        # Where a link leads was decided by its owner.
        if link.st_uid not in (0, os.geteuid()):
            problem = f"is a link that belongs to another user (uid {link.st_uid})"
    elif problem is None and not os.path.samestat(link, info):
        # To take a link away after it was followed must not hide whose it was.
        problem = "was replaced while it was read"
    if problem is None:
        return None
    return (
        f"{problem}:\nits settings are not used, and its limits would not hold. Mend that, or, if "
        f"you\ntrust it, name it:\n  EMBEDCORE_CONFIG={shlex.quote(str(path))}"
    )


def owner_problem(owner: int, mode: int, *, user: int) -> str | None:
    """The same by the numbers alone. The user's own file may be writable by a group."""
    if owner not in (0, user):
        return f"belongs to another user (uid {owner})"
    if mode & stat.S_IWOTH:
        return "can be changed by everybody (chmod o-w)"
    if owner != user and mode & stat.S_IWGRP:
        return "belongs to root and can be changed by a group (chmod g-w)"
    return None


def line_of(text: str, path: KeyPath) -> int:
    """The line, counted from 1, on which the statement begins that sets a key of a TOML text.

    The parser itself decides, whatever way the key is written: a text that is cut off within a
    statement is no TOML, so that the first whole one that has the key ends with its statement.
    """
    lines = text.split("\n")

    def tables(counts: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for count in islice(counts, _LONGEST_STATEMENT):
            with suppress(ValueError, RecursionError):
                yield count, tomllib.loads("\n".join(lines[:count]) + "\n")

    # The first ``before`` lines are whole and do not have it; the first ``until`` are and do.
    before, until = 0, len(lines)
    while until - before > 1:
        middle = (before + until) // 2
        whole = tables(chain(range(middle, before, -1), range(middle + 1, until)))
        count, table = next(whole, (0, None))
        if table is None:
            break
        before, until = (before, count) if _has(table, path) else (count, until)
    return before + 1


def _has(table: Any, path: KeyPath) -> bool:
    for key in path:
        if not isinstance(table, Mapping) or key not in table:
            return False
        table = table[key]
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What the user trusted: a file, and the digest of its sensitive entries at that time."""

    path: Path
    sha256: str
    keys: tuple[str, ...] = ()


class Records:
    """What this user trusts: one small file for each file, in a folder that only he may change.

    ``folder`` None: there is no place for them, and nothing is recorded.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, path: Path) -> Record | None:
        """What is recorded of the file at this path. Raises ``ConfigurationError``."""
        place = self._place(path)
        return None if place is None else _read_record(place)

    def all(self) -> list[Record]:
        """Every record, by path. Raises ``ConfigurationError`` for one that cannot be read."""
        if self.folder is None or not self.folder.is_dir():
            return []
        found = (_read_record(place) for place in self.folder.glob("*.json"))
        return sorted((one for one in found if one is not None), key=lambda one: one.path)

    def add(self, record: Record) -> None:
        """Trust it from now on, on the disk when this returns."""
        place = self._place(record.path)
        if place is None:
            raise ConfigurationError(
                "there is no home folder to record this in: set XDG_CONFIG_HOME, or "
                f"{TRUST_VARIABLE}={record.path}@{record.sha256}"
            )
        content = json.dumps(
            {"path": str(record.path), "sha256": record.sha256, "keys": list(record.keys)}
        )
        try:
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_privately(place, content)
        except OSError as error:
            raise ConfigurationError(
                f"{place} cannot be written: {error.strerror}. {TRUST_VARIABLE}="
                f"{record.path}@{record.sha256} does the same without a file"
            ) from error

    def remove(self, path: Path) -> bool:
        """Trust it no longer; False if it was not recorded."""
        place = self._place(path)
        if place is None or not place.exists():
            return False
        place.unlink()
        return True

    def _place(self, path: Path) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
        return self.folder / f"{name}.json"


def write_privately(place: Path, content: str) -> None:
    """All of it or nothing, with mode 0600."""
    import tempfile

    descriptor, name = tempfile.mkstemp(dir=place.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_record(place: Path) -> Record | None:
    found = None
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(place, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
            info = os.fstat(file.fileno())
            if os.name == "posix" and (
                info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            ):
                raise ConfigurationError(
                    f"{place} belongs to another user or can be changed by others, and decides "
                    "what is trusted: delete it, and trust the file again"
                )
            found = json.load(file)
        return Record(
            path=Path(found["path"]), sha256=str(found["sha256"]), keys=tuple(found["keys"])
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        if place.is_symlink():
            raise ConfigurationError(
                f"{place} is a link, and decides what is trusted: delete it, and trust the file "
                "again"
            ) from None
        raise ConfigurationError(f"{place} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        problem = f"{place} is damaged: delete it, and trust the file again"
    raise ConfigurationError(problem)


def trusted_by_environment() -> dict[Path, frozenset[str]]:
    """The digests that ``EMBEDCORE_TRUST`` names for each path. Raises ``ConfigurationError``."""
    found: dict[Path, frozenset[str]] = {}
    for part in filter(None, os.environ.get(TRUST_VARIABLE, "").split(os.pathsep)):
        name, _, sha256 = part.rpartition("@")
        path = expanded(name)
        if not _SHA256.fullmatch(sha256.lower()) or not path.is_absolute():
            raise ConfigurationError(
                f"environment variable {TRUST_VARIABLE}: {part!r} is not an absolute path, @ and "
                "64 hexadecimal digits, as embedcore trust FILE shows them"
            )
        path = location(path)
        found[path] = found.get(path, frozenset()) | {sha256.lower()}
    return found


def standing_of(file: FoundFile, asked: Sequence[Entry], records: Records) -> Standing:
    """Whether the user trusts these sensitive entries of a file as they are now."""
    expected, path = digest(asked), location(file.path)
    named = trusted_by_environment().get(path, frozenset())
    record = records.find(path)
    known = record is not None and (record.path, record.sha256) == (path, expected)
    return "trusted" if known or expected in named else "found"


def location(path: Path) -> Path:
    """Where a file lies, by which trust knows it: a link elsewhere to the same file is another."""
    return path.parent.resolve() / path.name
