"""What stays the same for all calls of one client: the model, the rules, and what was learned."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal

from embedcore.errors import EmbeddingError, ProviderError
from embedcore.events import Event, Observer
from embedcore.policy.counting import CheckedTokenizer
from embedcore.policy.limiter import Gate
from embedcore.policy.planning import Smaller
from embedcore.policy.pool import Pool
from embedcore.policy.purse import Account
from embedcore.policy.retry import RetryQuota, RetrySettings
from embedcore.provider.protocol import Embedder, Tokenizer
from embedcore.provider.types import ModelInfo

_SHORTEST_SECRET: Final = 8
_LARGEST_SCALE: Final = 100.0


def _nobody(_: Event) -> None:
    """No one is told."""


@dataclass(kw_only=True, slots=True)
class Learned:
    """What replies taught the threads of a client.

    - ``smaller``: the size of request to try, after one was refused for its size.
    - ``scale``: how many times the counted tokens the provider was seen to bill.
    - ``always_count``: a text was billed at more tokens than bytes, as its count said.
    - ``proven``: it has answered with vectors, so that a refusal is about the texts.
    - ``width``: of the vectors.
    """

    smaller: Smaller | None = None
    scale: float = 1.0
    always_count: bool = False
    proven: bool = False
    width: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def shrink(self, *, texts: int, in_bytes: int) -> None:
        """A request of that many texts and bytes was refused for its size."""
        with self._lock:
            self.smaller = Smaller.than(self.smaller, texts, in_bytes)

    def billed(self, times: float) -> None:
        """An attempt cost that many times what was counted."""
        with self._lock:
            # One absurd bill must not make everything after it too dear to be tried.
            self.scale = min(max(self.scale, times), _LARGEST_SCALE)

    def agrees(self, width: int) -> bool:
        """Whether vectors of this width belong with all the others; the first ones decide."""
        with self._lock:
            if self.width is None:
                self.width = width
            return self.width == width


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Everything a recipe needs besides the texts. Shared by the threads of one client."""

    embedder: Embedder
    account: Account
    pool: Pool
    gate: Gate
    quota: RetryQuota
    retry: RetrySettings = field(default_factory=RetrySettings)
    overlong: Literal["truncate", "reject"] = "truncate"
    keep_empty: bool = False
    reject_zero: bool = False
    label: str = ""
    fingerprint: str = ""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    observe: Observer = _nobody
    learned: Learned = field(default_factory=Learned)
    monotonic: Callable[[], float] = time.monotonic
    jitter: Callable[[float, float], float] = random.uniform
    grace: float = 5.0

    @property
    def info(self) -> ModelInfo:
        return self.embedder.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The provider's, checked."""
        return CheckedTokenizer(self.embedder.tokenizer, partial(self.typed, sent=False))

    def typed(self, error: BaseException, *, sent: bool = True) -> EmbeddingError:
        """What escaped a provider, as one of ours; the outcome of what is not is unknown."""
        if isinstance(error, EmbeddingError):
            self._hide_secrets(error)
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
    """Set by someone outside a call, such as a cancelled asyncio task, to end it early."""
