"""The pytest plugin: its fixtures, and that it costs and disturbs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from embedcore import EmbeddingClient, embed_texts
from embedcore.testing import FakeEmbedder, FakeOpenAI, plugin, vector_of

# Loaded here, too, where the environment was made before the entry point.
embedcore_home = plugin.embedcore_home
fake_embedder = plugin.fake_embedder
fake_openai = plugin.fake_openai


def run(*arguments: str, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(code, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "EMBEDCORE"))}
    return subprocess.run(
        [sys.executable, *arguments, "-p", "no:cacheprovider", "-q", "test_it.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_program_is_tested_without_a_key(fake_openai: FakeOpenAI) -> None:
    # The functions share a client that must be of this test.
    assert len(embed_texts(["a red apple"])[0]) == 1536
    assert fake_openai.meter.billed_texts == {"a red apple": 1}
    with EmbeddingClient() as client:
        client.embed_text("a red apple")
    assert fake_openai.meter.billed_texts == {"a red apple": 1}, "from the cache of this test"


def test_the_next_test_begins_with_nothing(fake_openai: FakeOpenAI) -> None:
    embed_texts(["a red apple"])
    assert fake_openai.meter.billed_texts == {"a red apple": 1}


def test_a_model_in_this_process(fake_embedder: FakeEmbedder, embedcore_home: Path) -> None:
    with EmbeddingClient(embedder=fake_embedder) as client:
        vector = client.embed_text("a red apple")
    assert vector == vector_of("a red apple", len(vector)).tolist()
    assert len(fake_embedder.calls) == 1
    assert (embedcore_home / "state.db").exists() or fake_embedder.info.local


def test_no_setting_of_this_machine_holds(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "1")
    Path("embedcore.toml").write_text('model = "hashing:9"\n')
    home = request.getfixturevalue("embedcore_home")
    assert EmbeddingClient().provider == "openai"
    (home.parent / "embedcore.toml").write_text('model = "hashing:16"\n')
    with EmbeddingClient() as client:
        assert (client.model, len(client.embed_text("a"))) == ("16", 16)


def test_the_entry_point_is_declared() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\nembedcore = "embedcore.testing.plugin"' in pyproject
    for point in entry_points(group="pytest11", name="embedcore"):
        assert point.load() is plugin


def test_it_imports_nothing_but_pytest(tmp_path: Path) -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import embedcore.testing.plugin;"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    ours = {name for name in done.stdout.split() if name.startswith("embedcore")}
    assert ours <= {"embedcore", "embedcore.testing", "embedcore.testing.plugin"}
    heavy = {"numpy", "pydantic", "hypothesis", "sqlite_utils", "pluggy._hooks", "urllib3"}
    assert not heavy & {name.partition(".")[0] for name in done.stdout.split()}


def test_a_run_that_uses_none_of_it_is_as_before(tmp_path: Path) -> None:
    code = "import sys\n\ndef test_one():\n    assert 'numpy' not in sys.modules\n"
    # Where the environment was made before the entry point, the plugin is named.
    there = list(entry_points(group="pytest11", name="embedcore"))
    named = [] if there else ["-p", "embedcore.testing.plugin"]
    with_it = run("-W", "error", "-m", "pytest", *named, folder=tmp_path, code=code)
    assert with_it.returncode == 0, with_it.stdout + with_it.stderr
    assert "1 passed" in with_it.stdout
