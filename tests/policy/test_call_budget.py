"""Is the money of a call held, moved and released as it should be, whatever happens around it?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedcore.errors import ConfigurationError, OutcomeUnknown, RateLimited, TokenBudgetExceeded
from embedcore.events import LimitNear, Refused, Reserved, Settled
from embedcore.money import in_dollars
from embedcore.policy.budget import Account, CallBudget
from embedcore.policy.planning import PlannedRequest
from embedcore.policy.threads import Pause, Stopped
from embedcore.provider.types import ModelInfo, Price
from embedcore.storage import usage
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import FakeClock

INFO = ModelInfo(provider="fake", model="m", price=Price(immediate="0.02"))


class Till:
    """A budget over a ledger in memory, with a clock that stands still."""

    def __init__(self, limit=None, *, info=INFO, local=False, wait=0.0, **ledger):
        self.clock = FakeClock()
        self.ledger = Ledger(Database(None, STATE), clock=self.clock.time, **ledger)
        self.limits = (
            ()
            if limit is None
            else (Limit(scope="default", period="day", unit="tokens", amount=limit),)
        )
        self.events = []
        self.budget = CallBudget(
            Account(ledger=None if local else self.ledger, limits=self.limits, wait=wait),
            info,
            lane="all",
            observe=self.events.append,
            pause=self.clock.sleep,
            monotonic=self.clock.monotonic,
        )

    def open(self, *amounts, loose=None, send_now=False, exact=True):
        """Open for requests of these tokens; ``loose``: their bounds before they are counted."""

        def plan(counted):
            chosen = amounts if counted or loose is None else loose
            return [
                PlannedRequest(indices=(index,), amount=self.budget.price(tokens))
                for index, tokens in enumerate(chosen)
            ]

        return self.budget.open(plan, exact=lambda: exact, send_now=send_now)

    def send(self, tokens, *, fresh=False):
        return self.budget.send(self.budget.price(tokens), inputs=1, fresh=fresh)

    @property
    def held(self):
        return usage.of_scope(self.ledger, "default").held.tokens

    @property
    def spent(self):
        return usage.of_scope(self.ledger, "default").spent.tokens

    def told(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def till():
    opened = []

    def make(*arguments, **options):
        opened.append(Till(*arguments, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.ledger.database.close()


def test_the_whole_call_is_held_at_once_and_moved_request_by_request(till):
    one = till(100)
    one.open(10, 20)
    assert (one.held, one.spent) == (30, 0)
    first = one.send(10)
    assert (one.held, one.spent) == (30, 0)
    one.budget.settle(first, 7, "id")
    assert (one.held, one.spent) == (20, 7)
    one.budget.close()
    one.budget.close()
    assert (one.held, one.spent) == (0, 7)
    assert one.budget.spending.requests == 1
    assert [event.tokens for event in one.told(Reserved)] == [30]
    assert [event.tokens for event in one.told(Settled)] == [7]


def test_one_request_is_held_and_sent_in_one_commit_and_closed_in_another(till):
    one = till(100)
    one.open(10, send_now=True)
    assert one.held == 10
    attempt = one.send(10)
    one.budget.settle(attempt, 9, None)
    assert (one.held, one.spent) == (0, 9)
    one.ledger.close = None  # closing once more would be a third commit
    one.budget.close()


def test_what_was_to_leave_at_once_and_did_not_is_given_back(till):
    one = till(100)
    one.open(10, send_now=True)
    one.budget.close()
    assert (one.held, one.spent) == (0, 0)


def test_nothing_leaves_a_closed_purse(till):
    for local in (False, True):
        one = till(100, local=local)
        one.open(10)
        one.budget.close()
        with pytest.raises(Stopped):
            one.send(10)
        assert (one.held, one.spent) == (0, 0)
        assert one.budget.spending.requests == 0


@pytest.mark.fault(97)
def test_bytes_are_held_only_while_they_take_less_than_half(till):
    one = till(100)
    one.open(10, loose=[40])
    assert one.held == 40
    other = till(100)
    other.open(25, loose=[60])
    assert other.held == 25
    refused = till(100)
    with pytest.raises(TokenBudgetExceeded) as caught:
        refused.open(101, loose=[404])
    assert caught.value.asked == 101
    assert caught.value.never_fits
    assert len(refused.told(Refused)) == 1
    assert refused.held == 0


def test_a_call_waits_for_what_others_hold_loosely_and_not_for_more(till):
    one = till(100, wait=10.0)
    loose = one.ledger.hold("default", Amount(tokens=80), one.limits, loose=True)
    began = one.clock.monotonic()
    with pytest.raises(TokenBudgetExceeded):
        one.open(50)
    assert 10 <= one.clock.monotonic() - began < 12
    one.ledger.close(loose)
    one.ledger.hold("default", Amount(tokens=80), one.limits)
    began = one.clock.monotonic()
    with pytest.raises(TokenBudgetExceeded):
        one.open(50)
    assert one.clock.monotonic() == began


def test_a_call_that_waited_gets_its_turn(till):
    one = till(100, wait=10.0)
    loose = one.ledger.hold("default", Amount(tokens=80), one.limits, loose=True)
    sleep = one.clock.sleep

    def pause(seconds):
        sleep(seconds)
        if len(one.clock.sleeps) == 3:
            one.ledger.close(loose)

    one.budget._pause = pause
    one.open(50)
    assert one.held == 50


@pytest.mark.fault(87)
@pytest.mark.fault(146)
def test_a_lease_lasts_while_it_is_renewed_and_is_taken_anew_when_it_is_lost(till):
    one = till(100, lease=20)
    one.open(60, 30)
    for _ in range(5):
        one.clock.advance(15)
        one.budget.renew()
        one.ledger.close(one.ledger.hold("default", Amount(tokens=1), one.limits))
    assert one.held == 90
    one.clock.advance(25)
    one.ledger.close(one.ledger.hold("default", Amount(tokens=1), one.limits))
    assert one.held == 0
    attempt = one.send(60)
    assert one.held == 60
    one.budget.settle(attempt, 60, None)
    with pytest.raises(TokenBudgetExceeded):
        one.send(60)
    assert one.budget.spending.requests == 1
    one.budget.close()
    assert (one.held, one.spent) == (0, 60)


@pytest.mark.fault(29)
def test_one_rule_says_what_an_outcome_costs(till):
    one = till(100)
    one.open(10, 10, 10)
    refused, lost, unclear = one.send(10), one.send(10), one.send(10)
    assert not one.budget.account_for(refused, RateLimited("slow"), note="")
    assert one.budget.account_for(lost, OutcomeUnknown("?"), note="")
    odd = RateLimited("slow")
    odd.billed = "perhaps"
    assert one.budget.account_for(unclear, odd, note="")
    assert (one.held, one.spent) == (10, 20)
    assert one.budget.spending.unconfirmed_tokens == 20
    assert not one.budget.spending.exact
    one.budget.close()
    assert (one.held, one.spent) == (0, 20)


@pytest.mark.case("C4")
def test_what_goes_back_to_another_day_is_gone_for_a_retry(till):
    one = till(100)
    one.open(10, 10)
    refused = one.send(10)
    one.clock.advance(24 * 3600)
    one.budget.renew()
    moved = one.send(10)
    assert one.budget.account_for(refused, RateLimited("slow"), note="")
    assert not one.budget.account_for(moved, RateLimited("slow"), note="")
    assert one.held == 10
    one.budget.close()


@pytest.mark.case("C4")
def test_what_was_sent_with_its_hold_leaves_on_the_day_that_it_leaves(till):
    one = till(100)
    one.open(60, send_now=True)
    one.clock.advance(24 * 3600)
    assert one.held == 0
    attempt = one.send(60)
    assert one.held == 60
    one.budget.settle(attempt, 50, None)
    one.budget.close()
    assert (one.held, one.spent) == (0, 50)
    days = usage.windows_now(one.ledger, "default")
    assert [day.requests for day in days] == [1, 2, 2]


def test_a_late_answer_replaces_what_was_charged(till):
    one = till(100)
    one.open(10, 10)
    answered, refused = one.send(10), one.send(10)
    one.budget.charge(answered, note="")
    one.budget.charge(refused, note="")
    one.budget.close()
    assert one.spent == 20
    one.budget.correct(answered, None)
    assert one.spent == 20
    one.budget.correct(answered, 7)
    one.budget.account_for(refused, RateLimited("slow"), note="", late=True)
    assert (one.held, one.spent) == (0, 7)
    one.budget.account_for(answered, OutcomeUnknown("?"), note="", late=True)
    assert one.spent == 7


def test_what_was_not_sent_after_all_costs_nothing(till):
    one = till(100)
    one.open(10)
    one.budget.not_sent(one.send(10))
    assert one.budget.spending.requests == 0
    assert one.held == 10
    one.budget.close()
    assert (one.held, one.spent) == (0, 0)


def test_a_limit_nearly_used_up_is_told_once(till):
    one = till(100)
    one.open(91, 1)
    one.budget.settle(one.send(91), 91, None)
    one.budget.settle(one.send(1), 1, None)
    assert [(event.used, event.limit) for event in one.told(LimitNear)] == [(91, 100)]


def test_what_runs_here_costs_nothing(till):
    one = till(0, info=replace(INFO, price=None), local=True)
    one.open(10**9)
    attempt = one.send(10**9)
    assert attempt is None
    assert one.budget.settle(attempt, 5, None) == Amount(tokens=5)
    assert not one.budget.account_for(attempt, OutcomeUnknown("?"), note="")
    one.budget.correct(attempt, 5)
    one.budget.not_sent(attempt)
    one.budget.renew()
    one.budget.close()
    assert (one.held, one.spent) == (0, 0)


@pytest.mark.fault(98)
@pytest.mark.fault(99)
def test_money_is_counted_in_picodollars_rounded_up(till):
    one = till(info=replace(INFO, price=Price(immediate="0.0000001")))
    one.open(3)
    one.budget.settle(one.send(3), 3, None)
    assert one.budget.spending.cost == in_dollars(1)
    unpriced = CallBudget(
        Account(
            ledger=one.ledger,
            limits=(Limit(scope="default", period="day", unit="cost", amount=1),),
        ),
        replace(INFO, price=None),
        lane="all",
        observe=one.events.append,
        pause=Pause(),
    )
    assert unpriced.open(lambda _: [], exact=lambda: True, send_now=False) == []
    with pytest.raises(ConfigurationError, match="price"):
        unpriced.open(
            lambda _: [PlannedRequest(indices=(0,), amount=unpriced.price(3))],
            exact=lambda: True,
            send_now=False,
        )
