"""Progress: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, Self

from embedcore import money
from embedcore.cli.text import duration, plural, tokens

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress, TaskID

    from embedcore.cli.screen import Screen
    from embedcore.files.types import FileProgress

LINE_SECONDS: Final = 10.0
_VERBS: Final = {"reading": "Reading and counting", "embedding": "Embedding", "writing": "Writing"}


class Display(Protocol):
    """Shows how far a run is; called by one thread at a time."""

    def draw(self, progress: FileProgress) -> None: ...
    def pause(self) -> None:
        """Clear the way for a message or a question; the next ``draw`` goes on."""
        ...


class Bar:
    """A bar for each stage: rows, tokens, dollars, and the time that is left."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._stage = ""
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def draw(self, progress: FileProgress) -> None:
        if progress.stage != self._stage or self._bar is None:
            self.pause()
            self._start(progress)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=progress.done,
                total=progress.total or None,
                spent=_spent(progress),
                rows=_rows(progress),
            )

    def pause(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()
            self._screen.over(None)

    def _start(self, progress: FileProgress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._stage = progress.stage
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[rows]}"),
            TextColumn("{task.fields[spent]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=progress.stage != "embedding",
            expand=True,
        )
        verb = _VERBS[progress.stage]
        self._task = bar.add_task(verb, total=progress.total or None, rows="", spent="")
        self._bar = bar
        bar.start()
        self._screen.over(lambda text: bar.console.print(text, markup=False, highlight=False))


class Lines:
    """A line of text every few seconds, for a log."""

    def __init__(self, screen: Screen, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._screen = screen
        self._monotonic = monotonic
        self._stage = ""
        self._began = (0.0, 0)
        self._next = monotonic() + LINE_SECONDS

    def draw(self, progress: FileProgress) -> None:
        now = self._monotonic()
        if progress.stage != self._stage:
            self._stage, self._began = progress.stage, (now, progress.done)
        if now < self._next:
            return
        self._next = now + LINE_SECONDS
        self._screen.info(f"{_VERBS[progress.stage]}: {self._line(progress, now)}")

    def pause(self) -> None:
        """A line alone need not be cleared."""

    def _line(self, progress: FileProgress, now: float) -> str:
        if not progress.total:
            return plural(progress.done, "row")
        started, done = self._began
        parts = [f"{progress.done:,} of {progress.total:,}", *filter(None, [_spent(progress)])]
        if progress.done > done:
            left = (now - started) / (progress.done - done) * (progress.total - progress.done)
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)


class Shown:
    """A display for the length of the block; nothing with ``--quiet``."""

    def __init__(self, screen: Screen) -> None:
        self._lock = threading.RLock()
        self._display: Display | None = None
        if not screen.quiet:
            self._display = Bar(screen) if screen.terminal else Lines(screen)

    def draw(self, progress: FileProgress) -> None:
        if progress.stage != "reading" and not progress.total:
            return
        with self._lock:
            if self._display is not None:
                self._display.draw(progress)

    def pause(self) -> None:
        with self._lock:
            if self._display is not None:
                self._display.pause()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A request that was given up may still report: it must not draw over what follows.
        with self._lock:
            display, self._display = self._display, None
            if display is not None:
                display.pause()


def _rows(progress: FileProgress) -> str:
    if progress.total:
        return f"{progress.done:,}/{progress.total:,}"
    return f"{progress.done:,}" if progress.done else ""


def _spent(progress: FileProgress) -> str:
    if not progress.tokens:
        return ""
    cost = f", {money.shown(progress.cost)}" if progress.cost else ""
    return f"{tokens(progress.tokens, exact=progress.exact)}{cost}"
