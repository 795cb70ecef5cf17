"""One exchange over a real socket: what is sent, what comes back, what goes wrong."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    InputRejected,
    InputTooLong,
    InvalidResponse,
    OutcomeUnknown,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    ReplyMismatch,
    RequestRejected,
    RequestTooLarge,
    TimedOut,
)
from embedcore.provider.types import EmbedReply, EmbedRequest
from embedcore.testing import FakeOpenAI, vectors_of

Make = Callable[..., OpenAIEmbedder]
Listen = Callable[[bytes | Callable[[socket.socket], None]], str]
TooLate = Callable[[Callable[[float], EmbeddingError]], EmbeddingError]

TEXTS = ["alpha", "beta", "gamma"]
MODEL = "text-embedding-3-small"


def embed(embedder: OpenAIEmbedder, timeout: float | None = None) -> EmbedReply:
    return embedder.embed(EmbedRequest(texts=TEXTS, timeout=timeout))


def fails(embedder: OpenAIEmbedder, timeout: float | None = 120) -> Any:
    with pytest.raises(EmbeddingError) as caught:
        embed(embedder, timeout)
    return caught.value


def bare_deflate(body: bytes) -> bytes:
    """Deflate without the head of zlib, as some servers send it."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


def reply(body: bytes, head: str = "content-type: application/json") -> bytes:
    return (
        f"HTTP/1.1 200 OK\r\n{head}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode() + body


# What is sent


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_texts_go_out_and_vectors_come_back(
    server: FakeOpenAI, make: Make, encoding: str, canary: str
) -> None:
    answer = embed(make(encoding=encoding, organization="org-1", project="proj-1"))
    assert np.array_equal(answer.vectors, vectors_of(TEXTS, 1536))
    assert answer.tokens == server.meter.billed_tokens
    assert answer.model == MODEL
    assert answer.request_id
    assert answer.request_id.startswith("req_")
    sent = server.requests[-1]
    assert sent.json() == {"model": MODEL, "input": TEXTS, "encoding_format": encoding}
    assert sent.headers["authorization"] == f"Bearer {canary}"
    assert sent.headers["openai-organization"] == "org-1"
    assert sent.headers["openai-project"] == "proj-1"
    assert sent.headers["accept-encoding"] == "identity"


def test_dimensions_are_sent_only_when_set(server: FakeOpenAI, make: Make) -> None:
    answer = embed(make(dimensions=256))
    assert server.requests[-1].json()["dimensions"] == 256
    assert np.array_equal(answer.vectors, vectors_of(TEXTS, 256))


def test_settings_of_the_sdk_in_the_environment_change_nothing(
    server: FakeOpenAI, make: Make, monkeypatch: pytest.MonkeyPatch, canary: str
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-other")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-other")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "admin-other")
    ambient = "X-Ambient: secret\nauthorization: Bearer other\nAccept-Encoding: gzip\nno header"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", ambient)
    embed(make())
    sent = server.requests[-1].headers
    assert sent["authorization"] == f"Bearer {canary}"
    assert "openai-organization" not in sent
    assert "openai-project" not in sent
    assert "x-ambient" not in sent
    assert sent["accept-encoding"] == "identity"
    embed(make(headers={"X-Ambient": "asked for"}))
    assert server.requests[-1].headers["x-ambient"] == "asked for"


def test_own_headers_are_sent_and_may_replace_the_key(server: FakeOpenAI, make: Make) -> None:
    server.api_key = None
    embed(make(api_key=None, headers={"api-key": "azure-key", "X-Team": "search"}))
    sent = server.requests[-1].headers
    assert (sent["api-key"], sent["x-team"]) == ("azure-key", "search")
    assert "authorization" not in sent


def test_a_callable_key_is_asked_for_each_request(
    server: FakeOpenAI, make: Make, canary: str
) -> None:
    tokens = iter(["expired", canary])
    embedder = make(api_key=lambda: next(tokens))
    assert isinstance(fails(embedder), AuthenticationFailed)
    assert embed(embedder).tokens


@pytest.mark.fault(18)
def test_no_texts_need_no_request(server: FakeOpenAI, make: Make) -> None:
    answer = make(api_key=None).embed(EmbedRequest(texts=[]))
    assert answer.vectors.shape == (0, 1536)
    assert answer.tokens == 0
    assert not server.requests


# Keys


@pytest.mark.fault(130)
@pytest.mark.parametrize("key", [None, "", "  ", "\n"])
@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "https://gateway.example/v1"])
def test_a_missing_key_is_told_at_the_first_request(key: str | None, url: str) -> None:
    error = fails(create(MODEL, OpenAIOptions(api_key=key, base_url=url)))
    assert isinstance(error, ConfigurationError)
    assert error.billed == "no"
    assert "OPENAI_API_KEY" in str(error)


