"""What was read of a stream's source, and when is it sent?"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from embedcore.policy.blocks import Row, RowReader

if TYPE_CHECKING:
    from embedcore.policy.pieces import OnError
    from embedcore.policy.pipeline import Pipeline

FLUSH_SECONDS: Final = 1.0

_Signals: TypeAlias = "queue.SimpleQueue[None]"


class Feed:
    """Rows that were read and not yet started; who reads them is the stream's affair.

    From the first row to ``leave`` a thread of its own sends what has waited ``flush_seconds``,
    while the source or the consumer takes its time.
    """

    def __init__(
        self, pipeline: Pipeline, reader: RowReader, on_error: OnError, *, flush_seconds: float
    ) -> None:
        self._pipeline = pipeline
        self._reader = reader
        self._keeps = on_error == "keep"
        self._flush_seconds = flush_seconds
        self._lock = threading.Lock()
        self._rows: list[Row] = []
        self._oldest = 0.0
        self._signals: _Signals = queue.SimpleQueue()
        self._tended = False
        self.is_over = False
        self.error: BaseException | None = None

    @property
    def wants_more(self) -> bool:
        return not self.is_over and self._pipeline.has_room

    def add(self, item: Any) -> None:
        """One element of the source; a full block is started."""
        try:
            row = self._reader.row(item)
        except Exception as error:  # noqa: BLE001 - of an element that reads itself as it is indexed
            self.end(error)
            return
        if row.problem is not None and not self._keeps:
            self.end(row.problem)
            return
        with self._lock:
            if not self._rows:
                self._oldest = self._pipeline.monotonic()
            self._rows.append(row)
            if len(self._rows) >= self._pipeline.block_rows:
                self._start()
        if not self._tended:
            self._begin_to_tend()

    def flush(self, *, older_than: float = 0.0) -> None:
        """Start what there is, if its first row has waited so many seconds."""
        with self._lock:
            waited = self._pipeline.monotonic() - self._oldest
            if self._rows and self._pipeline.has_room and waited >= older_than:
                self._start()

    def end(self, error: BaseException | None = None) -> None:
        """The source has no more, or has failed: then what was read before is embedded first."""
        self.error = error
        self.is_over = True

    def leave(self) -> None:
        """Nobody reads on: end what is under way, in the feed's own thread.

        Takes no lock, so that it may be called while memory is being freed, whatever this thread
        holds at that moment.
        """
        self._signals.put(None)

    def _start(self) -> None:
        rows, self._rows = self._rows, []
        self._pipeline.start(rows)

    def _begin_to_tend(self) -> None:
        thread = threading.Thread(
            target=_tend,
            args=(self, self._pipeline, self._signals, self._flush_seconds),
            name="embedcore-stream",
            daemon=True,
        )
        # Without a thread a slow source is sent block by block, and no sooner.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._tended = True


def _tend(feed: Feed, pipeline: Pipeline, signals: _Signals, seconds: float) -> None:
    while True:
        try:
            signals.get(timeout=seconds / 4)
        except queue.Empty:
            feed.flush(older_than=seconds)
        else:
            pipeline.abandon()
            return
