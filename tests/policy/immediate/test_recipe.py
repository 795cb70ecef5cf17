"""Does one call, whatever befalls its requests, bring the right rows and the right bill?"""

from __future__ import annotations

import copy
import errno
import mmap
import threading
from dataclasses import replace

import numpy as np
import pytest
from waiting import until

from embedcore.errors import (
    AuthenticationFailed,
    BudgetExceeded,
    ConfigurationError,
    EmbeddingError,
    InputRejected,
    InvalidResponse,
    ModelNotFound,
    OutcomeUnknown,
    PermissionDenied,
    ProviderError,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    ReplyMismatch,
    RequestRejected,
    StorageBusy,
    StorageFull,
)
from embedcore.events import BoundViolated, Progress, RequestFailed, RequestFinished, RequestSent
from embedcore.policy.estimate import plan_now
from embedcore.policy.ratelimit.queue import Gate
from embedcore.policy.result_buffer import ResultBuffer
from embedcore.policy.retry import RetryQuota
from embedcore.provider.types import EmbedReply, ModelInfo, Price
from embedcore.settings import RetrySettings
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import FakeClock, FakeEmbedder, FakeTokenizer, tokens_of, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO, Outcome

SMALL = replace(FAKE_INFO, dimensions=8, max_texts_per_request=4)


def texts(count, word="text"):
    return [f"{word} number {index}" for index in range(count)]


def small(**options):
    return FakeEmbedder(info=options.pop("info", SMALL), **options)


# What comes back


@pytest.mark.fault(18)
def test_no_texts_need_nothing(desk):
    with desk(daily=0) as one:
        result = one.embed([])
        assert result.vectors.shape == (0, 32)
        assert result.vectors.dtype == np.float32
        assert (len(result), result.usage.requests) == (0, 0)
        assert one.embedder.meter.requests == 0
        one.check()


@pytest.mark.fault(12)
@pytest.mark.fault(16)
def test_rows_come_in_order_and_each_text_is_billed_once(desk):
    rows = texts(25) * 2 + ["a"] + texts(25)
    with desk(small()) as one:
        result = one.embed(rows)
        one.right(result, rows)
        assert result.ok.all()
        assert result.reused.tolist() == [False] * 25 + [True] * 25 + [False] + [True] * 25
        assert one.embedder.meter.billed_twice == {}
        assert result.usage.requests == one.embedder.meter.requests == 7
        assert result.usage.tokens == one.spent
        assert result.usage.exact
        assert max(len(call.texts) for call in one.embedder.calls) == 4
        one.check()


@pytest.mark.fault(12)
def test_one_call_equals_single_calls(desk):
    rows = ["b", "a", "b", "c"]
    with desk(small()) as together, desk(small()) as apart:
        all_at_once = together.embed(rows).vectors
        singly = np.vstack([apart.embed([row]).vectors for row in rows])
        assert (all_at_once == singly).all()


@pytest.mark.fault(19)
def test_the_callers_list_may_change_at_once(desk):
    rows = texts(12)
    before = list(rows)

    def script(request, number):
        rows[:] = ["changed"] * 12

    with desk(small(script=script)) as one:
        one.right(one.embed(rows), before)


def test_events_tell_the_story(desk):
    with desk(small(script=[RateLimited("slow", retry_after=0.001)]), threads=1) as one:
        one.embed(texts(6))
        assert [event.attempt for event in one.told(RequestSent)] == [1, 2, 1]
        assert [event.inputs for event in one.told(RequestFinished)] == [3, 3]
        assert [event.wait is not None for event in one.told(RequestFailed)] == [True]
        progress = one.told(Progress)
        assert [(event.done, event.total) for event in progress] == [(3, 6), (6, 6)]
        assert progress[-1].tokens == one.spent


# Keep, raise and partial


