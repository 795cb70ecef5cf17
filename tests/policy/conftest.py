"""What the tests of the policy share: a desk with a ledger of its own, and clients of a server."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from waiting import until

from embedcore import EmbeddingClient
from embedcore.assembly import Running
from embedcore.events import Event
from embedcore.policy.budget import Account
from embedcore.policy.engine import Engine
from embedcore.policy.immediate.recipe import embed_now
from embedcore.policy.ratelimit.queue import Gate
from embedcore.policy.retry import RetryQuota
from embedcore.policy.threads import Pool
from embedcore.provider.types import EmbedReply, EmbedRequest
from embedcore.settings import RetrySettings
from embedcore.storage import usage
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import FakeClock, FakeEmbedder, FakeOpenAI, vectors_of

QUICK = RetrySettings(first_wait=0.001, longest_wait=0.002, longest_named_wait=1.0)
SCOPE = "default"
# Seconds for what takes as long as the machine takes, and does happen.
LONG = 120.0


class _Front(EmbeddingClient):
    """A client over any engine."""

    def __init__(self, engine: Engine) -> None:
        choice: Any = None
        self._built = Running(choice=choice, engine=engine)

    @property
    def _running(self) -> Running:
        return self._built


class Desk:
    """An engine over a provider in this process, with its own ledger, gate and threads.

    With a ``clock`` its waits take no time, and pass on the clock.
    """

    def __init__(
        self,
        embedder: Any = None,
        *,
        daily: int | None = None,
        retry: RetrySettings = QUICK,
        threads: int = 4,
        ledger: Ledger | None = None,
        wait: float = LONG,
        local: bool = False,
        clock: FakeClock | None = None,
        **engine: Any,
    ) -> None:
        time = {"monotonic": clock.monotonic} if clock else {}
        engine = {"gate": Gate(backoff=(0.001, 0.002), **time), "grace": LONG, **time, **engine}
        if clock:
            engine["wait_for"] = clock.wait
        self.embedder = embedder if embedder is not None else FakeEmbedder()
        self.ledger = ledger or Ledger(Database(None, STATE))
        self.events: list[Event] = []
        limits = () if daily is None else (day_limit(daily),)
        self.engine = Engine(
            embedder=self.embedder,
            account=Account(
                ledger=None if local else self.ledger, scope=SCOPE, limits=limits, wait=wait
            ),
            pool=Pool(threads),
            quota=engine.pop("quota", None) or RetryQuota(1000.0, 1.0),
            retry=retry,
            label="fake:fake-embedding",
            fingerprint="f",
            observe=self.events.append,
            **engine,
        )

    def embed(self, texts: Any, **how: Any) -> Any:
        return embed_now(self.engine, texts, **how)

    def stream(self, rows: Any, **how: Any) -> Any:
        return _Front(self.engine).embed_iter(rows, **how)

    def astream(self, rows: Any, **how: Any) -> Any:
        return _Front(self.engine).aembed_iter(rows, **how)

    def limited(self, daily: int) -> None:
        account = replace(self.engine.account, limits=(day_limit(daily),))
        self.engine = replace(self.engine, account=account)

    @property
    def used(self) -> usage.Usage:
        return usage.of_scope(self.ledger, SCOPE, "total")

    @property
    def spent(self) -> int:
        return self.used.spent.tokens

    def told(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def check(self, *, certain: bool = True) -> None:
        """Nothing is held, and the ledger covers the bill: to the token, if all is certain."""
        # A call that raises leaves what was under way to end by itself.
        until(lambda: self.used.held == Amount())
        used = self.used
        billed = self.embedder.meter.billed_tokens
        assert billed <= used.spent.tokens
        if certain:
            assert billed == used.spent.tokens

    def right(self, result: Any, texts: Any, *, salt: str = "") -> None:
        check_rows(result, texts, self.embedder.info.dimensions, salt=salt)

    def close(self) -> None:
        self.engine.pool.close()
        self.ledger.end()

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Halting(FakeEmbedder):
    """Answers so many requests, and holds all others until it is let go. ``begun``: how many
    came."""

    def __init__(self, answers: int, **options: Any) -> None:
        super().__init__(**options)
        self.answers, self.begun, self.go = answers, 0, threading.Event()
        self._counts = threading.Lock()

    def embed(self, request: EmbedRequest) -> EmbedReply:
        with self._counts:
            self.begun += 1
            number = self.begun
        if number > self.answers:
            assert self.go.wait(LONG)
        return super().embed(request)


def day_limit(amount: int, *, reserved: int = 0) -> Limit:
    return Limit(scope=SCOPE, period="day", unit="tokens", amount=amount, reserved=reserved)


def check_rows(result: Any, texts: Any, dimensions: int, *, salt: str = "") -> None:
    """Every ok row is the vector of its own text, bit for bit; every other one is NaN."""
    assert len(result) == len(texts) == len(result.vectors) == len(result.reused)
    assert result.vectors.dtype == np.float32
    assert not set(np.flatnonzero(result.ok)) & set(result.errors)
    right = vectors_of(list(texts), dimensions, salt=salt) if len(texts) else result.vectors
    right[~np.asarray(result.ok)] = np.nan
    np.testing.assert_array_equal(result.vectors, right)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_forced_onto_the_disk() -> Iterator[None]:
    """Only a power failure would show it, and that is the matter of the tests of the storage: what
    a process wrote outlives its death all the same. A quarter of what a batch takes is this."""
    opened = Database.__init__

    def opens(self: Database, *what: Any, **how: Any) -> None:
        opened(self, *what, **{**how, "is_durable": False})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Database, "__init__", opens)
        for name in ("fsync", "fdatasync"):
            patched.setattr(os, name, lambda _: None, raising=False)
        yield


@pytest.fixture(scope="session")
def desk() -> Any:
    """``with desk(...) as one``: an engine with everything of its own."""
    return Desk


@pytest.fixture(scope="session")
def halting() -> Any:
    return Halting


@pytest.fixture(scope="session")
def with_engine() -> Any:
    """``with_engine(client, grace=…)``: the client, whose engine was changed in these things."""

    def with_engine(client: EmbeddingClient, **changed: Any) -> EmbeddingClient:
        running = client._running
        client._opened._thing = replace(running, engine=replace(running.engine, **changed))
        return client

    return with_engine


@pytest.fixture(scope="session")
def by_clock(with_engine: Any) -> Any:
    """``by_clock(client, clock)``: its waits take no time, and pass on the clock."""

    def by_clock(client: EmbeddingClient, clock: FakeClock) -> EmbeddingClient:
        gate = Gate(monotonic=clock.monotonic)
        return with_engine(client, monotonic=clock.monotonic, wait_for=clock.wait, gate=gate)

    return by_clock


@pytest.fixture(scope="session")
def rows_are_right() -> Any:
    return check_rows


@pytest.fixture(scope="session")
def limit() -> Any:
    return day_limit


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    """Bills what the real tokenizer counts, as the real server does."""
    from embedcore_openai.tokenizer import Cl100kTokenizer

    with FakeOpenAI(count=Cl100kTokenizer().count) as server:
        yield server


@pytest.fixture
def hold_replies(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``go = hold_replies(after=3)``: after three, replies wait for ``go``, and are billed."""
    go, answer, numbers = threading.Event(), server.answer, itertools.count(1)

    def hold_replies(*, after: int) -> threading.Event:
        def held(request: Any) -> Any:
            number, reply = next(numbers), answer(request)
            assert number <= after or go.wait(LONG)
            return reply

        monkeypatch.setattr(server, "answer", held)
        return go

    yield hold_replies
    go.set()


