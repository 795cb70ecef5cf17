"""How does the library's log reach the person?"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedcore.cli.screen import Screen


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
            self._screen.complain(f"{record.levelname.lower()}: {self.format(record)}")
        except Exception:  # noqa: BLE001 - a line of the log must not end a run
            self.handleError(record)


def attach(screen: Screen) -> None:
    """Show the log of embedcore on this screen, and on no other any more."""
    logger = logging.getLogger("embedcore")
    for handler in [one for one in logger.handlers if isinstance(one, ScreenHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(ScreenHandler(screen))
    logger.setLevel(logging.INFO if screen.verbose else logging.WARNING)
