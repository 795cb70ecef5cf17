"""The daily token count of the ledger: used and left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from embedcore.assembly import open_ledger
from embedcore.choice import as_config, check_scope
from embedcore.errors import ConfigurationError
from embedcore.forksafe import Lazy
from embedcore.observers import log
from embedcore.storage import counters, usage
from embedcore.storage.amounts import Amount, Grant, Limit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from embedcore.config import Config
    from embedcore.storage.counters import Used
    from embedcore.storage.ledger import Ledger


class UsageToday(TypedDict):
    """``requests`` counts attempts sent; ``remaining`` and ``limit`` are None without a limit."""

    tokens_used: int
    requests: int
    remaining: int | None
    limit: int | None


class TokenTracker:
    """Today's tokens of one scope, shared by every process that uses the same state folder.

    ``daily_limit``: tokens per day for this tracker, beside those of the configuration; the
    tightest holds. There is no default limit. May be shared between threads; pickles without
    handles and keys.
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
        if scope is not None:
            check_scope(scope)
        settings = as_config(config, limited=daily_limit is not None)
        profile = settings.profile(None)
        # Nothing else of the settings is needed here, and among the rest there may be a key.
        self._config = settings.model_copy(update={"options": {}, "profiles": {}})
        self.scope = scope or profile.scope or settings.scope
        self._limits = [
            limit for limit in settings.limits(profile, self.scope) if limit.unit == "tokens"
        ]
        if daily_limit is not None:
            own = Limit(scope=self.scope, period="day", unit="tokens", amount=daily_limit)
            self._limits.append(own)
        self._opened: Lazy[Ledger] = Lazy()

    def get_usage_today(self) -> UsageToday:
        """What is spent today; ``remaining`` leaves out what calls under way have reserved, and
        what is reserved for queries.
        """
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
        """Whether ``embed_texts`` could spend that many tokens now. Reserves nothing."""
        _check_tokens(estimated_tokens)
        # What costs nothing fits a limit that is overdrawn as well.
        return all(estimated_tokens <= max(one.left, 0) for one in self._limits_now())

    def record_usage(self, tokens: int) -> None:
        """Count tokens that were spent elsewhere, unconditionally, as one request."""
        _check_tokens(tokens)
        self._ledger.record(self.scope, Amount(tokens=tokens), note="record_usage")
        self._warn_when_near()

    def reset(self) -> None:
        """Start today's count of this scope at zero again. It stays on the record."""
        self._ledger.reset(self.scope)

    def close(self) -> None:
        """Close the state file. The next use opens it again."""
        ledger = self._opened.take()
        if ledger is not None:
            ledger.end()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened=Lazy())

    @property
    def _ledger(self) -> Ledger:
        return self._opened.get(lambda: open_ledger(self._config, self._limits))

    def _limits_now(self) -> list[Used]:
        return usage.limits_now(self._ledger, self.scope, self._limits, "all")

    def _warn_when_near(self) -> None:
        if not self._limits:
            return
        ledger = self._ledger
        grant = Grant(id=0, scope=self.scope, lane="all", limits=tuple(self._limits), loose=False)
        with ledger.database.transaction() as connection:
            moment = ledger.moment_in(connection)
            windows = counters.ids(connection, self.scope, "all", moment)
            near = counters.newly_near(connection, windows, grant, moment)
        for event in near:
            log(event)


def _check_tokens(tokens: object, what: str = "") -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ConfigurationError(f"{what}{tokens!r} is not a number of tokens: a whole number ≥ 0")
