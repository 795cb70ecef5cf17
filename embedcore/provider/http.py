"""An HTTP session for providers: one deadline for a whole request, typed errors, no hidden key.

For every provider that speaks HTTP, without its SDK::

    session = http.Session("https://api.example/v1")
    call = http.Call(path="/embeddings", headers={"Authorization": …}, body=body, timeout=30)
    with session.send(call, asked) as answer:
        return replies.read(answer.status, answer.headers, answer.body, asked)

HTTP/1.1 over urllib3, which the first request imports. Nothing is sent twice but what provably
never left, no redirect is followed, and no cookie is kept. The proxies (HTTPS_PROXY, HTTP_PROXY,
ALL_PROXY, NO_PROXY) and certificates (SSL_CERT_FILE, SSL_CERT_DIR) of the environment are used.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Final, ParamSpec, Self, TypeVar
from urllib.parse import urlencode, urlsplit

from embedcore.errors import (
    AuthenticationFailed,
    Billed,
    ConfigurationError,
    EmbeddingError,
    InvalidResponse,
    OutcomeUnknown,
    ProviderError,
    ProviderUnavailable,
    TimedOut,
)
from embedcore.forksafe import Lazy
from embedcore.provider import http_bodies as bodies
from embedcore.provider.http_bodies import CutOff, Download, UnreadableBody

if TYPE_CHECKING:
    import ssl
    from http.client import HTTPResponse

    from embedcore.provider.http_connections import Connection, Pool
    from embedcore.provider.refusals import Asked

__all__ = [
    "Answer",
    "Call",
    "CutOff",
    "Download",
    "Session",
    "UnreadableBody",
    "Unsigned",
    "without_frames",
]

# The body of a refusal only says more of what its status says: it is not waited for longer.
_REFUSAL_SECONDS: Final = 10.0
_HEADERS: Final = {
    "User-Agent": "embedcore",
    "Accept": "*/*",
    # Vectors hardly compress, and unpacking costs four times the rest of the decoding.
    "Accept-Encoding": "identity",
}

Given = ParamSpec("Given")
Result = TypeVar("Result")


def without_frames(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """The method, whose errors do not show the way they came: frames down there hold the key.

    Nor does the error of which one was made, unless it is its cause.
    """

    @wraps(method)
    def only_this_frame(*given: Given.args, **named: Given.kwargs) -> Result:
        try:
            return method(*given, **named)
        except EmbeddingError as error:
            failure = error
        if failure.__cause__ is None:
            failure.__context__ = None
        # Outside of the handler, where it would become its own context.
        raise failure.with_traceback(None)

    return only_this_frame


def seconds_for(own: float, asked: float | None) -> float:
    """The time-out of a request: a provider's ``own``, or less if less is ``asked`` for.

    Raises ``ProviderUnavailable``, not billed, where no time is left.
    """
    timeout = own if asked is None else min(own, asked)
    if not timeout > 0:
        raise ProviderUnavailable("no time is left for the request", billed="no")
    return timeout


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Call:
    """One HTTP request.

    ``path`` follows the session's address. ``body``: bytes, or pieces of them with a
    ``Content-Length`` in ``headers`` or sent in chunks. ``timeout``: seconds for all of it:
    connecting, sending, the head and the body of the answer, however they drip. ``longest``: then
    that is for all the waiting, and ``timeout`` for each single wait. ``stream``: a success is read
    as it arrives; ``timeout`` is then for everything up to its body, too. ``max_bytes``: of the
    unpacked body of a success.
    """

    method: str = "POST"
    path: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Iterable[bytes] | None = None
    timeout: float = 60.0
    longest: float | None = None
    stream: bool = False
    max_bytes: int = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Unsigned:
    """A request as a signature covers it: ``url`` is whole, ``headers`` are all but those that HTTP
    itself needs (Host, Content-Length), ``body`` is complete."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


