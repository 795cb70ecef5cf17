"""When the next request may leave: the queue before a rate limit, and the gate that waits in it.

``RateLimiter`` has the order and delay of requests as a function of time, ``Gate`` the threads.

Slack: what one process sends stays within what the headers allow, but for (1) the first salvo,
before any answer, of ``FIRST_SALVO`` tokens or one request, again after five seconds without any;
(2) one request at a time that is larger than the whole bucket; (3) one request after a minute in
which none left. What others send to the same limit is known only from the next reply.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Final, TypeAlias

from embedcore.forksafe import in_child
from embedcore.policy.ratelimit.bucket import Bucket, Seen
from embedcore.policy.ratelimit.pace import Configured, GateState, Pace, Rates
from embedcore.policy.ratelimit.share import Part, Permit, all_amounts
from embedcore.provider.types import RateLimits
from embedcore.storage.rate_buckets import REQUESTS, TOKENS, Amounts
from embedcore.storage.rates import Key, RateShare

# Until one request came back the limits are not known; more than this would be sent blindly.
FIRST_SALVO: Final = 250_000
LONGEST_CLOSING: Final = 300.0
_LONGEST_SILENCE: Final = 60.0
_AWAITING_FIRST: Final = 0.01
_LONGEST_BLIND: Final = 5.0
# Requests that leave this close together may overtake one another on their way.
_TOGETHER: Final = 0.025
_REMEMBERED: Final = 2048
_Jitter: TypeAlias = Callable[[float, float], float]
# Seconds, the first time and at most, where the provider names no time.
BACKOFF: Final = (0.25, 8.0)
_JITTER_SHARE: Final = 0.1
_LONGEST_JITTER: Final = 1.0
_STEP: Final = (0.25, 0.75)
# News from other requests may shorten a wait, but not that of a closing.
_LOOK_AGAIN: Final = 0.1
_SLICE_SECONDS: Final = 15.0
_LEASE_SECONDS: Final = 5.0
_SHORTEST_PAUSE: Final = 0.0005
_NO_RATES: Final = Rates()
_NO_KEY: Final = Key("", "", "")
_NOTHING: Final = Amounts()


class RateLimiter:
    """Every request passes ``arrive``, ``delay`` until it left, and one of ``answered``,
    ``refused`` and ``lost``. ``now`` never decreases; what would, is taken as no time passed.
    """

    def __init__(self, *, jitter: _Jitter, backoff: tuple[float, float] = BACKOFF) -> None:
        self._jitter = jitter
        self._first_backoff, self._longest_backoff = backoff
        self._now = -math.inf
        self._requests, self._tokens = Bucket(), Bucket()
        self._pace = Pace()
        self._configured = Configured()
        self._waiting: deque[Permit] = deque()
        self._departed: deque[Permit] = deque(maxlen=_REMEMBERED)
        self._in_flight = self._in_flight_tokens = 0
        self._last_left = -math.inf
        self._seen_left = -math.inf
        self._open_at = self._closed_at = -math.inf
        self._backoff = self._first_backoff
        self._taken = self._taken_tokens = 0
        self._answers = self._sent = self._refusals = 0

    # On the way out

    def part_in(self, share: RateShare, key: Key) -> Part:
        """For all requests of this process by that state folder."""
        return Part(share, key, {REQUESTS: self._requests, TOKENS: self._tokens})

    def arrive(
        self, tokens: int, rates: Rates, part: Part | None = None, *, texts: int = 1
    ) -> Permit:
        """Queue one request; ``tokens`` is an estimate of what the server will count."""
        one = Permit(tokens=max(tokens, 1), texts=texts, rates=rates, part=part)
        self._waiting.append(one)
        return one

    def delay(self, now: float, one: Permit) -> float:
        """Seconds until it is worth asking again; 0: it has left."""
        now = self._advance(now)
        delay = self._delay(now, one) if self._waiting[0] is one else self._delay_behind(now, one)
        if delay > 0:
            return delay
        self._waiting.remove(one)
        one.left, one.in_flight = now, True
        one.informed = self._tokens.known or self._requests.known
        self._requests.leave(now, 1)
        self._tokens.leave(now, one.tokens)
        self._pace.leave(now, one.tokens)
        self._configured.leave(now, one.amounts)
        if one.part is not None:
            one.part.left(one)
        self._departed.append(one)
        self._in_flight += 1
        self._in_flight_tokens += one.tokens
        self._sent += 1
        self._taken += 1
        self._taken_tokens += one.tokens
        self._last_left = now
        return 0.0

    def give_up(self, one: Permit) -> None:
        """It will not leave: its call was stopped."""
        self._waiting.remove(one)
        if one.part is not None:
            one.part.gave_up(self._now, one)

    def _delay_behind(self, now: float, one: Permit) -> float:
        """As if all who came earlier had left: a large request is not overtaken for ever."""
        ahead = itertools.takewhile(lambda other: other is not one, self._waiting)
        return self._delay(now, one, all_amounts(ahead))

    def _delay(self, now: float, one: Permit, ahead: Amounts = _NOTHING) -> float:
        requests, tokens, _ = ahead
        # The tighter of both counts; only the server's own knows how large a burst may be.
        slower = {REQUESTS: self._requests.slower_than, TOKENS: self._tokens.slower_than}
        configured = self._configured.delay(now, one.rates, ahead, slower)
        delay = max(self._open_at - now, configured)
        if not self._answers:
            blind = self._in_flight_tokens + tokens + one.tokens > FIRST_SALVO
            soon = self._in_flight and now - self._last_left < _LONGEST_BLIND
            delay = max(delay, _AWAITING_FIRST if blind and soon else 0.0)
        part = one.part
        if part is not None:
            part.look(now)
            delay = max(delay, part.wait(now, one, self._waiting), part.closed_until - now)
            if part.is_shared:
                # Its turn has what others take in it; only its own refusals tell of more.
                return max(delay, self._pace.delay(now, tokens), 0.0)
        learned = max(
            self._pace.delay(now, tokens),
            self._requests.delay(now, 1, requests),
            self._tokens.delay(now, one.tokens, tokens),
        )
        if learned > 0:
            # No reply brings news any more: one request goes and asks.
            learned = min(learned, max(self._last_left + _LONGEST_SILENCE - now, 0.0))
        return max(delay, learned, 0.0)

    # On the way back

    def answered(
        self, now: float, one: Permit, limits: RateLimits | None, *, tokens: int | None
    ) -> None:
        """It was served, and billed at ``tokens`` if the server said so."""
        if not one.in_flight:
            return
        now = self._landed(now, one)
        self._answers += 1
        self._backoff = self._first_backoff
        self._pace.accepted(now, one.tokens)
        if tokens is not None:
            self._configured.correct(tokens - one.tokens)
        self._requests.accepted(1)
        self._tokens.accepted(one.tokens)
        if limits is not None:
            self._observe(now, one, limits)
        for bucket in (self._requests, self._tokens):
            bucket.forget_if_old(now)
        if one.part is not None:
            one.part.answered(now, one, limits, 0 if tokens is None else tokens - one.tokens)

    def refused(
        self, now: float, one: Permit, seconds: float | None, limits: RateLimits | None
    ) -> None:
        """The server said "too fast"; ``seconds``: the wait that it named."""
        if not one.in_flight:
            return
        now = self._landed(now, one)
        self._answers += 1
        self._refusals += 1
        one.taken = False
        self._taken -= 1
        self._taken_tokens -= one.tokens
        if self._may_be_uncounted(one):
            self._requests.give_back(now, 1)
            self._tokens.give_back(now, one.tokens)
        if limits is not None:
            self._observe(now, one, limits)
        # What left before the gate was closed says nothing new.
        if one.left is not None and one.left > self._closed_at:
            self._learn_from_refusal(now, one, _sensible(seconds), limits)
        if one.part is not None:
            one.part.refused(now, one, limits, self._open_at)

    def lost(self, now: float, one: Permit) -> None:
        """It ended otherwise; nothing happens if its end is known already."""
        self._landed(now, one)

    def close(self, now: float, seconds: float) -> None:
        """Nothing leaves for that long; an earlier closing that lasts longer stays."""
        now = self._advance(now)
        self._closed_at = now
        self._open_at = max(self._open_at, now + seconds)

    def closed_for(self, now: float) -> float:
        return max(self._open_at - self._advance(now), 0.0)

    def state(self, now: float) -> GateState:
        now = self._advance(now)
        rate = self._pace.rate(now)
        return GateState(
            requests_limit=self._requests.whole_limit,
            requests_left=self._requests.whole_left(now),
            tokens_limit=self._tokens.whole_limit,
            tokens_left=self._tokens.whole_left(now),
            paced=None if rate is None else round(rate * 60),
            configured=self._configured.rates,
            in_flight=self._in_flight,
            tokens_in_flight=self._in_flight_tokens,
            waiting=len(self._waiting),
            closed_for=max(self._open_at - now, 0.0),
            sent=self._sent,
            refusals=self._refusals,
        )

    def _advance(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

    def _landed(self, now: float, one: Permit) -> float:
        if one.in_flight:
            one.in_flight = False
            self._in_flight -= 1
            self._in_flight_tokens -= one.tokens
        return self._advance(now)

    def _learn_from_refusal(
        self, now: float, one: Permit, seconds: float | None, limits: RateLimits | None
    ) -> None:
        explained = self._explained(now, one, limits)
        self._tokens.too_small(one.tokens)
        if seconds is None and not explained:
            seconds = self._jitter(self._backoff / 2, self._backoff)
            self._backoff = min(self._backoff * 2, self._longest_backoff)
        elif seconds is not None:
            # Not to the moment: other processes were given the same time.
            seconds += self._jitter(0.0, min(seconds * _JITTER_SHARE, _LONGEST_JITTER))
        self.close(now, seconds or 0.0)
        if not explained:
            self._pace.refused(now, one.tokens, self._in_flight_tokens, self._open_at)
        elif one.informed:
            # Not all by the same, or several processes would come back together again.
            self._requests.refused(self._jitter(*_STEP))
            self._tokens.refused(self._jitter(*_STEP) * one.tokens)

    def _explained(self, now: float, one: Permit, limits: RateLimits | None) -> bool:
        """Whether the headers, of this reply or of earlier ones, let it be expected."""
        if limits is not None and (limits.limit_tokens or limits.limit_requests):
            tokens, requests = limits.remaining_tokens, limits.remaining_requests
            scarce = tokens is not None and tokens < one.tokens * 1.5
            return scarce or (requests is not None and requests < 2)
        if not one.informed:
            return False
        tokens_left = self._tokens.left_at(now) if self._tokens.known else math.inf
        requests_left = self._requests.left_at(now) if self._requests.known else math.inf
        return tokens_left < one.tokens * 3 or requests_left < 3

    def _may_be_uncounted(self, one: Permit) -> bool:
        return one.left is not None and one.left >= self._seen_left - _TOGETHER

    def _observe(self, now: float, one: Permit, limits: RateLimits) -> None:
        """Learn from a reply's headers, unless a later request's were seen."""
        if one.left is None or not self._may_be_uncounted(one):
            return
        first = one.left > self._seen_left + _TOGETHER
        if first:
            self._seen_left = one.left
        requests, tokens = self._uncounted(one, self._seen_left)
        self._requests.observe(
            now,
            Seen(
                left=one.left,
                limit=limits.limit_requests,
                remaining=limits.remaining_requests,
                reset=limits.reset_requests,
                own=int(one.taken),
                before=self._taken - requests,
                after=requests,
                first=first,
            ),
        )
        self._tokens.observe(
            now,
            Seen(
                left=one.left,
                limit=limits.limit_tokens,
                remaining=limits.remaining_tokens,
                reset=limits.reset_tokens,
                own=one.tokens if one.taken else 0,
                before=self._taken_tokens - tokens,
                after=tokens,
                first=first,
            ),
        )

    def _uncounted(self, one: Permit, since: float) -> tuple[int, int]:
        """Requests, and their tokens, that left too late to be counted in what a reply says.

        Those that left at about the same time are counted if they came back, as the least that
        any of them saw remaining is what is believed.
        """
        requests = tokens = 0
        for other in reversed(self._departed):
            if other.left is None or other.left < since - _TOGETHER:
                break
            together = other.left <= since + _TOGETHER
            if other is one or not other.taken or (together and not other.in_flight):
                continue
            requests += 1
            tokens += other.tokens
        return requests, tokens


def _sensible(seconds: float | None) -> float | None:
    """A wait that a server may have meant."""
    return seconds if seconds is not None and 0 < seconds <= LONGEST_CLOSING else None


class Gate:
    """Lets requests leave in about the order they came, as fast as the provider takes them.

    Nothing is held back while nothing is known, but that a first salvo of ``FIRST_SALVO`` tokens
    must bring one answer before more leaves. Then what the headers say, a time the provider asks
    to wait, or its refusals slow all threads down together.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
        backoff: tuple[float, float] = BACKOFF,
        key: Key = _NO_KEY,
    ) -> None:
        self._key = key
        self._parts: dict[RateShare, Part] = {}
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._limiter = RateLimiter(jitter=jitter, backoff=backoff)

    def admit(
        self,
        tokens: int,
        pause: Callable[[float], None],
        *,
        meanwhile: Callable[[], None],
        texts: int = 1,
        rates: Rates = _NO_RATES,
        share: RateShare | None = None,
    ) -> Permit:
        """Return when one request of so many texts, estimated at ``tokens``, may leave.

        Its pass must come back with one of ``answered``, ``refused`` and ``lost``. ``pause`` sleeps
        and raises when the call was stopped. ``meanwhile`` is called every few seconds, to keep a
        lease alive. ``rates``: the caller's own limits, for all that passes this gate and those of
        the other processes that have the same ``share``.
        """
        with self._lock:
            part = None if share is None else self._part_in(share)
            one = self._limiter.arrive(tokens, rates, part, texts=texts)
            try:
                seconds = self._limiter.delay(self._monotonic(), one)
            except BaseException:
                self._limiter.give_up(one)
                raise
        if seconds > 0:
            self._stand_in_line(one, seconds, pause, meanwhile)
        return one

    def _part_in(self, share: RateShare) -> Part:
        part = self._parts.get(share)
        if part is None:
            part = self._parts[share] = self._limiter.part_in(share, self._key)
        return part

    def _stand_in_line(
        self,
        one: Permit,
        seconds: float,
        pause: Callable[[float], None],
        meanwhile: Callable[[], None],
    ) -> None:
        renewed = self._monotonic()
        try:
            while seconds > 0:
                longest = min(max(self.closed_for, _LOOK_AGAIN), _SLICE_SECONDS)
                pause(max(min(seconds, longest), _SHORTEST_PAUSE))
                now = self._monotonic()
                if now - renewed >= _LEASE_SECONDS:
                    meanwhile()
                    renewed = now
                with self._lock:
                    seconds = self._limiter.delay(self._monotonic(), one)
        except BaseException:
            with self._lock:
                if one.left is None:
                    self._limiter.give_up(one)
                else:
                    self._limiter.lost(self._monotonic(), one)
            raise

    def answered(self, one: Permit, limits: RateLimits | None, *, tokens: int | None) -> None:
        """It was served, and billed at ``tokens`` if the provider said so."""
        with self._lock:
            self._limiter.answered(self._monotonic(), one, limits, tokens=tokens)

    def refused(self, one: Permit, seconds: float | None, limits: RateLimits | None) -> None:
        """The provider said "too fast"; ``seconds``: the wait that it named, if it did.

        A wait longer than five minutes closes nothing: the next request is refused with it.
        """
        with self._lock:
            self._limiter.refused(self._monotonic(), one, seconds, limits)

    def lost(self, one: Permit) -> None:
        """It was never sent, or ended in an error that says nothing of the rate."""
        with self._lock:
            self._limiter.lost(self._monotonic(), one)

    def close(self, seconds: float) -> None:
        """Nothing more leaves for that long; an earlier closing that lasts longer stays."""
        with self._lock:
            self._limiter.close(self._monotonic(), seconds)

    @property
    def closed_for(self) -> float:
        """Seconds until it opens; 0 when it is open."""
        with self._lock:
            return self._limiter.closed_for(self._monotonic())

    def state(self) -> GateState:
        """What is known of the limits, and what is under way."""
        with self._lock:
            return self._limiter.state(self._monotonic())


@cache
def gate_for(endpoint: str, model: str = "", account: str = "") -> Gate:
    """The rate limiter that everything in this process shares for one endpoint, model and
    account."""
    return Gate(key=Key(endpoint, account, model))


in_child(gate_for.cache_clear)
