"""Are the tables and links of the README true?"""

from __future__ import annotations

import re
from pathlib import Path

from embedcore.cli import process as exits
from embedcore.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, str]:
    (found,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = [line.strip("|").split("|") for line in found.splitlines()]
    return {row[0].strip().strip("`"): row[1].strip() for row in rows}


def test_the_tables_are_those_of_the_command_line() -> None:
    assert [name.split()[-1] for name in table("Command")] == list(COMMANDS)
    assert {int(code): words for code, words in table("Exit code").items()} == exits.MEANINGS


def test_every_provider_of_the_repository_is_named() -> None:
    folders = {path.parent.name for path in ROOT.glob("providers/*/pyproject.toml")}
    assert set(table("Provider")) == folders


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        page = ROOT / path if path else ROOT / "README.md"
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target
