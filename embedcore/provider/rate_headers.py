"""Rate-limit headers of a reply: limits and waits."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
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
_REQUEST_IDS: Final = (
    "x-request-id",
    "apim-request-id",
    "request-id",
    "x-amzn-requestid",
    "mistral-correlation-id",
)

# "x-ms-retry-after-ms", "x-rate-limit-retry-after-seconds" …
_OWN_WAIT: Final = re.compile(
    r"(?:[a-z0-9]+-)+retry-after(?:(-ms|-millis|-milliseconds)|-s|-sec|-secs|-seconds)?"
    r"|retry-after-(?:s|sec|secs|seconds)"
)
# Numbers from here on are moments of the clock, in seconds or milliseconds, and no durations.
_CLOCK_SECONDS: Final = 1e9
_CLOCK_MILLISECONDS: Final = 1e12
# "x-ratelimit-remaining-tokens", "ratelimit-reset", "anthropic-ratelimit-requests-remaining" …
_LIMIT_HEADER: Final = re.compile(
    r"(?:[a-z0-9]+-)*?rate-?limit-(?:([a-z0-9-]+?)-)?"
    r"(?:(remaining)|reset(?:-after|-in)?)(?:-([a-z0-9-]+))?"
)
_LIMIT_IN_ONE: Final = re.compile(r"\b(remaining|reset|r|t)=(\d{1,12})\b")


def lowered(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers by their names in lower case, as everything here wants them."""
    return {name.lower(): value for name, value in headers.items()}


def request_id(headers: Mapping[str, str]) -> str | None:
    """The server's name for the request, as ``x-request-id``; None if too odd to be one."""
    for name in _REQUEST_IDS:
        value = headers.get(name, "").strip()
        if _REQUEST_ID.fullmatch(value):
            return value
    return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by ``retry-after-ms``, else ``retry-after``: seconds, a duration or a date.

    Where neither is there, by a header of a gateway's own with such a name at its end. A wait that
    is not positive, not finite or not readable is none. Dates count from the reply's own ``Date``,
    so that a wrong clock here does not matter.
    """
    milliseconds = _positive(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    if (text := headers.get("retry-after", "")).strip():
        return _wait(text, headers)
    for name, value in headers.items():
        if (found := _OWN_WAIT.fullmatch(name)) is not None:
            milliseconds = _positive(value) if found[1] else None
            return milliseconds / 1000 if milliseconds is not None else _wait(value, headers)
    return None


def _wait(text: str, headers: Mapping[str, str]) -> float | None:
    seconds = duration(text)
    if seconds is not None:
        return seconds or None
    moment = _date(text)
    return wait_in_words(text) if moment is None else _until(moment, headers)


def refill_after(headers: Mapping[str, str]) -> float | None:
    """Seconds until a rate limit of which nothing is left is there again; None if no header says.

    Of a refused request: headers that name a reset, and nothing of what remains, mean that too.
    """
    remaining: dict[str, str] = {}
    resets: dict[str, str] = {}
    for name, value in headers.items():
        found = _LIMIT_HEADER.fullmatch(name)
        if found is not None:
            kind = found[1] or found[3] or ""
            (remaining if found[2] else resets)[kind] = value
        elif name in ("ratelimit", "x-ratelimit"):
            remaining[name], resets[name] = _in_one(value)
    waits = [
        wait
        for kind, reset in resets.items()
        if (not remaining or _is_nothing(remaining.get(kind, "")))
        and (wait := _moment_or_duration(reset, headers)) is not None
    ]
    return max(waits, default=None)


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """What the headers say of the limits; None if there is none that can be read.

    OpenAI's names (``x-ratelimit-limit-requests``), which many have, or Mistral's with the span of
    time in them (``x-ratelimit-limit-req-minute``). Of a limit for ten seconds the rate counts:
    what is left of it says nothing of a minute.
    """
    of_a_minute = any(name.endswith(("-req-minute", "-tokens-minute")) for name in headers)
    requests, tokens = ("req-minute", "tokens-minute") if of_a_minute else ("requests", "tokens")
    short = _integer(headers.get("x-ratelimit-limit-req-10-second", ""))
    limits = RateLimits(
        limit_requests=_integer(headers.get(f"x-ratelimit-limit-{requests}", ""))
        or (short and 6 * short),
        remaining_requests=_integer(headers.get(f"x-ratelimit-remaining-{requests}", "")),
        reset_requests=duration(headers.get(f"x-ratelimit-reset-{requests}", "")),
        limit_tokens=_integer(headers.get(f"x-ratelimit-limit-{tokens}", "")),
        remaining_tokens=_integer(headers.get(f"x-ratelimit-remaining-{tokens}", "")),
        reset_tokens=duration(headers.get(f"x-ratelimit-reset-{tokens}", "")),
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


def _is_nothing(text: str) -> bool:
    text = text.strip()
    return _NUMBER.fullmatch(text) is not None and float(text) == 0


def _in_one(value: str) -> tuple[str, str]:
    """What remains and the reset of all limits in one header, as the drafts of the IETF have it."""
    said: dict[str, str] = dict(_LIMIT_IN_ONE.findall(value.lower()))
    return said.get("remaining", said.get("r", "")), said.get("reset", said.get("t", ""))


def _moment_or_duration(text: str, headers: Mapping[str, str]) -> float | None:
    number = duration(text)
    if number is None:
        return _until(_date(text), headers)
    if number >= _CLOCK_MILLISECONDS:
        return _until(number / 1000, headers)
    if number >= _CLOCK_SECONDS:
        return _until(number, headers)
    return number or None


def _until(moment: float | None, headers: Mapping[str, str]) -> float | None:
    if moment is None:
        return None
    now = _date(headers.get("date", ""))
    wait = moment - (now if now is not None else time.time())
    return wait if wait > 0 else None


def _positive(text: str) -> float | None:
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    return float(text) or None


def _integer(text: str) -> int | None:
    text = text.strip()
    return int(text) if _INTEGER.fullmatch(text) else None


def _date(text: str) -> float | None:
    """A moment as HTTP writes it, or as ISO 8601 does."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except (ValueError, OverflowError):
        return None


