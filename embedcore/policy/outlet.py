"""How does a stream of blocks end, and what is left of it then?"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from embedcore.errors import BudgetExceeded
from embedcore.policy.result import Spending, StoppedAt

if TYPE_CHECKING:
    from embedcore.policy.blocks import Block
    from embedcore.policy.pieces import Piece
    from embedcore.policy.pipeline import Pipeline
    from embedcore.policy.portions import OnBudget


class Outlet:
    """What has been taken out of a pipeline, and how the stream ends. Shared by both forms.

    - ``usage``: what the blocks given so far cost.
    - ``stopped_at``: set when the budget ended the stream (``on_budget="stop"``).
    - ``salvaged``: after an error or an early end, blocks with what was bought of the rows not
      given; NaN for the others.
    - ``ended``: nothing more comes, and nothing is left to tell.
    """

    def __init__(self, pipeline: Pipeline, on_budget: OnBudget) -> None:
        self._pipeline = pipeline
        self._stops = on_budget == "stop"
        self._failed: Piece | None = None
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
        piece = self._pipeline.wait()
        # Asked before what there is: it may be done a moment later, with more.
        done = piece.done
        block = piece.block()
        if block is not None:
            piece.has_given(block)
            self.usage += block.usage
        if done:
            self._failed = piece if piece.error is not None else None
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
        """Send nothing more; what was bought and not given is ``salvaged``. Harmless when
        repeated."""
        with self._lock:
            if self._is_closed:
                return
            pieces = self._pipeline.end()
            if self._failed is not None:
                pieces.insert(0, self._failed)
            rests = [rest for piece in pieces for rest in (piece.block(), piece.rest())]
            self.salvaged = [rest for rest in rests if rest is not None]
            self._is_closed = self.ended = True


class OutletView:
    """What both forms of a stream show of their outlet."""

    _outlet: Outlet

    @property
    def usage(self) -> Spending:
        return self._outlet.usage

    @property
    def stopped_at(self) -> StoppedAt | None:
        return self._outlet.stopped_at

    @property
    def salvaged(self) -> list[Block]:
        return self._outlet.salvaged
