"""The pipeline of a stream: blocks in flight, in order, as far as slots and budget allow."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from embedcore import money
from embedcore.errors import ConfigurationError, EmbeddingError, InputRejected
from embedcore.events import Event, Progress, Refused
from embedcore.forksafe import process
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.immediate.call import OnBudget
from embedcore.policy.immediate.recipe import (
    await_budget,
    check_on_budget,
    check_on_error,
    embed_now,
)
from embedcore.policy.result import EmbeddingResult, Spending
from embedcore.policy.stream.rows import Block, Row, name_rows
from embedcore.policy.threads import LOOK_SECONDS, Pause, Pool, Stopped

if TYPE_CHECKING:
    from embedcore.policy.result import StoppedAt
    from embedcore.provider.types import Vectors


OnError: TypeAlias = Literal["raise", "keep"]


@dataclass(kw_only=True, slots=True, eq=False)
class BlockTask:
    """Rows that are embedded together, and what became of them.

    - ``results``: of the rows from the first on, less those that were given.
    - ``finished``: how many rows have a result; ``spent``: what those cost.
    - ``error``: why there are none after them.
    - ``ready``: set when something can be given, or nothing more comes (``done``).
    - ``stop``: its own, for a call that fails sets it.
    """

    number: int
    first: int
    rows: Sequence[Row]
    results: deque[EmbeddingResult] = field(default_factory=deque)
    finished: int = 0
    given: int = 0
    spent: Spending = field(default_factory=Spending)
    error: BaseException | None = None
    done: bool = False
    ready: threading.Event = field(default_factory=threading.Event)
    stop: Stop = field(default_factory=Stop)

    def add(self, result: EmbeddingResult) -> None:
        self.results.append(result)
        self.finished += len(result)
        self.spent += result.usage

    def finish(self, error: BaseException | None = None) -> None:
        self.error = error if error is not None else self.error
        self.done = True
        self.ready.set()

    def block(self) -> Block | None:
        """The finished rows that were not given; None if there are none."""
        results = list(self.results)
        rows = self.rows[self.given : self.given + sum(map(len, results))]
        return _block(rows, results, self.first + self.given)

    def has_given(self, block: Block) -> None:
        """The block is in the consumer's hands: it is not given, or salvaged, again."""
        self.given += len(block)
        left = len(block)
        while left:
            left -= len(self.results.popleft())
        if not self.done:
            self.ready.clear()
            # Between the two it may have been finished.
            if self.done:
                self.ready.set()

    def rest(self) -> Block | None:
        """What was paid for of the rows after those, when the block failed; the others are NaN."""
        partial = getattr(self.error, "partial", None)
        rows, first = self.rows[self.finished :], self.first + self.finished
        if not isinstance(partial, EmbeddingResult) or not partial.ok.any():
            return None
        return _block(rows[: len(partial)], [partial], first)


def closed(*, partial: EmbeddingResult | None = None) -> EmbeddingError:
    """For what was under way, or still asked for, when a stream was closed."""
    return EmbeddingError("the stream was closed before it ended", partial=partial)


def _has_any(result: EmbeddingResult | None) -> bool:
    return result is not None and bool(result.ok.any())


def _is_billed(result: EmbeddingResult | None) -> bool:
    """Whether there are vectors in it that were paid for."""
    return result is not None and bool((result.ok & ~result.reused).any())


def _block(rows: Sequence[Row], results: Sequence[EmbeddingResult], first: int) -> Block | None:
    if not rows:
        return None
    import numpy as np

    whole = len(results) == 1
    starts = np.cumsum([0, *map(len, results)]).tolist()
    parts = list(zip(starts, results, strict=False))
    errors = {at + row: error for at, one in parts for row, error in one.errors.items()}
    # What was wrong before there was a text says more than that there was none.
    errors.update({at: problem for at in errors if (problem := rows[at].problem) is not None})
    for error in errors.values():
        name_rows(error, rows, first)
    return Block(
        keys=[row.key for row in rows],
        rows=[row.item for row in rows],
        first=first,
        vectors=results[0].vectors if whole else _joined([one.vectors for one in results]),
        ok=np.concatenate([one.ok for one in results]),
        reused=np.concatenate([one.reused for one in results]),
        usage=sum((one.usage for one in results), Spending()),
        cuts={at + row: cut for at, one in parts for row, cut in one.cuts.items()},
        errors=errors,
    )


def _joined(parts: Sequence[Vectors]) -> Vectors:
    import numpy as np

    # Where every row of a part failed, the width of its vectors may not be known.
    width = max(part.shape[1] for part in parts)
    whole = np.full((sum(map(len, parts)), width), np.nan, dtype=np.float32)
    at = 0
    for part in parts:
        whole[at : at + len(part), : part.shape[1]] = part
        at += len(part)
    return whole


_REQUESTS_PER_BLOCK: Final = 4
_MOST_ROWS: Final = 4096
_AFTER_GRACE_SECONDS: Final = 1.0

