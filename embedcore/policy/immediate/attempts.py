"""Attempts of one request: rate limit, money, provider, checks, settlement."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from embedcore.errors import (
    BudgetExceeded,
    EmbeddingError,
    InvalidResponse,
    ProviderError,
    RateLimited,
    ReplyMismatch,
    StorageError,
    TransientProviderError,
)
from embedcore.events import LimitsLearned, RequestFailed, RequestFinished, RequestSent, Throttled
from embedcore.policy.planning import PlannedRequest
from embedcore.policy.reply_checks import Checked, billed_tokens, checked_vectors, identity
from embedcore.policy.retry import Retrier, named_wait
from embedcore.policy.threads import InFlight, Pause, SentRequest, Stopped
from embedcore.provider.types import EmbedReply, EmbedRequest, RateLimits
from embedcore.storage.usage import NamedRates, note

if TYPE_CHECKING:
    from embedcore.policy.budget import CallBudget
    from embedcore.policy.engine import Engine
    from embedcore.policy.ratelimit.pace import Permit
    from embedcore.provider.types import Vectors
    from embedcore.storage.amounts import Amount, Attempt


class RequestEvents:
    """Makes the events of an engine's model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def sent(self, request: PlannedRequest, attempt: int) -> None:
        info = self._engine.info
        self._engine.observe(
            RequestSent(
                provider=info.provider,
                model=info.model,
                inputs=len(request),
                tokens=request.amount.tokens,
                attempt=attempt,
            )
        )

    def finished(
        self,
        request: PlannedRequest,
        *,
        tokens: int,
        reported: bool,
        exact: bool,
        request_id: str | None,
        seconds: float,
    ) -> None:
        info = self._engine.info
        self._engine.observe(
            RequestFinished(
                provider=info.provider,
                model=info.model,
                inputs=len(request),
                tokens=tokens,
                reported=reported,
                request_id=request_id,
                seconds=seconds,
                endpoint=info.endpoint,
                exact=exact,
            )
        )

    def failed(
        self,
        error: EmbeddingError,
        request: PlannedRequest,
        *,
        seconds: float,
        wait: float | None,
    ) -> None:
        """``wait``: seconds until it is tried again; None: it is not."""
        info = self._engine.info
        self._engine.observe(
            RequestFailed(
                provider=info.provider,
                model=info.model,
                inputs=len(request),
                error=type(error).__name__,
                status=getattr(error, "status", None),
                request_id=getattr(error, "request_id", None),
                billed=error.billed,
                seconds=seconds,
                wait=wait,
                endpoint=info.endpoint,
            )
        )

    def throttled(self, seconds: float) -> None:
        self._engine.observe(Throttled(endpoint=self._engine.info.endpoint, seconds=seconds))

    def learned(self, limits: RateLimits) -> None:
        """The limits are also written down, for ``embedcore doctor``."""
        info, ledger = self._engine.info, self._engine.account.ledger
        requests, tokens = limits.limit_requests, limits.limit_tokens
        self._engine.observe(
            LimitsLearned(
                endpoint=info.endpoint,
                model=info.model,
                requests_per_minute=requests,
                tokens_per_minute=tokens,
            )
        )
        if ledger is None:
            return
        rates = NamedRates(
            endpoint=info.endpoint,
            model=info.model,
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            named=time.time(),
        )
        # Whatever is wrong with the books, the next step of money will say it better.
        with contextlib.suppress(StorageError):
            note(ledger.database, rates)


logger = logging.getLogger("embedcore")

Keep: TypeAlias = "Callable[[Sequence[int], Vectors, str | None, bool], None]"


@dataclass(kw_only=True, slots=True)
class Attempts:
    """What the attempts of one request begin with, and leave behind.

    - ``after``: the error of a larger request with the same texts, or of a first attempt of this
      one. If that was charged, its money is gone, and the next attempt needs new money (``fresh``).
    - ``once``: an error that may lie in the texts is not tried again.
    - ``resumed``: ``after`` was the first attempt of this very request: it is waited for, as after
      any attempt.
    - ``asked``: the ways in which the provider has asked otherwise for these texts.
    - ``uncertain``: tokens charged for attempts that brought no vectors.
    - ``billed``: tokens that the provider says it billed for the one that brought them.
    - ``retries``: what was taken from the retry quota.
    """

    after: EmbeddingError | None = None
    once: bool = False
    resumed: bool = False
    fresh: bool = False
    asked: set[str] = field(default_factory=set)
    uncertain: int = 0
    billed: int | None = None
    retries: int = 0
    began: float = 0.0
    number: int = 0
    seconds: float = 0.0
    leave: Permit | None = None

    def __post_init__(self) -> None:
        self.fresh = self.fresh or (self.after is not None and self.after.billed != "no")
        self.number = int(self.resumed)


def blocked(error: EmbeddingError, refusal: BudgetExceeded) -> EmbeddingError:
    """The error after which the budget allowed nothing more; its message says so, once."""
    if not error.budget_blocked:
        error.budget_blocked = True
        error.message += f"; the budget allows no further attempt: {refusal}"
    return error


