"""Reply bodies: size limits, one deadline for the whole exchange, reused buffers.

The HTTP library gives each wait the whole time-out: a server that sends its headers byte by byte,
or "please wait" without end, could keep a request for ever. So what reads and writes below it is
wrapped, in the one place that both majors of the library have for that.

What a thread allocates and frees, its part of the heap keeps: with sixteen threads, and bodies of
two megabytes in three forms each, that is a hundred megabytes for nothing. Fresh pages for every
body would cost as much time as reading it.

The SDK reads a body without a limit, follows redirects by default and may be either of two major
versions on two HTTP libraries. All of that is decided here, in the one method of the HTTP client
that both have.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import openai
from openai import DefaultHttpxClient

from embedcore.forksafe import in_child

# Written at once, before the time is looked at again.
_DEADLINE_STEP_BYTES: Final = 1 << 16

Left = Callable[[], float | None]

_log = logging.getLogger("embedcore.openai")


def bound(client: Any, left: Left) -> None:
    """Let no wait of this HTTP client be longer than ``left()`` seconds, where it gives any."""
    for transport in (client._transport, *client._mounts.values()):
        pool = getattr(transport, "_pool", None)
        if pool is None:
            continue
        backend = getattr(pool, "_network_backend", None)
        if backend is None:
            _log.warning(
                "this version of %s cannot be bounded: a server that sends its headers slowly is "
                "waited for longer than timeout says",
                type(pool).__module__.partition(".")[0],
            )
            return
        pool._network_backend = _Backend(backend, left)


class _Backend:
    """Opens connections whose waits are bounded."""

    def __init__(self, inner: Any, left: Left) -> None:
        self._inner = inner
        self._left = left

    def connect_tcp(self, *args: Any, timeout: float | None = None, **more: Any) -> _Stream:
        opened = self._inner.connect_tcp(*args, timeout=_shorter(timeout, self._left()), **more)
        return _Stream(opened, self._left)

    def connect_unix_socket(self, *args: Any, timeout: float | None = None, **more: Any) -> _Stream:
        timeout = _shorter(timeout, self._left())
        opened = self._inner.connect_unix_socket(*args, timeout=timeout, **more)
        return _Stream(opened, self._left)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream:
    """One connection."""

    def __init__(self, inner: Any, left: Left) -> None:
        self._inner = inner
        self._left = left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._inner.read(max_bytes, timeout=self._until("ReadTimeout", timeout))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        for at in range(0, len(view), _DEADLINE_STEP_BYTES):
            left = self._until("WriteTimeout", timeout)
            self._inner.write(view[at : at + _DEADLINE_STEP_BYTES], timeout=left)

    def start_tls(self, *args: Any, timeout: float | None = None, **more: Any) -> _Stream:
        secured = self._inner.start_tls(*args, timeout=_shorter(timeout, self._left()), **more)
        return _Stream(secured, self._left)

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def _until(self, error: str, timeout: float | None) -> float | None:
        """The seconds for one wait. Raises the library's own time-out when there are none left."""
        left = self._left()
        if left is not None and left <= 0:
            library = type(self._inner).__module__.partition(".")[0]
            raise getattr(import_module(library), error)("the time-out of the whole exchange")
        return _shorter(timeout, left)


def _shorter(timeout: float | None, left: float | None) -> float | None:
    if left is None:
        return timeout
    left = max(left, 0.001)
    return left if timeout is None else min(timeout, left)


_KEPT: Final = 4
_LARGEST_KEPT: Final = 8 << 20
_STEP: Final = 1 << 20


