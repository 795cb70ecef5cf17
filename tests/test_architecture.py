"""Every name in docs/architecture.md and the decisions is in the file where it is said to be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import embedcore

PACKAGE = Path(embedcore.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
PAGES = [PAGE, *sorted(PAGE.parent.glob("decisions/*.md"))]
NAMED = sorted(
    {
        found
        for page in PAGES
        for found in re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text(encoding="utf-8"))
    }
)


def names_in(path: Path) -> set[str]:
    """Functions, classes and their methods, as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = (one for one in node.body if isinstance(one, ast.FunctionDef))
            found |= {f"{node.name}.{one.name}" for one in inner}
    return found


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_the_page_names_is_there(file: str, name: str) -> None:
    assert name in names_in(PACKAGE / file)


def test_about_thirty_rules_are_named() -> None:
    assert len(NAMED) >= 30


def test_every_file_that_the_page_names_is_there() -> None:
    found = [re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")) for page in PAGES]
    assert found[0]
    for name in {name for names in found for name in names}:
        assert (PACKAGE / name).is_file() or (PACKAGE.parent / name).is_file(), name
