"""``embedcore trust``: allows a settings file that was found to set everything."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, Final

import click

from embedcore.cli.config import shown_value
from embedcore.cli.options import talking
from embedcore.cli.process import FAILED, OK, USAGE
from embedcore.cli.screen import Screen
from embedcore.cli.text import facts, plural, shown_path
from embedcore.config import (
    CONFIG_VARIABLE,
    FILE_NAME,
    PYPROJECT,
    Config,
    origin_of,
    records,
    settings_at,
    validated,
)
from embedcore.errors import ConfigurationError
from embedcore.folders import expanded
from embedcore.trust import (
    TRUST_VARIABLE,
    Entry,
    FoundFile,
    Others,
    Permission,
    Record,
    digest,
    location,
    may_set,
    sensitive,
    standing_of,
)

_QUESTION: Final = "Trust this file to set them?"
_ADDED: Final = {
    Permission.LOWERED: "more than by default",
    Permission.NO_OTHER_LIMIT: "while you set limits, too",
    Permission.LOOPBACK: "your texts, and keys of your environment, go there",
}


@click.command(name="trust")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--list", "listing", is_flag=True, help="The files that are trusted.")
@click.option("--revoke", is_flag=True, help="Trust FILE no longer.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@talking
@click.pass_obj
def command(screen: Screen, file: Path | None, listing: bool, revoke: bool, yes: bool) -> int:
    """Let FILE set what a file that is only found may not set, such as base_url and keys.

    Settings of the working directory and above it are used without being asked for, so that they
    may come from someone else: see docs/explanation/trust.md. What FILE sets of that kind is shown,
    and trusted for your user until it changes; other edits do not matter.
    """
    if listing == (file is not None) or (listing and revoke):
        raise click.UsageError("name one FILE, or --list")
    if file is None:
        return _list(screen)
    path = location(expanded(file))
    return _revoke(screen, path) if revoke else _trust(screen, path, yes=yes)


def _trust(screen: Screen, path: Path, *, yes: bool) -> int:
    found = _read(path)
    config = validated(found.table, origin_of(found))
    asked = sensitive(found.table)
    sha256 = digest(asked)
    already = bool(asked) and standing_of(found, asked, records()) == "trusted"
    if asked:
        _show(screen, found, config, asked)
    agreed = already or not asked or yes or (screen.interactive and screen.ask(_QUESTION))
    if agreed and asked and not already:
        records().add(Record(path=path, sha256=sha256, keys=tuple(one.key for one in asked)))
    screen.json(
        {
            "path": str(path),
            "sha256": sha256,
            "variable": f"{TRUST_VARIABLE}={path}@{sha256}",
            "settings": [_described(found, config, one) for one in asked],
            "trusted": agreed and bool(asked),
        }
    )
    screen.result(_outcome(path, sha256, asked=bool(asked), already=already, agreed=agreed))
    return OK if agreed else USAGE


def _outcome(path: Path, sha256: str, *, asked: bool, already: bool, agreed: bool) -> str:
    if not asked:
        return f"{shown_path(path)} sets nothing that needs trust"
    if agreed:
        now = "It is trusted already" if already else "It is trusted from now on"
        return f"{now}, until one of these changes."
    return (
        "Nothing was recorded; --yes does it without asking. Elsewhere, where nothing can be "
        f"recorded:\n  {TRUST_VARIABLE}={shlex.quote(f'{path}@{sha256}')}\n"
        f"or, whatever it will set:\n  {CONFIG_VARIABLE}={shlex.quote(str(path))}"
    )


def _read(path: Path) -> FoundFile:
    if path.name not in (FILE_NAME, PYPROJECT):
        raise ConfigurationError(
            f"{path} is not a file that is looked for: that are {FILE_NAME} and {PYPROJECT}. "
            f"Another one is named, and then trusted: {CONFIG_VARIABLE}={shlex.quote(str(path))}"
        )
    found = settings_at(path)
    if found is None:
        raise ConfigurationError(f"there are no settings of embedcore in {path}")
    if found.owner_problem is not None:
        raise ConfigurationError(f"{path} {found.owner_problem}")
    return found


def _described(found: FoundFile, config: Config, entry: Entry) -> dict[str, Any]:
    return {
        "setting": entry.key,
        "line": found.line_of(entry.path),
        "value": shown_value(config, entry.path, entry.value),
        "allowed_without": may_set("found", entry, Others()),
    }


def _show(screen: Screen, found: FoundFile, config: Config, asked: list[Entry]) -> None:
    rows = []
    for entry in asked:
        added = _ADDED.get(entry.permission) if entry.permission else None
        value = shown_value(config, entry.path, entry.value) or ""
        rows.append((str(found.line_of(entry.path)), entry.key, value, added or ""))
    screen.result(f"{shown_path(found.path)} sets:")
    screen.table(("LINE", "SETTING", "VALUE", "WHAT TRUST ADDS"), rows, numbers={0})


def _list(screen: Screen) -> int:
    rows = [(one, record_state(one)) for one in records().all()]
    by_variable = os.environ.get(TRUST_VARIABLE)
    screen.json(
        {
            "files": [
                {"path": str(one.path), "sha256": one.sha256, "state": state} for one, state in rows
            ],
            "variable": by_variable,
        }
    )
    lines = [(state, f"{shown_path(one.path)}: {', '.join(one.keys)}") for one, state in rows]
    if by_variable:
        lines.append((TRUST_VARIABLE, by_variable))
    screen.result(facts(lines) if lines else "no file is trusted")
    return OK


def record_state(record: Record) -> str:
    """Whether the record still fits the file."""
    try:
        found = settings_at(record.path)
    except ConfigurationError:
        return "unusable"
    if found is None:
        return "gone"
    if found.owner_problem is not None:
        return "unusable"
    return "trusted" if digest(sensitive(found.table)) == record.sha256 else "changed"


def _revoke(screen: Screen, path: Path) -> int:
    removed = records().remove(path)
    screen.json({"path": str(path), "revoked": removed})
    screen.result(
        f"{shown_path(path)} is not trusted any more"
        if removed
        else f"{shown_path(path)} was not trusted; {plural(len(records().all()), 'file')} trusted"
    )
    return OK if removed else FAILED
