"""The recipe for "now": from the caller's texts to rows of vectors, in one function to read."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from embedcore.errors import (
    ConfigurationError,
    EmbeddingError,
    InputRejected,
    OutcomeUnknown,
)
from embedcore.events import Progress
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.flights import Pause, Stopped
from embedcore.policy.planning import PlannedRequest
from embedcore.policy.preparing import Prepared
from embedcore.policy.purse import Account, Purse
from embedcore.policy.result import EmbeddingResult
from embedcore.policy.rows import Collected
from embedcore.policy.sending import Sender, may_be_kept
from embedcore.policy.splitting import Splitter

_LOOK_SECONDS: Final = 0.25
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
) -> EmbeddingResult:
    """Intake → truncation → planning → hold → send → integrity → settle → rows in order.

    Raises ``BudgetExceeded`` before anything is sent if the call does not fit; any later error
    carries in ``.partial`` what was bought until then.
    """
    call = _Call(engine, texts, input_type, on_error=on_error, check_budget=check_budget)
    if not call.prepared.texts:
        return call.result()
    try:
        requests = call.hold()
        call.send_all(requests, stop)
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
    counted = exact and engine.embedder.tokenizer.exact
    requests = prepared.plan(counted)
    tokens = sum(request.amount.tokens for request in requests)
    price = engine.info.price
    return Plan(
        rows=len(prepared.taken.rows),
        unique=len(prepared.texts),
        rejected=len(prepared.taken.rejected),
        truncated=len(prepared.cuts),
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
        on_error: Literal["raise", "keep"],
        check_budget: bool,
    ) -> None:
        self.engine = engine
        self._keep = on_error == "keep"
        resolved = _resolve_input_type(engine, input_type)
        self.prepared = Prepared(engine, texts, keep=self._keep)
        self._pause = Pause()
        self._ended = threading.Condition()
        self._waiting = 0
        self._error: BaseException | None = None
        account = engine.account if check_budget else _without_limits(engine.account)
        self.purse = Purse(
            account,
            engine.info,
            lane="query" if input_type == "query" else "all",
            observe=engine.observe,
            pause=self._pause,
            monotonic=engine.monotonic,
        )
        seconds = engine.retry.deadline
        self._deadline = None if seconds is None else engine.monotonic() + seconds
        self._collected = Collected(len(self.prepared.texts), engine.info.dimensions)
        self._sender = Sender(
            engine,
            self.purse,
            self._collected,
            self.prepared.texts,
            resolved,
            pause=self._pause,
            deadline=self._deadline,
        )
        self._splitter = Splitter(
            self._sender,
            partial(self.prepared.measured, exact=False),
            fail=self._fail,
            shorten=self.prepared.shorten,
        )

    def hold(self) -> list[PlannedRequest]:
        """Set the money for the whole call aside; nothing is sent if it does not fit."""
        return self.purse.open(
            self.prepared.plan,
            countable=self.engine.embedder.tokenizer.exact,
            send_now=not self.engine.gate.closed_for,
        )

    def send_all(self, requests: Sequence[PlannedRequest], stop: Stop | None) -> None:
        """Send every request in the client's pool and wait for all of them."""
        self._waiting = len(requests)
        try:
            for request in requests:
                self.engine.pool.submit(partial(self._work, request))
            self._wait(stop)
        except BaseException:
            self._end_early()
            raise
        if self._error is not None:
            raise self._error

    def _work(self, request: PlannedRequest) -> None:
        """One request, in a thread of the pool. Never raises."""
        try:
            if not self._pause.ended:
                self._splitter.run(request)
                self._tell_progress()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            self._end_with(error)
        finally:
            with self._ended:
                self._waiting -= 1
                self._ended.notify_all()

    def _wait(self, stop: Stop | None) -> None:
        with self._ended:
            while self._waiting > 0:
                self._ended.wait(_LOOK_SECONDS if stop or self._deadline else None)
                if stop is not None and stop.is_set():
                    raise Stopped
                if self._deadline is not None and self._is_late():
                    self._give_up_flights("the call's deadline passed")
                    raise self._error or self._too_late()

    def _is_late(self) -> bool:
        assert self._deadline is not None  # noqa: S101 - the caller has looked
        return self.engine.monotonic() > self._deadline + self.engine.grace

    def _too_late(self) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"{self.engine.label} did not answer within the deadline of "
            f"{self.engine.retry.deadline} s; the requests under way count as spent"
        )

    def _end_early(self) -> None:
        """Interrupted: send nothing more, wait a little for what is under way, charge the rest."""
        self._pause.end()
        try:
            with self._ended:
                flights = self._sender.flights
                self._ended.wait_for(
                    lambda: self._waiting <= 0 or not flights.under_way, timeout=self.engine.grace
                )
        finally:
            self._give_up_flights("the call was interrupted")

    def _give_up_flights(self, why: str) -> None:
        self._pause.end()
        for flight in self._sender.flights.give_up(started_before=self.engine.monotonic()):
            self.engine.pool.replace_lost_thread()
            if flight.attempt is not None:
                self.purse.charge(flight.attempt, note=why)

    def _fail(self, indices: Sequence[int], error: EmbeddingError, hopeless: bool) -> None:
        """These texts have no vector: note it, or end the call."""
        if may_be_kept(error):
            self._locate(indices, error)
        self._collected.fail(indices, error)
        if hopeless or not self._keep or not may_be_kept(error) or error.budget_blocked:
            raise error

    def _locate(self, indices: Sequence[int], error: EmbeddingError) -> None:
        """Name the caller's rows in the message, once."""
        if error.position is not None and not isinstance(error, InputRejected):
            return
        rows = self.prepared.taken.rows
        first = rows.index(indices[0])
        error.position = first
        if len(indices) == 1:
            error.message = f"row {first}: {error.message}"
        elif len(indices) < len(self.prepared.texts):
            last = rows.index(indices[-1])
            error.message = f"rows {first} to {last}: {error.message}"

    def _end_with(self, error: BaseException) -> None:
        with self._ended:
            if self._error is None:
                self._error = error
        self._pause.end()

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
            self.prepared.cuts,
            spending=self.purse.spending,
            model=self.engine.label,
            fingerprint=self.engine.fingerprint,
        )


def _without_limits(account: Account) -> Account:
    return Account(ledger=account.ledger, scope=account.scope, limits=(), wait=account.wait)


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