# Waits in words. Units of the languages that servers are seen to answer in; a name is written out
# or is one letter right behind the number.
_WORDS_OF_UNITS: Final = {
    1e-3: r"ms|millis\w*|msecs?|毫秒|ミリ秒|밀리초",
    1.0: r"s|secs?|second\w*|sekund\w*|segund\w*|сек\w*|秒[钟鐘]?|초",
    60.0: r"m|mins?|minut\w*|мин\w*|分[钟鐘間]?|분",
    3600.0: r"h|hrs?|hours?|stunden?|heures?|horas?|час\w*|小[时時]|時間|시간",
    86400.0: r"d|days?|tage?n?|jours?|d[ií]as?|дн\w*|天|일",
}
_UNIT_GROUPS: Final = {f"u{number}": unit for number, unit in enumerate(_WORDS_OF_UNITS)}
_UNIT: Final = "|".join(
    f"(?P<{name}>{_WORDS_OF_UNITS[unit]})" for name, unit in _UNIT_GROUPS.items()
)
# The rest of a longer number or name.
_BEFORE_NUMBER: Final = re.compile(r"[A-Za-z0-9_.,:-]")
_PIECE: Final = re.compile(
    rf"(?P<number>\d{{1,9}}(?:\.\d{{1,12}})?)\s{{0,2}}(?:{_UNIT})(?![A-Za-z\u0400-\u04ff])", re.I
)
_JOINED: Final = re.compile(r"\s*(?:,|and|und|et|y|e|и)?\s*", re.I)
_RATE: Final = re.compile(r"(?:\b(?:per|every|each|pro|par|por|za|за|within)\b|/|每)\s*$", re.I)
_AGAIN: Final = re.compile(
    r"re-?tr(?:y|ies)|\bagain\b|\bwait|back ?off|reset|\bafter\b|warte|erneut|nochmal|réessay"
    r"|attend|reintent|espere|tente|riprov|attend|повтор|подожд|через|[重再][试試]|稍[后後]|等待|もう一度|再度"
    r"|다시|대기",
    re.I,
)
_BARE: Final = re.compile(
    r"\bretry[\s_-]?(?:after|in)\W{0,4}(\d{1,6}(?:\.\d{1,6})?)(?=$|[\s,;!)}\]]*$|\.\s|\.$|[,;!)}\]])",
    re.I,
)
# "Try again at 2026-11-30T12:00:30Z"; without a zone it is UTC. "Resets in 00:01:30".
_MOMENT: Final = re.compile(
    r"\b(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.\d{1,9})?\s?(Z\b|UTC\b|GMT\b|[+-]\d\d:?\d\d\b)?"
)
_CLOCK: Final = re.compile(
    r"\b(?:in|after|for)\W{1,3}(\d{1,2}):(\d\d):(\d\d)(?:\.\d{1,9})?(?![\w:])", re.I
)
_LONGEST_WAIT: Final = 7 * 86400.0
_READ: Final = 4_000
_NEAR: Final = 48
_RATE_WORD: Final = 12


