"""Do two ledgers over one file agree with a dictionary, whatever happens in whatever order?

Each has a spool, whose outcomes count in full until they are written, and once when they are.

The model keeps no counters of what is held or spent: it adds them up from what became of each
grant and attempt, so that it cannot make the same mistake twice as the code under test could.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from embedcore.errors import BudgetExceeded
from embedcore.forksafe import Lazy
from embedcore.money import in_dollars
from embedcore.storage import inspection, spool, usage
from embedcore.storage.amounts import (
    Amount,
    Attempt,
    Grant,
    HeldLoosely,
    Limit,
    TighterBoundNeeded,
)
from embedcore.storage.database import Database
from embedcore.storage.grants import myself
from embedcore.storage.ledger import Ledger
from embedcore.storage.outcomes import Outcome
from embedcore.storage.schema import STATE

LEASE, ATTEMPT_LEASE, TIGHT = 60, 660, 5
UNITS = ("tokens", "cost")
PERIODS = ("day", "month", "total")
Key = tuple[str, str, str, str]
# A process of this number that started at another time.
ENDED = myself().rpartition(" ")[0] + " 1"


@dataclass
class Counted:
    """Something that counts in windows: a grant's rest, an attempt, or a record made by hand."""

    keys: tuple[Key, ...]
    amount: Amount
    state: str
    loose: bool = False
    lease: int | None = None
    sent_in: int = 0
    counted_in: int = 0
    is_ownerless: bool = False


@dataclass
class Model:
    """The model: everything that was ever held or sent, and the sums over it."""

    zone: str
    real: int
    now: int = 0
    tight_until: int = 0
    grants: dict[int, Counted] = field(default_factory=dict)
    attempts: dict[int, Counted] = field(default_factory=dict)
    records: list[Counted] = field(default_factory=list)
    generation: int = 0
    resets: dict[Key, int] = field(default_factory=dict)
    known: set[Key] = field(default_factory=set)
    told: set[tuple[Key, str, int]] = field(default_factory=set)

    def tick(self) -> None:
        self.now = max(self.now, self.real)

    def keys(self, scope: str, lane: str) -> tuple[Key, ...]:
        local = datetime.fromtimestamp(self.now, tz=ZoneInfo(self.zone))
        starts = (f"{local:%Y-%m-%d}", f"{local:%Y-%m}", "")
        owners = [(scope, "all"), ("*", "all")] + [(scope, "query")] * (lane == "query")
        found = tuple(
            (owner, of_lane, period, start)
            for owner, of_lane in owners
            for period, start in zip(PERIODS, starts, strict=True)
        )
        self.known |= set(found)
        return found

    def held(self, key: Key, unit: str, *, only_loose: bool = False) -> int:
        sent = [one for one in self.attempts.values() if one.state == "sent"]
        return sum(
            one.amount.of(unit)
            for one in [*self.grants.values(), *sent]
            if key in one.keys and (one.loose or not only_loose)
        )

    def spent(self, key: Key, unit: str) -> int:
        ended = [one for one in self.attempts.values() if one.state in ("settled", "charged")]
        return sum(
            one.amount.of(unit)
            for one in [*ended, *self.records]
            if key in one.keys and (unit == "cost" or self.counts(key, one.counted_in))
        )

    def requests(self, key: Key) -> int:
        return sum(
            key in one.keys and self.counts(key, one.sent_in)
            for one in [*self.attempts.values(), *self.records]
        )

    def counts(self, key: Key, generation: int) -> bool:
        return key not in self.resets or generation >= self.resets[key]

    def expire(self) -> None:
        for attempt in self.attempts.values():
            if attempt.state == "sent" and attempt.lease < self.now:
                attempt.state, attempt.counted_in = "charged", self.generation
        expired = [key for key, one in self.grants.items() if (one.lease or self.now) < self.now]
        for identity in expired:
            del self.grants[identity]

    def end_ownerless(self) -> bool:
        """What a process left that has ended, but for batches."""
        sent = [one for one in self.attempts.values() if one.state == "sent" and one.is_ownerless]
        open_ones = [key for key, one in self.grants.items() if one.is_ownerless]
        for attempt in sent:
            attempt.state, attempt.counted_in = "charged", self.generation
        for identity in open_ones:
            del self.grants[identity]
        return bool(sent or open_ones)

    def left(self, limit: Limit, keys: tuple[Key, ...], lane: str) -> int:
        key = self.window_of(limit, keys)
        return (
            limit.amount
            - self.spent(key, limit.unit)
            - self.held(key, limit.unit)
            - self.reserved(limit, key, lane)
        )

    def reserved(self, limit: Limit, key: Key, lane: str) -> int:
        if lane == "query":
            return 0
        queries = {
            other
            for other in self.known
            if other[1:] == ("query", *key[2:]) and limit.scope in (other[0], "*")
        }
        used = sum(
            self.spent(other, limit.unit) + self.held(other, limit.unit) for other in queries
        )
        return max(limit.reserved - used, 0)

    def window_of(self, limit: Limit, keys: tuple[Key, ...]) -> Key:
        (found,) = {key for key in keys if key[:3] == (limit.scope, "all", limit.period)}
        return found

    def verdict(
        self,
        keys: tuple[Key, ...],
        lane: str,
        limits: Sequence[Limit],
        amount: Amount,
        *,
        loose: bool = False,
        final: bool = True,
        waits: bool = True,
    ) -> str:
        left = {limit: self.left(limit, keys, lane) for limit in limits}
        wants_less = (
            limits
            and loose
            and not final
            and (
                self.tight_until > self.now
                or any(2 * amount.of(limit.unit) > left[limit] for limit in limits)
            )
        )
        failing = [limit for limit in limits if amount.of(limit.unit) > max(left[limit], 0)]
        if not wants_less and not failing:
            return "held"
        if self.end_ownerless():
            return self.verdict(keys, lane, limits, amount, loose=loose, final=final, waits=waits)
        if wants_less:
            return "tighter"
        may_become = {
            limit: left[limit] + self.held(self.window_of(limit, keys), limit.unit, only_loose=True)
            for limit in failing
        }
        if waits and all(
            amount.of(limit.unit) <= min(may_become[limit], most(limit, lane)) for limit in failing
        ):
            self.tight_until = self.now + TIGHT
            return "loosely"
        return "refused"

    def near(self, keys: tuple[Key, ...], limits: Sequence[Limit]) -> list[tuple[str, str, str]]:
        found = []
        for limit in limits:
            key = self.window_of(limit, keys)
            mark = (key, limit.unit, limit.amount)
            if self.spent(key, limit.unit) * 10 >= limit.amount * 9 and mark not in self.told:
                self.told.add(mark)
                found.append((limit.scope, limit.period, limit.unit))
        return found


