"""A fake embedder, tokenizer and clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, TypeAlias

from embedcore.errors import EmbeddingError
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.tokens import utf8_length, utf8_prefix
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price
from embedcore.testing.meter import Meter
from embedcore.testing.vectors import BYTES_PER_TOKEN, tokens_of, vectors_of

if TYPE_CHECKING:
    from embedcore.provider.protocol import BatchStrategy, Tokenizer


FAKE_INFO = ModelInfo(
    provider="fake",
    model="fake-embedding",
    dimensions=32,
    max_input_tokens=8191,
    max_texts_per_request=64,
    max_tokens_per_request=100_000,
    price=Price(immediate=Decimal("0.02"), batch=Decimal("0.01"), source="the fake's own"),
)


class FakeTokenizer:
    """Counts by ``tokens_of`` when ``exact``, otherwise one token per UTF-8 byte: a loose bound.

    ``texts_counted`` says how often it was asked, to show that a text needed no tokenizer at all.
    """

    def __init__(self, *, exact: bool = True) -> None:
        self.exact = exact
        self.texts_counted = 0
        self._lock = threading.Lock()

    def count(self, texts: Sequence[str]) -> list[int]:
        with self._lock:
            self.texts_counted += len(texts)
        return [tokens_of(text) if self.exact else utf8_length(text) for text in texts]

    def prefix(self, text: str, max_tokens: int) -> str:
        return utf8_prefix(text, max_tokens * (BYTES_PER_TOKEN if self.exact else 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one call to ``FakeEmbedder`` does: raise ``error``, or return ``reply``, or the truth.

    ``reply`` may be a function of the request and the honest reply. ``bills``: whether the call
    costs its tokens; None: a reply does, an error does unless it says ``billed="no"``.
    """

    error: BaseException | None = None
    reply: EmbedReply | Callable[[EmbedRequest, EmbedReply], EmbedReply] | None = None
    bills: bool | None = None

    @property
    def is_billed(self) -> bool:
        if self.bills is not None:
            return self.bills
        return not (isinstance(self.error, EmbeddingError) and self.error.billed == "no")


Scripted: TypeAlias = Outcome | BaseException | EmbedReply | None
Script: TypeAlias = Iterable[Scripted] | Callable[[EmbedRequest, int], Scripted]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call that a ``FakeEmbedder`` received, and the tokens it billed for it."""

    texts: tuple[str, ...]
    input_type: str | None
    timeout: float | None
    billed_tokens: int
    error: BaseException | None


class FakeEmbedder(BaseEmbedder):
    """A provider in this process whose bill is known exactly.

    The vector of a text is ``vector_of(text, info.dimensions, salt=salt)``, its price ``tokens_of``
    tokens and ``info.overhead_tokens_per_text``. ``script`` says what each call does: a sequence,
    call by call (an ``Outcome``, an exception, a reply, or None for the truth, which is also what
    follows its end), or a function of the request and the call's number from 0. ``latency`` is
    slept in every call, by ``sleep``. ``reports_tokens=False``: replies do not say what they cost.
    """

    def __init__(
        self,
        *,
        info: ModelInfo = FAKE_INFO,
        tokenizer: Tokenizer | None = None,
        script: Script = (),
        latency: float = 0.0,
        sleep: Callable[[float], object] = time.sleep,
        salt: str = "",
        reports_tokens: bool = True,
        batch: BatchStrategy | None = None,
    ) -> None:
        self.info = replace(info, variant=f"{info.variant}{salt}") if salt else info
        self.tokenizer = tokenizer if tokenizer is not None else FakeTokenizer()
        self.batch = batch
        self.salt = salt
        self.reports_tokens = reports_tokens
        self.latency = latency
        self.meter = Meter()
        self.calls: list[Call] = []
        self.times_closed = 0
        self._sleep = sleep
        self._script = script if callable(script) else iter(script)
        self._lock = threading.Lock()
        self._number = 0

    @property
    def billed_tokens(self) -> int:
        return self.meter.billed_tokens

    def embed(self, request: EmbedRequest) -> EmbedReply:
        with self.meter.one_request():
            outcome = self._next(request)
            if self.latency:
                self._sleep(self.latency)
            tokens = self.cost(request.texts)
            self._record(request, outcome, tokens)
            if outcome.error is not None:
                raise outcome.error
            if isinstance(outcome.reply, EmbedReply):
                return outcome.reply
            honest = self._honest(request, tokens)
            return outcome.reply(request, honest) if outcome.reply is not None else honest

    def close(self) -> None:
        self.times_closed += 1

    def cost(self, texts: Sequence[str]) -> int:
        """Tokens that one request with these texts costs."""
        return sum(map(tokens_of, texts)) + self.info.overhead_tokens_per_text * len(texts)

    def _next(self, request: EmbedRequest) -> Outcome:
        with self._lock:
            number, self._number = self._number, self._number + 1
            if isinstance(self._script, Iterator):
                scripted = next(self._script, None)
            else:
                scripted = self._script(request, number)
        if isinstance(scripted, BaseException):
            return Outcome(error=scripted)
        if isinstance(scripted, EmbedReply):
            return Outcome(reply=scripted)
        return scripted if scripted is not None else Outcome()

    def _record(self, request: EmbedRequest, outcome: Outcome, tokens: int) -> None:
        billed = tokens if outcome.is_billed else 0
        call = Call(
            texts=tuple(request.texts),
            input_type=request.input_type,
            timeout=request.timeout,
            billed_tokens=billed,
            error=outcome.error,
        )
        with self._lock:
            self.calls.append(call)
        if outcome.is_billed:
            self.meter.bill(request.texts, billed)
        else:
            self.meter.reject()

    def _honest(self, request: EmbedRequest, tokens: int) -> EmbedReply:
        dimensions = self.info.dimensions
        if dimensions is None:
            dimensions = 32
        return EmbedReply(
            vectors=vectors_of(request.texts, dimensions, salt=self.salt),
            tokens=tokens if self.reports_tokens else None,
            model=self.info.model,
        )


class FakeClock:
    """Time that passes only when it is told to. Callable from several threads.

    ``sleep`` lets it pass at once and is listed in ``sleeps``; so does ``wait``, in place of a wait
    for an event. ``jump`` moves the time of day alone, as a clock set by hand does.
    """

    def __init__(self, now: datetime = datetime(2026, 1, 15, 12, tzinfo=UTC)) -> None:
        self._lock = threading.Lock()
        self._now = now
        self._monotonic = 1000.0
        self.sleeps: list[float] = []

    def now(self) -> datetime:
        with self._lock:
            return self._now

    def time(self) -> float:
        """Seconds since 1970, as ``time.time``."""
        return self.now().timestamp()

    def monotonic(self) -> float:
        with self._lock:
            return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass for both clocks."""
        with self._lock:
            self._now += timedelta(seconds=seconds)
            self._monotonic += max(seconds, 0.0)

    def jump(self, seconds: float) -> None:
        """Set the time of day forward or back; no time passes."""
        with self._lock:
            self._now += timedelta(seconds=seconds)

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.sleeps.append(seconds)
        self.advance(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Sleep, unless the event is set already. Returns whether it is set."""
        if not event.is_set():
            self.sleep(seconds)
        return event.is_set()