TRANSIENT = [ProviderUnavailable("overloaded", billed="no"), OutcomeUnknown("?")]
OF_THE_ROW = [
    RequestRejected("no", billed="no"),
    InvalidResponse("nonsense"),
    ProviderError("a bug", billed="unknown"),
    KeyError("a bug"),
    SystemExit(3),
]
ALWAYS_RAISED = [
    AuthenticationFailed("no"),
    PermissionDenied("no"),
    ModelNotFound("no"),
    QuotaExhausted("no"),
    ConfigurationError("no key"),
    StorageFull("no room"),
]


def marked(error, word="BAD"):
    """Fails every request with the word in one of its texts."""

    def script(request, number):
        return copy.copy(error) if any(word in text for text in request.texts) else None

    return script


@pytest.mark.fault(124)
@pytest.mark.parametrize("error", [*TRANSIENT, *OF_THE_ROW], ids=lambda error: type(error).__name__)
def test_keep_keeps_what_is_wrong_with_rows(desk, error):
    rows = [*texts(8), "BAD", *texts(3, "more")]
    with desk(small(script=marked(error))) as one:
        result = one.embed(rows, on_error="keep")
        one.right(result, rows)
        assert result.ok[:8].all()
        assert not result.ok[8]
        assert isinstance(result.errors[8], EmbeddingError)
        assert result.outcomes[8].state == "failed"
        assert set(result.errors) == set(np.flatnonzero(~result.ok))
        one.check(certain=False)

        kind = type(error) if isinstance(error, EmbeddingError) else ProviderError
        with pytest.raises(kind) as caught:
            one.embed(rows)
        one.right(caught.value.partial, rows)
        assert caught.value.partial.errors[8] is caught.value
        one.check(certain=False)


@pytest.mark.fault(48)
@pytest.mark.parametrize("error", ALWAYS_RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("on_error", ["keep", "raise"])
def test_what_is_not_a_rows_fault_is_always_raised_with_what_was_billed(desk, error, on_error):
    rows = [*texts(8), "BAD", *texts(3, "more")]
    with desk(small(script=marked(error)), threads=1) as one:
        with pytest.raises(type(error)) as caught:
            one.embed(rows, on_error=on_error)
        partial = caught.value.partial
        one.right(partial, rows)
        assert partial.ok.tolist() == [True] * 8 + [False] * 4
        assert partial.usage.tokens == one.spent
        one.check()


@pytest.mark.fault(124)
def test_what_a_plugin_lets_escape_is_typed_and_charged(desk):
    class Unprintable(Exception):
        def __str__(self):
            raise RuntimeError("not even this works")

    class Odd(BaseException):
        pass

    for error in (KeyError("k"), SystemExit(1), Odd("odd"), Unprintable(), MemoryError()):
        with desk(small(script=[error])) as one:
            with pytest.raises(ProviderError) as caught:
                one.embed(["a"])
            assert caught.value.billed == "unknown"
            assert type(error).__name__ in str(caught.value)
            assert caught.value.__cause__ is error
            assert caught.value.partial.usage.unconfirmed_tokens == one.spent > 0
            one.check()


@pytest.mark.fault(124)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit])
def test_an_interrupt_passes_through_charged_and_with_partial(desk, kind):
    rows = texts(10)
    error = kind()
    with desk(small(script=[None, error]), threads=1) as one:
        with pytest.raises(kind) as caught:
            one.embed(rows, on_error="keep")
        assert caught.value is error
        one.right(error.partial, rows)
        assert error.partial.ok.sum() == 4
        one.check(certain=False)


@pytest.mark.fault(131)
@pytest.mark.fault(132)
def test_no_error_shows_a_key(desk):
    key = "sk-verysecretkey"
    for error in (KeyError(key), RequestRejected(f"the server said {key}", billed="no")):
        with desk(small(script=[error]), secrets=(key,)) as one:
            with pytest.raises(ProviderError) as caught:
                one.embed(["a"])
            raised = caught.value
            for shown in (raised, raised.__cause__, raised.__context__):
                assert key not in f"{shown} {shown!r}"


def test_a_transient_error_names_the_rows_it_cost(desk):
    script = marked(ProviderUnavailable("overloaded", billed="no"))
    with desk(small(script=script)) as one:
        result = one.embed([*texts(5), "BAD"], on_error="keep")
        assert sorted(result.errors) == [3, 4, 5]
        assert "rows 3 to 5: overloaded" in str(result.errors[4])
        assert result.errors[4].position is None, "none of the three is to blame"