class Answer:
    """Any HTTP answer, whatever its status; ``headers`` by their names in lower case.

    ``body`` is lent: it must not be looked at after ``release()``, or after the end of ``with``.
    ``download``: the body of a success that was asked for as a stream, instead.
    """

    __slots__ = ("_lent", "body", "download", "headers", "status")

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes | memoryview = b"",
        *,
        download: Download | None = None,
        lent: bodies.Lent | None = None,
    ) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.download = download
        self._lent = lent

    def release(self) -> None:
        """The body has been read, or is not wanted: its memory may be used again."""
        if self.download is not None:
            self.download.close()
        if self._lent is not None:
            lent, self._lent, self.body = self._lent, None, b""
            lent.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Session:
    """Connections to one server, kept alive. Shared freely between threads; a child of a fork opens
    its own.

    ``headers`` go with each request. ``verify``: True, a file or folder of certificates to trust,
    False to trust any, or an ``ssl.SSLContext``, which may hold a client's certificate.
    ``connect_timeout``: seconds for a connection, all addresses of the name, the proxy and TLS
    together; looking up the name is not interrupted. ``sign`` is asked before each request for the
    headers that sign it.

    Raises ``ConfigurationError`` for an address that is none; it is not quoted.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        connect_timeout: float = 10.0,
        sign: Callable[[Unsigned], Mapping[str, str]] | None = None,
    ) -> None:
        _refuse_odd(base_url)
        self._base_url = base_url.rstrip("/")
        self._headers = {**_HEADERS, **(headers or {})}
        self._verify = verify
        self._connect_timeout = connect_timeout
        self._sign = sign
        self._pool: Lazy[Pool] = Lazy()

    def close(self) -> None:
        """Close the connections. A later ``send`` opens new ones."""
        pool = self._pool.take()
        if pool is not None:
            pool.close()

    @without_frames
    def prepare(self, asked: Asked) -> None:
        """Import what a request needs and read the environment; no connection is opened.

        Raises ``ConfigurationError`` for a proxy or certificates that cannot be used.
        """
        self._connections(asked)

    @without_frames
    def send(self, call: Call, asked: Asked) -> Answer:
        """Send one request, once. An answer of any status is an answer.

        Raises ``ProviderUnavailable`` where nothing was sent (``billed`` is "no"), ``TimedOut``,
        ``OutcomeUnknown`` and ``InvalidResponse`` where something was (``billed`` is "unknown"),
        ``ConfigurationError`` for what cannot be sent, and ``AuthenticationFailed`` where ``sign``
        fails otherwise than with an error of embedcore.
        """
        pool = self._connections(asked)
        call = self._signed(call)
        began = time.monotonic()
        deadline = began + (call.longest or call.timeout)
        # Of a stream, the head.
        until = began + call.timeout if call.stream else deadline
        each = math.inf if call.longest is None else call.timeout
        connection = pool.take()
        try:
            if connection is None or not self._sent(call, connection, pool, until, each):
                connection = self._connected(pool, until, call, asked)
                self._sent(call, connection, pool, until, each)
            return _received(call, connection, deadline)
        except Exception as error:  # noqa: BLE001 - of sockets, TLS, urllib3, and of the body
            raise _from_failure(error, asked, connection) from None
        finally:
            if connection is not None:
                connection.hang_up_unfinished()

    def _connections(self, asked: Asked) -> Pool:
        try:
            return self._pool.get(self._open)
        except Exception as error:  # noqa: BLE001 - a proxy's address, a certificate, a package
            raise _from_setup(error, asked) from None

    def _open(self) -> Pool:
        from embedcore.provider.http_connections import Pool

        pool = Pool(self._base_url, self._verify)
        # A caller who forgets to close leaves no open sockets behind.
        weakref.finalize(self, pool.close)
        return pool

    def _signed(self, call: Call) -> Call:
        if self._sign is None:
            return call
        if not isinstance(call.body, bytes | None):
            raise ConfigurationError("a body that is sent in pieces cannot be signed: give bytes")
        unsigned = Unsigned(
            method=call.method,
            url=self._base_url + _with_query(call),
            headers=_merged(self._headers, call.headers),
            body=call.body or b"",
        )
        try:
            signature = self._sign(unsigned)
        except EmbeddingError:
            raise
        except Exception as error:  # noqa: BLE001 - its words may be those of a key
            raise AuthenticationFailed(
                f"the request could not be signed ({type(error).__name__}); nothing was sent"
            ) from None
        return replace(call, headers=_merged(call.headers, signature))

    def _connected(self, pool: Pool, until: float, call: Call, asked: Asked) -> Connection:
        seconds = min(call.timeout, self._connect_timeout)
        try:
            return pool.connect(min(until, time.monotonic() + seconds))
        except Exception as error:  # noqa: BLE001 - names, addresses, proxies, TLS
            raise _unreachable(error, asked) from None

    def _sent(
        self, call: Call, connection: Connection, pool: Pool, until: float, each: float
    ) -> bool:
        """Write the request; False if a connection that was kept turns out to be closed before a
        byte of it left."""
        target = pool.target + _with_query(call)
        was_used = connection.bound(until, each)
        try:
            headers = _merged(self._headers, pool.headers, call.headers)
            connection.send(call.method, target, headers, call.body)
        except OSError as error:
            if connection.has_sent or not was_used or isinstance(error, TimeoutError):
                raise
            connection.hang_up()
            return False
        return True


def _with_query(call: Call) -> str:
    return f"{call.path}?{urlencode(call.query)}" if call.query else call.path


def _merged(*several: Mapping[str, str]) -> dict[str, str]:
    """Of headers whose names differ only in case the last."""
    found = {name.lower(): (name, value) for each in several for name, value in each.items()}
    return dict(found.values())


def _received(call: Call, connection: Connection, deadline: float) -> Answer:
    response = connection.answer()
    headers = _joined(response)
    if call.stream and response.status < 300:
        left = deadline - time.monotonic()
        download = Download(response, connection.lend(), left=left)
        return Answer(response.status, headers, download=download)
    if response.status >= 300:
        connection.until = min(connection.until, time.monotonic() + _REFUSAL_SECONDS)
        body = bodies.read_refusal(response)
        connection.finish(clean=response.isclosed())
        return Answer(response.status, headers, body)
    lent = bodies.Lent()
    try:
        found = bodies.read(response, call.max_bytes, lent)
    except BaseException:
        lent.release()
        raise
    connection.finish(clean=True)
    return Answer(response.status, headers, found, lent=lent)


def _joined(response: HTTPResponse) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _refuse_odd(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.username is not None or parts.query or parts.fragment:
        raise ConfigurationError(
            "a session wants an http:// or https:// address without user, password and query"
        )


def _from_setup(error: Exception, asked: Asked) -> ConfigurationError:
    """The error for a connection that could not even be prepared: nothing was sent."""
    why = (
        str(error) if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {error}"
    )
    return ConfigurationError(
        f"a connection to {asked.endpoint} cannot be set up ({asked.shown(why)}). Check the proxy "
        "(HTTPS_PROXY, ALL_PROXY) and the certificates (SSL_CERT_FILE)"
    )


def _cause(error: Exception, asked: Asked) -> str:
    return f"{type(error).__name__}: {asked.shown(str(error))}".rstrip(": ")


def _unreachable(error: Exception, asked: Asked) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"{asked.endpoint} cannot be reached ({_cause(error, asked)}). Check the address, the "
        "network, the proxy (HTTPS_PROXY, NO_PROXY) and the certificates (SSL_CERT_FILE)",
        billed="no",
    )


def _from_failure(error: Exception, asked: Asked, connection: Connection | None) -> EmbeddingError:
    """The error for an exchange that brought no HTTP answer.

    Only what fails before a byte of the request has left is certain not to be billed.
    """
    from http.client import HTTPException, InvalidURL

    if isinstance(error, EmbeddingError):
        return error
    sent = connection is not None and connection.has_sent
    if isinstance(error, UnreadableBody):
        return InvalidResponse(
            f"the reply of {asked.endpoint} cannot be read: {error}", billed="unknown"
        )
    if not sent and isinstance(error, ValueError | InvalidURL):
        # Its words may be those of a header.
        return ConfigurationError(
            f"the request to {asked.endpoint} cannot be sent ({type(error).__name__}): an address "
            "or a header has characters that HTTP does not allow"
        )
    cause = _cause(error, asked)
    if not sent and isinstance(error, OSError):
        return _unreachable(error, asked)
    if isinstance(error, TimeoutError):
        return TimedOut(
            f"{asked.endpoint} did not answer in time ({cause}); the option timeout says how long "
            "that is"
        )
    # HTTPError of urllib3 is one of its own; HeaderParsingError is all that is left of it here.
    if isinstance(error, OSError | HTTPException | CutOff) or _is_of_urllib3(error):
        return OutcomeUnknown(f"the connection to {asked.endpoint} broke ({cause})")
    billed: Billed = "unknown" if sent else "no"
    return ProviderError(f"the request to {asked.endpoint} failed ({cause})", billed=billed)


def _is_of_urllib3(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "urllib3"