_every: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def check_stream(on_error: str, on_budget: str, block_size: int | None) -> None:
    """Raises ``ConfigurationError`` for what no stream can do."""
    check_on_error(on_error)
    check_on_budget(on_budget)
    if block_size is not None and not block_size > 0:
        raise ConfigurationError(f"block_size = {block_size} must be at least 1 row")


class LoopSignal:
    """Rung in any thread when there may be something to give, heard in an event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def ring(self) -> None:
        loop = self._loop
        # A loop that is closed hears nothing.
        with contextlib.suppress(RuntimeError):
            if loop is not None:
                loop.call_soon_threadsafe(self._event.set)

    def listen(self) -> None:
        """What rings from now on is heard by ``wait``."""
        self._loop = asyncio.get_running_loop()
        self._event.clear()

    async def wait(self) -> None:
        await self._event.wait()


class Pipeline:
    """Embeds blocks of rows, as many at once as keep every request slot of the client busy.

    ``block_rows``: rows of one block; ``ahead``: blocks that may be under way. ``signal`` is
    rung when there may be something to give. ``monotonic`` is the engine's clock.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        input_type: str | None,
        on_error: OnError,
        on_budget: OnBudget,
        block_rows: int | None,
        total: int | None,
        signal: LoopSignal | None = None,
    ) -> None:
        per_request = engine.info.best_texts_per_request or engine.info.max_texts_per_request
        self.block_rows = block_rows or min(_REQUESTS_PER_BLOCK * per_request, _MOST_ROWS)
        requests = max(-(-self.block_rows // per_request), 1)
        self.ahead = -(-engine.pool.size // requests) + 1
        self.monotonic = engine.monotonic
        self._engine = engine
        self._input_type = input_type
        self._on_error = on_error
        self._on_budget = on_budget
        self._signal = signal
        self._threads = Pool(self.ahead)
        # What is traced in those threads belongs to the caller's trace.
        self._context = contextvars.copy_context()
        self._process = process()
        self._pending: deque[BlockTask] = deque()
        self._turn = threading.Condition()
        self._next_to_hold = 0
        self._number = self._first = 0
        self._progress = _StreamProgress(total)
        self.is_ended = False
        _every.add(self)

    @property
    def has_room(self) -> bool:
        return len(self._pending) < self.ahead

    @property
    def is_empty(self) -> bool:
        return not self._pending

    @property
    def next_is_ready(self) -> bool:
        """Whether ``wait`` would return at once."""
        return bool(self._pending) and self._pending[0].ready.is_set()

    def check_process(self) -> None:
        """Raises ``ConfigurationError`` in a process that was forked off: its threads are not
        there."""
        if not self.is_of_this_process:
            raise ConfigurationError(
                "a stream cannot be continued in a process forked off after it was opened: open "
                "one there"
            )

    @property
    def is_of_this_process(self) -> bool:
        return process() == self._process

    def start(self, rows: Sequence[Row]) -> None:
        """Begin with the next rows of the stream. Called by one thread at a time."""
        task = BlockTask(number=self._number, first=self._first, rows=rows)
        self._number += 1
        self._first += len(rows)
        self._pending.append(task)
        try:
            if self.is_ended:
                raise closed()
            self._engine.load()
            self._threads.submit(partial(self._context.copy().run, self._run, task))
        except EmbeddingError as error:
            task.finish(error)

    def wait(self) -> BlockTask:
        """The first block that was started, when there is something to give of it."""
        task = self._pending[0]
        while not task.ready.wait(LOOK_SECONDS):
            pass
        return task

    def drop(self) -> None:
        """The first block is done with."""
        self._pending.popleft()

    def stop(self) -> None:
        """Send nothing more."""
        self.is_ended = True
        for task in list(self._pending):
            task.stop.set()
        with self._turn:
            self._turn.notify_all()

    def end(self) -> list[BlockTask]:
        """Send nothing more. Returns what was under way, once it was answered or given up."""
        self.stop()
        until = self.monotonic() + self._engine.grace + _AFTER_GRACE_SECONDS
        tasks = list(self._pending)
        for task in tasks:
            while not task.done and self.monotonic() < until:
                task.ready.wait(LOOK_SECONDS)
                if not task.done:
                    task.ready.clear()
        self._threads.close()
        self._pending.clear()
        return tasks

    def abandon(self) -> None:
        """As ``end``, without waiting: nothing is taken any more."""
        self.stop()
        self._threads.close()

    def _run(self, task: BlockTask) -> None:
        """Embed the rows of a block, or as many of the first ones as can be; never raises."""
        try:
            if not self._wait_for_turn(task):
                raise Stopped
            self._embed(task)
        except Stopped as stopped:
            task.error = closed(partial=getattr(stopped, "partial", None))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            name_rows(error, task.rows, task.first)
            task.error = error
        else:
            self._needs_no_more_money(task)
            self._engine.observe(self._progress.finished(task))
        task.finish()
        self._ring()

    def _embed(self, task: BlockTask) -> None:
        end = len(task.rows)
        problem: EmbeddingError | None = None
        while task.finished < end:
            try:
                # Nothing that comes after a bad row is paid for.
                result = self._embed_rows(task, end, is_last=problem is None)
            except InputRejected as error:
                # Nothing was sent: what comes before the bad row is good.
                if error.position is None or error.billed != "no" or _has_any(error.partial):
                    raise
                problem, end = error, error.position - task.first
                continue
            if result.stopped_at is None:
                task.add(result)
            else:
                self._refused(task, result, result.stopped_at)
        if problem is not None:
            raise problem

    def _embed_rows(self, task: BlockTask, end: int, *, is_last: bool) -> EmbeddingResult:
        """The rows up to ``end`` that have no result yet, or as many of them as the budget allows.

        ``is_last``: the block needs no more money once it is reserved for these.
        """
        start = task.finished
        return embed_now(
            replace(self._engine, observe=partial(self._observe, task)),
            [row.text for row in task.rows[start:end]],
            input_type=self._input_type,
            on_error=self._on_error,
            on_budget="stop",
            first_row=task.first + start,
            stop=task.stop,
            on_held=partial(self._needs_no_more_money, task) if is_last else None,
        )

    def _refused(self, task: BlockTask, result: EmbeddingResult, stopped: StoppedAt) -> None:
        """Give what was done until the budget ended; wait, or raise the refusal."""
        account, error = self._engine.account, stopped.error
        done, rest = result.split(stopped.position - task.first - task.finished)
        if len(done):
            task.add(done)
        error.partial = rest
        # What was paid for beyond must not be paid for again: it is salvaged.
        if self._on_budget != "wait" or _is_billed(rest):
            self._engine.observe(account.refused(error))
            raise error
        if task.results:
            # It takes a while until there is more than the block has by now.
            task.ready.set()
            self._ring()
        pause = Pause(task.stop, self._engine.wait_for)
        await_budget(account, error, self._engine.observe, pause)

    def _ring(self) -> None:
        if self._signal is not None:
            self._signal.ring()

    def _wait_for_turn(self, task: BlockTask) -> bool:
        """Money is reserved in the order of the stream: a small block must not take what the large
        one before it was refused."""
        with self._turn:
            while self._next_to_hold < task.number and not self.is_ended:
                self._turn.wait(LOOK_SECONDS)
        return not self.is_ended

    def _needs_no_more_money(self, task: BlockTask) -> None:
        """The next block may reserve its own."""
        with self._turn:
            self._next_to_hold = max(self._next_to_hold, task.number + 1)
            self._turn.notify_all()

    def _observe(self, task: BlockTask, event: Event) -> None:
        # What is refused is tried again with fewer rows; the last refusal is reported.
        if isinstance(event, Refused):
            return
        if isinstance(event, Progress):
            event = self._progress.of_all(task, event)
        self._engine.observe(event)


class _StreamProgress:
    """The progress of a stream: of the blocks that are finished, and of those under way."""

    def __init__(self, total: int | None) -> None:
        self._lock = threading.Lock()
        self._finished = Progress(done=0, total=total, tokens=0, cost=Decimal(0))
        self._under_way: dict[int, Progress] = {}

    def of_all(self, task: BlockTask, event: Progress) -> Progress:
        """``event``: of the rows that the block has no result for."""
        spent = task.spent
        event = replace(
            event,
            done=task.finished + event.done,
            tokens=spent.tokens + event.tokens,
            cost=money.added(spent.cost, event.cost),
            exact=spent.exact and event.exact,
        )
        with self._lock:
            self._under_way[task.number] = event
            return self._sum()

    def finished(self, task: BlockTask) -> Progress:
        """Each of its rows counts now, also those with the text of another."""
        spent = task.spent
        whole = Progress(
            done=task.finished,
            total=None,
            tokens=spent.tokens,
            cost=spent.cost,
            exact=spent.exact,
        )
        with self._lock:
            self._under_way.pop(task.number, None)
            self._finished = _plus(self._finished, whole)
            return self._sum()

    def _sum(self) -> Progress:
        whole = self._finished
        for part in self._under_way.values():
            whole = _plus(whole, part)
        return whole


def _plus(one: Progress, other: Progress) -> Progress:
    return replace(
        one,
        done=one.done + other.done,
        tokens=one.tokens + other.tokens,
        cost=money.added(one.cost, other.cost),
        exact=one.exact and other.exact,
    )


def _end_all() -> None:
    """The program ends with streams open: for a moment, what is under way is accounted for."""
    pipelines = [pipeline for pipeline in list(_every) if pipeline.is_of_this_process]
    for pipeline in pipelines:
        pipeline.stop()
    for pipeline in pipelines:
        pipeline.end()


atexit.register(_end_all)
