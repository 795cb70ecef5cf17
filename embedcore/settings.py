"""Settings as typed, frozen models: what may be set, what it means, and every default, once.

``Rules`` and the tables are what a layer of the configuration says; ``Settings`` is what holds for
one client once all layers are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field

from embedcore import money
from embedcore.storage.amounts import ALL_SCOPES, Limit, Unit
from embedcore.storage.calendar import PERIODS, Period

Overlong: TypeAlias = Literal["truncate", "reject"]
OnEmpty: TypeAlias = Literal["reject", "keep"]
OnZero: TypeAlias = Literal["warn", "reject"]
Strategy: TypeAlias = Literal["immediate", "batch", "auto"]

_LARGEST_TOKENS = 10**15
_LARGEST_DOLLARS = 10**6


def _number(value: object) -> object:
    # Python counts True as 1; who wrote it meant something else.
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Tokens: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST_TOKENS, strict=True)]
Dollars: TypeAlias = Annotated[Decimal, Field(ge=0, le=_LARGEST_DOLLARS, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1), BeforeValidator(_number)]
Number: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Share: TypeAlias = Annotated[Number, Field(le=1)]
Seconds: TypeAlias = Number
ScopeName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9._/@+-]{1,128}$")]


class Table(BaseModel):
    """A part of the configuration, as it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(Table):
    """Limits in tokens and in US dollars, per day, per month and in total. None: no limit."""

    daily_token_limit: Tokens | None = None
    monthly_token_limit: Tokens | None = None
    total_token_limit: Tokens | None = None
    daily_cost_limit: Dollars | None = None
    monthly_cost_limit: Dollars | None = None
    total_cost_limit: Dollars | None = None

    def amount(self, period: Period, unit: Unit) -> int | None:
        """The limit in tokens or picodollars."""
        name = {"day": "daily", "month": "monthly", "total": "total"}[period]
        if unit == "tokens":
            tokens: int | None = getattr(self, f"{name}_token_limit")
            return tokens
        dollars: Decimal | None = getattr(self, f"{name}_cost_limit")
        return None if dollars is None else money.in_picodollars(dollars)

    @property
    def has_limits(self) -> bool:
        """Whether any of them is set."""
        return any(getattr(self, name) is not None for name in Limits.model_fields)

    def _tightest(self, other: Limits) -> dict[str, Any]:
        found = {}
        for name in Limits.model_fields:
            both = [one for one in (getattr(self, name), getattr(other, name)) if one is not None]
            if both:
                found[name] = min(both)
        return found


class Budget(Limits):
    """What may be spent. The limits written here hold for the scope that is in use.

    - ``all_scopes``: limits over everything in this state folder.
    - ``scopes``: limits of one scope by its name.
    - ``query_share``: the part of each of the scope's limits that only queries may use, 0 to 1.
    - ``wait``: seconds to wait while others reserve more than they will need, before refusing.
    """

    all_scopes: Limits = Limits()
    scopes: dict[ScopeName, Limits] = {}
    query_share: Share = 0.0
    wait: Seconds = 30.0

    @property
    def has_limits(self) -> bool:
        """Whether any limit is set, for any scope."""
        holders = (self.all_scopes, *self.scopes.values())
        return super().has_limits or any(one.has_limits for one in holders)

    def tightened_by(self, lower: Budget) -> Budget:
        """This budget and one of a lower layer together: of each limit the tighter, of the query
        shares the larger. ``wait`` is no limit: the lower layer decides.
        """
        scopes = {
            name: Limits(
                **self.scopes.get(name, Limits())._tightest(lower.scopes.get(name, Limits()))
            )
            for name in {**self.scopes, **lower.scopes}
        }
        return Budget(
            **self._tightest(lower),
            all_scopes=Limits(**self.all_scopes._tightest(lower.all_scopes)),
            scopes=scopes,
            query_share=max(self.query_share, lower.query_share),
            wait=lower.wait if "wait" in lower.model_fields_set else self.wait,
        )

    def limits(self, scope: str) -> tuple[Limit, ...]:
        """The tightest limit for each window and unit that a call of ``scope`` must keep."""
        tightest: dict[tuple[str, str, str], Limit] = {}
        holders = ((scope, self), (scope, self.scopes.get(scope)), (ALL_SCOPES, self.all_scopes))
        for owner, limits in holders:
            for period in PERIODS:
                for unit in ("tokens", "cost"):
                    amount = limits.amount(period, unit) if limits is not None else None
                    if amount is not None:
                        reserved = int(amount * self.query_share) if owner == scope else 0
                        limit = Limit(
                            scope=owner, period=period, unit=unit, amount=amount, reserved=reserved
                        )
                        before = tightest.setdefault((owner, period, unit), limit)
                        if amount < before.amount:
                            tightest[owner, period, unit] = limit
        return tuple(tightest[key] for key in sorted(tightest))


class RetrySettings(Table):
    """How failed requests are tried again.

    - ``attempts``: tries of one request, the first included. Waiting for a time that the provider
      named does not use them up.
    - ``first_wait``, ``longest_wait``: bounds of the exponential wait with full jitter, in seconds.
    - ``longest_named_wait``: a provider that names a longer time ends the call at once.
    - ``request_timeout``: seconds for one attempt, connecting and reading included.
    - ``deadline``: seconds for a whole call; None: no deadline.
    - ``quota``: retries that may be saved up; ``quota_ratio``: how many each success earns. An
      outage is so never answered with many times the load.
    """

    attempts: Annotated[Count, Field(le=100)] = 3
    first_wait: Seconds = 0.5
    longest_wait: Seconds = 30.0
    longest_named_wait: Seconds = 300.0
    request_timeout: Annotated[Seconds, Field(gt=0)] = 120.0
    deadline: Annotated[Seconds, Field(gt=0)] | None = None
    quota: Number = 35.0
    quota_ratio: Share = 0.1


