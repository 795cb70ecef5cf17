"""Is what is at fault found, at little cost, and does nothing else fail with it?"""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import (
    AuthenticationFailed,
    BudgetExceeded,
    EmbeddingError,
    InputRejected,
    InputTooLong,
    InvalidResponse,
    OutcomeUnknown,
    PermanentProviderError,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    ReplyMismatch,
    RequestRejected,
    RequestTooLarge,
    TimedOut,
)
from embedcore.policy.immediate.search import Search
from embedcore.policy.immediate.verdict import nature
from embedcore.policy.retry import RetryQuota
from embedcore.settings import RetrySettings
from embedcore.testing import FakeEmbedder, tokens_of
from embedcore.testing.fakes.embedder import FAKE_INFO, Outcome

WIDE = replace(FAKE_INFO, dimensions=8, max_texts_per_request=2048, max_tokens_per_request=300_000)
# As an unknown model: nothing is cut.
UNKNOWN = replace(WIDE, max_input_tokens=None)
ATTEMPTS = 3
# Seconds for what happens in any case.
LONG = 120.0
RETRY = RetrySettings(attempts=ATTEMPTS, first_wait=0.0, longest_wait=0.0)


def texts(count):
    return [f"text number {index}" for index in range(count)]


def refusing(bad, *, billed="no"):
    """A server that refuses, without a word on which, every request with one of these texts."""

    def script(request, number):
        return RequestRejected("no", billed=billed) if bad & set(request.texts) else None

    return script


def proven(one):
    one.embed(["warm up"])
    return one.embedder.meter.requests


# What a text can do to the requests it is in


def cut_short(request, honest):
    return replace(honest, vectors=honest.vectors[:-1])


FREE = {
    "400": lambda: Outcome(error=RequestRejected("no", status=400, billed="no")),
    "413": lambda: Outcome(error=RequestTooLarge("too large", status=413)),
    "too long": lambda: Outcome(error=InputTooLong("too long", billed="no")),
    "other": lambda: Outcome(error=PermanentProviderError("never", status=418, billed="no")),
    "500": lambda: Outcome(error=ProviderUnavailable("NaN", status=500, billed="no")),
}
CHARGED = {
    "500 billed": lambda: Outcome(error=ProviderUnavailable("NaN", status=500, billed="unknown")),
    "502": lambda: Outcome(error=OutcomeUnknown("bad gateway", status=502), bills=False),
    "reset": lambda: Outcome(error=OutcomeUnknown("reset")),
    "time-out": lambda: Outcome(error=TimedOut("no answer in time")),
    "nonsense": lambda: Outcome(reply=cut_short),
    "a bug": lambda: Outcome(error=KeyError("k"), bills=True),
}
IN_REPLY = {"null": "null"}
KINDS = {**FREE, **CHARGED, **IN_REPLY}
TRANSIENT = {"500", "500 billed", "502", "reset", "time-out"}


def server(bad):
    """``bad``: text → kind. The first bad text of a request decides what becomes of it; null rows
    show only where nothing else is wrong."""

    def script(request, number):
        kinds = [bad[text] for text in request.texts if text in bad]
        for kind in kinds:
            if kind not in IN_REPLY:
                return KINDS[kind]()
        return Outcome(reply=nulls) if kinds else None

    def nulls(request, honest):
        vectors = honest.vectors.copy()
        vectors[[text in bad for text in request.texts]] = np.nan
        return replace(honest, vectors=vectors)

    return script


def kind_of(error):
    """The kinds of text that fail alone with such an error."""
    if isinstance(error, InputTooLong):
        return {"too long"}
    if isinstance(error, InvalidResponse):
        return {"nonsense", "null"}
    status = {400: "400", 413: "413", 418: "other", 502: "502"}.get(getattr(error, "status", None))
    if status:
        return {status}
    if isinstance(error, ProviderUnavailable):
        return {"500", "500 billed"}
    if isinstance(error, TimedOut):
        return {"time-out"}
    return {"reset"} if isinstance(error, OutcomeUnknown) else {"a bug"}


@dataclass(frozen=True)
class Case:
    rows: list
    bad: dict

    @property
    def most(self):
        """Requests that a search may take. Where parts fail for the moment, each is tried again."""
        k, n = len(self.bad), len(self.rows)
        tries = (ATTEMPTS - 1) * (1 + 2 * k) if TRANSIENT & set(self.bad.values()) else 0
        return 2 * k * math.ceil(math.log2(max(n, 2))) + 4 + k // 32 + tries


