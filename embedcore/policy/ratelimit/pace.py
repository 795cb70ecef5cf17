"""Pace: a rate that was set, or one found by trial after refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from embedcore.storage.rate_buckets import REQUESTS, TEXTS, TOKENS, Amounts, kind_set

if TYPE_CHECKING:
    pass

_MINUTE: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Limits of a caller, per minute; None: only what is learned from the provider counts.

    They hold for all that the processes of a state folder send to one endpoint and model; without
    such a folder, for one process. Raises ``ValueError`` for a rate that is not positive.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    texts_per_minute: int | None = None
    # What follows from them, made once: every request that waits asks many times a second.
    _given: tuple[tuple[str, int], ...] = field(init=False, repr=False, compare=False)
    _kinds: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rates = (
            (REQUESTS, self.requests_per_minute),
            (TOKENS, self.tokens_per_minute),
            (TEXTS, self.texts_per_minute),
        )
        given = tuple((kind, rate) for kind, rate in rates if rate is not None)
        for _, rate in given:
            if rate <= 0:
                raise ValueError(f"a rate must be positive, not {rate}")
        object.__setattr__(self, "_given", given)
        object.__setattr__(self, "_kinds", tuple(kind_set(*one) for one in given))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Their names among processes."""
        return self._kinds

    @property
    def given(self) -> tuple[tuple[str, int], ...]:
        """What is counted, and its rate, for those that were set."""
        return self._given


@dataclass(frozen=True, kw_only=True, slots=True)
class GateState:
    """What a rate limiter knows. Limits are per minute, as the server names them; ``left`` is what
    may still leave now. ``paced``: tokens per minute found by trial, while there is such a rate."""

    requests_limit: int | None = None
    requests_left: int | None = None
    tokens_limit: int | None = None
    tokens_left: int | None = None
    paced: int | None = None
    configured: tuple[Rates, ...] = ()
    in_flight: int = 0
    tokens_in_flight: int = 0
    waiting: int = 0
    closed_for: float = 0.0
    sent: int = 0
    refusals: int = 0


class Steady:
    """A rate per minute: in any ``t`` seconds ``t + 1`` seconds' worth at most, and one request.

    What leaves is never held back for its size: it delays what comes after it.
    """

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._rate = per_minute / _MINUTE
        self._due = -math.inf

    def delay(self, now: float, ahead: float) -> float:
        """Seconds until the next may leave, if ``ahead`` must leave before it."""
        return max(max(self._due, now - 1.0) + ahead / self._rate - now, 0.0)

    def leave(self, now: float, amount: float) -> None:
        self._due = max(self._due, now - 1.0) + amount / self._rate

    def correct(self, amount: float) -> None:
        """So much more (or less) was used than was said when it left."""
        self._due += amount / self._rate


class Configured:
    """Every set of rates that a caller asked for; each counts all that leaves."""

    def __init__(self) -> None:
        self._steady: dict[Rates, dict[str, Steady]] = {}

    @property
    def rates(self) -> tuple[Rates, ...]:
        return tuple(self._steady)

    def delay(
        self,
        now: float,
        rates: Rates,
        ahead: Amounts,
        slower: Mapping[str, Callable[[float], bool]],
    ) -> float:
        """Seconds until the next may leave by ``rates``, if so much goes before.

        ``slower``: whether the server is known to allow no more than that rate anyway.
        """
        if not rates.given:
            return 0.0
        if rates not in self._steady:
            self._steady[rates] = {kind: Steady(rate) for kind, rate in rates.given}
        return max(
            0.0
            if kind in slower and slower[kind](steady.per_minute)
            else steady.delay(now, ahead.of(kind))
            for kind, steady in self._steady[rates].items()
        )

    def leave(self, now: float, amounts: Amounts) -> None:
        for steadies in self._steady.values():
            for kind, steady in steadies.items():
                steady.leave(now, amounts.of(kind))

    def correct(self, tokens: int) -> None:
        """A request that left was billed at so many more tokens than it was said to have."""
        for steadies in self._steady.values():
            if TOKENS in steadies:
                steadies[TOKENS].correct(tokens)


class Pace:
    """Tokens per second by trial: less at once after a refusal, slowly more while there is none.

    At a refusal the server has nothing left; so what it accepted between two of them, over the
    time between, is its rate. Silent until the first refusal, and again a minute after the last.
    """

    burst: Final = 0.1
    longest_delay: Final = 5.0
    _forgotten_after: Final = 60.0
    _doubled_after: Final = 15.0
    _doubled_blindly: Final = 5.0
    _remembers: Final = 2.0
    _just_below: Final = 0.95
    # A caller who sends a question now and then was refused for what others sent: the wait for the
    # gate to open is enough.
    _slowest: Final = 500.0

    def __init__(self) -> None:
        self._base: float | None = None
        self._since = 0.0
        self._doubles = self._doubled_after
        self._due = -math.inf
        self._accepted = 0.0
        self._recent = 0.0
        self._recent_at = 0.0

    def rate(self, now: float) -> float | None:
        """Tokens per second, or None while there is no reason to hold anything back."""
        if self._base is None or now - self._since >= self._forgotten_after:
            return None
        return self._base * (1.0 + ((now - self._since) / self._doubles) ** 2)

    def delay(self, now: float, ahead: float) -> float:
        rate = self.rate(now)
        if rate is None:
            return 0.0
        due = max(self._due, now - self.burst) + ahead / rate - now
        return min(max(due, 0.0), self.longest_delay)

    def leave(self, now: float, amount: float) -> None:
        rate = self.rate(now)
        if rate is not None:
            spaced = min(amount / rate, self.longest_delay)
            self._due = max(self._due, now - self.burst) + spaced

    def accepted(self, now: float, amount: float) -> None:
        self._accepted += amount
        self._recent = self._lately(now) + amount
        self._recent_at = now

    def refused(self, now: float, amount: float, in_flight: float, opens: float) -> None:
        """``in_flight``: what is under way, and may be accepted. ``opens``: when the next may
        leave, by the server or by our own longest wait.
        """
        current, took = self.rate(now), now - self._since
        if current is None:
            lately = max(self._lately(now) + in_flight, amount)
            self._base = lately / self._remembers / 2
        else:
            measured = self._accepted / max(took, 0.1)
            # One refusal after another says little; over some seconds it is a measurement.
            least = 0.0 if self._accepted and took >= self._remembers else current / 2
            highest = current * self._just_below
            self._base = min(max(measured * self._just_below, least), highest)
        measured_it = current is not None and self._accepted > 0
        self._doubles = self._doubled_after if measured_it else self._doubled_blindly
        self._base = max(self._base, amount / self.longest_delay / 10, self._slowest)
        self._since, self._accepted = now, 0.0
        self._due = max(opens, now)

    def _lately(self, now: float) -> float:
        return self._recent * math.exp(-max(now - self._recent_at, 0.0) / self._remembers)
