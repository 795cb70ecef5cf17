"""The probe finds what a server does, and its settings make a client whose vectors are right."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from embedcore_openai.encodings import forget
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from embedcore_openai.presets import PRESETS
from embedcore_openai.probe import Probe
from hypothesis import given, settings, strategies as st

from embedcore.cli.provider import toml_of
from embedcore.errors import ConfigurationError, InvalidResponse, ProviderUnavailable
from embedcore.provider.types import EmbedRequest
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.embeddings import FakeModel
from embedcore.testing.openai.quirks import SERVERS, Quirks
from embedcore.testing.vectors import vectors_of

MODEL = "acme/tiny"
MODELS = {MODEL: FakeModel(dimensions=24)}
# Two long texts of 18,600 bytes are 4,650 tokens of a fake.
READ_WHOLE = 4_650


def probed(server: FakeOpenAI, **given_options: Any) -> Mapping[str, Any]:
    probe = Probe(server.base_url, model=MODEL, **given_options)
    probe.choose_model()
    found = probe.run()
    assert probe.requests <= probe.most_requests
    assert found["tokens"] <= probe.most_tokens
    return found


def largest(quirks: Quirks) -> int:
    if quirks.info is not None:
        return int(str(quirks.info["max_client_batch_size"]))
    return 1 << (quirks.max_texts.bit_length() - 1)


def encoding_of(quirks: Quirks) -> str:
    if "base64" in quirks.encodings and not quirks.ignores_encoding:
        return "base64"
    if quirks.ignores_encoding or "float" in quirks.encodings:
        return "float"
    return "float" if quirks.unknown_fields == "ignored" else "omit"


def cuts(quirks: Quirks) -> str:
    if quirks.max_text_tokens > READ_WHOLE:
        return "unknown"
    return "silent" if quirks.long_texts == "silent" or quirks.must_have else "error"


def check(found: Mapping[str, Any], quirks: Quirks) -> None:
    options = found["options"]
    assert options["max_texts_per_request"] == largest(quirks)
    assert options["encoding"] == encoding_of(quirks)
    assert options["dimensions_field"] == (quirks.width_field or "none")
    assert options["truncation"] == cuts(quirks)
    assert options.get("trust_order", False) == (quirks.index == "none")
    assert found["findings"]["width"] == "24"
    assert found["findings"]["norm"] == f"{quirks.norm:.4g}"
    assert found["findings"]["empty text"].startswith("taken" if quirks.empty else "refused")
    reported = found["findings"]["usage"].startswith("reported")
    assert reported == (quirks.usage != "none")


def check_client(found: Mapping[str, Any], quirks: Quirks, *, of: Callable[..., Any]) -> None:
    """The profile as printed gives the right vectors at the first request."""
    profile = tomllib.loads(toml_of(found, None))["profiles"]["probed"]
    assert profile["model"] == f"openai:{MODEL}"
    embedder = of(MODEL, OpenAIOptions(**profile["options"]))
    texts = [f"text {i}" for i in range(min(largest(quirks), 40))]
    reply = embedder.embed(EmbedRequest(texts=texts))
    embedder.close()
    expected = vectors_of(texts, 24) * np.float32(quirks.norm)
    np.testing.assert_allclose(reply.vectors, expected, rtol=1e-6)


@pytest.mark.parametrize("name", SERVERS)
def test_the_probe_finds_the_flags_of_each_server(name: str) -> None:
    quirks = SERVERS[name]
    with FakeOpenAI(api_key=None, models=MODELS, quirks=quirks) as server:
        found = probed(server)
        check(found, quirks)
        asked = len(server.requests)
        check_client(found, quirks, of=create)
        assert [one.status for one in server.requests[asked:]] == [200]
    assert found["requests"] == asked
    if "body" not in PRESETS[name].options:
        assert name in found["presets_that_fit"]
    told = quirks.owner != "fake" or quirks.info is not None or quirks.props is not None
    told = told or bool(quirks.headers)
    assert found["preset"] == (name if told else None)


@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        Quirks,
        encodings=st.sets(st.sampled_from(["float", "base64"])).map(frozenset),
        ignores_encoding=st.booleans(),
        max_texts=st.integers(2, 300),
        max_text_tokens=st.sampled_from([64, 512, 8192]),
        long_texts=st.sampled_from(["error", "silent"]),
        too_long_status=st.sampled_from([400, 413, 422, 500]),
        width_field=st.sampled_from(["dimensions", "output_dimension", None]),
        unknown_fields=st.sampled_from(["ignored", "refused"]),
        usage=st.sampled_from(["tokens", "total", "none", "characters"]),
        index=st.sampled_from(["all", "no_zero", "none"]),
        norm=st.sampled_from([0.5, 1.0, 3.0]),
        empty=st.booleans(),
        lists_models=st.booleans(),
    )
)
def test_whatever_a_server_does_its_settings_give_the_right_vectors(quirks: Quirks) -> None:
    forget()
    with FakeOpenAI(api_key=None, models=MODELS, quirks=quirks) as server:
        found = probed(server)
        check(found, quirks)
        check_client(found, quirks, of=create)


def test_a_server_that_gives_no_vectors_is_an_error_that_shows_no_key(canary: str) -> None:
    with FakeOpenAI(api_key=canary, models=MODELS) as server:
        server.faults.always("echo_key")
        with pytest.raises(InvalidResponse) as caught:
            probed(server, key=canary)
    assert "401" in str(caught.value)
    assert canary not in str(caught.value)


def test_no_key_is_sent_but_the_one_that_is_given(
    canary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    with FakeOpenAI(api_key=None, models=MODELS) as server:
        probed(server)
        assert not any("authorization" in one.headers for one in server.requests)
        probed(server, key="another-key-of-ours")
        sent = {one.headers.get("authorization") for one in server.requests}
    assert sent == {None, "Bearer another-key-of-ours"}


def test_what_it_used_is_what_the_server_billed() -> None:
    with FakeOpenAI(api_key=None, models=MODELS, quirks=SERVERS["vllm"]) as server:
        found = probed(server)
        assert found["tokens_reported"]
        assert found["tokens"] >= server.meter.billed_tokens


def test_an_address_without_a_path_is_found() -> None:
    with FakeOpenAI(api_key=None, models=MODELS) as server:
        probe = Probe(server.url)
        assert probe.choose_model() == (MODEL, [MODEL])
        assert probe.run()["options"]["base_url"] == server.base_url


def test_a_model_is_named_where_none_is_listed() -> None:
    with (
        FakeOpenAI(api_key=None, models=MODELS, quirks=SERVERS["mistral"]) as server,
        pytest.raises(ConfigurationError, match="--model"),
    ):
        Probe(server.base_url).choose_model()


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ProviderUnavailable):
        Probe("http://127.0.0.1:9/v1", model=MODEL).run()