@st.composite
def cases(draw, kinds, most=6):
    count = draw(st.integers(1, 64) | st.integers(65, 2048))
    few = st.sets(st.integers(0, count - 1), max_size=most)
    block = st.tuples(st.integers(0, count - 1), st.integers(1, 2 * most)).map(
        lambda one: set(range(one[0], min(one[0] + one[1], count)))
    )
    rows = texts(count)
    for place in draw(st.sets(st.integers(0, count - 1), max_size=3)):
        rows[place] = " " * (place + 1)
    places = draw(few | block)
    same = draw(st.sampled_from(sorted(kinds)))
    mixed = draw(st.booleans())
    each = {
        rows[place]: draw(st.sampled_from(sorted(kinds))) if mixed else same for place in places
    }
    return Case(rows, each)


@pytest.mark.case("A1")
@pytest.mark.case("A3")
@pytest.mark.fault(50)
@given(cases(FREE), st.booleans())
def test_only_the_texts_at_fault_fail_each_with_its_own_reason_after_few_requests(
    desk, case, known
):
    with desk(FakeEmbedder(info=UNKNOWN, script=server(case.bad)), retry=RETRY) as one:
        before = proven(one) if known else 0
        result, verdict = judged(one, case.rows)
        if verdict is not None:
            # The shortest texts of both halves were bad, and nothing had ever succeeded.
            assert not known
            assert verdict.position is None
            lone = one.embedder.calls[-2:]
            assert [len(call.texts) for call in lone] == [1, 1]
            assert {text for call in lone for text in call.texts} <= set(case.bad)
            return
        one.right(result, case.rows)
        assert {case.rows[row] for row in result.errors} == set(case.bad)
        for row, error in result.errors.items():
            assert error.position == row
            assert case.bad[case.rows[row]] in kind_of(error)
        assert one.embedder.meter.requests - before <= case.most
        assert one.embedder.meter.billed_twice == {}
        assert one.engine.sizes.known is None, "a text was at fault, and no size"
        one.check()


def judged(one, rows):
    try:
        return one.embed(rows, on_error="keep"), None
    except EmbeddingError as error:
        return error.partial, error


@pytest.mark.case("A4")
@pytest.mark.fault(40)
@given(cases(IN_REPLY), st.booleans())
def test_a_reply_without_some_vectors_keeps_the_others_and_those_are_asked_once_more(
    desk, case, known
):
    with desk(FakeEmbedder(info=UNKNOWN, script=server(case.bad)), retry=RETRY) as one:
        before = proven(one) if known else 0
        if len(case.bad) == len(case.rows):
            return
        result = one.embed(case.rows, on_error="keep")
        one.right(result, case.rows)
        assert {case.rows[row] for row in result.errors} == set(case.bad)
        for row, error in result.errors.items():
            assert error.position == row
            assert isinstance(error, InvalidResponse)
        assert one.embedder.meter.requests - before == 1 + len(case.bad)
        assert one.embedder.meter.billed_twice == dict.fromkeys(case.bad, 2)
        assert result.usage.unconfirmed_tokens == sum(map(tokens_of, case.bad))
        one.check()


@pytest.mark.case("A4")
def test_a_text_that_has_its_vector_when_it_is_asked_for_alone_is_no_failure(desk):
    def script(request, number):
        return Outcome(reply=nothing_for_the_first) if number == 0 else None

    def nothing_for_the_first(request, honest):
        return replace(honest, vectors=[None, *honest.vectors.tolist()[1:]])

    for rows in (texts(5), texts(2)):
        with desk(FakeEmbedder(info=UNKNOWN, script=script)) as one:
            arrived = []
            result = one.embed(rows, on_arrival=arrived.append)
            one.right(result, rows)
            assert [one.rows.tolist() for one in arrived] == [list(range(1, len(rows))), [0]]
            assert result.usage.unconfirmed_tokens == 0
            one.check()


@pytest.mark.case("A3")
@given(cases(CHARGED, most=4))
def test_a_search_charges_no_more_than_twice_what_it_began_with(desk, case):
    with desk(FakeEmbedder(info=UNKNOWN, script=server(case.bad)), retry=RETRY) as one:
        proven(one)
        result = one.embed(case.rows, on_error="keep")
        one.right(result, case.rows)
        failed = {case.rows[row] for row in result.errors}
        assert failed >= set(case.bad)
        whole = sum(len(text.encode()) for text in dict.fromkeys(case.rows))
        first = sum(one.embedder.calls[1].texts == call.texts for call in one.embedder.calls)
        assert result.usage.unconfirmed_tokens <= (first + 2) * whole
        if len(case.bad) <= 1:
            assert failed == set(case.bad)
        for row, error in result.errors.items():
            lone = error.position == row
            assert lone or error.position is None
            assert not lone or case.bad[case.rows[row]] in kind_of(error)
        one.check(certain=False)


