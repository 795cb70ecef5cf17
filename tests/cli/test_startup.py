"""Is nothing loaded that is not needed? The figures are in ``benchmarks/startup.py``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "numpy",
    "openai",
    "pluggy",
    "pyarrow",
    "pydantic",
    "pysqlite3",
    "rich",
    "sqlite3",
    "sqlite_utils",
    "tenacity",
    "tiktoken",
}


def loaded(script: str) -> set[str]:
    script += "; import json, sys; sys.stderr.write(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(run.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "script",
    [
        "import embedcore",
        "from embedcore.cli import main; assert main(['--help']) == 0",
        "from embedcore.cli import main; assert main(['--version']) == 0",
    ],
    ids=["import", "help", "version"],
)
def test_nothing_heavy_is_loaded(script):
    found = loaded(script)
    assert not found & HEAVY
    assert "embedcore" in found


def test_the_test_would_notice():
    assert loaded("from embedcore import EmbeddingResult; import numpy") & HEAVY == {"numpy"}


def test_help_of_a_command_loads_no_sdk():
    found = loaded("from embedcore.cli import main; assert main(['embed', '--help']) == 0")
    assert not found & {"openai", "rich", "pyarrow", "tiktoken", "sqlite_utils"}
