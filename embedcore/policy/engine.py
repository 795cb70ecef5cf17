"""The engine: what all calls of one client share, and what replies taught it."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Final, Literal

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    ProviderError,
)
from embedcore.events import Event, Observer
from embedcore.policy.budget import Account
from embedcore.policy.cache import VectorCache
from embedcore.policy.planning import CheckedTokenizer, PlannedRequest, RequestSizes
from embedcore.policy.ratelimit.pace import Rates
from embedcore.policy.ratelimit.queue import Gate
from embedcore.policy.retry import RetryQuota
from embedcore.policy.threads import Pool
from embedcore.provider.base import startup_of
from embedcore.provider.protocol import Embedder, Tokenizer
from embedcore.provider.types import ModelInfo, RateLimits
from embedcore.settings import DEFAULTS, Overlong, RetrySettings
from embedcore.storage.rates import RateShare

_logger = logging.getLogger("embedcore")

_SHORTEST_SECRET: Final = 8
_LARGEST_SCALE: Final = 100.0
# Until something was billed: English has about four bytes to a token, other languages fewer.
_FIRST_GUESS: Final = 0.3
_WEIGHT: Final = 1_000_000
# Modules that steps of a call import where they need them.
_USED_BY_THREADS: Final = ("embedcore.storage.vector_format", "mmap", "numpy")


def _ignored(_: Event) -> None:
    """There is no observer."""


class Once:
    """Something that is done once, by the first thread that asks for it; the others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = False

    def do(self, work: Callable[[], None]) -> None:
        """If it raises, the next thread that asks tries again."""
        if self._done:
            return
        with self._lock:
            if not self._done:
                work()
                self._done = True