# Money


@pytest.mark.fault(92)
def test_a_limit_of_nothing_refuses_everything_before_it_is_sent(desk):
    with desk(daily=0) as one:
        with pytest.raises(BudgetExceeded) as caught:
            one.embed(["a"])
        assert caught.value.never_fits
        assert not caught.value.partial.ok.any()
        assert one.embedder.meter.requests == 0
        one.check()


@pytest.mark.fault(16)
def test_a_call_that_does_not_fit_is_refused_whole(desk):
    rows = texts(40)
    cost = sum(map(tokens_of, rows))
    with desk(small(), daily=cost - 1) as one:
        with pytest.raises(BudgetExceeded):
            one.embed(rows)
        assert one.embedder.meter.requests == 0
        one.check()
        one.limited(cost)
        one.right(one.embed(rows), rows)
        one.check()
        assert one.spent == cost
        one.embed(["beyond"], check_budget=False)
        one.check()
        assert one.spent == cost + tokens_of("beyond")


@pytest.mark.fault(98)
def test_a_limit_in_money_needs_a_price_unless_nothing_costs_anything(desk):
    from embedcore.storage.amounts import Limit

    info = replace(SMALL, price=None)
    limit = Limit(scope="default", period="day", unit="cost", amount=10**12)
    with desk(small(info=info)) as one:
        account = replace(one.engine.account, limits=(limit,))
        one.engine = replace(one.engine, account=account)
        with pytest.raises(ConfigurationError, match="price"):
            one.embed(["a"])
        assert one.embedder.meter.requests == 0
        one.embed(["a"], check_budget=False)
        one.check()
        # A model that runs on this machine has no ledger at all.
        one.engine = replace(one.engine, account=replace(account, ledger=None))
        one.right(one.embed(["b"]), ["b"])


