"""The recipe for an immediate call, from texts to rows of vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from embedcore.errors import (
    BudgetExceeded,
    ConfigurationError,
    EmbeddingError,
    InvalidResponse,
    StorageError,
    TransientProviderError,
)
from embedcore.events import BudgetWait, Event, Observer, Progress, Refused
from embedcore.policy.budget import CallBudget
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.estimate import resolve_input_type
from embedcore.policy.immediate.attempts import Attempts, Sender, logger
from embedcore.policy.immediate.reuse import Reuse
from embedcore.policy.immediate.search import Search
from embedcore.policy.immediate.verdict import is_about_no_text, may_be_kept
from embedcore.policy.immediate.workers import Workers
from embedcore.policy.planning import PlannedRequest, priced
from embedcore.policy.result import EmbeddingResult, OnArrival, StoppedAt
from embedcore.policy.result_buffer import Collected, Delivery
from embedcore.policy.texts import Prepared
from embedcore.policy.threads import InFlight, Pause, SentRequest

if TYPE_CHECKING:
    from embedcore.policy.budget import Account
    from embedcore.policy.immediate.attempts import Keep
    from embedcore.provider.types import Vectors


OnBudget: TypeAlias = Literal["raise", "stop", "wait"]

# What others give back, or a limit that was raised, is noticed after so long.
_LOOK_SECONDS: Final = 30.0


def check_on_budget(on_budget: str) -> None:
    """Raises ``ConfigurationError`` for anything but the three that there are."""
    if on_budget not in ("raise", "stop", "wait"):
        raise ConfigurationError(f'on_budget = {on_budget!r} must be "raise", "stop" or "wait"')


class Sending(Protocol):
    """What ``Portions`` needs of a call. Texts are named by their indices, in order."""

    def missing(self, wanted: Sequence[int]) -> Sequence[int]:
        """Those that must be paid for; they are claimed."""
        ...

    def hold(self, missing: Sequence[int]) -> list[PlannedRequest]:
        """Raises ``BudgetExceeded`` if the budget does not allow all of them."""
        ...

    def send_all(self, requests: Sequence[PlannedRequest]) -> None: ...

    def let_go(self, missing: Sequence[int]) -> None:
        """Others may have them: they are not claimed any more."""
        ...

    def wait_for_budget(self, refusal: BudgetExceeded) -> None:
        """Wait until there may be more. Raises the refusal where that does not help."""
        ...


class Portions:
    """Sends the texts of one call: all at once if the budget allows, else as many as it does.

    A portion is halved until it fits. Where not even one text does, ``on_budget`` decides: the
    refusal is raised; or the call stops, and ``refusal`` says why; or it waits.
    """

    def __init__(self, call: Sending, on_budget: OnBudget) -> None:
        self._call = call
        self._on_budget = on_budget
        self.refusal: BudgetExceeded | None = None
        self.is_over = False

    def send(self, wanted: Sequence[int], *, on_held: Callable[[], None] | None = None) -> None:
        """``on_held`` is called once no more money is needed for these texts."""
        for requests, are_last in self._held(self._call.missing(wanted)):
            if are_last and on_held is not None:
                on_held()
            self._send(requests)

    def _held(self, todo: Sequence[int]) -> Iterator[tuple[list[PlannedRequest], bool]]:
        """Requests that money is held for, portion by portion, and whether they are the last."""
        call, size = self._call, len(todo)
        while self.refusal is None:
            size = min(size, len(todo))
            try:
                requests = call.hold(todo[:size])
            except BudgetExceeded as error:
                if self._on_budget == "raise":
                    raise
                if size > 1:
                    size //= 2
                    continue
                # While it waits, or for good, others may have them.
                call.let_go(todo)
                if self._on_budget == "stop":
                    self.refusal = error
                    return
                call.wait_for_budget(error)
                todo = call.missing(todo)
                size = len(todo)
                continue
            todo = todo[size:]
            yield requests, not todo
            if not todo:
                return
        call.let_go(todo)

    def _send(self, requests: Sequence[PlannedRequest]) -> None:
        try:
            self._call.send_all(requests)
        except BudgetExceeded as error:
            # Money that a request needed on its way, for another attempt, was refused.
            if self._on_budget != "stop":
                raise
            self.refusal, self.is_over = error, True


def without_refusals(engine: Engine) -> Engine:
    """The engine for a call that tries again with less: it is told of the last refusal only."""
    observe = engine.observe

    def told(event: Event) -> None:
        if not isinstance(event, Refused):
            observe(event)

    return replace(engine, observe=told)


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
    on_held: Callable[[], None] | None = None,
) -> EmbeddingResult:
    """Intake → truncation → store → planning → hold → send → integrity → store → settle → rows.

    Raises ``BudgetExceeded`` before anything is sent if the call does not fit, unless ``on_budget``
    says to stop where it does not, or to wait; any later error carries in ``.partial`` what was
    bought until then. ``on_arrival`` gets the vectors of each
    request as it finishes, in a thread of the pool; an error it raises ends the call. Messages
    name the first row by ``first_row``. ``on_held`` is called when the money is held.
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
    )
    portions = Portions(call, on_budget)
    try:
        portions.send(range(len(call.prepared.texts)), on_held=on_held)
        while not portions.is_over and (left := call.what_others_left()):
            portions.send(left)
        if portions.refusal is not None:
            call.stop_at(portions.refusal)
    except BaseException as error:
        call.attach_partial(error)
        raise
    finally:
        call.close()
    return call.end()


