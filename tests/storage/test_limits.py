"""Who is refused, why, and for how long? And what happens to money at the end of a request."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import (
    BudgetExceeded,
    ConfigurationError,
    CostBudgetExceeded,
    StorageCorrupt,
    StorageError,
    TokenBudgetExceeded,
)
from embedcore.provider.types import Price
from embedcore.storage import counters, usage
from embedcore.storage.amounts import (
    Amount,
    Attempt,
    Grant,
    HeldLoosely,
    Limit,
    TighterBoundNeeded,
)
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE


def limit(amount: int, period: Any = "day", unit: Any = "tokens", **rest: Any) -> Limit:
    return Limit(**{"scope": "s", **rest}, period=period, unit=unit, amount=amount)


def tokens(number: int) -> Amount:
    return Amount(tokens=number)


def held(ledger: Ledger, scope: str = "s") -> Amount:
    return usage.of_scope(ledger, scope).held


def spent(ledger: Ledger, scope: str = "s") -> Amount:
    return usage.of_scope(ledger, scope).spent


@pytest.mark.fault(92)
def test_a_limit_of_zero_refuses_whatever_costs_something(ledger: Ledger) -> None:
    with pytest.raises(TokenBudgetExceeded) as refused:
        ledger.hold("s", tokens(1), [limit(0)])
    assert refused.value.never_fits
    assert not refused.value.retryable
    with pytest.raises(CostBudgetExceeded):
        ledger.hold("s", Amount(tokens=1, cost=1), [limit(0, unit="cost")])


def test_what_costs_nothing_is_not_refused_by_a_limit_that_is_overdrawn(ledger: Ledger) -> None:
    ledger.record("s", Amount(tokens=10, cost=500))
    ledger.hold("s", Amount(tokens=5, cost=0), [limit(400, unit="cost")])


@pytest.mark.fault(95)
def test_the_refusal_names_the_window_that_binds_and_when_it_ends(ledger: Ledger) -> None:
    ledger.record("s", tokens(95))
    both = [limit(100), limit(100, "month"), limit(1000, "total")]
    with pytest.raises(TokenBudgetExceeded) as refused:
        ledger.hold("s", tokens(20), both)
    error = refused.value
    assert (error.period, error.scope, error.limit) == ("month", "s", 100)
    assert (error.spent, error.held, error.asked) == (95, 0, 20)
    assert error.resets_at == datetime(2026, 2, 1, tzinfo=UTC)
    assert not error.never_fits
    for told in ("20 tokens", "100 tokens per month", "5 tokens are left", "2026-02-01 00:00"):
        assert told in str(error)
    assert held(ledger) == Amount()


@pytest.mark.fault(95)
def test_a_window_that_refuses_leaves_no_trace_in_the_others(ledger: Ledger) -> None:
    with pytest.raises(CostBudgetExceeded) as refused:
        ledger.hold("s", Amount(tokens=5, cost=50), [limit(100), limit(40, "total", "cost")])
    assert refused.value.resets_at is None
    assert "it never resets" in str(refused.value)
    assert all(row.held == Amount() for row in usage.windows_now(ledger))


@pytest.mark.fault(97)
@given(amount=st.integers(0, 1000), over=st.integers(1, 1000), used=st.integers(0, 2000))
@settings(deadline=None, max_examples=50)
def test_more_than_a_whole_limit_never_fits_whatever_else_is_in_the_way(
    amount: int, over: int, used: int
) -> None:
    """Not even when a window that ends later refuses as well: waiting for that one is no use."""
    ledger = Ledger(Database(None, STATE))
    ledger.record("s", tokens(used))
    with pytest.raises(TokenBudgetExceeded) as refused:
        ledger.hold("s", tokens(amount + over), [limit(amount), limit(2000, "month")])
    assert refused.value.never_fits
    assert refused.value.period == "day"


def test_bulk_work_never_gets_the_share_of_queries(ledger: Ledger) -> None:
    shared = [limit(100, reserved=40)]
    with pytest.raises(TokenBudgetExceeded) as refused:
        ledger.hold("s", tokens(61), shared)
    assert refused.value.never_fits
    assert "40 tokens kept for queries" in str(refused.value)
    ledger.hold("s", tokens(60), shared)
    query = ledger.hold_and_send("s", tokens(40), shared, lane="query")
    ledger.settle(query, tokens(40), close=True)
    with pytest.raises(TokenBudgetExceeded) as refused:
        ledger.hold("s", tokens(61), shared)
    assert refused.value.never_fits, "also after queries have used their share up"


def test_a_share_of_all_scopes_is_used_up_by_the_queries_of_each(ledger: Ledger) -> None:
    shared = [limit(100, scope="*", reserved=50)]
    for scope in ("s", "t"):
        ledger.settle(ledger.hold_and_send(scope, tokens(25), shared, lane="query"), tokens(25))
    ledger.hold("u", tokens(50), shared)


@pytest.mark.fault(94)
def test_a_lowered_limit_refuses_new_holds_and_lets_running_ones_finish(ledger: Ledger) -> None:
    grant = ledger.hold("s", tokens(80), [limit(100)])
    with pytest.raises(TokenBudgetExceeded):
        ledger.hold("s", tokens(1), [limit(50)])
    ledger.settle(ledger.send(grant, tokens(80)), tokens(80), close=True)
    assert spent(ledger) == tokens(80)
    ledger.hold("s", tokens(1), [limit(81)])


@pytest.mark.fault(96)
def test_projects_share_a_file_and_only_a_limit_over_all_scopes_sees_both(ledger: Ledger) -> None:
    ledger.record("a", tokens(60))
    ledger.hold("b", tokens(90), [limit(100, scope="b")])
    with pytest.raises(TokenBudgetExceeded) as refused:
        ledger.hold("b", tokens(1), [limit(150, scope="*"), limit(1000, scope="b")])
    assert (refused.value.scope, refused.value.spent, refused.value.held) == ("*", 60, 90)
    assert "for all scopes" in str(refused.value)


@pytest.mark.fault(100)
def test_every_ending_counts_once(ledger: Ledger) -> None:
    attempt = ledger.hold_and_send("s", tokens(50))
    for _ in range(2):
        ledger.settle(attempt, tokens(30), close=True)
        ledger.charge(attempt)
        ledger.give_back(attempt)
        ledger.close(attempt.grant)
    assert (spent(ledger), held(ledger)) == (tokens(30), Amount())


@pytest.mark.fault(100)
def test_a_charge_is_corrected_by_the_answer_and_by_proof_that_nothing_was_billed(
    ledger: Ledger,
) -> None:
    first, second = (ledger.hold_and_send("s", tokens(50)) for _ in range(2))
    for attempt in (first, second):
        ledger.charge(attempt, note="timed out")
        ledger.charge(attempt, note="timed out")
    assert spent(ledger) == tokens(100)
    for _ in range(2):
        ledger.settle(first, tokens(20))
        ledger.give_back(second)
    assert (spent(ledger), held(ledger)) == (tokens(20), Amount())


def test_what_is_given_back_pays_for_the_retry(ledger: Ledger) -> None:
    grant = ledger.hold("s", tokens(100), [limit(100)])
    ledger.give_back(ledger.send(grant, tokens(100)))
    halves = [ledger.send(grant, tokens(50)) for _ in range(2)]
    for half in halves:
        ledger.settle(half, tokens(50))
    assert (spent(ledger), held(ledger)) == (tokens(100), Amount())


def test_what_was_charged_must_be_held_anew(ledger: Ledger) -> None:
    grant = ledger.hold("s", tokens(60), [limit(100)])
    ledger.charge(ledger.send(grant, tokens(60)))
    with pytest.raises(TokenBudgetExceeded):
        ledger.send(grant, tokens(60), fresh=True)
    ledger.send(grant, tokens(40), fresh=True)


def test_a_retry_is_not_refused_for_what_a_dead_process_held(ledger: Ledger, clock: Any) -> None:
    ledger.hold("s", tokens(60), [limit(100)])  # its owner died
    clock.now += 30
    grant = ledger.hold("s", tokens(20), [limit(100)])
    clock.now += 50
    ledger.charge(ledger.send(grant, tokens(20)))
    ledger.send(grant, tokens(80), fresh=True)


def test_a_fresh_attempt_keeps_the_rest_of_its_grant(ledger: Ledger, clock: Any) -> None:
    grant = ledger.hold("s", tokens(50))
    for _ in range(3):
        clock.now += 50
        ledger.charge(ledger.send(grant, tokens(1), fresh=True))
        ledger.hold("t", tokens(0))  # closes what has expired
    assert held(ledger) == tokens(50)


@pytest.mark.fault(87)
def test_an_owner_that_lost_its_lease_holds_anew_or_fails(ledger: Ledger, clock: Any) -> None:
    grant = ledger.hold("s", tokens(60), [limit(100)])
    sent = ledger.send(grant, tokens(10))
    clock.now += 61
    ledger.hold("s", tokens(50), [limit(100)])
    with pytest.raises(TokenBudgetExceeded):
        ledger.send(grant, tokens(50))
    ledger.send(grant, tokens(40))
    clock.now += 700
    ledger.hold("t", tokens(0))
    assert spent(ledger) == tokens(50)
    ledger.settle(sent, tokens(4))
    assert spent(ledger) == tokens(44)


def test_a_lease_is_renewed_by_sending_and_by_waiting(ledger: Ledger, clock: Any) -> None:
    grant = ledger.hold("s", tokens(60))
    for number in range(4):
        clock.now += 45
        ledger.hold("t", tokens(0))
        ledger.renew(grant) if number % 2 else ledger.settle(
            ledger.send(grant, tokens(1)), tokens(1)
        )
    assert held(ledger) == tokens(58)
    batch = ledger.hold("s", tokens(5), leased=False)
    clock.now += 10**6
    ledger.hold("t", tokens(0))
    assert usage.windows_now(ledger, "s")[-1].held == tokens(5)
    ledger.close(batch)
    assert usage.windows_now(ledger, "s")[-1].held == Amount()


# Loose bounds


def test_a_loose_bound_is_asked_to_tighten_from_half_of_what_is_left(ledger: Ledger) -> None:
    ledger.record("s", tokens(20))
    ledger.hold("s", tokens(40), [limit(100)], loose=True, final=False)
    with pytest.raises(TighterBoundNeeded):
        ledger.hold("s", tokens(21), [limit(100)], loose=True, final=False)
    ledger.hold("s", tokens(21), [limit(100)], loose=True)
    ledger.hold("s", tokens(10**6), loose=True, final=False)


def test_a_refusal_due_to_loose_bounds_of_others_is_worth_waiting_for(
    ledger: Ledger, clock: Any
) -> None:
    loose = ledger.hold("s", tokens(40), [limit(100)], loose=True, final=False)
    with pytest.raises(HeldLoosely) as wait:
        ledger.hold("s", tokens(90), [limit(100)])
    assert wait.value.refusal.held == 40
    assert not wait.value.refusal.never_fits
    # Nobody may hold loosely meanwhile, however little: else the large call would starve.
    with pytest.raises(TighterBoundNeeded):
        ledger.hold("t", tokens(1), [limit(1000, scope="*")], loose=True, final=False)
    ledger.close(ledger.hold("s", tokens(1), [limit(100)]))
    attempt = ledger.send(loose, tokens(40))
    with pytest.raises(HeldLoosely):
        ledger.hold("s", tokens(90), [limit(100)])
    ledger.settle(attempt, tokens(10))
    ledger.hold("s", tokens(90), [limit(100)])
    clock.now += 6
    ledger.hold("t", tokens(1), [limit(1000, scope="*")], loose=True, final=False)


@pytest.mark.parametrize(("asked", "never"), [(61, False), (101, True)])
def test_a_refusal_that_waiting_cannot_mend_is_final(
    ledger: Ledger, asked: int, never: bool
) -> None:
    ledger.hold("s", tokens(40), [limit(100)])
    ledger.hold("s", tokens(0), [limit(100)], loose=True)
    with pytest.raises(TokenBudgetExceeded) as refused:
        ledger.hold("s", tokens(asked), [limit(100)])
    assert refused.value.never_fits is never


def test_bulk_work_does_not_wait_for_the_share_of_queries(ledger: Ledger) -> None:
    shared = [limit(100, reserved=50)]
    ledger.hold("s", tokens(50), shared, lane="query", loose=True)
    with pytest.raises(TokenBudgetExceeded) as refused:
        ledger.hold("s", tokens(60), shared)
    assert refused.value.never_fits


def test_a_retry_does_not_wait(ledger: Ledger) -> None:
    ledger.hold("s", tokens(40), [limit(100)], loose=True)
    grant = ledger.hold("s", tokens(50), [limit(100)])
    ledger.charge(ledger.send(grant, tokens(50)))
    with pytest.raises(BudgetExceeded):
        ledger.send(grant, tokens(50), fresh=True)


# Warnings, resets, records


def test_a_limit_is_reported_nearly_used_once_in_any_process(
    open_ledger: Callable[..., Ledger],
) -> None:
    ledgers = [open_ledger(), open_ledger()]
    told = []
    for number in range(10):
        attempt = ledgers[number % 2].hold_and_send("s", tokens(10), [limit(100), limit(200)])
        told.append(len(ledgers[number % 2].settle(attempt, tokens(10), close=True)))
    assert told == [0] * 8 + [1, 0]
    ledgers[0].reset("s")
    attempt = ledgers[0].hold_and_send("s", tokens(95), [limit(100)])
    (near,) = ledgers[1].charge(attempt)
    assert (near.scope, near.period, near.unit, near.used, near.limit) == (
        ("s", "day", "tokens", 95, 100)
    )


def test_reset_starts_the_day_of_one_scope_again(ledger: Ledger) -> None:
    charged, open_one = (ledger.hold_and_send("s", Amount(tokens=10, cost=7)) for _ in range(2))
    ledger.record("t", tokens(5))
    ledger.charge(charged)
    ledger.reset("s")
    day, month, total = usage.windows_now(ledger, "s")
    assert (day.spent, day.requests, day.held.tokens) == (Amount(tokens=0, cost=7), 0, 10)
    assert month.spent == total.spent == Amount(tokens=10, cost=7)
    assert spent(ledger, "t") == tokens(5)
    ledger.settle(charged, Amount(tokens=4, cost=3))
    assert spent(ledger) == Amount(tokens=0, cost=3), "a late correction leaves the new day alone"
    ledger.settle(open_one, Amount(tokens=10, cost=7))
    assert spent(ledger) == Amount(tokens=10, cost=10)
    assert usage.windows_now(ledger, "*")[0].spent == Amount(tokens=19, cost=10)
    assert [row["state"] for row in usage.audit(ledger)] == [
        ("settled"),
        ("settled"),
        ("recorded"),
        ("reset"),
    ]


def test_the_audit_keeps_every_attempt_and_what_became_of_it(ledger: Ledger) -> None:
    attempt = ledger.hold_and_send("s", Amount(tokens=9, cost=4), model="fake:m", inputs=3)
    ledger.settle(attempt, Amount(tokens=5, cost=2), request_id="req-1", close=True)
    ledger.charge(ledger.hold_and_send("s", tokens(7), model="fake:m"), note="timed out")
    ledger.settle(ledger.hold_and_send("s", tokens(6), model="fake:n"), tokens(6), reported=False)
    (row,) = usage.audit(ledger)[:1]
    assert (row["tokens"], row["actual_tokens"], row["cost"], row["actual_cost"]) == (9, 5, 4, 2)
    assert (row["model"], row["inputs"], row["request_id"]) == ("fake:m", 3, "req-1")
    assert row["sent"] == row["ended"] == "2026-01-15T12:00:00+00:00"
    assert len(usage.audit(ledger, last=1)) == 1
    today = [one for one in usage.by_model(ledger) if one.period == "day"]
    assert [(one.model, one.spent, one.requests) for one in today] == [
        ("fake:m", Amount(tokens=12, cost=2), 2),
        ("fake:n", tokens(6), 1),
    ]
    assert [one.unconfirmed for one in today] == [tokens(7), Amount()]
    assert [one.estimated for one in today] == [Amount(), tokens(6)]


def test_limits_can_be_shown_beside_what_is_left(ledger: Ledger) -> None:
    ledger.record("s", tokens(30))
    ledger.hold("s", tokens(5))
    (found,) = usage.limits_now(ledger, "s", [limit(100, reserved=20)], "all")
    assert (found.spent, found.held, found.reserved, found.left) == (30, 5, 20, 45)
    assert found.ends == datetime(2026, 1, 16, tzinfo=UTC)
    assert usage.of_scope(ledger, "nobody", "month").spent == Amount()


# Numbers


@pytest.mark.fault(99)
@pytest.mark.parametrize("settles", [20_000, pytest.param(10**6, marks=pytest.mark.campaign)])
def test_sums_of_money_are_exact(ledger: Ledger, settles: int) -> None:
    price = Price(immediate="0.1300001")  # type: ignore[arg-type]
    ledger.record("s", Amount())
    expected = 0
    with ledger.database.transaction() as connection:
        moment = ledger.moment_in(connection)
        windows = counters.ids(connection, "s", "all", moment)
        for number in range(settles):
            cost = price.picodollars(number % 997)
            expected += cost
            counters.hold(connection, windows, Amount(cost=cost + 1))
            counters.settle(connection, windows, Amount(cost=cost + 1), Amount(cost=cost))
    assert spent(ledger).cost == expected
    assert held(ledger) == Amount()


@pytest.mark.parametrize("wrong", [{"tokens": -1}, {"cost": -1}, {"tokens": 2**63}])
def test_amounts_that_cannot_be_right_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        Amount(**wrong)


def test_a_sum_beyond_64_bits_is_an_error_and_changes_nothing(ledger: Ledger) -> None:
    huge = Amount(cost=2**50 * 1000)
    with pytest.raises(StorageError):
        for _ in range(20):
            ledger.record("s", huge)
    recorded = sum(row["state"] == "recorded" for row in usage.audit(ledger))
    assert 1 <= recorded < 20
    assert spent(ledger).cost == recorded * huge.cost


def test_an_attempt_of_another_file_is_not_ignored(ledger: Ledger) -> None:
    grant = Grant(id=1, scope="s", lane="all", limits=(), loose=False)
    for end in (ledger.charge, ledger.give_back):
        with pytest.raises(StorageCorrupt):
            end(Attempt(id=5, grant=grant, amount=tokens(1)))
