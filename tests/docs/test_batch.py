"""Is the how-to of batches true? It is one program, and prints what its comments promise."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from embedcore.cli.batch.group import command as batch_command
from embedcore.config import Config
from embedcore.policy.batch.report import BatchStateName
from embedcore.settings import BatchSettings as Rules
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What only a server that is not OpenAI's own needs.
FOR_THE_FAKE = "\n[options.openai]\nbatch = true\n"
STRICT = "import warnings; warnings.simplefilter('error')\n"
CLI = "import sys; from embedcore.cli.app import main; sys.exit(main())"


@dataclass(frozen=True)
class Page:
    """The page as it stands, and its blocks by language."""

    text: str

    def blocks(self, language: str) -> list[str]:
        return [code for kind, code in BLOCK.findall(self.text) if kind == language]


@pytest.fixture(scope="session")
def page(how_to: Path) -> Page:
    return Page((how_to / "batch.md").read_text(encoding="utf-8"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, canary: str, page: Page) -> Iterator[FakeOpenAI]:
    """One whose jobs have ended at the second look, and which refuses a forbidden text."""
    jobs = BatchSettings(progress=Progress(polls=2))
    with FakeOpenAI(api_key=canary, batch=jobs) as fake:
        fake.batches.fail_lines(
            "forbidden", code="invalid_prompt", message="This input was refused."
        )
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", canary)
        Path("embedcore.toml").write_text(page.blocks("toml")[0] + FOR_THE_FAKE)
        yield fake


@pytest.fixture
def run(forks: Callable[..., Any]) -> Callable[..., tuple[str, str]]:
    """``run(code, …)``: what the program says on standard output, and on standard error."""

    def run(code: str, *arguments: str) -> tuple[str, str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = forks(STRICT + code, *arguments, **streams)
        out, err = done.communicate(timeout=120)
        assert done.returncode == 0, err
        return out, err

    return run


def test_the_page_is_one_program(
    page: Page, server: FakeOpenAI, run: Callable[..., tuple[str, str]]
) -> None:
    program = "\n".join(page.blocks("python"))
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", program, re.MULTILINE)
    logged = "import logging\nlogging.basicConfig(level='INFO', format='%(message)s')\n"
    out, err = run(logged + program)
    assert out.splitlines() == promised
    (line,) = page.blocks("text")
    assert line.strip() in err.splitlines()
    assert server.batches.meter.billed_twice == {}
    assert server.meter.billed_twice == {}


def test_the_commands_of_the_page_make_a_file(
    page: Page, server: FakeOpenAI, run: Callable[..., tuple[str, str]]
) -> None:
    rows = [{"id": f"row-{number}", "text": f"Row number {number}"} for number in range(9)]
    Path("corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (commands,) = (text for text in page.blocks("sh") if text.startswith("embedcore"))
    name = "no id yet"
    for line in commands.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "embedcore"
        out, _ = run(CLI, *(name if word == "ID" else word for word in words))
        if words[:2] == ["batch", "submit"]:
            (name,) = set(re.findall(r"\b\d{8}-[0-9a-f]{8}\b", out))
    written = [json.loads(line) for line in Path("vectors.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert server.batches.meter.billed_twice == {}


def test_the_line_for_cron_is_a_command(page: Page) -> None:
    (line,) = page.blocks("")
    *_, group, name = line.split()
    assert group == batch_command.name
    assert isinstance(batch_command, click.Group)
    assert name in batch_command.commands


def test_every_toml_block_is_a_valid_config(page: Page) -> None:
    first, second = (Config.model_validate(tomllib.loads(text)) for text in page.blocks("toml"))
    assert set(first.profiles) == {"trial"}
    assert (second.batch.enqueued_tokens, second.batch.parts) == (20_000_000, 4)


def test_every_state_is_in_the_table(page: Page) -> None:
    (table,) = re.findall(r"^\| `state` \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page.text, re.MULTILINE)
    named = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named == set(get_args(BatchStateName))


@pytest.mark.parametrize(
    ("said", "setting", "value"),
    [
        ("three jobs (`attempts`)", "attempts", 3),
        ("`grace` (10 minutes)", "grace", 600),
        ("`watch` (25 hours)", "watch", 25 * 3600),
        ("`parts` (8)", "parts", 8),
        ("`keep_days` (30)", "keep_days", 30),
    ],
)
def test_the_defaults_are_those_of_the_settings(
    page: Page, how_to: Path, said: str, setting: str, value: float
) -> None:
    crashes = how_to.parent / "explanation" / "batches-and-crashes.md"
    assert said in " ".join((page.text + crashes.read_text(encoding="utf-8")).split())
    assert getattr(Rules(), setting) == value


def test_every_setting_that_is_named_exists(page: Page) -> None:
    for name in ("small_texts", "worth", "quickest", "drain_before", "enqueued_tokens"):
        assert f"`{name}`" in page.text
        assert name in Rules.model_fields


def test_every_switch_of_the_assumptions_exists(how_to: Path) -> None:
    assumptions = (how_to.parent / "assumptions.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`batch\.(\w+)`", assumptions))
    assert {"grace", "look_again", "watch"} <= named
    assert named <= set(Rules.model_fields)


def test_the_links_lead_somewhere(page: Page, how_to: Path) -> None:
    links = re.findall(r"\]\((?!https://)([^)#]+)(?:#[\w-]+)?\)", page.text)
    assert links
    for target in links:
        assert (how_to / target).is_file(), target
