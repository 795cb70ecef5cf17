"""Does a message name what can be typed: the option at the command line, the argument in Python?"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import click
import pytest

import embedcore
from embedcore.cli.app import group
from embedcore.cli.text import ARGUMENTS, as_typed

PACKAGE = Path(embedcore.__file__).parent
LIBRARY = [
    path
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in ("cli", "testing", "__main__.py")
]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
ARGUMENT = re.compile(r"\b[a-z]+(?:_[a-z]+)*=(?:True|False|\"[a-z]+\"|…)")
# What no command reaches, or only code that calls the library has.
IN_PYTHON_ONLY = {'input_type="query"'}


@functools.cache
def messages() -> list[tuple[str, str]]:
    """The texts of the library that are no docstrings, with their places."""
    found = []
    for path in LIBRARY:
        tree = ast.parse(path.read_text())
        described = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        found += [
            (f"{path.relative_to(PACKAGE)}:{node.lineno}", node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in described
        ]
    return found


def options(command: click.Command) -> set[str]:
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    own = {name for param in command.params for name in param.opts}
    return own.union(*map(options, inner))


@pytest.mark.case("F13")
def test_the_library_names_options_only_in_whole_commands():
    for place, text in messages():
        for found in OPTION.finditer(text):
            assert "embedcore " in text[: found.start()], (place, text)


@pytest.mark.case("F13")
def test_every_argument_that_a_message_names_has_its_option():
    for place, text in messages():
        for found in ARGUMENT.findall(text):
            assert found in {*ARGUMENTS, *IN_PYTHON_ONLY}, (place, text)


@pytest.mark.case("F13")
def test_what_is_replaced_is_said_somewhere_and_what_replaces_it_can_be_typed():
    ctx = click.Context(group)
    known = set.union(*(options(group.get_command(ctx, name)) for name in group.list_commands(ctx)))
    texts = [text for _, text in messages()]
    for python, here in ARGUMENTS.items():
        assert any(python in text for text in texts), python
        assert set(OPTION.findall(here)) <= known, here
        assert as_typed(f"a {python} b") == f"a {here} b"


@pytest.mark.case("F13")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_message_at_the_command_line_names_the_option(cli, more):
    Path("t.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    embed = ("embed", "t.jsonl", "-o", "o.npy", "-m", "hashing:8", *more)
    empty = cli(*embed)
    assert "with --on-error keep" in empty.err + empty.out
    assert "on_empty" not in empty.err + empty.out
    assert cli(*embed, "--on-error", "keep").code == 1
    other = cli("embed", "t.jsonl", "-o", "o.npy", "-m", "hashing:16", "--on-error", "keep", *more)
    assert "replace it with --overwrite" in other.err + other.out
    assert "overwrite=True" not in other.err + other.out
    column = cli(*embed, "--text", "body")
    assert "choose it with --text)" in column.err + column.out
