"""One block of a stream on its way: as much of it as the texts and the budget allow, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from embedcore.errors import BudgetExceeded, EmbeddingError, InputRejected
from embedcore.events import BudgetWait, Event, Progress, Refused
from embedcore.policy.blocks import Block, Row
from embedcore.policy.engine import Stop
from embedcore.policy.flights import Stopped
from embedcore.policy.immediate import embed_now
from embedcore.policy.result import EmbeddingResult, Spending

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine
    from embedcore.provider.types import Vectors

OnError: TypeAlias = Literal["raise", "keep"]
OnBudget: TypeAlias = Literal["raise", "stop", "wait"]

# What others give back, or a limit that was raised, is noticed after so long.
_LOOK_SECONDS: Final = 30.0


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
        size = end = len(piece.rows)
        problem: EmbeddingError | None = None
        while piece.finished < end:
            size = min(size, end - piece.finished)
            try:
                # Nothing that comes after a bad row is bought.
                self._some(size, last=problem is None and piece.finished + size == end)
            except BudgetExceeded as error:
                if _bought(error):
                    # Refused on the way, for what it costs to try again: it is not begun anew.
                    raise
                if size > 1:
                    # As much as fits: halve until it does.
                    size //= 2
                    continue
                self._wait_or_raise(error)
                size = end
            except InputRejected as error:
                # Nothing was sent: what comes before the bad row is good.
                if error.position is None or error.billed != "no" or _bought(error):
                    raise
                problem, end = error, error.position - piece.first
        if problem is not None:
            raise problem

    def _some(self, size: int, *, last: bool) -> None:
        piece, start = self.piece, self.piece.finished
        result = embed_now(
            replace(self.engine, observe=self._tell),
            [row.text for row in piece.rows[start : start + size]],
            input_type=self.input_type,
            on_error=self.on_error,
            first_row=piece.first + start,
            stop=piece.stop,
            on_held=self.on_held if last else None,
        )
        piece.add(result)

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
            )
        self.engine.observe(event)

    def _wait_or_raise(self, error: BudgetExceeded) -> None:
        scope = self.engine.account.scope
        if self.on_budget != "wait" or error.never_fits or error.resets_at is None:
            self.engine.observe(Refused(scope=scope, message=str(error)))
            raise error
        seconds = (error.resets_at - datetime.now(UTC)).total_seconds()
        self.engine.observe(BudgetWait(scope=scope, until=error.resets_at, message=error.message))
        if self.piece.results:
            self.on_ready()
        longest = min(max(seconds, 0.0) + 0.05, _LOOK_SECONDS)
        if self.engine.wait_for(self.piece.stop, longest):
            raise Stopped


def _bought(error: EmbeddingError) -> bool:
    return error.partial is not None and bool(error.partial.ok.any())


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
    return Block(
        keys=[row.key for row in rows],
        rows=[row.item for row in rows],
        first=first,
        vectors=results[0].vectors if whole else _joined([one.vectors for one in results]),
        ok=np.concatenate([one.ok for one in results]),
        reused=np.concatenate([one.reused for one in results]),
        usage=sum((one.usage for one in results), Spending()),
        tokens_cut={at + row: cut for at, one in parts for row, cut in one.tokens_cut.items()},
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
