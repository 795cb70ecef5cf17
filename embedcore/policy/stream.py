"""A stream of rows, embedded block by block in bounded memory while its consumer works."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from embedcore.errors import ConfigurationError
from embedcore.policy.blocks import Block, RowReader
from embedcore.policy.feed import FLUSH_SECONDS, Feed
from embedcore.policy.outlet import Outlet, OutletView
from embedcore.policy.pieces import closed
from embedcore.policy.portions import OnBudget

if TYPE_CHECKING:
    from embedcore.policy.pieces import OnError
    from embedcore.policy.pipeline import Pipeline

# Reading on is worth that long while there is a block to give: it keeps the requests coming.
_READ_ON_SECONDS: Final = 0.05
# How long ``close`` waits for another thread that is held up by the source.
_PATIENCE_SECONDS: Final = 6.0


class EmbeddingStream(OutletView, Iterator[Block]):
    """Blocks of a stream, in order. Close it, or use it with ``with``, to end it early.

    The source is read in the thread that iterates, no further ahead than a few blocks. A block that
    does not fill up is sent when its first row has waited ``flush_seconds``. Several threads may
    take from one stream, by turns.

    - ``usage``: what the blocks given so far cost.
    - ``stopped_at``: where the budget ended the stream (``on_budget="stop"``), or None.
    - ``salvaged``: after an error or an early end, blocks with what had been bought and not given;
      the rows without a vector are NaN.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        source: Iterable[Any],
        reader: RowReader,
        *,
        on_error: OnError,
        on_budget: OnBudget,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self._pipeline = pipeline
        self._source: Iterator[Any] = iter(source)
        self._feed = Feed(pipeline, reader, on_error, flush_seconds=flush_seconds)
        self._outlet = Outlet(pipeline, on_budget)
        self._busy = threading.RLock()
        self._inside = False
        # At the end of the program the pipeline does more than this would.
        weakref.finalize(self, self._feed.leave).atexit = False

    def __next__(self) -> Block:
        self._pipeline.check_process()
        with self._busy, self._not_twice():
            try:
                block = self._next()
            except BaseException:
                # Also an interrupt: nothing more is sent, and what is under way is accounted for.
                self._end()
                raise
            if block is None:
                self._end()
                raise StopIteration
            return block

    def close(self) -> None:
        """Send nothing more and wait a little for what is under way. Harmless when repeated.

        A generator that is being read is closed as well.
        """
        if not self._pipeline.is_of_this_process:
            return
        # Another thread may be in the middle of ``next``, held up by the source.
        self._pipeline.stop()
        self._feed.leave()
        if self._busy.acquire(timeout=_PATIENCE_SECONDS):
            try:
                with self._not_twice():
                    source = self._source
                    self._end()
                    if isinstance(source, Generator):
                        source.close()
            finally:
                self._busy.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _not_twice(self) -> Iterator[None]:
        """As a generator does: what it reads cannot ask it for its own next block."""
        if self._inside:
            raise ConfigurationError("this stream is already being read, by this same thread")
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _end(self) -> None:
        self._feed.leave()
        # Let go of, as by a for loop: a generator that nobody else holds ends here.
        self._source = iter(())
        self._outlet.close()

    def _next(self) -> Block | None:
        while not self._outlet.ended:
            if self._outlet.has_failed:
                self._outlet.finish()
                return None
            self._read()
            if self._pipeline.is_ended:
                raise closed()
            if self._feed.is_over:
                self._feed.flush()
            if self._pipeline.is_empty:
                if self._feed.error is not None:
                    raise self._feed.error
                return None
            block = self._outlet.next_block()
            if block is not None:
                return block
        return None

    def _read(self) -> None:
        """Read until a block can be given, unless that is now and reading is quick."""
        now = self._pipeline.monotonic
        began = now()
        while self._feed.wants_more:
            if self._pipeline.next_is_ready and now() > began + _READ_ON_SECONDS:
                return
            try:
                item = next(self._source)
            except StopIteration:
                self._feed.end()
            except Exception as error:  # noqa: BLE001 - raised when all before it is given
                self._feed.end(error)
            else:
                self._feed.add(item)
