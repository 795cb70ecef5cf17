"""Is the how-to of streams true? It is one program, and prints what its comments promise."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from embedcore import Block
from embedcore.testing import FakeOpenAI

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def page(how_to: Path) -> str:
    return (how_to / "embed-a-stream.md").read_text(encoding="utf-8")


def test_the_page_is_one_program(
    page: str, monkeypatch: pytest.MonkeyPatch, canary: str, forks: Callable[..., Any]
) -> None:
    program = "\n".join(code for language, code in BLOCK.findall(page) if language == "python")
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", program, re.MULTILINE)
    with FakeOpenAI(api_key=canary) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", canary)
        strict = "import warnings; warnings.simplefilter('error')\n"
        run = forks(strict + program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        assert out.splitlines() == promised
        assert server.meter.billed_twice == {}


def test_the_table_has_all_of_a_block(page: str) -> None:
    rows = re.findall(r"^\| (`.*`) \| .* \|$", page, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in fields(Block)} <= named
    assert all(name in Block.__dataclass_fields__ or hasattr(Block, name) for name in named)


def test_the_links_lead_somewhere(page: str, how_to: Path) -> None:
    links = re.findall(r"\]\((?!https://)([^)]+)\)", page)
    assert links
    for target in links:
        assert (how_to / target).is_file(), target
