"""The state of one immediate call, shared by the threads that work on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedcore.errors import BudgetExceeded, EmbeddingError, TransientProviderError
from embedcore.events import Event, Refused
from embedcore.policy.budget import CallBudget, CallProgress
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.immediate.reuse import Reuse
from embedcore.policy.immediate.workers import Workers
from embedcore.policy.result import EmbeddingResult, OnArrival, StoppedAt
from embedcore.policy.result_buffer import ResultBuffer
from embedcore.policy.retry import is_about_no_text, may_be_kept
from embedcore.policy.texts import Prepared, resolve_input_type
from embedcore.policy.threads import InFlight, Pause

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors


OnBudget: TypeAlias = Literal["raise", "stop", "wait"]

logger = logging.getLogger("embedcore")


def without_refusals(engine: Engine) -> Engine:
    """The engine for a call that tries again with less: only the last refusal is reported."""
    observe = engine.observe

    def tell(event: Event) -> None:
        if not isinstance(event, Refused):
            observe(event)

    return replace(engine, observe=tell)


class Call:
    """What the steps of a call work on. Texts are named by their indices, in order.

    - ``observe``: the client's; ``engine.observe`` hears of no refusal that is not the last.
    - ``keeps``: a text that fails is a failed row, and does not end the call.
    - ``input_type``: as it is sent to the provider.
    - ``deadline``: by the engine's clock, or None.
    - ``buffer``: the vectors so far; ``reuse``: None without a cache.
    - ``refusal``: why the budget allows nothing more; ``is_over``: a request under way
      needed it, and nothing is waited for. ``stopped_at``: where that ended the call.
    """

    def __init__(
        self,
        engine: Engine,
        texts: Iterable[object],
        input_type: str | None,
        *,
        keep: bool,
        on_budget: OnBudget,
        stop: Stop | None,
        on_arrival: OnArrival | None,
        first_row: int = 0,
        began: float | None = None,
    ) -> None:
        """``began``: when its time began, by the engine's clock; None: now."""
        self.observe = engine.observe
        self.engine = engine = engine if on_budget == "raise" else without_refusals(engine)
        self.keeps = keep
        self.on_budget = on_budget
        self.refusal: BudgetExceeded | None = None
        self.is_over = False
        self.stopped_at: StoppedAt | None = None
        self.input_type = resolve_input_type(engine, input_type)
        self.prepared = Prepared(engine, texts, keep=keep, first_row=first_row)
        self.pause = Pause(stop, engine.wait_for)
        seconds = engine.retry.deadline
        began = engine.monotonic() if began is None else began
        self.deadline = None if seconds is None else began + seconds
        self.budget = CallBudget(
            engine.account,
            engine.info,
            lane="query" if input_type == "query" else "all",
            observe=engine.observe,
            pause=self.wait_with_claims,
            monotonic=engine.monotonic,
        )
        self.progress = CallProgress(self.budget, len(self.prepared.texts), engine.observe)
        self.buffer = ResultBuffer(
            self.prepared.taken.rows,
            len(self.prepared.texts),
            engine.info.dimensions or engine.learned.width,
            prepared=self.prepared,
            on_arrival=on_arrival,
        )
        self.reuse = (
            None
            if engine.cache is None
            else Reuse(
                engine, engine.cache, self.prepared, self.input_type, self.buffer, self.progress
            )
        )
        self.in_flight = InFlight()
        self.workers = Workers(engine, self.budget, self.in_flight, self.pause, self.deadline)

    @property
    def is_late(self) -> bool:
        """Whether the call's deadline has passed."""
        return self.deadline is not None and self.engine.monotonic() >= self.deadline

    def keep(
        self, indices: Sequence[int], vectors: Vectors, model: str | None, *, late: bool
    ) -> None:
        """These were paid for, and came under this model's name. ``late``: after the call had
        given them up, so that only others have them."""
        # The cache first: what can fail after it must not lose what was paid for.
        if self.reuse is not None:
            self.reuse.billed(indices, vectors, model)
        if not late:
            self.buffer.put(indices, vectors)

    def shortened(self, index: int, kept: str, vectors: Vectors, *, cached: bool) -> None:
        """The text's vector is that of its beginning: more was refused."""
        self.prepared.was_shortened(index, kept)
        # Other calls that wait for the whole text must hear of the cut themselves.
        self.release([index])
        self.buffer.put([index], vectors, reused=cached)

    def release(self, indices: Sequence[int]) -> None:
        """This call will not pay for these for now: others may."""
        if self.reuse is not None:
            self.reuse.release(indices)

    def fail(self, indices: Sequence[int], error: EmbeddingError, *, blame: bool = True) -> None:
        """These texts have no vector: note it, or end the call.

        ``blame``: if it is one text, it is the one at fault.
        """
        kept = may_be_kept(error)
        if kept:
            self._locate(indices, error, blame=blame)
        self.buffer.fail(indices, error)
        self.release(indices)
        blocked = error.budget_blocked and self.on_budget != "stop"
        if not self.keeps or not kept or blocked:
            raise error

    def _locate(self, indices: Sequence[int], error: EmbeddingError, *, blame: bool) -> None:
        """Name the caller's rows in the message, once."""
        if error.message.startswith(("row ", "rows ")):
            return
        taken = self.prepared.taken
        first = taken.first_row(indices[0])
        of_all = is_about_no_text(error)
        error.position = first if blame and not of_all and len(indices) == 1 else None
        if of_all and len(indices) == len(self.prepared.texts):
            return
        if len(indices) == 1:
            error.message = f"row {first}: {error.message}"
        elif len(indices) < len(self.prepared.texts):
            error.message = f"rows {first} to {taken.first_row(indices[-1])}: {error.message}"

    def wait_with_claims(self, seconds: float) -> None:
        """Pause while texts of this call are claimed and nothing is sent."""
        self.pause(seconds)
        self.engine.renew_claims()

    def wait_for_others(self, seconds: float) -> None:
        """Pause while another call pays for texts of this one. Raises when that takes too long."""
        self.pause(seconds)
        if self.is_late:
            raise TransientProviderError(
                f"{self.engine.label}: another call of this program, or of another with the same "
                "cache, is still sending some of these texts, and the deadline of "
                f"{self.engine.retry.deadline} s has passed",
                billed="no",
            )

    def result(self) -> EmbeddingResult:
        return self.buffer.result(
            self.prepared.taken,
            self.prepared.cuts(),
            spending=self.budget.spending,
            model=self.engine.label,
            fingerprint=self.engine.fingerprint,
            stopped_at=self.stopped_at,
        )

    def stop_at(self, refusal: BudgetExceeded) -> None:
        """The budget has ended: texts without an outcome are not done, for that reason."""
        left = self.buffer.left()
        if not left:
            return
        self.buffer.fail(left, refusal)
        row = min(map(self.prepared.taken.first_row, left))
        self.stopped_at = StoppedAt(key=row, position=row, error=refusal)
        self.observe(self.engine.account.refused(refusal))

    def attach_partial(self, error: BaseException) -> None:
        """Whatever ends the call, what was paid for until then goes with it."""
        holder: Any = error
        holder.partial = None
        # Where there is no memory for it, that must not hide what ended the call.
        with suppress(MemoryError):
            holder.partial = self.result()

    def close(self) -> None:
        """Whatever happened: give back what is left of the money and of the claims."""
        if self.reuse is not None:
            self.reuse.close()
        self.budget.close()
