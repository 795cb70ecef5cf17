"""What a person reads fits the terminal, and nothing of it is cut."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import assume, given, strategies as st

from embedcore.cli import app
from embedcore.cli.text import facts, fitted, table

SCOPE = "the-scope-of-a-team-whose-name-is-long"
SOURCE = "the-articles-of-the-last-year-in-their-final-form.jsonl"
OUTPUT = "the-vectors-of-the-articles-of-the-last-year.jsonl"
COMMANDS = [
    ["embed", SOURCE, "-o", OUTPUT, "--scope", SCOPE, "--dry-run"],
    ["embed", SOURCE, "-o", OUTPUT, "--scope", SCOPE],
    ["similar", "-c", "text number 3", "-i", OUTPUT],
    ["batch", "list", "--all"],
    ["batch", "list"],
    ["usage"],
    ["usage", "--audit"],
    ["usage", "--scope", SCOPE],
    ["budget", "--scope", SCOPE],
    ["budget", "clock"],
    ["budget", "recount"],
    ["models"],
    ["models", "cohere"],
    ["providers"],
    ["cache"],
    ["cache", "where"],
    ["cache", "verify"],
    ["cache", "prune", "--all", "--dry-run"],
    ["config"],
    ["config", "--explain"],
    ["trust", "--list"],
    ["trust", "embedcore.toml"],
    ["doctor"],
    ["provider", "probe", "URL"],
    ["embed", "missing.jsonl", "-o", OUTPUT],
    ["embed", SOURCE, "-o", OUTPUT, "-m", "no-such-provider:a-model"],
    ["embed", SOURCE, "-o", OUTPUT, "--text", "no-such-column-in-this-file"],
]


@pytest.fixture
def project(
    tmp_path: Path,
    server: Any,
    cli: Callable[..., Any],
    texts_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder with a long name, in which a batch was submitted and texts were embedded."""
    folder = tmp_path / "a-folder-with-a-name-that-is-longer-than-forty-columns" / "and-another-one"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "100000")
    monkeypatch.setenv("EMBEDCORE_ALL_SCOPES_MONTHLY_COST_LIMIT", "12.50")
    Path("embedcore.toml").write_text("[options.openai]\nbatch = true\n")
    texts_file(20, SOURCE)
    submitted = cli("batch", "submit", SOURCE, "--scope", SCOPE, "--json")
    assert submitted.code == 0, submitted.err
    assert cli("embed", SOURCE, "-o", OUTPUT, "--scope", SCOPE).code == 0


def too_wide(shown: str, columns: int) -> list[str]:
    """Lines that could be shorter: they have several words, and are no command to paste."""
    return [
        line
        for line in shown.split("\n")
        if len(line) > columns and " " in line.strip() and not line.startswith("  embedcore ")
    ]


@pytest.mark.case("F11")
@pytest.mark.parametrize("columns", [80, 40])
def test_every_command_fits_the_terminal(
    project: None, server: Any, terminal: Callable[..., Any], columns: int
) -> None:
    for named in COMMANDS:
        arguments = [server.base_url if word == "URL" else word for word in named]
        shown = terminal(*arguments, columns=columns)
        shown.close()
        # What moves is drawn over: rich keeps it within the width.
        lines = re.sub(r"[^\n]*[━╸╺][^\n]*", "", shown.plain)
        assert lines.strip()
        assert too_wide(lines, columns) == [], arguments


