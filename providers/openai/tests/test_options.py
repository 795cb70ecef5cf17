"""Settings are checked before anything is sent, and none of them shows a secret."""

from __future__ import annotations

import functools
import logging
import pickle
from typing import Any

import pytest
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from hypothesis import given, strategies as st
from pydantic import SecretStr, ValidationError

from embedcore.errors import ConfigurationError
from embedcore.provider import access
from embedcore.provider.hookspecs import FromEnvironment, KeepsVectors

MODEL = "text-embedding-3-small"


def marked(kind: type) -> dict[str, Any]:
    return {
        name: mark
        for name, field in OpenAIOptions.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, kind)
    }


def test_what_comes_from_the_environment() -> None:
    assert {name: mark.name for name, mark in marked(FromEnvironment).items()} == {
        "api_key": "OPENAI_API_KEY",
        "base_url": "OPENAI_BASE_URL",
        "organization": "OPENAI_ORG_ID",
        "project": "OPENAI_PROJECT_ID",
    }


def test_only_what_can_change_a_vector_is_part_of_the_fingerprint() -> None:
    assert set(OpenAIOptions.model_fields) - set(marked(KeepsVectors)) == {
        "base_url",
        "dimensions",
        "base_model",
        "max_input_tokens",
        "tokenizer",
        "trust_order",
    }
    # Of the query and the further fields, those that are not listed as neutral.
    assert set(OpenAIOptions.model_computed_fields) == {"fields_of_vectors"}


@pytest.mark.fault(134)
@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@api.example/v1",
        "https://hunter2@api.example/v1",
        "https://api.example/v1?key=hunter2",
        "https://api.example/v1#hunter2",
        "https://api.example/hunter2 /v1",
        "https://api.example/v1\r\nX: hunter2",
        "ftp://hunter2.example/v1",
        "https://[hunter2/v1",
        "https://api.example:hunter2/v1",
        "hunter2",
        "https:///hunter2",
        "https://api.example\\hunter2/v1",
    ],
)
def test_addresses_that_hold_secrets_or_are_none_are_refused_unseen(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        OpenAIOptions(base_url=url)
    assert "hunter2" not in str(caught.value)
    assert "base_url" in str(caught.value)


@pytest.mark.parametrize(
    ("given_url", "normal"),
    [
        ("HTTPS://API.OpenAI.com:443/v1/", "https://api.openai.com/v1"),
        ("http://localhost:80/v1//", "http://localhost/v1"),
        ("http://[::1]:8000/V1", "http://[::1]:8000/V1"),
        ("", "https://api.openai.com/v1"),
        ("  ", "https://api.openai.com/v1"),
    ],
)
def test_spellings_of_one_address_are_one(given_url: str, normal: str) -> None:
    assert OpenAIOptions(base_url=given_url).base_url == normal


@pytest.mark.fault(133)
@given(st.ip_addresses())
def test_any_public_address_needs_encryption_or_permission(address: Any) -> None:
    host = f"[{address}]" if address.version == 6 else str(address)
    url = f"http://{host}/v1"
    if access.reach(str(address)) == "public":
        with pytest.raises(ConfigurationError, match="allow_plaintext"):
            OpenAIOptions(base_url=url)
    assert OpenAIOptions(base_url=url, allow_plaintext=True).endpoint.plaintext
    assert not OpenAIOptions(base_url=f"https://{host}/v1").endpoint.plaintext


@pytest.mark.fault(133)
def test_private_plaintext_warns_once_and_loopback_never(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "_warned", set())
    with caplog.at_level(logging.WARNING):
        for url in ("http://10.0.0.8/v1", "http://10.0.0.8/v1/", "http://127.0.0.1:1/v1"):
            create(MODEL, OpenAIOptions(base_url=url))
    assert [record.getMessage().split()[0] for record in caplog.records] == ["http://10.0.0.8/v1"]


@pytest.mark.fault(131)
def test_secrets_are_not_shown_and_not_pickled(canary: str) -> None:
    options = OpenAIOptions(api_key=canary, headers={"Authorization": f"Bearer {canary}"})
    pickled = pickle.dumps(options)
    shown = [repr(options), str(options), repr(vars(options)), options.model_dump_json()]
    assert not any(canary in each for each in [*shown, repr(pickled)])
    copy = pickle.loads(pickled)
    assert (copy.api_key, copy.headers, copy.timeout) == (None, {}, options.timeout)


@pytest.mark.fault(131)
def test_a_callable_key_that_holds_a_secret_is_not_shown(canary: str) -> None:
    options = OpenAIOptions(api_key=functools.partial(str, canary))
    assert canary not in repr(options) + str(options)
    assert canary.encode() not in pickle.dumps(options)


@pytest.mark.fault(131)
@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": "sk-CANARY"},
        {"headers": {"X": "a\nsk-CANARY"}},
        {"headers": {"X-sk\r\n": "sk-CANARY"}},
        {"organization": "sk-CANARY\n"},
        {"api_key": 5, "project": "sk-CANARY\r\nX: y"},
        {"unknown": "sk-CANARY"},
    ],
)
def test_mistakes_do_not_quote_the_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        OpenAIOptions(**wrong)
    assert "sk-CANARY" not in str(caught.value)


@pytest.mark.fault(130)
@pytest.mark.parametrize("name", ["Host", "content-length", "Transfer-Encoding", "a b", "", "x:y"])
def test_headers_that_would_break_the_request_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        OpenAIOptions(headers={name: "x"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"connect_timeout": 0},
        {"dimensions": 0},
        {"price": -1},
        {"price": "NaN"},
        {"max_concurrency": 0},
        {"encoding": "int8"},
        {"server_errors_billed": "yes"},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OpenAIOptions(**wrong)


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError):
        OpenAIOptions().timeout = 5


def test_blank_ids_are_none() -> None:
    options = OpenAIOptions(organization="", project=" ", api_key=SecretStr("x"))
    assert (options.organization, options.project) == (None, None)