@dataclass(kw_only=True, slots=True)
class Learned:
    """What replies taught the threads of a client.

    - ``scale``: how many times the counted tokens the provider was seen to bill.
    - ``always_count``: a text was billed at more tokens than bytes, as its count said.
    - ``counts_stand``: a lost answer was charged by its count, and no bill was compared with one
      since. ``counts_fall_short``: one was, and was higher.
    - ``left``: requests that left. ``served``: which of them, in the order in which they left, was
      the last that was answered with vectors.
    - ``probing``: held by the thread that finds out, while nothing was answered yet, why a request
      failed.
    - ``smaller``: it was said that replies can be trusted for smaller requests only.
    - ``width``: of the vectors.
    - ``limits``: what the provider last named as its requests and tokens per minute.
    """

    scale: float = 1.0
    always_count: bool = False
    counts_stand: bool = False
    counts_fall_short: bool = False
    left: int = 0
    served: int = 0
    probing: threading.RLock = field(default_factory=threading.RLock, repr=False)
    smaller: Once = field(default_factory=Once, repr=False)
    width: int | None = None
    limits: tuple[int | None, int | None] = (None, None)
    _tokens: float = _FIRST_GUESS * _WEIGHT
    _bytes: float = _WEIGHT
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def billed(self, times: float) -> None:
        """An attempt cost that many times what was counted."""
        with self._lock:
            # One absurd bill must not make everything after it too dear to be tried.
            self.scale = min(max(self.scale, times), _LARGEST_SCALE)

    @property
    def proven(self) -> bool:
        """It has answered with vectors: the settings of a request are right."""
        return self.served > 0

    def leaves(self) -> int:
        """Another request leaves; returns its number."""
        with self._lock:
            self.left += 1
            return self.left

    def was_served(self, number: int) -> None:
        with self._lock:
            self.served = max(self.served, number)

    def cost(self, request: PlannedRequest, tokens: int) -> None:
        """A request was billed at so many tokens."""
        if request.in_bytes:
            with self._lock:
                # What was seen long ago counts less: the language of the texts may change.
                fade = _WEIGHT / (_WEIGHT + request.in_bytes)
                self._tokens = self._tokens * fade + tokens
                self._bytes = self._bytes * fade + request.in_bytes

    def expected_tokens(self, request: PlannedRequest) -> int:
        """What a request will probably be billed at; never more than is reserved for it."""
        guess = math.ceil(self.tokens_in(request.in_bytes))
        return min(guess, request.amount.tokens) if guess else request.amount.tokens

    def tokens_in(self, in_bytes: int) -> float:
        """How many tokens texts of so many bytes were seen to have."""
        return in_bytes * self._tokens / self._bytes

    def is_news(self, limits: RateLimits) -> bool:
        """Whether the provider names other limits than before."""
        named = (limits.limit_requests, limits.limit_tokens)
        with self._lock:
            known, self.limits = self.limits, named
            return known != named

    def agrees(self, width: int) -> bool:
        """Whether vectors of this width belong with all the others; the first ones decide."""
        with self._lock:
            if self.width is None:
                self.width = width
            return self.width == width


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Everything a recipe needs besides the texts. Shared by the threads of one client.

    ``monotonic`` and ``wait_for`` are its only sense of time: ``wait_for(event, seconds)`` says
    whether the event was set within so many seconds.
    """

    embedder: Embedder
    account: Account
    pool: Pool
    gate: Gate
    quota: RetryQuota
    sizes: RequestSizes = field(default_factory=RequestSizes)
    cache: VectorCache | None = None
    rates: Rates = field(default_factory=Rates)
    share: RateShare | None = None
    retry: RetrySettings = DEFAULTS.retry
    overlong: Overlong = DEFAULTS.overlong
    keep_empty: bool = False
    reject_zero: bool = False
    label: str = ""
    fingerprint: str = ""
    former: tuple[str, ...] = ()
    secrets: Iterable[str] = field(default=(), repr=False)
    no_key: str = ""
    observe: Observer = _ignored
    lends_room: bool = False
    learned: Learned = field(default_factory=Learned)
    monotonic: Callable[[], float] = time.monotonic
    wait_for: Callable[[threading.Event, float], bool] = threading.Event.wait
    jitter: Callable[[float, float], float] = random.uniform
    grace: float = 5.0
    loaded: Once = field(default_factory=Once)
    info: ModelInfo = field(init=False)

    def __post_init__(self) -> None:
        # Asked for dozens of times in every request.
        object.__setattr__(self, "info", self.embedder.info)

    def load(self) -> None:
        """Import what the threads of a call use, before there are any. Free, and done once.

        An import that fails in such a thread, for want of memory say, may hang there for ever; and
        it is no part of a request. Raises ``EmbeddingError``.
        """
        self.loaded.do(self._load)

    def connect(self) -> None:
        """Have a connection open before the first request. Free. Raises ``EmbeddingError``."""
        self.load()
        self._start_up("connect")

    def _load(self) -> None:
        for name in _USED_BY_THREADS:
            import_module(name)
        self._start_up("load")

    def _start_up(self, step: Literal["load", "connect"]) -> None:
        startup, failure = startup_of(self.embedder), None
        if startup is None:
            return
        try:
            startup.load() if step == "load" else startup.connect()
        except Exception as error:  # noqa: BLE001 - a provider may raise anything
            failure = self.typed(error, sent=False)
        # Not inside the handler, where the raw error, a key perhaps in it, would become a context.
        if failure is not None:
            raise failure

    def renew_claims(self) -> None:
        """Other processes that share the cache leave what calls have claimed to this one for
        longer. To be called often, while a call waits with claims."""
        if self.cache is not None:
            self.cache.renew()

    @property
    def tokenizer(self) -> Tokenizer:
        """The provider's, checked."""
        return CheckedTokenizer(self.embedder.tokenizer, partial(self.typed, sent=False))

    def counted(self, texts: Sequence[str]) -> int | None:
        """What a request of these texts costs, by an exact tokenizer; None without one."""
        tokenizer = self.tokenizer
        if not tokenizer.exact:
            return None
        try:
            counts = tokenizer.count(texts)
        except EmbeddingError as error:
            # The vectors are worth more than knowing what they cost.
            _logger.warning("%s", error)
            return None
        return sum(counts) + self.info.overhead_tokens_per_text * len(texts)

    def most_billed(self, texts: Sequence[str]) -> int | None:
        """What a request whose answer was lost was billed at, if it was, by an exact tokenizer.

        None: only what was reserved for it is known. So it is where bills were higher than counts.
        """
        learned = self.learned
        if learned.counts_fall_short or learned.scale > 1.0:
            return None
        counted = self.counted(texts)
        learned.counts_stand = learned.counts_stand or counted is not None
        return counted

    def compare(self, texts: Sequence[str], billed: int) -> None:
        """A request was answered, and billed. Once after a lost answer was charged by its count,
        that shows whether counts may be charged."""
        if self.learned.counts_stand:
            self.learned.counts_stand = False
            counted = self.counted(texts)
            self.learned.counts_fall_short |= counted is not None and billed > counted

    def typed(self, error: BaseException, *, sent: bool = True) -> EmbeddingError:
        """What escaped a provider, as one of ours; the outcome of what is not is unknown."""
        if isinstance(error, EmbeddingError):
            self._hide_secrets(error)
            self._explain_missing_key(error)
            return error
        said = _said(error)
        billing = (
            "It is not known whether the request was billed; its amount counts as spent"
            if sent
            else "Nothing was sent"
        )
        detail = self.scrubbed(f"{type(error).__name__}: {said}")[:300]
        typed = ProviderError(
            f"{self.label} failed with {detail}. {billing}. Please report this to the "
            "provider's author",
            billed="unknown" if sent else "no",
        )
        # The raw error stays attached for the author, unless it shows a key.
        leaks = any(secret in said for secret in self.secrets)
        typed.__cause__ = None if leaks else error
        typed.__suppress_context__ = True
        return typed

    def scrubbed(self, message: str) -> str:
        for secret in self.secrets:
            if len(secret) >= _SHORTEST_SECRET:
                message = message.replace(secret, "***")
        return message

    def _explain_missing_key(self, error: EmbeddingError) -> None:
        # A provider that was given no key says so, and cannot know why.
        about_keys = isinstance(error, (AuthenticationFailed, ConfigurationError))
        if about_keys and not error.message.endswith(self.no_key):
            error.message += self.no_key
            error.args = (error.message,)

    def _hide_secrets(self, error: EmbeddingError) -> None:
        message = str(error.message)
        if (clean := self.scrubbed(message)) != message:
            error.message = clean
            error.args = (clean,)


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a plugin's exception need not even be printable
        return "(an error that cannot be shown)"


class Stop(threading.Event):
    """Set from outside a call, such as by a cancelled asyncio task, to end it early."""
