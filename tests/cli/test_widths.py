"""What a person reads fits the terminal, and nothing of it is cut."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

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
    project: None, terminal: Callable[..., Any], columns: int
) -> None:
    for arguments in COMMANDS:
        shown = terminal(*arguments, columns=columns)
        shown.close()
        # What moves is drawn over: rich keeps it within the width.
        lines = re.sub(r"[^\n]*[━╸╺][^\n]*", "", shown.plain)
        assert lines.strip()
        assert too_wide(lines, columns) == [], arguments


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


@given(
    st.lists(st.tuples(words, sentences, words), min_size=1, max_size=6),
    st.integers(10, 200),
)
def test_a_table_fits_or_has_a_line_for_each_cell(
    rows: list[tuple[str, str, str]], width: int
) -> None:
    shown = fitted(table(("ONE", "TWO", "SPARE"), rows, width=width, spare=["SPARE"]), width)
    assert all(len(line) <= width or " " not in line.strip() for line in shown.split("\n"))
    said = " ".join(shown.split())
    assert all(cell in said for row in rows for cell in row[:2])
    whole = table(("ONE", "TWO", "SPARE"), rows, spare=["SPARE"])
    assert whole.count("\n") == len(rows)
    assert all(cell in whole for row in rows for cell in row)
