"""Whatever a server does with its bytes, an attempt ends with its time-out, in little memory.

No test measures time: a server that is left alone gives a good reply at last, so that a client
which waits for it is found out.
"""

from __future__ import annotations

import socket
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create

from embedcore.errors import EmbeddingError, InvalidResponse, TimedOut
from embedcore.provider.types import EmbedReply, EmbedRequest

Listen = Callable[[bytes | Callable[[socket.socket], None]], str]
TooLate = Callable[[Callable[[float], EmbeddingError]], EmbeddingError]

BODY = b'{"data":[{"index":0,"embedding":[1.0]}],"model":"m"}'
GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(BODY), BODY)
# So often a server waits so long: far longer than any client here should.
STEPS, PAUSE = 300, 0.1


class Slow:
    """A server that is slow in one way. ``left``: the client went before it had its reply."""

    def __init__(self, parts: Callable[[], Any]) -> None:
        self._parts = parts
        self.left = threading.Event()
        self._stop = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        try:
            for part in self._parts():
                connection.sendall(part)
                if self._stop.wait(PAUSE):
                    return
        except OSError:
            self.left.set()


def byte_by_byte() -> Any:
    head, _, body = GOOD.partition(b"\r\n\r\n")
    head += b"\r\nx: " + b"y" * STEPS
    yield from (head[at : at + 1] for at in range(len(head)))
    yield b"\r\n\r\n" + body


def header_by_header() -> Any:
    yield b"HTTP/1.1 200 OK\r\n"
    yield from (b"x-%d: 1\r\n" % number for number in range(STEPS))
    yield GOOD.partition(b"\r\n")[2]


def informational(status: bytes) -> Callable[[], Any]:
    def parts() -> Any:
        yield from (b"HTTP/1.1 " + status + b"\r\nx: 1\r\n\r\n" for _ in range(STEPS))
        yield GOOD

    return parts


def slow_body() -> Any:
    head, _, body = GOOD.partition(b"\r\n\r\n")
    yield head + b"\r\n\r\n"
    yield from (body[at : at + 1] for at in range(len(body)))


def chunk_by_chunk() -> Any:
    yield b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    for at in range(STEPS):
        yield b"1\r\n" + (BODY + b" " * STEPS)[at : at + 1] + b"\r\n"
    yield b"0\r\n\r\n"


WAYS = {
    "headers byte by byte": byte_by_byte,
    "header by header": header_by_header,
    "processing": informational(b"102 Processing"),
    "early hints": informational(b"103 Early Hints"),
    "continue": informational(b"100 Continue"),
    "a body byte by byte": slow_body,
    "chunk by chunk": chunk_by_chunk,
}


@pytest.mark.case("D5")
@pytest.mark.fault(53)
@pytest.mark.parametrize("by_option", [True, False], ids=["option", "request"])
@pytest.mark.parametrize("way", WAYS)
def test_the_whole_attempt_is_bounded(
    listen: Listen, too_late: TooLate, way: str, by_option: bool
) -> None:
    slow = Slow(WAYS[way])
    url = listen(slow)

    def attempt(seconds: float) -> EmbeddingError:
        embedder = create("m", OpenAIOptions(base_url=url, timeout=seconds if by_option else 300))
        return failure(embedder, timeout=None if by_option else seconds)

    error = too_late(attempt)
    assert isinstance(error, TimedOut)
    assert "in time" in str(error)
    assert (error.billed, error.retryable) == ("unknown", True)
    assert slow.left.wait(timeout=60), "the connection was left open"
    slow._stop.set()


@pytest.mark.case("D5")
def test_a_flood_of_informational_answers_is_bounded(listen: Listen, too_late: TooLate) -> None:
    """As fast as the connection takes them: there is always something to read."""
    gone = threading.Event()

    def pour(connection: socket.socket) -> None:
        try:
            for _ in range(100_000):
                connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)
            connection.sendall(GOOD)
        except OSError:
            gone.set()

    url = listen(pour)
    assert isinstance(too_late(lambda seconds: failure_at(url, seconds)), TimedOut)
    assert gone.wait(timeout=60)


@pytest.mark.case("D5")
def test_a_server_that_does_not_read_the_request_is_bounded(
    listen: Listen, too_late: TooLate
) -> None:
    over = threading.Event()
    url = listen(lambda _: bool(over.wait()))
    error = too_late(lambda seconds: failure_at(url, seconds, text="a" * 20_000_000))
    over.set()
    assert isinstance(error, TimedOut)


@pytest.mark.case("D5")
def test_a_reply_that_comes_in_many_steps_and_in_time_is_taken(listen: Listen) -> None:
    def steps(connection: socket.socket) -> None:
        for at in range(0, len(GOOD), 7):
            connection.sendall(GOOD[at : at + 7])

    embedder = create("m", OpenAIOptions(base_url=listen(steps), timeout=300))
    assert embedder.embed(EmbedRequest(texts=["a"])).vectors.tolist() == [[1.0]]


@pytest.mark.case("D5")
def test_a_proxy_is_bounded_as_well(
    listen: Listen, too_late: TooLate, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(byte_by_byte)
    monkeypatch.setenv("HTTP_PROXY", listen(slow).removesuffix("/v1"))
    url = "http://elsewhere.example/v1"
    how = {"allow_plaintext": True, "api_key": "k"}
    assert isinstance(too_late(lambda seconds: failure_at(url, seconds, **how)), TimedOut)
    assert slow.left.wait(timeout=60)
    slow._stop.set()


@pytest.mark.case("D6")
@pytest.mark.fault(35)
@pytest.mark.parametrize(
    "flood",
    [
        b'{"data":[' + b"[]," * 3_000_000 + b"[]]}",
        b'{"data":[],"more":[' + b"{}," * 3_000_000 + b"{}]}",
        b'{"error":{"message":"no","details":[' + b"[]," * 3_000_000 + b"[]]}}",
    ],
    ids=["data", "elsewhere", "an error"],
)
def test_a_reply_of_millions_of_parts_is_refused_in_little_memory(api: Any, flood: bytes) -> None:
    api.routes["POST /v1/embeddings"] = flood
    embedder = create("m", OpenAIOptions(base_url=api.base_url))
    request = EmbedRequest(texts=["a"] * 32)
    assert isinstance(outcome(embedder, request), InvalidResponse)  # now everything is loaded
    tracemalloc.start()
    error = outcome(embedder, request)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, InvalidResponse)
    assert "far more parts" in str(error)
    assert peak < 4 * len(flood), f"{peak:,} bytes for a reply of {len(flood):,}"


def failure(embedder: OpenAIEmbedder, timeout: float | None = None, text: str = "a") -> Any:
    with pytest.raises(EmbeddingError) as caught:
        embedder.embed(EmbedRequest(texts=[text], timeout=timeout))
    return caught.value


def failure_at(url: str, seconds: float, text: str = "a", **options: Any) -> Any:
    embedder = create("m", OpenAIOptions(base_url=url, timeout=seconds, **options))
    return failure(embedder, text=text)


def outcome(embedder: OpenAIEmbedder, request: EmbedRequest) -> EmbedReply | EmbeddingError:
    try:
        return embedder.embed(request)
    except EmbeddingError as error:
        return error
