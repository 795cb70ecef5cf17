"""One HTTP exchange through the openai package: capped, timed, never redirected, never retried.

The SDK reads a body without a limit, follows redirects by default and may be either of two major
versions on two HTTP libraries. All of that is decided here, in the one method of the HTTP client
that both have.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from mmap import mmap
from typing import Any, Final

import openai
from openai import DefaultHttpxClient, Omit

from embedcore_openai.buffers import Buffers

_ERROR_BYTES: Final = 1_000_000
_LOGGERS: Final = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")
_WINDOW_BITS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": 15}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Any HTTP answer, whatever its status. ``headers`` does not mind upper and lower case.

    ``body`` may be lent: it must not be looked at after ``release()``.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | memoryview = b""
    release: Callable[[], None] = lambda: None


@dataclass(kw_only=True, slots=True)
class _Exchange:
    """What goes down to ``send`` and what comes back past the SDK."""

    max_bytes: int
    deadline: float
    body: memoryview | None = None
    buffer: mmap | None = None
    turns: threading.BoundedSemaphore | None = None

    def release(self) -> None:
        """The body has been read: its memory may be used again."""
        if self.turns is not None:
            turns, self.turns = self.turns, None
            turns.release()
        if self.buffer is not None:
            buffer, self.buffer, self.body = self.buffer, None, None
            _memory.buffers.give(buffer)


class UnreadableBody(openai.OpenAIError):
    """The body is larger than any honest one, or packed in a way nobody asked for."""


# How an argument reaches ``send`` through the SDK, which builds and passes on the request.
_exchange: ContextVar[_Exchange] = ContextVar("embedcore_openai_exchange")
_PATIENCE_SECONDS: Final = 0.05


class _Memory:
    """What the bodies of this process share."""

    def __init__(self) -> None:
        self.buffers = Buffers()
        # More bodies at once in memory than there are processors to read them make nothing faster;
        # but a body that comes slowly must not keep the others out for long.
        self.turns = threading.BoundedSemaphore(4)


_memory = _Memory()
if hasattr(os, "register_at_fork"):
    # A child must not inherit a lock that a thread of the parent was holding.
    os.register_at_fork(after_in_child=_memory.__init__)  # type: ignore[misc]


class CappedClient(DefaultHttpxClient):
    """Reads every body itself, up to a number of decoded bytes and a moment in time."""

    def send(self, request: Any, **kwargs: Any) -> Any:
        exchange = _exchange.get()
        response = super().send(request, **{**kwargs, "stream": True, "follow_redirects": False})
        try:
            # The read time-out counts from each packet: give the body only what is left.
            left = max(exchange.deadline - time.monotonic(), 0.001)
            request.extensions.get("timeout", {})["read"] = left
            body = _read(response, exchange, request)
        finally:
            response.close()
        headers = [
            (name, value)
            for name, value in response.headers.multi_items()
            if name not in ("content-encoding", "content-length", "transfer-encoding")
        ]
        return type(response)(response.status_code, headers=headers, content=body, request=request)


def _read(response: Any, exchange: _Exchange, request: Any) -> bytes:
    """The body; empty if it went into a buffer."""
    failed = response.status_code >= 300
    if not failed:
        turns = _memory.turns
        if turns.acquire(timeout=_PATIENCE_SECONDS):
            exchange.turns = turns
        if size := _announced(response, exchange.max_bytes):
            _read_into_buffer(response, size, exchange, request)
            return b""
    cap = _ERROR_BYTES if failed else exchange.max_bytes
    parts, size, late = [], 0, False
    for part in _decoded(response, cap + 1):
        if late:
            raise openai.APITimeoutError(request=request)
        parts.append(part)
        size += len(part)
        if size > cap:
            if failed:
                break
            raise UnreadableBody(f"it is larger than {cap:,} bytes")
        # Checked with the next part: a reply that is complete is kept, however late.
        late = time.monotonic() > exchange.deadline
    return b"".join(parts)


def _announced(response: Any, most: int) -> int:
    """The length of a body that is neither packed nor too long; 0 if that is not known."""
    length = response.headers.get("content-length", "")
    plain = response.headers.get("content-encoding", "identity").strip().lower() in ("", "identity")
    size = int(length) if plain and length.isascii() and length.isdigit() else 0
    return size if size <= most else 0


def _read_into_buffer(response: Any, size: int, exchange: _Exchange, request: Any) -> None:
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


def _decoded(response: Any, cap: int) -> Iterator[bytes]:
    """The body's bytes, unpacked at most ``cap`` at a time: a kilobyte may hold a gigabyte."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        yield from response.iter_raw()
        return
    if encoding not in _WINDOW_BITS:
        raise UnreadableBody("it is compressed in a way that was not asked for")
    try:
        yield from _unpacked(response.iter_raw(), _WINDOW_BITS[encoding], cap)
    except zlib.error:
        raise UnreadableBody("its compression is broken") from None