@pytest.mark.case("A1")
@pytest.mark.case("A2")
@given(cases(FREE))
def test_raising_names_the_first_text_at_fault(desk, case):
    with desk(FakeEmbedder(info=UNKNOWN, script=server(case.bad)), retry=RETRY) as one:
        before = proven(one)
        if not case.bad:
            one.right(one.embed(case.rows), case.rows)
            return
        with pytest.raises(EmbeddingError) as caught:
            one.embed(case.rows)
        first = min(case.rows.index(text) for text in case.bad)
        assert caught.value.position == first
        assert str(caught.value).startswith(f"row {first}: ")
        assert case.bad[case.rows[first]] in kind_of(caught.value)
        one.right(caught.value.partial, case.rows)
        assert caught.value.partial.ok[:first].all()
        assert one.embedder.meter.requests - before <= case.most
        one.check()


@pytest.mark.fault(50)
@pytest.mark.parametrize("place", [0, 1, 1023, 1024, 2047])
def test_raising_keeps_the_good_texts(desk, place):
    rows = texts(2048)
    with desk(FakeEmbedder(info=WIDE, script=refusing({rows[place]}))) as one:
        with pytest.raises(RequestRejected, match=f"row {place}: ") as caught:
            one.embed(rows)
        assert caught.value.position == place
        partial = caught.value.partial
        one.right(partial, rows)
        assert [row for row in range(2048) if not partial.ok[row]] == [place]
        assert one.embedder.meter.billed_twice == {}
        assert one.embedder.meter.requests <= 2 + 22
        one.check()


