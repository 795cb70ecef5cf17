"""``embedcore demo``: real texts, embedded and searched, without a key.

The source files are parsed, never imported. Nothing is shipped, and nothing is read twice.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import click

from embedcore import money
from embedcore.cli.embed import FileRun
from embedcore.cli.options import model_option, scope_option, talking, yes_option
from embedcore.cli.process import OK, USAGE
from embedcore.cli.screen import Screen
from embedcore.cli.session import Session, opened
from embedcore.cli.summary import RunTotals, next_command, report_fields
from embedcore.cli.text import (
    command as shell_command,
    duration,
    facts,
    one_line,
    plural,
    shown_path,
)
from embedcore.errors import ConfigurationError, UnknownProvider
from embedcore.files.search import search
from embedcore.files.types import Row
from embedcore.provider.known import how_to_install

if TYPE_CHECKING:
    from embedcore.files.search import Hit
    from embedcore.files.types import RunReport


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


OFFLINE: Final = "hashing:512"
PAID: Final = "openai:text-embedding-3-small"
QUESTIONS: Final = (
    "parse a date string into a datetime",
    "how can I pick a random element from a list",
    "wait for a process to terminate",
)
_HITS = 3
_SENTENCE = 72


@click.command(name="demo")
@model_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .npy, .jsonl or .parquet file; default embedcore-demo-MODEL.npy.",
)
@scope_option
@yes_option
@talking
@click.pass_obj
def command(
    screen: Screen, model: str | None, output: Path | None, scope: str | None, yes: bool
) -> int:
    """Embed the docstrings of your own Python's standard library, and ask them three questions.

    Offline and free by default, with the provider hashing, which compares words. With another
    model (-m) the price is shown and confirmed first.
    """
    started = time.monotonic()
    tally = RunTotals()
    try:
        with opened(model or OFFLINE, scope, [tally]) as ready:
            path = output or Path(f"embedcore-demo-{_in_name(ready.name)}.npy")
            report = _embedded(screen, ready, tally, path, yes=yes)
            if report.declined:
                screen.error("Nothing was sent.")
                return USAGE
            found = search(ready.client, QUESTIONS, path, limit=_HITS, input_type="query")
            _show(screen, ready, report, path, found, time.monotonic() - started)
    except UnknownProvider as error:
        if model is not None:
            raise
        raise UnknownProvider(
            "the demo uses the provider 'hashing', which is not installed. "
            f"{how_to_install('hashing')}",
            installed=error.installed,
        ) from None
    return OK


def _embedded(
    screen: Screen, ready: Session, tally: RunTotals, path: Path, *, yes: bool
) -> RunReport:
    rows = docstrings()
    where = "computed here, nothing is sent" if ready.client.info.local else "sent to its provider"
    screen.info(
        f"{len(rows):,} docstrings of the standard library of Python {platform.python_version()}, "
        f"embedded with {ready.name} ({where})"
    )
    run = FileRun(screen, ready, tally, yes=yes, above=Decimal(0))
    return run.run([rows], path)


def _show(
    screen: Screen,
    ready: Session,
    report: RunReport,
    path: Path,
    found: Sequence[Sequence[Hit]],
    seconds: float,
) -> None:
    pairs = list(zip(QUESTIONS, found, strict=True))
    screen.json(
        {
            **report_fields(report, ready),
            "seconds": seconds,
            "questions": [
                {"question": question, "hits": [asdict(hit) for hit in hits]}
                for question, hits in pairs
            ],
        }
    )
    for question, hits in pairs:
        screen.result(f"\n{question}?")
        for hit in hits:
            screen.result(f"  {hit.score:.2f}  {hit.id}\n        {_first_sentence(hit.text or '')}")
    screen.result("\n" + facts(_facts(report, path, seconds)))
    screen.result(f"\nAsk it something yourself:\n  {next_command(path)}")
    if ready.name != PAID:
        again = shell_command(["embedcore", "demo", "--model", PAID])
        screen.result(
            f"The same with OpenAI (OPENAI_API_KEY set; the price is shown first):\n  {again}"
        )


def _facts(report: RunReport, path: Path, seconds: float) -> list[tuple[str, str]]:
    made = plural(report.embedded, "text")
    if not report.embedded:
        made = f"nothing: all {plural(report.reused, 'text')} were embedded by an earlier run"
    elif report.reused:
        made += f"; {report.reused:,} were embedded by an earlier run"
    return [
        ("embedded", made),
        ("cost", money.shown(report.usage.cost)),
        ("vectors", shown_path(path.resolve())),
        ("took", duration(seconds)),
    ]


def _first_sentence(text: str) -> str:
    paragraph = re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0]
    sentence = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]
    return one_line(sentence, _SENTENCE)


def _in_name(model: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model)[:80]
