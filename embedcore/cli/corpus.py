"""Where does the demo get real texts? From the docstrings of the Python that runs it.

The source files are parsed, never imported. Nothing is shipped, and nothing is read twice.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

from embedcore.errors import ConfigurationError
from embedcore.files.types import Row

# Not everywhere where Python is, or not meant for those who use it.
_LEFT_OUT: Final = frozenset({"ensurepip", "idlelib", "test", "tkinter", "turtledemo"})
_DEFINITIONS: Final = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_Documented: TypeAlias = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(library: Path | None = None) -> list[Row]:
    """The public docstrings of the standard library's modules and packages, each text once.

    Ids are qualified names such as ``shutil.copy2``; the order is that of the modules' names and of
    the lines in them. Raises ``ConfigurationError`` where the sources are not installed.
    """
    folder = library or Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for module, path in sorted(_modules(folder)):
        for name, text in _in_file(path, module):
            found.setdefault(text, name)
    if not found:
        raise ConfigurationError(
            f"{folder} has no source files to read docstrings from: this Python came without "
            "them, or in a zip file. Embed a file of your own: embedcore embed FILE -o out.npy"
        )
    return [Row(id=name, text=text) for text, name in found.items()]


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each public module, and of each public package its ``__init__``."""
    named = [(path.stem, path) for path in folder.glob("*.py")]
    named += [(path.parent.name, path) for path in folder.glob("*/__init__.py")]
    public = {name for name, _ in named if not name.startswith("_")} - _LEFT_OUT
    for name, path in named:
        # Some modules, such as datetime from 3.12 on, have their text in a twin beside them.
        owner = name.removeprefix("_py")
        if owner in public:
            yield owner, path


def _in_file(path: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        # A file that this Python cannot read has no documentation for this Python.
        return
    yield from _in_node(module, name)


def _in_node(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text and text.strip():
        yield name, text
    if not isinstance(node, ast.Module | ast.ClassDef):
        return
    for child in node.body:
        if isinstance(child, _DEFINITIONS) and not child.name.startswith("_"):
            yield from _in_node(child, f"{name}.{child.name}")