@pytest.mark.case("A1")
def test_blank_texts_of_a_large_input_cost_no_others(desk):
    """8,192 rows with 12 blank ones, in 32 requests."""
    rows = texts(8192)
    for place in range(7, 8192, 700):
        rows[place] = " " * (1 + place // 700)
    info = replace(UNKNOWN, max_texts_per_request=256)

    def script(request, number):
        return None if all(map(str.strip, request.texts)) else RequestRejected("no", billed="no")

    with desk(FakeEmbedder(info=info, script=script)) as one:
        result = one.embed(rows, on_error="keep")
        assert sorted(result.errors) == list(range(7, 8192, 700))
        one.right(result, rows)
        one.check()


@pytest.mark.case("A1")
def test_two_bad_texts_in_each_request_of_a_client_that_has_embedded_nothing_yet(desk):
    rows = [("a " * 90 if row % 32 in (3, 20) else "fine ") + f"{row}" for row in range(320)]
    info = replace(UNKNOWN, max_texts_per_request=32)
    bad = {row: "400" for row in rows if row.startswith("a ")}
    with desk(FakeEmbedder(info=info, script=server(bad)), threads=8) as one:
        result = one.embed(rows, on_error="keep")
        assert {rows[row] for row in result.errors} == set(bad)
        one.right(result, rows)


def test_a_hundred_bad_texts_beside_each_other_are_no_dead_server(desk):
    """Whichever they are, also where a half, or the end of the input, has no good text any more."""
    for first, last in ((128, 256), (256, 512), (0, 100), (175, 475)):
        rows = texts(512)
        bad = dict.fromkeys(rows[first:last], "400")
        with desk(FakeEmbedder(info=UNKNOWN, script=server(bad))) as one:
            before = proven(one)
            result = one.embed(rows, on_error="keep")
            assert sorted(result.errors) == list(range(first, last))
            one.right(result, rows)
            checks = len(bad) // 32
            assert one.embedder.meter.requests - before <= 2 * len(bad) + 2 * 9 + 4 + checks
            one.check()


@pytest.mark.fault(50)
@pytest.mark.parametrize("per_request", [1, 32, 2048])
def test_a_server_that_refuses_everything_from_now_on_is_not_asked_once_for_each_text(
    desk, per_request
):
    rows = texts(4096)
    info = replace(UNKNOWN, max_texts_per_request=per_request)
    with desk(FakeEmbedder(info=info, script=refusing_after(1)), threads=2) as one:
        before = proven(one)
        with pytest.raises(RequestRejected, match="nothing more is sent") as caught:
            one.embed(rows, on_error="keep")
        assert caught.value.position is None
        assert one.embedder.meter.requests - before <= 64 + 2 + 2
        one.check()


def refusing_after(requests, error=None):
    """A server that refuses everything after so many requests."""

    def script(request, number):
        refusal = error or RequestRejected("no", status=400, billed="no")
        return copy.copy(refusal) if number >= requests else None

    return script


# The request itself


@pytest.mark.case("A7")
@pytest.mark.fault(50)
@pytest.mark.parametrize("on_error", ["keep", "raise"])
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("per_request", [1, 2, 32, 2048])
@pytest.mark.parametrize("kind", ["400", "413", "other", "500", "nonsense", "time-out", "a bug"])
def test_a_request_that_is_at_fault_itself_is_said_once_and_blamed_on_no_row(
    desk, on_error, threads, per_request, kind
):
    if per_request == 1 and kind in ("500", "time-out"):
        pytest.skip("one text a request, and an outage: the attempts end it")
    rows = texts(320)

    def script(request, number):
        return KINDS[kind]()

    info = replace(UNKNOWN, max_texts_per_request=per_request)
    with desk(FakeEmbedder(info=info, script=script), threads=threads, retry=RETRY) as one:
        with pytest.raises(ProviderError, match="no text's fault") as caught:
            one.embed(rows, on_error=on_error)
        assert caught.value.position is None
        assert not str(caught.value).startswith("row")
        assert not caught.value.partial.ok.any()
        assert caught.value.partial.errors == {}
        tries = ATTEMPTS if kind == "500" else 1
        assert one.embedder.meter.requests <= threads * tries + 3
        one.check(certain=kind in FREE)


@pytest.mark.case("A7")
@pytest.mark.fault(50)
@pytest.mark.parametrize("per_request", [1, 2])
def test_what_one_thread_found_at_fault_no_other_asks_again(desk, monkeypatch, per_request):
    """However long it takes from the verdict to the end of the call."""
    threads = 8
    all_sent, all_done = threading.Barrier(threads), threading.Barrier(threads)
    do, begun = Search.run, threading.local()

    def do_and_wait(search, request):
        is_first, begun.task = not hasattr(begun, "task"), request
        try:
            do(search, request)
        finally:
            if is_first:
                all_done.wait(LONG)

    class Together(FakeEmbedder):
        def embed(self, request):
            if not hasattr(begun, "request"):
                begun.request = request
                all_sent.wait(LONG)
            return super().embed(request)

    def script(request, number):
        return RequestRejected("no", status=400, billed="no")

    monkeypatch.setattr(Search, "run", do_and_wait)
    info = replace(UNKNOWN, max_texts_per_request=per_request)
    with desk(Together(info=info, script=script), threads=threads, retry=RETRY) as one:
        with pytest.raises(RequestRejected, match="no text's fault") as caught:
            one.embed(texts(320), on_error="keep")
        assert caught.value.partial.errors == {}
        # One text of each half, and a sentence of ours.
        assert one.embedder.meter.requests <= threads + 3
        one.check()


@pytest.mark.case("A7")
def test_blank_texts_do_not_tell_that_the_request_is_at_fault(desk):
    rows = [" ", "  ", "good", "   ", "    ", "     "]
    bad = {row: "400" for row in rows if not row.strip()}
    with desk(FakeEmbedder(info=UNKNOWN, script=server(bad))) as one:
        result = one.embed(rows, on_error="keep")
        assert sorted(result.errors) == [0, 1, 3, 4, 5]


@pytest.mark.case("A7")
def test_two_texts_that_fail_for_different_reasons_do_not_condemn_the_request(desk):
    rows = ["a", "bb", "ccc", "d", "ee", "fff"]
    with desk(FakeEmbedder(info=UNKNOWN, script=server({"a": "400", "d": "413"}))) as one:
        result = one.embed(rows, on_error="keep")
        assert sorted(result.errors) == [0, 3]
        one.right(result, rows)
        one.check()


@pytest.mark.parametrize(
    ("one", "other", "are_alike"),
    [
        (RequestRejected("no"), RequestRejected("no"), True),
        (RequestRejected("no"), RequestRejected("no", status=400), False),
        (RequestRejected("no", code="x"), RequestRejected("no", code="y"), False),
        (RequestRejected("no"), RequestTooLarge("no"), False),
        (RequestRejected("id 7f3a, 12 tokens"), RequestRejected("id 99bb2, 3 tokens"), True),
        (RequestRejected("'a b' is bad"), RequestRejected("'c' is bad"), True),
        (RequestRejected('"a" is bad'), RequestRejected('"c" is bad'), True),
        (RequestRejected("unknown parameter"), RequestRejected("bad text"), False),
    ],
)
def test_what_fails_alike(one, other, are_alike):
    assert (nature(one) == nature(other)) == are_alike


# What is no text's fault


@pytest.mark.parametrize("on_error", ["keep", "raise"])
@pytest.mark.parametrize("within", [False, True])
def test_another_model_or_width_is_said_once_and_nothing_more_is_sent(desk, on_error, within):
    rows = texts(64)
    info = replace(UNKNOWN, max_texts_per_request=8)

    def script(request, number):
        if number < 3:
            return None
        if within and len(request.texts) > 1:
            return RequestRejected("no", billed="no")
        return Outcome(reply=lambda request, honest: replace(honest, model="another"))

    with desk(FakeEmbedder(info=info, script=script), threads=1) as one:
        with pytest.raises(ReplyMismatch, match="reply_models") as caught:
            one.embed(rows, on_error=on_error)
        assert caught.value.partial.ok.sum() == 24
        # In a search: the request, two halves, two quarters, and one text.
        assert one.embedder.meter.requests == 3 + (6 if within else 1)
        one.check(certain=False)


@pytest.mark.parametrize(
    "error",
    [RateLimited("slow", retry_after=400.0), ProviderUnavailable("no route", billed="no")],
    ids=["rate", "connection"],
)
def test_the_rate_and_the_connection_are_never_searched(desk, error):
    rows = texts(64)
    with desk(FakeEmbedder(info=UNKNOWN, script=refusing_after(1, error)), retry=RETRY) as one:
        before = proven(one)
        result = one.embed(rows, on_error="keep")
        assert sorted(result.errors) == list(range(64))
        assert one.embedder.meter.requests - before <= ATTEMPTS
        one.check()


def test_what_concerns_the_account_ends_a_search(desk):
    script = [None, *[RequestRejected("no", billed="no")] * 3, AuthenticationFailed("expired")]
    with desk(FakeEmbedder(info=UNKNOWN, script=script)) as one:
        proven(one)
        with pytest.raises(AuthenticationFailed):
            one.embed(texts(64), on_error="keep")
        assert one.embedder.meter.requests == 5
        one.check()


# Time, quota, money


@pytest.mark.case("A5")
@pytest.mark.parametrize("fits", [1, 3, 20, 63])
@pytest.mark.parametrize("known", [False, True])
def test_a_request_that_takes_too_long_is_divided_and_the_size_is_learned(desk, fits, known):
    rows = texts(256)

    def script(request, number):
        return TimedOut("no answer in time") if len(request.texts) > fits else None

    info = replace(UNKNOWN, max_texts_per_request=64)
    with desk(FakeEmbedder(info=info, script=script), retry=RETRY, threads=1) as one:
        if known:
            proven(one)
        one.right(one.embed(rows), rows)
        late = sum(len(call.texts) for call in one.embedder.calls if call.error)
        # What came too late was billed all the same: the request, and twice that at most.
        assert late <= 3 * 64
        failed = one.embedder.meter.requests - len({call.texts for call in one.embedder.calls})
        assert failed == 0, "no request is sent twice as it was"
        size = one.engine.sizes.known.texts
        assert fits / 2 <= size <= fits
        before = one.embedder.meter.requests
        again = [f"{row} again" for row in texts(size)]
        one.right(one.embed(again), again)
        assert one.embedder.meter.requests == before + 1
        one.check(certain=False)


@pytest.mark.case("A3")
def test_a_text_that_breaks_the_server_every_time_fails_alone(desk):
    rows = texts(64)
    info = replace(UNKNOWN, max_texts_per_request=32)
    with desk(
        FakeEmbedder(info=info, script=server({rows[7]: "500"})),
        retry=RETRY,
        quota=RetryQuota(35.0, 0.1),
        threads=1,
    ) as one:
        result = one.embed(rows, on_error="keep")
        assert sorted(result.errors) == [7]
        assert not result.errors[7].retryable
        assert "others of the same request passed" in str(result.errors[7])
        one.right(result, rows)
        assert one.embedder.meter.requests <= 1 + ATTEMPTS + 2 + 2 * 5
        one.check()


@pytest.mark.case("A3")
def test_many_texts_that_break_the_server_are_found_with_what_successes_earn(desk):
    """Each costs its attempts, and no more: parts whose sibling passed take nothing."""
    rows = texts(32 * 15)
    bad = {rows[row]: "500" for row in range(5, len(rows), 32)}
    info = replace(UNKNOWN, max_texts_per_request=32)
    with desk(
        FakeEmbedder(info=info, script=server(bad)), retry=RETRY, quota=RetryQuota(35.0, 0.1)
    ) as one:
        proven(one)
        result = one.embed(rows, on_error="keep")
        assert {rows[row] for row in result.errors} == set(bad)
        one.check()


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("per_request", "billed", "known"),
    # Every two of them together.
    [(1, "no", False), (1, "unknown", True), (32, "no", True), (32, "unknown", False)],
)
def test_an_outage_is_not_answered_with_a_search(desk, per_request, billed, known):
    def script(request, number):
        if known and number == 0:
            return None
        return ProviderUnavailable("overloaded", billed=billed, status=503)

    info = replace(UNKNOWN, max_texts_per_request=per_request)
    rows = texts(300 * per_request)
    with desk(
        FakeEmbedder(info=info, script=script),
        threads=32,
        retry=RETRY,
        quota=RetryQuota(35.0, 0.1),
    ) as one:
        before = proven(one) if known else 0
        try:
            result = one.embed(rows, on_error="keep")
        except ProviderUnavailable as error:
            assert not known
            result = error.partial
        assert not result.ok.any()
        assert one.embedder.meter.requests - before <= 300 * 1.1 + 35
        one.check(certain=False)


