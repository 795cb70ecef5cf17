"""What do a reply's headers say: how long to wait, what is left, which request it was?"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

from embedcore.provider.types import RateLimits

_DURATION: Final = re.compile(r"(?:\d{1,12}(?:\.\d{1,12})?(?:h|ms|m|us|µs|ns|s))+", re.ASCII)
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|us|µs|ns|s)")
_UNIT_SECONDS: Final = {
    "h": 3600.0,
    "m": 60.0,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "µs": 1e-6,
    "ns": 1e-9,
}
_NUMBER: Final = re.compile(r"\d{1,18}(?:\.\d{0,18})?", re.ASCII)
_INTEGER: Final = re.compile(r"\d{1,18}", re.ASCII)
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id(headers: Mapping[str, str]) -> str | None:
    """OpenAI's ``x-request-id`` (Azure: ``apim-request-id``); None if odd enough to be no id."""
    for name in ("x-request-id", "apim-request-id"):
        value = headers.get(name, "").strip()
        if _REQUEST_ID.fullmatch(value):
            return value
    return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by ``retry-after-ms``, else ``retry-after`` (seconds or an HTTP date).

    A wait that is not positive, not finite or not readable is none. Dates count from the reply's
    own ``Date``, so that a wrong clock here does not matter.
    """
    milliseconds = _positive(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after", "")
    seconds = _positive(text)
    if seconds is not None:
        return seconds
    until, now = _date(text), _date(headers.get("date", ""))
    if until is None:
        return None
    wait = until - (now if now is not None else time.time())
    return wait if wait > 0 else None


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """The ``x-ratelimit-*`` headers; None if there is none that can be read."""
    limits = RateLimits(
        limit_requests=_integer(headers.get("x-ratelimit-limit-requests", "")),
        remaining_requests=_integer(headers.get("x-ratelimit-remaining-requests", "")),
        reset_requests=duration(headers.get("x-ratelimit-reset-requests", "")),
        limit_tokens=_integer(headers.get("x-ratelimit-limit-tokens", "")),
        remaining_tokens=_integer(headers.get("x-ratelimit-remaining-tokens", "")),
        reset_tokens=duration(headers.get("x-ratelimit-reset-tokens", "")),
    )
    return None if limits == RateLimits() else limits


def duration(text: str) -> float | None:
    """Seconds of a duration as Go writes it (``12ms``, ``6m0s``, ``23m16.298s``) or a number."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    if not _DURATION.fullmatch(text):
        return None
    return math.fsum(
        float(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION_PART.findall(text)
    )


def _positive(text: str) -> float | None:
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    return float(text) or None


def _integer(text: str) -> int | None:
    text = text.strip()
    return int(text) if _INTEGER.fullmatch(text) else None


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