def test_a_server_nearby_needs_no_key(server: FakeOpenAI, make: Make) -> None:
    server.api_key = None
    embed(make(api_key=None))
    assert "authorization" not in server.requests[-1].headers


@pytest.mark.fault(130)
@pytest.mark.parametrize(
    "key", ["sk-CANARY\n", "sk-CANARY\r\nX: y", "sk CANARY", "sk-CANÄRY", "\x00k"]
)
@pytest.mark.parametrize("callable_key", [False, True])
def test_a_key_that_could_break_a_header_is_refused(
    server: FakeOpenAI, make: Make, key: str, callable_key: bool
) -> None:
    error = fails(make(api_key=(lambda: key) if callable_key else key))
    assert isinstance(error, ConfigurationError)
    assert "CAN" not in str(error)
    assert not server.requests


def test_a_callable_key_that_fails_is_an_authentication_problem(make: Make) -> None:
    def no_token() -> str:
        raise LookupError("no token today")

    error = fails(make(api_key=no_token))
    assert isinstance(error, AuthenticationFailed)
    assert isinstance(error.__cause__, LookupError)
    wrong = fails(make(api_key=lambda: 7))
    assert isinstance(wrong, ConfigurationError)


# What goes wrong


@pytest.mark.parametrize(
    ("mode", "options", "kind", "billed"),
    [
        pytest.param(
            "rate_limited", {"retry_after": 2}, RateLimited, "no", marks=pytest.mark.fault(20)
        ),
        pytest.param("quota_exhausted", {}, QuotaExhausted, "no", marks=pytest.mark.fault(23)),
        ("over_rate", {}, RequestTooLarge, "no"),
        ("request_too_large", {}, RequestTooLarge, "no"),
        pytest.param(
            "context_length", {"position": 1}, InputTooLong, "no", marks=pytest.mark.fault(49)
        ),
        pytest.param("bad_text", {}, RequestRejected, "no", marks=pytest.mark.fault(50)),
        pytest.param(
            "status", {"status": 503}, ProviderUnavailable, "no", marks=pytest.mark.fault(24)
        ),
        pytest.param(
            "status", {"status": 408}, OutcomeUnknown, "unknown", marks=pytest.mark.fault(25)
        ),
        pytest.param("reset", {}, OutcomeUnknown, "unknown", marks=pytest.mark.fault(29)),
        pytest.param("reset_unread", {}, OutcomeUnknown, "unknown", marks=pytest.mark.fault(28)),
        pytest.param("close_silent", {}, OutcomeUnknown, "unknown", marks=pytest.mark.fault(29)),
        pytest.param("truncated", {}, OutcomeUnknown, "unknown", marks=pytest.mark.fault(31)),
        pytest.param("short_chunk", {}, OutcomeUnknown, "unknown", marks=pytest.mark.fault(31)),
        pytest.param("cut_json", {}, InvalidResponse, "yes", marks=pytest.mark.fault(32)),
        pytest.param("broken_json", {}, InvalidResponse, "yes", marks=pytest.mark.fault(32)),
        pytest.param("html", {}, InvalidResponse, "yes", marks=pytest.mark.fault(33)),
        pytest.param("fewer", {}, InvalidResponse, "yes", marks=pytest.mark.fault(37)),
        pytest.param("more", {}, InvalidResponse, "yes", marks=pytest.mark.fault(37)),
        pytest.param("duplicate_index", {}, InvalidResponse, "yes", marks=pytest.mark.fault(39)),
        pytest.param("missing_index", {}, InvalidResponse, "yes", marks=pytest.mark.fault(39)),
        pytest.param(
            "component",
            {"literal": "Infinity"},
            InvalidResponse,
            "yes",
            marks=pytest.mark.fault(40),
        ),
        pytest.param("wrong_width", {}, ReplyMismatch, "yes", marks=pytest.mark.fault(42)),
        pytest.param("mixed_width", {}, InvalidResponse, "yes", marks=pytest.mark.fault(42)),
        pytest.param(
            "bad_base64", {"kind": "length"}, InvalidResponse, "yes", marks=pytest.mark.fault(43)
        ),
        pytest.param("duplicate_keys", {}, InvalidResponse, "yes", marks=pytest.mark.fault(55)),
    ],
)
def test_faults_are_typed_and_the_next_request_works(
    server: FakeOpenAI, make: Make, mode: str, options: dict[str, Any], kind: type, billed: str
) -> None:
    embedder = make()
    server.faults.push(mode, **options)
    error = fails(embedder)
    assert (type(error), error.billed) == (kind, billed)
    assert len(server.requests) == 1, "the SDK tried again by itself"
    assert np.array_equal(embed(embedder).vectors, vectors_of(TEXTS, 1536))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        pytest.param("shuffled", {}, marks=pytest.mark.fault(38)),
        pytest.param("wrong_type", {}, marks=pytest.mark.fault(34)),
        pytest.param("wrong_type", {"content_type": ""}, marks=pytest.mark.fault(34)),
        ("leading_space", {}),
        ("float_list", {}),
        ("late", {"seconds": 0.2}),
    ],
)
def test_odd_but_honest_replies_are_taken(
    server: FakeOpenAI, make: Make, mode: str, options: dict[str, Any]
) -> None:
    server.faults.push(mode, **options)
    answer = embed(make())
    assert np.array_equal(answer.vectors, vectors_of(TEXTS, 1536))
    assert answer.tokens == server.meter.billed_tokens