@pytest.fixture
def home(tmp_path: Any) -> Any:
    return tmp_path / "home"


@pytest.fixture
def connect(server: FakeOpenAI, home: Any) -> Iterator[Any]:
    """``connect(daily=…, retry={…}, …)``: a client of ``server``, with narrow vectors."""
    with contextlib.ExitStack() as opened:

        def connect(*, daily: int | None = None, retry: Any = None, **config: Any) -> Any:
            waits = {"first_wait": 0.001, "longest_wait": 0.002, **(retry or {})}
            budget = {} if daily is None else {"daily_token_limit": daily}
            client = EmbeddingClient(
                options={
                    "base_url": server.base_url,
                    "api_key": server.api_key,
                    "dimensions": 8,
                    **config.pop("options", {}),
                },
                observers=config.pop("observers", ()),
                config={
                    "home": home,
                    "budget": {**budget, **config.pop("budget", {})},
                    "retry": waits,
                    # Most of these tests count requests; the store has tests of its own.
                    "cache": False,
                    **config,
                },
            )
            return opened.enter_context(client)

        yield connect


@pytest.fixture
def ledger(home: Any) -> Iterator[Any]:
    """``ledger()``: what the state file says was spent and is held, by another connection."""
    opened: list[Ledger] = []

    def ledger(scope: str = SCOPE) -> usage.Usage:
        if not opened:
            opened.append(Ledger(Database(home / "state.db", STATE)))
        return usage.of_scope(opened[0], scope, "total")

    yield ledger
    for ledger in opened:
        ledger.database.close()
