"""Does the provider that people are told to copy do as the how-to says, on a real socket?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from embedcore import errors
from embedcore.provider import registry
from embedcore.provider.types import EmbedReply, EmbedRequest
from embedcore.testing.openai.http import HttpReply, Listener, close, cut_off, hang, reset
from embedcore.testing.vectors import tokens_of, vectors_of

KEY = "acme-0123456789abcdef"
TEXTS = ("a red apple", "été 🍏", "a red apple")


@pytest.fixture
def embedder(plugin: ModuleType, url: str) -> Any:
    return plugin.AcmeEmbedder("v1", plugin.AcmeOptions(base_url=url, api_key=KEY))


def ask(embedder: Any, timeout: float | None = None) -> EmbedReply:
    reply: EmbedReply = embedder.embed(EmbedRequest(texts=TEXTS, timeout=timeout))
    return reply


def failure_of(embedder: Any, timeout: float | None = None) -> errors.ProviderError:
    """The error of one request, seen not to hold the key."""
    with pytest.raises(errors.ProviderError) as caught:
        ask(embedder, timeout)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    return caught.value


def test_success(embedder: Any, service: Any) -> None:
    reply = ask(embedder)
    np.testing.assert_array_equal(reply.vectors, vectors_of(TEXTS, 16))
    assert reply.vectors.dtype == np.float32
    assert reply.vectors.flags.c_contiguous
    assert reply.tokens == sum(map(tokens_of, TEXTS))
    assert reply.model == "v1"
    (request,) = service.requests
    assert (request.method, request.path) == ("POST", "/embed")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.json() == {"model": "v1", "texts": list(TEXTS)}


@pytest.mark.parametrize(
    ("path", "expected"),
    [("", "/embed"), ("/", "/embed"), ("/v2", "/v2/embed"), ("/a/b/", "/a/b/embed")],
)
def test_the_path_of_the_base_url_counts(
    plugin: ModuleType, url: str, service: Any, path: str, expected: str
) -> None:
    ask(plugin.AcmeEmbedder("v1", plugin.AcmeOptions(base_url=f"{url}{path}", api_key=KEY)))
    assert [request.path for request in service.requests] == [expected]


@pytest.mark.fault(48)
@pytest.mark.fault(51)
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.RequestRejected),
        (401, errors.AuthenticationFailed),
        (403, errors.PermissionDenied),
        (404, errors.ModelNotFound),
        (422, errors.RequestRejected),
    ],
)
def test_a_refusal_is_permanent_and_free(
    embedder: Any, service: Any, status: int, kind: type[errors.ProviderError]
) -> None:
    service.reply = HttpReply(status=status, body=KEY.encode())
    error = failure_of(embedder)
    assert type(error) is kind
    assert (error.billed, error.retryable, error.status) == ("no", False, status)
    assert len(service.requests) == 1


@pytest.mark.fault(20)
@pytest.mark.fault(21)
@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("7.5", 7.5),
        (".", None),
        ("1.2.3", None),
        (None, None),
        ("-7", None),
        ("soon", None),
        ("nan", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
@pytest.mark.parametrize(
    ("status", "kind"), [(429, errors.RateLimited), (503, errors.ProviderUnavailable)]
)
def test_later_is_free_and_says_when(
    embedder: Any,
    service: Any,
    status: int,
    kind: type[errors.TransientProviderError],
    header: str | None,
    seconds: float | None,
) -> None:
    headers = {} if header is None else {"retry-after": header}
    service.reply = HttpReply(status=status, headers=headers)
    error = failure_of(embedder)
    assert isinstance(error, kind)
    assert (error.billed, error.retryable, error.retry_after) == ("no", True, seconds)
    assert len(service.requests) == 1


@pytest.mark.fault(24)
@pytest.mark.fault(25)
@pytest.mark.parametrize("status", [202, 204, 408, 409, 500, 502, 504, 529])
def test_any_other_status_has_an_unknown_outcome(embedder: Any, service: Any, status: int) -> None:
    service.reply = HttpReply(status=status)
    error = failure_of(embedder)
    assert type(error) is errors.OutcomeUnknown
    assert (error.billed, error.retryable, error.status) == ("unknown", True, status)


@pytest.mark.fault(30)
@pytest.mark.parametrize("shorter", ["option", "request"])
def test_a_timeout_has_an_unknown_outcome(
    plugin: ModuleType, url: str, service: Any, shorter: str
) -> None:
    # The longer one would be an hour.
    service.delivery = hang(3600)
    seconds, timeout = (0.2, 3600) if shorter == "option" else (3600, 0.2)
    options = plugin.AcmeOptions(base_url=url, api_key=KEY, timeout=seconds)
    error = failure_of(plugin.AcmeEmbedder("v1", options), timeout)
    assert (error.billed, error.retryable) == ("unknown", True)
    assert "TimeoutError" in str(error)


@pytest.mark.fault(29)
@pytest.mark.fault(31)
@pytest.mark.parametrize(
    "delivery",
    [reset, close, cut_off(0.5), cut_off(0.5, chunked=True)],
    ids=["reset", "closed", "cut off", "cut off within a chunk"],
)
def test_a_lost_answer_has_an_unknown_outcome(embedder: Any, service: Any, delivery: Any) -> None:
    service.delivery = delivery
    error = failure_of(embedder)
    assert (error.billed, error.retryable) == ("unknown", True)


@pytest.mark.fault(27)
@pytest.mark.parametrize("base_url", ["http://127.0.0.1:9", "http://acme.invalid"])
def test_no_connection_costs_nothing(plugin: ModuleType, base_url: str) -> None:
    options = plugin.AcmeOptions(base_url=base_url, api_key=KEY)
    error = failure_of(plugin.AcmeEmbedder("v1", options))
    assert isinstance(error, errors.ProviderUnavailable)
    assert (error.billed, error.retryable) == ("no", True)


@pytest.mark.fault(27)
def test_failing_tls_costs_nothing_and_sends_no_request(
    plugin: ModuleType, url: str, service: Any
) -> None:
    options = plugin.AcmeOptions(base_url=url.replace("http:", "https:"), api_key=KEY, timeout=0.5)
    assert failure_of(plugin.AcmeEmbedder("v1", options)).billed == "no"
    # The bytes of a handshake are random: the server may take them for a request of their own.
    assert [request for request in service.requests if request.method == "POST"] == []
    assert KEY not in repr(service.requests)


@pytest.mark.fault(36)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(embedder: Any, service: Any, status: int) -> None:
    elsewhere = type(service)()
    listener = Listener(elsewhere)
    try:
        service.reply = HttpReply(status=status, headers={"location": f"{listener.url}/embed"})
        error = failure_of(embedder)
    finally:
        listener.close()
    assert isinstance(error, errors.RequestRejected)
    assert elsewhere.requests == []


@pytest.mark.fault(32)
@pytest.mark.fault(33)
@pytest.mark.fault(40)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>proxy</html>",
        b'{"vectors": [[1.0',
        b"\xff\xfe\xff",
        b"[" * 100_000,
        b"null",
        b"[[1.0, 2.0]]",
        b"{}",
        b'{"model": "v1", "tokens": 3}',
        b'{"model": "v1", "tokens": 3, "vectors": [["1.0", "2.0"]]}',
        b'{"model": "v1", "tokens": 3, "vectors": [[1.0, null]]}',
        b'{"model": "v1", "tokens": 3, "vectors": [[1.0, 2.0], [1.0]]}',
        b'{"model": "v1", "tokens": 3, "vectors": [{"a": 1}]}',
    ],
)
def test_garbage_is_billed_and_not_tried_again(embedder: Any, service: Any, body: bytes) -> None:
    service.reply = HttpReply(body=body)
    error = failure_of(embedder)
    assert type(error) is errors.InvalidResponse
    assert (error.billed, error.retryable) == ("yes", False)


@pytest.mark.fault(130)
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "ACME_API_KEY is not set"),
        (f"{KEY}\nX-Header: 1", "ACME_API_KEY is unusable"),
        (f"{KEY}\r", "ACME_API_KEY is unusable"),
        (f"clé-{KEY}", "ACME_API_KEY is unusable"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_first(
    plugin: ModuleType, url: str, service: Any, key: str, said: str
) -> None:
    embedder = plugin.AcmeEmbedder("v1", plugin.AcmeOptions(base_url=url, api_key=key))
    with pytest.raises(errors.ConfigurationError, match=said) as caught:
        ask(embedder)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert service.requests == []


@pytest.mark.fault(129)
def test_a_wrong_option_is_named_and_a_key_is_not(plugin: ModuleType) -> None:
    provider = plugin.embedcore_provider()
    with pytest.raises(errors.ConfigurationError, match="did you mean 'timeout'"):
        registry.validate_options(provider, {"timeuot": 3, "api_key": KEY})
    with pytest.raises(errors.ConfigurationError, match="timeout") as caught:
        registry.validate_options(provider, {"timeout": 0, "api_key": KEY})
    assert KEY not in str(caught.value)
    options = registry.validate_options(provider, {"api_key": KEY})
    assert KEY not in repr(options)
    assert registry.build(provider, "v1", options).info.model == "v1"


@pytest.mark.parametrize(
    ("kind", "skipped"),
    [
        ("plain", 7),
        pytest.param("http", None, marks=pytest.mark.campaign(short=True)),
        pytest.param("batch", None, marks=pytest.mark.campaign(short=True)),
        pytest.param("local", None, marks=pytest.mark.campaign(short=True)),
    ],
)
def test_the_templates_own_tests_pass(
    template: Callable[[str], Path], tmp_path: Path, kind: str, skipped: int | None
) -> None:
    folder = template(kind)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(
        [*command, "-c", str(folder / "pyproject.toml")],
        env={
            **os.environ,
            "PYTHONPATH": str(folder / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_ADDOPTS": "",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if skipped is not None:
        assert re.findall(r"(\d+) skipped", done.stdout) == [str(skipped)]
        assert "info.max_input_tokens is None" in done.stdout