class Unwatched(spool._Writer):
    """Nothing is written because time passes: the machine says when."""

    def _start(self) -> bool:
        return True


def most(limit: Limit, lane: str) -> int:
    """What a call of this lane could get of a window in which nothing is spent yet."""
    return limit.amount - (0 if lane == "query" else limit.reserved)


amounts = st.builds(Amount, tokens=st.integers(0, 60), cost=st.integers(0, 60))
scopes = st.sampled_from(["a", "a", "b", "*"])
lanes = st.sampled_from(["all", "all", "query"])
sides = st.integers(0, 1)


@st.composite
def limits_for(draw: st.DrawFn, scope: str) -> tuple[Limit, ...]:
    one = st.builds(
        lambda amount, share, **rest: Limit(amount=amount, reserved=min(share, amount), **rest),
        amount=st.sampled_from([0, 30, 60, 90, 120, 200, 1000]),
        share=st.sampled_from([0, 0, 20, 50]),
        scope=st.sampled_from([scope, "*"]),
        period=st.sampled_from(PERIODS),
        unit=st.sampled_from(UNITS),
    )
    return tuple(draw(st.lists(one, max_size=3)))


calls = scopes.flatmap(
    lambda scope: st.fixed_dictionaries(
        {
            "scope": st.just(scope),
            "limits": limits_for(scope),
            "lane": lanes,
            "loose": st.booleans(),
            "final": st.booleans(),
        }
    )
)


