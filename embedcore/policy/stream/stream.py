"""A stream of blocks: reading rows, handing blocks out, ending."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from embedcore.errors import BudgetExceeded, ConfigurationError
from embedcore.policy.immediate.call import OnBudget
from embedcore.policy.result import Spending, StoppedAt
from embedcore.policy.stream.pipeline import closed
from embedcore.policy.stream.rows import Block, Row, RowReader

if TYPE_CHECKING:
    from embedcore.policy.stream.pipeline import BlockTask, OnError, Pipeline


class StreamEnd:
    """What has been taken out of a pipeline, and how the stream ends. Shared by both forms.

    - ``usage``: what the blocks given so far cost.
    - ``stopped_at``: set when the budget ended the stream (``on_budget="stop"``).
    - ``salvaged``: after an error or an early end, blocks with what was paid for of the rows not
      given; NaN for the others.
    - ``ended``: nothing more comes, and nothing is left to tell.
    """

    def __init__(self, pipeline: Pipeline, on_budget: OnBudget) -> None:
        self._pipeline = pipeline
        self._stops = on_budget == "stop"
        self._failed: BlockTask | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self.usage = Spending()
        self.stopped_at: StoppedAt | None = None
        self.salvaged: list[Block] = []
        self.ended = False

    @property
    def has_failed(self) -> bool:
        """No block comes any more; ``finish`` tells why."""
        return self._failed is not None

    def next_block(self) -> Block | None:
        """Waits for the next block. None: there is none, and ``has_failed`` is true."""
        task = self._pipeline.wait()
        # Asked before what there is: it may be done a moment later, with more.
        done = task.done
        block = task.block()
        if block is not None:
            task.has_given(block)
            self.usage += block.usage
        if done:
            self._failed = task if task.error is not None else None
            self._pipeline.drop()
        return block

    def finish(self) -> None:
        """End a stream that has failed: raises its error, unless the budget was to end it."""
        failed = self._failed
        self.close()
        if failed is None or failed.error is None:
            return
        if self._stops and isinstance(failed.error, BudgetExceeded):
            row, position = failed.rows[failed.finished], failed.first + failed.finished
            self.stopped_at = StoppedAt(key=row.key, position=position, error=failed.error)
            return
        raise failed.error

    def close(self) -> None:
        """Send nothing more; what was paid for and not given is ``salvaged``. Harmless when
        repeated."""
        with self._lock:
            if self._is_closed:
                return
            tasks = self._pipeline.end()
            if self._failed is not None:
                tasks.insert(0, self._failed)
            rests = [rest for task in tasks for rest in (task.block(), task.rest())]
            self.salvaged = [rest for rest in rests if rest is not None]
            self._is_closed = self.ended = True


class StreamEndView:
    """What both forms of a stream show of their end."""

    _stream_end: StreamEnd

    @property
    def usage(self) -> Spending:
        return self._stream_end.usage

    @property
    def stopped_at(self) -> StoppedAt | None:
        return self._stream_end.stopped_at

    @property
    def salvaged(self) -> list[Block]:
        return self._stream_end.salvaged


FLUSH_SECONDS: Final = 1.0

_Signals: TypeAlias = "queue.SimpleQueue[None]"


class RowBuffer:
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
        """It is not read any more: end what is under way, in the buffer's own thread.

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


def _tend(buffer: RowBuffer, pipeline: Pipeline, signals: _Signals, seconds: float) -> None:
    while True:
        try:
            signals.get(timeout=seconds / 4)
        except queue.Empty:
            buffer.flush(older_than=seconds)
        else:
            pipeline.abandon()
            return


# Reading on is worth that long while there is a block to give: it keeps the requests coming.
_READ_ON_SECONDS: Final = 0.05
# How long ``close`` waits for another thread that is held up by the source.
_LONGEST_WAIT: Final = 6.0


class EmbeddingStream(StreamEndView, Iterator[Block]):
    """Blocks of a stream, in order. Close it, or use it with ``with``, to end it early.

    The source is read in the thread that iterates, no further ahead than a few blocks. A block that
    does not fill up is sent when its first row has waited ``flush_seconds``. Several threads may
    take from one stream, by turns.

    - ``usage``: what the blocks given so far cost.
    - ``stopped_at``: where the budget ended the stream (``on_budget="stop"``), or None.
    - ``salvaged``: after an error or an early end, blocks with what was paid for and not given; the
      rows without a vector are NaN.
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
        self._buffer = RowBuffer(pipeline, reader, on_error, flush_seconds=flush_seconds)
        self._stream_end = StreamEnd(pipeline, on_budget)
        self._busy = threading.RLock()
        self._inside = False
        # At the end of the program the pipeline does more than this would.
        weakref.finalize(self, self._buffer.leave).atexit = False

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
        self._buffer.leave()
        if self._busy.acquire(timeout=_LONGEST_WAIT):
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

    def __exit__(self, *_: object) -> None:
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
        self._buffer.leave()
        # Let go of, as by a for loop: a generator to which there is no other reference ends here.
        self._source = iter(())
        self._stream_end.close()

    def _next(self) -> Block | None:
        while not self._stream_end.ended:
            if self._stream_end.has_failed:
                self._stream_end.finish()
                return None
            self._read()
            if self._pipeline.is_ended:
                raise closed()
            if self._buffer.is_over:
                self._buffer.flush()
            if self._pipeline.is_empty:
                if self._buffer.error is not None:
                    raise self._buffer.error
                return None
            block = self._stream_end.next_block()
            if block is not None:
                return block
        return None

    def _read(self) -> None:
        """Read until a block can be given, unless that is now and reading is quick."""
        now = self._pipeline.monotonic
        began = now()
        while self._buffer.wants_more:
            if self._pipeline.next_is_ready and now() > began + _READ_ON_SECONDS:
                return
            try:
                item = next(self._source)
            except StopIteration:
                self._buffer.end()
            except Exception as error:  # noqa: BLE001 - raised when all before it is given
                self._buffer.end(error)
            else:
                self._buffer.add(item)
