"""Connections of an HTTP session: every wait bounded, kept alive, by the environment's proxies.

urllib3 opens them: names and addresses, TLS, proxies. Its time-outs are for one wait each, so that
a server which sends a byte now and then could keep a request for ever. Here every connection has
one moment at which whatever it does ends.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import math
import os
import re
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import SplitResult, unquote, urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection, ProxyConfig
from urllib3.util import parse_url, wait_for_read
from urllib3.util.response import assert_header_parsing

from embedcore import forksafe
from embedcore.errors import ConfigurationError
from embedcore.provider.http_bodies import CutOff

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Body: TypeAlias = bytes | Iterable[bytes] | None

# Written at once, before the time is looked at again.
_STEP_BYTES: Final = 1 << 17
# A head is read with the beginning of its body; the rest of a long body goes past this.
_READ_AHEAD: Final = 1 << 15
# A day: longer waits do not fit everywhere.
_LONGEST_WAIT: Final = 86_400.0
_MOST_IDLE: Final = 100
# Many servers close what was idle for five seconds: not at the moment at which it is used again.
_LONGEST_IDLE: Final = 4.0
_DIGITS: Final = re.compile(r"\d{1,18}", re.ASCII)
_TIME_IS_UP: Final = "the time-out of the whole exchange"
# Where systems keep the certificates that they trust, if OpenSSL was built to look elsewhere.
_TRUSTED: Final = (
    "/etc/ssl/cert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/cert.pem",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/ssl/ca-bundle.pem",
)


class BadHead(http.client.HTTPException):
    """The head of an answer does not say where its body ends, or contradicts itself."""


class _Wire:
    """A connected socket. No wait of it is longer than ``each`` seconds, or goes beyond ``until``.

    ``has_sent``: a byte has left. For ``http.client`` it is the socket.
    """

    def __init__(self, connected: Any, until: float) -> None:
        self._socket = connected
        self._reader = _Reader(_Raw(self), _READ_AHEAD)
        self.until = until
        self.each = math.inf
        self.has_sent = False

    def left(self) -> float:
        """The seconds for one wait. Raises ``TimeoutError`` where there are none."""
        left = min(self.until - time.monotonic(), self.each, _LONGEST_WAIT)
        if left <= 0:
            raise TimeoutError(_TIME_IS_UP)
        return left

    def sendall(self, data: Any) -> None:
        view, at = memoryview(data).cast("B"), 0
        while at < len(view):
            self._socket.settimeout(self.left())
            at += self._socket.send(view[at : at + _STEP_BYTES])
            self.has_sent = True

    def recv_into(self, buffer: WriteableBuffer) -> int:
        self._socket.settimeout(self.left())
        found: int = self._socket.recv_into(buffer)
        return found

    def makefile(self, *_: object) -> _Reader:
        # One for all answers: what came too much of one must be seen before the next.
        return self._reader

    def settimeout(self, _: object) -> None:
        """The time-outs of the libraries, for one wait each, do not count."""

    def close(self) -> None:
        """An answer may still be read: ``hang_up`` closes."""

    def hang_up(self) -> None:
        self._socket.close()

    def is_silent(self) -> bool:
        """Whether nothing came that is not yet read, not even an end: it would be taken for the
        beginning of the next answer."""
        if self._reader.has_more() or getattr(self._socket, "pending", int)():
            return False
        return not wait_for_read(self._socket, timeout=0.0)


class _Raw(io.RawIOBase):
    """The bytes of a wire, for a buffered reader. ``wants``: False reads nothing and does not
    wait."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self.wants = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        return self._wire.recv_into(buffer) if self.wants else None


class _Reader(io.BufferedReader):
    """What ``http.client`` reads from. It closes one per answer; this one stays."""

    def __init__(self, raw: _Raw, size: int) -> None:
        super().__init__(raw, size)
        self._of = raw

    def readline(self, size: int | None = -1, /) -> bytes:
        """Raises ``CutOff`` for half a line: ``http.client`` would take half a head for a whole
        one."""
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise CutOff("the server closed the connection")
        return line

    def close(self) -> None:
        pass

    def has_more(self) -> bool:
        """Whether bytes were read ahead."""
        self._of.wants = False
        try:
            return bool(self.peek(1))
        finally:
            self._of.wants = True


class _Response(http.client.HTTPResponse):
    """Passes over all informational answers, not only "100 Continue"."""

    def begin(self) -> None:
        super().begin()
        while 101 < self.status < 200:
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()


