"""The fake of OpenAI bills what OpenAI bills, and says so where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from embedcore.testing import FakeOpenAI, openai_tokens, tokens_of
from embedcore.testing.openai.batches import BatchService
from embedcore.testing.openai.embeddings import FakeModel

# What OpenAI's own tokenizer gives for cl100k_base.
KNOWN = {
    "hello world": 2,
    "The quick brown fox jumps over the lazy dog.": 10,
    "antidisestablishmentarianism": 6,
    "お誕生日おめでとう": 9,
    "2 + 2 = 4": 7,
}


def test_tokens_are_those_of_openai():
    assert openai_tokens([*KNOWN]) == [*KNOWN.values()]
    assert openai_tokens([]) == []


def test_only_models_of_openai_are_billed_by_them():
    models = {
        "theirs": FakeModel(dimensions=4, openai_tokens=True),
        "mini": FakeModel(dimensions=4),
    }
    texts = [*KNOWN]
    with FakeOpenAI(models=models) as server:
        for model, tokens in [
            ("theirs", sum(KNOWN.values())),
            ("mini", sum(map(tokens_of, texts))),
        ]:
            before = server.meter.billed_tokens
            assert ask(server, model, texts)["usage"]["total_tokens"] == tokens
            assert server.meter.billed_tokens - before == tokens


def ask(server, model, texts):
    import urllib.request

    request = urllib.request.Request(
        f"{server.base_url}/embeddings",
        json.dumps({"model": model, "input": texts}).encode(),
        {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def started(**environment):
    """What the server says when it runs in a process of its own, on both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "embedcore.testing.openai.server", "--until-eof"],
        input="",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout), done.stderr


def test_a_server_of_its_own_says_how_it_counts():
    place, said = started()
    assert place["tokens"] == "cl100k_base"
    assert said == ""


def test_without_the_provider_it_counts_bytes_and_says_so():
    place, said = started(EMBEDCORE_LOAD_PLUGINS="hashing")
    assert place["tokens"] == "bytes/4"
    assert "not as OpenAI does" in said


def test_batches_are_billed_alike():
    service = BatchService()
    line = {
        "custom_id": "0",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "text-embedding-3-small", "input": "hello world"},
    }
    file = service.upload(json.dumps(line).encode())
    job = service.create(file["id"])
    service.finish(job["id"])
    assert service.meter.billed_tokens == 2