class Buffers:
    """Lends memory. Safe to use from several threads; a few buffers are kept for the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap:
        """At least ``size`` bytes, with anything in them."""
        with self._lock:
            for place, buffer in enumerate(self._free):
                if len(buffer) >= size:
                    return self._free.pop(place)
        return _pages(-(-max(size, 1) // _STEP) * _STEP)

    def give(self, buffer: mmap.mmap) -> None:
        """Take back what was lent: it must not be looked at any more."""
        with self._lock:
            if len(self._free) < _KEPT and len(buffer) <= _LARGEST_KEPT:
                self._free.append(buffer)


def _pages(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        # Not shared: after a fork parent and child read their own bodies.
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


_ERROR_BYTES: Final = 1_000_000
# The body of a refusal only says more of what its status says: it is not waited for longer.
_ERROR_SECONDS: Final = 10.0
_STEP_BYTES: Final = 1 << 16
_LONGEST_ENCODING: Final = 40
_WINDOW_BITS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": 15}


@dataclass(kw_only=True, slots=True)
class Exchange:
    """What goes down to ``send`` and what comes back past the SDK.

    ``bound``: when every wait must end; None: how long each may take is decided elsewhere.
    """

    max_bytes: int
    deadline: float
    bound: float | None = None
    stream: bool = False
    download: Download | None = None
    body: memoryview | None = None
    buffer: mmap.mmap | None = None
    turns: threading.BoundedSemaphore | None = None

    def release(self) -> None:
        """The body has been read, or is not wanted: its memory may be used again."""
        if self.download is not None:
            self.download.close()
        if self.turns is not None:
            turns, self.turns = self.turns, None
            turns.release()
        if self.buffer is not None:
            buffer, self.buffer, self.body = self.buffer, None, None
            _memory.buffers.give(buffer)


class UnreadableBody(openai.OpenAIError):
    """The body is larger than any honest one, or packed in a way that was not asked for."""


class CutOff(openai.OpenAIError):
    """The body ended before its end."""


class Download:
    """A body that is read as it arrives. ``left``: seconds that may be spent on waiting for it.

    ``received``: its bytes so far, unpacked.
    """

    def __init__(self, response: Any, *, left: float) -> None:
        self._response = response
        self._left = left
        self.received = 0

    @property
    def delimited(self) -> bool:
        """True when the server says where the body ends, so that one cut off does not go unseen."""
        headers = self._response.headers
        packed = headers.get("content-encoding", "identity").strip().lower() in _WINDOW_BITS
        chunked = "chunked" in headers.get("transfer-encoding", "")
        return packed or chunked or "content-length" in headers

    def pieces(self) -> Iterator[bytes]:
        """The bytes, unpacked. Raises ``CutOff`` and the HTTP library's exceptions."""
        parts = _decoded(self._response, _STEP_BYTES, whole=True)
        while True:
            began = time.monotonic()
            part = next(parts, None)
            if part is None:
                return
            self._left -= time.monotonic() - began
            if self._left < 0:
                raise openai.APITimeoutError(request=self._response.request)
            self.received += len(part)
            yield part

    def close(self) -> None:
        self._response.close()


# How an argument reaches ``send`` through the SDK, which builds and passes on the request.
exchange_under_way: ContextVar[Exchange] = ContextVar("embedcore_openai_exchange")
_LONGEST_WAIT: Final = 0.05


def _left() -> float | None:
    exchange = exchange_under_way.get(None)
    if exchange is None or exchange.bound is None:
        return None
    return exchange.bound - time.monotonic()


class _Memory:
    """What the bodies of this process share."""

    def __init__(self) -> None:
        self.buffers = Buffers()
        # More bodies at once in memory than there are processors to read them make nothing faster;
        # but a body that comes slowly must not keep the others out for long.
        self.turns = threading.BoundedSemaphore(4)


_memory = _Memory()
# A child must not inherit a lock that a thread of the parent was holding.
in_child(_memory.__init__)  # type: ignore[misc]


