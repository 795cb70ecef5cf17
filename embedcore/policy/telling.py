"""What is told of one call's requests."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from embedcore.errors import StorageError
from embedcore.events import (
    LimitsLearned,
    RequestFailed,
    RequestFinished,
    RequestSent,
    Throttled,
)
from embedcore.storage.rates import NamedRates, note

if TYPE_CHECKING:
    from embedcore.errors import EmbeddingError
    from embedcore.policy.engine import Engine
    from embedcore.policy.planning import PlannedRequest
    from embedcore.provider.types import RateLimits


class Teller:
    """Makes the events of an engine's model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def sent(self, request: PlannedRequest, attempt: int) -> None:
        info = self._engine.info
        self._engine.observe(
            RequestSent(
                provider=info.provider,
                model=info.model,
                inputs=len(request),
                tokens=request.amount.tokens,
                attempt=attempt,
            )
        )

    def finished(
        self,
        request: PlannedRequest,
        *,
        tokens: int,
        reported: bool,
        exact: bool,
        request_id: str | None,
        seconds: float,
    ) -> None:
        info = self._engine.info
        self._engine.observe(
            RequestFinished(
                provider=info.provider,
                model=info.model,
                inputs=len(request),
                tokens=tokens,
                reported=reported,
                request_id=request_id,
                seconds=seconds,
                endpoint=info.endpoint,
                exact=exact,
            )
        )

    def failed(
        self,
        error: EmbeddingError,
        request: PlannedRequest,
        *,
        seconds: float,
        wait: float | None,
    ) -> None:
        """``wait``: seconds until it is tried again; None: it is not."""
        info = self._engine.info
        self._engine.observe(
            RequestFailed(
                provider=info.provider,
                model=info.model,
                inputs=len(request),
                error=type(error).__name__,
                status=getattr(error, "status", None),
                request_id=getattr(error, "request_id", None),
                billed=error.billed,
                seconds=seconds,
                wait=wait,
                endpoint=info.endpoint,
            )
        )

    def throttled(self, seconds: float) -> None:
        self._engine.observe(Throttled(endpoint=self._engine.info.endpoint, seconds=seconds))

    def learned(self, limits: RateLimits) -> None:
        """The limits are also written down, for ``embedcore doctor``."""
        info, ledger = self._engine.info, self._engine.account.ledger
        requests, tokens = limits.limit_requests, limits.limit_tokens
        self._engine.observe(
            LimitsLearned(
                endpoint=info.endpoint,
                model=info.model,
                requests_per_minute=requests,
                tokens_per_minute=tokens,
            )
        )
        if ledger is None:
            return
        rates = NamedRates(
            endpoint=info.endpoint,
            model=info.model,
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            named=time.time(),
        )
        # Whatever is wrong with the books, the next step of money will say it better.
        with contextlib.suppress(StorageError):
            note(ledger.database, rates)
