"""Recordings of a service: whole, without secrets, and played again."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import ProviderError, RateLimited
from embedcore.provider.http_embedder import HttpEmbedder, HttpOptions
from embedcore.provider.replies import Form
from embedcore.provider.types import EmbedRequest, ModelInfo
from embedcore.testing.recording import (
    HIDDEN,
    Recorder,
    Replay,
    SecretLeft,
    holds,
    scrubbed,
)
from embedcore.testing.service import FakeService, Recorded, Refused

KEY = "acme-0123456789abcdef"


class Acme(FakeService):
    path = "/embed"
    told: dict[str, Any]

    def __init__(self) -> None:
        super().__init__(key=KEY)
        self.told = {}

    def reply(self, question: dict[str, Any]) -> object:
        texts = self.strings(question["texts"])
        return {"vectors": self.vectors(texts, 4), "tokens": self.bill(texts), **self.told}

    def headers_of_reply(self) -> dict[str, str]:
        return {
            "set-cookie": "session=abcdefabcdef",
            "openai-organization": "secret-corp",
            "x-ratelimit-remaining-tokens": "7",
        }


class Embedder(HttpEmbedder):
    path = "/embed"
    form = Form(rows=("vectors",), vector=None, numbered=False)
    other = ModelInfo(provider="acme")

    def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
        return {"model": self.info.model, "texts": texts}


def embedder(url: str, key: str | None = KEY) -> Embedder:
    return Embedder("v1", HttpOptions(base_url=url, api_key=key))


def record(service: Acme, folder: Path, *texts: str, **how: Any) -> None:
    with Recorder(service.url, folder, **how) as recorder:
        for text in texts:
            embedder(recorder.url).embed(EmbedRequest(texts=[text]))


def test_what_was_recorded_is_played_without_the_service(tmp_path: Path) -> None:
    with Acme() as service:
        record(service, tmp_path, "a red apple", "a green pear")
        first = embedder(service.url).embed(EmbedRequest(texts=["a green pear"]))
    with Replay(tmp_path) as replay:
        again = embedder(replay.url, key=None).embed(EmbedRequest(texts=["a green pear"]))
        np.testing.assert_array_equal(first.vectors, again.vectors)
        assert again.tokens == first.tokens
        assert replay.asked == ["POST /embed"]
        with pytest.raises(ProviderError):
            embedder(replay.url, key=None).embed(EmbedRequest(texts=["another"]))
        assert replay.missed == ["POST /embed"]
    played = Recorded(sorted(tmp_path.glob("*.json"))[0])
    assert played.question["texts"] == ["a red apple"], "the other player reads them as well"


def test_refusals_are_recorded_and_several_answers_keep_their_order(tmp_path: Path) -> None:
    with Acme() as service:
        service.next_refusals = [Refused(429, {"message": "slow down"}, {"retry-after": "7"})]
        with Recorder(service.url, tmp_path) as recorder:
            with pytest.raises(RateLimited):
                embedder(recorder.url).embed(EmbedRequest(texts=["a"]))
            embedder(recorder.url).embed(EmbedRequest(texts=["a"]))
    with Replay(tmp_path) as replay:
        with pytest.raises(RateLimited) as limited:
            embedder(replay.url, key=None).embed(EmbedRequest(texts=["a"]))
        assert limited.value.retry_after == 7
        for _ in range(2):
            embedder(replay.url, key=None).embed(EmbedRequest(texts=["a"]))


def test_keys_cookies_and_organisations_are_in_no_file(tmp_path: Path) -> None:
    with Acme() as service:
        service.told = {
            "organization": "secret-corp",
            "account_id": "acct-of-secret-corp",
            "note": "for org-a1b2c3d4e5 with sk-proj-0123456789abcdef, ask boss@secret.example",
            "usage": {"total_tokens": 3},
        }
        record(service, tmp_path, "a red apple")
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    for secret in (KEY, "secret-corp", "abcdefabcdef", "org-a1b2c3d4e5", "sk-proj", "boss@"):
        assert secret not in text, secret
    exchange = json.loads(text)["interactions"][0]
    assert set(exchange["headers"]) == {"content-type", "x-ratelimit-remaining-tokens"}
    assert exchange["body"]["usage"] == {"total_tokens": 3}
    assert set(exchange["request"]) == {"method", "uri", "body"}


@pytest.mark.parametrize(
    "spelled",
    [
        lambda key: key,
        lambda key: base64.b64encode(key.encode()).decode(),
        lambda key: base64.b64encode(b"x" + key.encode()).decode(),
        lambda key: quote(key, safe=""),
    ],
)
def test_a_key_that_is_still_there_keeps_all_from_being_written(
    tmp_path: Path, spelled: Any
) -> None:
    """The key of the request is known without being named."""
    with Acme() as service:
        service.told = {"debug": f"you sent {spelled(KEY)}"}
        with pytest.raises(SecretLeft) as left:
            record(service, tmp_path / "new", "fine", "a red apple")
    assert KEY not in str(left.value)
    assert not (tmp_path / "new").exists()


def test_a_secret_that_is_named_is_looked_for_as_well(tmp_path: Path) -> None:
    with Acme() as service, pytest.raises(SecretLeft):
        record(service, tmp_path, "a sesame seed", secrets=["sesame"])
    assert list(tmp_path.iterdir()) == []


def test_a_test_that_fails_writes_nothing(tmp_path: Path) -> None:
    with Acme() as service, pytest.raises(KeyError), Recorder(service.url, tmp_path) as recorder:
        embedder(recorder.url).embed(EmbedRequest(texts=["a"]))
        raise KeyError("of the test")
    assert list(tmp_path.iterdir()) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
)
NAMES = st.sampled_from(["api_key", "Authorization", "x-api-key", "cookie", "org_id", "email"])


@given(JSON, NAMES)
def test_a_secret_goes_wherever_it_is_named(value: Any, name: str) -> None:
    placed = {"a": [{name: "sesame-seed-123", "kept": value}]}
    found = scrubbed(placed)
    assert found["a"][0][name] == HIDDEN
    assert "sesame-seed-123" not in json.dumps(found)
    assert scrubbed(found) == found


@given(st.text(min_size=6), st.text(), st.text())
def test_a_secret_in_a_text_is_seen(secret: str, before: str, after: str) -> None:
    assert holds(before + secret + after, secret)
    assert holds(json.dumps(before + secret + after), secret)