def every_command(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    """The names of a group and of all that is below it."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from every_command(below, *path, name)


@pytest.mark.case("F11")
def test_no_line_of_a_help_is_cut(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = list(every_command(app.group))
    assert ("provider", "new") in found
    for path in found:
        shown = cli(*path, "--help").out
        cut = [line for line in shown.splitlines() if re.search(r"[a-z,:]\.\.\.$", line)]
        assert cut == [], path


@pytest.mark.case("F11")
def test_what_is_to_be_copied_is_whole(
    project: None, terminal: Callable[..., Any], cli: Any
) -> None:
    (batch,) = cli("batch", "list", "--json").json["batches"]
    shown = terminal("batch", "list", columns=40)
    assert shown.close() == 0
    assert batch["id"] in shown.plain
    assert SCOPE in shown.plain
    requests = {one["request_id"] for one in cli("usage", "--audit", "--json").json["attempts"]}
    shown = terminal("usage", "--audit", columns=40)
    assert shown.close() == 0
    assert all(one is None or one in shown.plain for one in requests)


@pytest.mark.parametrize(
    "arguments", [["usage", "--audit"], ["batch", "list"], ["models"], ["config", "--explain"]]
)
def test_what_a_program_reads_is_one_line(
    project: None, terminal: Callable[..., Any], cli: Any, arguments: list[str]
) -> None:
    shown = terminal(*arguments, "--json", columns=40)
    assert shown.close() == 0
    assert json.loads(shown.plain) == cli(*arguments, "--json").json
    assert shown.plain.count("\n") == 1


def test_what_is_no_terminal_gets_whole_lines(project: None, shell: Callable[..., Any]) -> None:
    ran = shell("budget", "--scope", SCOPE, COLUMNS="40")
    head, row, *_ = ran.out.splitlines()
    assert "SET BY" in head
    assert "environment EMBEDCORE_" in row


words = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=30)
sentences = st.lists(words, min_size=1, max_size=8).map(" ".join)


@given(st.lists(st.tuples(words, sentences), min_size=1, max_size=4), st.integers(10, 60))
def test_fitted_lines_have_the_same_words(pairs: list[tuple[str, str]], width: int) -> None:
    text = facts(pairs)
    lines = fitted(text, width)
    assert lines.split() == text.split()
    assert all(len(line) <= width or " " not in line.strip() for line in lines.split("\n"))


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, ...]], list[str], set[int]]:
    """Heads, rows, spare columns and columns of numbers. The first cell is a name of one word."""
    columns = draw(st.integers(2, 6))
    heads = [f"HEAD {number}" for number in range(columns)]
    row = st.tuples(words, *[st.one_of(words, sentences)] * (columns - 1))
    spare = draw(st.lists(st.sampled_from(heads[1:]), unique=True, max_size=2))
    numbers = draw(st.sets(st.integers(1, columns - 1)))
    return heads, draw(st.lists(row, min_size=1, max_size=8)), spare, numbers


@given(tables(), st.integers(10, 200))
def test_no_line_of_a_table_is_too_wide_and_no_cell_is_lost(
    drawn: tuple[list[str], list[tuple[str, ...]], list[str], set[int]], width: int
) -> None:
    heads, rows, spare, numbers = drawn
    shown = fitted(table(heads, rows, numbers=numbers, width=width, spare=spare), width)
    assert all(len(line) <= width or " " not in line.strip() for line in shown.split("\n"))
    needed = [i for i, head in enumerate(heads) if head not in spare]
    assert Counter(" ".join(row[i] for row in rows for i in needed).split()) <= Counter(
        shown.split()
    )
    whole = table(heads, rows, spare=spare)
    assert whole.count("\n") == len(rows)
    assert all(cell in whole for row in rows for cell in row)


@given(
    st.lists(st.tuples(st.integers(1, 38), st.integers(1, 10)), min_size=3, max_size=12),
    st.integers(38, 60),
)
def test_a_long_name_stands_above_its_row_and_leaves_the_others_a_table(
    sizes: list[tuple[int, int]], width: int
) -> None:
    rows = [("n" * name, "1" * figure, "free") for name, figure in sizes]
    lines = table(("MODEL", "DIMENSIONS", "PRICE"), rows, numbers={1, 2}, width=width).split("\n")
    room = width - len("  DIMENSIONS  PRICE")
    assume(sum(len(name) <= room for name, *_ in rows) > len(rows) // 2 + 1)
    assert lines[0].split() == ["MODEL", "DIMENSIONS", "PRICE"]
    assert [word for line in lines[1:] for word in line.split()] == [c for row in rows for c in row]
    # All that belongs to a row ends where the head of the last column does.
    assert {len(line) for line in lines if line.endswith("free")} == {len(lines[0])}


def test_the_models_are_a_table_in_eighty_columns(terminal: Callable[..., Any], cli: Any) -> None:
    models = [one["model"] for one in cli("models", "--json").json["models"]]
    assert len(models) > 20
    shown = terminal("models", columns=80)
    assert shown.close() == 0
    # Below it stand the sources of the prices.
    lines = shown.plain.partition("\n\n")[0].split("\n")
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("MODEL ")
    assert [line.split()[0] for line in lines[1:] if line[:1] != " "] == models
    assert len(lines) < 1.5 * len(models)
