"""What a search may not cost the texts that are good: the kinds that the shortest texts, an own 500
and long texts hide."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import ProviderUnavailable, RequestRejected, RequestTooLarge
from embedcore.policy.cache import PROBE_TEXT
from embedcore.policy.retry import RetryQuota
from embedcore.settings import RetrySettings
from embedcore.testing import FakeEmbedder
from embedcore.testing.fakes.embedder import FAKE_INFO

LONG = 60.0
UNKNOWN = replace(
    FAKE_INFO,
    dimensions=8,
    max_input_tokens=None,
    max_texts_per_request=32,
    max_tokens_per_request=300_000,
)
RETRY = RetrySettings(attempts=3, first_wait=0.0, longest_wait=0.0)


def refuses_more_than_ten(request, number):
    much = len(request.texts) > 10
    return ProviderUnavailable("boom", status=500, billed="no") if much else None


@pytest.mark.case("A1")
@pytest.mark.case("A7")
def test_that_the_shortest_texts_are_bad_does_not_make_the_request_bad(desk):
    rows = [f"a sentence that is long enough, number {index}" for index in range(32)]
    bad = {3: "bad three", 19: "bad nine"}
    rows = [bad.get(index, row) for index, row in enumerate(rows)]

    def script(request, number):
        found = set(bad.values()) & set(request.texts)
        return RequestRejected("no", status=400, billed="no") if found else None

    with desk(FakeEmbedder(info=UNKNOWN, script=script), retry=RETRY) as one:
        result = one.embed(rows, on_error="keep")
        assert set(np.flatnonzero(~result.ok)) == set(bad)
        one.right(result, rows)


@pytest.mark.case("A3")
@pytest.mark.case("A6")
@pytest.mark.parametrize("count", [64, 224, 640])
def test_a_size_that_is_refused_by_500_uses_up_no_quota_of_the_others(desk, count):
    rows = [f"text number {index}" for index in range(count)]
    with desk(
        FakeEmbedder(info=UNKNOWN, script=refuses_more_than_ten),
        retry=RETRY,
        quota=RetryQuota(35.0, 0.1),
        threads=16,
    ) as one:
        result = one.embed(rows, on_error="keep")
        assert result.ok.all()


@pytest.mark.case("A3")
@pytest.mark.case("A6")
@pytest.mark.parametrize("quota", [0.0, 35.0])
@pytest.mark.parametrize("count", [64, 640])
def test_a_size_is_found_where_the_retries_are_used_up(desk, quota, count):
    """All requests leave at once, and each is refused before any part is sent."""
    threads = min(count // 32, 16)
    together, began = threading.Barrier(threads), threading.local()

    class Together(FakeEmbedder):
        def embed(self, request):
            if len(request.texts) > 1 and not hasattr(began, "it"):
                began.it = True
                together.wait(LONG)
            return super().embed(request)

    rows = [f"text number {index}" for index in range(count)]
    with desk(
        Together(info=UNKNOWN, script=refuses_more_than_ten),
        retry=RETRY,
        quota=RetryQuota(quota, 0.0),
        threads=threads,
    ) as one:
        one.embed(["it has served before"])
        result = one.embed(rows, on_error="keep")
        assert result.ok.all()
        one.right(result, rows)
        one.check()


@pytest.mark.case("A3")
@pytest.mark.fault(26)
@settings(max_examples=settings.default.max_examples // 5, deadline=None)
@given(
    serves=st.integers(0, 40),
    quota=st.sampled_from([0, 3, 35]),
    threads=st.sampled_from([1, 8]),
    billed=st.sampled_from(["no", "unknown"]),
)
def test_an_outage_that_begins_midway_is_asked_one_sentence_more(
    desk, serves, quota, threads, billed
):
    def script(request, number):
        if number <= serves:
            return None
        return ProviderUnavailable("overloaded", billed=billed, status=503)

    rows = [f"text number {index}" for index in range(32 * 60)]
    with desk(
        FakeEmbedder(info=UNKNOWN, script=script),
        retry=RETRY,
        quota=RetryQuota(float(quota), 0.0),
        threads=threads,
    ) as one:
        one.embed(["it has served before"])
        result = one.embed(rows, on_error="keep")
        assert result.ok.sum() == 32 * serves
        calls = one.embedder.calls[1:]
        sentences = [call for call in calls if call.texts == (PROBE_TEXT,)]
        assert len(sentences) <= 1
        # What was under way when the last answer came could not know.
        assert len(calls) <= 60 + quota + len(sentences) + 2 * (threads - 1)
        one.check(certain=False)


@pytest.mark.case("A3")
def test_an_answer_that_comes_late_does_not_end_an_outage(desk):
    """Its request had left before the server failed."""
    asked, late = threading.Event(), threading.Event()

    def script(request, number):
        if number < 2:
            return None
        if list(request.texts) == [PROBE_TEXT]:
            asked.set()
        elif asked.is_set():
            late.set()
        return ProviderUnavailable("overloaded", billed="no", status=503)

    class Late(FakeEmbedder):
        def embed(self, request):
            reply = super().embed(request)
            assert len(request.texts) == 1 or late.wait(60)
            return reply

    rows = [f"text number {index}" for index in range(32 * 60)]
    with desk(
        Late(info=UNKNOWN, script=script),
        retry=RETRY,
        quota=RetryQuota(3.0, 0.0),
        threads=2,
    ) as one:
        one.embed(["it has served before"])
        result = one.embed(rows, on_error="keep")
        assert result.ok.sum() == 32
        sentences = [call for call in one.embedder.calls if call.texts == (PROBE_TEXT,)]
        assert len(sentences) == 1
        one.check(certain=False)


@pytest.mark.case("A1")
@pytest.mark.parametrize("error", [RequestRejected, ProviderUnavailable])
@pytest.mark.parametrize("bad", [[24], [8, 17], [7, 11]])
def test_a_long_text_whose_refusals_are_charged_costs_no_other_its_vector(desk, error, bad):
    rows = [f"text number {index}" for index in range(32)]
    for index in bad:
        rows[index] = f"long {index} " + "word " * 700

    def script(request, number):
        much = any(len(text) > 1_000 for text in request.texts)
        return error("", status=400, billed="unknown") if much else None

    with desk(FakeEmbedder(info=UNKNOWN, script=script), retry=RETRY) as one:
        result = one.embed(rows, on_error="keep")
        assert list(np.flatnonzero(~result.ok)) == bad
        one.right(result, rows)


@pytest.mark.case("A6")
@settings(max_examples=settings.default.max_examples * 2 // 5, deadline=None)
@given(
    named=st.integers(-1, 40),
    bad=st.integers(-1, 40),
    takes=st.integers(1, 31),
    count=st.integers(32, 320),
    threads=st.sampled_from([1, 4]),
)
def test_a_number_in_a_refusal_that_is_wrong_costs_no_more_than_none(
    desk, named, bad, takes, count, threads
):
    def server(most):
        def script(request, number):
            if len(request.texts) <= takes and f"text number {bad}" not in request.texts:
                return None
            return RequestTooLarge("no", max_texts=most, status=400, billed="no")

        return script

    rows = [f"text number {index}" for index in range(count)]
    needed = {}
    for most in (None, named, takes):
        with desk(FakeEmbedder(info=UNKNOWN, script=server(most)), threads=threads) as one:
            result = one.embed(rows, on_error="keep")
            assert list(np.flatnonzero(~result.ok)) == [bad] * (0 <= bad < count)
            one.right(result, rows)
            needed[most] = one.embedder.meter.requests
            one.check()
    # Requests that were under way when the size was found are divided each by itself. What refuses
    # the text at fault names the number once more: the way up from there begins again.
    searches = 2 * math.ceil(math.log2(32)) * (threads + (0 <= bad < count))
    assert needed[takes] <= needed[None] + 1 + 2 * threads, needed
    assert needed[named] <= max(needed[None], 2 * math.ceil(count / takes)) + searches, needed