class CountingQuota(RetryQuota):
    """Remembers what was taken from it, and given back as no answer to an outage."""

    def __init__(self, most, ratio):
        super().__init__(most, ratio)
        self.taken = self.returned = 0

    def take(self):
        taken = super().take()
        self.taken += taken
        return taken

    def give_back(self, retries):
        self.returned += retries
        super().give_back(retries)


@pytest.mark.case("A3")
@pytest.mark.fault(26)
@settings(max_examples=settings.default.max_examples // 2)
@given(
    chance=st.randoms(use_true_random=False),
    down=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
    requests=st.integers(1, 30),
    per_request=st.sampled_from([2, 8, 32]),
    billed=st.sampled_from(["no", "unknown"]),
)
def test_a_server_that_is_down_now_and_then_is_not_asked_much_more_often(
    desk, chance, down, requests, per_request, billed
):
    """No text is at fault, and each failure looks as if one were."""

    def script(request, number):
        if number == 0 or chance.random() >= down:
            return None
        return ProviderUnavailable("overloaded", billed=billed, status=503)

    info = replace(UNKNOWN, max_texts_per_request=per_request)
    quota = CountingQuota(35.0, 0.1)
    fake = FakeEmbedder(info=info, script=script)
    with desk(fake, retry=RETRY, quota=quota, threads=1) as one:
        one.embed([f"to begin with {number}" for number in range(per_request)])
        rows = texts(requests * per_request)
        result = one.embed(rows, on_error="keep")
        calls = one.embedder.calls[1:]
        parts = [set(call.texts) for call in calls if len(call.texts) < per_request]
        whole = {call.texts for call in calls if len(call.texts) == per_request}
        divided = sum(any(part <= set(texts) for part in parts) for texts in whole)
        blamed = sum("others of the same request" in str(each) for each in result.errors.values())
        steps = math.ceil(math.log2(per_request))
        assert len(calls) <= requests + quota.taken + 4 * divided + 2 * steps * (divided + blamed)
        served = sum(not call.error for call in calls)
        assert quota.taken <= 35 + 0.1 * (served + 1) + quota.returned
        assert one.engine.sizes.known is None, "a request of that size had passed"
        one.right(result, rows)
        one.check(certain=False)


def test_a_search_ends_with_the_deadline(desk):
    from embedcore.testing import FakeClock

    clock = FakeClock()
    rows = texts(64)

    def script(request, number):
        if number == 0:
            return None
        clock.advance(1.0)
        return RequestRejected("no", billed="no")

    retry = RETRY.model_copy(update={"deadline": 4.5})
    with desk(FakeEmbedder(info=UNKNOWN, script=script), retry=retry, clock=clock) as one:
        before = proven(one)
        result = one.embed(rows, on_error="keep")
        assert sorted(result.errors) == list(range(64))
        assert one.embedder.meter.requests - before == 5
        one.check()


def test_a_search_ends_with_the_budget(desk):
    """Parts of what was charged need new money; where there is none, what went wrong is raised."""
    rows = texts(64)
    cost = sum(map(tokens_of, rows))
    script = server({rows[7]: "nonsense"})
    with desk(FakeEmbedder(info=UNKNOWN, script=script), daily=cost + cost // 4) as one:
        with pytest.raises(InvalidResponse) as caught:
            one.embed(rows, on_error="keep")
        assert caught.value.budget_blocked
        assert one.spent <= cost + cost // 4
        one.check(certain=False)


@pytest.mark.parametrize("on_error", ["keep", "raise"])
@pytest.mark.parametrize("kind", ["nonsense", "reset", "502", "a bug", "null"])
def test_no_search_hides_what_went_wrong_behind_the_budget(desk, kind, on_error):
    """Whatever was charged, and however much more may be spent: the limit is only the reason why it
    was not tried again."""
    rows = texts(16)
    cost = sum(map(tokens_of, rows))
    for more in range(0, cost, 5):
        script = server({rows[7]: kind})
        with desk(FakeEmbedder(info=UNKNOWN, script=script), daily=cost + more, retry=RETRY) as one:
            try:
                result, raised = one.embed(rows, on_error=on_error), None
            except EmbeddingError as error:
                result, raised = error.partial, error
            errors = [*result.errors.values(), *([] if raised is None else [raised])]
            assert errors
            for error in errors:
                assert not isinstance(error, BudgetExceeded)
                assert kind in kind_of(error)
                assert isinstance(error.__cause__, BudgetExceeded) or not error.budget_blocked
                assert str(error).count("the budget allows") == error.budget_blocked
            one.right(result, rows)
            assert one.spent <= cost + more
            one.check(certain=False)


def test_a_question_that_the_budget_refuses_is_no_answer(desk):
    """After 64 failures alike a sentence is sent; where it may not be, nothing is said of it."""
    rows = texts(200)
    cost = sum(map(tokens_of, rows))

    def script(request, number):
        return None if number == 0 else RequestRejected("no", billed="no")

    with desk(FakeEmbedder(info=UNKNOWN, script=script), threads=1) as one:
        before = proven(one)
        one.limited(one.spent + cost)
        with pytest.raises(RequestRejected, match="the budget allows no further") as caught:
            one.embed(rows, on_error="keep")
        assert "a short sentence" not in str(caught.value)
        assert isinstance(caught.value.__cause__, BudgetExceeded)
        assert one.embedder.meter.requests - before == 64
        one.check()


# Too large


def at_most(texts=10**9, in_bytes=10**9):
    """A server with limits that nobody was told of."""

    def script(request, number):
        size = sum(len(text.encode()) for text in request.texts)
        if len(request.texts) > texts or size > in_bytes:
            return RequestTooLarge("too large", status=413)
        return None

    return script


@pytest.mark.fault(51)
@pytest.mark.fault(16)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=300),
    st.integers(1, 64),
    st.sampled_from([3000, 20_000, 10**9]),
)
def test_requests_refused_as_too_large_are_sent_smaller(desk, sizes, most, in_bytes):
    rows = [f"{index:03} ".ljust(size, "x") for index, size in enumerate(sizes)]
    script = at_most(most, max(in_bytes, 3000))
    with desk(FakeEmbedder(info=WIDE, script=script)) as one:
        result = one.embed(rows)
        one.right(result, rows)
        assert result.ok.all()
        assert one.embedder.meter.billed_twice == {}
        one.check()


