"""How long to wait, and what is left, by the headers of a reply."""

from __future__ import annotations

import math
from email.utils import format_datetime, formatdate

import pytest
from hypothesis import given, strategies as st

from embedcore.provider.rate_headers import (
    duration,
    rate_limits,
    refill_after,
    request_id,
    retry_after,
    wait_in_words,
)
from embedcore.provider.types import RateLimits


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20.0),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "20"}, 0.25),
        ({"retry-after-ms": "oops", "retry-after": "20"}, 20.0),
        ({"retry-after": "1000000000"}, 1e9),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e3"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "1_0"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "9" * 400}, None),
        (
            {
                "retry-after": "Mon, 23 Nov 2026 12:00:30 GMT",
                "date": "Mon, 23 Nov 2026 12:00:00 GMT",
            },
            30.0,
        ),
        (
            {
                "retry-after": "Mon, 23 Nov 2026 11:59:00 GMT",
                "date": "Mon, 23 Nov 2026 12:00:00 GMT",
            },
            None,
        ),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, None),
        ({"retry-after": "Mon, 99 Nov 9999 99:99:99 GMT"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.fault(22)
def test_a_date_counts_from_now_where_the_reply_has_none() -> None:
    import time

    wait = retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)})
    assert wait == pytest.approx(60, abs=2)


@pytest.mark.fault(22)
@given(st.text() | st.floats().map(str) | st.datetimes().map(format_datetime), st.text())
def test_any_header_gives_a_finite_wait_or_none(text: str, other: str) -> None:
    for headers in ({"retry-after": text, "date": other}, {"retry-after-ms": text}):
        wait = retry_after(headers)
        assert wait is None or (wait > 0 and math.isfinite(wait))
    seconds = duration(text)
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12ms", 0.012),
        ("0s", 0.0),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("23m16.298s", 1396.298),
        ("1h2m3s", 3723.0),
        ("500µs", 0.0005),
        ("7", 7.0),
        ("", None),
        ("-1s", None),
        ("1d", None),
        ("s", None),
        ("1s2", None),
    ],
)
def test_durations_as_go_writes_them(text: str, seconds: float | None) -> None:
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


def test_rate_limits_as_openai_sends_them() -> None:
    # Values of a recording of 2026-08-19.
    headers = {
        "x-ratelimit-limit-requests": "5000",
        "x-ratelimit-limit-tokens": "1000000",
        "x-ratelimit-remaining-requests": "4999",
        "x-ratelimit-remaining-tokens": "999995",
        "x-ratelimit-reset-requests": "12ms",
        "x-ratelimit-reset-tokens": "0s",
    }
    assert rate_limits(headers) == RateLimits(
        limit_requests=5000,
        remaining_requests=4999,
        reset_requests=0.012,
        limit_tokens=1_000_000,
        remaining_tokens=999_995,
        reset_tokens=0.0,
    )


def test_rate_limits_as_mistral_sends_them() -> None:
    # Values of recordings of 2026-08 and 2025-09.
    of_a_minute = {
        "x-ratelimit-limit-req-minute": "360",
        "x-ratelimit-remaining-req-minute": "359",
        "x-ratelimit-tokens-query-cost": "9",
    }
    assert rate_limits(of_a_minute) == RateLimits(limit_requests=360, remaining_requests=359)
    earlier = {
        "x-ratelimit-limit-req-10-second": "60",
        "x-ratelimit-remaining-req-10-second": "3",
        "x-ratelimit-limit-tokens-minute": "20000000",
        "x-ratelimit-remaining-tokens-minute": "19999874",
        "x-ratelimit-limit-tokens-month": "200000000000",
    }
    assert rate_limits(earlier) == RateLimits(
        limit_requests=360, limit_tokens=20_000_000, remaining_tokens=19_999_874
    )


def test_rate_limits_that_say_nothing_are_none() -> None:
    assert rate_limits({}) is None
    assert rate_limits({"x-ratelimit-remaining-tokens": "-1"}) is None
    assert rate_limits({"x-ratelimit-limit-tokens": "many"}) is None


def test_request_ids() -> None:
    assert request_id({"x-request-id": "req_1"}) == "req_1"
    assert request_id({"apim-request-id": "abc-1"}) == "abc-1"
    assert request_id({}) is None
    assert request_id({"x-request-id": "a b"}) is None
    assert request_id({"x-request-id": "a" * 200}) is None
    assert request_id({"request-id": "abc-1"}) == "abc-1"