class _Bounded:
    """What both kinds of connections do otherwise than urllib3's. ``until``: for connecting."""

    if TYPE_CHECKING:
        sock: Any
        port: int
        _dns_host: str
        socket_options: Any

    # Of http.client, which would print headers.
    debuglevel = 0
    response_class = _Response
    until: float = 0.0

    def _new_conn(self) -> socket.socket:
        """Every address in turn, each with its share of the time that is left."""
        places = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        failure: OSError = OSError("the name has no address")
        for number, (family, kind, protocol, _, address) in enumerate(places):
            found = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    found.setsockopt(*option)
                found.settimeout(self._left() / (len(places) - number))
                found.connect(address)
                # For the handshake of TLS, which is one wait.
                found.settimeout(self._left())
            except OSError as error:
                found.close()
                failure = error
            except BaseException:
                found.close()
                raise
            else:
                return found
        raise failure

    def _tunnel(self) -> None:
        plain = self.sock
        self.sock = _Wire(plain, self.until)
        try:
            super()._tunnel()  # type: ignore[misc]
        finally:
            self.sock = plain
        plain.settimeout(self._left())

    def _left(self) -> float:
        left = min(self.until - time.monotonic(), _LONGEST_WAIT)
        if left <= 0:
            raise TimeoutError("the time-out of connecting")
        return left


class _Plain(_Bounded, HTTPConnection):  # type: ignore[misc]
    pass


class _Secure(_Bounded, HTTPSConnection):  # type: ignore[misc]
    pass


class Connection:
    """One connection, for one request and its answer."""

    def __init__(self, connected: HTTPConnection, pool: Pool) -> None:
        self._http = connected
        self._wire: _Wire = connected.sock  # type: ignore[assignment]
        self._pool = pool
        self._response: http.client.HTTPResponse | None = None
        self._is_busy = False
        self.idle_since = 0.0

    @property
    def has_sent(self) -> bool:
        """Whether a byte of the request has left."""
        return self._wire.has_sent

    @property
    def until(self) -> float:
        """The moment at which whatever the connection does ends."""
        return self._wire.until

    @until.setter
    def until(self, moment: float) -> None:
        self._wire.until = moment

    def bound(self, until: float, each: float) -> bool:
        """Begin with a request; ``each``: the longest wait, in seconds. True if it is not the
        first."""
        self._wire.until, self._wire.each = until, each
        was_used, self._wire.has_sent = self._wire.has_sent, False
        self._is_busy = True
        return was_used

    def lend(self) -> Connection:
        """To a download, which finishes the exchange."""
        self._is_busy = False
        return self

    def send(self, method: str, target: str, headers: Mapping[str, str], body: Body) -> None:
        """Write a request. One that the server does not read to its end may have an answer all the
        same."""
        try:
            self._http.request(method, target, body, headers, preload_content=False)
        except (ConnectionError, ssl.SSLError):
            if not self.has_sent:
                raise

    def answer(self) -> http.client.HTTPResponse:
        """Read the head of the answer."""
        # urllib3's own would copy every body twice.
        response = http.client.HTTPConnection.getresponse(self._http)
        self._response = response
        if response.status < 300:
            _refuse_doubtful(response)
        return response

    def finish(self, *, clean: bool) -> None:
        """The answer was read to its end (``clean``), or nothing more is wanted of it."""
        response, self._response = self._response, None
        if response is None:
            return
        self._is_busy = False
        goes_on = clean and not response.will_close and response.status != 101
        response.close()
        if goes_on:
            # Another one for the next request: the end of this one must not touch it.
            self._pool.give(Connection(self._http, self._pool))
        else:
            self.hang_up()

    def is_usable(self) -> bool:
        return time.monotonic() - self.idle_since < _LONGEST_IDLE and self._wire.is_silent()

    def hang_up(self) -> None:
        self._wire.hang_up()

    def hang_up_unfinished(self) -> None:
        """Whatever ended the exchange before its answer was read."""
        if self._is_busy:
            self._is_busy = False
            self.hang_up()


def _refuse_doubtful(response: http.client.HTTPResponse) -> None:
    """Where a body ends must be certain; ``http.client`` passes over what it does not know."""
    coding = response.headers.get("transfer-encoding")
    if coding is not None and not response.chunked:
        raise BadHead("its transfer-encoding is not known")
    lengths = {value.strip() for value in response.headers.get_all("content-length") or ()}
    if len(lengths) > 1 or not all(map(_DIGITS.fullmatch, lengths)):
        raise BadHead("its content-length is not a number")
    assert_header_parsing(response.msg)


