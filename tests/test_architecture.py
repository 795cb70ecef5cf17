"""Every name in the tables of docs/architecture.md is in the file where it is said to be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import embedcore

PACKAGE = Path(embedcore.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
NAMED = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE.read_text(encoding="utf-8"))))


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
    named = re.findall(r"`([\w/]+\.py)`", PAGE.read_text(encoding="utf-8"))
    assert named
    for name in named:
        assert (PACKAGE / name).is_file() or (PACKAGE.parent / name).is_file(), name
