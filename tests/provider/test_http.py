"""The HTTP session at a real socket that breaks between first byte and last, and what it cost."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import pickle
import re
import socket
import threading
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from wires import KEY, Peer, Script, Server, asked, call, chunked, reply, sent

from embedcore.errors import (
    ConfigurationError,
    EmbeddingError,
    InvalidResponse,
    OutcomeUnknown,
    ProviderUnavailable,
    TimedOut,
)
from embedcore.provider import http, http_connections

BODY = b'{"data": [{"index": 0, "embedding": "AACAPw=="}], "model": "m"}'
# So often a server that drips waits so long: far longer than any client here should.
STEPS, PAUSE = 300, 0.1


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Server]]:
    with contextlib.ExitStack() as stack:

        def serve(script: Script) -> Server:
            server = Server(script)
            stack.callback(server.close)
            return server

        yield serve


@pytest.fixture
def session_to() -> Iterator[Callable[..., http.Session]]:
    with contextlib.ExitStack() as stack:

        def session_to(server: Server | str, **options: Any) -> http.Session:
            url = server if isinstance(server, str) else server.url
            session = http.Session(url, **options)
            stack.callback(session.close)
            return session

        # Closed before the servers are, whose threads wait for the clients to leave.
        yield session_to


@pytest.fixture
def attempt(
    serve: Callable[[Script], Server], session_to: Callable[..., http.Session]
) -> Callable[..., Any]:
    """The error of one request to a server with this script; checked against the server's bill."""

    def attempt(script: Script, body: bytes = b"{}", **more: Any) -> EmbeddingError:
        server = serve(script)
        error = failure(session_to(server), body, **more)
        server.close()
        if error.billed == "no":
            assert server.billed == 0, "billed, and said to be free"
        return error

    return attempt


def failure(session: http.Session, body: Any = b"{}", **more: Any) -> EmbeddingError:
    with pytest.raises(EmbeddingError) as caught:
        session.send(call(body, **more), asked())
    session.close()
    return caught.value


def always(data: bytes) -> Script:
    """Answers every request with the same, as long as they come."""

    def script(peer: Peer) -> None:
        while peer.read() is not None:
            peer.write(data)

    return script


def once(data: bytes, end: Callable[[Peer], object] = lambda peer: None) -> Script:
    def script(peer: Peer) -> None:
        peer.read()
        peer.write(data)
        end(peer)

    return script


# What arrives


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary(max_size=200_000),
    framing=st.sampled_from(["length", "chunked", "close", "gzip", "zlib", "bare"]),
    cuts=st.lists(st.integers(0, 200_500), max_size=6),
    most=st.integers(0, 1000),
)
def test_a_body_arrives_as_it_was_sent(
    shared: tuple[Server, http.Session, dict[str, Any]],
    body: bytes,
    framing: str,
    cuts: list[int],
    most: int,
) -> None:
    """However it is framed, and however it is cut into packets."""
    _, session, told = shared
    bare = zlib.compressobj(wbits=-15)
    data = {
        "length": reply(body),
        "chunked": chunked(*(body[at : at + 7_919] for at in range(0, len(body), 7_919))),
        "close": b"HTTP/1.1 200 OK\r\n\r\n" + body,
        "gzip": reply(gzip.compress(body), "content-encoding: gzip"),
        "zlib": reply(zlib.compress(body), "content-encoding: deflate"),
        "bare": reply(bare.compress(body) + bare.flush(), "content-encoding: deflate"),
    }[framing]
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    told["parts"] = [data[a:b] for a, b in itertools.pairwise(places)]
    told["ends"] = framing == "close"
    assert sent(session, max_bytes=len(body) + most) == body
    if body:
        told["parts"] = [data]
        with pytest.raises(InvalidResponse, match="larger than") as caught:
            session.send(call(max_bytes=len(body) - 1), asked())
        assert caught.value.billed == "unknown"


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Server, http.Session, dict[str, Any]]]:
    told: dict[str, Any] = {}

    def script(peer: Peer) -> None:
        while peer.read() is not None:
            for part in told["parts"]:
                peer.write(part)
            if told["ends"]:
                return

    server = Server(script)
    session = http.Session(server.url)
    yield server, session, told
    session.close()
    server.close()