class Call:
    """One call on its way. Its threads share the budget and the collected vectors."""

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
        first_row: int,
    ) -> None:
        self._tell = engine.observe
        engine = engine if on_budget == "raise" else without_refusals(engine)
        self.engine = engine
        self.keeps = keep
        self._stops = on_budget == "stop"
        self._stopped_at: StoppedAt | None = None
        resolved = resolve_input_type(engine, input_type)
        self.prepared = Prepared(engine, texts, keep=keep, first_row=first_row)
        self._collected = Collected(
            self.prepared.taken.rows,
            len(self.prepared.texts),
            engine.info.dimensions or engine.learned.width,
        )
        self._delivery = None if on_arrival is None else Delivery(self.prepared, on_arrival)
        self._reuse = (
            None
            if engine.cache is None
            else Reuse(
                engine,
                engine.cache,
                self.prepared,
                resolved,
                receive=self._got_for_nothing,
                room_for=self._collected.room_for,
            )
        )
        self._done, self._counting = 0, threading.Lock()
        pause = self.pause = Pause(stop, engine.wait_for)
        seconds = engine.retry.deadline
        deadline = None if seconds is None else engine.monotonic() + seconds
        self._deadline = deadline
        self.budget = CallBudget(
            engine.account,
            engine.info,
            lane="query" if input_type == "query" else "all",
            observe=engine.observe,
            pause=pause,
            monotonic=engine.monotonic,
        )
        self._input_type = resolved
        self._in_flight = InFlight()
        self.sender = self._sender(self.prepared.texts, keep=self._bought, room=self._lend_room)
        self.workers = Workers(
            engine, self._in_flight, pause, deadline=deadline, abandon=self._abandon
        )
        self._search = Search(self)

    def _sender(
        self,
        texts: Sequence[str],
        *,
        keep: Keep,
        room: Callable[[Sequence[int]], Vectors | None],
    ) -> Sender:
        return Sender(
            self.engine,
            self.budget,
            texts,
            self._input_type,
            in_flight=self._in_flight,
            keep=keep,
            room_for=room,
            pause=self.pause,
            deadline=self._deadline,
        )

    def missing(self, wanted: Sequence[int]) -> Sequence[int]:
        """Which of these texts must be bought? The others come from the store or another call."""
        return wanted if self._reuse is None or not wanted else self._reuse.missing(wanted)

    def what_others_left(self) -> list[int]:
        """Wait for what other calls of this process buy; returns what they ended without."""
        if self._reuse is None:
            return []
        # Those others may need the money that this call has left.
        self.budget.release()
        return self._reuse.others(self._look)

    def _look(self, seconds: float) -> None:
        self.pause(seconds)
        if self._deadline is not None and self.engine.monotonic() > self._deadline:
            raise TransientProviderError(
                f"{self.engine.label}: another call of this program is still buying some of these "
                f"texts, and the deadline of {self.engine.retry.deadline} s has passed",
                billed="no",
            )

    def hold(self, missing: Sequence[int]) -> list[PlannedRequest]:
        """Set the money for all of these aside; nothing is sent if it does not fit."""
        return self.budget.open(
            partial(self.prepared.plan, indices=missing),
            exact=self.engine.tokenizer.exact,
            send_now=not self.engine.gate.closed_for,
        )

    def let_go(self, missing: Sequence[int]) -> None:
        """This call will not buy these for now: others may."""
        if self._reuse is not None:
            self._reuse.failed(missing)

    def wait_for_budget(self, refusal: BudgetExceeded) -> None:
        """Wait for the end of the limit's window, or for a look before it."""
        account = self.engine.account
        await_budget(account, refusal, self._tell, self.pause)
        if self._deadline is not None and self.engine.monotonic() > self._deadline:
            self._tell(account.refused(refusal))
            raise refusal

    def stop_at(self, refusal: BudgetExceeded) -> None:
        """The budget has ended: texts without an outcome are not done, for that reason."""
        left = self._collected.left()
        if not left:
            return
        self._collected.fail(left, refusal)
        row = min(map(self.prepared.taken.first_row, left))
        self._stopped_at = StoppedAt(key=row, position=row, error=refusal)
        self._tell(self.engine.account.refused(refusal))

    def send_all(self, requests: Sequence[PlannedRequest]) -> None:
        """Send every request in the client's pool and wait for all of them."""
        if requests:
            # Before anything is paid for, and before each thread sets memory aside for itself.
            self._collected.make_room()
        self.workers.work([partial(self._do, request) for request in requests])

    def close(self) -> None:
        """Whatever happened: give back what is left of the money and of the claims."""
        if self._reuse is not None:
            self._reuse.close()
        self.budget.close()

    def _bought(
        self, indices: Sequence[int], vectors: Vectors, model: str | None, late: bool
    ) -> None:
        if not late:
            self._collected.put(indices, vectors)
        if self._reuse is not None:
            self._reuse.bought(indices, vectors, model)
        if self._delivery is not None and not late:
            self._delivery(indices, vectors)

    def _lend_room(self, indices: Sequence[int]) -> Vectors | None:
        # Whoever wraps a provider by hand may keep its replies: those must stay as they are.
        return self._collected.room_for(indices) if self.engine.lends_room else None

    def _got_for_nothing(self, indices: Sequence[int], vectors: Vectors) -> None:
        self._collected.put(indices, vectors, reused=True)
        if self._delivery is not None:
            self._delivery(indices, vectors)
        self._tell_progress(len(indices))

    def _do(self, request: PlannedRequest) -> None:
        self._search.run(request)
        self._tell_progress(len(request))

    def _abandon(self, flight: SentRequest, why: str) -> None:
        """Nobody waits for it any longer; its answer, should it come, only corrects the books."""
        if flight.attempt is None:
            return
        try:
            self.budget.charge(flight.attempt, note=why)
        except StorageError as error:
            logger.warning("a request in flight will be charged when its lease ends: %s", error)

    def fail(self, indices: Sequence[int], error: EmbeddingError, *, blame: bool = True) -> None:
        """These texts have no vector: note it, or end the call.

        ``blame``: if it is one text, it is the one at fault.
        """
        kept = may_be_kept(error)
        if kept:
            self._locate(indices, error, blame=blame)
        self._collected.fail(indices, error)
        if self._reuse is not None:
            self._reuse.failed(indices)
        blocked = error.budget_blocked and not self._stops
        if not self.keeps or not kept or blocked:
            raise error

    def serves(self, text: str, attempts: Attempts) -> bool:
        """Whether the provider embeds this text, which is none of the call's. It is paid for.

        Raises ``BudgetExceeded`` if it cannot be.
        """
        try:
            self.trial(text, attempts, keep=lambda *_: None)
        except BudgetExceeded:
            raise
        except EmbeddingError:
            return False
        return True

    def trial(self, text: str, attempts: Attempts, *, keep: Keep) -> None:
        """Send a text that is none of the call's, alone. Raises the error of its last attempt."""
        missing = self._sender([text], keep=keep, room=lambda _: None).send(
            self.priced(text), attempts
        )
        if missing:
            raise InvalidResponse(
                f"{self.engine.label} returned null, nothing or NaN instead of a vector",
                billed="yes",
            )

    def priced(self, text: str) -> PlannedRequest:
        """The request of ``trial``, with the most that it can cost."""
        engine = self.engine
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

    def find_shortened(self, kept: str) -> Vectors | None:
        """The vector of the beginning of a text, if it was bought before; shape (1, d)."""
        return None if self._reuse is None else self._reuse.find(kept)

    def store_shortened(self, kept: str, vectors: Vectors, model: str | None) -> None:
        """Keep the vector of a beginning under its own name: it is paid for."""
        if self._reuse is not None:
            self._reuse.store(kept, vectors, model)

    def shortened(self, index: int, kept: str, vectors: Vectors, *, reused: bool) -> None:
        """The text's vector is that of its beginning: more was refused.

        Whoever waits for the whole text must hear of the cut himself.
        """
        self.prepared.was_shortened(index, kept)
        self._collected.put([index], vectors, reused=reused)
        if self._reuse is not None:
            self._reuse.failed([index])
        if self._delivery is not None:
            self._delivery([index], vectors)

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

    def _tell_progress(self, texts: int) -> None:
        """So many more are done: their vectors are there, and what they cost is known."""
        with self._counting:
            self._done += texts
            done = self._done
        spending = self.budget.spending
        self.engine.observe(
            Progress(
                done=done,
                total=len(self.prepared.texts),
                tokens=spending.tokens,
                picodollars=spending.picodollars,
                exact=spending.exact,
            )
        )

    def end(self) -> EmbeddingResult:
        """The result of a call of which nothing is under way any more.

        Its parts know each other: let go of here, they free the texts at once, and not when the
        garbage collector comes by.
        """
        result = self.result()
        for part in (self._reuse, self):
            if part is not None:
                vars(part).clear()
        return result

    def attach_partial(self, error: BaseException) -> None:
        """Whatever ends the call, what was bought until then goes with it."""
        holder: Any = error
        holder.partial = None
        # Where there is no memory for it, that must not hide what ended the call.
        with suppress(MemoryError):
            holder.partial = self.result()

    def result(self) -> EmbeddingResult:
        return self._collected.result(
            self.prepared.taken,
            self.prepared.cuts(),
            spending=self.budget.spending,
            model=self.engine.label,
            fingerprint=self.engine.fingerprint,
            stopped_at=self._stopped_at,
        )
