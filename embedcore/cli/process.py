"""A command as a process: exit codes, signals, and the library's log.

The first ends with the code 130 or 143; the second is the system's own end by a signal, which a
shell shows as the same codes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

if TYPE_CHECKING:
    from embedcore.cli.screen import Screen


OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
BUDGET: Final = 3
TRY_AGAIN: Final = 4
STORAGE: Final = 5
FAULT: Final = 70
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
TERMINATED: Final = 143

MEANINGS: Final = {
    OK: "all is done",
    FAILED: "rows failed, the provider refused, or a check found a problem",
    USAGE: "wrong arguments, settings or input, or not confirmed; nothing was sent",
    BUDGET: "a limit of the budget refused",
    TRY_AGAIN: "the provider cannot serve now: the same again may succeed",
    STORAGE: "a file of ours cannot be read or written",
    FAULT: "a fault in embedcore itself",
    INTERRUPTED: "Ctrl-C; what was embedded is kept",
    BROKEN_PIPE: "the reader of the output has gone away",
    TERMINATED: "terminated; what was embedded is kept",
}


def code_of(error: BaseException) -> int:
    """The exit code for an error of ours."""
    from embedcore import errors

    codes: tuple[tuple[type[BaseException], int], ...] = (
        (errors.BudgetExceeded, BUDGET),
        (errors.StorageError, STORAGE),
        (errors.ConfigurationError, USAGE),
        (errors.InputRejected, USAGE),
    )
    found = next((code for kind, code in codes if isinstance(error, kind)), None)
    if found is not None:
        return found
    return TRY_AGAIN if isinstance(error, errors.EmbeddingError) and error.retryable else FAILED


def code_of_rows(*, failed: int, retryable: int) -> int:
    """The exit code of what went on over failed rows. ``retryable``: how many the same again may
    bring, as after a network that was away."""
    if retryable:
        return TRY_AGAIN
    return FAILED if failed else OK


def codes_table() -> str:
    """Every code with its meaning, one a line."""
    return "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items())


_STOPPING = b"\nStopping: a few seconds for the replies under way. Ctrl-C again stops at once.\n"
_SHOW_CURSOR = b"\x1b[?25h"
# Seconds, doubled at each attempt: SQLite counts its waits for a lock, however short they were.
_HEARD_WITHIN: Final = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM: passes wherever Ctrl-C passes, and stops in the same order."""


class Signals:
    """Handlers for the time of a command. ``code``: the exit code after the first signal."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._first: int | None = None
        self._before: dict[int, Any] = {}
        self._reader: threading.Thread | None = None

    @property
    def code(self) -> int:
        return TERMINATED if self._first == signal.SIGTERM else INTERRUPTED

    def __enter__(self) -> Self:
        # Only the main thread may; a call of main() in another keeps what there is.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
            if hasattr(signal, "pthread_kill"):
                self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            os.close(signal.set_wakeup_fd(-1))
            self._reader.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _listen(self) -> None:
        """See that a signal is heard also while the main thread waits inside the system.

        Python looks for signals before it waits, and where one interrupts the wait. One that comes
        between the two, or to another thread, would be heard only after the wait.
        """
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        if before != -1:
            # The program that called main() listens itself.
            signal.set_wakeup_fd(before)
            os.close(ear)
            os.close(mouth)
            return
        self._before[signal.SIGURG] = signal.signal(signal.SIGURG, lambda *_: None)
        self._reader = threading.Thread(target=self._interrupt, args=(ear,), daemon=True)
        self._reader.start()

    def _interrupt(self, ear: int) -> None:
        """Interrupt what the main thread waits for, until the first signal was heard."""
        with open(ear, "rb", buffering=0) as pipe:
            while numbers := pipe.read(1):
                wait = _HEARD_WITHIN
                while numbers[0] != signal.SIGURG and self._first is None:
                    time.sleep(wait)
                    wait *= 2
                    if self._first is None:
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)

    def _handle(self, number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG002
        self._first = number
        # The next one ends the process wherever it is, also where no Python runs, as while SQLite
        # waits for a lock. The state file and the journal survive any death.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if sys.stderr.isatty():
            _write(_SHOW_CURSOR)
        if self._screen.paying:
            _write(_STOPPING)
        self._screen.interrupt = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise self._screen.interrupt


def _write(message: bytes) -> None:
    """Past Python's buffers, whose lock the interrupted code may hold."""
    try:
        os.write(2, message)
    except OSError:
        return


class ScreenHandler(logging.Handler):
    """Warnings always, and with ``--verbose`` every request.

    Errors are left out without ``--verbose``: the command says each of them itself.
    """

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR and not self._screen.verbose:
            return
        try:
            self._screen.error(f"{record.levelname.lower()}: {self.format(record)}")
        except Exception:  # noqa: BLE001 - a line of the log must not end a run
            self.handleError(record)


def attach(screen: Screen) -> None:
    """Show the log of embedcore on this screen, and on no other any more."""
    logger = logging.getLogger("embedcore")
    for handler in [one for one in logger.handlers if isinstance(one, ScreenHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(ScreenHandler(screen))
    logger.setLevel(logging.INFO if screen.verbose else logging.WARNING)