class LedgerMachine(RuleBasedStateMachine):
    grants = Bundle("grants")
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "state.db"

    @initialize(
        zone=st.sampled_from(["UTC", "UTC", "America/Sao_Paulo", "Pacific/Apia"]),
        start=st.sampled_from(
            ["2026-01-31 23:59:00", "2018-11-03 23:58:30", "2011-12-29 12:00:00"]
        ),
    )
    def open(self, zone: str, start: str) -> None:
        local = datetime.fromisoformat(start).replace(tzinfo=ZoneInfo(zone))
        self.model = Model(zone=zone, real=int(local.timestamp()))
        self.ledgers = [self._new(), self._new()]
        # What each of them has not written yet, and the limits that were told of when it was.
        self.waiting: list[list[Outcome]] = [[], []]
        self.told: list[Any] = []
        self.to_tell: list[tuple[str, str, str]] = []
        self.watcher, spool._writers = spool._writers, Lazy()  # type: ignore[misc]
        spool._writers.get(Unwatched)

    def _new(self) -> Ledger:
        return Ledger(
            Database(self.path, STATE, timeout=5),
            zone=self.model.zone,
            clock=lambda: self.model.real,
            lease=LEASE,
            attempt_lease=ATTEMPT_LEASE,
        )

    # Holding and sending

    def _attempt_hold(
        self, amount: Amount, call: dict[str, Any], ask: Any, *, carries: int | None = None
    ) -> Any:
        """Ask the ledger and the model, compare their answers; the handle, or None if refused.

        ``carries``: the side whose outcomes are written with it; all are before a refusal.
        """
        model = self.model
        model.tick()
        if carries is not None:
            self._written(carries)
        said, keys = self._verdict(amount, call)
        if said != "held" and carries is not None and any(self.waiting):
            self._all_written()
            said, keys = self._verdict(amount, call)
        will_near = any(
            (model.spent(key, one.unit) + model.held(key, one.unit) + amount.of(one.unit)) * 10
            >= one.amount * 9
            for one in call["limits"]
            for key in [model.window_of(one, keys)]
        )
        try:
            handle = ask() if carries is None else self.ledgers[carries].spool.asked(ask)
        except TighterBoundNeeded:
            assert said == "tighter"
        except HeldLoosely as wait:
            assert said == "loosely"
            self._check_refusal(wait.refusal, amount, call, keys, said)
        except BudgetExceeded as refusal:
            assert said == "refused"
            self._check_refusal(refusal, amount, call, keys, said)
        else:
            assert said == "held"
            grant = handle.grant if isinstance(handle, Attempt) else handle
            if "final" in call:
                assert grant.is_near == will_near
            return handle
        return None

    def _verdict(self, amount: Amount, call: dict[str, Any]) -> tuple[str, tuple[Key, ...]]:
        model = self.model
        model.expire()
        keys = model.keys(call["scope"], call["lane"])
        said = model.verdict(
            keys,
            call["lane"],
            call["limits"],
            amount,
            loose=call.get("loose", False),
            final=call.get("final", True),
            waits=call.get("waits", True),
        )
        return said, keys

    def _check_refusal(
        self,
        error: BudgetExceeded,
        amount: Amount,
        call: dict[str, Any],
        keys: tuple[Key, ...],
        said: str,
    ) -> None:
        model, lane = self.model, call["lane"]
        unit = "tokens" if type(error).__name__.startswith("Token") else "cost"

        def told(number: int) -> int | Decimal:
            return number if unit == "tokens" else in_dollars(number)

        failing = [
            limit
            for limit in call["limits"]
            if amount.of(limit.unit) > max(model.left(limit, keys, lane), 0)
        ]
        assert (unit, error.period, error.scope, error.limit) in [
            (limit.unit, limit.period, limit.scope, told(limit.amount))
            for limit in failing
            if limit.unit == unit
        ]
        key = (error.scope, "all", error.period, _start_of(keys, error.period))
        spent, held = model.spent(key, unit), model.held(key, unit)
        assert (error.spent, error.held) == (told(spent), told(held))
        assert error.asked == told(amount.of(unit))
        never = [amount.of(limit.unit) > most(limit, lane) for limit in failing]
        assert error.never_fits is any(never)
        assert not (error.never_fits and said == "loosely")
        if not error.never_fits:
            longest = max(PERIODS.index(limit.period) for limit in failing)
            assert error.period == PERIODS[longest]

    def _within(self, call: dict[str, Any], keys: tuple[Key, ...], amount: Amount) -> None:
        """No limit of the caller is exceeded, by the file's own counters."""
        rows = self._windows()
        for limit in call["limits"]:
            window = rows[self.model.window_of(limit, keys)]
            used = window[f"{limit.unit}_spent"] + window[f"{limit.unit}_held"]
            kept = self.model.reserved(limit, self.model.window_of(limit, keys), call["lane"])
            assert used + kept <= limit.amount or not amount.of(limit.unit)

    @rule(
        target=grants,
        side=sides,
        amount=amounts,
        call=calls,
        leased=st.sampled_from([1, 1, 0]),
        carries=st.booleans(),
    )
    def hold(
        self, side: int, amount: Amount, call: dict[str, Any], leased: int, carries: bool
    ) -> Any:
        grant = self._attempt_hold(
            amount,
            call,
            partial(self.ledgers[side].hold, amount=amount, **call, leased=bool(leased)),
            carries=side if carries else None,
        )
        if grant is None:
            return multiple()
        self._open(grant, amount, leased=bool(leased))
        self._within(call, self.model.grants[grant.id].keys, amount)
        return grant

    @rule(
        target=attempts,
        side=sides,
        amount=amounts,
        call=calls,
        carries=st.sampled_from([True, True, False]),
    )
    def hold_and_send(self, side: int, amount: Amount, call: dict[str, Any], carries: bool) -> Any:
        attempt = self._attempt_hold(
            amount,
            call,
            partial(self.ledgers[side].hold_and_send, amount=amount, **call),
            carries=side if carries else None,
        )
        if attempt is None:
            return multiple()
        self._open(attempt.grant, Amount(), leased=True)
        self._send(attempt, self.model.grants[attempt.grant.id].keys)
        self._within(call, self.model.attempts[attempt.id].keys, amount)
        return attempt

    @rule(target=attempts, side=sides, grant=grants, share=amounts, fresh=st.booleans())
    def send(self, side: int, grant: Grant, share: Amount, fresh: bool) -> Any:
        return self._send_of(side, grant, share, fresh)

    @rule(target=attempts, side=sides, grant=grants, share=amounts, fresh=st.booleans())
    def send_with_outcomes(self, side: int, grant: Grant, share: Amount, fresh: bool) -> Any:
        """They are written first; whatever the limits say then."""
        self.flush(1 - side)
        self.model.tick()
        self._written(side)
        ledger = self.ledgers[side]
        plain, ledger.send = (
            ledger.send,
            lambda *amount, **how: ledger.spool.asked(  # type: ignore[method-assign]
                partial(plain, *amount, **how)
            ),
        )
        try:
            return self._send_of(side, grant, share, fresh)
        finally:
            ledger.send = plain  # type: ignore[method-assign]

    @rule(target=attempts, side=sides, attempt=attempts, fresh=st.booleans())
    def send_again(self, side: int, attempt: Attempt, fresh: bool) -> Any:
        return self._send_of(side, attempt.grant, attempt.amount, fresh)

    def _send_of(self, side: int, grant: Grant, share: Amount, fresh: bool) -> Any:
        model = self.model
        model.tick()
        mine = model.grants.get(grant.id)
        if mine is not None and mine.lease is not None:
            mine.lease, mine.is_ownerless = model.now + LEASE, False
        if not self._moved(side, grant, share, fresh):
            return multiple()
        if (
            not fresh
            and mine is not None
            and mine.amount.tokens >= share.tokens
            and mine.amount.cost >= share.cost
        ):
            attempt = self.ledgers[side].send(grant, share)
            mine.amount = Amount(
                tokens=mine.amount.tokens - share.tokens, cost=mine.amount.cost - share.cost
            )
            self._send(attempt, mine.keys)
            return attempt
        call = {"scope": grant.scope, "lane": grant.lane, "limits": grant.limits, "waits": False}
        attempt = self._attempt_hold(
            share, call, lambda: self.ledgers[side].send(grant, share, fresh=fresh)
        )
        if attempt is None:
            return multiple()
        self._send(attempt, model.keys(grant.scope, grant.lane))
        self._within(call, model.attempts[attempt.id].keys, share)
        return attempt

    def _moved(self, side: int, grant: Grant, share: Amount, fresh: bool) -> bool:
        """What is left of a grant of another day is held in this one, or not at all any more."""
        model = self.model
        keys = model.keys(grant.scope, grant.lane)
        mine = model.grants.get(grant.id)
        if mine is None or mine.lease is None or mine.keys == keys:
            return True
        model.expire()
        del model.grants[grant.id]
        changed = tuple(
            limit
            for limit in grant.limits
            if model.window_of(limit, keys) != model.window_of(limit, mine.keys)
        )
        call = {"scope": grant.scope, "lane": grant.lane, "limits": changed}
        if model.verdict(keys, grant.lane, changed, mine.amount, waits=False) == "refused":
            with pytest.raises(BudgetExceeded) as refusal:
                self.ledgers[side].send(grant, share, fresh=fresh)
            self._check_refusal(refusal.value, mine.amount, call, keys, "refused")
            return False
        mine.keys = keys
        model.grants[grant.id] = mine
        return True

    def _open(self, grant: Grant, left: Amount, *, leased: bool) -> None:
        self.model.grants[grant.id] = Counted(
            keys=self.model.keys(grant.scope, grant.lane),
            amount=left,
            state="open",
            loose=grant.loose,
            lease=self.model.now + LEASE if leased else None,
        )

    def _send(self, attempt: Attempt, keys: tuple[Key, ...]) -> None:
        self.model.attempts[attempt.id] = Counted(
            keys=keys,
            amount=attempt.amount,
            state="sent",
            loose=attempt.grant.loose,
            lease=self.model.now + ATTEMPT_LEASE,
            sent_in=self.model.generation,
        )

    # How an attempt ends; every rule may meet one that has ended already

    @rule(
        side=sides,
        attempt=attempts,
        actual=st.one_of(st.none(), amounts),
        close=st.booleans(),
    )
    def settle(self, side: int, attempt: Attempt, actual: Amount | None, close: bool) -> None:
        self.model.tick()
        actual = attempt.amount if actual is None else actual
        near = self.ledgers[side].settle(attempt, actual, close=close)
        self._was_settled(attempt, actual)
        if close:
            self.model.grants.pop(attempt.grant.id, None)
        self._check_near(attempt, near)

    def _was_settled(self, attempt: Attempt, actual: Amount) -> None:
        mine = self.model.attempts[attempt.id]
        if mine.state == "sent":
            mine.counted_in = self.model.generation
        if mine.state in ("sent", "charged"):
            mine.state, mine.amount = "settled", actual

    @rule(side=sides, attempt=attempts, actual=st.one_of(st.none(), amounts))
    def charge(self, side: int, attempt: Attempt, actual: Amount | None) -> None:
        self.model.tick()
        near = self.ledgers[side].charge(attempt, actual=actual, note="lost")
        self._was_charged(attempt, actual)
        self._check_near(attempt, near)

    def _was_charged(self, attempt: Attempt, actual: Amount | None) -> None:
        mine = self.model.attempts[attempt.id]
        if mine.state == "sent":
            mine.state, mine.counted_in = "charged", self.model.generation
            mine.amount = attempt.amount if actual is None else actual

    @rule(side=sides, attempt=attempts)
    def give_back(self, side: int, attempt: Attempt) -> None:
        self.model.tick()
        has_it = self.ledgers[side].give_back(attempt)
        assert has_it == self._was_returned(attempt)

    def _was_returned(self, attempt: Attempt) -> bool:
        mine = self.model.attempts[attempt.id]
        grant = self.model.grants.get(attempt.grant.id)
        has_it = mine.state == "sent" and grant is not None and grant.keys == mine.keys
        if grant is not None and has_it:
            grant.amount = grant.amount + mine.amount
        if mine.state in ("sent", "charged"):
            mine.state = "returned"
        return has_it

    def _check_near(self, attempt: Attempt, near: Sequence[Any]) -> None:
        expected = self._near(attempt)
        assert [(one.scope, one.period, one.unit) for one in near] == expected

    def _near(self, attempt: Attempt) -> list[tuple[str, str, str]]:
        return self.model.near(self.model.attempts[attempt.id].keys, attempt.grant.limits)

    # The same by way of the spool

    @rule(
        side=sides,
        attempt=attempts,
        what=st.sampled_from(["settled", "settled", "settled", "charged", "returned"]),
        actual=amounts,
        closes=st.booleans(),
    )
    def ends_later(
        self, side: int, attempt: Attempt, what: Any, actual: Amount, closes: bool
    ) -> None:
        outcome = Outcome(
            what=what,
            grant=attempt.grant,
            attempt=attempt,
            actual=None if what == "returned" else actual,
            closes=closes,
            tell=self.told.append,
        )
        self._add(side, outcome)

    @rule(side=sides, grant=grants)
    def closes_later(self, side: int, grant: Grant) -> None:
        self._add(side, Outcome(what="closed", grant=grant))

    def _add(self, side: int, outcome: Outcome) -> None:
        self.waiting[side].append(outcome)
        if outcome.grant.is_near:
            self.model.tick()
            self._written(side, outcome, add=True)
        else:
            self.ledgers[side].spool.add(outcome)

    @rule(side=sides)
    def flush(self, side: int) -> None:
        outcomes = list(self.waiting[side])
        if outcomes:
            self.model.tick()
        self._written(side, flush=True)
        if outcomes:
            # Written once more, after an interrupt say, they change nothing.
            self.ledgers[side].write(outcomes)
            self.model.tick()

    def _written(self, side: int, *added: Outcome, add: bool = False, flush: bool = False) -> None:
        """The ledger writes its outcomes now, or will before anything else: so does the model."""
        expected, grants = [], self.model.grants
        for outcome in self.waiting[side]:
            attempt = outcome.attempt
            if attempt is not None and outcome.what == "settled":
                self._was_settled(attempt, outcome.actual or Amount())
            elif attempt is not None and outcome.what == "charged":
                self._was_charged(attempt, outcome.actual)
            elif attempt is not None:
                self._was_returned(attempt)
            if attempt is not None and outcome.what != "returned":
                expected += self._near(attempt)
            if outcome.closes or outcome.what == "closed":
                grants.pop(outcome.grant.id, None)
        self.waiting[side].clear()
        self.to_tell += expected
        if add:
            self.ledgers[side].spool.add(*added)
        if flush:
            self.ledgers[side].spool.flush()

    def _all_written(self) -> None:
        """In the order in which they first had something."""
        order = list(spool._writers.get(Unwatched)._spools)
        sides = [side for side in (0, 1) if self.waiting[side]]
        for side in sorted(sides, key=lambda side: order.index(self.ledgers[side].spool)):
            self._written(side)

    @rule(side=sides)
    def process_is_killed(self, side: int) -> None:
        """What waited in it stays as it is: held, until the lease ends."""
        ledger = self.ledgers[side]
        ledger.spool._own.take()
        ledger.database.close()
        self.waiting[side].clear()
        self.ledgers[side] = self._new()

    @rule(side=sides, grant=grants)
    def close(self, side: int, grant: Grant) -> None:
        self.ledgers[side].close(grant)
        self.model.grants.pop(grant.id, None)

    @rule(side=sides, grant=grants)
    def renew(self, side: int, grant: Grant) -> None:
        self.model.tick()
        self.ledgers[side].renew(grant)
        mine = self.model.grants.get(grant.id)
        if mine is not None and mine.lease is not None:
            mine.lease, mine.is_ownerless = self.model.now + LEASE, False

    # By hand

    @rule(side=sides, scope=scopes, amount=amounts)
    def record(self, side: int, scope: str, amount: Amount) -> None:
        model = self.model
        model.tick()
        self.ledgers[side].record(scope, amount)
        model.records.append(
            Counted(
                keys=model.keys(scope, "all"),
                amount=amount,
                state="recorded",
                sent_in=model.generation,
                counted_in=model.generation,
            )
        )

    @rule(side=sides, scope=scopes)
    def reset(self, side: int, scope: str) -> None:
        model = self.model
        model.tick()
        self._all_written()
        self.ledgers[side].reset(scope)
        keys = model.keys(scope, "query")
        model.generation += 1
        for day in (keys[0], keys[6]):
            model.resets[day] = model.generation
            model.told = {mark for mark in model.told if mark[:2] != (day, "tokens")}

    @rule(side=sides, attempt=attempts, charged=st.one_of(st.none(), amounts), actual=amounts)
    def answer_after_a_charge(
        self, side: int, attempt: Attempt, charged: Amount | None, actual: Amount
    ) -> None:
        self.charge(side, attempt, charged)
        self.settle(side, attempt, actual, close=False)

    @rule(side=sides, attempt=attempts, charged=st.one_of(st.none(), amounts), actual=amounts)
    def answer_after_a_charge_and_a_reset(
        self, side: int, attempt: Attempt, charged: Amount | None, actual: Amount
    ) -> None:
        self.charge(side, attempt, charged)
        self.reset(1 - side, attempt.grant.scope)
        self.settle(side, attempt, actual, close=False)

    # Time and accidents

    @rule(seconds=st.sampled_from([1, 4, 30, 61, 90, 3600, 86_400, 40 * 86_400]))
    def time_passes(self, seconds: int) -> None:
        self.model.real += seconds

    @rule(seconds=st.sampled_from([1, 70, 3600, 86_400, 40 * 86_400]))
    def clock_goes_back(self, seconds: int) -> None:
        self.model.real -= seconds

    @rule(side=sides)
    def clock_is_repaired(self, side: int) -> None:
        model = self.model
        model.tick()
        before, after = self.ledgers[side].repair_clock()
        assert (before, after) == (model.now, model.real)
        model.now, model.tight_until = model.real, 0
        model.keys("*", "all")
        for grant in model.grants.values():
            if grant.lease is not None:
                grant.lease = min(grant.lease, model.now + LEASE)
        for attempt in model.attempts.values():
            attempt.lease = min(attempt.lease, model.now + ATTEMPT_LEASE)

    @rule(side=sides)
    def file_is_reopened(self, side: int) -> None:
        if self.waiting[side]:
            self.model.tick()
        self._written(side)
        self.ledgers[side].end()
        self.ledgers[side] = self._new()

    @rule(which=st.sampled_from([(0, 2), (1, 2), (0, 1)]), side=sides)
    def their_process_has_ended(self, which: tuple[int, int], side: int) -> None:
        """Of every second grant and attempt, or of all. Whoever held them may not know."""
        model = self.model
        # In the order in which they were made: the ids of grants are random.
        grants = list(model.grants)[which[0] :: which[1]]
        sent = [key for key, one in model.attempts.items() if one.state == "sent"]
        attempts = sent[which[0] :: which[1]]
        with self.ledgers[side].database.transaction() as connection:
            for table, identities in (('"grant"', grants), ("attempt", attempts)):
                connection.executemany(
                    f"UPDATE {table} SET owner = ? WHERE id = ?",
                    [(ENDED, identity) for identity in identities],
                )
        for identity in grants:
            model.grants[identity].is_ownerless = model.grants[identity].lease is not None
        for identity in attempts:
            model.attempts[identity].is_ownerless = True

    @rule(side=sides)
    def usage_is_read(self, side: int) -> None:
        """What is shown as held is what somebody may still send."""
        model = self.model
        model.tick()
        self._all_written()
        shown = usage.windows_now(self.ledgers[side])
        model.expire()
        model.end_ownerless()
        for one in shown:
            key = (one.scope, "all", one.period, one.start)
            for unit in UNITS:
                assert one.held.of(unit) == model.held(key, unit)
                assert one.spent.of(unit) == model.spent(key, unit)

    @rule(side=sides)
    def process_dies_within_a_transaction(self, side: int) -> None:
        database = self.ledgers[side].database
        with contextlib.suppress(KeyboardInterrupt), database.transaction() as connection:
            connection.execute("UPDATE window SET tokens_held = tokens_held + 7")
            connection.execute('DELETE FROM "grant"')
            raise KeyboardInterrupt

    # What must hold after every step

    @invariant()
    def the_file_agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        for key, row in self._windows().items():
            expected = {
                f"{unit}_{what}": getattr(self.model, what)(key, unit)
                for unit in UNITS
                for what in ("spent", "held")
            }
            expected["requests"] = self.model.requests(key)
            assert row == expected, key
            assert min(row.values()) >= 0

    @invariant()
    def who_is_near_a_limit_was_told(self) -> None:
        if hasattr(self, "model"):
            assert [(one.scope, one.period, one.unit) for one in self.told] == self.to_tell

    @invariant()
    def nothing_is_found_wrong(self) -> None:
        """Not even by reading all of it, in whatever state it is."""
        if hasattr(self, "model"):
            found = inspection.faults(self.ledgers[1].database)
            assert found.counters == []
            assert [one for one in found.others if "for no batch" not in one] == []

    def _windows(self) -> dict[Key, dict[str, int]]:
        names = ("tokens_spent", "cost_spent", "tokens_held", "cost_held", "requests")
        with self.ledgers[0].database.read() as connection:
            rows = connection.execute(
                f"SELECT scope, lane, period, start, {', '.join(names)} FROM window"
            ).fetchall()
        found = {tuple(row[:4]): dict(zip(names, row[4:], strict=True)) for row in rows}
        assert set(found) == self.model.known
        return found

    def teardown(self) -> None:
        """Everybody dies: when all leases are over, and the batches closed, nothing is held."""
        if hasattr(self, "model"):
            self.flush(0)
            self.flush(1)
            spool._writers = self.watcher  # type: ignore[misc]
            for grant in [key for key, one in self.model.grants.items() if one.lease is None]:
                handle = Grant(id=grant, scope="a", lane="all", limits=(), loose=False)
                self.ledgers[0].close(handle)
                self.ledgers[1].close(handle)
                del self.model.grants[grant]
            self.model.tick()
            self.model.real = self.model.now + ATTEMPT_LEASE + 1
            call = {"scope": "a", "lane": "all", "limits": ()}
            last = self._attempt_hold(Amount(), call, lambda: self.ledgers[1].hold("a", Amount()))
            self._open(last, Amount(), leased=True)
            self.the_file_agrees()
            held = [(row["tokens_held"], row["cost_held"]) for row in self._windows().values()]
            assert set(held) == {(0, 0)}
            for ledger in self.ledgers:
                ledger.database.close()
        self.folder.cleanup()


