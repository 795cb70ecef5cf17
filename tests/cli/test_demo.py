"""Does the demo work anywhere, say what it does, and buy nothing twice?"""

from __future__ import annotations

import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from embedcore.cli import demo
from embedcore.cli.demo import QUESTIONS, docstrings
from embedcore.errors import ConfigurationError

ANSWERS = ("datetime.datetime.strptime", "random.Random.choice", "subprocess.Popen.wait")


@pytest.fixture(scope="session")
def corpus() -> list:
    """Collected once: it takes seconds, and is always the same."""
    return docstrings()


@pytest.fixture
def _collected(corpus, monkeypatch):
    monkeypatch.setattr(demo, "docstrings", lambda: corpus)


@pytest.fixture
def _sampled(corpus, monkeypatch):
    """Where it does not matter what is found."""
    monkeypatch.setattr(demo, "docstrings", lambda: corpus[::20])


@pytest.mark.usefixtures("_collected")
def test_the_demo_twice(cli, read_output):
    run = cli("demo")
    assert run.code == 0, run.err
    assert "hashing:512" in run.err
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        shown = run.out[run.out.index(question) :]
        assert shown.splitlines()[1].split()[1] == answer
    assert "$0" in run.out
    assert str(Path("embedcore-demo-hashing-512.npy").resolve()) in run.out
    assert "embedcore demo --model openai:text-embedding-3-small" in run.out
    again = cli("demo")
    assert again.code == 0
    assert "embedded  nothing: all" in again.out
    report = cli("demo", "--json").json
    assert report["embedded"] == 0
    assert 2_000 <= report["reused"] <= 3_500
    assert [one["hits"][0]["id"] for one in report["questions"]] == list(ANSWERS)


@pytest.mark.usefixtures("_sampled")
@pytest.mark.parametrize("output", ["d.jsonl", "d.npy", "a b.parquet"])
def test_the_output_may_be_named(cli, output):
    assert cli("demo", "-o", output).code == 0
    assert cli("similar", "-c", "random element", "-i", output).code == 0


@pytest.mark.usefixtures("_sampled")
def test_with_openai_the_price_is_shown_and_confirmed_first(cli, server):
    run = cli("demo", "--model", "openai:text-embedding-3-small")
    assert run.code == 2
    assert "This costs $0.0" in run.err
    assert "--yes" in run.err
    assert server.meter.requests == 0
    run = cli("demo", "--model", "openai:text-embedding-3-small", "--yes", "--json")
    assert run.code == 0, run.err
    assert run.json["embedded"] > 100
    assert Decimal(run.json["cost"]) > 0
    billed = server.meter.snapshot()["billed_texts"]
    again = cli("demo", "--model", "openai:text-embedding-3-small")
    assert again.code == 0, "what was billed needs no answer"
    assert server.meter.snapshot()["billed_texts"] == billed, "questions are paid once as well"
    assert server.meter.billed_twice == {}


def test_without_the_provider_it_says_what_to_install(cli, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_LOAD_PLUGINS", "openai")
    run = cli("demo")
    assert run.code == 2
    assert re.search(r"pip install \S+providers/hashing", run.err)
    assert not list(Path().iterdir())


def test_the_corpus_is_always_the_same_and_each_text_is_there_once(corpus):
    before = set(sys.modules)
    rows = docstrings()
    assert set(sys.modules) == before, "sources are read, never imported"
    assert rows == corpus
    assert 2_000 <= len(rows) <= 3_500
    assert len({row.text for row in rows}) == len(rows)
    assert "random.Random.choice" in {row.id for row in rows}


def test_what_is_taken_from_a_library(tmp_path):
    files = {
        "b.py": '"""Module b."""\nclass C:\n    """Of C."""\n'
        '    def m(self):\n        """Of f."""\n',
        "a.py": 'def f():\n    """Of f."""\n    def inner():\n        """Hidden."""\n',
        "_private.py": '"""Private."""',
        "_pya.py": 'def g():\n    """Of the twin."""\n',
        "broken.py": "def (",
        "latin.py": b'"""caf\xe9"""',
        "nul.py": b'"""nul"""\0',
        "empty.py": '""" """',
        "pkg/__init__.py": 'def _h():\n    """Hidden."""\nasync def k():\n    """Async."""\n',
        "test/__init__.py": '"""Left out."""',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = {row.id: row.text for row in docstrings(tmp_path)}
    assert found == {
        "a.f": "Of f.",
        "a.g": "Of the twin.",
        "b": "Module b.",
        "b.C": "Of C.",
        "pkg.k": "Async.",
    }


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_a_python_without_sources_is_a_clear_error(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no source files"):
        docstrings(tmp_path / folder)
