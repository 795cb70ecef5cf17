"""What stays the same for all calls of one client: the model, the rules, and what was learned."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from embedcore.errors import EmbeddingError, ProviderError
from embedcore.events import Event, Observer
from embedcore.policy.limiter import Gate
from embedcore.policy.pool import Pool
from embedcore.policy.purse import Account
from embedcore.policy.retry import RetryQuota, RetrySettings
from embedcore.provider.protocol import Embedder
from embedcore.provider.types import ModelInfo

_SHORTEST_SECRET = 8


def _nobody(_: Event) -> None:
    """No one is told."""


@dataclass(kw_only=True, slots=True)
class Learned:
    """What replies taught: a smaller request size, and how far the token counts are off.

    ``proven``: the provider has answered with vectors, so that a refusal is about the texts.
    """

    max_texts: int | None = None
    scale: float = 1.0
    proven: bool = False


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

    def typed(self, error: BaseException) -> EmbeddingError:
        """What escaped a provider, as one of ours; the outcome of what is not is unknown."""
        if isinstance(error, EmbeddingError):
            return error
        detail = self.scrubbed(f"{type(error).__name__}: {error}")[:300]
        typed = ProviderError(
            f"{self.label} failed with {detail}. It is not known whether the request was billed; "
            "its amount counts as spent. Please report this to the provider's author",
            billed="unknown",
        )
        # The raw error stays attached for the author, unless it shows a key.
        leaks = any(secret in str(error) for secret in self.secrets)
        typed.__cause__ = None if leaks else error
        typed.__suppress_context__ = True
        return typed

    def scrubbed(self, message: str) -> str:
        for secret in self.secrets:
            if len(secret) >= _SHORTEST_SECRET:
                message = message.replace(secret, "***")
        return message


class Stop(threading.Event):
    """Set by someone outside a call, such as a cancelled asyncio task, to end it early."""