def _unpacked(parts: Iterator[bytes], window_bits: int, cap: int) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(window_bits)
    for part in parts:
        packed = part
        while packed:
            if unpacker.eof:
                # Several packed files in a row are one body.
                unpacker = zlib.decompressobj(window_bits)
            yield unpacker.decompress(packed, cap)
            packed = unpacker.unconsumed_tail or unpacker.unused_data


class Transport:
    """Connections to one endpoint, usable from several threads. Holds no key."""

    def __init__(
        self,
        *,
        base_url: str,
        organization: str | None,
        project: str | None,
        connect_timeout: float,
    ) -> None:
        self._connect_timeout = connect_timeout
        self._headers = {
            # Vectors hardly compress, and unpacking costs four times the rest of the decoding.
            "Accept-Encoding": "identity",
            # Named here or left out: the SDK would take them from the environment.
            "OpenAI-Organization": organization or Omit(),
            "OpenAI-Project": project or Omit(),
        }
        http = CappedClient()
        self._client = openai.OpenAI(
            # The real one travels with each request, and is kept by nobody.
            api_key="(none)",
            base_url=base_url,
            max_retries=0,
            http_client=http,
        )
        # httpx for openai 2, httpx2 for openai 3.
        library = type(http.build_request("GET", base_url)).__module__.partition(".")[0]
        self._response: type[Any] = import_module(library).Response
        # Whoever forgets to close leaves no open sockets behind.
        weakref.finalize(self, http.close)
        _quieten()

    def post(
        self, body: bytes, headers: Mapping[str, str], *, timeout: float, max_bytes: int
    ) -> Answer:
        """Send one request; ``timeout`` is for all of it, in seconds.

        Without ``Authorization`` in ``headers``, none is sent. Raises the exceptions of the openai
        package where there is no HTTP answer, and ``UnreadableBody``.
        """
        exchange = _Exchange(max_bytes=max_bytes, deadline=time.monotonic() + timeout)
        token = _exchange.set(exchange)
        try:
            response = self._client.post(
                "/embeddings",
                cast_to=self._response,
                content=body,
                options={
                    "headers": {"Authorization": Omit(), **self._headers, **headers},
                    "timeout": openai.Timeout(timeout, connect=min(timeout, self._connect_timeout)),
                },
            )
        except openai.APIStatusError as error:
            response = error.response
        except BaseException:
            exchange.release()
            raise
        finally:
            _exchange.reset(token)
        return Answer(
            status=response.status_code,
            headers=response.headers,
            body=response.content if exchange.body is None else exchange.body,
            release=exchange.release,
        )

    def close(self) -> None:
        self._client.close()


def _quieten() -> None:
    """One line per request is embedcore's own; at DEBUG these loggers print texts.

    A level that was set on purpose, by hand or with ``OPENAI_LOG``, stays.
    """
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
