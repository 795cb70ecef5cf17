"""A world in which only simulated time passes: processes with limiters, and servers that refuse."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from embedcore.policy.ratelimit.pace import Rates
from embedcore.policy.ratelimit.queue import RateLimiter
from embedcore.policy.ratelimit.share import Part, Permit
from embedcore.provider.types import RateLimits
from embedcore.storage.database import Database
from embedcore.storage.rates import Key, RateShare
from embedcore.storage.schema import RATES


@dataclass(frozen=True, kw_only=True)
class Said:
    """A server's answer: None seconds for a vector, else a refusal, with the wait it names."""

    refused: bool = False
    seconds: float | None = None
    limits: RateLimits | None = None


@dataclass(kw_only=True)
class Meter:
    """One thing that a server counts: a steady bucket, or a window that begins anew."""

    per_minute: float
    size: float
    window: float | None = None
    level: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.size

    def pass_to(self, now: float) -> None:
        if self.window is None:
            self.level = min(self.size, self.level + (now - self.at) * self.per_minute / 60)
            self.at = now
        elif now >= self.at + self.window:
            self.at += self.window * ((now - self.at) // self.window)
            self.level = self.size

    def wait(self, now: float, amount: float) -> float:
        """Seconds until ``amount`` is there; more than fits waits for all there can be."""
        missing = min(amount, self.size) - self.level
        if missing <= 0:
            return 0.0
        if self.window is not None:
            return self.at + self.window - now
        return missing / self.per_minute * 60

    def reset(self, now: float) -> float:
        if self.window is not None:
            return self.at + self.window - now
        return (self.size - self.level) / self.per_minute * 60


@dataclass(kw_only=True)
class Server:
    """Requests and tokens are limited, and perhaps texts, of which no header tells; ``headers`` and
    ``retry_after`` say what it tells."""

    requests: Meter
    tokens: Meter
    texts: Meter | None = None
    headers: bool = True
    retry_after: str = "exact"
    named_limit: tuple[int, int] | None = None
    reset_digits: int | None = 3
    refused_count: bool = False
    counts: Callable[[int], float] = float
    taken: float = 0.0
    taken_texts: float = 0.0
    served: int = 0
    refusals: int = 0
    taken_at: list[tuple[float, float]] = field(default_factory=list)
    refused_at: list[float] = field(default_factory=list)

    def ask(self, now: float, tokens: int, texts: int = 1) -> Said:
        amount = self.counts(tokens)
        counted = [(self.requests, 1.0), (self.tokens, amount)]
        if self.texts is not None:
            counted.append((self.texts, texts))
        for meter, _ in counted:
            meter.pass_to(now)
        wait = max(meter.wait(now, much) for meter, much in counted)
        if wait > 1e-9:
            self.refusals += 1
            self.refused_at.append(now)
            if self.refused_count:
                self.requests.level -= min(self.requests.level, 1.0)
                wait = max(wait, self.requests.wait(now, 1))
            named = {"exact": wait, "seconds": float(math.ceil(wait)), "none": None}
            return Said(refused=True, seconds=named[self.retry_after], limits=self.say(now))
        for meter, much in counted:
            meter.level -= much
        self.taken += amount
        self.taken_texts += texts
        self.served += 1
        self.taken_at.append((now, amount))
        return Said(limits=self.say(now))

    def say(self, now: float) -> RateLimits | None:
        if not self.headers:
            return None
        requests, tokens = self.named_limit or (self.requests.per_minute, self.tokens.per_minute)
        return RateLimits(
            limit_requests=int(requests),
            remaining_requests=max(int(self.requests.level), 0),
            reset_requests=self.rounded(self.requests.reset(now)),
            limit_tokens=int(tokens),
            remaining_tokens=max(int(self.tokens.level), 0),
            reset_tokens=self.rounded(self.tokens.reset(now)),
        )

    def rounded(self, seconds: float) -> float | None:
        if self.reset_digits is None:
            return None
        return math.ceil(seconds * 10**self.reset_digits) / 10**self.reset_digits


class World:
    """Runs processes of several threads each against one server, until all work is done."""

    def __init__(
        self,
        server: Server,
        *,
        latency: tuple[float, float] = (0.1, 0.5),
        way: tuple[float, float] = (0.001, 0.015),
        seed: int = 1,
        patient: bool = True,
    ) -> None:
        self.server = server
        self.latency, self.way = latency, way
        self.random = random.Random(seed)
        self.now = 0.0
        self.last_done = 0.0
        self.asked = 0
        self.limiters: list[RateLimiter] = []
        self.patient = patient
        self.dead: set[RateLimiter] = set()
        self._folder: Database | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._order), do))

    def process(
        self,
        sizes: Iterable[int],
        *,
        threads: int = 16,
        rates: Rates | None = None,
        guess: Callable[[int], int] = int,
        starts: float = 0.0,
        shares: bool = False,
        texts: int = 1,
    ) -> RateLimiter:
        """``shares``: it has one state folder with all others that do. ``texts``: in a request."""
        limiter = RateLimiter(jitter=self.random.uniform)
        self.limiters.append(limiter)
        part = self._part(limiter) if shares else None
        work = deque(sizes)
        for _ in range(threads):
            thread = _Thread(self, limiter, work, rates or Rates(), guess, part, texts)
            self.at(starts + self.random.uniform(0, 0.002), thread.next)
        return limiter

    def _part(self, limiter: RateLimiter) -> Part:
        self._folder = self._folder or Database(None, RATES)
        name = f"process:{len(self.limiters)}"
        share = RateShare(self._folder, owner=lambda: name)
        return limiter.part_in(share, Key("endpoint", "account", "model"))

    def kill(self, limiter: RateLimiter, when: float) -> None:
        """What it sent is on its way, and nothing more."""
        self.at(when, lambda: self.dead.add(limiter))

    def run(self, longest: float = 10_000.0) -> World:
        while self._events:
            self.now, _, do = heapq.heappop(self._events)
            assert self.now < longest, f"still not done after {longest} s"
            do()
        return self