def test_connections_are_used_again(serve: Any, session_to: Any) -> None:
    server = serve(always(reply(BODY)))
    session = session_to(server)
    assert [sent(session) for _ in range(5)] == [BODY] * 5
    assert (server.connections, server.billed) == (1, 5)
    session.close()
    assert sent(session) == BODY
    assert server.connections == 2


def test_what_is_sent(serve: Any, session_to: Any) -> None:
    server = serve(always(reply(BODY)))
    session = session_to(server, headers={"X-Own": "1", "User-Agent": "acme/2"})
    sent(session, b"body", query={"api-version": "1 2"}, headers={"x-own": "2"})
    first, *lines = server.heads[0].split("\r\n")
    assert first == "POST /v1/embeddings?api-version=1+2 HTTP/1.1"
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert len(headers) == len(lines)
    assert headers["x-own"] == "2"
    assert headers["user-agent"] == "acme/2"
    assert headers["accept-encoding"] == "identity"
    assert headers["content-length"] == "4"
    assert headers["host"] == f"localhost:{server.port}"


@pytest.mark.parametrize("status", ["302 Found", "307 Moved", "429 Slow", "500 Oops", "101 Switch"])
def test_every_answer_is_one_and_no_redirect_is_followed(
    serve: Any, session_to: Any, status: str
) -> None:
    server = serve(
        always(reply(b"why", "Location: http://127.0.0.1:9/", "A: 1", "A: 2", status=status))
    )
    with session_to(server).send(call(), asked()) as answer:
        assert answer.status == int(status[:3])
        assert answer.headers["location"] == "http://127.0.0.1:9/"
        assert answer.headers["a"] == "1, 2"
        assert bytes(answer.body) == (b"" if answer.status == 101 else b"why")
    assert server.billed == 1


