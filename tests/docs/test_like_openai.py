"""Are the core's readers what the how-to says, and does its embedder over the session work?"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcore import EmbeddingClient, errors
from embedcore.provider.types import EmbedRequest
from embedcore.testing import FakeOpenAI, openai_tokens, vector_of

MODEL = "text-embedding-3-small"
KEY = "acme-0123456789abcdef"  # is not spelled like a key that anybody could know
GONE = '{"error": {"code": "model_not_found"}}'
SLOW = '{"error": {"code": 429, "message": "slow down"}}'


@pytest.fixture(scope="module")
def section(how_to: Path) -> str:
    page = (how_to / "write-a-provider.md").read_text(encoding="utf-8")
    return page.partition("## 12. ")[2]


@pytest.fixture(scope="module")
def embedder_type(section: str) -> Any:
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    return names["LikeOpenAI"]


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


@pytest.fixture
def embedder(embedder_type: Any, server: FakeOpenAI) -> Iterator[Any]:
    made = embedder_type(MODEL, server.base_url, server.api_key)
    yield made
    made.close()


def request(*texts: str) -> EmbedRequest:
    return EmbedRequest(texts=texts)


def test_every_name_of_the_table_is_there(section: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) == 11
    for module, said in rows:
        names = re.findall(r"`(\w+)\(…\)`", said)
        assert names
        for name in names:
            assert callable(getattr(importlib.import_module(f"embedcore.provider.{module}"), name))


def test_it_serves_a_client(embedder: Any, server: FakeOpenAI) -> None:
    texts = ["a red apple", "a green pear", "a red apple"]
    with EmbeddingClient(embedder=embedder) as client:
        result = client.embed(texts)
    assert result.ok.all()
    np.testing.assert_allclose(result.vectors[1], vector_of(texts[1], 1536), atol=1e-6)
    assert result.usage.tokens == server.meter.billed_tokens == sum(openai_tokens(texts[:2]))


@pytest.mark.parametrize(
    ("mode", "options", "kind", "billed"),
    [
        ("rate_limited", {"retry_after": 7}, errors.RateLimited, "no"),
        ("raw", {"status": 404, "body": GONE}, errors.ModelNotFound, "no"),
        ("raw", {"status": 200, "body": SLOW}, errors.RateLimited, "unknown"),
        ("raw", {"status": 200, "body": "<html>"}, errors.InvalidResponse, "yes"),
        ("raw", {"status": 504, "body": ""}, errors.OutcomeUnknown, "unknown"),
        ("truncated", {}, errors.OutcomeUnknown, "unknown"),
    ],
)
def test_each_answer_is_its_error(
    embedder: Any,
    server: FakeOpenAI,
    mode: str,
    options: dict[str, Any],
    kind: type[errors.ProviderError],
    billed: str,
) -> None:
    server.faults.push(mode, **options)
    with pytest.raises(kind) as caught:
        embedder.embed(request("one", "two"))
    assert caught.value.billed == billed
    assert getattr(caught.value, "retry_after", None) == options.get("retry_after")


def test_a_key_that_is_repeated_is_not_shown(embedder_type: Any, server: FakeOpenAI) -> None:
    said = f'{{"error": {{"message": "there is no key {KEY} here"}}}}'
    server.faults.push("raw", status=401, body=said)
    with pytest.raises(errors.AuthenticationFailed, match="check ACME_API_KEY") as caught:
        embedder_type(MODEL, server.base_url, KEY).embed(request("one"))
    assert "there is no key" in str(caught.value)
    assert KEY not in str(caught.value)


def test_what_never_came_or_broke_off(
    embedder_type: Any, embedder: Any, server: FakeOpenAI
) -> None:
    server.faults.push("reset", bills=True)
    with pytest.raises(errors.OutcomeUnknown) as caught:
        embedder.embed(request("one"))
    assert caught.value.billed == "unknown"
    gone = server.base_url
    server.close()
    with pytest.raises(errors.ProviderUnavailable) as caught:
        embedder_type(MODEL, gone, "k").embed(request("one"))
    assert caught.value.billed == "no"
