"""Every row of the fault catalogue and of the reported cases that is due has a test naming it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
CATALOGUE = REPOSITORY.parent / "shared" / "FAULTS.md"
CASES = REPOSITORY.parent / "shared" / "cases" / "README.md"

# Rows of work that has not begun, with the reason. A row that has a test does not belong here.
NOT_YET = {
    139: "no CSV is written",
}
CASES_NOT_YET = {
    **dict.fromkeys(("F3", "F4", "F5", "F6", "F10", "F12"), "files at scale"),
    "G1": "a front for single texts",
    "H7": "the current GenAI conventions of OpenTelemetry",
}


def catalogue() -> dict[int, str]:
    """Number → what goes wrong."""
    if not CATALOGUE.is_file():
        pytest.skip("the fault catalogue is not beside the repository")
    text = CATALOGUE.read_text(encoding="utf-8")
    # A fault may hold a bar of its own, written with a backslash before it.
    rows = re.findall(r"^\| (\d+) \| ((?:\\\||[^|])+) \|", text, re.M)
    return {int(number): fault.strip() for number, fault in rows}


def cases() -> set[str]:
    """The reported cases, as "A1"."""
    if not CASES.is_file():
        pytest.skip("the cases are not beside the repository")
    return set(re.findall(r"^\| ([A-Z]\d+) \|", CASES.read_text(encoding="utf-8"), re.M))


@cache
def with_tests(mark: str = "fault") -> dict[Any, set[str]]:
    """Row → the files whose tests name it, found without running them."""
    found: dict[Any, set[str]] = {}
    folders = [REPOSITORY / "tests", *(REPOSITORY / "providers").glob("*/tests")]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for row in marks(calls(path), mark):
            found.setdefault(row, set()).add(path.relative_to(REPOSITORY).as_posix())
    return found


@cache
def calls(path: Path) -> list[ast.Call]:
    """Every call of a mark with arguments in a file."""
    return marked(path.read_text(encoding="utf-8"))


def marked(source: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Attribute)
        and node.func.value.attr == "mark"
        and isinstance(node.func.value.value, ast.Name)
        and node.func.value.value.id == "pytest"
    ]


def marks(calls: list[ast.Call], mark: str = "fault") -> list[Any]:
    """What every ``pytest.mark.fault(number)``, or another mark, names in them."""
    return [
        argument.value
        for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr == mark
        for argument in node.args
        if isinstance(argument, ast.Constant)
    ]


def test_every_row_that_is_due_has_a_test():
    have = with_tests()
    missing = {
        number: fault
        for number, fault in catalogue().items()
        if number not in have and number not in NOT_YET
    }
    assert not missing, "\n".join(f"{number}: {fault}" for number, fault in missing.items())


def test_every_case_that_is_due_has_a_test():
    assert sorted(cases() - set(with_tests("case")) - set(CASES_NOT_YET)) == []


def test_a_case_that_is_put_off_has_no_test_yet():
    named = with_tests("case")
    assert {case: files for case, files in named.items() if case in CASES_NOT_YET} == {}


def test_there_is_a_case_for_every_name_that_a_test_gives():
    known = cases()
    assert {case: files for case, files in with_tests("case").items() if case not in known} == {}
    assert set(CASES_NOT_YET) <= known


def test_a_row_that_is_put_off_has_no_test_yet():
    assert {
        number: sorted(files) for number, files in with_tests().items() if number in NOT_YET
    } == {}


def test_there_is_a_row_for_every_number_that_a_test_names():
    rows = catalogue()
    assert {n: sorted(files) for n, files in with_tests().items() if n not in rows} == {}
    assert set(NOT_YET) <= set(rows)


def test_the_catalogue_is_read_whole():
    rows = catalogue()
    assert sorted(rows) == list(range(1, max(rows) + 1))
    assert len(rows) >= 149


def test_marks_are_found_wherever_they_are_put():
    source = """
import pytest
pytestmark = [pytest.mark.fault(1)]
@pytest.mark.fault(2)
@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.fault(3)), "fault(4)"])
def test_one(x): ...
class TestThing:
    @pytest.mark.fault(5)
    def test_two(self): ...
# @pytest.mark.fault(6)
"""
    assert sorted(marks(marked(source))) == [1, 2, 3, 5]
