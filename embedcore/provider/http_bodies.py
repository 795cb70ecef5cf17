"""Bodies of HTTP answers: reused memory, size limits, bounded unpacking.

What a thread allocates and frees, its part of the heap keeps: with sixteen threads, and bodies of
two megabytes in three forms each, that is a hundred megabytes for nothing. Fresh pages for every
body would cost as much time as reading it.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
import zlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from embedcore.forksafe import in_child

if TYPE_CHECKING:
    from http.client import HTTPResponse as Response

_KEPT: Final = 2
_LARGEST_KEPT: Final = 8 << 20
_PAGES: Final = 1 << 20
_STEP_BYTES: Final = 1 << 16
_ERROR_BYTES: Final = 1_000_000
_LONGEST_ENCODING: Final = 40
_LONGEST_WAIT_FOR_TURN: Final = 0.1
_WINDOW_BITS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": 15}

_log = logging.getLogger("embedcore.http")


class UnreadableBody(Exception):
    """The body is larger than any honest one, or packed in a way that was not asked for."""


class CutOff(Exception):
    """The body ended before its end."""


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
        return _pages(-(-max(size, 1) // _PAGES) * _PAGES)

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


class _Memory:
    """What the bodies of this process share."""

    def __init__(self) -> None:
        self.buffers = Buffers()
        # One is parsed at a time, and another may be read meanwhile: more of them in memory make
        # nothing faster. But a body that comes slowly must not keep the others out for long.
        self.turns = threading.BoundedSemaphore(2)


_memory = _Memory()
# A child must not inherit a lock that a thread of the parent was holding.
in_child(_memory.__init__)  # type: ignore[misc]


class Lent:
    """The memory of one body, and its turn to be in memory."""

    def __init__(self) -> None:
        turns = _memory.turns
        self._turns = turns if turns.acquire(timeout=_LONGEST_WAIT_FOR_TURN) else None
        self._buffer: mmap.mmap | None = None

    def room(self, size: int, used: int = 0) -> memoryview:
        """Memory of ``size`` bytes, with the first ``used`` bytes of what was there before."""
        old, new = self._buffer, _memory.buffers.take(size)
        self._buffer = new
        if old is not None:
            new[:used] = old[:used]
            _memory.buffers.give(old)
        return memoryview(new)[:size]

    def release(self) -> None:
        """The body has been read, or is not wanted: its memory may be used again."""
        if self._turns is not None:
            turns, self._turns = self._turns, None
            turns.release()
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            _memory.buffers.give(buffer)


def read(response: Response, most: int, lent: Lent) -> bytes | memoryview:
    """The body of a success, unpacked; in the memory of ``lent`` unless it was packed.

    Raises ``UnreadableBody`` beyond ``most`` bytes, ``CutOff``, and what the socket raises.
    """
    if _packing(response):
        parts, size = list[bytes](), 0
        for part in decoded(response, most + 1, whole=True):
            parts.append(part)
            size += len(part)
            _refuse_beyond(most, size)
        return b"".join(parts)
    if response.length is None:
        return _read_to_the_end(response, most, lent)
    size = response.length
    _refuse_beyond(most, size)
    if not size:
        return b""
    view = lent.room(size)
    found = response.readinto(view)
    if found < size:
        raise CutOff(f"it ended after {found:,} of {size:,} bytes")
    return view


def _read_to_the_end(response: Response, most: int, lent: Lent) -> memoryview:
    """A body in chunks, or one that ends with the connection."""
    view, size = lent.room(min(_PAGES, most + 1)), 0
    while True:
        size += response.readinto(view[size:])
        _refuse_beyond(most, size)
        if size < len(view):
            return view[:size]
        view = lent.room(min(2 * size, most + 1), size)


def _refuse_beyond(most: int, size: int) -> None:
    if size > most:
        raise UnreadableBody(f"it is larger than {most:,} bytes")


def read_refusal(response: Response) -> bytes:
    """What can be read of the body of a refusal; its status counts, whatever becomes of the rest.

    It may be packed in a way that was not asked for, be cut off, or never come.
    """
    parts, size = list[bytes](), 0
    try:
        for part in decoded(response, _ERROR_BYTES + 1):
            parts.append(part)
            size += len(part)
            if size > _ERROR_BYTES:
                break
    except Exception as error:  # noqa: BLE001 - of the socket, of HTTP, and unpacking
        _log.debug("the body of a refusal cannot be read (%s)", type(error).__name__)
    return b"".join(parts)


class Arriving(Protocol):
    """What a ``Download`` needs of its connection."""

    until: float

    def finish(self, *, clean: bool) -> None: ...


class Download:
    """A body that is read as it arrives. ``left``: seconds that may be spent on waiting for it.

    ``received``: its bytes so far, unpacked.
    """

    def __init__(self, response: Response, connection: Arriving, *, left: float) -> None:
        self._response = response
        self._connection = connection
        self._left = left
        self.received = 0

    @property
    def delimited(self) -> bool:
        """True when the server says where the body ends, so that one cut off does not go unseen."""
        response = self._response
        packed = _packing(response) in _WINDOW_BITS
        return packed or response.chunked or response.headers.get("content-length") is not None

    def pieces(self) -> Iterator[bytes]:
        """The bytes, unpacked.

        Raises ``CutOff``, ``UnreadableBody``, ``OSError`` and ``http.client.HTTPException``.
        """
        parts = decoded(self._response, _STEP_BYTES, whole=True)
        while True:
            began = time.monotonic()
            self._connection.until = began + self._left
            part = next(parts, None)
            if part is None:
                self._connection.finish(clean=True)
                return
            self._left -= time.monotonic() - began
            if self._left < 0:
                raise TimeoutError("the time for the whole download")
            self.received += len(part)
            yield part

    def close(self) -> None:
        """Without having read all of it, too."""
        self._connection.finish(clean=False)


def _packing(response: Response) -> str:
    """How the body is packed; "" for a plain one."""
    encoding: str = response.headers.get("content-encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def _pieces(response: Response) -> Iterator[bytes]:
    while piece := response.read1(_STEP_BYTES):
        yield piece
    if response.length:
        raise CutOff(f"it ended {response.length:,} bytes before its end")


def decoded(response: Response, most: int, *, whole: bool = False) -> Iterator[bytes]:
    """The body's bytes, unpacked at most ``most`` at a time: a kilobyte may hold a gigabyte.

    With ``whole`` a packed body without its end raises ``CutOff``.
    """
    encoding = _packing(response)
    if not encoding:
        yield from _pieces(response)
        return
    if encoding not in _WINDOW_BITS:
        named = "".join(filter(str.isprintable, encoding))[:_LONGEST_ENCODING]
        raise UnreadableBody(
            f"it is compressed (content-encoding: {named}), and uncompressed was asked for "
            "(accept-encoding: identity). Switch the compression of the server, or of the proxy "
            "before it, off for this address; gzip and deflate can be read"
        )
    try:
        ended = yield from _unpacked(_pieces(response), _WINDOW_BITS[encoding], most)
    except zlib.error:
        raise UnreadableBody("its compression is broken") from None
    if whole and not ended:
        raise CutOff("its compressed form has no end")


def _unpacked(parts: Iterator[bytes], window_bits: int, most: int) -> Generator[bytes, None, bool]:
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
            yield unpacker.decompress(packed, most)
            packed = unpacker.unconsumed_tail or unpacker.unused_data
    return unpacker is not None and unpacker.eof