DATED = {"date": "Mon, 30 Nov 2026 00:00:00 GMT"}


@pytest.mark.case("B7")
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20s"}, 20.0),
        ({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "20s"}, None),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "20"}, 20.0),
        ({"ratelimit-remaining": "0", "ratelimit-reset": "20"}, 20.0),
        ({"ratelimit": "limit=100, remaining=0, reset=20"}, 20.0),
        ({"ratelimit": '"default";r=0;t=20'}, 20.0),
        ({"ratelimit": '"default";r=3;t=20'}, None),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1795996820"}, 20.0),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1795996820000"}, 20.0),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "2026-11-30T00:00:20Z"}, 20.0),
        ({"anthropic-ratelimit-tokens-remaining": "0"}, None),
        (
            {
                "anthropic-ratelimit-tokens-remaining": "0",
                "anthropic-ratelimit-tokens-reset": "2026-11-30T00:00:20Z",
            },
            20.0,
        ),
        ({"x-ratelimit-reset-requests": "6s"}, 6.0),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "3s",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "1m30s",
            },
            90.0,
        ),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "soon"}, None),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0s"}, None),
        ({"x-ratelimit-limit-tokens": "7"}, None),
        ({}, None),
    ],
)
def test_what_is_used_up_is_there_again_after(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert refill_after({**headers, **DATED}) == seconds


@pytest.mark.case("B7")
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ms-retry-after-ms": "1500"}, 1.5),
        ({"x-retry-after": "20"}, 20.0),
        ({"x-rate-limit-retry-after-seconds": "20"}, 20.0),
        ({"retry-after-seconds": "20"}, 20.0),
        ({"x-retry-after": "20", "retry-after": "3"}, 3.0),
        ({"x-retry-after": "soon"}, None),
        ({"retry-after-count": "3"}, None),
    ],
)
def test_a_wait_in_a_header_of_a_gateways_own(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.case("B7")
@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20s", 20.0),
        ("1m30s", 90.0),
        ("1500ms", 1.5),
        ("2026-11-30T00:00:20Z", 20.0),
        ("Mon, 30 Nov 2026 00:00:20 GMT", 20.0),
        ("Monday, 30-Nov-26 00:00:20 GMT", 20.0),
    ],
)
def test_a_wait_in_every_form(text: str, seconds: float) -> None:
    assert retry_after({"retry-after": text, **DATED}) == seconds


@pytest.mark.case("B7")
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Please retry after 20 seconds.", 20.0),
        ("retry after: 20", 20.0),
        ("Retry-After: 20", 20.0),
        ("retry_after=12", 12.0),
        ("Please try again in 1m30s.", 90.0),
        ("try again in 7m12.5s", 432.5),
        ("try again in 250ms", 0.25),
        ("Please retry in 45.578569677s.", 45.578569677),
        ("Wait 1 minute and 30 seconds", 90.0),
        ("try again in 2 hours", 7200.0),
        ("Limit 3 / min. Please try again in 20s. Contact us", 20.0),
        ("Limit: 10 requests per 60 seconds. Try again in 5 seconds", 5.0),
        ("请在20秒后重试", 20.0),
        ("20 秒後に再試行してください", 20.0),
        ("Réessayez dans 20 secondes", 20.0),
        ("Bitte in 5 Minuten erneut versuchen", 300.0),
        ("Повторите через 15 секунд", 15.0),
        ("blocked for 30 seconds", 30.0),
        ("3 requests per 60 seconds", None),
        ("3 requests every 60 seconds", None),
        ("3 RPM and 10K TPM, 200M tokens free", None),
        ("retry after 3 attempts", None),
        ("Limit 1000000, Used 999000, Requested 5000", None),
        ("since 2026-11-29T10:00:00Z", None),
        ("retry after 0 seconds", None),
        ("retry after 99999999999 seconds", None),
        ("", None),
    ],
)
def test_a_wait_in_words(text: str, seconds: float | None) -> None:
    assert wait_in_words(text) == seconds


@pytest.mark.case("B7")
@given(st.text() | st.from_regex(r"(?:\d+ ?(?:s|m|h|seconds|分|per|retry|and|,)* ?)+"))
def test_any_words_give_a_finite_wait_or_none(text: str) -> None:
    wait = wait_in_words(text)
    assert wait is None or (wait > 0 and math.isfinite(wait))
