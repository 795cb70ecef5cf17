"""TLS, certificates and proxies of the HTTP session: nothing that fails there was sent."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from wires import KEY, Peer, Script, Server, asked, call, certificate, reply, sent

from embedcore.errors import (
    ConfigurationError,
    EmbeddingError,
    OutcomeUnknown,
    ProviderUnavailable,
    TimedOut,
)
from embedcore.provider import http, http_connections

BODY = b'{"a": 1}'
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    made = certificate(tmp_path_factory.mktemp("tls"))
    if made is None:
        pytest.skip("there is no openssl here to make a certificate with")
    return made


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def serve(script: Script, context: ssl.SSLContext | None = None) -> Server:
            server = Server(script, context)
            stack.callback(server.close)
            return server

        yield serve


@pytest.fixture
def session_to() -> Iterator[Callable[..., http.Session]]:
    with contextlib.ExitStack() as stack:

        def session_to(url: str, **options: Any) -> http.Session:
            session = http.Session(url, **options)
            stack.callback(session.close)
            return session

        yield session_to


def echo(peer: Peer) -> None:
    while (body := peer.read()) is not None:
        peer.write(reply(body))


def failure(session: http.Session, **more: Any) -> EmbeddingError:
    with pytest.raises(EmbeddingError) as caught:
        session.send(call(**more), asked())
    return caught.value


# TLS


def test_certificates(
    serve: Any,
    session_to: Any,
    secured: tuple[ssl.SSLContext, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, file = secured
    server = serve(echo, context)
    error = failure(session_to(server.url))
    assert isinstance(error, ProviderUnavailable)
    assert error.billed == "no"
    assert "certificate" in str(error)
    own = ssl.create_default_context(cafile=file)
    for verify in (str(file), False, own):
        assert sent(session_to(server.url, verify=verify), BODY) == BODY
    # A name that the certificate does not have.
    named = session_to(server.url.replace("localhost", "127.0.0.1"), verify=str(file))
    assert failure(named).billed == "no"
    with monkeypatch.context() as patched:
        patched.setenv("SSL_CERT_FILE", str(file))
        assert sent(session_to(server.url), BODY) == BODY
    for wrong in (tmp_path / "none.pem", Path(__file__)):
        unusable = session_to(server.url, verify=str(wrong))
        with pytest.raises(ConfigurationError, match="PEM"):
            unusable.prepare(asked())
        monkeypatch.setenv("SSL_CERT_FILE", str(wrong))
        with pytest.raises(ConfigurationError, match="SSL_CERT_FILE"):
            session_to(server.url).send(call(), asked())
    assert server.billed == 4


def test_large_bodies_both_ways_over_tls(
    serve: Any, session_to: Any, secured: tuple[ssl.SSLContext, Path]
) -> None:
    server = serve(echo, secured[0])
    session = session_to(server.url, verify=str(secured[1]))
    body = b"0123456789" * 400_000
    for _ in range(3):
        assert sent(session, body, max_bytes=1 << 23) == body
    assert server.connections == 1


@pytest.mark.parametrize("size", [0, 1, 20, 39, 44])
def test_an_answer_that_is_cut_off_over_tls(
    serve: Any, session_to: Any, secured: tuple[ssl.SSLContext, Path], size: int
) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.write(reply(BODY)[:size])

    server = serve(script, secured[0])
    error = failure(session_to(server.url, verify=str(secured[1])))
    assert isinstance(error, OutcomeUnknown)
    assert (error.billed, server.billed) == ("unknown", 1)


def test_what_comes_too_much_over_tls_is_not_the_next_answer(
    serve: Any, session_to: Any, secured: tuple[ssl.SSLContext, Path]
) -> None:
    def script(peer: Peer) -> None:
        while (body := peer.read()) is not None:
            peer.write(reply(body) + reply(b"stale"))

    server = serve(script, secured[0])
    session = session_to(server.url, verify=str(secured[1]))
    assert [sent(session, body) for body in (b"1", b"2")] == [b"1", b"2"]
    assert server.connections == 2


def drip(first: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def script(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(first)
        while not over.wait(0.1):
            connection.sendall(b"\x00")

    return script


HANDSHAKES: dict[str, Callable[[socket.socket, threading.Event], object]] = {
    "closed at once": lambda connection, over: None,
    "closed after the hello": lambda connection, over: connection.recv(1 << 16),
    "no TLS": lambda connection, over: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "silent": lambda connection, over: over.wait(60),
    "drips": drip(b"\x16\x03\x03\x40\x00"),
}


@pytest.mark.parametrize("way", HANDSHAKES)
def test_a_handshake_that_fails_costs_nothing(serve: Any, session_to: Any, way: str) -> None:
    over = threading.Event()
    server = serve(lambda peer: HANDSHAKES[way](peer.connection, over))
    session = session_to(server.url.replace("http:", "https:"), connect_timeout=0.6)
    error = failure(session, timeout=300.0)
    over.set()
    assert isinstance(error, ProviderUnavailable)
    assert (error.billed, error.retryable) == ("no", True)


def test_a_connection_that_dies_over_tls_before_a_byte_left(
    serve: Any,
    session_to: Any,
    secured: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_connections.Connection, "is_usable", lambda _: True)
    go, gone = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        body = peer.read()
        peer.write(reply(body or b""))
        if peer.number == 0:
            go.wait(60)
            peer.reset()
            gone.set()

    server = serve(script, secured[0])
    session = session_to(server.url, verify=str(secured[1]))
    assert sent(session, BODY) == BODY
    go.set()
    assert gone.wait(60)
    assert sent(session, BODY) == BODY
    assert (server.connections, server.billed) == (2, 2)


# Proxies


class Proxy:
    """A proxy that forwards every CONNECT to one port."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, peer: Peer) -> None:
        peer.read()
        with socket.create_connection(("127.0.0.1", self.port)) as onward:
            peer.write(b"HTTP/1.1 200 Connection established\r\nx: 1\r\n\r\n")
            back = threading.Thread(target=pump, args=(onward, peer.connection))
            back.start()
            pump(peer.connection, onward)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_tunnel_through_a_proxy(
    serve: Any,
    session_to: Any,
    secured: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    server = serve(echo, secured[0])
    proxy = serve(Proxy(server.port))
    monkeypatch.setenv(variable, f"http://me:pass%20word@127.0.0.1:{proxy.port}")
    session = session_to("https://elsewhere.example:8443/v1", verify=str(secured[1]))
    assert [sent(session, BODY), sent(session, BODY)] == [BODY, BODY]
    assert (proxy.connections, server.connections) == (1, 1)
    (asked_of_proxy,) = proxy.heads
    assert asked_of_proxy.startswith("CONNECT elsewhere.example:8443 ")
    assert base64.b64encode(b"me:pass word").decode() in asked_of_proxy
    assert KEY not in asked_of_proxy
    assert not any("proxy-authorization" in head.lower() for head in server.heads)
    assert "host: elsewhere.example:8443" in server.heads[0].lower()


@pytest.mark.parametrize("status", ["403 Forbidden", "407 Authentication Required", "502 Bad"])
def test_a_proxy_that_refuses_a_tunnel_costs_nothing(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.write(reply(b"", status=status))

    proxy = serve(script)
    monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{proxy.port}")
    error = failure(session_to("https://elsewhere.example/v1"))
    assert isinstance(error, ProviderUnavailable)
    assert error.billed == "no"
    assert status in str(error)


def test_a_proxy_that_drips_is_left_in_time(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, over = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.read()
        try:
            peer.write(b"HTTP/1.1 200 OK\r\nx: ")
            while not over.wait(0.1):
                peer.write(b"y")
        except OSError:
            left.set()

    proxy = serve(script)
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    session = session_to("https://elsewhere.example/v1", connect_timeout=0.6)
    error = failure(session, timeout=300.0)
    assert isinstance(error, ProviderUnavailable)
    assert error.billed == "no"
    assert left.wait(60)
    over.set()


def test_what_is_not_encrypted_goes_through_a_proxy_as_a_whole_address(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(echo)
    monkeypatch.setenv("HTTP_PROXY", f"http://me:word@127.0.0.1:{proxy.port}")
    session = session_to("http://elsewhere.example:81/v1")
    assert [sent(session, BODY), sent(session, BODY)] == [BODY, BODY]
    assert proxy.connections == 1
    head = proxy.heads[0]
    assert head.startswith("POST http://elsewhere.example:81/v1/embeddings HTTP/1.1")
    assert f"Basic {base64.b64encode(b'me:word').decode()}" in head
    assert "host: elsewhere.example:81" in head.lower()


def test_the_time_of_a_proxied_request_is_one(
    serve: Any, session_to: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        clock.go()
        peer.until_left()

    proxy = serve(script)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
    assert isinstance(failure(session_to("http://elsewhere.example/v1"), timeout=0.6), TimedOut)


@pytest.mark.parametrize(
    "proxy", ["gopher://u:hunter2@p:1", "socks5://u:hunter2@p:1", "http://", "http://h:x"]
)
def test_a_proxy_that_cannot_be_used_is_a_setting(
    session_to: Any, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    error = failure(session_to("https://elsewhere.example/v1"))
    assert isinstance(error, ConfigurationError)
    assert "PROXY" in str(error)
    assert "hunter2" not in str(error)


@pytest.mark.parametrize(
    ("url", "environment", "goes"),
    [
        ("https://a.example", {"HTTPS_PROXY": "http://p"}, True),
        ("https://a.example", {"HTTP_PROXY": "http://p"}, False),
        ("http://a.example", {"HTTP_PROXY": "http://p"}, True),
        ("http://a.example", {"ALL_PROXY": "http://p"}, True),
        ("http://a.example", {"http_proxy": "p:3128"}, True),
        ("https://a.example", {"HTTPS_PROXY": ""}, False),
        ("https://a.example", {"HTTPS_PROXY": "http://p", "NO_PROXY": "a.example"}, False),
        ("https://b.a.example", {"HTTPS_PROXY": "http://p", "NO_PROXY": ".a.example"}, False),
        ("https://b.a.example", {"HTTPS_PROXY": "http://p", "NO_PROXY": "x, a.example"}, False),
        ("https://ba.example", {"HTTPS_PROXY": "http://p", "NO_PROXY": "a.example"}, True),
        ("https://a.example", {"HTTPS_PROXY": "http://p", "NO_PROXY": "*"}, False),
        ("https://a.example:444", {"HTTPS_PROXY": "http://p", "NO_PROXY": "a.example:443"}, True),
        ("https://a.example", {"HTTPS_PROXY": "http://p", "NO_PROXY": "a.example:443"}, False),
        ("https://10.1.2.3", {"HTTPS_PROXY": "http://p", "NO_PROXY": "10.0.0.0/8"}, False),
        ("https://11.1.2.3", {"HTTPS_PROXY": "http://p", "NO_PROXY": "10.0.0.0/8,::/0"}, True),
        ("https://[fd00::1]", {"HTTPS_PROXY": "http://p", "NO_PROXY": "fd00::/8"}, False),
        ("https://localhost", {"HTTPS_PROXY": "http://p"}, False),
        ("https://LOCALHOST.", {"ALL_PROXY": "http://p"}, False),
        ("https://x.localhost", {"HTTPS_PROXY": "http://p"}, False),
        ("https://127.9.9.9", {"HTTPS_PROXY": "http://p"}, False),
        ("https://[::1]", {"HTTPS_PROXY": "http://p"}, False),
        ("https://[::ffff:127.0.0.1]", {"HTTPS_PROXY": "http://p"}, False),
        ("https://localhost.example", {"HTTPS_PROXY": "http://p"}, True),
    ],
)
def test_which_addresses_go_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], goes: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (http_connections._proxy_for(urlsplit(url)) is not None) == goes


def test_the_end_of_a_request_does_not_touch_the_next_one_on_its_connection(
    serve: Any, session_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread takes the connection as soon as it is idle."""
    server = serve(echo)
    session = session_to(server.url)
    ended = http_connections.Connection.hang_up_unfinished
    after: list[http.Answer] = []

    def end(connection: http_connections.Connection) -> None:
        if not after:
            pool = session._connections(asked())
            taken = pool.take()
            assert taken is not None
            taken.bound(time.monotonic() + 60, 60)
            ended(connection)
            taken.send("POST", "/", {}, BODY)
            assert taken.answer().status == 200
            taken.hang_up()
            after.append(http.Answer(200, {}))
        else:
            ended(connection)

    monkeypatch.setattr(http_connections.Connection, "hang_up_unfinished", end)
    sent(session)
    assert after
