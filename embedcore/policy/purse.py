"""The money of one call: held before anything is sent, and accounted for whatever happens.

One rule decides what an outcome costs: ``billed="no"`` gives back, everything else charges.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from embedcore.errors import BudgetExceeded, ConfigurationError, EmbeddingError
from embedcore.events import BoundViolated, Event, Held, Observer, Refused, Settled
from embedcore.policy.planning import PlannedRequest
from embedcore.policy.result import Spending
from embedcore.storage.amounts import (
    Amount,
    Attempt,
    Grant,
    HeldLoosely,
    Lane,
    Limit,
    TighterBoundNeeded,
)

if TYPE_CHECKING:
    from embedcore.provider.types import ModelInfo
    from embedcore.storage.ledger import Ledger

_SHORTEST_LOOK: Final = 0.02
_LONGEST_LOOK: Final = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Whose money it is, and what it may be spent on. ``ledger`` None: nothing costs anything."""

    ledger: Ledger | None = None
    scope: str = "default"
    limits: tuple[Limit, ...] = ()
    wait: float = 30.0


class Purse:
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
        self._lane: Lane = lane
        self._observe = observe
        self._pause = pause
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._grant: Grant | None = None
        self._first: Attempt | None = None
        self.spending = Spending()
        if info.price is None and any(limit.unit == "cost" for limit in account.limits):
            raise ConfigurationError(
                f"the price of {info.provider}:{info.model} is not known, so a limit in money "
                "cannot be kept: set its price in the provider's options, or limit tokens instead"
            )

    def open(
        self,
        plan: Callable[[bool], list[PlannedRequest]],
        *,
        countable: bool,
        send_now: bool,
    ) -> list[PlannedRequest]:
        """Hold the whole call and return its requests, or raise ``BudgetExceeded``.

        ``plan(exact)`` packs the texts by their byte bound or by exact counts; the bound is used
        while it takes less than half of what is left. ``countable``: exact counts can be had.
        ``send_now``: a single request is about to leave, and needs one commit instead of two.
        """
        requests = plan(False)
        if self._account.ledger is None or not requests:
            return requests
        try:
            self._hold(requests, loose=True, final=not countable, send_now=send_now)
        except TighterBoundNeeded:
            requests = plan(True)
            self._hold_patiently(requests, loose=False, send_now=send_now)
        except HeldLoosely:
            self._hold_patiently(requests, loose=True, send_now=send_now)
        except BudgetExceeded as error:
            self._observe(Refused(scope=self._account.scope, message=str(error)))
            raise
        return requests

    def send(self, amount: Amount, *, inputs: int, fresh: bool) -> Attempt | None:
        """Commit that a request is about to leave. None where nothing costs anything."""
        with self._lock:
            self.spending += Spending(requests=1)
            first, self._first = self._first, None
        if first is not None:
            return first
        if self._account.ledger is None or self._grant is None:
            return None
        try:
            return self._account.ledger.send(
                self._grant, amount, fresh=fresh, model=self._label, inputs=inputs
            )
        except EmbeddingError as error:
            with self._lock:
                self.spending += Spending(requests=-1)
            if isinstance(error, BudgetExceeded):
                self._observe(Refused(scope=self._account.scope, message=str(error)))
            raise

    def settle(
        self, attempt: Attempt | None, tokens: int | None, held: Amount, request_id: str | None
    ) -> Amount:
        """Vectors are in hand: what did they cost? Without the provider's word, what was held."""
        if attempt is None or self._account.ledger is None:
            return self._spent(Amount(tokens=tokens or 0), exact=True)
        actual = self._spent(held if tokens is None else self.price(tokens), exact=bool(tokens))
        if actual.tokens > held.tokens:
            self._tell(
                BoundViolated(
                    provider=self._info.provider,
                    model=self._info.model,
                    held=held.tokens,
                    billed=actual.tokens,
                )
            )
        self._tell(
            *self._account.ledger.settle(
                attempt, actual, reported=tokens is not None, request_id=request_id
            ),
            self._settled(actual, uncertain=False),
        )
        return actual

    def account_for(self, attempt: Attempt | None, error: EmbeddingError, *, note: str) -> bool:
        """A request failed. Returns whether its money is gone, so that a retry needs new money."""
        if attempt is None or self._account.ledger is None:
            return False
        identity = getattr(error, "request_id", None)
        if error.billed == "no":
            self._account.ledger.give_back(attempt, note=note, request_id=identity)
            return False
        self.charge(attempt, note=note, request_id=identity)
        return True

    def charge(self, attempt: Attempt, *, note: str, request_id: str | None = None) -> None:
        """Nobody can prove that it was not billed: it is spent, and shown as uncertain."""
        if self._account.ledger is None:
            return
        amount = attempt.amount
        with self._lock:
            self.spending += Spending(
                tokens=amount.tokens,
                picodollars=amount.cost,
                uncertain_tokens=amount.tokens,
                uncertain_picodollars=amount.cost,
                exact=False,
            )
        self._tell(
            *self._account.ledger.charge(attempt, note=note, request_id=request_id),
            self._settled(amount, uncertain=True),
        )

    def correct(self, attempt: Attempt | None, tokens: int | None) -> None:
        """The answer of a request that was given up, and charged, came after all."""
        if attempt is not None and self._account.ledger is not None and tokens is not None:
            self._account.ledger.settle(attempt, self.price(tokens))

    def renew(self) -> None:
        """Keep the grant while the call waits at the gate."""
        if self._grant is not None and self._account.ledger is not None:
            self._account.ledger.renew(self._grant)

    def close(self) -> None:
        """Release what was not used."""
        with self._lock:
            grant, self._grant = self._grant, None
            first, self._first = self._first, None
        if grant is None or self._account.ledger is None:
            return
        if first is not None:
            self._account.ledger.give_back(first, note="never sent")
        self._account.ledger.close(grant)

    def price(self, tokens: int) -> Amount:
        price = self._info.price
        return Amount(tokens=tokens, cost=price.picodollars(tokens) if price is not None else 0)

    def _spent(self, actual: Amount, *, exact: bool) -> Amount:
        with self._lock:
            self.spending += Spending(tokens=actual.tokens, picodollars=actual.cost, exact=exact)
        return actual

    @property
    def _label(self) -> str:
        return f"{self._info.provider}:{self._info.model}"

    def _hold_patiently(
        self, requests: Sequence[PlannedRequest], *, loose: bool, send_now: bool
    ) -> None:
        """Hold the least that will do; wait while only loose bounds of others forbid it."""
        until = self._monotonic() + self._account.wait
        look = _SHORTEST_LOOK
        while True:
            try:
                return self._hold(requests, loose=loose, final=True, send_now=send_now)
            except HeldLoosely as wait:
                if self._monotonic() >= until:
                    self._observe(Refused(scope=self._account.scope, message=str(wait)))
                    raise wait.refusal from None
            except BudgetExceeded as error:
                self._observe(Refused(scope=self._account.scope, message=str(error)))
                raise
            self._pause(look * random.uniform(0.5, 1.5))  # noqa: S311 - spreads, hides nothing
            look = min(look * 2, _LONGEST_LOOK)

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
            self._first = ledger.hold_and_send(
                account.scope,
                amount,
                account.limits,
                lane=self._lane,
                loose=loose,
                final=final,
                model=self._label,
                inputs=len(requests[0]),
            )
            self._grant = self._first.grant
        else:
            self._grant = ledger.hold(
                account.scope, amount, account.limits, lane=self._lane, loose=loose, final=final
            )
        self._observe(Held(scope=account.scope, tokens=amount.tokens, picodollars=amount.cost))

    def _settled(self, amount: Amount, *, uncertain: bool) -> Settled:
        return Settled(
            scope=self._account.scope,
            tokens=amount.tokens,
            picodollars=amount.cost,
            uncertain=uncertain,
        )

    def _tell(self, *events: Event) -> None:
        for event in events:
            self._observe(event)
