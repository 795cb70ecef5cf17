"""Does every module import only what its floor may? The table is in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import embedcore

PACKAGE = Path(embedcore.__file__).parent
TABLE = Path(__file__).parents[1] / "docs" / "architecture.md"


@dataclass(frozen=True)
class Import:
    """What a module takes from where; ``target`` is a module of ours as a path, or a library."""

    line: int
    target: str
    ours: bool


@dataclass(frozen=True)
class Source:
    """What a module's source says. ``functions``: (name, lines of the body).

    ``names``: modules of ours that are imported anywhere in it, be it for the type checker alone.
    """

    imports: list[Import]
    names: frozenset[str]
    functions: list[tuple[str, int]]
    doc: str
    lines: int


@cache
def modules() -> dict[str, Path]:
    """Every module as a path without its ending; a package is its folder's ``__init__``."""
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def rows(heading: str) -> list[list[str]]:
    """The cells of the table under the line that begins with ``heading``."""
    text = TABLE.read_text(encoding="utf-8")
    table = text[text.index(heading) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def floor_of(module: str) -> list[str]:
    """The cell that says what ``module`` may import."""
    return [
        may
        for _, names, may in rows("| Floor |")
        if any(fnmatchcase(module, name) for name in quoted(names))
    ]


def allowed(module: str, target: str) -> bool:
    (may,) = floor_of(module)
    folder = module.rpartition("/")[0]
    patterns = quoted(may) + ([f"{folder}/*"] if "own folder" in may else [])
    return may == "everything" or any(fnmatchcase(target, one) for one in patterns)


def within(node: ast.AST) -> Iterator[ast.AST]:
    """The statements directly inside of one. Imports and functions are in no expression."""
    for field in ("body", "handlers", "cases", "orelse", "finalbody"):
        yield from getattr(node, field, ())


def all_of(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        yield node
        yield from all_of(within(node))


def run_time(nodes: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import but those for the type checker alone."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from run_time(node.orelse)
        else:
            yield from run_time(within(node))


@cache
def read(module: str) -> Source:
    """Parsed once for all that is asked of it."""
    source = modules()[module].read_text(encoding="utf-8")
    tree = ast.parse(source)
    statements = list(all_of([tree]))
    functions = [
        (node.name, lines_of(node))
        for node in statements
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    known = set(modules())
    everything = (one for one in statements if isinstance(one, ast.Import | ast.ImportFrom))
    return Source(
        imports=imports(run_time([tree]), known),
        names=frozenset(one.target for one in imports(everything, known) if one.ours),
        functions=functions,
        doc=ast.get_docstring(tree) or "",
        lines=source.count("\n"),
    )


def imports(nodes: Iterable[ast.Import | ast.ImportFrom], known: set[str]) -> list[Import]:
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            target = nearest(rest, known) if first == "embedcore" else first
            found.append(Import(node.lineno, target, first == "embedcore"))
    return found


def nearest(parts: list[str], known: set[str]) -> str:
    """The module that holds the name; ``embedcore`` itself for a public name."""
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        if path in known:
            return path
        if f"{path}/__init__" in known:
            return f"{path}/__init__"
    return "embedcore"


def test_a_module_is_on_one_floor():
    floors = {module: len(floor_of(module)) for module in modules()}
    assert {module: count for module, count in floors.items() if count != 1} == {}, TABLE


def test_a_module_imports_only_what_its_floor_may():
    assert [
        (module, one)
        for module in modules()
        for one in read(module).imports
        if one.ours and not allowed(module, one.target)
    ] == []


# The tree of errors names what the errors carry.
ONE_CIRCLE = {"errors", "policy/result", "provider/types"}


def test_no_modules_import_each_other_not_even_for_the_type_checker():
    """But for the errors. A package's ``__init__`` only passes names on."""
    graph = {
        module: {
            one
            for one in read(module).names & set(modules())
            if not one.endswith("__init__") and not {module, one} <= ONE_CIRCLE
        }
        for module in modules()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_library_stays_behind_its_fence():
    fences = {quoted(name)[0]: quoted(where) for name, where in rows("| Library |")}
    outside = [
        (module, one)
        for module in modules()
        for one in read(module).imports
        if one.target in fences
        and not one.ours
        and not any(fnmatchcase(module, where) for where in fences[one.target])
    ]
    assert outside == []


@cache
def caps() -> tuple[int, int]:
    """Lines of a file and of a function, as the page says them."""
    text = TABLE.read_text(encoding="utf-8")
    found = re.search(r"A file of more than (\d+) lines, or a function of more than (\d+)", text)
    assert found is not None
    return int(found[1]), int(found[2])


def test_a_file_has_one_job():
    assert [module for module in modules() if read(module).lines > caps()[0]] == []


def test_a_function_has_one_job():
    assert [
        (module, name)
        for module in modules()
        for name, lines in read(module).functions
        if lines > caps()[1]
    ] == []


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, without the signature, which may be long, and the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_a_module_says_what_it_is_for():
    for module in modules():
        doc = read(module).doc
        assert doc, module
        assert doc.splitlines()[0].endswith((".", "?", "::", '"')), module


def test_every_row_of_the_tables_is_about_something():
    names = [name for _, cell, _ in rows("| Floor |") for name in quoted(cell)]
    targets = [name for _, _, cell in rows("| Floor |") for name in quoted(cell)]
    fences = [name for _, cell in rows("| Library |") for name in quoted(cell)]
    for name in {*names, *targets, *fences} - {"embedcore"}:
        assert any(fnmatchcase(module, name) for module in modules()), name


SAMPLE = """
from typing import TYPE_CHECKING
import embedcore.storage.ledger
from embedcore import EmbeddingClient
from embedcore.provider import registry, types as t
from embedcore.provider.tokens import utf8_length
if TYPE_CHECKING:
    from embedcore.client import EmbeddingClient as C
    import openai
else:
    import rich
def late():
    try:
        from openai import OpenAI
    except ImportError:
        import httpx.client
"""


def test_the_reader_of_imports_sees_them_all():
    found = imports(run_time([ast.parse(SAMPLE)]), set(modules()))
    assert [(one.target, one.ours) for one in found] == [
        ("typing", False),
        ("storage/ledger", True),
        ("embedcore", True),
        ("provider/registry", True),
        ("provider/types", True),
        ("provider/tokens", True),
        ("rich", False),
        ("openai", False),
        ("httpx", False),
    ]
    assert not allowed("storage/ledger", "provider/types")
    assert not allowed("errors", "events")
    assert not allowed("policy/pool", "client")
    assert not allowed("testing/fakes", "policy/retry")
    assert allowed("files/run", "files/types")
