"""The blocks of a stream under way: started in order, held for in order, given in order."""

from __future__ import annotations

import atexit
import contextvars
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.events import Event, Progress
from embedcore.forksafe import process
from embedcore.policy.engine import Engine
from embedcore.policy.pieces import OnError, Piece, closed, embed_piece
from embedcore.policy.pool import Pool
from embedcore.policy.portions import OnBudget

if TYPE_CHECKING:
    from embedcore.policy.blocks import Row

_REQUESTS_PER_BLOCK: Final = 4
_MOST_ROWS: Final = 4096
# Never for ever: on Windows nothing interrupts a wait without an end.
_LOOK_SECONDS: Final = 0.25
_AFTER_GRACE_SECONDS: Final = 1.0

_every: weakref.WeakSet[Pipeline] = weakref.WeakSet()


class Pipeline:
    """Embeds blocks of rows, as many at once as keep every request slot of the client busy.

    ``block_rows``: rows of one block; ``ahead``: blocks that may be under way. ``on_ready`` is
    called, in any thread, when there may be something to give. ``monotonic`` is the engine's clock.
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
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        per_request = engine.info.best_texts_per_request or engine.info.max_texts_per_request
        self.block_rows = block_rows or min(_REQUESTS_PER_BLOCK * per_request, _MOST_ROWS)
        requests = max(-(-self.block_rows // per_request), 1)
        self.ahead = -(-engine.pool.size // requests) + 1
        self.monotonic = engine.monotonic
        self._engine = engine
        self._how = partial(
            embed_piece, input_type=input_type, on_error=on_error, on_budget=on_budget
        )
        self._on_ready = on_ready
        self._threads = Pool(self.ahead)
        # What is traced in those threads belongs to the caller's trace.
        self._context = contextvars.copy_context()
        self._process = process()
        self._pending: deque[Piece] = deque()
        self._turn = threading.Condition()
        self._next_to_hold = 0
        self._number = self._first = 0
        self._tally = _Tally(total)
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
        piece = Piece(number=self._number, first=self._first, rows=rows)
        self._number += 1
        self._first += len(rows)
        self._pending.append(piece)
        try:
            if self.is_ended:
                raise closed()
            self._engine.load()
            self._threads.submit(partial(self._context.copy().run, self._run, piece))
        except EmbeddingError as error:
            piece.finish(error)

    def wait(self) -> Piece:
        """The first piece that was started, when there is something to give of it."""
        piece = self._pending[0]
        while not piece.ready.wait(_LOOK_SECONDS):
            pass
        return piece

    def drop(self) -> None:
        """The first piece is done with."""
        self._pending.popleft()

    def stop(self) -> None:
        """Send nothing more."""
        self.is_ended = True
        for piece in list(self._pending):
            piece.stop.set()
        with self._turn:
            self._turn.notify_all()

    def end(self) -> list[Piece]:
        """Send nothing more. Returns what was under way, once that has landed or been given up."""
        self.stop()
        until = self.monotonic() + self._engine.grace + _AFTER_GRACE_SECONDS
        pieces = list(self._pending)
        for piece in pieces:
            while not piece.done and self.monotonic() < until:
                piece.ready.wait(_LOOK_SECONDS)
                if not piece.done:
                    piece.ready.clear()
        self._threads.close()
        self._pending.clear()
        return pieces

    def abandon(self) -> None:
        """As ``end``, without waiting: nobody is there any more to take anything."""
        self.stop()
        self._threads.close()

    def _run(self, piece: Piece) -> None:
        if self._wait_for_turn(piece):
            engine = replace(self._engine, observe=partial(self._observe, piece.number))
            ready = partial(self._ready, piece)
            self._how(piece, engine, on_held=partial(self._held, piece), on_ready=ready)
            if piece.error is None:
                self._held(piece)
                self._engine.observe(self._tally.finished(piece))
        else:
            piece.error = closed()
        piece.finish()
        self._on_ready()

    def _ready(self, piece: Piece) -> None:
        piece.ready.set()
        self._on_ready()

    def _wait_for_turn(self, piece: Piece) -> bool:
        """Money is held in the order of the stream: a small block must not take what the large
        one before it was refused."""
        with self._turn:
            while self._next_to_hold < piece.number and not self.is_ended:
                self._turn.wait(_LOOK_SECONDS)
        return not self.is_ended

    def _held(self, piece: Piece) -> None:
        with self._turn:
            self._next_to_hold = max(self._next_to_hold, piece.number + 1)
            self._turn.notify_all()

    def _observe(self, number: int, event: Event) -> None:
        if isinstance(event, Progress):
            event = self._tally.of_all(number, event)
        self._engine.observe(event)


class _Tally:
    """The progress of a stream: of the pieces that are finished, and of those under way."""

    def __init__(self, total: int | None) -> None:
        self._lock = threading.Lock()
        self._finished = Progress(done=0, total=total, tokens=0, picodollars=0)
        self._under_way: dict[int, Progress] = {}

    def of_all(self, number: int, event: Progress) -> Progress:
        with self._lock:
            self._under_way[number] = event
            return self._sum()

    def finished(self, piece: Piece) -> Progress:
        """Each of its rows counts now, also those with the text of another."""
        spent = piece.spent
        whole = Progress(
            done=piece.finished,
            total=None,
            tokens=spent.tokens,
            picodollars=spent.picodollars,
            exact=spent.exact,
        )
        with self._lock:
            self._under_way.pop(piece.number, None)
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
        picodollars=one.picodollars + other.picodollars,
        exact=one.exact and other.exact,
    )


def _end_all() -> None:
    """The program ends with streams open: what is under way lands and is booked, for a moment."""
    pipelines = [pipeline for pipeline in list(_every) if pipeline.is_of_this_process]
    for pipeline in pipelines:
        pipeline.stop()
    for pipeline in pipelines:
        pipeline.end()


atexit.register(_end_all)
