"""A day ends in the middle of a call: what leaves after it is paid by the new one, or not sent."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from embedcore.errors import ProviderUnavailable, TokenBudgetExceeded
from embedcore.events import Refused
from embedcore.policy.ratelimit.pace import Rates
from embedcore.policy.ratelimit.queue import Gate
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import FakeClock, FakeEmbedder
from embedcore.testing.fakes.embedder import FAKE_INFO

pytestmark = [pytest.mark.case("C4"), pytest.mark.fault(88)]

NARROW = replace(FAKE_INFO, dimensions=8, max_texts_per_request=4)
# Each of one token, four to a request.
TEXTS = [f"{number:04}" for number in range(12)]
LIMIT = 12


@pytest.fixture
def clock():
    return FakeClock(datetime(2026, 1, 31, 23, 59, 50, tzinfo=UTC))


@pytest.fixture
def at_midnight(desk, clock):
    """A desk whose day ends while the request of this number is at the provider; others then spend
    so many tokens of the new one."""

    def make(request, *, others, error=None, **options):
        ledger = Ledger(Database(None, STATE), clock=clock.time)

        def script(_, number):
            if number != request:
                return None
            clock.advance(20)
            if others:
                spent = ledger.hold_and_send("default", Amount(tokens=others))
                ledger.settle(spent, Amount(tokens=others), close=True)
            return error

        embedder = FakeEmbedder(info=NARROW, script=script)
        options = {"daily": LIMIT, "threads": 1, "clock": clock} | options
        return desk(embedder, ledger=ledger, **options)

    return make


def spent_by_day(one):
    one.ledger.spool.flush()
    with one.ledger.database.read() as connection:
        rows = connection.execute(
            "SELECT start, tokens_spent, tokens_held FROM window WHERE scope = 'default' "
            "AND period = 'day' AND lane = 'all' ORDER BY start"
        ).fetchall()
    assert not any(held for _, _, held in rows)
    return [spent for _, spent, _ in rows]


@pytest.mark.parametrize("others", [0, 4])
def test_what_leaves_after_midnight_is_the_new_days(at_midnight, others):
    with at_midnight(0, others=others) as one:
        result = one.embed(TEXTS)
        one.right(result, TEXTS)
        assert spent_by_day(one) == [4, 8 + others]


def test_what_does_not_fit_the_new_day_ends_the_call_with_what_it_has(at_midnight):
    with at_midnight(1, others=9) as one:
        with pytest.raises(TokenBudgetExceeded) as refusal:
            one.embed(TEXTS)
        error = refusal.value
        assert (error.asked, error.spent, error.held, error.limit) == (4, 9, 0, LIMIT)
        assert error.partial.ok.tolist() == [True] * 8 + [False] * 4
        assert spent_by_day(one) == [8, 9]
        assert len(one.told(Refused)) == 1
        # Nothing is held: what fits the new day may be sent at once.
        assert one.embed(["a", "b", "c"]).ok.all()
        assert spent_by_day(one) == [8, 12]


def test_a_request_that_waited_at_the_gate_is_the_new_days(desk, clock):
    """Held and sent in one commit, before it had to wait."""
    ledger = Ledger(Database(None, STATE), clock=clock.time)
    gate = Gate(monotonic=clock.monotonic)
    options = {"gate": gate, "rates": Rates(requests_per_minute=1), "clock": clock}
    with desk(FakeEmbedder(info=NARROW), daily=LIMIT, ledger=ledger, **options) as one:
        for _ in range(2):
            assert one.embed(TEXTS[:4]).ok.all()
        assert spent_by_day(one) == [4, 4]


def test_a_request_that_waited_and_does_not_fit_any_more_is_not_sent(desk, clock):
    ledger = Ledger(Database(None, STATE), clock=clock.time)
    gate = Gate(monotonic=clock.monotonic)
    options = {"gate": gate, "rates": Rates(requests_per_minute=1), "clock": clock}
    with desk(FakeEmbedder(info=NARROW), daily=LIMIT, ledger=ledger, **options) as one:
        one.embed(TEXTS[:4])
        waits = clock.wait

        def others_spend(*arguments):
            waited = waits(*arguments)
            if clock.now().month == 2 and usage.of_scope(ledger, "default").requests == 0:
                ledger.record("default", Amount(tokens=9))
            return waited

        one.engine = replace(one.engine, wait_for=others_spend)
        with pytest.raises(TokenBudgetExceeded):
            one.embed(TEXTS[:4])
        assert spent_by_day(one) == [4, 9]
        assert one.embedder.meter.billed_requests == 1


def test_a_retry_after_midnight_is_paid_by_the_new_day(at_midnight):
    with at_midnight(0, others=0, error=ProviderUnavailable("busy", billed="no")) as one:
        one.right(one.embed(TEXTS), TEXTS)
        assert spent_by_day(one) == [0, 12]


def test_a_retry_that_the_new_day_does_not_allow_is_not_made(at_midnight):
    with at_midnight(0, others=2, error=ProviderUnavailable("busy", billed="no")) as one:
        with pytest.raises(ProviderUnavailable) as failure:
            one.embed(TEXTS)
        assert failure.value.budget_blocked
        assert isinstance(failure.value.__cause__, TokenBudgetExceeded)
        assert spent_by_day(one) == [0, 2]
        assert one.embedder.meter.billed_requests == 0
