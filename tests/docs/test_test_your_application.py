"""The page for who tests a program that embeds: its tests are run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "test-your-application.md"


def test_the_tests_of_the_page_pass(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for number, block in enumerate(found):
        (tmp_path / f"test_{number}.py").write_text(block, encoding="utf-8")
    # Where the environment was made before the entry point, the plugin is named.
    there = list(entry_points(group="pytest11", name="embedcore"))
    plugin = [] if there else ["-p", "embedcore.testing.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *plugin],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith(("EMBEDCORE_", "PYTEST_"))},
        capture_output=True,
        text=True,
        check=False,
    )
    tests = sum(block.count("def test_") for block in found)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tests} passed" in done.stdout