@pytest.mark.parametrize("early", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_informational_answers_are_passed_over(serve: Any, session_to: Any, early: str) -> None:
    before = f"HTTP/1.1 {early}\r\nx: 1\r\n\r\n".encode()
    server = serve(always(before * 3 + reply(BODY)))
    session = session_to(server)
    assert [sent(session), sent(session)] == [BODY, BODY]
    assert server.connections == 1


def test_threads_get_their_own_answers(serve: Any, session_to: Any) -> None:
    def echo(peer: Peer) -> None:
        while (body := peer.read()) is not None:
            peer.write(reply(body))

    session, wrong = session_to(serve(echo)), []

    def work(number: int) -> None:
        for turn in range(20):
            body = f"{number} {turn} ".encode() * 5_000
            if sent(session, body) != body:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_body_may_come_in_pieces(serve: Any, session_to: Any) -> None:
    def echo(peer: Peer) -> None:
        while (body := peer.read()) is not None:
            peer.write(reply(body))

    pieces = [b"one ", b"two ", b"three"]
    length = {"Content-Length": str(sum(map(len, pieces)))}
    assert sent(session_to(serve(echo)), iter(pieces), headers=length) == b"".join(pieces)


@pytest.mark.parametrize("framing", ["length", "chunked", "gzip"])
def test_a_download_is_read_as_it_arrives(serve: Any, session_to: Any, framing: str) -> None:
    body = os.urandom(300_000)
    data = {
        "length": reply(body),
        "chunked": chunked(*(body[at : at + 4_000] for at in range(0, len(body), 4_000))),
        "gzip": reply(gzip.compress(body), "content-encoding: gzip"),
    }[framing]
    server = serve(always(data))
    session = session_to(server)
    for _ in range(2):
        with session.send(call(None, method="GET", stream=True, longest=30.0), asked()) as answer:
            assert answer.download.delimited
            assert b"".join(answer.download.pieces()) == body
            assert answer.download.received == len(body)
    assert server.connections == 1
    with session.send(call(None, method="GET", stream=True, longest=30.0), asked()) as answer:
        next(answer.download.pieces())
    assert sent(session) == body
    assert server.connections == 2, "the rest of a body would be the next answer"


@pytest.mark.parametrize(
    "data", [reply(BODY), chunked(BODY[:9], BODY[9:])], ids=["length", "chunked"]
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", [Peer.reset, lambda peer: None], ids=["reset", "closed"])
def test_an_answer_that_is_cut_off_anywhere_has_an_unknown_outcome(
    serve: Any, session_to: Any, data: bytes, stream: bool, end: Callable[[Peer], object]
) -> None:
    """After each of its bytes: no part of an answer is taken for all of it."""
    at: list[int] = []
    billed: list[str] = []

    def script(peer: Peer) -> None:
        peer.read()
        peer.write(data[: at[-1]])
        end(peer)

    server = serve(script)
    session = session_to(server)
    for place in range(len(data)):
        at.append(place)
        try:
            answer = session.send(call(stream=stream, longest=30.0), asked())
        except OutcomeUnknown as error:
            billed.append(error.billed)
        else:
            with answer, pytest.raises((OSError, http.CutOff, HTTPException)):
                assert answer.download is not None, f"whole after {place} of {len(data)} bytes"
                list(answer.download.pieces())
        session.close()
    assert set(billed) == {"unknown"}
    assert server.billed == len(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x16\x03\x01",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nno colon\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000 + b": 1\r\n\r\n",
        reply(gzip.compress(BODY)[:-12], "content-encoding: gzip"),
    ],
)
def test_what_is_no_answer_has_an_unknown_outcome(attempt: Any, data: bytes) -> None:
    error = attempt(once(data))
    assert isinstance(error, OutcomeUnknown)
    assert error.billed == "unknown"


@pytest.mark.parametrize(
    ("head", "body", "why"),
    [
        ("content-encoding: br", b"x", "content-encoding: br"),
        ("content-encoding: gzip, gzip", b"x", "content-encoding: gzip, gzip"),
        ("content-encoding: gzip", b"no gzip", "compression is broken"),
        ("content-encoding: gzip", gzip.compress(b" " * 20_000_000), "larger than"),
        ("x: 1", b" " * 1_000_001, "larger than"),
    ],
)
def test_what_cannot_be_read_is_an_invalid_response(
    attempt: Any, head: str, body: bytes, why: str
) -> None:
    error = attempt(once(reply(body, head)))
    assert isinstance(error, InvalidResponse)
    assert error.billed == "unknown"
    assert why in str(error)


@pytest.mark.parametrize("framing", ["gzip", "chunked", "close"])
def test_a_bomb_costs_little_memory(serve: Any, session_to: Any, framing: str) -> None:
    if framing == "gzip":
        script = once(reply(gzip.compress(b" " * 200_000_000), "content-encoding: gzip"))
    else:

        def script(peer: Peer) -> None:
            peer.read()
            coding = b"transfer-encoding: chunked\r\n" if framing == "chunked" else b""
            peer.write(b"HTTP/1.1 200 OK\r\n" + coding + b"\r\n")
            while True:
                peer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")

    session = session_to(serve(script))
    tracemalloc.start()
    with pytest.raises(InvalidResponse, match="larger than"):
        session.send(call(), asked())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000, f"{peak:,} bytes"


# What came too much


@pytest.mark.parametrize("extra", [b"x", BODY, reply(b'{"data": "of another request"}')])
@pytest.mark.parametrize("frame", [reply, chunked])
def test_what_comes_after_an_answer_is_not_the_next_answer(
    serve: Any, session_to: Any, extra: bytes, frame: Callable[[bytes], bytes]
) -> None:
    def script(peer: Peer) -> None:
        while (body := peer.read()) is not None:
            peer.write(frame(body) + extra)

    server = serve(script)
    session = session_to(server)
    for number in range(3):
        body = f"request {number}".encode()
        assert sent(session, body) == body
    assert (server.connections, server.billed) == (3, 3)


# Connections that were kept


@pytest.mark.parametrize("end", [Peer.reset, lambda peer: None], ids=["reset", "closed"])
def test_a_connection_that_was_closed_while_idle_is_replaced(
    serve: Any, session_to: Any, end: Callable[[Peer], object]
) -> None:
    closed = threading.Event()

    def script(peer: Peer) -> None:
        peer.read()
        peer.write(reply(BODY))
        end(peer)
        peer.connection.close()
        closed.set()

    server = serve(script)
    session = session_to(server)
    for _ in range(3):
        assert sent(session) == BODY
        assert closed.wait(60)
        closed.clear()
    assert (server.connections, server.billed) == (3, 3)


def test_what_was_reset_before_a_byte_left_is_sent_once_more(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race that no look beforehand can win: the connection dies between look and write."""
    monkeypatch.setattr(http_connections.Connection, "is_usable", lambda _: True)
    closed = threading.Event()

    def script(peer: Peer) -> None:
        peer.read()
        peer.write(reply(BODY))
        if peer.number == 0:
            go.wait(60)
            peer.reset()
            closed.set()

    go = threading.Event()
    server = serve(script)
    session = session_to(server)
    assert sent(session) == BODY
    go.set()
    assert closed.wait(60)
    assert sent(session) == BODY
    assert (server.connections, server.billed) == (2, 2)


def test_what_may_have_left_is_never_sent_again(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has closed its side takes the bytes of a request without a word."""
    monkeypatch.setattr(http_connections.Connection, "is_usable", lambda _: True)

    def script(peer: Peer) -> None:
        peer.read()
        peer.write(reply(BODY))
        peer.read()  # it is read and billed, and then comes no answer

    server = serve(script)
    session = session_to(server)
    assert sent(session) == BODY
    error = failure(session)
    assert isinstance(error, OutcomeUnknown)
    assert error.billed == "unknown"
    assert (server.connections, server.billed) == (1, 2)


def test_what_was_idle_for_long_is_not_used(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(always(reply(BODY)))
    session = session_to(server)
    sent(session)
    monkeypatch.setattr(http_connections, "_LONGEST_IDLE", 0.0)
    sent(session)
    assert server.connections == 2


def test_a_child_of_a_fork_opens_its_own(serve: Any, session_to: Any) -> None:
    server = serve(always(reply(BODY)))
    session = session_to(server)
    assert sent(session) == BODY
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if sent(session) == BODY else 2
            session.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sent(session) == BODY
    assert (server.connections, server.billed) == (2, 3)


# Time


def byte_by_byte() -> Iterator[bytes]:
    head, _, body = reply(BODY, "x: " + "y" * STEPS).partition(b"\r\n\r\n")
    yield from (head[at : at + 1] for at in range(len(head)))
    yield b"\r\n\r\n" + body


def header_by_header() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    yield from (b"x-%d: 1\r\n" % number for number in range(90))


def early_hints() -> Iterator[bytes]:
    yield from (b"HTTP/1.1 103 Early Hints\r\nx: 1\r\n\r\n" for _ in range(STEPS))
    yield reply(BODY)


def slow_body() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % STEPS
    yield from (b" " for _ in range(STEPS))


def slow_chunks() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    yield from (b"1\r\n \r\n" for _ in range(STEPS))
    yield b"0\r\n\r\n"


def slow_size() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    yield from (b"0" for _ in range(STEPS))


def slow_gzip() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 400\r\n\r\n"
    yield from (byte.to_bytes(1, "big") for byte in gzip.compress(os.urandom(STEPS)))


DRIPS = [byte_by_byte, header_by_header, early_hints, slow_body, slow_chunks, slow_size, slow_gzip]


@pytest.mark.parametrize("parts", DRIPS)
def test_a_server_that_drips_is_left_in_time(
    serve: Any, session_to: Any, clock: Any, parts: Callable[[], Iterator[bytes]]
) -> None:
    left, over = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.read()
        clock.go()
        try:
            for part in parts():
                peer.write(part)
                if over.wait(PAUSE):
                    return
        except OSError:
            left.set()

    session = session_to(serve(script))
    error = failure(session, timeout=0.6)
    assert isinstance(error, TimedOut)
    assert error.billed == "unknown"
    assert "in time" in str(error)
    assert left.wait(60), "the connection was left open"
    over.set()


def test_a_flood_without_end_is_left_in_time(attempt: Any, clock: Any) -> None:
    def pour(peer: Peer) -> None:
        peer.read()
        clock.go()
        while True:
            peer.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)

    assert isinstance(attempt(pour, timeout=0.6), TimedOut)


def test_a_server_that_does_not_read_is_left_in_time(
    serve: Any, session_to: Any, clock: Any
) -> None:
    def script(peer: Peer) -> None:
        clock.go()
        over.wait(60)

    over = threading.Event()
    session = session_to(serve(script))
    error = failure(session, b"a" * 20_000_000, timeout=0.6)
    over.set()
    assert isinstance(error, TimedOut)
    assert error.billed == "unknown"


@pytest.mark.parametrize("more", [{"timeout": 0.6}, {"timeout": 0.6, "longest": 300.0}])
def test_a_server_that_stops_reading_is_not_asked_again(
    serve: Any, session_to: Any, clock: Any, more: dict[str, float]
) -> None:
    """On a connection that was used before: part of the request has left."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.write(reply(BODY))
        clock.go()
        over.wait(60)

    over = threading.Event()
    server = serve(script)
    session = session_to(server)
    assert sent(session) == BODY
    error = failure(session, b"a" * 20_000_000, **more)
    over.set()
    assert isinstance(error, TimedOut)
    assert (error.billed, server.connections) == ("unknown", 1)


def test_a_single_wait_may_be_shorter_than_all_of_them(attempt: Any, clock: Any) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        clock.go()
        peer.until_left()

    assert isinstance(attempt(script, timeout=0.5, longest=300.0), TimedOut)


def test_a_download_may_wait_longer_than_for_one_piece(serve: Any, session_to: Any) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(STEPS):
                peer.write(b" ")
                over.wait(PAUSE)

    over = threading.Event()
    session = session_to(serve(script))
    given = call(None, method="GET", stream=True, timeout=10.0, longest=0.5)
    with session.send(given, asked()) as answer, pytest.raises(TimeoutError):
        list(answer.download.pieces())
    over.set()


def test_a_refusal_is_not_waited_for(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_REFUSAL_SECONDS", 0.3)

    def script(peer: Peer) -> None:
        peer.read()
        peer.write(b"HTTP/1.1 429 X\r\nretry-after: 7\r\ncontent-length: 99\r\n\r\n{")
        peer.until_left()

    with session_to(serve(script)).send(call(timeout=300.0), asked()) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert bytes(answer.body) in (b"", b"{")


def test_an_endless_refusal_is_read_in_part(serve: Any, session_to: Any) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.write(b"HTTP/1.1 401 X\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            peer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")

    with session_to(serve(script)).send(call(), asked()) as answer:
        assert answer.status == 401
        assert 1_000_000 < len(answer.body) < 2_200_000


# What never left


def test_an_address_at_which_nobody_listens_costs_nothing(session_to: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    error = failure(session_to(f"http://127.0.0.1:{port}"))
    assert isinstance(error, ProviderUnavailable)
    assert (error.billed, error.retryable) == ("no", True)
    assert isinstance(failure(session_to("http://no-such-host.invalid")), ProviderUnavailable)


def test_every_address_of_a_name_is_tried(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(always(reply(BODY)))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", place)
        for place in (dead, ("127.0.0.1", server.port))
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert sent(session_to(server)) == BODY


def test_addresses_that_do_not_answer_share_the_time(
    session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Silent(socket.socket):
        def connect(self, address: Any) -> None:
            waits.append(self.gettimeout() or 0.0)
            raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "socket", Silent)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))] * 4
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    error = failure(session_to("http://somewhere.example", connect_timeout=8.0))
    assert isinstance(error, ProviderUnavailable)
    assert error.billed == "no"
    assert len(waits) == 4
    assert waits[0] <= 2.0
    assert sum(waits) < 8.0 * 2.1


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_without_time_nothing_is_sent(serve: Any, session_to: Any, seconds: float) -> None:
    server = serve(always(reply(BODY)))
    session = session_to(server)
    assert failure(session, timeout=seconds).billed == "no"
    assert server.billed == 0


@pytest.mark.parametrize(
    "more",
    [
        {"headers": {"X": "two\r\nlines"}},
        {"headers": {"X\n": "1"}},
        {"headers": {"X": "≠"}},
        {"path": "/with space"},
        {"method": "P OST"},
    ],
)
def test_what_http_does_not_allow_is_not_sent(
    serve: Any, session_to: Any, more: dict[str, Any]
) -> None:
    server = serve(always(reply(BODY)))
    session = session_to(server)
    error = failure(session, **more)
    assert isinstance(error, ConfigurationError)
    assert error.billed == "no"
    assert "lines" not in str(error)
    assert sent(session) == BODY
    assert server.billed == 1


@pytest.mark.parametrize(
    "url",
    ["", "ftp://x", "https:///p", "http://a:b@c/", "http://x:y", "http://x/?k=1", "http://x:0"],
)
def test_an_address_that_is_none_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        http.Session(url)
    assert not url or url not in str(caught.value)


# A server that answers before it has read


def test_an_early_refusal_is_taken(serve: Any, session_to: Any) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.write(reply(b"too large", "connection: close", status="413 Too Large"))
        peer.connection.shutdown(socket.SHUT_WR)
        while peer.connection.recv(1 << 20):
            pass

    with session_to(serve(script)).send(call(b"a" * 5_000_000), asked()) as answer:
        assert (answer.status, bytes(answer.body)) == (413, b"too large")


def test_a_server_that_half_closes_after_its_answer_is_understood(
    serve: Any, session_to: Any
) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.write(reply(BODY))
        peer.connection.shutdown(socket.SHUT_WR)
        closed.set()
        peer.until_left()

    closed = threading.Event()
    server = serve(script)
    session = session_to(server)
    assert sent(session) == BODY
    assert closed.wait(60)
    assert sent(session) == BODY
    assert (server.connections, server.billed) == (2, 2)


@pytest.mark.parametrize("end", [Peer.reset, lambda peer: None], ids=["reset", "closed"])
@pytest.mark.parametrize("reads", [False, True])
def test_a_server_that_goes_without_an_answer(
    attempt: Any, reads: bool, end: Callable[[Peer], object]
) -> None:
    def script(peer: Peer) -> None:
        if reads:
            peer.read()
        end(peer)

    error = attempt(script)
    assert isinstance(error, OutcomeUnknown | ProviderUnavailable)
    if reads:
        assert error.billed == "unknown"


# The key


def frames_of(error: BaseException) -> Iterator[Any]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 " + KEY.encode() + b"\r\n\r\n",
        KEY.encode() + b"\r\n\r\n",
        reply(b"x", f"content-encoding: {KEY}"),
        b"HTTP/1.1 200 OK\r\n" + KEY.encode() + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n" + KEY.encode(),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + KEY.encode(),
        b"",
    ],
)
def test_no_error_shows_the_key(
    attempt: Any,
    data: bytes,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(0)
    # As a program does that wants to see everything.
    monkeypatch.setattr(HTTPConnection, "debuglevel", 1)
    error = attempt(once(data))
    frames = list(frames_of(error))
    assert frames[-1].f_code.co_name == "only_this_frame"
    own = [repr(value) for frame in frames[1:] for value in frame.f_locals.values()]
    said = [str(error), repr(error), repr(vars(error)), *traceback.format_exception(error)]
    shown = "\n".join([*own, *said, caplog.text, *capfd.readouterr()])
    if b"content-encoding" not in data:  # what a server names there is not looked through for keys
        assert KEY not in shown
        assert KEY[:12] not in shown
    assert error.__context__ is None
    assert error.__cause__ is None
    assert KEY.encode() not in pickle.dumps(error)
    assert not re.search(r"CANARY", repr(call()))


@pytest.mark.case("D5")
def test_ctrl_c_leaves_no_connection_behind(serve: Any, session_to: Any, monkeypatch: Any) -> None:
    server = serve(always(reply(BODY)))
    session = session_to(server)
    assert sent(session) == BODY

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(http_connections.Connection, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.send(call(), asked())
    # Its answer is on the way and belongs to nobody.
    assert sent(session) == BODY
    assert server.connections == 2
