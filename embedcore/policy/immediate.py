"""The recipe for "now": from the caller's texts to rows of vectors, in one function to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal

from embedcore.errors import ConfigurationError, EmbeddingError, StorageError
from embedcore.events import Progress
from embedcore.policy.arrivals import Delivery
from embedcore.policy.crew import Crew
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.flights import Flight, Pause
from embedcore.policy.planning import PlannedRequest
from embedcore.policy.preparing import Prepared
from embedcore.policy.purse import Purse
from embedcore.policy.result import EmbeddingResult, OnArrival
from embedcore.policy.rows import Collected
from embedcore.policy.sending import Sender, logger, may_be_kept
from embedcore.policy.splitting import Splitter

_PLAIN_INPUT_TYPES: Final = frozenset({"query", "document"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a call would do, without doing it.

    ``tokens``: exact, or an upper bound. ``picodollars``: None if the price is not known.
    """

    rows: int
    unique: int
    rejected: int
    truncated: int
    requests: int
    tokens: int
    exact: bool
    picodollars: int | None


def embed_now(
    engine: Engine,
    texts: Iterable[object],
    *,
    input_type: str | None = None,
    on_error: Literal["raise", "keep"] = "raise",
    check_budget: bool = True,
    stop: Stop | None = None,
    on_arrival: OnArrival | None = None,
) -> EmbeddingResult:
    """Intake → truncation → planning → hold → send → integrity → settle → rows in order.

    Raises ``BudgetExceeded`` before anything is sent if the call does not fit; any later error
    carries in ``.partial`` what was bought until then. ``on_arrival`` gets the vectors of each
    request as it finishes, in a thread of the pool; an error it raises ends the call.
    """
    if not check_budget:
        engine = replace(engine, account=replace(engine.account, limits=()))
    call = _Call(
        engine, texts, input_type, keep=on_error == "keep", stop=stop, on_arrival=on_arrival
    )
    if not call.prepared.texts:
        return call.result()
    try:
        call.send_all(call.hold())
    except BaseException as error:
        call.attach_partial(error)
        raise
    finally:
        call.purse.close()
    return call.result()


def plan_now(
    engine: Engine, texts: Iterable[object], *, input_type: str | None = None, exact: bool = True
) -> Plan:
    """The same steps without the wire: how many requests, tokens and dollars.

    ``exact``: count with the tokenizer where it can; otherwise a bound is enough.
    """
    _resolve_input_type(engine, input_type)
    prepared = Prepared(engine, texts, keep=True)
    counted = exact and engine.tokenizer.exact
    requests = prepared.plan(counted)
    tokens = sum(request.amount.tokens for request in requests)
    price = engine.info.price
    return Plan(
        rows=len(prepared.taken.rows),
        unique=len(prepared.texts),
        rejected=len(prepared.taken.rejected),
        truncated=len(prepared.tokens_cut()),
        requests=len(requests),
        tokens=tokens,
        exact=counted,
        picodollars=None if price is None else sum(one.amount.cost for one in requests),
    )


class _Call:
    """One call on its way. Its threads share the purse and the collected vectors."""

    def __init__(
        self,
        engine: Engine,
        texts: Iterable[object],
        input_type: str | None,
        *,
        keep: bool,
        stop: Stop | None,
        on_arrival: OnArrival | None,
    ) -> None:
        self.engine = engine
        self._keep = keep
        resolved = _resolve_input_type(engine, input_type)
        self.prepared = Prepared(engine, texts, keep=keep)
        self._collected = Collected(
            len(self.prepared.texts), engine.info.dimensions or engine.learned.width
        )
        pause = Pause(stop)
        seconds = engine.retry.deadline
        deadline = None if seconds is None else engine.monotonic() + seconds
        self.purse = Purse(
            engine.account,
            engine.info,
            lane="query" if input_type == "query" else "all",
            observe=engine.observe,
            pause=pause,
            monotonic=engine.monotonic,
        )
        sender = Sender(
            engine,
            self.purse,
            self._collected,
            self.prepared.texts,
            resolved,
            pause=pause,
            deadline=deadline,
            deliver=None if on_arrival is None else Delivery(self.prepared, on_arrival),
        )
        self._splitter = Splitter(
            sender,
            partial(self.prepared.measured, exact=False),
            fail=self._fail,
            shorten=self.prepared.shorten,
        )
        self._crew = Crew(engine, sender.flights, pause, deadline=deadline, abandon=self._abandon)

    def hold(self) -> list[PlannedRequest]:
        """Set the money for the whole call aside; nothing is sent if it does not fit."""
        return self.purse.open(
            self.prepared.plan,
            exact=self.engine.tokenizer.exact,
            send_now=not self.engine.gate.closed_for,
        )

    def send_all(self, requests: Sequence[PlannedRequest]) -> None:
        """Send every request in the client's pool and wait for all of them."""
        self._crew.work([partial(self._do, request) for request in requests])

    def _do(self, request: PlannedRequest) -> None:
        self._splitter.run(request)
        self._tell_progress()

    def _abandon(self, flight: Flight, why: str) -> None:
        """Nobody waits for it any longer; its answer, should it come, only corrects the books."""
        if flight.attempt is None:
            return
        try:
            self.purse.charge(flight.attempt, note=why)
        except StorageError as error:
            logger.warning("a request in flight will be charged when its lease ends: %s", error)

    def _fail(self, indices: Sequence[int], error: EmbeddingError, hopeless: bool) -> None:
        """These texts have no vector: note it, or end the call."""
        if may_be_kept(error):
            self._locate(indices, error)
        self._collected.fail(indices, error)
        if hopeless or not self._keep or not may_be_kept(error) or error.budget_blocked:
            raise error

    def _locate(self, indices: Sequence[int], error: EmbeddingError) -> None:
        """Name the caller's rows in the message, once."""
        if error.message.startswith(("row ", "rows ")):
            return
        taken = self.prepared.taken
        first = taken.first_row(indices[0])
        error.position = first if len(indices) == 1 else None
        if len(indices) == 1:
            error.message = f"row {first}: {error.message}"
        elif len(indices) < len(self.prepared.texts):
            error.message = f"rows {first} to {taken.first_row(indices[-1])}: {error.message}"

    def _tell_progress(self) -> None:
        spending = self.purse.spending
        self.engine.observe(
            Progress(
                done=self._collected.finished,
                total=len(self.prepared.texts),
                tokens=spending.tokens,
                picodollars=spending.picodollars,
            )
        )

    def attach_partial(self, error: BaseException) -> None:
        """Whatever ends the call, what was bought until then goes with it."""
        holder: Any = error
        holder.partial = self.result()

    def result(self) -> EmbeddingResult:
        return self._collected.result(
            self.prepared.taken,
            self.prepared.tokens_cut(),
            spending=self.purse.spending,
            model=self.engine.label,
            fingerprint=self.engine.fingerprint,
        )


def _resolve_input_type(engine: Engine, input_type: str | None) -> str | None:
    """What the provider is told: nothing if the model makes no difference between the types."""
    known = engine.info.input_types
    if input_type is None or input_type in known:
        return input_type
    if not known and input_type in _PLAIN_INPUT_TYPES:
        return None
    choices = ", ".join(known) or "query, document"
    raise ConfigurationError(
        f"{engine.label} knows no input_type {input_type!r}; it takes: {choices}"
    )
