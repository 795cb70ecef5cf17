"""How many tokens were used today, and how many are left? The daily view of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from embedcore.assembly import as_config, open_ledger
from embedcore.errors import ConfigurationError
from embedcore.storage import usage
from embedcore.storage.amounts import Amount, Limit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from embedcore.config import Config
    from embedcore.storage.ledger import Ledger
    from embedcore.storage.windows import Used


class UsageToday(TypedDict):
    """``requests`` counts attempts sent; ``remaining`` and ``limit`` are None without a limit."""

    tokens_used: int
    requests: int
    remaining: int | None
    limit: int | None


class TokenTracker:
    """Today's tokens of one scope, shared by every process that uses the same state folder.

    ``daily_limit``: tokens per day for this tracker, beside those of the configuration; the
    tightest holds. There is no default limit.
    """

    def __init__(
        self,
        daily_limit: int | None = None,
        *,
        scope: str | None = None,
        config: Config | Mapping[str, Any] | Path | str | None = None,
    ) -> None:
        if daily_limit is not None:
            _check_tokens(daily_limit, "daily_limit = ")
        self._config = as_config(config)
        self.scope = scope or self._config.scope
        self._own_limit = daily_limit
        self._opened: Ledger | None = None

    def get_usage_today(self) -> UsageToday:
        """What is spent today; ``remaining`` leaves out what calls under way have set aside."""
        spent = usage.of_scope(self._ledger, self.scope)
        daily = [one for one in self._limits_now() if one.limit.period == "day"]
        tightest = min(daily, key=lambda one: one.left, default=None)
        return UsageToday(
            tokens_used=spent.spent.tokens,
            requests=spent.requests,
            remaining=None if tightest is None else max(tightest.left, 0),
            limit=None if tightest is None else tightest.limit.amount,
        )

    def check_budget(self, estimated_tokens: int) -> bool:
        """Whether that many tokens fit all token limits now. Holds nothing."""
        _check_tokens(estimated_tokens)
        return all(estimated_tokens <= one.left for one in self._limits_now())

    def record_usage(self, tokens: int) -> None:
        """Count tokens that were spent elsewhere, unconditionally, as one request."""
        _check_tokens(tokens)
        self._ledger.record(self.scope, Amount(tokens=tokens), note="record_usage")

    def reset(self) -> None:
        """Start today's count of this scope at zero again. It stays on the record."""
        self._ledger.reset(self.scope)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def _ledger(self) -> Ledger:
        if self._opened is None:
            self._opened = open_ledger(self._config, self._limits())
        return self._opened

    def _limits(self) -> list[Limit]:
        profile = self._config.profile(None)
        limits = [
            limit for limit in self._config.limits(profile, self.scope) if limit.unit == "tokens"
        ]
        if self._own_limit is not None:
            own = Limit(scope=self.scope, period="day", unit="tokens", amount=self._own_limit)
            limits.append(own)
        return limits

    def _limits_now(self) -> list[Used]:
        return usage.limits_now(self._ledger, self.scope, self._limits(), "query")


def _check_tokens(tokens: object, what: str = "") -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ConfigurationError(f"{what}{tokens!r} is not a number of tokens: a whole number ≥ 0")
