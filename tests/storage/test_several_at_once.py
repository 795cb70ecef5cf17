"""Are the steps for several calls in one commit the same as one after the other?"""

from __future__ import annotations

from typing import Any

from hypothesis import given, strategies as st

from embedcore.errors import BudgetExceeded
from embedcore.storage.amounts import (
    Amount,
    Attempt,
    HeldLoosely,
    Limit,
    TighterBoundNeeded,
)
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.outcomes import Outcome
from embedcore.storage.schema import STATE

NOON = 1_800_000_000.0
amounts = st.builds(Amount, tokens=st.integers(0, 60), cost=st.integers(0, 60))
limits = st.lists(
    st.builds(
        Limit,
        scope=st.sampled_from(["a", "*"]),
        unit=st.sampled_from(["tokens", "cost"]),
        period=st.sampled_from(["day", "month", "total"]),
        amount=st.integers(1, 200),
        reserved=st.integers(0, 20),
    ),
    max_size=3,
)


def new_ledger() -> Ledger:
    return Ledger(Database(None, STATE), clock=lambda: NOON)


def contents(ledger: Ledger) -> dict[str, list[tuple[Any, ...]]]:
    """Everything but the random names of grants."""
    grants = 'scope, windows, tokens, cost, loose, lease FROM "grant"'
    attempts = (
        "id, scope, windows, state, tokens, cost, loose, lease, model, inputs, sent, actual_tokens,"
        " actual_cost, reported, request_id, note, ended, counted FROM attempt"
    )
    questions = {
        "window": "SELECT * FROM window ORDER BY id",
        "grant": f"SELECT {grants} ORDER BY 1, 2, 3, 4",
        "attempt": f"SELECT {attempts} ORDER BY id",
        "warning": "SELECT * FROM warning ORDER BY 1, 2, 3",
        "book": "SELECT * FROM book",
    }
    with ledger.database.read() as connection:
        return {
            name: list(map(tuple, connection.execute(question)))
            for name, question in questions.items()
        }


def kind(outcome: Any) -> tuple[Any, ...]:
    if isinstance(outcome, Attempt):
        return (Attempt, outcome.id, outcome.amount, outcome.until)
    reason = outcome.refusal if isinstance(outcome, HeldLoosely) else outcome
    return (type(outcome), str(reason))


@given(
    wanted=st.lists(st.tuples(amounts, st.integers(1, 8)), min_size=1, max_size=6),
    bills=st.lists(amounts, min_size=6, max_size=6),
    limits=limits,
    lane=st.sampled_from(["all", "query"]),
    loose=st.booleans(),
    final=st.booleans(),
    close=st.booleans(),
)
def test_several_at_once_are_as_one_after_the_other(
    wanted, bills, limits, lane, loose, final, close
):
    together, alone = new_ledger(), new_ledger()
    how = {"lane": lane, "loose": loose, "final": final, "model": "m"}

    def one(amount, inputs):
        try:
            return alone.hold_and_send("a", amount, limits, inputs=inputs, **how)
        except (BudgetExceeded, HeldLoosely, TighterBoundNeeded) as refusal:
            return refusal

    outcomes = together.hold_and_send_all("a", wanted, limits, **how)
    expected = [one(*each) for each in wanted]
    assert list(map(kind, outcomes)) == list(map(kind, expected))
    assert contents(together) == contents(alone)

    settled = {"reported": True, "request_id": "r", "close": close}
    sent = [outcome for outcome in outcomes if isinstance(outcome, Attempt)]
    written = [
        Outcome(
            what="settled",
            grant=attempt.grant,
            attempt=attempt,
            actual=bill,
            reported=True,
            request_id="r",
            closes=close,
        )
        for attempt, bill in zip(sent, bills, strict=False)
    ]
    together.write(written)
    attempts = [outcome for outcome in expected if isinstance(outcome, Attempt)]
    assert [outcome.near for outcome in written] == [
        alone.settle(attempt, bill, **settled)
        for attempt, bill in zip(attempts, bills, strict=False)
    ]
    assert contents(together) == contents(alone)


def test_one_that_is_refused_takes_nothing_from_the_next():
    ledger = new_ledger()
    limit = Limit(scope="a", unit="tokens", period="day", amount=100)
    wanted = [(Amount(tokens=tokens), 1) for tokens in (60, 50, 40)]
    one, other, third = ledger.hold_and_send_all("a", wanted, [limit])
    assert isinstance(other, BudgetExceeded)
    assert (one.amount.tokens, third.amount.tokens) == (60, 40)