def wait_in_words(text: str, headers: Mapping[str, str] | None = None) -> float | None:
    """Seconds of a wait that is named in words: "try again in 1m30s", "retry after 20 seconds".

    A span beside a word for trying again goes before others; one that tells a rate ("3 requests
    per 60 seconds") is no wait. Then a moment counts, from the ``Date`` of ``headers``.
    """
    text = text[:_READ]
    spans = _spans(text)
    near = [span for span in spans if _AGAIN.search(text[max(0, span[0] - _NEAR) : span[0]])]
    for _, seconds in near or spans:
        if 0 < seconds <= _LONGEST_WAIT:
            return seconds
    bare = _BARE.search(text)
    if bare is not None:
        return float(bare[1]) or None
    return _moment_in_words(text, headers or {})


def _moment_in_words(text: str, headers: Mapping[str, str]) -> float | None:
    """Seconds until a moment, or of a clock's form, beside a word for trying again."""
    for form in (_CLOCK, _MOMENT):
        found = form.search(text)
        if found is None or not _AGAIN.search(text[max(0, found.start() - _NEAR) : found.end()]):
            continue
        if form is _CLOCK:
            hours, minutes, seconds = map(int, found.groups())
            return float(3600 * hours + 60 * minutes + seconds) or None
        zone = found[3] if found[3] and found[3][0] in "+-" else "+00:00"
        return _until(_date(f"{found[1]}T{found[2]}{zone}"), headers)
    return None


def _spans(text: str) -> list[tuple[int, float]]:
    """Where a span of time begins, and its seconds; "1 minute and 30 seconds" is one."""
    spans: list[tuple[int, float]] = []
    end, open_span = 0, False
    for piece in _PIECE.finditer(text):
        begin = piece.start()
        joined = _JOINED.fullmatch(text[end:begin]) is not None
        if not (joined and open_span) and begin and _BEFORE_NUMBER.match(text[begin - 1]):
            continue
        if piece[0][-1] in "SMHD":
            # "200M tokens" are no minutes.
            continue
        seconds = float(piece["number"]) * _seconds_of_unit(piece)
        if joined and open_span:
            spans[-1] = (spans[-1][0], spans[-1][1] + seconds)
        else:
            open_span = _RATE.search(text[max(0, begin - _RATE_WORD) : begin]) is None
            if open_span:
                spans.append((begin, seconds))
        end = piece.end()
    return spans


def _seconds_of_unit(piece: re.Match[str]) -> float:
    return next(unit for name, unit in _UNIT_GROUPS.items() if piece[name] is not None)