@pytest.mark.case("A4")
@pytest.mark.fault(40)
@pytest.mark.parametrize("literal", ["NaN", "null"])
@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_a_vector_that_is_none_leaves_the_others(
    server: FakeOpenAI, make: Make, literal: str, encoding: str
) -> None:
    server.faults.push("component", literal=literal, position=1)
    answer = embed(make(encoding=encoding))
    expected = vectors_of(TEXTS, 1536)
    assert np.isnan(answer.vectors[1]).all()
    assert np.array_equal(answer.vectors[[0, 2]], expected[[0, 2]])
    assert answer.tokens == server.meter.billed_tokens


@pytest.mark.fault(22)
def test_the_wait_the_server_names_is_passed_on(server: FakeOpenAI, make: Make) -> None:
    server.faults.push("rate_limited", retry_after_ms=1500)
    assert fails(make()).retry_after == 1.5


@pytest.mark.fault(47)
def test_another_model_in_the_reply_is_passed_on(server: FakeOpenAI, make: Make) -> None:
    server.faults.push("other_model", model="text-embedding-3-large")
    assert embed(make()).model == "text-embedding-3-large"


@pytest.mark.fault(5)
def test_text_that_is_not_unicode_is_named(make: Make) -> None:
    with pytest.raises(InputRejected) as caught:
        make().embed(EmbedRequest(texts=["fine", "\udcff"]))
    assert (caught.value.position, caught.value.billed) == (1, "no")


@pytest.mark.fault(36)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(server: FakeOpenAI, make: Make, status: int) -> None:
    server.faults.push("redirect", status=status)
    error = fails(make())
    assert isinstance(error, ConfigurationError)
    assert "127.0.0.1" in str(error)
    assert not server.elsewhere


# Time


@pytest.mark.case("D5")
@pytest.mark.fault(30)
def test_a_server_that_hangs_is_left_in_time(
    server: FakeOpenAI, make: Make, too_late: TooLate
) -> None:
    server.faults.push("hang", seconds=3600, times=4)
    error = too_late(lambda seconds: fails(make(timeout=3600), timeout=seconds))
    assert isinstance(error, TimedOut)
    assert "in time" in str(error)


def test_without_time_left_nothing_is_sent(server: FakeOpenAI, make: Make) -> None:
    error = fails(make(), timeout=0)
    assert isinstance(error, ProviderUnavailable)
    assert error.billed == "no"
    assert not server.requests


# Connections


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/v1",
        "http://no-such-host.invalid.localhost./v1",
        "https://127.0.0.1:{}/v1",
    ],
)
def test_what_cannot_be_reached_was_not_billed(server: FakeOpenAI, url: str) -> None:
    # Nobody listens; no such name; no TLS spoken.
    port = server.url.rpartition(":")[2]
    options = OpenAIOptions(base_url=url.format(port), api_key="k", allow_plaintext=True)
    error = fails(create(MODEL, options))
    assert isinstance(error, ProviderUnavailable)
    assert (error.billed, error.retryable) == ("no", True)


@pytest.mark.fault(54)
def test_a_connection_closed_between_calls_is_replaced(server: FakeOpenAI, make: Make) -> None:
    embedder = make()
    server.faults.push("close_after")
    embed(embedder)
    time.sleep(0.1)
    assert embed(embedder).tokens


@pytest.mark.fault(35)
@pytest.mark.parametrize("mode", ["endless", "gzip_bomb"])
def test_bodies_without_end_are_cut_in_little_memory(
    server: FakeOpenAI, make: Make, mode: str
) -> None:
    embedder = make()
    embed(embedder)
    server.faults.push(mode)
    tracemalloc.start()
    error = fails(embedder, timeout=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, InvalidResponse)
    assert "larger than" in str(error)
    assert peak < 12_000_000, f"{peak:,} bytes"


