"""The provider of the page for JSON services, and its tests, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedcore.provider.http_embedder import HttpEmbedder

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-an-http-provider.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    plugin, tests = BLOCKS
    (tmp_path / "embedcore_acme").mkdir()
    (tmp_path / "embedcore_acme" / "plugin.py").write_text(plugin, encoding="utf-8")
    # As many examples as in the kit's own tests would take half a minute here.
    quick = tests.replace("    secret = KEY\n", "    secret = KEY\n    examples = 3\n")
    assert quick != tests
    (tmp_path / "test_acme.py").write_text(quick, encoding="utf-8")
    return tmp_path


def run(project: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", "test_acme.py"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def test_the_tests_of_the_page_pass(project: Path) -> None:
    said = run(project)
    assert re.search(r"\d\d passed", said), said
    assert "failed" not in said, said


def test_they_fail_where_the_plugin_is_wrong(project: Path) -> None:
    plugin = project / "embedcore_acme" / "plugin.py"
    text = plugin.read_text(encoding="utf-8")
    wrong = text.replace('"texts": texts,', '"texts": texts[::-1],')
    assert wrong != text
    plugin.write_text(wrong, encoding="utf-8")
    assert "failed" in run(project)


def test_the_page_shows_what_the_command_writes(template: Callable[[str], Path]) -> None:
    written = template("http")
    plugin, tests = BLOCKS
    assert plugin == (written / "src/embedcore_acme/plugin.py").read_text(encoding="utf-8")
    assert tests == (written / "tests/test_contract.py").read_text(encoding="utf-8")


def test_the_table_names_what_there_is() -> None:
    named = re.findall(r"^\| `(\w+)(?:\(…\))?` \|", TEXT, re.MULTILINE)
    assert len(named) == 9
    for name in named:
        assert hasattr(HttpEmbedder, name)