class CappedClient(DefaultHttpxClient):
    """Reads every body itself, up to a number of decoded bytes and a moment in time."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        bound(self, _left)

    def send(self, request: Any, **kwargs: Any) -> Any:
        exchange = exchange_under_way.get()
        response = super().send(request, **{**kwargs, "stream": True, "follow_redirects": False})
        if exchange.stream and response.status_code < 300:
            exchange.bound = None
            exchange.download = Download(response, left=exchange.deadline - time.monotonic())
            return _with_body(b"", response, request)
        failed = response.status_code >= 300
        if failed:
            soon = time.monotonic() + _ERROR_SECONDS
            exchange.deadline = min(exchange.deadline, soon)
            exchange.bound = exchange.deadline
        try:
            # The read time-out counts from each packet: give the body only what is left.
            left = max(exchange.deadline - time.monotonic(), 0.001)
            request.extensions.get("timeout", {})["read"] = left
            if failed:
                body = _read_refusal(response, exchange)
            else:
                body = _read(response, exchange, request)
        finally:
            response.close()
        return _with_body(body, response, request)


def _with_body(body: bytes, response: Any, request: Any) -> Any:
    # As they came: not every server keeps to ASCII in them.
    headers = [
        (name, value)
        for name, value in response.headers.raw
        if name.lower() not in (b"content-encoding", b"content-length", b"transfer-encoding")
    ]
    return type(response)(response.status_code, headers=headers, content=body, request=request)


def _read(response: Any, exchange: Exchange, request: Any) -> bytes:
    """The body of a success; empty if it went into a buffer."""
    turns = _memory.turns
    if turns.acquire(timeout=_LONGEST_WAIT):
        exchange.turns = turns
    if size := _announced(response, exchange.max_bytes):
        _read_into_buffer(response, size, exchange, request)
        return b""
    cap = exchange.max_bytes
    parts, size, late = [], 0, False
    for part in _decoded(response, cap + 1, whole=True):
        if late:
            raise openai.APITimeoutError(request=request)
        parts.append(part)
        size += len(part)
        if size > cap:
            raise UnreadableBody(f"it is larger than {cap:,} bytes")
        # Checked with the next part: a reply that is complete is kept, however late.
        late = time.monotonic() > exchange.deadline
    return b"".join(parts)


def _read_refusal(response: Any, exchange: Exchange) -> bytes:
    """What can be read of the body of a refusal; its status counts, whatever becomes of the rest.

    It may be packed in a way that was not asked for, be cut off, or never come.
    """
    parts, size = list[bytes](), 0
    try:
        for part in _decoded(response, _ERROR_BYTES + 1):
            parts.append(part)
            size += len(part)
            if size > _ERROR_BYTES or time.monotonic() > exchange.deadline:
                break
    except Exception as error:  # noqa: BLE001 - of either HTTP library, and unpacking
        _log.debug("the body of a refusal cannot be read (%s)", type(error).__name__)
    return b"".join(parts)


def _announced(response: Any, most: int) -> int:
    """The length of a body that is neither packed nor too long; 0 if that is not known."""
    length = response.headers.get("content-length", "")
    plain = response.headers.get("content-encoding", "identity").strip().lower() in ("", "identity")
    size = int(length) if plain and length.isascii() and length.isdigit() else 0
    return size if size <= most else 0


def _read_into_buffer(response: Any, size: int, exchange: Exchange, request: Any) -> None:
    exchange.buffer = _memory.buffers.take(size)
    at, late = 0, False
    for part in response.iter_raw():
        if late:
            raise openai.APITimeoutError(request=request)
        exchange.buffer[at : at + len(part)] = part
        at += len(part)
        # Checked with the next part: a reply that is complete is kept, however late.
        late = time.monotonic() > exchange.deadline
    exchange.body = memoryview(exchange.buffer)[:at]


def _decoded(response: Any, cap: int, *, whole: bool = False) -> Iterator[bytes]:
    """The body's bytes, unpacked at most ``cap`` at a time: a kilobyte may hold a gigabyte.

    With ``whole`` a packed body without its end raises ``CutOff``.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        yield from response.iter_raw()
        return
    if encoding not in _WINDOW_BITS:
        named = "".join(filter(str.isprintable, encoding))[:_LONGEST_ENCODING]
        raise UnreadableBody(
            f"it is compressed (content-encoding: {named}), and uncompressed was asked for "
            "(accept-encoding: identity). Switch the compression of the server, or of the proxy "
            "before it, off for this address; gzip and deflate can be read"
        )
    try:
        ended = yield from _unpacked(response.iter_raw(), _WINDOW_BITS[encoding], cap)
    except zlib.error:
        raise UnreadableBody("its compression is broken") from None
    if whole and not ended:
        raise CutOff("its compressed form has no end")


def _unpacked(parts: Iterator[bytes], window_bits: int, cap: int) -> Generator[bytes, None, bool]:
    """Gives True at the end if the packed form has come to its end as well."""
    unpacker = None
    for part in parts:
        packed = part
        if packed and unpacker is None:
            # Some servers call it deflate and leave out the two bytes of its head.
            bare = window_bits == zlib.MAX_WBITS and packed[0] & 0x0F != zlib.DEFLATED
            window_bits = -zlib.MAX_WBITS if bare else window_bits
            unpacker = zlib.decompressobj(window_bits)
        while packed and unpacker is not None:
            if unpacker.eof:
                # Several packed files in a row are one body.
                unpacker = zlib.decompressobj(window_bits)
            yield unpacker.decompress(packed, cap)
            packed = unpacker.unconsumed_tail or unpacker.unused_data
    return unpacker is not None and unpacker.eof
