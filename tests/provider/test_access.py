"""Which addresses get texts and keys, and which keys are sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st
from pydantic import SecretStr

from embedcore.errors import AuthenticationFailed, ConfigurationError, PermissionDenied
from embedcore.provider import access

KEY = "sk-CANARY7d1f0e5b9a4c"
PUBLIC = access.parse("https://api.example/v1", such_as="")


@pytest.mark.fault(133)
@pytest.mark.parametrize(
    ("host", "reach"),
    [
        ("localhost", "loopback"),
        ("api.localhost", "loopback"),
        ("127.0.0.1", "loopback"),
        ("127.8.8.8", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("10.1.2.3", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("169.254.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00::1", "private"),
        ("fe80::1%eth0", "private"),
        ("::ffff:10.0.0.1", "private"),
        ("vllm", "private"),
        ("gpu-box.local", "private"),
        ("vllm.default.svc.cluster.local", "private"),
        ("embed.corp.internal", "private"),
        ("8.8.8.8", "public"),
        ("172.32.0.1", "public"),
        ("2001:4860:4860::8888", "public"),
        ("::ffff:8.8.8.8", "public"),
        ("api.openai.com", "public"),
        ("127.0.0.1.evil.example", "public"),
        ("localhost.evil.example", "public"),
        ("127.1", "public"),
        ("2130706433", "public"),
        ("0x7f000001", "public"),
    ],
)
def test_how_far_an_address_reaches(host: str, reach: str) -> None:
    assert access.reach(host) == reach


def key_of(given: SecretStr | Callable[[], str] | None, endpoint: access.Endpoint) -> str | None:
    return access.key_of(given, endpoint, variable="ACME_KEY", keys_at="https://acme.example/keys")


def test_a_key_is_given_or_asked_for() -> None:
    assert key_of(SecretStr(KEY), PUBLIC) == KEY
    assert key_of(lambda: KEY, PUBLIC) == KEY


@pytest.mark.parametrize("given_key", [None, SecretStr(""), SecretStr("  "), lambda: ""])
def test_without_a_key_only_near_servers_are_called(given_key: SecretStr | None) -> None:
    with pytest.raises(ConfigurationError, match=r"ACME_KEY.*acme\.example/keys"):
        key_of(given_key, PUBLIC)
    for near in ("http://localhost:11434", "http://10.0.0.8/v1"):
        assert key_of(given_key, access.parse(near, such_as="")) is None


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_any_key_of_printable_ascii_is_sent(text: str) -> None:
    assert key_of(SecretStr(text), PUBLIC) == text


@given(st.characters().filter(lambda sign: not "!" <= sign <= "~"))
def test_a_key_that_no_header_takes_is_refused_unseen(sign: str) -> None:
    with pytest.raises(ConfigurationError, match="ACME_KEY") as caught:
        key_of(SecretStr(f"{KEY}{sign}{KEY}"), PUBLIC)
    assert KEY not in str(caught.value)


def test_a_callable_that_fails_is_named_by_its_error_alone() -> None:
    def fails() -> str:
        raise KeyError(KEY)

    with pytest.raises(AuthenticationFailed, match="KeyError") as caught:
        key_of(fails, PUBLIC)
    assert KEY not in str(caught.value)


def test_an_error_of_ours_passes() -> None:
    def refuses() -> str:
        raise PermissionDenied("no token for you", billed="no")

    with pytest.raises(PermissionDenied, match="no token"):
        key_of(refuses, PUBLIC)


def test_a_callable_gives_a_string() -> None:
    with pytest.raises(ConfigurationError, match="bytes"):
        key_of(lambda: KEY.encode(), PUBLIC)  # type: ignore[arg-type, return-value]
