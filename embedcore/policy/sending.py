"""One call's requests on their way: attempts, waits, splits, and what each outcome costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from embedcore.errors import (
    BudgetExceeded,
    EmbeddingError,
    InvalidResponse,
    ProviderError,
    RateLimited,
    StorageError,
    TransientProviderError,
)
from embedcore.policy.flights import Flight, Flights, Pause, Stopped
from embedcore.policy.integrity import billed_tokens, checked_vectors, identity
from embedcore.policy.planning import PlannedRequest
from embedcore.policy.retry import Retrier, named_wait
from embedcore.policy.telling import Teller
from embedcore.provider.types import EmbedReply, EmbedRequest, RateLimits

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine
    from embedcore.policy.purse import Purse
    from embedcore.policy.rates import Pass
    from embedcore.provider.types import Vectors
    from embedcore.storage.amounts import Amount, Attempt

logger = logging.getLogger("embedcore")

Keep: TypeAlias = "Callable[[Sequence[int], Vectors, str | None, bool], None]"


class Sender:
    """Sends the requests of one call, in any number of threads.

    ``keep(indices, vectors, model, late)`` gets what was bought and under which model's name it
    came; ``late``: after the call had given it up.
    """

    def __init__(
        self,
        engine: Engine,
        purse: Purse,
        texts: Sequence[str],
        input_type: str | None,
        *,
        keep: Keep,
        room_for: Callable[[Sequence[int]], Vectors | None],
        pause: Pause,
        deadline: float | None,
    ) -> None:
        self.engine = engine
        self.purse = purse
        self.flights = Flights()
        self._teller = Teller(engine)
        self._texts = texts
        self._input_type = input_type
        self._pause = pause
        self._deadline = deadline
        self._keep = keep
        self._room_for = room_for

    def send(self, request: PlannedRequest, *, after: EmbeddingError | None = None) -> None:
        """Attempts of one request until it has its vectors, or raise its last error.

        ``after``: the error of a larger request with the same texts. If that was charged, its
        money is gone, and this part of it needs new money.
        """
        state = _Tries(began=self.engine.monotonic())
        if after is not None and after.billed != "no":
            state.fresh, state.last = True, after

        def once() -> None:
            self._attempt(request, state)

        def on_failure(error: TransientProviderError, wait: float | None) -> None:
            self._after_failure(error, wait, request, state)

        Retrier(
            self.engine.retry,
            self.engine.quota,
            deadline=self._deadline,
            served=lambda: self.engine.learned.served,
            monotonic=self.engine.monotonic,
            jitter=self.engine.jitter,
        ).run(once, pause=self._pause, on_failure=on_failure)

    def _attempt(self, request: PlannedRequest, state: _Tries) -> None:
        engine = self.engine
        # What was under way when the client was closed may be billed: it is not sent again.
        engine.pool.check_open()
        tokens = engine.learned.expected_tokens(request)
        state.leave = engine.gate.admit(
            tokens, self._pause, meanwhile=self.purse.renew, rates=engine.rates
        )
        try:
            self._pause(0.0)
            request = request.at_scale(engine.learned.scale, engine.info.price)
            self._depart(request, self._take_money(request, state), state)
        finally:
            # Nothing happens if its end was told already.
            engine.gate.lost(state.leave)

    def _depart(self, request: PlannedRequest, attempt: Attempt | None, state: _Tries) -> None:
        flight = Flight(attempt=attempt, indices=request.indices, started=self.engine.monotonic())
        if not self.flights.start(flight):
            self.purse.not_sent(attempt)
            raise Stopped
        state.number += 1
        try:
            self._teller.sent(request, state.number)
            self._fly(flight, request, state)
        finally:
            self.flights.finish(flight)

    def _fly(self, flight: Flight, request: PlannedRequest, state: _Tries) -> None:
        engine, failure = self.engine, None
        try:
            reply = engine.embedder.embed(
                EmbedRequest(
                    texts=[self._texts[index] for index in request.indices],
                    input_type=self._input_type,
                    timeout=self._timeout(),
                    into=self._room_for(request.indices),
                )
            )
            self._came_back(reply, state)
            vectors = self._checked(reply, len(request))
        except BaseException as error:  # noqa: BLE001 - accounted for, and raised again
            failure = error
        # Not inside the handler, where the raw error, a key perhaps in it, would become a context.
        if failure is not None:
            self._failed(failure, flight, request, state)
        self._arrived(reply, vectors, flight, request)

    def _came_back(self, reply: object, state: _Tries) -> None:
        if isinstance(reply, EmbedReply) and state.leave is not None:
            limits = reply.limits if isinstance(reply.limits, RateLimits) else None
            self.engine.gate.answered(state.leave, limits, tokens=billed_tokens(reply))
            if limits is not None and self.engine.learned.is_news(limits):
                self._teller.learned(limits)

    def _too_fast(self, error: RateLimited, state: _Tries) -> None:
        """Close the gate for everybody, before anything else is done about it."""
        if state.leave is not None:
            limits = error.limits if isinstance(error.limits, RateLimits) else None
            self.engine.gate.refused(state.leave, named_wait(error), limits)

    def _take_money(self, request: PlannedRequest, state: _Tries) -> Attempt | None:
        try:
            return self.purse.send(request.amount, inputs=len(request), fresh=state.fresh)
        except BudgetExceeded as refusal:
            if state.last is None:
                raise
            # What went wrong is the provider's error; that it cannot be retried is the budget's.
            state.last.budget_blocked = True
            raise state.last from refusal

    def _timeout(self) -> float:
        timeout = self.engine.retry.request_timeout
        if self._deadline is None:
            return timeout
        return max(min(timeout, self._deadline - self.engine.monotonic()), 0.001)

    def _checked(self, reply: EmbedReply, texts: int) -> Vectors:
        """The reply's vectors, if it can be believed; raises ``InvalidResponse``."""
        engine = self.engine
        width = engine.learned.width
        vectors, zero = checked_vectors(reply, texts, engine.info, width=width)
        if not engine.learned.agrees(vectors.shape[1]):
            raise InvalidResponse(
                f"{engine.label} returned vectors of different widths at the same time: "
                f"{engine.learned.width} and {vectors.shape[1]}. Nothing of the reply was kept",
                request_id=identity(reply),
            )
        if zero:
            self._all_zero(len(zero), reply)
        return vectors

    def _all_zero(self, vectors: int, reply: EmbedReply) -> None:
        what = f"{self.engine.label} returned a vector of zeros for {vectors} texts"
        if self.engine.reject_zero:
            raise InvalidResponse(f"{what} (on_zero = reject)", request_id=identity(reply))
        logger.warning('%s; on_zero = "reject" refuses them', what)

    def _arrived(
        self, reply: EmbedReply, vectors: Vectors, flight: Flight, request: PlannedRequest
    ) -> None:
        tokens = billed_tokens(reply)
        if not self.flights.land(flight):
            self.purse.correct(flight.attempt, tokens)
            self._keep(request.indices, vectors, reply.model, True)
            raise Stopped
        engine = self.engine
        engine.learned.was_served()
        # Kept before it is paid for in the books: what can fail there must not lose the vectors.
        try:
            self._keep(request.indices, vectors, reply.model, False)
        finally:
            actual = self.purse.settle(flight.attempt, tokens, identity(reply))
        self._learn(actual, request)
        engine.learned.cost(request, actual.tokens)
        self._teller.finished(
            request,
            tokens=actual.tokens,
            reported=tokens is not None,
            request_id=identity(reply),
            seconds=engine.monotonic() - flight.started,
        )

    def _learn(self, actual: Amount, request: PlannedRequest) -> None:
        if not actual.tokens > request.amount.tokens > 0:
            return
        engine = self.engine
        if engine.tokenizer.exact and not engine.learned.always_count:
            counts = engine.tokenizer.count([self._texts[index] for index in request.indices])
            overhead = engine.info.overhead_tokens_per_text * len(request)
            if sum(counts) + overhead >= actual.tokens:
                # The count is right, and only the bound by bytes is not.
                engine.learned.always_count = True
                return
        engine.learned.billed(request.scale * actual.tokens / request.amount.tokens)

    def _failed(
        self, error: BaseException, flight: Flight, request: PlannedRequest, state: _Tries
    ) -> NoReturn:
        """Account for a failed attempt and raise its typed error."""
        passes = isinstance(error, (KeyboardInterrupt, GeneratorExit))
        typed = ProviderError(type(error).__name__) if passes else self.engine.typed(error)
        note = f"{type(typed).__name__} {getattr(typed, 'status', None) or ''}".strip()
        if isinstance(typed, RateLimited):
            self._too_fast(typed, state)
        landed = self.flights.land(flight)
        try:
            charged = self.purse.account_for(flight.attempt, typed, note=note, late=not landed)
        except StorageError as broken:
            # The books could not be kept: that ends the call, and the attempt will be charged.
            raise (error if passes else broken) from typed
        if not landed:
            raise Stopped from error
        if passes:
            raise error
        # Only what the last attempt took is gone: what it gave back is in the grant again.
        state.fresh = charged
        state.seconds = self.engine.monotonic() - flight.started
        if not isinstance(typed, TransientProviderError):
            self._teller.failed(typed, request, seconds=state.seconds, wait=None)
        raise typed

    def _after_failure(
        self,
        error: TransientProviderError,
        wait: float | None,
        request: PlannedRequest,
        state: _Tries,
    ) -> None:
        state.last = error
        self._teller.failed(error, request, seconds=state.seconds, wait=wait)
        if wait is None and not error.budget_blocked:
            error.message += self._why_no_more(error, state)
        if wait is not None and isinstance(error, RateLimited):
            self._teller.throttled(max(wait, self.engine.gate.closed_for))

    def _why_no_more(self, error: TransientProviderError, state: _Tries) -> str:
        """What was tried, and which setting decided that it was the last time."""
        longest = self.engine.retry.longest_named_wait
        if error.retry_after is not None and error.retry_after > longest:
            return (
                f"; it asks to wait {error.retry_after:,.0f} s, more than longest_named_wait = "
                f"{longest:,.0f} s: try again then"
            )
        tries = "1 attempt" if state.number == 1 else f"{state.number} attempts"
        seconds = self.engine.monotonic() - state.began
        return f" (given up after {tries} in {seconds:.1f} s: try again later, or see [retry])"


@dataclass(kw_only=True, slots=True)
class _Tries:
    """What the attempts of one request leave behind for the next."""

    began: float
    fresh: bool = False
    number: int = 0
    seconds: float = 0.0
    last: EmbeddingError | None = None
    leave: Pass | None = None