@pytest.mark.fault(51)
def test_the_size_that_works_is_remembered(desk):
    with desk(FakeEmbedder(info=WIDE, script=at_most(32)), threads=1) as one:
        one.embed(texts(2048))
        assert one.embedder.meter.rejected_requests <= 16
        before = one.embedder.meter.rejected_requests
        one.embed([f"{row} more" for row in texts(2048)])
        assert one.embedder.meter.rejected_requests <= before + 1
        assert max(len(call.texts) for call in one.embedder.calls if not call.error) == 32
        one.check()


@pytest.mark.fault(51)
def test_two_long_texts_refused_say_nothing_against_many_short_ones(desk):
    with desk(FakeEmbedder(info=WIDE, script=at_most(in_bytes=30_000)), threads=1) as one:
        rows = ["a" * 20_000, "b" * 20_000]
        one.right(one.embed(rows), rows)
        assert one.embedder.meter.requests == 3
        rows = texts(1000)
        one.right(one.embed(rows), rows)
        assert one.embedder.meter.requests == 4
        one.check()


@pytest.mark.fault(51)
@pytest.mark.parametrize("on_error", ["keep", "raise"])
@pytest.mark.parametrize("known", [False, True])
def test_a_server_that_finds_everything_too_large_is_left_alone(desk, on_error, known):
    rows = texts(4096)

    def script(request, number):
        return None if known and number == 0 else RequestTooLarge("too large", status=413)

    with desk(FakeEmbedder(info=WIDE, script=script), threads=4) as one:
        if known:
            proven(one)
        with pytest.raises(RequestTooLarge):
            one.embed(rows, on_error=on_error)
        assert one.embedder.meter.requests <= (64 + 8 if known else 10)
        one.check()


