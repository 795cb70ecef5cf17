"""What happens on Ctrl-C and on SIGTERM? The first stops in order, the second at once.

The first ends with the code 130 or 143; the second is the system's own end by a signal, which a
shell shows as the same codes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from embedcore.cli import exits

if TYPE_CHECKING:
    from embedcore.cli.screen import Screen

_STOPPING = b"\nStopping: a few seconds for the replies under way. Ctrl-C again stops at once.\n"
_SHOW_CURSOR = b"\x1b[?25h"


class Terminated(KeyboardInterrupt):
    """SIGTERM: passes wherever Ctrl-C passes, and stops in the same order."""


class Signals:
    """Handlers for the time of a command. ``code``: the exit code after the first signal."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._first: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def code(self) -> int:
        return exits.TERMINATED if self._first == signal.SIGTERM else exits.INTERRUPTED

    def __enter__(self) -> Self:
        # Only the main thread may; who calls main() in another keeps what there is.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG002
        self._first = number
        # The next one ends the process wherever it is, also where no Python runs, as while SQLite
        # waits for a lock. The books and the journal stand any death.
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if sys.stderr.isatty():
            _write(_SHOW_CURSOR)
        if self._screen.buying:
            _write(_STOPPING)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _write(message: bytes) -> None:
    """Past Python's buffers, whose lock the interrupted code may hold."""
    try:
        os.write(2, message)
    except OSError:
        return
