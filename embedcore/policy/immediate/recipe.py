"""The recipe for an immediate call, from texts to rows of vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from embedcore.errors import BudgetExceeded, ConfigurationError, EmbeddingError
from embedcore.events import BudgetWait, Observer
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.immediate.call import Call, OnBudget
from embedcore.policy.immediate.search import Search
from embedcore.policy.planning import PlannedRequest
from embedcore.policy.result import EmbeddingResult, OnArrival

if TYPE_CHECKING:
    from embedcore.policy.budget import Account


# What others give back, or a limit that was raised, is noticed after so long.
_LOOK_SECONDS: Final = 30.0


def check_on_error(on_error: str) -> None:
    """Raises ``ConfigurationError`` for anything but the two that there are."""
    if on_error not in ("raise", "keep"):
        raise ConfigurationError(f'on_error = {on_error!r} must be "raise" or "keep"')


def check_on_budget(on_budget: str) -> None:
    """Raises ``ConfigurationError`` for anything but the three that there are."""
    if on_budget not in ("raise", "stop", "wait"):
        raise ConfigurationError(f'on_budget = {on_budget!r} must be "raise", "stop" or "wait"')


def embed_now(
    engine: Engine,
    texts: Iterable[object],
    *,
    input_type: str | None = None,
    on_error: Literal["raise", "keep"] = "raise",
    on_budget: OnBudget = "raise",
    check_budget: bool = True,
    stop: Stop | None = None,
    on_arrival: OnArrival | None = None,
    first_row: int = 0,
    began: float | None = None,
    on_held: Callable[[], None] | None = None,
    is_free: Callable[[], None] | None = None,
) -> EmbeddingResult:
    """Texts in, vectors out: intake and cuts, cache, plan, money, requests, result.

    Each request is sent, checked, kept and settled by ``attempts``; one that fails is divided by
    ``search`` until the texts at fault are alone.

    Raises ``BudgetExceeded`` before anything is sent if the call does not fit, unless ``on_budget``
    says to stop where it does not, or to wait; any later error carries in ``.partial`` what was
    paid for until then. ``on_arrival`` gets the vectors of each request as it finishes, in a thread
    of the pool; an error it raises ends the call. Messages name the first row by ``first_row``.
    ``began``: when the call's time began. ``on_held`` is called once no more money is needed, and
    ``is_free`` when all was sent that this call pays for, also if that happens more than once.
    """
    if not check_budget:
        engine = replace(engine, account=replace(engine.account, limits=()))
    call = Call(
        engine,
        texts,
        input_type,
        keep=on_error == "keep",
        on_budget=on_budget,
        stop=stop,
        on_arrival=on_arrival,
        first_row=first_row,
        began=began,
    )
    return finish(call, lambda: range(len(call.prepared.texts)), on_held=on_held, is_free=is_free)


def finish(
    call: Call,
    begin: Callable[[], Sequence[int]],
    *,
    after: EmbeddingError | None = None,
    on_held: Callable[[], None] | None = None,
    is_free: Callable[[], None] | None = None,
) -> EmbeddingResult:
    """Bring a call to its end, from the texts that ``begin`` gives on. As ``embed_now``.

    ``after``: why a request failed that had these texts, and those of others.
    """
    search = Search(call, after)
    try:
        wanted = begin()
        while wanted:
            for requests, are_last in _reserved(call, missing(call, wanted), whole=after is None):
                if are_last and on_held is not None:
                    on_held()
                _send_all(call, search, requests)
            on_held = None
            if is_free is not None:
                is_free()
            wanted = left_by_others(call)
        if call.refusal is not None:
            call.stop_at(call.refusal)
    except BaseException as error:
        call.attach_partial(error)
        raise
    finally:
        call.close()
    result = call.result()
    # Its parts know each other: let go of here, they free the texts at once, and not when the
    # garbage collector comes by.
    for part in (call.reuse, call):
        if part is not None:
            vars(part).clear()
    return result


def missing(call: Call, wanted: Sequence[int]) -> Sequence[int]:
    """Which of these texts must be paid for? They are claimed; the others are cached, or another
    call of this process is paying for them."""
    return wanted if call.reuse is None else call.reuse.missing(wanted)


def _reserved(
    call: Call, todo: Sequence[int], *, whole: bool
) -> Iterator[tuple[list[PlannedRequest], bool]]:
    """Requests with the money reserved for them, and whether they are the last ones.

    All at once if the budget allows, else a portion that is halved until it fits. Where not even
    one text does, ``on_budget`` decides: the refusal is raised; or the call stops, and ``refusal``
    says why; or it waits.
    """
    size = len(todo)
    while call.refusal is None:
        size = min(size, len(todo))
        try:
            requests = _reserve(call, todo[:size], whole=whole)
        except BudgetExceeded as error:
            if call.on_budget == "raise":
                raise
            if size > 1:
                size //= 2
                continue
            # While it waits, or for good, others may have them.
            call.release(todo)
            if call.on_budget == "stop":
                call.refusal = error
                return
            _wait_for_budget(call, error)
            todo = missing(call, todo) if todo else todo
            size = len(todo)
            continue
        todo = todo[size:]
        yield requests, not todo
        if not todo:
            return
    call.release(todo)


def _reserve(call: Call, indices: Sequence[int], *, whole: bool) -> list[PlannedRequest]:
    """The requests for these texts, once there is money for all of them.

    ``whole``: the first thing that leaves is a whole request, and no part of one that failed.
    """
    return call.budget.open(
        partial(call.prepared.plan, indices=indices),
        # Asked only where a limit is near: a provider may have to look for its vocabulary.
        exact=lambda: call.engine.tokenizer.exact,
        send_now=whole and not call.engine.gate.closed_for,
    )


def _send_all(call: Call, search: Search, requests: Sequence[PlannedRequest]) -> None:
    """Send every request in the client's pool and wait for all of them."""
    if requests:
        # Before anything is paid for, and before each thread sets memory aside for itself.
        call.buffer.make_room()
    try:
        call.workers.work([partial(_send_one, call, search, request) for request in requests])
    except BudgetExceeded as error:
        # Money that a request needed on its way, for another attempt, was refused.
        if call.on_budget != "stop":
            raise
        call.refusal, call.is_over = error, True


def _send_one(call: Call, search: Search, request: PlannedRequest) -> None:
    search.run(request)
    call.progress.add(len(request.indices))


def left_by_others(call: Call) -> list[int]:
    """Wait for what other calls of this process pay for; returns what they ended without."""
    if call.reuse is None or call.is_over:
        return []
    # Those others may need the money that this call has left.
    call.budget.release()
    return call.reuse.others(call.wait_for_others)


def _wait_for_budget(call: Call, refusal: BudgetExceeded) -> None:
    """Wait for the end of the limit's window, or for a look before it."""
    account = call.engine.account
    await_budget(account, refusal, call.observe, call.pause)
    if call.is_late:
        call.observe(account.refused(refusal))
        raise refusal


def await_budget(
    account: Account, refusal: BudgetExceeded, observe: Observer, pause: Callable[[float], None]
) -> None:
    """Wait until the window of the limit ends, or for a look before. Raises what cannot be waited
    for: more than the whole limit, or a limit in total; and what ``pause`` raises."""
    if refusal.never_fits or refusal.resets_at is None:
        observe(account.refused(refusal))
        raise refusal
    seconds = (refusal.resets_at - datetime.now(UTC)).total_seconds()
    observe(BudgetWait(scope=account.scope, until=refusal.resets_at, message=refusal.message))
    pause(min(max(seconds, 0.0) + 0.05, _LOOK_SECONDS))
