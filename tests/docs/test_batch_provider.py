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


# The service of the page, if it took the requests in the call.
INLINE = """
import json

import pytest
from embedcore_acme.inline import InlineAcmeBatch
from embedcore_acme.plugin import AcmeEmbedder, AcmeOptions
from test_acme import KEY, FakeAcme

from embedcore.testing.batch_service import ServiceBatchContract


class FakeInline(FakeAcme):
    def take_job(self, asked):
        self.take(asked, {"model": str, "requests": list, "metadata?": (dict, type(None))})
        lines = [json.dumps(line).encode() for line in asked["requests"]]
        return self.store("inline.jsonl", b"\\n".join(lines)).id

    def write_results(self, job):
        pass

    def without_mark(self, asked):
        return {**asked, "metadata": None}

    def job_document(self, job):
        told = {**super().job_document(job), "input_file_id": None}
        return {**told, "outputs": [*job.good, *job.bad] if job.has_ended else None}


@pytest.fixture
def server():
    with FakeInline(key=KEY) as fake:
        yield fake


class TestInline(ServiceBatchContract):
    keeps_inputs = False

    def strategy_of(self, server):
        options = AcmeOptions(base_url=f"{server.url}/v1", api_key=KEY)
        return InlineAcmeBatch(AcmeEmbedder("v1", options))

    def uploaded_bytes(self):
        return None

    def cut_results(self):
        return None

    shorten_results = delay_results = swap_results = cut_results
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    strategy, plugin, inline, tests = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "embedcore_acme").mkdir()
    (tmp_path / "embedcore_acme" / "batch.py").write_text(strategy, encoding="utf-8")
    (tmp_path / "embedcore_acme" / "plugin.py").write_text(plugin, encoding="utf-8")
    (tmp_path / "embedcore_acme" / "inline.py").write_text(inline, encoding="utf-8")
    (tmp_path / "test_inline.py").write_text(INLINE, encoding="utf-8")
    (tmp_path / "test_acme.py").write_text(tests, encoding="utf-8")
    return tmp_path


def run(project: Path, *more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ".", *more],
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
    left_out = re.findall(r"^SKIPPED .*?\d: (.*)$", said, re.MULTILINE)
    # In the other form results are in the job: what goes wrong with a file does not with them.
    files = ("cut_results", "shorten_results", "delay_results", "swap_results", "uploaded_bytes")
    needed = {f"define {hook}() to have this tested" for hook in ("refused_text", *files)}
    assert needed <= set(left_out), said
    assert all(each in needed or "keeps_inputs is False" in each for each in left_out), said


def test_they_fail_where_the_strategy_is_wrong(project: Path) -> None:
    strategy = project / "embedcore_acme" / "batch.py"
    text = strategy.read_text(encoding="utf-8")
    wrong = text.replace('"custom_id": item.id', '"custom_id": item.text')
    assert wrong != text
    strategy.write_text(wrong, encoding="utf-8")
    assert "failed" in run(project, "-k", "TestAcmeBatch and outcomes")


def test_the_table_names_what_there_is() -> None:
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)(?:\(.*?\))?`", row)]
    assert len(named) == 23
    for name in named:
        assert hasattr(FilesBatch, name), name