class _Thread:
    """Takes one piece of work after the other; what is refused waits and comes again."""

    def __init__(
        self,
        world: World,
        limiter: RateLimiter,
        work: deque[int],
        rates: Rates,
        guess: Callable[[int], int],
        part: Part | None,
        texts: int,
    ) -> None:
        self.texts = texts
        self.world, self.limiter, self.work = world, limiter, work
        self.rates, self.guess, self.part = rates, guess, part
        self.tokens = 0
        self.failures = 0

    def next(self) -> None:
        if self.work:
            self.tokens, self.failures = self.work.popleft(), 0
            self.ask()

    def ask(self) -> None:
        if self.limiter in self.world.dead:
            return
        one = self.limiter.arrive(self.guess(self.tokens), self.rates, self.part, texts=self.texts)
        self.look(one)

    def look(self, one: Permit) -> None:
        world = self.world
        if self.limiter in world.dead:
            return
        seconds = self.limiter.delay(world.now, one)
        if seconds > 0:
            longest = max(self.limiter.closed_for(world.now), 0.1)
            nap = max(min(seconds, longest, 15.0), 0.0005)
            world.at(world.now + nap + world.random.uniform(0, 0.0005), lambda: self.look(one))
            return
        world.asked += 1
        there = world.now + world.random.uniform(*world.way)
        world.at(there, lambda: self.arrived(one))

    def arrived(self, one: Permit) -> None:
        world = self.world
        said = world.server.ask(world.now, self.tokens, self.texts)
        slow = world.random.uniform(*(world.way if said.refused else world.latency))
        world.at(world.now + slow, lambda: self.back(one, said))

    def back(self, one: Permit, said: Said) -> None:
        world = self.world
        if self.limiter in world.dead:
            return
        if not said.refused:
            self.limiter.answered(world.now, one, said.limits, tokens=self.tokens)
            world.last_done = world.now
            self.next()
            return
        self.limiter.refused(world.now, one, said.seconds, said.limits)
        self.failures += 1
        wait = said.seconds
        if wait is None:
            wait = world.random.uniform(0, min(0.5 * 2 ** (self.failures - 1), 30.0))
        else:
            wait += world.random.uniform(0, min(wait / 10, 1.0))
        world.at(world.now + (wait if world.patient else 0.0), self.ask)


@dataclass(frozen=True)
class Outcome:
    """Share of the ideal time, and 429s as a share of all requests."""

    goodput: float
    refused: float
    seconds: float


class Simulation:
    """What a test asks for: servers of many shapes, worlds, and how well it went."""

    RateLimits, Rates, World, Said = RateLimits, Rates, World, Said
    Meter = Meter

    @staticmethod
    def bucket(
        tpm: float = 6e6, burst: float = 5e5, rpm: float = 3000, rburst: float = 3000, **how: object
    ) -> Server:
        return Server(
            requests=Meter(per_minute=rpm, size=rburst),
            tokens=Meter(per_minute=tpm, size=burst),
            **how,  # type: ignore[arg-type]
        )

    @staticmethod
    def windows(tokens: float, requests: float, period: float, **how: object) -> Server:
        """``tokens`` and ``requests`` in each ``period`` seconds; so its headers name them."""
        return Server(
            requests=Meter(per_minute=requests * 60 / period, size=requests, window=period),
            tokens=Meter(per_minute=tokens * 60 / period, size=tokens, window=period),
            named_limit=(int(requests), int(tokens)),
            **how,  # type: ignore[arg-type]
        )

    @staticmethod
    def outcome(world: World, *, latency: float = 0.0) -> Outcome:
        """Against the least time in which the server could have taken all of it."""
        server = world.server
        ideal = 0.0
        counted = [(server.requests, server.served), (server.tokens, server.taken)]
        if server.texts is not None:
            counted.append((server.texts, server.taken_texts))
        for meter, amount in counted:
            if meter.window is None:
                least = max(amount - meter.size, 0.0) / meter.per_minute * 60
            else:
                least = max(math.ceil(amount / meter.size) - 1, 0) * meter.window
            ideal = max(ideal, least)
        last = server.taken_at[-1][0]
        return Outcome(
            goodput=(ideal + latency) / max(last, 1e-9),
            refused=server.refusals / (server.refusals + server.served),
            seconds=last,
        )


@pytest.fixture(scope="session")
def simulation() -> type[Simulation]:
    return Simulation
