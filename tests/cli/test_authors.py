"""``embedcore provider new`` and ``check``."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from embedcore.cli import authors
from embedcore.cli.authors import write

KINDS = ("http", "local", "batch", "plain")
COMMON = {
    ".github/workflows/tests.yml",
    ".gitignore",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "src/embedcore_my_acme/__init__.py",
    "src/embedcore_my_acme/plugin.py",
    "src/embedcore_my_acme/py.typed",
    "tests/test_contract.py",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_distribution_is_written(cli: Callable[..., Any], kind: str) -> None:
    ran = cli("provider", "new", "my-acme", f"--{kind}", "--json")
    assert ran.code == 0
    found = {
        path.relative_to("embedcore-my-acme").as_posix()
        for path in Path("embedcore-my-acme").rglob("*")
        if path.is_file()
    }
    further = {"src/embedcore_my_acme/batch.py"} if kind == "batch" else set()
    assert found == set(ran.json["files"]) == COMMON | further
    project = tomllib.loads(Path("embedcore-my-acme/pyproject.toml").read_text())["project"]
    assert project["entry-points"]["embedcore"] == {"my-acme": "embedcore_my_acme.plugin"}
    for name in found:
        text = (Path("embedcore-my-acme") / name).read_text(encoding="utf-8")
        assert "embedcore_acme" not in text, name
        if name.endswith(".py"):
            compile(text, name, "exec")
    plugin = Path("embedcore-my-acme/src/embedcore_my_acme/plugin.py").read_text()
    assert "class MyAcmeEmbedder(" in plugin
    assert 'name="my-acme"' in plugin


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_clean(tmp_path: Path, kind: str) -> None:
    write("my-acme", kind, tmp_path / "made")
    config = Path(__file__).parents[2] / "pyproject.toml"
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(config)]
    done = subprocess.run(
        [*command, "--select", "F,B,S", str(tmp_path / "made")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_nothing_is_written_over(cli: Callable[..., Any], there: str) -> None:
    place = Path("embedcore-acme")
    if there == "folder":
        place.mkdir()
    elif there == "file":
        place.write_text("mine")
    else:
        place.symlink_to("nowhere")
    ran = cli("provider", "new", "acme", "--http")
    assert ran.code == 2
    assert "is there already: nothing was written" in ran.err
    assert [path.name for path in Path().iterdir()] == ["embedcore-acme"]
    assert there != "file" or place.read_text() == "mine"


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def fails(path: Path, *given: Any, **named: Any) -> int:
        if path.name == "pyproject.toml":
            raise OSError(28, "No space left on device")
        return real(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(authors.ConfigurationError, match="No space left"):
        write("acme", "http", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "a--b", "Acme", "1a", "a_b", "a b", "../a", "a/b", "é", "a" * 41, "a\n"],
)
def test_a_name_that_cannot_be_one_is_refused(cli: Callable[..., Any], name: str) -> None:
    ran = cli("provider", "new", "--http", "--", name)
    assert ran.code == 2
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["openai", "hashing", "voyage"])
def test_a_name_that_is_taken_is_refused(cli: Callable[..., Any], name: str) -> None:
    ran = cli("provider", "new", name, "--http")
    assert ran.code == 2
    assert "already: choose another name" in ran.err


def test_it_must_be_said_what_for(cli: Callable[..., Any]) -> None:
    ran = cli("provider", "new", "acme")
    assert ran.code == 2
    assert "--http, --local, --batch or --plain" in ran.err


@given(st.from_regex(authors._NAME, fullmatch=True).filter(lambda name: len(name) <= 40))
def test_every_name_makes_names_of_python(name: str) -> None:
    filled = authors._filled("embedcore_acme Acme ACME acme", name).split()
    module, kind, variable, plain = filled
    assert module.isidentifier()
    assert kind.isidentifier()
    assert variable.isidentifier()
    assert (variable, plain) == (variable.upper(), name)


# check

BROKEN = """
import numpy as np
from pydantic import BaseModel
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.hookspecs import Provider, hookimpl
from embedcore.provider.types import EmbedReply, ModelInfo

class Options(BaseModel):
    pass

class Swapping(BaseEmbedder):
    info = ModelInfo(provider="swapping", model="v1", dimensions=64, local=True)
    def embed(self, request):
        codes = [np.array([ord(one) % 64 for one in text], dtype=int) for text in request.texts]
        rows = [np.bincount(each, minlength=64) for each in codes[::-1]]
        return EmbedReply(vectors=np.array(rows, dtype=np.float32).reshape(-1, 64))

@hookimpl
def embedcore_provider():
    return Provider(
        name="swapping", options=Options, create=lambda *_: Swapping(), default_model="v1",
        known_failures={"test_unknown_options_are_refused": "an old one"},
    )
"""


@pytest.fixture
def swapping(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which a broken provider is installed."""
    site = tmp_path / "site"
    info = site / "embedcore_swapping-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: embedcore-swapping\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text("[embedcore]\nswapping = embedcore_swapping\n")
    (site / "embedcore_swapping.py").write_text(BROKEN)
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "80"}


def check(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embedcore", "provider", "check", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_broken_is_named(swapping: dict[str, str]) -> None:
    done = check(swapping, "swapping")
    assert done.returncode == 1, done.stderr
    assert "test_row_i_belongs_to_text_i" in done.stdout
    assert "test_unknown_options_are_refused: known to fail: an old one" in done.stdout
    assert all(len(line) <= 600 for line in done.stdout.splitlines())


def test_a_service_is_not_asked_without_live(cli: Callable[..., Any], server: Any) -> None:
    ran = cli("provider", "check", "openai", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["passed"]
    assert ran.json["counts"]["passed"] > 20
    assert server.requests == []


def test_live_asks_first_and_keeps_to_the_limits(cli: Callable[..., Any], server: Any) -> None:
    refused = cli("provider", "check", "openai", "--live")
    assert refused.code == 2
    assert "Send at most 100,000 tokens to" in refused.err
    assert server.requests == []


def test_live_is_refused_by_a_budget(
    cli: Callable[..., Any], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "1000")
    refused = cli("provider", "check", "openai", "--live", "--yes")
    assert refused.code == 3
    assert server.requests == []


@pytest.mark.campaign(short=True)
def test_live_is_counted(cli: Callable[..., Any], server: Any) -> None:
    ran = cli("provider", "check", "openai", "--live", "--yes", "--json")
    assert ran.json["counts"]["passed"] > 50, ran.json
    assert 0 < server.meter.billed_tokens <= 100_000
    (spent,) = [one for one in cli("usage", "--json").json["models"] if one["period"] == "total"]
    assert spent["spent_tokens"] >= server.meter.billed_tokens
