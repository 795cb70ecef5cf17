"""The deadline of one exchange: connecting, sending, the headers and the body.

The HTTP library gives each wait the whole time-out: a server that sends its headers byte by byte,
or "please wait" without end, could keep a request for ever. So what reads and writes below it is
wrapped, in the one place that both majors of the library have for that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

# Written at once, before the time is looked at again.
_STEP_BYTES: Final = 1 << 16

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
        for at in range(0, len(view), _STEP_BYTES):
            left = self._until("WriteTimeout", timeout)
            self._inner.write(view[at : at + _STEP_BYTES], timeout=left)

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
