"""What a search may not cost the texts that are good: the kinds that the shortest texts, an own 500
and long texts hide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embedcore.errors import ProviderUnavailable, RequestRejected
from embedcore.policy.retry import RetryQuota, RetrySettings
from embedcore.testing import FakeEmbedder
from embedcore.testing.fakes import FAKE_INFO

UNKNOWN = replace(
    FAKE_INFO,
    dimensions=8,
    max_input_tokens=None,
    max_texts_per_request=32,
    max_tokens_per_request=300_000,
)
RETRY = RetrySettings(attempts=3, first_wait=0.0, longest_wait=0.0)


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
    def script(request, number):
        much = len(request.texts) > 10
        return ProviderUnavailable("boom", status=500, billed="no") if much else None

    rows = [f"text number {index}" for index in range(count)]
    with desk(
        FakeEmbedder(info=UNKNOWN, script=script),
        retry=RETRY,
        quota=RetryQuota(35.0, 0.1),
        threads=16,
    ) as one:
        result = one.embed(rows, on_error="keep")
        assert result.ok.all()


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