def test_an_inexact_tokenizer_that_bounds_tighter_than_bytes_is_used(desk):
    class Third(FakeTokenizer):
        def __init__(self):
            super().__init__(exact=False)

        def count(self, texts):
            return [-(-len(text.encode()) // 3) for text in texts]

    rows = texts(8)
    bound = sum(Third().count(rows))
    with desk(small(tokenizer=Third()), daily=bound) as one:
        one.right(one.embed(rows), rows)
        one.check()


@pytest.mark.fault(45)
@pytest.mark.fault(44)
@pytest.mark.parametrize("said", [None, 0, -5, 2**70, 2**63, 3.5, True, "7"])
@pytest.mark.parametrize("exact", [True, False])
def test_without_a_believable_bill_what_is_counted_or_held_is_spent(desk, said, exact):
    def reply(request, honest):
        return replace(honest, tokens=said)

    fake = small(script=[Outcome(reply=reply)], tokenizer=FakeTokenizer(exact=exact))
    with desk(fake, daily=1000) as one:
        rows = texts(3)
        result = one.embed(rows)
        one.right(result, rows)
        assert not result.usage.exact
        assert not one.told(RequestFinished)[0].reported
        one.check(certain=False)
        counts = FakeTokenizer().count(rows)
        assert one.spent == sum(counts if exact else map(len, rows))


@pytest.mark.fault(46)
def test_a_bill_above_the_amount_is_recorded_and_more_is_held_from_then_on(desk):
    def dear(factor):
        return Outcome(reply=lambda request, honest: replace(honest, tokens=honest.tokens * factor))

    factors = [20, 30, 30, 30]
    with desk(small(script=[dear(factor) for factor in factors])) as one:
        one.embed(["12345678"])  # held as 8 bytes, billed 40
        assert one.engine.learned.scale == 5
        one.embed(["23456789"])  # held as 40, billed 60
        assert one.engine.learned.scale == pytest.approx(7.5)
        one.embed(["34567890"])
        assert [(event.reserved, event.billed) for event in one.told(BoundViolated)] == [
            (8, 40),
            (40, 60),
        ]
        assert one.spent == 40 + 60 + 60
        assert one.used.held == Amount()


@pytest.mark.fault(46)
def test_a_provider_that_bills_too_much_is_stopped_within_the_same_call(desk):
    """Each request of a call that was held already must not cost more than is left."""

    def dear(request, number):
        return Outcome(reply=lambda request, honest: replace(honest, tokens=honest.tokens * 4))

    rows = texts(400, "a")
    cost = sum(map(tokens_of, rows))
    with desk(small(script=dear), daily=2 * cost, threads=1) as one:
        with pytest.raises(BudgetExceeded) as caught:
            one.embed(rows)
        worst = 4 * sum(map(tokens_of, rows[:4]))
        assert one.spent <= 2 * cost + worst
        assert 0 < caught.value.partial.ok.sum() < 400
        one.right(caught.value.partial, rows)
        assert one.used.held == Amount()


@pytest.mark.fault(46)
def test_one_absurd_bill_does_not_end_everything(desk):
    absurd = Outcome(reply=lambda request, honest: replace(honest, tokens=2**32))
    with desk(small(script=[absurd])) as one:
        one.embed(["a"])
        rows = texts(100)
        one.right(one.embed(rows), rows)
        assert one.used.held == Amount()


@pytest.mark.fault(29)
def test_a_lost_answer_is_charged_and_the_retry_pays_again(desk):
    cost = tokens_of("eight ch")
    for bills in (True, False):
        lost = Outcome(error=OutcomeUnknown("no answer"), bills=bills)
        with desk(small(script=[lost]), daily=2 * cost) as one:
            result = one.embed(["eight ch"])
            one.right(result, ["eight ch"])
            assert one.spent == 2 * cost
            assert result.usage.unconfirmed_tokens == cost
            assert result.usage.requests == 2
            one.check(certain=bills)


@pytest.mark.fault(29)
def test_a_retry_that_the_budget_refuses_raises_what_went_wrong(desk):
    cost = tokens_of("eight ch")
    with desk(small(script=[OutcomeUnknown("no answer")]), daily=2 * cost - 1) as one:
        with pytest.raises(OutcomeUnknown, match="no answer; the budget allows no") as caught:
            one.embed(["eight ch"], on_error="keep")
        assert str(caught.value).count("the budget allows") == 1
        assert caught.value.budget_blocked
        assert isinstance(caught.value.__cause__, BudgetExceeded)
        assert caught.value.partial is not None
        assert one.embedder.meter.requests == 1
        one.check()


@pytest.mark.case("B3")
@pytest.mark.parametrize("billed", ["unknown", "yes"])
def test_another_way_that_the_budget_refuses_raises_what_went_wrong(desk, billed):
    """Asking otherwise is no retry, and costs as much if the first way was charged."""
    refused = RequestRejected("no base64", billed=billed, status=400)
    refused.again = "floats"
    cost = tokens_of("eight ch")
    with desk(small(script=[refused]), daily=2 * cost - 1) as one:
        with pytest.raises(RequestRejected, match="no base64; the budget allows no") as caught:
            one.embed(["eight ch"], on_error="keep")
        assert caught.value.budget_blocked
        assert isinstance(caught.value.__cause__, BudgetExceeded)
        assert one.embedder.meter.requests == 1
        one.check(certain=False)


@pytest.mark.fault(20)
def test_what_was_given_back_pays_for_the_retries_after_a_charge(desk):
    """Charged once, then refused unbilled many times: not one more token may be set aside."""
    cost = tokens_of("eight ch")
    slow = RateLimited("slow", retry_after=0.001)
    script = [OutcomeUnknown("?"), *[slow] * 8]
    with desk(small(script=script), daily=2 * cost) as one:
        one.right(one.embed(["eight ch"]), ["eight ch"])
        assert one.spent == 2 * cost
        one.check()


def test_the_parts_of_a_charged_request_need_new_money(desk):
    """Otherwise they would be paid for with what other requests of the call have set aside."""
    rows = ["BAD", *texts(3), *texts(4, "other")]
    refused = RequestRejected("no", billed="unknown")
    with desk(small(script=marked(refused)), threads=1) as one:
        result = one.embed(rows, on_error="keep")
        one.right(result, rows)
        assert result.ok.sum() == 7
        one.check(certain=False)
        most = one.spent
    cost = sum(map(tokens_of, rows))
    with desk(small(script=marked(refused)), threads=1, daily=cost) as one:
        with pytest.raises(RequestRejected) as caught:
            one.embed(rows, on_error="keep")
        assert caught.value.budget_blocked
        assert one.embedder.meter.requests == 1
        one.check(certain=False)
    with desk(small(script=marked(refused)), threads=1, daily=most) as one:
        assert one.embed(rows, on_error="keep").ok.sum() == 7
        one.check(certain=False)


# The ledger fails


OPERATIONS = {"hold", "hold_and_send", "send", "write"}


class Failing(Ledger):
    """Ledger in which one operation fails."""

    def __init__(self, name, error, *, times=10**6):
        super().__init__(Database(None, STATE))
        self._broken, self._error, self._times = name, error, times
        self.calls = 0

    def __getattribute__(self, name):
        own = super().__getattribute__
        if name in OPERATIONS and own("_broken") == name:
            self.calls += 1
            if self.calls <= self._times:
                raise self._error
        return own(name)


@pytest.mark.fault(103)
@pytest.mark.parametrize("on_error", ["keep", "raise"])
@pytest.mark.parametrize("rows", [3, 10])
def test_no_call_fails_because_what_it_cost_cannot_be_written(desk, on_error, rows, caplog):
    rows = texts(rows)
    ledger = Failing("write", StorageFull("no room"), times=2)
    with desk(small(), ledger=ledger, threads=1) as one:
        one.right(one.embed(rows, on_error=on_error), rows)
        # Until it is written its money cannot be spent again.
        used = one.used
        assert used.held.tokens + used.spent.tokens >= one.embedder.meter.billed_tokens
        ledger.spool.flush()
        assert caplog.text.count("not written down yet") == 1
        one.check()


@pytest.mark.fault(102)
@pytest.mark.fault(105)
@pytest.mark.parametrize("name", ["hold", "hold_and_send", "send"])
def test_nothing_is_sent_that_cannot_be_booked(desk, name):
    for rows in (texts(1), texts(10)):
        ledger = Failing(name, StorageBusy("locked"))
        with desk(small(), ledger=ledger) as one:
            raised = None
            try:
                one.embed(rows, on_error="keep")
            except StorageBusy as error:
                raised = error
            assert (raised is None) == (ledger.calls == 0)
            if raised is not None:
                assert not raised.partial.ok.any()
                assert one.embedder.meter.requests == 0
            one.check()


@pytest.mark.case("H4")
@pytest.mark.parametrize("on_error", ["raise", "keep"])
@pytest.mark.parametrize("limit", [None, 10**6])
@pytest.mark.parametrize("batch", [4, 4096])
def test_without_memory_for_the_vectors_nothing_is_sent_and_nothing_paid(
    desk, monkeypatch, on_error, limit, batch
):
    info = replace(SMALL, dimensions=4096, max_texts_per_request=batch)

    def none_left(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    for lends in (False, True):
        with desk(small(info=info), daily=limit, lends_room=lends) as one:
            with monkeypatch.context() as patch:
                patch.setattr(mmap, "mmap", none_left)
                with pytest.raises(MemoryError, match="no memory for 100 vectors") as caught:
                    one.embed(texts(100), on_error=on_error)
            assert not caught.value.partial.ok.any()
            assert one.embedder.meter.requests == 0
            assert one.spent == 0
            one.check()
            one.right(one.embed(texts(100)), texts(100))


@pytest.mark.case("H4")
def test_a_lack_of_memory_for_what_was_billed_hides_no_error(desk, monkeypatch):
    def none_left(*_, **__):
        raise MemoryError

    error = AuthenticationFailed("no", billed="no")
    with desk(small(script=[error])) as one:
        monkeypatch.setattr(ResultBuffer, "result", none_left)
        with pytest.raises(AuthenticationFailed) as caught:
            one.embed(["a"])
        assert caught.value is error
        assert error.partial is None
        one.check()


@pytest.mark.fault(103)
@pytest.mark.parametrize("name", ["charge", "give_back"])
def test_a_failure_that_cannot_be_written_is_written_with_the_next_attempt(desk, name):
    script = [OutcomeUnknown("?") if name == "charge" else RateLimited("slow", retry_after=0.001)]
    ledger = Failing("write", StorageFull("no room"))
    with desk(small(script=script), ledger=ledger, threads=1) as one:
        one.right(one.embed(texts(6)), texts(6))
        states = [row["state"] for row in usage.audit(ledger)]
        assert states[0] == {"charge": "charged", "give_back": "returned"}[name]
        ledger._times = 0
        one.check(certain=name == "give_back")


@pytest.mark.fault(124)
def test_an_interrupt_is_not_hidden_by_a_broken_ledger(desk):
    ledger = Failing("write", StorageFull("no room"))
    script = [KeyboardInterrupt()]
    with desk(small(script=script), ledger=ledger) as one, pytest.raises(KeyboardInterrupt):
        one.embed(texts(2))


# Replies


@pytest.mark.fault(42)
@pytest.mark.parametrize("on_error", ["keep", "raise"])
def test_replies_of_two_widths_never_meet(desk, on_error):
    """The model does not say its width; the server changes it meanwhile."""
    info = replace(SMALL, dimensions=None, max_texts_per_request=1)

    def width(number):
        def reply(request, honest):
            return replace(honest, vectors=vectors_of(request.texts, number))

        return Outcome(reply=reply)

    with desk(small(info=info, script=[width(8), width(16), width(8)]), threads=1) as one:
        with pytest.raises(ReplyMismatch, match="width 16, not 8") as caught:
            one.embed(texts(3), on_error=on_error)
        assert caught.value.partial.ok.tolist() == [True, False, False]
        one.check(certain=False)
    with desk(small(info=info, script=[width(8), width(16)])) as one:
        one.embed(["a"])
        with pytest.raises(ReplyMismatch, match="16"):
            one.embed(["b"], on_error=on_error)
        one.check(certain=False)


@pytest.mark.fault(42)
def test_first_replies_of_two_widths_at_the_same_moment(desk):
    info = replace(SMALL, dimensions=None, max_texts_per_request=1)
    together = threading.Barrier(4)

    def script(request, number):
        def reply(request, honest):
            together.wait(120)
            return replace(honest, vectors=vectors_of(request.texts, 8 + number))

        return Outcome(reply=reply)

    for _ in range(10):
        with desk(small(info=info, script=script), threads=4) as one:
            with pytest.raises(ReplyMismatch) as caught:
                one.embed(texts(4), on_error="keep")
            assert caught.value.partial.ok.sum() <= 1
            one.check(certain=False)


@pytest.mark.fault(41)
def test_a_vector_of_zeros_is_passed_on_with_a_warning_or_refused(desk, caplog):
    def zeros(request, honest):
        vectors = honest.vectors.copy()
        vectors[[text == "text number 1" for text in request.texts]] = 0
        return replace(honest, vectors=vectors)

    with desk(small(script=[Outcome(reply=zeros)])) as one:
        result = one.embed(texts(3))
        assert result.ok.all()
        assert not result.vectors[1].any()
        assert "zeros" in caplog.text
        one.check()
    with desk(small(script=lambda *_: Outcome(reply=zeros)), reject_zero=True) as one:
        # The others are kept, and this one is asked for once more, alone.
        rows = texts(3)
        with pytest.raises(InvalidResponse, match=r"row 1: .*zeros") as caught:
            one.embed(rows)
        assert caught.value.partial.ok.tolist() == [True, False, True]
        assert [len(call.texts) for call in one.embedder.calls] == [3, 1]
        one.check(certain=False)


@pytest.mark.fault(125)
@pytest.mark.parametrize(
    "name",
    [7, b"id", "x" * 5000, "half \ud800", ["id"]],
    ids=["int", "bytes", "long", "half", "list"],
)
def test_an_odd_request_id_breaks_nothing(desk, name):
    odd = Outcome(reply=lambda request, honest: replace(honest, request_id=name))
    with desk(small(script=[odd])) as one:
        one.right(one.embed(["a"]), ["a"])
        assert len(one.told(RequestFinished)[0].request_id or "") <= 200
        one.check()


@pytest.mark.fault(125)
@pytest.mark.parametrize("reply", [None, [], "x", 7], ids=lambda value: type(value).__name__)
def test_what_is_no_reply_at_all_is_charged(desk, reply):
    class Wrong(FakeEmbedder):
        def embed(self, request):
            super().embed(request)
            return reply

    if reply is None:
        reply = np.zeros((1, 8))
    with desk(Wrong(info=SMALL)) as one:
        with pytest.raises(InvalidResponse):
            one.embed(["eight ch"])
        one.check()
        assert one.spent == tokens_of("eight ch")


@pytest.mark.fault(37)
def test_a_reply_with_a_vector_too_few_is_not_used_and_its_texts_are_asked_again_in_parts(desk):
    short = Outcome(reply=lambda request, honest: replace(honest, vectors=honest.vectors[:-1]))
    with desk(small(script=[short]), threads=1) as one:
        rows = texts(8)
        result = one.embed(rows)
        one.right(result, rows)
        assert [len(call.texts) for call in one.embedder.calls][:2] == [4, 1]
        assert result.usage.unconfirmed_tokens == sum(map(tokens_of, rows[:4]))
        assert set(one.embedder.meter.billed_twice) == set(rows[:4])
        one.check()


# The gate and the queue


@pytest.mark.fault(20)
def test_one_threads_429_holds_all_of_them(desk):
    clock = FakeClock()
    gate = Gate(monotonic=clock.monotonic)
    # They look again and again, and only the test lets time pass.
    by_clock = {"gate": gate, "retry": RetrySettings()}
    by_clock["wait_for"] = lambda event, _: event.wait(0.005)
    first = desk(small(script=[RateLimited("slow", retry_after=30)]), threads=1, **by_clock)
    second = desk(small(), threads=8, **by_clock)
    with first, second:
        calls = [
            threading.Thread(target=lambda: first.embed(["a"])),
            threading.Thread(target=lambda: second.embed(texts(40))),
        ]
        calls[0].start()
        until(lambda: gate.closed_for > 0)
        calls[1].start()
        until(lambda: gate.state().waiting == 1 + 8)
        assert (first.embedder.meter.requests, second.embedder.meter.requests) == (1, 0)
        clock.advance(29)
        assert gate.closed_for > 0
        while any(call.is_alive() for call in calls):
            clock.advance(60)
            calls[1].join(0.005)
        assert (first.embedder.meter.requests, second.embedder.meter.requests) == (2, 10)


def test_a_short_call_does_not_wait_for_a_long_one(desk, halting, monkeypatch):
    info = replace(SMALL, max_texts_per_request=1)
    with desk(halting(4, info=info), threads=2) as one:
        pool, submit = one.engine.pool, one.engine.pool.submit

        def submitted(task):
            submit(task)
            if threading.current_thread() is threading.main_thread():
                one.embedder.go.set()

        monkeypatch.setattr(pool, "submit", submitted)
        long = threading.Thread(target=lambda: one.embed(texts(150)))
        long.start()
        until(lambda: one.embedder.begun == 6)
        one.embed(["a question"])
        long.join()
        asked = [call.texts for call in one.embedder.calls]
        assert asked.index(("a question",)) < 10
        one.check()


def test_calls_of_many_threads_share_one_client(desk):
    with desk(small(latency=0.001), threads=4) as one:
        wrong = []

        def go(number):
            rows = [*texts(11, f"thread {number}"), "shared"]
            try:
                one.right(one.embed(rows), rows)
            except BaseException as error:  # noqa: BLE001
                wrong.append(error)

        threads = [threading.Thread(target=go, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert one.embedder.meter.max_in_flight <= 4
        one.check()


def test_a_client_closed_meanwhile_ends_the_call_with_a_typed_error(desk, halting):
    one = desk(halting(4, info=replace(SMALL, max_texts_per_request=1)), threads=2)
    raised = []

    def go():
        try:
            one.embed(texts(200), on_error="keep")
        except ConfigurationError as error:
            raised.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    until(lambda: one.embedder.begun == 6)
    one.engine.pool.close()
    one.embedder.go.set()
    thread.join(120)
    assert raised[0].partial.ok.sum() == one.embedder.meter.requests
    one.check()
    one.close()


@pytest.mark.fault(26)
def test_an_outage_is_not_answered_with_more_load(desk):
    def script(request, number):
        return ProviderUnavailable("overloaded", billed="no", status=503)

    with desk(
        small(info=replace(SMALL, max_texts_per_request=1), script=script),
        threads=32,
        quota=RetryQuota(35.0, 0.1),
    ) as one:
        result = one.embed(texts(300), on_error="keep")
        assert not result.ok.any()
        assert one.embedder.meter.requests <= 300 * 1.1 + 35
        one.check()


# Planning without sending


@pytest.mark.fault(16)
def test_a_plan_sends_and_spends_nothing_and_is_kept(desk):
    rows = [*texts(9), "", "x" * 40_000, texts(1)[0]]
    with desk(small(info=replace(SMALL, price=Price(immediate="0.02"))), keep_empty=True) as one:
        plan = plan_now(one.engine, rows)
        assert one.embedder.meter.requests == 0
        one.check()
        result = one.embed(rows, on_error="keep")
        assert (plan.rows, plan.unique, plan.rejected, plan.truncated) == (12, 10, 1, 1)
        assert plan.requests == result.usage.requests == 3
        assert plan.exact
        assert plan.tokens == result.usage.tokens == one.spent
        assert plan.cost == result.usage.cost
        bound = plan_now(one.engine, rows, exact=False)
        assert not bound.exact
        assert bound.tokens >= plan.tokens


def test_an_unknown_input_type_is_refused_before_anything(desk):
    with desk(small(info=replace(SMALL, input_types=("query", "document")))) as one:
        one.embed(["a"], input_type="query")
        assert one.embedder.calls[0].input_type == "query"
        with pytest.raises(ConfigurationError, match="takes: query, document"):
            one.embed(["a"], input_type="classification")
    with desk(small()) as one:
        one.embed(["a"], input_type="query")
        assert one.embedder.calls[0].input_type is None
        with pytest.raises(ConfigurationError):
            one.embed(["a"], input_type="other")


def test_the_time_left_is_told_to_the_provider(desk):
    clock = FakeClock()
    settings = RetrySettings(request_timeout=30, deadline=12)
    with desk(small(), retry=settings, monotonic=clock.monotonic) as one:
        one.embed(["a"])
        assert one.embedder.calls[0].timeout == pytest.approx(12)
    with desk(small(), retry=RetrySettings(request_timeout=30)) as one:
        one.embed(["a"])
        assert one.embedder.calls[0].timeout == 30


def test_an_error_of_the_caller_is_raised_before_anything_is_held(desk):
    with desk() as one:
        with pytest.raises(InputRejected):
            one.embed(["a", None])
        assert one.events == []
        assert one.embedder.meter.requests == 0


def test_the_reply_is_kept_as_a_copy(desk):
    """A provider that reuses its buffer must not change rows that were handed out."""
    buffer = np.empty((4, 8), dtype=np.float32)

    class Reusing(FakeEmbedder):
        def embed(self, request):
            honest = super().embed(request)
            buffer[: len(honest.vectors)] = honest.vectors
            return EmbedReply(vectors=buffer[: len(honest.vectors)], tokens=honest.tokens)

    info = ModelInfo(provider="fake", model="r", dimensions=8, max_texts_per_request=4)
    with desk(Reusing(info=info), threads=1) as one:
        rows = texts(12)
        one.right(one.embed(rows), rows)
