"""The batches of the page for a service with files, and their tests, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from embedcore.provider.batch_files import FilesBatch

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-batch-provider.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    strategy, plugin, tests = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "embedcore_acme").mkdir()
    (tmp_path / "embedcore_acme" / "batch.py").write_text(strategy, encoding="utf-8")
    (tmp_path / "embedcore_acme" / "plugin.py").write_text(plugin, encoding="utf-8")
    (tmp_path / "test_acme.py").write_text(tests, encoding="utf-8")
    return tmp_path


def run(project: Path, *more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_acme.py", *more],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def test_the_tests_of_the_page_pass(project: Path) -> None:
    said = run(project, "-rs")
    assert re.search(r"\d\d passed", said), said
    assert "failed" not in said, said
    # The service of the page refuses no single text.
    left_out = re.findall(r"^SKIPPED .*: (.*)$", said, re.MULTILINE)
    assert left_out == ["define refused_text() to have this tested"], said


def test_they_fail_where_the_strategy_is_wrong(project: Path) -> None:
    strategy = project / "embedcore_acme" / "batch.py"
    text = strategy.read_text(encoding="utf-8")
    wrong = text.replace('"custom_id": item.id', '"custom_id": item.text')
    assert wrong != text
    strategy.write_text(wrong, encoding="utf-8")
    assert "failed" in run(project, "-k", "outcomes")


def test_the_table_names_what_there_is() -> None:
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)(?:\(.*?\))?`", row)]
    assert len(named) == 23
    for name in named:
        assert hasattr(FilesBatch, name), name
