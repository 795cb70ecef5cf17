"""The settings as frozen models: what may be set, and what it means.

Reading and layering them is ``embedcore.configfile``; this module only says what is valid.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, PrivateAttr

from embedcore.errors import ConfigurationError
from embedcore.policy.batch.settings import BatchSettings
from embedcore.policy.retry import RetrySettings
from embedcore.storage.amounts import ALL_SCOPES, Limit, Unit
from embedcore.storage.calendar import PERIODS, Period

Overlong: TypeAlias = Literal["truncate", "reject"]
OnEmpty: TypeAlias = Literal["reject", "keep"]
OnZero: TypeAlias = Literal["warn", "reject"]

DEFAULT_MODEL = "text-embedding-3-small"
DEFAULT_PROVIDER = "openai"
_PICODOLLARS = 10**12
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


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Model):
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
        return None if dollars is None else int(dollars * _PICODOLLARS)

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
    - ``wait``: seconds to wait while others hold more than they will need, before refusing.
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

    def limits(self, scope: str) -> list[Limit]:
        """Every limit of this budget that a call of ``scope`` must keep."""
        found = []
        holders = ((scope, self), (scope, self.scopes.get(scope)), (ALL_SCOPES, self.all_scopes))
        for owner, limits in holders:
            for period in PERIODS:
                for unit in ("tokens", "cost"):
                    amount = limits.amount(period, unit) if limits is not None else None
                    if amount is not None:
                        reserved = int(amount * self.query_share) if owner == scope else 0
                        found.append(
                            Limit(
                                scope=owner,
                                period=period,
                                unit=unit,
                                amount=amount,
                                reserved=reserved,
                            )
                        )
        return found


class Retry(_Model):
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

    def settings(self) -> RetrySettings:
        """The same as the plain value that the policy layer takes."""
        return RetrySettings(**self.model_dump())


class Batch(_Model):
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

    def settings(self) -> BatchSettings:
        """The same as the plain value that the policy layer takes."""
        return BatchSettings(**self.model_dump())


class Rules(_Model):
    """What holds for the texts and replies of a profile. None: as the layer above says.

    - ``overlong``: a text over the model's limit is cut to what fits, or refused.
    - ``on_empty``: an empty text is refused, or kept as a failed row. It is never sent.
    - ``on_zero``: a vector of zeros, which some servers return for texts they cannot handle, is
      passed on with a warning, or refused.
    - ``concurrency``: requests in flight at once; never more than the model allows.
    - ``requests_per_minute``, ``tokens_per_minute``: no faster than that, whatever else is learned
      of the provider's limits; counted in each process.
    - ``cache``: keep bought vectors and use them again. Without it, models whose price is known
      and not zero are kept.
    - ``cache_dir``: the folder of their file; default: that of all state.
    - ``cache_cap``: its largest size, as bytes or "20 GB"; beyond it no more are kept. Default
      10 GB, about 1.5 million vectors of 1,536 dimensions.
    - ``strategy``: of batches: everything in a batch (default), at once, or as is best ("auto");
      ``deadline``: seconds after which "auto" should have everything.
    """

    overlong: Overlong | None = None
    on_empty: OnEmpty | None = None
    on_zero: OnZero | None = None
    concurrency: Annotated[Count, Field(le=1024)] | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    cache: bool | None = None
    cache_dir: Path | None = None
    cache_cap: Annotated[ByteSize, Field(ge=0)] | None = None
    strategy: Literal["immediate", "batch", "auto"] | None = None
    deadline: Annotated[Seconds, Field(gt=0)] | None = None


class Profile(Rules):
    """A named set of settings: ``EmbeddingClient("name")`` uses it."""

    model: Annotated[str, Field(min_length=1)]
    options: dict[str, Any] = Field(default={}, repr=False)
    scope: ScopeName | None = None
    budget: Budget = Budget()
    retry: Retry | None = None
    batch: Batch | None = None


class Config(Rules):
    """Everything that can be set. Use ``Config.load()`` for what this machine says.

    - ``model``: a profile's name, ``provider:model``, or a model of the default provider.
    - ``options``: per provider, over which a profile's own options go.
    - ``scope``: the project that spends; limits and reports are per scope.
    - ``timezone``: where days and months begin; fixed when the state file is made (default UTC).
    - ``home``: the folder of all state; None: the platform's own place for it.
    - ``confirm_above``: the command line asks before it spends more than this, in US dollars.
    """

    model: Annotated[str, Field(min_length=1)] = DEFAULT_MODEL
    provider: Annotated[str, Field(min_length=1)] = DEFAULT_PROVIDER
    scope: ScopeName = "default"
    timezone: str | None = None
    options: dict[str, dict[str, Any]] = Field(default={}, repr=False)
    profiles: dict[str, Profile] = {}
    budget: Budget = Budget()
    retry: Retry = Retry()
    batch: Batch = Batch()
    home: Path | None = None
    allow_network_filesystem: bool = False
    confirm_above: Dollars = Decimal(1)

    # Where each value came from, by its path, and the budgets that ``budget`` was made from; the
    # file among the layers, what it may do (``embedcore.trust``), and what is wrong with that once
    # a limit is set. Not settings.
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _layers: tuple[tuple[str, Budget], ...] = PrivateAttr(default=())
    _file: str | None = PrivateAttr(default=None)
    _standing: Literal["named", "found", "trusted"] = PrivateAttr(default="named")
    _under_limit: str | None = PrivateAttr(default=None)

    @classmethod
    def load(cls, path: Path | str | None = None) -> Config:
        """Read the files and the environment. ``path`` names the file instead of looking for it.

        Raises ``ConfigurationError`` with the file, the path of the value and the nearest valid
        name.
        """
        from embedcore.configfile import load

        return load(path)

    @property
    def origins(self) -> dict[str, str]:
        """Path of each value that was set → the layer that set it; of a limit, the tightest one."""
        return dict(self._origins)

    @property
    def file(self) -> str | None:
        """The file that was read, as ``origins`` names it. None: there is none."""
        return self._file

    @property
    def standing(self) -> Literal["named", "found", "trusted"]:
        """Whether the user named that file, or it was found; "trusted" if it was, and is trusted.

        Every other layer was named.
        """
        return self._standing

    @property
    def under_limit(self) -> str | None:
        """What is wrong with these settings once a limit is set beside them; None: nothing."""
        return self._under_limit

    @property
    def layers(self) -> tuple[tuple[str, Budget], ...]:
        """Where limits are set and to what, the highest layer first; ``budget`` is all of them."""
        return self._layers

    def profile(self, name: str | None) -> Profile:
        """The profile of that name, or one made for a model's name."""
        chosen: object = self.model if name is None else name
        if not isinstance(chosen, str) or not chosen:
            raise ConfigurationError(f"model = {chosen!r} is not a model's name")
        return self.profiles.get(chosen) or Profile(model=chosen)

    def limits(self, profile: Profile, scope: str) -> tuple[Limit, ...]:
        """The tightest limit for each window and unit, those of the profile included."""
        tightest: dict[tuple[str, str, str], Limit] = {}
        for limit in self.budget.tightened_by(profile.budget).limits(scope):
            key = (limit.scope, limit.period, limit.unit)
            if key not in tightest or limit.amount < tightest[key].amount:
                tightest[key] = limit
        return tuple(tightest[key] for key in sorted(tightest))
