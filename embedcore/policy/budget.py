"""The money of one call: reserved before anything is sent, settled whatever happens.

One rule decides what an outcome costs: ``billed="no"`` gives back, everything else charges.
"""

from __future__ import annotations

import contextvars
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from embedcore.errors import (
    BudgetExceeded,
    ConfigurationError,
    EmbeddingError,
    ProviderError,
)
from embedcore.events import (
    BoundViolated,
    Observer,
    Progress,
    Refused,
    Reserved,
    Settled,
)
from embedcore.policy.planning import PlannedRequest, priced
from embedcore.policy.result import Spending
from embedcore.policy.threads import Stopped
from embedcore.storage.amounts import (
    Amount,
    Attempt,
    Grant,
    HeldLoosely,
    Lane,
    Limit,
    TighterBoundNeeded,
)
from embedcore.storage.outcomes import Outcome

if TYPE_CHECKING:
    from decimal import Decimal

    from embedcore.provider.types import ModelInfo
    from embedcore.storage.ledger import Ledger


_SHORTEST_LOOK: Final = 0.02
_LONGEST_LOOK: Final = 0.5

Found = TypeVar("Found")


def hold_when_free(
    hold: Callable[[], Found],
    account: Account,
    observe: Observer,
    *,
    pause: Callable[[float], None],
    monotonic: Callable[[], float],
) -> Found:
    """What ``hold`` gives, tried again for ``account.wait`` seconds while only loose bounds of
    others forbid it. Raises ``BudgetExceeded``, and observers are told."""
    until = monotonic() + account.wait
    look = _SHORTEST_LOOK
    while True:
        try:
            return hold()
        except HeldLoosely as wait:
            if monotonic() >= until:
                observe(account.refused(wait))
                raise wait.refusal from None
        except BudgetExceeded as error:
            observe(account.refused(error))
            raise
        pause(look * random.uniform(0.5, 1.5))  # noqa: S311 - spreads, hides nothing
        look = min(look * 2, _LONGEST_LOOK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Whose money it is, and what it may be spent on. ``ledger`` None: nothing costs anything.

    ``provider``, ``model``: what it is spent on, for observers.
    """

    ledger: Ledger | None = None
    scope: str = "default"
    limits: tuple[Limit, ...] = ()
    wait: float = 30.0
    provider: str = ""
    model: str = ""

    def held(self, amount: Amount) -> Reserved:
        """The event of money that was reserved."""
        return Reserved(
            scope=self.scope,
            tokens=amount.tokens,
            cost=amount.dollars,
            provider=self.provider,
            model=self.model,
        )

    def settled(
        self, tokens: int, cost: Decimal, *, unconfirmed: bool, exact: bool = True
    ) -> Settled:
        """The same of what was charged; ``cost`` in US dollars."""
        return Settled(
            scope=self.scope,
            tokens=tokens,
            cost=cost,
            unconfirmed=unconfirmed,
            exact=exact,
            provider=self.provider,
            model=self.model,
        )

    def refused(self, refusal: Exception) -> Refused:
        """The same of a limit that refused a call."""
        return Refused(
            scope=self.scope, message=str(refusal), provider=self.provider, model=self.model
        )


def require_price(account: Account, info: ModelInfo) -> None:
    """Raises ``ConfigurationError`` if a limit in money cannot be kept for want of a price."""
    costs = account.ledger is not None and info.price is None
    if costs and any(limit.unit == "cost" for limit in account.limits):
        raise ConfigurationError(
            f"the price of {info.provider}:{info.model} is not known, so a limit in money cannot "
            "be kept. Set it in US dollars per million tokens, or limit tokens instead:\n"
            f'  [models."{info.provider}:{info.model}"]\n  price = …'
        )


@dataclass(kw_only=True, slots=True)
class Bill:
    """What one attempt cost. ``attempt`` None: nothing costs anything.

    ``reported``: by the provider. ``exact``: that, or counted. ``last``: the call's grant ends with
    it. ``tell``: observers, in the caller's context.
    """

    actual: Amount
    attempt: Attempt | None = None
    reported: bool = False
    exact: bool = True
    last: bool = False
    tell: Observer | None = None

    def outcome(self, attempt: Attempt, request_id: str | None) -> Outcome:
        """The same for the ledger."""
        outcome = Outcome(
            what="settled",
            grant=attempt.grant,
            attempt=attempt,
            actual=self.actual,
            reported=self.reported,
            request_id=request_id,
            closes=self.last,
        )
        if self.tell is not None:
            outcome.tell = self.tell
        return outcome


def settle_all(ledger: Ledger | None, bills: Sequence[Bill], request_id: str | None) -> None:
    """Settle what was sent together, with the ledger's next commit."""
    outcomes = [
        bill.outcome(bill.attempt, request_id) for bill in bills if bill.attempt is not None
    ]
    if ledger is not None and outcomes:
        ledger.spool.add(*outcomes)


class CallBudget:
    """Opened once by a call, used by the threads that send its requests."""

    def __init__(
        self,
        account: Account,
        info: ModelInfo,
        *,
        lane: Lane,
        observe: Observer,
        pause: Callable[[float], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._account = account
        self._info = info
        self._observe = observe
        self._pause = pause
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._grant: Grant | None = None
        self._first: Attempt | None = None
        self._first_inputs = 0
        self._sole: Attempt | None = None
        self._closed = False
        self.lane: Lane = lane
        self.ledger = account.ledger
        self.spending = Spending()

    def open(
        self,
        plan: Callable[[bool], list[PlannedRequest]],
        *,
        exact: Callable[[], bool],
        send_now: bool,
    ) -> list[PlannedRequest]:
        """Reserve the whole call and return its requests, or raise ``BudgetExceeded``.

        ``plan(counted)`` packs the texts by their bytes or by the tokenizer's counts; the bytes are
        used while they take less than half of what is left. ``exact()``: the counts are exact, and
        not only a tighter bound. ``send_now``: a single request is about to leave, and needs one
        commit instead of two. May be called again, once all of the requests before have ended.
        What sends nothing is never refused.
        """
        requests = plan(False)
        self.release()
        if self._account.ledger is None or not requests:
            return requests
        require_price(self._account, self._info)
        try:
            self._hold(requests, loose=True, final=False, send_now=send_now)
        except TighterBoundNeeded:
            requests = plan(True)
            self._hold_in_turn(requests, loose=not exact(), send_now=send_now)
        return requests

    def send(self, amount: Amount, *, inputs: int, fresh: bool) -> Attempt | None:
        """Commit that a request is about to leave. None where nothing costs anything.

        Raises ``Stopped`` when the budget is closed, and ``EmbeddingError`` when nothing is
        reserved: what left now would be on no record.
        """
        with self._lock:
            if self._closed:
                raise Stopped
            grant, first, self._first = self._grant, self._first, None
        ledger = self._account.ledger
        if ledger is not None:
            if grant is None:
                raise EmbeddingError(
                    "a request was not sent because nothing is reserved for it. Please report this"
                )
            if first is not None and not self._is_sent(ledger, first, amount, inputs):
                first = None
            if first is None:
                first = self._send(ledger, grant, amount, inputs=inputs, fresh=fresh)
        self._count(Spending(requests=1))
        return first

    def _is_sent(self, ledger: Ledger, first: Attempt, amount: Amount, inputs: int) -> bool:
        """Whether this request is the one that was sent with its hold. Else its money is given
        back, and sent as it is due: a day may have ended since, or other threads have learned that
        a request must be smaller, or is dearer."""
        is_it = (first.amount, self._first_inputs) == (amount, inputs)
        if is_it and ledger.is_timely(first):
            return True
        self._never_sent(ledger, first)
        self._sole = None
        return False

    @staticmethod
    def _never_sent(ledger: Ledger, attempt: Attempt) -> None:
        ledger.spool.add(
            Outcome(what="returned", grant=attempt.grant, attempt=attempt, note="never sent"),
            at_once=True,
        )

    def _send(
        self, ledger: Ledger, grant: Grant, amount: Amount, *, inputs: int, fresh: bool
    ) -> Attempt:
        try:
            return ledger.spool.asked(
                partial(ledger.send, grant, amount, fresh=fresh, model=self._label, inputs=inputs)
            )
        except BudgetExceeded as error:
            self._observe(self._account.refused(error))
            raise

    def not_sent(self, attempt: Attempt | None) -> None:
        """The call ended between the commit and the first byte."""
        self._count(Spending(requests=-1))
        if attempt is not None and self._account.ledger is not None:
            self._never_sent(self._account.ledger, attempt)

    def settle(
        self,
        attempt: Attempt | None,
        tokens: int | None,
        request_id: str | None,
        *,
        counted: int | None = None,
        complete: bool = True,
    ) -> Amount:
        """Vectors are in hand: what did they cost?

        Without the provider's word, what an exact tokenizer ``counted``, or else what was reserved.
        ``complete``: for all texts of the request, so that nothing of it is sent again.
        """
        bill = self.bill(attempt, tokens, counted=counted, complete=complete)
        settle_all(self.ledger, [bill], request_id)
        self.was_settled(bill)
        return bill.actual

    def began(self, attempt: Attempt | None) -> None:
        """The only request of the call is about to leave, reserved and sent in the commit of
        several calls. None where nothing costs anything."""
        if attempt is not None:
            self._sole, self._grant = attempt, attempt.grant
            self._observe(self._account.held(attempt.amount))
        self._count(Spending(requests=1))

    def bill(
        self,
        attempt: Attempt | None,
        tokens: int | None,
        *,
        counted: int | None = None,
        complete: bool = True,
    ) -> Bill:
        """What is to be settled, as in ``settle``, and counted already."""
        known = counted if tokens is None else tokens
        if attempt is None or self._account.ledger is None:
            self._count(Spending(tokens=known or 0))
            return Bill(actual=Amount(tokens=known or 0))
        held, reported = attempt.amount, tokens is not None
        actual = held if known is None else self.price(known)
        cost = actual.dollars
        self._count(Spending(tokens=actual.tokens, cost=cost, exact=reported))
        if actual.tokens > held.tokens:
            self._observe(
                BoundViolated(
                    provider=self._info.provider,
                    model=self._info.model,
                    reserved=held.tokens,
                    billed=actual.tokens,
                )
            )
        return Bill(
            attempt=attempt,
            actual=actual,
            reported=reported,
            exact=known is not None,
            # The only request of a call: its grant ends in the same commit.
            last=complete and attempt is self._sole,
            tell=self._heard(),
        )

    def _heard(self) -> Observer:
        """Tells observers in the context of this call, in whichever thread."""
        run, observe = contextvars.copy_context().run, self._observe
        return lambda event: run(observe, event)

    def was_settled(self, bill: Bill) -> None:
        """It will be in the ledger: observers are told."""
        if bill.attempt is None:
            return
        if bill.last:
            self._sole = self._grant = None
        actual = bill.actual
        settled = self._account.settled(
            actual.tokens, actual.dollars, unconfirmed=False, exact=bill.exact
        )
        self._observe(settled)

    def account_for(
        self,
        attempt: Attempt | None,
        error: EmbeddingError,
        *,
        note: str,
        counted: int | None = None,
        late: bool = False,
    ) -> bool:
        """A request failed. Returns whether its money is gone, so that a retry needs new money.

        ``counted``: its tokens, as in ``charge``. ``late``: it was given up before, and charged.
        """
        if attempt is None or self._account.ledger is None:
            return False
        request_id = getattr(error, "request_id", None)
        if error.billed == "no":
            by_status = isinstance(error, ProviderError) and error.free_by_status
            # After midnight it may have gone back to the day before.
            returned = Outcome(
                what="returned",
                grant=attempt.grant,
                attempt=attempt,
                note=note,
                request_id=request_id,
                by_status=by_status,
            )
            self._account.ledger.spool.add(returned, at_once=True)
            if by_status:
                self._free_by_status(attempt.amount)
            return not returned.has_it
        if error.billed == "yes" and error.billed_tokens is not None:
            # A refusal that says what it cost.
            if late:
                self.correct(attempt, error.billed_tokens)
            else:
                self.settle(attempt, error.billed_tokens, request_id, complete=False)
        elif not late:
            self.charge(attempt, note=note, request_id=request_id, counted=counted)
        return True

    def _free_by_status(self, amount: Amount) -> None:
        self._count(
            Spending(
                free_by_status_tokens=amount.tokens,
                free_by_status_cost=amount.dollars,
                free_by_status_requests=1,
            )
        )

    def charge(
        self,
        attempt: Attempt,
        *,
        note: str,
        request_id: str | None = None,
        counted: int | None = None,
    ) -> None:
        """There is no proof that it was not billed: it is spent, and shown as unconfirmed.

        ``counted``: what an exact tokenizer says of its texts; None: all that was reserved for it.
        """
        if self._account.ledger is None:
            return
        amount = attempt.amount if counted is None else self.price(counted)
        tokens, cost = amount.tokens, amount.dollars
        self._count(
            Spending(
                tokens=tokens,
                cost=cost,
                unconfirmed_tokens=tokens,
                unconfirmed_cost=cost,
                exact=False,
            )
        )
        charged = Outcome(
            what="charged",
            grant=attempt.grant,
            attempt=attempt,
            actual=amount,
            note=note,
            request_id=request_id,
            tell=self._heard(),
        )
        self._account.ledger.spool.add(charged, at_once=True)
        exact = counted is not None
        self._observe(self._account.settled(tokens, cost, unconfirmed=True, exact=exact))

    def correct(self, attempt: Attempt | None, tokens: int | None) -> None:
        """The answer of a request that was given up, and charged, came after all."""
        if attempt is not None and tokens is not None:
            bill = Bill(attempt=attempt, actual=self.price(tokens), reported=True)
            settle_all(self._account.ledger, [bill], None)

    def renew(self) -> None:
        """Keep the grant while the call waits for the rate limit."""
        if self._grant is not None and self._account.ledger is not None:
            self._account.ledger.renew(self._grant)

    def close(self) -> None:
        """Release what was not used, for good. Never raises."""
        with self._lock:
            self._closed = True
        self.release()

    def release(self) -> None:
        """Release what was not used, once all requests have ended; ``open`` may reserve anew.

        Never raises.
        """
        with self._lock:
            grant, self._grant = self._grant, None
            first, self._first = self._first, None
        ledger = self._account.ledger
        if grant is None or ledger is None:
            return
        if first is not None:
            self._never_sent(ledger, first)
        ledger.spool.add(Outcome(what="closed", grant=grant))

    def price(self, tokens: int) -> Amount:
        return priced(tokens, self._info.price)

    def _count(self, spending: Spending) -> None:
        with self._lock:
            self.spending += spending

    @property
    def _label(self) -> str:
        return f"{self._info.provider}:{self._info.model}"

    def _hold_in_turn(
        self, requests: Sequence[PlannedRequest], *, loose: bool, send_now: bool
    ) -> None:
        """Reserve the least that will do; wait while only loose bounds of others forbid it."""
        hold_when_free(
            lambda: self._hold(requests, loose=loose, final=True, send_now=send_now),
            self._account,
            self._observe,
            pause=self._pause,
            monotonic=self._monotonic,
        )

    def _hold(
        self, requests: Sequence[PlannedRequest], *, loose: bool, final: bool, send_now: bool
    ) -> None:
        ledger, account = self._account.ledger, self._account
        if ledger is None:
            return
        amount = Amount(
            tokens=sum(request.amount.tokens for request in requests),
            cost=sum(request.amount.cost for request in requests),
        )
        if send_now and len(requests) == 1:
            self._first = self._sole = ledger.spool.asked(
                partial(
                    ledger.hold_and_send,
                    account.scope,
                    amount,
                    account.limits,
                    lane=self.lane,
                    loose=loose,
                    final=final,
                    model=self._label,
                    inputs=len(requests[0].indices),
                )
            )
            self._first_inputs = len(requests[0].indices)
            self._grant = self._first.grant
        else:
            self._grant = ledger.spool.asked(
                partial(
                    ledger.hold,
                    account.scope,
                    amount,
                    account.limits,
                    lane=self.lane,
                    loose=loose,
                    final=final,
                )
            )
        self._observe(account.held(amount))


class CallProgress:
    """How many texts of one call are done. Each step is an event, with what was spent so far."""

    def __init__(self, budget: CallBudget, total: int, observe: Observer) -> None:
        self._budget = budget
        self._total = total
        self._observe = observe
        self._lock = threading.Lock()
        self._done = 0

    def add(self, texts: int) -> None:
        """So many more are done: their vectors are there, and what they cost is known."""
        with self._lock:
            self._done += texts
            done = self._done
        spending = self._budget.spending
        self._observe(
            Progress(
                done=done,
                total=self._total,
                tokens=spending.tokens,
                cost=spending.cost,
                exact=spending.exact,
            )
        )
