"""Heads that tell enough, whatever becomes of the rest."""

from __future__ import annotations

import gzip
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from pydantic import SecretStr, ValidationError

from embedcore.errors import (
    AuthenticationFailed,
    EmbeddingError,
    InvalidResponse,
    OutcomeUnknown,
    RateLimited,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.provider.types import EmbedRequest

Listen = Callable[[bytes | Callable[[socket.socket], None]], str]

ONE = b'{"data":[{"index":0,"embedding":[1.0]}],"model":"m"}'


def reply(body: bytes, head: str) -> bytes:
    return (
        f"HTTP/1.1 200 OK\r\n{head}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode() + body


def fails(url: str, timeout: float = 10.0) -> Any:
    embedder = create("m", OpenAIOptions(base_url=url, timeout=timeout))
    with pytest.raises(EmbeddingError) as caught:
        embedder.embed(EmbedRequest(texts=["a"]))
    embedder.close()
    return caught.value


@pytest.mark.fault(31)
def test_a_packed_reply_without_its_end_broke_off(listen: Listen) -> None:
    url = listen(reply(gzip.compress(ONE)[:-12], "content-encoding: gzip"))
    assert isinstance(fails(url), OutcomeUnknown)


@pytest.mark.fault(35)
def test_headers_need_not_be_ascii(listen: Listen) -> None:
    url = listen(reply(ONE, "x-error-message: caf\xe9\r\nserver: 服务器"))
    answer = create("m", OpenAIOptions(base_url=url)).embed(EmbedRequest(texts=["a"]))
    assert answer.vectors.tolist() == [[1.0]]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, br", "compress", "x" * 400])
def test_a_reply_packed_otherwise_than_asked_says_how_and_what_to_do(
    listen: Listen, encoding: str
) -> None:
    error = fails(listen(reply(ONE, f"content-encoding: {encoding}")))
    assert isinstance(error, InvalidResponse)
    assert error.billed == "unknown"
    message = str(error)
    assert f"content-encoding: {encoding[:40]})" in message
    assert "accept-encoding: identity" in message
    assert "off for this address" in message


@pytest.mark.parametrize("name", ["Accept-Encoding", "accept-encoding"])
def test_no_option_announces_what_cannot_be_read(name: str) -> None:
    with pytest.raises(ValidationError, match=r"(?i)accept-encoding"):
        OpenAIOptions(headers={name: SecretStr("br")})


# Bodies of a refusal that nobody can read, or that do not come.
UNREADABLE = {
    "brotli": b"content-encoding: br\r\ncontent-length: 4\r\n\r\n\x8b\x00\x80a",
    "unheard of": b"content-encoding: aws-chunked\r\ncontent-length: 1\r\n\r\nx",
    "no gzip": b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope",
    "cut": b'content-length: 400\r\n\r\n{"error": {"mess',
    "cut chunk": b'transfer-encoding: chunked\r\n\r\n20\r\n{"error',
    "no chunk": b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
}


@pytest.mark.case("C1")
@pytest.mark.case("B6")
@pytest.mark.parametrize("status", [401, 403, 413, 429])
@pytest.mark.parametrize("rest", UNREADABLE)
def test_a_refusal_keeps_its_status_whatever_its_body(
    listen: Listen, status: int, rest: str
) -> None:
    """By the status it costs nothing, and that is what the head says."""
    raw = b"HTTP/1.1 %d X\r\nretry-after: 7\r\n" % status + UNREADABLE[rest]
    error = fails(listen(raw))
    # A 403 without an error of the API may be a firewall's, for a text that it dislikes.
    kinds = {401: AuthenticationFailed, 403: RequestRejected, 413: RequestTooLarge}
    assert isinstance(error, kinds.get(status, RateLimited))
    assert (error.status, error.billed) == (status, "no")
    assert getattr(error, "retry_after", 7) == 7


@pytest.mark.case("C1")
@pytest.mark.case("D5")
@pytest.mark.parametrize("ends", ["reset", "time"])
def test_a_refusal_whose_body_never_comes_is_one(listen: Listen, ends: str) -> None:
    def broken(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 429 X\r\nretry-after: 7\r\ncontent-length: 400\r\n\r\n")
        if ends == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        else:
            connection.recv(1 << 16)
            connection.recv(1 << 16)

    error = fails(listen(broken), 1.0)
    assert isinstance(error, RateLimited)
    assert (error.billed, error.retry_after) == ("no", 7)