# Too long


def too_long_above(most, *, named=True):
    """A server that counts characters, and names the first text that is too long for it."""

    def script(request, number):
        for place, text in enumerate(request.texts):
            if len(text) > most:
                position = place if named else None
                return InputTooLong("too long", position=position, billed="no")
        return None

    return script


@pytest.mark.fault(49)
@pytest.mark.parametrize("named", [True, False])
def test_a_text_that_the_server_finds_too_long_is_cut_by_little_more(desk, named):
    rows = [*texts(5), "x" * 100, *texts(9)[5:]]
    with desk(FakeEmbedder(info=WIDE, script=too_long_above(60, named=named))) as one:
        proven(one)
        result = one.embed(rows)
        kept = "x" * (100 - result.cuts[5].characters)
        assert 48 <= len(kept) <= 60
        one.right(result, [*rows[:5], kept, *rows[6:]])
        assert result.ok.all()
        assert result.tokens_cut == {5: 25 - len(kept) // 4}
        assert one.embedder.meter.billed_twice == {}
        one.check()


@pytest.mark.fault(49)
def test_a_text_of_which_not_a_quarter_fits_is_not_cut(desk):
    rows = [*texts(5), "x" * 400, *texts(9)[5:]]
    with desk(FakeEmbedder(info=WIDE, script=too_long_above(60))) as one:
        with pytest.raises(InputTooLong, match="row 5: ") as caught:
            one.embed(rows)
        assert caught.value.position == 5
        result = one.embed(rows, on_error="keep")
        assert set(result.errors) == {5}
        one.right(result, rows)
        refused = [call.texts for call in one.embedder.calls if call.error]
        assert len(refused) <= 2 * (2 + 8)
        assert min(len(texts[0]) for texts in refused if len(texts) == 1) == 100
        one.check()


@pytest.mark.fault(49)
def test_with_reject_a_text_the_server_finds_too_long_is_named(desk):
    rows = [*texts(5), "x" * 100, "y" * 90, *texts(9)[5:]]
    script = too_long_above(60)
    with desk(FakeEmbedder(info=WIDE, script=script), overlong="reject") as one:
        with pytest.raises(InputTooLong, match="row 5: "):
            one.embed(rows)
        result = one.embed(rows, on_error="keep")
        assert set(result.errors) == {5, 6}
        assert {result.errors[row].position for row in (5, 6)} == {5, 6}
        one.right(result, rows)
        one.check()


@pytest.mark.fault(49)
@pytest.mark.parametrize("named", [True, False])
def test_a_server_that_finds_every_text_too_long_is_asked_a_bounded_number_of_times(desk, named):
    rows = texts(2048)
    with desk(FakeEmbedder(info=WIDE, script=too_long_above(2, named=named))) as one:
        with pytest.raises(InputTooLong):
            one.embed(rows)
        assert one.embedder.meter.requests <= 30
        try:
            result = one.embed(rows, on_error="keep")
        except EmbeddingError as error:
            result = error.partial
        assert one.embedder.meter.requests <= 400
        assert not result.ok.any()
        one.check()


@pytest.mark.fault(49)
def test_a_text_that_the_provider_itself_refuses_is_named_and_the_others_are_sent(desk):
    def script(request, number):
        if "BAD" in request.texts:
            return InputRejected("cannot be sent", position=request.texts.index("BAD"))
        return None

    rows = [*texts(30), "BAD", *texts(60)[30:]]
    with desk(FakeEmbedder(info=WIDE, script=script)) as one:
        result = one.embed(rows, on_error="keep")
        assert set(result.errors) == {30}
        assert result.errors[30].position == 30
        one.right(result, rows)
        # All of them, the one that is named, and the others.
        assert result.usage.requests == 3
        one.check()


@settings(deadline=None)
@given(st.sampled_from([-1, 5, 10**6]))
def test_a_position_that_makes_no_sense_is_searched_instead(desk, position):
    def script(request, number):
        if "BAD" in request.texts:
            return InputTooLong("too long", position=position, billed="no")
        return None

    rows = ["a", "b", "BAD", "c"]
    with desk(FakeEmbedder(info=WIDE, script=script)) as one:
        result = one.embed(rows, on_error="keep")
        assert set(result.errors) == {2}
        one.right(result, rows)
        one.check()


# Mixed


@given(
    st.lists(st.sampled_from(["good", "evil", "long", "name", "fine"]), min_size=1, max_size=24),
    st.sampled_from([3, 8, 64]),
    st.integers(1, 40),
)
def test_whatever_is_wrong_with_whichever_text_the_others_are_billed(desk, kinds, most, largest):
    rows = [f"{kind} text {index}" for index, kind in enumerate(kinds)]

    def script(request, number):
        if len(request.texts) > largest:
            return RequestTooLarge("too large", billed="no")
        for place, text in enumerate(request.texts):
            kind = text[:4]
            if kind == "evil":
                return RequestRejected("no", billed="no")
            if kind == "long" and len(text) > 3:
                return InputTooLong("too long", billed="no")
            if kind == "name" and len(text) > 3:
                return InputTooLong("too long", position=place, billed="no")
        return None

    info = replace(WIDE, max_texts_per_request=most)
    with desk(FakeEmbedder(info=info, script=script), threads=2) as one:
        proven(one)
        result = one.embed(rows, on_error="keep")
        for row, kind in enumerate(kinds):
            if kind in ("good", "fine"):
                assert result.ok[row]
            else:
                # Half of a long text is still too long for this server.
                assert result.errors[row].position == row
        one.right(result, rows)
        one.check()


def test_the_bill_of_a_search_is_the_bill_of_the_good_texts(desk):
    rows = texts(100)
    with desk(FakeEmbedder(info=WIDE, script=refusing({rows[7]}))) as one:
        result = one.embed(rows, on_error="keep")
        good = [row for row in rows if row != rows[7]]
        assert result.usage.tokens == sum(map(tokens_of, good)) == one.spent
        assert result.usage.unconfirmed_tokens == 0
        one.limited(10**6)
        one.check()
