"""The tables of the reference pages for commands and Python, and the README's size and links."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import embedcore
from embedcore import EmbeddingClient, errors
from embedcore.cli import process as exits
from embedcore.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "docs" / "reference"


def table(page: Path, heading: str) -> dict[str, str]:
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^\| {heading} \|.*\n\|[-|:]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [line.strip("|").split("|") for line in found.splitlines()]
    return {row[0].strip().strip("`"): row[1].strip() for row in rows}


def names(page: Path, heading: str) -> set[str]:
    """What the first cells of a table name, in code, without arguments."""
    cells = " ".join(f"`{cell}`" for cell in table(page, heading))
    return {name.partition("(")[0] for name in re.findall(r"\w+(?:\([^)]*\))?", cells)}


def test_the_tables_are_those_of_the_command_line() -> None:
    page = REFERENCE / "commands.md"
    assert [name.split()[-1] for name in table(page, "Command")] == list(COMMANDS)
    assert {int(code): words for code, words in table(page, "Exit code").items()} == exits.MEANINGS


def test_every_public_name_is_on_the_page_of_python() -> None:
    page = REFERENCE / "python.md"
    methods = {
        name
        for name, _ in inspect.getmembers(EmbeddingClient, inspect.isfunction)
        if not name.startswith("_")
    }
    assert names(page, "Method") == methods
    attributes = {name for name in vars(EmbeddingClient) if not name.startswith("_")} - methods
    assert attributes <= names(page, "Attribute")
    listed = names(page, "Name") | names(page, "Function") | {"EmbeddingClient"}
    known = {name for name in embedcore.__all__ if not hasattr(errors, name)}
    assert listed == known


def test_every_provider_of_the_repository_is_named() -> None:
    folders = {path.parent.name for path in ROOT.glob("providers/*/pyproject.toml")}
    page = ROOT / "docs" / "explanation" / "models-and-fingerprints.md"
    assert set(table(page, "Provider")) == folders


def test_the_benchmarks_that_are_named_are_there() -> None:
    for script in table(ROOT / "docs" / "benchmarks.md", "Script"):
        assert (ROOT / script).is_file(), script


def test_the_readme_is_short_and_leads_somewhere() -> None:
    assert len(README.splitlines()) <= 120
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    # Every page is found from there: by a link, or by one of a page that is linked.
    found = set(re.findall(r"\]\((docs/[^)#]+)", README))
    for page in list(found):
        near = re.findall(r"\]\(([^):#]+\.md)", (ROOT / page).read_text(encoding="utf-8"))
        found |= {
            ((ROOT / page).parent / one).resolve().relative_to(ROOT).as_posix() for one in near
        }
    apart = ("docs/decisions/",)
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith(apart)} <= found
