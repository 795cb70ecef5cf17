"""Are the how-tos of the adapters true? Their programs are run; their tables name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

WHY = "needs the extra integrations: make test-integrations"
ROOT = Path(__file__).parents[2]
PAGES = {"use-with-langchain": "langchain_core", "trace-with-opentelemetry": "opentelemetry.sdk"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What is imported on a page beyond the extra it is about.
MORE = {"use-with-langchain": ["langchain_classic"], "trace-with-opentelemetry": []}


def text_of(page):
    return (ROOT / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")


def run(program):
    """What ``print(…)  # this`` prints is this, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", program, re.MULTILINE)
    assert promised
    assert done.stdout.splitlines() == promised


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_one_program(page, server):
    for library in (PAGES[page], *MORE[page]):
        pytest.importorskip(library, reason=WHY)
    run("\n".join(code for language, code in BLOCK.findall(text_of(page)) if language == "python"))
    assert server.meter.billed_tokens > 0


def test_what_a_page_promises_wrongly_is_noticed(server):
    with pytest.raises(AssertionError):
        run("print(1)  # 2\n")


@pytest.mark.parametrize("page", PAGES)
def test_the_other_blocks_and_the_links_are_right(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = re.findall(r'pip install "\.\[([\w,]+)\]" ./providers/openai', text_of(page))
    assert len(wanted) == 1
    assert set(wanted[0].split(",")) <= set(extras["optional-dependencies"])
    assert {language for language, _ in BLOCK.findall(text_of(page))} == {"sh", "python"}
    links = re.findall(r"\]\((?!https://)([^)]+)\)", text_of(page))
    assert links
    for target in links:
        assert (ROOT / "docs" / "how-to" / target).is_file(), target


def test_the_tables_name_all_that_is_exported_and_no_more():
    source = (ROOT / "embedcore" / "adapters" / "opentelemetry.py").read_text(encoding="utf-8")
    named = re.compile(r"(?:gen_ai|embedcore|server|error|http)\.[a-z_.]+")
    in_code = {name for name in re.findall(r'"([^"\n]+)"', source) if named.fullmatch(name)}
    page = text_of("trace-with-opentelemetry")
    on_page = {name for name in re.findall(r"`([^`\n]+)`", page) if named.fullmatch(name)}
    assert in_code - {"gen_ai.token.type"} == on_page
