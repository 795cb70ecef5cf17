"""The page for who tests a program that embeds: its tests are run as they stand."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from embedcore.testing import vector_of

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


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_the_server_of_the_page_answers_the_command_line(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    places |= {"EMBEDCORE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", f"{block.replace('8765', str(port))}kill %1"],
        cwd=tmp_path,
        env=os.environ | places,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (_, vector) = done.stdout.splitlines()
    assert json.loads(vector) == pytest.approx(vector_of("a red apple", 1536).tolist())
