"""Does every row of the fault catalogue that is due have a test that names it?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CATALOGUE = REPOSITORY.parent / "shared" / "FAULTS.md"

# Rows of work that has not begun, with the reason. A row that has a test does not belong here.
NOT_YET = {
    139: "no CSV is written",
}


def catalogue() -> dict[int, str]:
    """Number → what goes wrong."""
    if not CATALOGUE.is_file():
        pytest.skip("the fault catalogue is not beside the repository")
    text = CATALOGUE.read_text(encoding="utf-8")
    # A fault may hold a bar of its own, written with a backslash before it.
    rows = re.findall(r"^\| (\d+) \| ((?:\\\||[^|])+) \|", text, re.M)
    return {int(number): fault.strip() for number, fault in rows}


def with_tests() -> dict[int, set[str]]:
    """Number → the files whose tests name it, found without running them."""
    found: dict[int, set[str]] = {}
    folders = [REPOSITORY / "tests", *(REPOSITORY / "providers").glob("*/tests")]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for number in marks(path.read_text(encoding="utf-8")):
            found.setdefault(number, set()).add(path.relative_to(REPOSITORY).as_posix())
    return found


def marks(source: str) -> list[int]:
    """The numbers of every ``pytest.mark.fault(number)`` in a file."""
    return [
        argument.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault"
        for argument in node.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
    ]


def test_every_row_that_is_due_has_a_test():
    have = with_tests()
    missing = {
        number: fault
        for number, fault in catalogue().items()
        if number not in have and number not in NOT_YET
    }
    assert not missing, "\n".join(f"{number}: {fault}" for number, fault in missing.items())


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
    assert sorted(marks(source)) == [1, 2, 3, 5]
