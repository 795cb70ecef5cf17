"""No page, message or requirement names a package of ours on an index: none is registered."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.case("F9")

ROOT = Path(__file__).parents[1]
# Where such a name is spoken of, or is a test's own.
_APART = ("docs/decisions/", "tests/", "CHANGELOG.md")


def texts() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no clone: the files of the project are not listed")
    names = [name for name in listed.stdout.splitlines() if not name.startswith(_APART)]
    kinds = {".md", ".py", ".toml", ".txt", ""}
    return [ROOT / name for name in names if Path(name).suffix in kinds]


def ours() -> set[str]:
    projects = [ROOT / "pyproject.toml", *ROOT.glob("providers/*/pyproject.toml")]
    return {tomllib.loads(path.read_text())["project"]["name"] for path in projects}


def test_no_command_installs_a_name_that_is_not_ours() -> None:
    for path in texts():
        text = path.read_text(encoding="utf-8", errors="replace")
        for command in re.findall(r"pip install ([^\n`#]*)", text):
            named = [word.strip("\"'") for word in command.split() if "/" not in word]
            assert not [word for word in named if word.startswith("embedcore")], (path, command)


def test_no_link_leads_to_a_page_of_an_index_that_is_not_ours() -> None:
    for path in texts():
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not re.search(r"pypi\.org/(project|simple)/embedcore", text), path


def test_no_extra_asks_an_index_for_a_distribution_of_ours() -> None:
    templates = ROOT.glob("embedcore/cli/templates/*/pyproject.toml.txt")
    for path in [ROOT / "pyproject.toml", *templates]:
        extras = tomllib.loads(path.read_text())["project"].get("optional-dependencies", {})
        for name, wanted in extras.items():
            assert not [one for one in wanted if one.startswith("embedcore")], (path, name)
    # A provider needs embedcore itself, and is installed beside it.
    for path in ROOT.glob("providers/*/pyproject.toml"):
        wanted = tomllib.loads(path.read_text())["project"]["dependencies"]
        found = {re.match(r"[\w-]+", one)[0] for one in wanted}  # type: ignore[index]
        assert found & ours() == {"embedcore"}
