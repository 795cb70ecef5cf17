"""Attempts of one request: rate limit, money, provider, checks, settlement."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn

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
from embedcore.policy.planning import PlannedRequest, chosen, priced
from embedcore.policy.reply_checks import Checked, billed_tokens, checked_vectors, identity
from embedcore.policy.retry import Retrier, named_wait
from embedcore.policy.threads import SentRequest, Stopped
from embedcore.provider.types import EmbedReply, EmbedRequest, RateLimits
from embedcore.storage.usage import NamedRates, note

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine
    from embedcore.policy.immediate.call import Call
    from embedcore.policy.ratelimit.share import Permit
    from embedcore.provider.types import Vectors
    from embedcore.storage.amounts import Amount, Attempt


def tell_sent(engine: Engine, request: PlannedRequest, attempt: int) -> None:
    info = engine.info
    engine.observe(
        RequestSent(
            provider=info.provider,
            model=info.model,
            inputs=len(request.indices),
            tokens=request.amount.tokens,
            attempt=attempt,
        )
    )


def tell_failed(
    engine: Engine,
    error: EmbeddingError,
    request: PlannedRequest,
    *,
    seconds: float,
    wait: float | None,
) -> None:
    """``wait``: seconds until it is tried again; None: it is not."""
    info = engine.info
    engine.observe(
        RequestFailed(
            provider=info.provider,
            model=info.model,
            inputs=len(request.indices),
            error=type(error).__name__,
            status=getattr(error, "status", None),
            request_id=getattr(error, "request_id", None),
            billed=error.billed,
            seconds=seconds,
            wait=wait,
            endpoint=info.endpoint,
        )
    )


def _note_limits(engine: Engine, limits: RateLimits) -> None:
    """Tell of the limits, and write them down for ``embedcore doctor``."""
    ledger = engine.account.ledger
    rates = NamedRates(
        endpoint=engine.info.endpoint,
        model=engine.info.model,
        requests_per_minute=limits.limit_requests,
        tokens_per_minute=limits.limit_tokens,
        named=time.time(),
    )
    engine.observe(
        LimitsLearned(
            endpoint=rates.endpoint,
            model=rates.model,
            requests_per_minute=rates.requests_per_minute,
            tokens_per_minute=rates.tokens_per_minute,
        )
    )
    # Whatever is wrong with the ledger, its next step will say it better.
    if ledger is not None:
        with contextlib.suppress(StorageError):
            note(ledger.database, rates)


logger = logging.getLogger("embedcore")


@dataclass(kw_only=True, slots=True)
class Attempts:
    """What the attempts of one request begin with, and leave behind.

    - ``after``: the error of a larger request with the same texts, or of a first attempt of this
      one. If that was charged, its money is gone, and the next attempt needs new money (``fresh``).
    - ``once``: an error that may lie in the texts is not tried again.
    - ``resumed``: ``after`` was the first attempt of this very request: it is waited for, as after
      any attempt.
    - ``asked``: the ways in which the provider has asked otherwise for these texts.
    - ``text``: sent instead of the call's own, and alone; its vector, of shape (1, d), is
      ``vectors``. ``is_cached``: it is kept in the cache, as it is paid for.
    - ``unconfirmed``: tokens charged for attempts that brought no vectors.
    - ``billed``: tokens that the provider says it billed for the one that brought them.
    - ``retries``: what was taken from the retry quota.
    """

    after: EmbeddingError | None = None
    once: bool = False
    resumed: bool = False
    fresh: bool = False
    asked: set[str] = field(default_factory=set)
    text: str | None = None
    is_cached: bool = False
    vectors: Vectors | None = None
    unconfirmed: int = 0
    billed: int | None = None
    retries: int = 0
    began: float = 0.0
    number: int = 0
    seconds: float = 0.0
    permit: Permit | None = None

    def __post_init__(self) -> None:
        self.fresh = self.fresh or (self.after is not None and self.after.billed != "no")
        self.number = int(self.resumed)


def blocked(error: EmbeddingError, refusal: BudgetExceeded) -> EmbeddingError:
    """The error after which the budget allowed nothing more; its message says so, once."""
    if not error.budget_blocked:
        error.budget_blocked = True
        error.message += f"; the budget allows no further attempt: {refusal}"
    return error


def send(call: Call, request: PlannedRequest, attempts: Attempts) -> list[int]:
    """Try until the request has its vectors, or raise its last error.

    Returns the texts for which null, nothing or NaN came instead of a vector.
    """
    engine = call.engine
    attempts.began = engine.monotonic()
    before = attempts.after if attempts.resumed else None
    retrier = Retrier(
        engine.retry,
        engine.quota,
        once=attempts.once,
        divisible=len(request.indices) > 1,
        failed=before if isinstance(before, TransientProviderError) else None,
        asked=attempts.asked,
        deadline=call.deadline,
        served=lambda: engine.learned.served,
        monotonic=engine.monotonic,
        jitter=engine.jitter,
    )
    try:
        return retrier.run(
            partial(_attempt, call, request, attempts),
            sleep=call.pause,
            before_sleep=partial(_goes_on, call, request, attempts),
        )
    except TransientProviderError as error:
        _ends(call, request, attempts, error, retrier.wait, is_reported=error is before)
        raise
    finally:
        attempts.retries = retrier.taken


def send_alone(call: Call, attempts: Attempts) -> Vectors:
    """The vector of ``attempts.text``, of shape (1, d). Raises the error of its last attempt."""
    missing = send(call, priced_alone(call, attempts.text or ""), attempts)
    if missing or attempts.vectors is None:
        raise InvalidResponse(
            f"{call.engine.label} returned null, nothing or NaN instead of a vector",
            billed="yes",
        )
    return attempts.vectors


def priced_alone(call: Call, text: str) -> PlannedRequest:
    """The request of ``send_alone``, with the most that it can cost."""
    engine = call.engine
    in_bytes = len(text.encode())
    tokens = in_bytes * engine.info.tokens_per_byte
    if engine.tokenizer.exact:
        (tokens,) = engine.tokenizer.count([text])
    tokens += engine.info.overhead_tokens_per_text
    scale = engine.learned.scale
    return PlannedRequest(
        indices=(0,),
        amount=priced(tokens, engine.info.price, scale),
        in_bytes=in_bytes,
        scale=scale,
    )


def _attempt(call: Call, request: PlannedRequest, attempts: Attempts) -> list[int]:
    """One attempt: rate limit, money, provider, checks, settlement."""
    engine = call.engine
    # What was under way when the client was closed may be billed: it is not sent again.
    engine.pool.check_open()
    tokens = engine.learned.expected_tokens(request)
    permit = attempts.permit = engine.gate.admit(
        tokens,
        call.pause,
        meanwhile=call.budget.renew,
        texts=len(request.indices),
        rates=engine.rates,
        share=engine.share,
    )
    try:
        call.pause(0.0)
        request = request.at_scale(engine.learned.scale, engine.info.price)
        sent = SentRequest(
            attempt=_take_money(call, request, attempts),
            texts=_texts(call, request, attempts),
            started=engine.monotonic(),
            number=engine.learned.leaves(),
        )
        if not call.in_flight.start(sent):
            call.budget.not_sent(sent.attempt)
            raise Stopped
        attempts.number += 1
        try:
            tell_sent(engine, request, attempts.number)
            reply, checked = _embed(call, sent, request, attempts)
            return _arrived(call, sent, request, attempts, reply, checked)
        finally:
            call.in_flight.finish(sent)
    finally:
        # Nothing happens if its end is known already.
        engine.gate.lost(permit)


def _take_money(call: Call, request: PlannedRequest, attempts: Attempts) -> Attempt | None:
    try:
        return call.budget.send(request.amount, inputs=len(request.indices), fresh=attempts.fresh)
    except BudgetExceeded as refusal:
        if attempts.after is None:
            raise
        # What went wrong is the provider's error; that it cannot be retried is the budget's.
        raise blocked(attempts.after, refusal) from refusal


def _embed(
    call: Call, sent: SentRequest, request: PlannedRequest, attempts: Attempts
) -> tuple[EmbedReply, Checked]:
    """Send it. A failure is accounted for, and its typed error raised."""
    engine, failure = call.engine, None
    # A provider wrapped by hand may keep its replies: those must stay as they are.
    lends_room = engine.lends_room and attempts.text is None
    try:
        reply = engine.embedder.embed(
            EmbedRequest(
                texts=list(sent.texts),
                input_type=call.input_type,
                timeout=timeout_of(call),
                into=call.buffer.room_for(request.indices) if lends_room else None,
            )
        )
        tell_rates(call, reply, attempts)
        checked = checked_reply(call, reply, len(request.indices))
    except BaseException as error:  # noqa: BLE001 - accounted for, and raised again
        failure = error
    # Not inside the handler, where the raw error, a key perhaps in it, would become a context.
    if failure is not None:
        failed(call, failure, sent, request, attempts)
    return reply, checked


def _texts(call: Call, request: PlannedRequest, attempts: Attempts) -> tuple[str, ...]:
    if attempts.text is not None:
        return (attempts.text,)
    return tuple(chosen(call.prepared.texts, request.indices))


def timeout_of(call: Call) -> float:
    timeout = call.engine.retry.request_timeout
    if call.deadline is None:
        return timeout
    return max(min(timeout, call.deadline - call.engine.monotonic()), 0.001)


def tell_rates(call: Call, reply: object, attempts: Attempts) -> None:
    engine = call.engine
    if isinstance(reply, EmbedReply) and attempts.permit is not None:
        limits = reply.limits if isinstance(reply.limits, RateLimits) else None
        engine.gate.answered(attempts.permit, limits, tokens=billed_tokens(reply))
        if limits is not None and engine.learned.is_news(limits):
            _note_limits(engine, limits)


def checked_reply(call: Call, reply: EmbedReply, texts: int) -> Checked:
    """What of the reply can be believed; raises ``InvalidResponse``."""
    engine = call.engine
    checked = checked_vectors(reply, texts, engine.info, width=engine.learned.width)
    width = checked.vectors.shape[1]
    if not engine.learned.agrees(width):
        raise ReplyMismatch(
            f"{engine.label} returned vectors of different widths at the same time: "
            f"{engine.learned.width} and {width}. Nothing of the reply was kept",
            request_id=identity(reply),
        )
    return _without_zeros(engine, checked, reply) if checked.zeros else checked


def _without_zeros(engine: Engine, checked: Checked, reply: EmbedReply) -> Checked:
    what = f"{engine.label} returned a vector of zeros for {len(checked.zeros)} texts"
    if not engine.reject_zero:
        logger.warning('%s; on_zero = "reject" refuses them', what)
        return checked
    missing = sorted({*checked.missing, *checked.zeros})
    if len(missing) == len(checked.vectors):
        raise InvalidResponse(f"{what} (on_zero = reject)", request_id=identity(reply))
    return replace(checked, missing=missing)


def _arrived(
    call: Call,
    sent: SentRequest,
    request: PlannedRequest,
    attempts: Attempts,
    reply: EmbedReply,
    checked: Checked,
) -> list[int]:
    """Keep the vectors, and settle what they cost. Returns the texts without one."""
    engine, tokens, request_id = call.engine, billed_tokens(reply), identity(reply)
    attempts.billed = tokens
    indices, vectors = with_vectors(request, checked)
    if not call.in_flight.answered(sent):
        call.budget.correct(sent.attempt, tokens)
        _keep(call, attempts, indices, vectors, reply.model, late=True)
        raise Stopped
    engine.learned.was_served(sent.number)
    # Kept before it is settled: what can fail there must not lose the vectors.
    try:
        _keep(call, attempts, indices, vectors, reply.model, late=False)
    finally:
        counted = None if tokens is not None else engine.counted(sent.texts)
        actual = call.budget.settle(
            sent.attempt,
            tokens,
            request_id,
            counted=counted,
            complete=not checked.missing,
        )
    return came(call, sent, request, checked, actual, tokens=tokens, counted=counted, of=request_id)


def with_vectors(request: PlannedRequest, checked: Checked) -> tuple[Sequence[int], Vectors]:
    """The texts of the request that have a vector, and those."""
    indices, vectors = request.indices, checked.vectors
    if not checked.missing:
        return indices, vectors
    places = sorted(set(range(len(indices))).difference(checked.missing))
    return tuple(indices[place] for place in places), vectors[places]


def came(
    call: Call,
    sent: SentRequest,
    request: PlannedRequest,
    checked: Checked,
    actual: Amount,
    *,
    tokens: int | None,
    counted: int | None,
    of: str | None,
) -> list[int]:
    """What was kept and settled teaches, and is told. Returns the texts without a vector.

    ``tokens``: as the provider says; ``counted``: by an exact tokenizer, where it does not say.
    ``of``: the request's name at the provider.
    """
    engine = call.engine
    _learn(engine, sent, request, actual)
    if tokens is not None:
        engine.compare(sent.texts, tokens)
    engine.observe(
        RequestFinished(
            provider=engine.info.provider,
            model=engine.info.model,
            inputs=len(request.indices),
            tokens=actual.tokens,
            reported=tokens is not None,
            request_id=of,
            seconds=engine.monotonic() - sent.started,
            endpoint=engine.info.endpoint,
            exact=tokens is not None or counted is not None,
        )
    )
    return [request.indices[place] for place in checked.missing]


def _keep(
    call: Call,
    attempts: Attempts,
    indices: Sequence[int],
    vectors: Vectors,
    model: str | None,
    *,
    late: bool,
) -> None:
    if attempts.text is None:
        call.keep(indices, vectors, model, late=late)
        return
    if attempts.is_cached and call.reuse is not None and len(vectors):
        call.reuse.store(attempts.text, vectors, model)
    attempts.vectors = vectors.copy()


def _learn(engine: Engine, sent: SentRequest, request: PlannedRequest, actual: Amount) -> None:
    """What this bill tells of those to come."""
    learned, bound = engine.learned, request.amount.tokens
    if actual.tokens > bound > 0:
        if not learned.always_count and (engine.counted(sent.texts) or 0) >= actual.tokens:
            # The count is right, and only the bound by bytes is not.
            learned.always_count = True
        else:
            learned.billed(request.scale * actual.tokens / bound)
    learned.cost(request, actual.tokens)


def failed(
    call: Call,
    error: BaseException,
    sent: SentRequest,
    request: PlannedRequest,
    attempts: Attempts,
) -> NoReturn:
    """Account for a failed attempt and raise its typed error."""
    engine = call.engine
    passes = isinstance(error, (KeyboardInterrupt, GeneratorExit))
    typed = ProviderError(type(error).__name__) if passes else engine.typed(error)
    note = f"{type(typed).__name__} {getattr(typed, 'status', None) or ''}".strip()
    if isinstance(typed, RateLimited) and attempts.permit is not None:
        # All requests wait from now on, before anything else is done about it.
        limits = typed.limits if isinstance(typed.limits, RateLimits) else None
        engine.gate.refused(attempts.permit, named_wait(typed), limits)
    in_time = call.in_flight.answered(sent)
    is_charged = in_time and sent.attempt is not None and typed.billed != "no"
    counted = engine.most_billed(sent.texts) if is_charged else None
    charged = call.budget.account_for(
        sent.attempt, typed, note=note, counted=counted, late=not in_time
    )
    if not in_time:
        raise Stopped from error
    if passes:
        raise error
    # Only what the last attempt took is gone: what it gave back is in the grant again.
    attempts.fresh = charged
    attempts.unconfirmed += request.amount.tokens if charged else 0
    attempts.seconds = engine.monotonic() - sent.started
    # Whatever it is followed by, this is what went wrong first.
    attempts.after = typed
    if not isinstance(typed, TransientProviderError):
        tell_failed(engine, typed, request, seconds=attempts.seconds, wait=None)
    raise typed


def _goes_on(
    call: Call,
    request: PlannedRequest,
    attempts: Attempts,
    error: TransientProviderError,
    wait: float,
) -> None:
    """Another attempt follows after ``wait`` seconds."""
    engine = call.engine
    tell_failed(engine, error, request, seconds=attempts.seconds, wait=wait)
    if isinstance(error, RateLimited):
        seconds = max(wait, engine.gate.closed_for)
        engine.observe(Throttled(endpoint=engine.info.endpoint, seconds=seconds))


def _ends(
    call: Call,
    request: PlannedRequest,
    attempts: Attempts,
    error: TransientProviderError,
    wait: float | None,
    *,
    is_reported: bool,
) -> None:
    """No other attempt of this request follows; its parts may, after ``wait`` seconds."""
    if not is_reported and wait is not None:
        _goes_on(call, request, attempts, error, wait)
    elif not is_reported:
        tell_failed(call.engine, error, request, seconds=attempts.seconds, wait=None)
        if not (error.budget_blocked or attempts.once):
            error.message += _why_no_more(call, attempts, error)
    if wait is not None:
        call.pause(wait)


def _why_no_more(call: Call, attempts: Attempts, error: TransientProviderError) -> str:
    """What was tried, and which setting decided that it was the last time."""
    engine = call.engine
    longest = engine.retry.longest_named_wait
    if error.retry_after is not None and error.retry_after > longest:
        return (
            f"; it asks to wait {error.retry_after:,.0f} s, more than longest_named_wait = "
            f"{longest:,.0f} s: try again then"
        )
    tries = "1 attempt" if attempts.number == 1 else f"{attempts.number} attempts"
    seconds = engine.monotonic() - attempts.began
    return f" (given up after {tries} in {seconds:.1f} s: try again later, or see [retry])"