@pytest.mark.fault(35)
def test_a_bomb_is_unpacked_a_little_at_a_time(listen: Listen) -> None:
    packed = gzip.compress(b" " * 64_000_000)
    embedder = create("m", OpenAIOptions(base_url=listen(reply(packed, "content-encoding: gzip"))))
    with pytest.raises(InvalidResponse):
        embedder.embed(EmbedRequest(texts=["a"]))  # now the SDK is loaded
    tracemalloc.start()
    with pytest.raises(InvalidResponse, match="larger than"):
        embedder.embed(EmbedRequest(texts=["a"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000, f"{peak:,} bytes"


@pytest.mark.fault(35)
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, bare_deflate])
def test_compressed_replies_are_understood_though_not_asked_for(listen: Listen, pack: Any) -> None:
    body = pack(b'{"data":[{"index":0,"embedding":[1.0]}],"model":"m"}')
    name = "gzip" if pack is gzip.compress else "deflate"
    url = listen(reply(body, f"content-encoding: {name}"))
    answer = create("m", OpenAIOptions(base_url=url)).embed(EmbedRequest(texts=["a"]))
    assert answer.vectors.tolist() == [[1.0]]


@pytest.mark.fault(35)
@pytest.mark.parametrize("head", ["gzip, gzip", "br", "gzip"])
def test_compression_that_cannot_be_bounded_or_read_is_refused(listen: Listen, head: str) -> None:
    url = listen(reply(b"nonsense", f"content-encoding: {head}"))
    assert isinstance(fails(create("m", OpenAIOptions(base_url=url))), InvalidResponse)


@pytest.mark.fault(52)
def test_an_endless_error_body_is_read_only_in_part(listen: Listen) -> None:
    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 401 Unauthorized\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(4_000):
            connection.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")

    error = fails(create("m", OpenAIOptions(base_url=listen(pour))))
    assert isinstance(error, AuthenticationFailed)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x16\x03\x01",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
    ],
)
def test_what_is_not_http_leaves_the_outcome_unknown(listen: Listen, raw: bytes) -> None:
    error = fails(create("m", OpenAIOptions(base_url=listen(raw))))
    assert isinstance(error, OutcomeUnknown)


@pytest.mark.fault(141)
def test_proxies_of_the_environment_are_used(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, canary: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)
    options = OpenAIOptions(
        base_url="http://elsewhere.example/v1", api_key=canary, allow_plaintext=True
    )
    error = fails(create(MODEL, options))
    # The fake does not forward: that it was asked is the proof.
    assert isinstance(error, EmbeddingError)
    assert server.requests[-1].path.endswith("elsewhere.example/v1/embeddings")
    monkeypatch.setenv("NO_PROXY", "elsewhere.example")
    asked = len(server.requests)
    error = fails(create(MODEL, options))
    assert isinstance(error, ProviderUnavailable)
    assert len(server.requests) == asked


@pytest.mark.case("D1")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_what_is_for_this_machine_leaves_it_by_no_proxy(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    """A file that was only found may name such an address, because nothing is sent away by it."""
    with FakeOpenAI() as proxy:
        monkeypatch.setenv(variable, proxy.url)
        port = server.url.rpartition(":")[2]
        options = OpenAIOptions(base_url=f"http://{host}:{port}/v1", api_key=server.api_key)
        embedder = create(MODEL, options)
        # The server listens at the address of IPv4 only.
        with suppress(ProviderUnavailable) if "::" in host else nullcontext():
            assert len(embedder.embed(EmbedRequest(texts=["a"])).vectors) == 1
        assert proxy.requests == []


@pytest.mark.fault(141)
def test_a_proxy_that_cannot_be_used_is_a_setting(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://user:hunter2@proxy:1")
    error = fails(make(base_url="http://elsewhere.example/v1", allow_plaintext=True))
    assert isinstance(error, ConfigurationError)
    assert "PROXY" in str(error)
    assert "hunter2" not in str(error)


# Life


def test_threads_share_one_embedder(server: FakeOpenAI, make: Make) -> None:
    embedder, wrong = make(), []

    def work(number: int) -> None:
        for turn in range(5):
            texts = [f"{number} {turn} {each}" for each in range(1 + turn)]
            found = embedder.embed(EmbedRequest(texts=texts)).vectors
            if not np.array_equal(found, vectors_of(texts, 1536)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(server.requests) == 40


def test_a_closed_embedder_opens_again_when_used(make: Make) -> None:
    embedder = make()
    embedder.close()
    assert embed(embedder).tokens
    embedder.close()
    embedder.close()
    assert embed(embedder).tokens


@pytest.mark.fault(124)
def test_ctrl_c_passes_through(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedcore.provider.http_connections import Connection

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(make())