def _start_of(keys: tuple[Key, ...], period: str) -> str:
    return next(key[3] for key in keys if key[2] == period)


class MidnightMachine(RuleBasedStateMachine):
    """One limit of each period, the same for all calls, and a server that bills what is sent.

    What it billed on a day, in a month and in total never passes the limit of that window,
    whenever the money was held.
    """

    grants = Bundle("grants")
    attempts = Bundle("attempts")
    ZONE = "America/Sao_Paulo"
    LIMITS = tuple(
        Limit(scope=scope, period=period, unit="tokens", amount=amount)  # type: ignore[arg-type]
        for scope, period, amount in [
            ("a", "day", 100),
            ("*", "day", 130),
            ("a", "month", 250),
            ("*", "total", 700),
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        start = datetime(2026, 1, 30, 23, 59, 50, tzinfo=ZoneInfo(self.ZONE))
        self.now = start.timestamp()
        self.ledger = Ledger(Database(None, STATE), zone=self.ZONE, clock=lambda: self.now)
        self.bill: dict[tuple[str, str, str], int] = {}

    def _billed(self, scope: str, tokens: int) -> None:
        local = datetime.fromtimestamp(self.now, tz=ZoneInfo(self.ZONE))
        for owner in (scope, "*"):
            for period, start in zip(PERIODS, (f"{local:%F}", f"{local:%Y-%m}", ""), strict=True):
                key = (owner, period, start)
                self.bill[key] = self.bill.get(key, 0) + tokens

    @rule(target=grants, scope=st.sampled_from("aab"), tokens=st.integers(1, 130))
    def hold(self, scope: str, tokens: int) -> Any:
        try:
            return self.ledger.hold(scope, Amount(tokens=tokens), self._limits(scope))
        except BudgetExceeded:
            return multiple()

    @rule(
        target=attempts,
        scope=st.sampled_from("aab"),
        tokens=st.integers(1, 130),
        waits=st.sampled_from([0, 0, 61]),
    )
    def hold_and_send(self, scope: str, tokens: int, waits: int) -> Any:
        """As a call of one request does, which may have to wait between the two."""
        try:
            attempt = self.ledger.hold_and_send(scope, Amount(tokens=tokens), self._limits(scope))
            self.now += waits
            if not self.ledger.is_timely(attempt):
                self.ledger.give_back(attempt)
                attempt = self.ledger.send(attempt.grant, attempt.amount)
        except BudgetExceeded:
            return multiple()
        self._billed(scope, tokens)
        return attempt

    @rule(target=attempts, grant=grants, tokens=st.integers(1, 60), fresh=st.booleans())
    def send(self, grant: Grant, tokens: int, fresh: bool) -> Any:
        try:
            attempt = self.ledger.send(grant, Amount(tokens=tokens), fresh=fresh)
        except BudgetExceeded:
            return multiple()
        self._billed(grant.scope, tokens)
        return attempt

    @rule(attempt=attempts)
    def settle(self, attempt: Attempt) -> None:
        self.ledger.settle(attempt, attempt.amount)

    @rule(attempt=attempts)
    def charge(self, attempt: Attempt) -> None:
        self.ledger.charge(attempt)

    @rule(grant=grants, tokens=st.integers(1, 60))
    def send_and_be_refused(self, grant: Grant, tokens: int) -> None:
        with contextlib.suppress(BudgetExceeded):
            self.ledger.give_back(self.ledger.send(grant, Amount(tokens=tokens)))

    @rule(grant=grants)
    def close(self, grant: Grant) -> None:
        self.ledger.close(grant)

    @rule(seconds=st.sampled_from([1, 5, 15, 15, 30, 90, 3600]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(days=st.sampled_from([0, 0, 0, 1, 40]))
    def a_day_nears_its_end(self, days: int) -> None:
        """Ten seconds before: less than a lease lasts."""
        local = datetime.fromtimestamp(self.now, tz=ZoneInfo(self.ZONE))
        last = local.replace(hour=23, minute=59, second=50, microsecond=0)
        self.now = max(last.timestamp(), self.now) + days * 86_400

    @rule(
        tokens=st.integers(1, 100),
        others=st.integers(0, 100),
        requests=st.integers(1, 4),
        days=st.sampled_from([0, 1, 40]),
    )
    def a_day_ends_in_a_call(self, tokens: int, others: int, requests: int, days: int) -> None:
        self.a_day_nears_its_end(days)
        grant = self.hold("a", tokens)
        self.now += 15
        self.hold_and_send("b", others, 0)
        self.hold_and_send("a", others // 2, 0)
        for share in [tokens // requests] * requests:
            if isinstance(grant, Grant):
                self.send(grant, share, False)

    def _limits(self, scope: str) -> tuple[Limit, ...]:
        return tuple(limit for limit in self.LIMITS if limit.scope in (scope, "*"))

    @invariant()
    def no_window_is_billed_beyond_its_limit(self) -> None:
        for (scope, period, start), billed in self.bill.items():
            for limit in self.LIMITS:
                if (limit.scope, limit.period) == (scope, period):
                    assert billed <= limit.amount, (scope, period, start)

    def teardown(self) -> None:
        self.ledger.database.close()


MARKS = [pytest.mark.fault(number) for number in (87, 88, 90, 91, 94, 95, 96, 100)]

TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    # Shrinking takes minutes and a failure is found in seconds: add Phase.shrink to study one.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    report_multiple_bugs=False,
    max_examples=settings.default.max_examples,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLedger.pytestmark = MARKS

TestMidnight = MidnightMachine.TestCase
TestMidnight.settings = TestLedger.settings
TestMidnight.pytestmark = [pytest.mark.case("C4"), pytest.mark.fault(88)]
