"""Whatever a provider does, in whatever order: right rows, and a ledger that covers the bill.

The provider's own meter is the truth about money; the ledger is what is judged.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import (
    BudgetExceeded,
    EmbeddingError,
    InputTooLong,
    InvalidResponse,
    ProviderError,
    QuotaExhausted,
    RequestRejected,
    RequestTooLarge,
    TransientProviderError,
)
from embedcore.policy.retry import may_be_kept
from embedcore.settings import RetrySettings
from embedcore.testing import FakeClock, FakeEmbedder, tokens_of
from embedcore.testing.fakes.embedder import FAKE_INFO, Outcome
from embedcore.testing.strategies import outcomes

RETRY = RetrySettings(attempts=3, first_wait=0.0, longest_wait=0.0, longest_named_wait=0.001)


def quick():
    """No wait takes any time."""
    return {"retry": RETRY, "clock": FakeClock()}


def wrong_replies():
    """Replies that cannot be believed, and bills that are odd; all of them were paid for."""

    def reply(change):
        return Outcome(reply=lambda request, honest: change(honest))

    changes = [
        lambda honest: replace(honest, vectors=honest.vectors[:-1]),
        lambda honest: replace(honest, vectors=honest.vectors * float("nan")),
        lambda honest: replace(honest, vectors=honest.vectors[:, :-1]),
        lambda honest: replace(honest, vectors=honest.vectors.tolist()),
        lambda honest: replace(honest, vectors="nonsense"),
        lambda honest: replace(honest, model="another"),
        lambda honest: replace(honest, tokens=None),
        lambda honest: replace(honest, tokens=-1),
        lambda honest: replace(honest, request_id=7),
    ]
    return st.sampled_from(changes).map(reply)


def refusals():
    """Refusals that may be about one text, billed or not, as they say."""
    return st.builds(
        lambda kind, billed, position: Outcome(
            error=kind("no", billed=billed, **position), bills=billed == "yes"
        ),
        st.sampled_from([RequestRejected, RequestTooLarge]),
        st.sampled_from(["no", "yes", "unknown"]),
        st.just({}),
    ) | st.builds(
        lambda position: Outcome(error=InputTooLong("long", position=position, billed="no")),
        st.none() | st.integers(0, 5),
    )


def escapes():
    """What no plugin should let escape; the server had billed it."""
    return st.sampled_from([KeyError("k"), SystemExit(1), MemoryError(), RuntimeError("r")]).map(
        lambda error: Outcome(error=error, bills=True)
    )


SCRIPTS = st.lists(
    st.one_of(st.just(Outcome()), outcomes(), wrong_replies(), refusals(), escapes()), max_size=25
)
ROWS = st.lists(st.integers(0, 30).map(lambda number: f"text number {number}"), max_size=25)


def fresh(script):
    """Errors carry what happened to them, so that each needs an object of its own."""
    return [
        replace(one, error=copy.copy(one.error)) if one.error is not None else one for one in script
    ]


def run(one, rows, on_error):
    try:
        return one.embed(rows, on_error=on_error), None
    except EmbeddingError as error:
        return error.partial, error


def as_sent(rows, result):
    """A text that the server called too long was shortened."""
    kept = {row: rows[row][: -cut.characters] for row, cut in result.cuts.items()}
    for row, text in kept.items():
        assert tokens_of(rows[row]) - tokens_of(text) == result.tokens_cut[row] > 0
    return [kept.get(row, text) for row, text in enumerate(rows)]


def is_unconfirmed(outcome):
    """Charged and not billed, or the other way round; or a reply that cannot be believed."""
    charged = getattr(outcome.error, "billed", "unknown") != "no"
    lost = outcome.error is not None and charged != outcome.is_billed
    return lost or outcome.reply is not None


@settings(max_examples=2 * settings.default.max_examples, deadline=None)
@given(
    SCRIPTS,
    ROWS,
    st.sampled_from(["keep", "raise"]),
    st.sampled_from([1, 3, 64]),
    st.sampled_from([None, 40, 200, 2000]),
    st.sampled_from([1, 4]),
)
def test_whatever_happens_rows_are_right_and_the_bill_is_covered(
    desk, script, rows, on_error, per_request, daily, threads
):
    info = replace(FAKE_INFO, dimensions=8, max_texts_per_request=per_request)
    embedder = FakeEmbedder(info=info, script=fresh(script))
    with desk(embedder, daily=daily, threads=threads, wait=0.0, **quick()) as one:
        result, error = run(one, rows, on_error)
        one.right(result, as_sent(rows, result))
        meter = embedder.meter
        one.check(certain=not any(map(is_unconfirmed, script[: meter.requests])))
        if daily is not None:
            assert one.spent <= daily
        # What the call says it cost is what the ledger says.
        assert result.usage.tokens == one.spent
        assert result.usage.requests == meter.requests
        for row in range(len(rows)):
            assert (row in result.errors) <= (not result.ok[row])
            if error is None:
                assert result.ok[row] or row in result.errors
        if error is None:
            assert on_error == "keep" or result.ok.all()
            assert all(map(may_be_kept, result.errors.values()))
        elif isinstance(error, BudgetExceeded):
            assert daily is not None
        elif on_error == "keep":
            assert (
                not may_be_kept(error)
                or error.budget_blocked
                # Not a row's fault, but the request's or the server's.
                or "no text's fault" in str(error)
                or "nothing more is sent" in str(error)
            )
        # Nothing is said to be there that never arrived.
        arrived = {text for call in embedder.calls if call.error is None for text in call.texts}
        kept = {row for row, ok in zip(as_sent(rows, result), result.ok, strict=True) if ok}
        assert kept <= arrived


@given(SCRIPTS, ROWS, st.integers(0, 3))
def test_a_budget_is_kept_over_many_calls(desk, script, rows, extra):
    info = replace(FAKE_INFO, dimensions=8, max_texts_per_request=3)
    embedder = FakeEmbedder(info=info, script=fresh(script))
    daily = 60 + extra
    with desk(embedder, daily=daily, threads=2, wait=0.0, **quick()) as one:
        for number in range(6):
            run(one, [f"{row} of call {number}" for row in rows], "keep")
            assert embedder.meter.billed_tokens <= one.spent <= daily
            assert one.used.held.tokens == 0


@given(SCRIPTS, ROWS.filter(bool))
def test_honest_vectors_are_never_lost(desk, script, rows):
    """One text to a request and one thread: each reply is either kept or was no honest one."""
    info = replace(FAKE_INFO, dimensions=8, max_texts_per_request=1)
    embedder = FakeEmbedder(info=info, script=fresh(script))
    with desk(embedder, threads=1, **quick()) as one:
        result, _ = run(one, rows, "keep")
        honest = {
            call.texts[0]
            for call, outcome in zip(
                embedder.calls, [*script, *[Outcome()] * len(embedder.calls)], strict=False
            )
            if outcome.error is None and outcome.reply is None
        }
        kept = {row for row, ok in zip(rows, result.ok, strict=True) if ok}
        assert honest & set(rows) <= kept


@pytest.mark.fault(124)
@settings(deadline=None)
@given(
    st.sampled_from(
        [
            ("keep", True, TransientProviderError("t", billed="no")),
            ("keep", True, InvalidResponse("i")),
            ("keep", True, ProviderError("p")),
            ("keep", False, QuotaExhausted("q")),
        ]
    )
)
def test_keep_is_for_rows_and_not_for_accounts(desk, case):
    on_error, kept, error = case

    def script(request, number):
        return copy.copy(error)

    with desk(FakeEmbedder(script=script), retry=RETRY) as one:
        _, raised = run(one, ["a"], on_error)
        assert (raised is None) == kept
        one.check(certain=False)