class Pool:
    """Connections to one server that are open and idle, and the way to new ones. Thread-safe."""

    def __init__(self, base_url: str, verify: bool | str | ssl.SSLContext) -> None:
        self._where = where = urlsplit(base_url)
        self._port = where.port or (443 if where.scheme == "https" else 80)
        self._proxy = _proxy_for(where)
        secured = where.scheme == "https" or (self._proxy or where).scheme == "https"
        self._context = certificates(verify) if secured else None
        host = where.hostname or ""
        self._host = f"[{host}]" if ":" in host else host
        forwards = self._proxy is not None and where.scheme == "http"
        self.target = f"{base_url if forwards else where.path}"
        self.headers = _authorization(self._proxy) if forwards else {}
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._is_open = True
        self._process = forksafe.process()

    def take(self) -> Connection | None:
        """An idle connection that still stands."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None or connection.is_usable():
                return connection
            connection.hang_up()

    def give(self, connection: Connection) -> None:
        connection.idle_since = time.monotonic()
        # In a child of a fork it is its parent's.
        if self._process == forksafe.process():
            with self._lock:
                if self._is_open and len(self._idle) < _MOST_IDLE:
                    self._idle.append(connection)
                    return
        connection.hang_up()

    def close(self) -> None:
        if self._process != forksafe.process():
            return
        with self._lock:
            idle, self._idle, self._is_open = self._idle, [], False
        for connection in idle:
            connection.hang_up()

    def connect(self, until: float) -> Connection:
        """A new connection, with its proxy and TLS. Nothing of a request has left."""
        new = self._new()
        new.until = until
        try:
            new.connect()
            new.sock = _Wire(new.sock, until)
        except BaseException:
            with contextlib.suppress(OSError):
                new.close()
            raise
        return Connection(new, self)

    def _new(self) -> Any:
        place, proxy, context = self._where, self._proxy, self._context
        if proxy is None:
            if context is None:
                return _Plain(self._host, self._port)
            return _Secure(self._host, self._port, ssl_context=context)
        host = proxy.hostname or ""
        known: dict[str, Any] = {
            "proxy": parse_url(f"{proxy.scheme}://{proxy.hostname}"),
            "proxy_config": ProxyConfig(context, False, None, None),
        }
        if context is None:
            return _Plain(host, proxy.port or 80, **known)
        connection = _Secure(
            host,
            proxy.port or (443 if proxy.scheme == "https" else 80),
            ssl_context=context,
            **known,
        )
        if place.scheme == "https":
            connection.set_tunnel(
                place.hostname or "", self._port, _authorization(proxy), scheme=proxy.scheme
            )
        return connection


def certificates(verify: bool | str | ssl.SSLContext) -> ssl.SSLContext:
    """What a certificate is checked against. Raises ``ConfigurationError``."""
    if isinstance(verify, ssl.SSLContext):
        return verify
    if isinstance(verify, str):
        path = Path(verify).expanduser()
        try:
            if path.is_dir():
                return ssl.create_default_context(capath=path)
            return ssl.create_default_context(cafile=path)
        except OSError as error:
            raise ConfigurationError(
                f"verify = {verify!r} is no file of certificates ({type(error).__name__}): give "
                "the path of a PEM file, or of a folder of them"
            ) from None
    if not verify:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    if file := os.environ.get("SSL_CERT_FILE"):
        return ssl.create_default_context(cafile=file)
    if folder := os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context(capath=folder)
    return _of_the_system()


def _of_the_system() -> ssl.SSLContext:
    if sys.platform in ("win32", "darwin"):
        import truststore

        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    hashed = any(Path(paths.capath).glob("*.0")) if paths.capath else False
    if not paths.cafile and not hashed:
        for file in filter(os.path.isfile, _TRUSTED):
            context.load_verify_locations(file)
            break
    return context


def _proxy_for(where: SplitResult) -> SplitResult | None:
    """The proxy of the environment for an address. This machine itself is reached without one: to
    a proxy, "localhost" is another."""
    host = where.hostname or ""
    if _is_this_machine(host):
        return None
    proxies = urllib.request.getproxies()
    named = proxies.get(where.scheme) or proxies.get("all")
    port = where.port or (443 if where.scheme == "https" else 80)
    if not named or urllib.request.proxy_bypass(f"{host}:{port}") or _excepted(host, proxies):
        return None
    try:
        proxy = urlsplit(named if "://" in named else f"http://{named}")
        sound = proxy.scheme in ("http", "https") and proxy.hostname and proxy.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ConfigurationError(
            "the proxy of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY) is no http:// or "
            "https:// address; SOCKS is not spoken"
        )
    return proxy


def _is_this_machine(host: str) -> bool:
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(host)
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return False if address is None else address.is_loopback


def _excepted(host: str, proxies: Mapping[str, str]) -> bool:
    """Whether NO_PROXY has a network with this address in it."""
    address = _address(host)
    if address is None:
        return False
    for name in proxies.get("no", "").split(","):
        with contextlib.suppress(ValueError):
            if address in ipaddress.ip_network(name.strip(), strict=False):
                return True
    return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _authorization(proxy: SplitResult | None) -> dict[str, str]:
    if proxy is None or proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
