"""One block of a stream on its way: as much of it as the texts and the budget allow, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from embedcore.errors import BudgetExceeded, EmbeddingError, InputRejected
from embedcore.events import Event, Progress, Refused
from embedcore.policy.blocks import Block, Row, name_rows
from embedcore.policy.engine import Stop
from embedcore.policy.flights import Pause, Stopped
from embedcore.policy.immediate import embed_now
from embedcore.policy.portions import OnBudget, await_budget
from embedcore.policy.result import EmbeddingResult, Spending

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine
    from embedcore.policy.result import StoppedAt
    from embedcore.provider.types import Vectors

OnError: TypeAlias = Literal["raise", "keep"]


@dataclass(kw_only=True, slots=True, eq=False)
class Piece:
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
        """What was bought of the rows after those, when the piece failed; the others are NaN."""
        partial = getattr(self.error, "partial", None)
        rows, first = self.rows[self.finished :], self.first + self.finished
        if not isinstance(partial, EmbeddingResult) or not partial.ok.any():
            return None
        return _block(rows[: len(partial)], [partial], first)


def embed_piece(
    piece: Piece,
    engine: Engine,
    *,
    input_type: str | None,
    on_error: OnError,
    on_budget: OnBudget,
    on_held: Callable[[], None],
    on_ready: Callable[[], None],
) -> None:
    """Embed the rows of a piece, or as many of the first ones as can be; never raises.

    ``on_held`` is called as soon as no money is needed any more, ``on_ready`` when it takes a
    while until there is more than the piece has by then.
    """
    try:
        _Embedding(piece, engine, input_type, on_error, on_budget, on_held, on_ready).run()
    except Stopped as stopped:
        piece.error = closed(partial=getattr(stopped, "partial", None))
    except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
        name_rows(error, piece.rows, piece.first)
        piece.error = error


def closed(*, partial: EmbeddingResult | None = None) -> EmbeddingError:
    """For what was under way, or still asked for, when a stream was closed."""
    return EmbeddingError("the stream was closed before it ended", partial=partial)


@dataclass(slots=True)
class _Embedding:
    piece: Piece
    engine: Engine
    input_type: str | None
    on_error: OnError
    on_budget: OnBudget
    on_held: Callable[[], None]
    on_ready: Callable[[], None]

    def run(self) -> None:
        piece = self.piece
        end = len(piece.rows)
        problem: EmbeddingError | None = None
        while piece.finished < end:
            try:
                # Nothing that comes after a bad row is bought.
                result = self._as_many_as_fit(end, last=problem is None)
            except InputRejected as error:
                # Nothing was sent: what comes before the bad row is good.
                if error.position is None or error.billed != "no" or _has_any(error.partial):
                    raise
                problem, end = error, error.position - piece.first
                continue
            if result.stopped_at is None:
                piece.add(result)
            else:
                self._refused(result, result.stopped_at)
        if problem is not None:
            raise problem

    def _as_many_as_fit(self, end: int, *, last: bool) -> EmbeddingResult:
        piece, start = self.piece, self.piece.finished
        return embed_now(
            replace(self.engine, observe=self._tell),
            [row.text for row in piece.rows[start:end]],
            input_type=self.input_type,
            on_error=self.on_error,
            on_budget="stop",
            first_row=piece.first + start,
            stop=piece.stop,
            on_held=self.on_held if last else None,
        )

    def _refused(self, result: EmbeddingResult, stopped: StoppedAt) -> None:
        """Give what was done until the budget ended; wait, or raise the refusal."""
        piece, error = self.piece, stopped.error
        done, rest = result.split(stopped.position - piece.first - piece.finished)
        if len(done):
            piece.add(done)
        error.partial = rest
        # What was paid for beyond must not be paid for again: it is salvaged.
        if self.on_budget != "wait" or _bought(rest):
            self._told_of(error)
            raise error
        if piece.results:
            self.on_ready()
        pause = Pause(piece.stop, self.engine.wait_for)
        await_budget(self.engine.account, error, self.engine.observe, pause)

    def _told_of(self, error: BudgetExceeded) -> None:
        self.engine.observe(self.engine.account.refused(error))

    def _tell(self, event: Event) -> None:
        # What is refused is tried again in a smaller piece; the last refusal is told.
        if isinstance(event, Refused):
            return
        if isinstance(event, Progress):
            spent = self.piece.spent
            event = replace(
                event,
                done=self.piece.finished + event.done,
                tokens=spent.tokens + event.tokens,
                picodollars=spent.picodollars + event.picodollars,
                exact=spent.exact and event.exact,
            )
        self.engine.observe(event)


def _has_any(result: EmbeddingResult | None) -> bool:
    return result is not None and bool(result.ok.any())


def _bought(result: EmbeddingResult | None) -> bool:
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
