"""The stream for asyncio: the same blocks, from any iterable or asynchronous iterable."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
)
from typing import TYPE_CHECKING, Any, Final, Self

from embedcore.policy.coroutines import in_thread
from embedcore.policy.immediate.call import OnBudget
from embedcore.policy.stream.pipeline import closed
from embedcore.policy.stream.rows import Block, RowReader
from embedcore.policy.stream.stream import FLUSH_SECONDS, RowBuffer, StreamEnd, StreamEndView

if TYPE_CHECKING:
    from embedcore.policy.stream.pipeline import LoopSignal, OnError, Pipeline


# So long is read at a stretch; then other tasks have their turn.
_READ_SECONDS: Final = 0.01


class AsyncEmbeddingStream(StreamEndView, AsyncIterator[Block]):
    """As ``EmbeddingStream``, without blocking the event loop.

    The source is read in the loop, a plain iterable for a hundredth of a second at a time; one that
    blocks, blocks the loop. An asynchronous source that pauses holds nothing up: what it gave is
    sent after ``flush_seconds``, and given as soon as it is there. A cancelled ``anext`` loses no
    block. Several tasks may take from one stream, by turns.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        signal: LoopSignal,
        source: Iterable[Any] | AsyncIterable[Any],
        reader: RowReader,
        *,
        on_error: OnError,
        on_budget: OnBudget,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self._pipeline = pipeline
        self._signal = signal
        self._plain: Iterator[Any] | None = None
        self._paused: AsyncIterator[Any] | None = None
        if isinstance(source, AsyncIterable):
            self._paused = aiter(source)
        else:
            self._plain = iter(source)
        self._buffer = RowBuffer(self._pipeline, reader, on_error, flush_seconds=flush_seconds)
        self._stream_end = StreamEnd(self._pipeline, on_budget)
        self._busy = asyncio.Lock()
        self._reading: asyncio.Task[Any] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_over = self._is_closing = False
        weakref.finalize(self, self._buffer.leave).atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Block:
        self._pipeline.check_process()
        async with self._busy:
            block = None if self._is_over else await self._next()
        if block is None:
            raise StopAsyncIteration
        return block

    async def aclose(self) -> None:
        """Send nothing more and wait a little for what is under way. Harmless when repeated.

        A generator that is being read is closed as well.
        """
        if not self._pipeline.is_of_this_process:
            return
        self._is_over = self._is_closing = True
        self._pipeline.stop()
        self._signal.ring()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None
        await in_thread(self._stream_end.close)
        self._buffer.leave()
        if isinstance(self._paused, AsyncGenerator):
            await self._paused.aclose()
        elif isinstance(self._plain, Generator):
            self._plain.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _next(self) -> Block | None:
        while not self._stream_end.has_failed:
            self._signal.listen()
            await self._read()
            if self._is_closing:
                raise closed()
            if self._buffer.is_over:
                self._buffer.flush()
                if self._pipeline.is_empty:
                    self._finish()
                    return None
            if not self._pipeline.next_is_ready:
                await self._wait()
                continue
            block = self._stream_end.next_block()
            if block is not None:
                return block
        await self._fail()
        return None

    def _finish(self) -> None:
        self._is_over = True
        self._stream_end.close()
        self._buffer.leave()
        if self._buffer.error is not None:
            raise self._buffer.error

    async def _fail(self) -> None:
        """Ends what is under way, which takes a moment. What is cancelled meanwhile can be asked
        again: the error is not lost."""
        if self._ending is None:
            self._buffer.leave()
            self._ending = asyncio.ensure_future(in_thread(self._stream_end.finish))
            # Where it is not asked for again, no caller is to be warned.
            self._ending.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            await asyncio.shield(self._ending)
        except asyncio.CancelledError:
            # Even if it ended at this very moment: the caller has not heard of it.
            self._is_over = self._ending.cancelled()
            raise
        except BaseException:
            self._is_over = True
            raise
        self._is_over = True

    async def _read(self) -> None:
        """Read what is there for the taking, until the source pauses, or for a short time."""
        if self._plain is not None:
            self._read_plain(self._plain)
            await asyncio.sleep(0)
            return
        until = self._pipeline.monotonic() + _READ_SECONDS
        while self._buffer.wants_more and self._paused is not None and not self._is_closing:
            if self._reading is None:
                self._reading = asyncio.ensure_future(_next(self._paused))
                await asyncio.sleep(0)
            if not self._reading.done():
                return
            self._add(self._reading)
            if self._pipeline.monotonic() > until:
                return

    def _read_plain(self, source: Iterator[Any]) -> None:
        until = self._pipeline.monotonic() + _READ_SECONDS
        while self._buffer.wants_more:
            try:
                item = next(source)
            except StopIteration:
                self._buffer.end()
            except Exception as error:  # noqa: BLE001 - raised when all before it is given
                self._buffer.end(error)
            else:
                self._buffer.add(item)
            if self._pipeline.monotonic() > until:
                return

    def _add(self, read: asyncio.Task[Any]) -> None:
        self._reading = None
        try:
            item = read.result()
        except StopAsyncIteration:
            self._buffer.end()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - as above
            # It was not cancelled here: something that the source waited for was.
            self._buffer.end(error)
        else:
            self._buffer.add(item)

    async def _wait(self) -> None:
        """Until there is something to read or to give."""
        if self._buffer.wants_more and (self._plain is not None or self._reading is None):
            return
        heard = asyncio.ensure_future(self._signal.wait())
        waited = {heard} if self._reading is None else {heard, self._reading}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            heard.cancel()


async def _next(source: AsyncIterator[Any]) -> Any:
    return await anext(source)