class BatchSettings(Table):
    """How batches are cut and looked after. Times in seconds.

    - ``parts``: remote jobs at work at once, for one model of one account.
    - ``part_texts``: most texts in one job; None: as many as the provider takes.
    - ``enqueued_tokens``: tokens that the account may have enqueued; None: as the provider says or
      teaches.
    - ``attempts``: jobs in which a text may end without a result before it has failed.
    - ``grace``: how long a job that was created can take to appear in the provider's list;
      ``look_again``: between two looks; ``watch``: how long one that was charged is looked for.
    - ``output_wait``: how long results that an ended job owes are looked for again;
      ``input_wait``: how long a job is asked for again whose input is not ready.
    - ``keep_days``: so long vectors of a batch are safe from pruning, and its rows are kept.
    - ``small_texts``, ``worth``, ``quickest``: "auto" embeds at once so many texts if a batch saves
      less US dollars, and any with so near a deadline; ``drain_before`` it jobs give way to that.
    """

    parts: Annotated[Count, Field(le=1000)] = 8
    part_texts: Count | None = None
    enqueued_tokens: Count | None = None
    attempts: Annotated[Count, Field(le=100)] = 3
    grace: Seconds = 600.0
    look_again: Annotated[Seconds, Field(gt=0)] = 60.0
    watch: Seconds = 90_000.0
    output_wait: Seconds = 600.0
    input_wait: Seconds = 600.0
    keep_days: Annotated[Number, Field(gt=0, le=3650)] = 30.0
    small_texts: Annotated[int, Field(ge=0), BeforeValidator(_number)] = 2048
    worth: Number = 0.01
    quickest: Seconds = 3600.0
    drain_before: Seconds = 1800.0


class ModelFacts(Table):
    """What is known of one model, whichever provider it belongs to. None: as the provider says.

    - ``price``, ``batch_price``: US dollars per million input tokens; 0: free. Without
      ``batch_price``, a batch is counted at ``price``.
    - ``max_input_tokens``: of the longest text that the service takes.
    - ``dimensions``: the width to ask for, where the provider can ask for one; else the width that
      is expected.
    - ``tokenizer``: a ``tokenizer.json``, or a model on the Hugging Face hub whose file is in the
      local cache: tokens are then counted exactly.
    """

    price: Dollars | None = None
    batch_price: Dollars | None = None
    max_input_tokens: Count | None = None
    dimensions: Count | None = None
    tokenizer: Annotated[str, Field(min_length=1)] | None = None

    def stated(self) -> dict[str, Any]:
        """Those that are said, by their names."""
        values = {name: getattr(self, name) for name in ModelFacts.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class Policy(BaseModel):
    """What an administrator may set for every user: limits, and nothing else."""

    model_config = ConfigDict(extra="forbid")

    budget: Budget = Budget()


class Rules(Table):
    """What holds for the texts and replies of a profile. None: as the layer above says.

    - ``overlong``: a text over the model's limit is cut to what fits, or refused.
    - ``on_empty``: an empty text is refused, or kept as a failed row. It is never sent.
    - ``on_zero``: a vector of zeros, which some servers return for texts they cannot handle, is
      passed on with a warning, or refused.
    - ``concurrency``: requests in flight at once; never more than the model allows.
    - ``requests_per_minute``, ``tokens_per_minute``, ``texts_per_minute``: no faster than that,
      whatever else is learned of the provider's limits; by all processes of a state folder
      together. Texts: by default as the model's provider says.
    - ``cache``: keep vectors that were paid for and use them again. Without it, models whose price
      is known and not zero are kept.
    - ``cache_dir``: the folder of their file; default: that of all state.
    - ``cache_cap``: its largest size, as bytes or "20 GB"; beyond it no more are kept. Default
      10 GB, about 1.6 million vectors of 1,536 dimensions.
    - ``strategy``: of batches: everything in a batch (default), at once, or as is best ("auto");
      ``deadline``: seconds after which "auto" should have everything.
    """

    overlong: Overlong | None = None
    on_empty: OnEmpty | None = None
    on_zero: OnZero | None = None
    concurrency: Annotated[Count, Field(le=1024)] | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    texts_per_minute: Count | None = None
    cache: bool | None = None
    cache_dir: Path | None = None
    cache_cap: Annotated[ByteSize, Field(ge=0)] | None = None
    strategy: Strategy | None = None
    deadline: Annotated[Seconds, Field(gt=0)] | None = None


class Profile(Rules):
    """A named set of settings: ``EmbeddingClient("name")`` uses it."""

    model: Annotated[str, Field(min_length=1)]
    options: dict[str, Any] = Field(default={}, repr=False)
    scope: ScopeName | None = None
    budget: Budget = Budget()
    retry: RetrySettings | None = None
    batch: BatchSettings | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What holds for one client; see ``Rules``, ``RetrySettings`` and ``BatchSettings``.

    ``concurrency`` None: as the model allows. ``cache`` None: on for models that cost money.
    """

    overlong: Overlong = "truncate"
    on_empty: OnEmpty = "reject"
    on_zero: OnZero = "warn"
    concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    texts_per_minute: int | None = None
    cache: bool | None = None
    cache_dir: Path | None = None
    cache_cap: int = 10 * 10**9
    strategy: Strategy = "batch"
    deadline: float | None = None
    retry: RetrySettings = field(default_factory=RetrySettings)
    batch: BatchSettings = field(default_factory=BatchSettings)


DEFAULTS: Final = Settings()