class Sender:
    """Sends the requests of one call, in any number of threads.

    ``keep(indices, vectors, model, late)`` gets what was bought and under which model's name it
    came; ``late``: after the call had given it up.
    """

    def __init__(
        self,
        engine: Engine,
        budget: CallBudget,
        texts: Sequence[str],
        input_type: str | None,
        *,
        in_flight: InFlight,
        keep: Keep,
        room_for: Callable[[Sequence[int]], Vectors | None],
        pause: Pause,
        deadline: float | None,
    ) -> None:
        self.engine = engine
        self.budget = budget
        self._in_flight = in_flight
        self._events = RequestEvents(engine)
        self._texts = texts
        self._input_type = input_type
        self._pause = pause
        self._deadline = deadline
        self._keep = keep
        self._room_for = room_for

    def send(self, request: PlannedRequest, attempts: Attempts) -> list[int]:
        """Try until the request has its vectors, or raise its last error.

        Returns the texts for which null, nothing or NaN came instead of a vector.
        """
        attempts.began = self.engine.monotonic()

        def once() -> list[int]:
            return self._attempt(request, attempts)

        def on_failure(error: TransientProviderError, wait: float | None) -> None:
            self._after_failure(error, wait, request, attempts)

        after = attempts.after if attempts.resumed else None
        retrier = Retrier(
            self.engine.retry,
            self.engine.quota,
            once=attempts.once,
            divisible=len(request) > 1,
            asked=attempts.asked,
            deadline=self._deadline,
            served=lambda: self.engine.learned.served,
            monotonic=self.engine.monotonic,
            jitter=self.engine.jitter,
        )
        try:
            return retrier.run(
                once,
                pause=self._pause,
                on_failure=on_failure,
                failed=after if isinstance(after, TransientProviderError) else None,
            )
        finally:
            attempts.retries = retrier.taken

    @property
    def is_late(self) -> bool:
        """Whether the call's deadline has passed."""
        return self._deadline is not None and self.engine.monotonic() >= self._deadline

    def _attempt(self, request: PlannedRequest, state: Attempts) -> list[int]:
        engine = self.engine
        # What was under way when the client was closed may be billed: it is not sent again.
        engine.pool.check_open()
        tokens = engine.learned.expected_tokens(request)
        state.leave = engine.gate.admit(
            tokens, self._pause, meanwhile=self.budget.renew, rates=engine.rates
        )
        try:
            self._pause(0.0)
            request = request.at_scale(engine.learned.scale, engine.info.price)
            return self._depart(request, self._take_money(request, state), state)
        finally:
            # Nothing happens if its end was told already.
            engine.gate.lost(state.leave)

    def _depart(
        self, request: PlannedRequest, attempt: Attempt | None, state: Attempts
    ) -> list[int]:
        flight = SentRequest(
            attempt=attempt, indices=request.indices, started=self.engine.monotonic()
        )
        if not self._in_flight.start(flight):
            self.budget.not_sent(attempt)
            raise Stopped
        state.number += 1
        try:
            self._events.sent(request, state.number)
            return self._fly(flight, request, state)
        finally:
            self._in_flight.finish(flight)

    def _fly(self, flight: SentRequest, request: PlannedRequest, state: Attempts) -> list[int]:
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
            checked = self._checked(reply, len(request))
        except BaseException as error:  # noqa: BLE001 - accounted for, and raised again
            failure = error
        # Not inside the handler, where the raw error, a key perhaps in it, would become a context.
        if failure is not None:
            self._failed(failure, flight, request, state)
        state.billed = billed_tokens(reply)
        return self._arrived(reply, checked, flight, request)

    def _came_back(self, reply: object, state: Attempts) -> None:
        if isinstance(reply, EmbedReply) and state.leave is not None:
            limits = reply.limits if isinstance(reply.limits, RateLimits) else None
            self.engine.gate.answered(state.leave, limits, tokens=billed_tokens(reply))
            if limits is not None and self.engine.learned.is_news(limits):
                self._events.learned(limits)

    def _too_fast(self, error: RateLimited, state: Attempts) -> None:
        """Close the gate for everybody, before anything else is done about it."""
        if state.leave is not None:
            limits = error.limits if isinstance(error.limits, RateLimits) else None
            self.engine.gate.refused(state.leave, named_wait(error), limits)

    def _take_money(self, request: PlannedRequest, state: Attempts) -> Attempt | None:
        try:
            return self.budget.send(request.amount, inputs=len(request), fresh=state.fresh)
        except BudgetExceeded as refusal:
            if state.after is None:
                raise
            # What went wrong is the provider's error; that it cannot be retried is the budget's.
            raise blocked(state.after, refusal) from refusal

    def _timeout(self) -> float:
        timeout = self.engine.retry.request_timeout
        if self._deadline is None:
            return timeout
        return max(min(timeout, self._deadline - self.engine.monotonic()), 0.001)

    def _checked(self, reply: EmbedReply, texts: int) -> Checked:
        """What of the reply can be believed; raises ``InvalidResponse``."""
        engine = self.engine
        checked = checked_vectors(reply, texts, engine.info, width=engine.learned.width)
        width = checked.vectors.shape[1]
        if not engine.learned.agrees(width):
            raise ReplyMismatch(
                f"{engine.label} returned vectors of different widths at the same time: "
                f"{engine.learned.width} and {width}. Nothing of the reply was kept",
                request_id=identity(reply),
            )
        return self._without_zeros(checked, reply) if checked.zeros else checked

    def _without_zeros(self, checked: Checked, reply: EmbedReply) -> Checked:
        what = f"{self.engine.label} returned a vector of zeros for {len(checked.zeros)} texts"
        if not self.engine.reject_zero:
            logger.warning('%s; on_zero = "reject" refuses them', what)
            return checked
        missing = sorted({*checked.missing, *checked.zeros})
        if len(missing) == len(checked.vectors):
            raise InvalidResponse(f"{what} (on_zero = reject)", request_id=identity(reply))
        return replace(checked, missing=missing)

    def _arrived(
        self, reply: EmbedReply, checked: Checked, flight: SentRequest, request: PlannedRequest
    ) -> list[int]:
        tokens = billed_tokens(reply)
        indices, vectors = request.indices, checked.vectors
        if checked.missing:
            places = sorted(set(range(len(indices))).difference(checked.missing))
            indices, vectors = tuple(indices[place] for place in places), vectors[places]
        if not self._in_flight.land(flight):
            self.budget.correct(flight.attempt, tokens)
            self._keep(indices, vectors, reply.model, True)
            raise Stopped
        engine = self.engine
        engine.learned.was_served()
        # Kept before it is paid for in the books: what can fail there must not lose the vectors.
        try:
            self._keep(indices, vectors, reply.model, False)
        finally:
            counted = None if tokens is not None else self._counted(request)
            actual = self.budget.settle(
                flight.attempt,
                tokens,
                identity(reply),
                counted=counted,
                complete=not checked.missing,
            )
        self._learn(actual, request)
        engine.learned.cost(request, actual.tokens)
        self._events.finished(
            request,
            tokens=actual.tokens,
            reported=tokens is not None,
            exact=tokens is not None or counted is not None,
            request_id=identity(reply),
            seconds=engine.monotonic() - flight.started,
        )
        return [request.indices[place] for place in checked.missing]

    def _counted(self, request: PlannedRequest) -> int | None:
        """What the request cost by an exact tokenizer; None without one."""
        engine = self.engine
        if not engine.tokenizer.exact:
            return None
        try:
            counts = engine.tokenizer.count([self._texts[index] for index in request.indices])
        except EmbeddingError as error:
            # The vectors are worth more than knowing what they cost.
            logger.warning("%s", error)
            return None
        return sum(counts) + engine.info.overhead_tokens_per_text * len(request)

    def _learn(self, actual: Amount, request: PlannedRequest) -> None:
        if not actual.tokens > request.amount.tokens > 0:
            return
        engine = self.engine
        if not engine.learned.always_count and (self._counted(request) or 0) >= actual.tokens:
            # The count is right, and only the bound by bytes is not.
            engine.learned.always_count = True
            return
        engine.learned.billed(request.scale * actual.tokens / request.amount.tokens)

    def _failed(
        self, error: BaseException, flight: SentRequest, request: PlannedRequest, state: Attempts
    ) -> NoReturn:
        """Account for a failed attempt and raise its typed error."""
        passes = isinstance(error, (KeyboardInterrupt, GeneratorExit))
        typed = ProviderError(type(error).__name__) if passes else self.engine.typed(error)
        note = f"{type(typed).__name__} {getattr(typed, 'status', None) or ''}".strip()
        if isinstance(typed, RateLimited):
            self._too_fast(typed, state)
        landed = self._in_flight.land(flight)
        try:
            charged = self.budget.account_for(flight.attempt, typed, note=note, late=not landed)
        except StorageError as broken:
            # The books could not be kept: that ends the call, and the attempt will be charged.
            raise (error if passes else broken) from typed
        if not landed:
            raise Stopped from error
        if passes:
            raise error
        # Only what the last attempt took is gone: what it gave back is in the grant again.
        state.fresh = charged
        state.uncertain += request.amount.tokens if charged else 0
        state.seconds = self.engine.monotonic() - flight.started
        # Whatever it is followed by, this is what went wrong first.
        state.after = typed
        if not isinstance(typed, TransientProviderError):
            self._events.failed(typed, request, seconds=state.seconds, wait=None)
        raise typed

    def _after_failure(
        self,
        error: TransientProviderError,
        wait: float | None,
        request: PlannedRequest,
        state: Attempts,
    ) -> None:
        self._events.failed(error, request, seconds=state.seconds, wait=wait)
        if wait is None and not (error.budget_blocked or state.once):
            error.message += self._why_no_more(error, state)
        if wait is not None and isinstance(error, RateLimited):
            self._events.throttled(max(wait, self.engine.gate.closed_for))

    def _why_no_more(self, error: TransientProviderError, state: Attempts) -> str:
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
