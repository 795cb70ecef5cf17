"""The values that pass between the core and a provider.

All are frozen, take keyword arguments only and have defaults, so that a field can be added without
breaking a provider that exists. Importing this module loads neither numpy nor an SDK.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, TypeAlias

from embedcore import money
from embedcore.errors import Billed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """US dollars per million input tokens. ``batch`` is None where there is no batch price.

    ``as_of`` and ``source`` say when and where the figures were read.
    """

    immediate: Decimal = Decimal(0)
    batch: Decimal | None = None
    as_of: date | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("immediate", "batch"):
            value = getattr(self, name)
            if value is None:
                continue
            value = value if isinstance(value, Decimal) else Decimal(str(value))
            if not value.is_finite() or value < 0:
                raise ValueError(f"price {name} must be a finite amount ≥ 0, not {value}")
            object.__setattr__(self, name, value)

    @property
    def free(self) -> bool:
        return self.immediate == 0 and not self.batch

    def picodollars(self, tokens: int, *, batch: bool = False) -> int:
        """What ``tokens`` cost in picodollars, rounded up."""
        rate = self.batch if batch and self.batch is not None else self.immediate
        return money.cost_of(tokens, rate)


Truncation: TypeAlias = Literal["error", "silent", "reported", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What the core must know of one model to plan, price and check its requests.

    - ``dimensions``: width of its vectors; None if only the first reply can tell.
    - ``max_input_tokens``: longest single text, in its tokenizer's tokens; None for no limit.
    - ``max_texts_per_request``, ``max_tokens_per_request``, ``max_bytes_per_request``: one request;
      bytes are the UTF-8 bytes of the texts. None for no limit.
    - ``best_texts_per_request``: so many make a request cheapest to send and to read, on the way to
      the maximum; None: the maximum. Large calls take up to three times as many.
    - ``request_bytes_per_token``: the server gauges the size of a request as bytes divided by this,
      instead of counting tokens; the larger of both is held against ``max_tokens_per_request``.
    - ``tokens_per_byte``: no text has more tokens than this times its UTF-8 bytes. 1 holds for
      every tokenizer of bytes, characters or words; a service with other units must say so, or a
      budget could be passed.
    - ``overhead_tokens_per_text``: billed on top of each text's own tokens.
    - ``max_concurrency``: requests in flight at once.
    - ``texts_per_minute``: of a service that limits texts, whatever the size of a request, and does
      not say so in headers. A user's own ``texts_per_minute`` goes over it.
    - ``price``: None if unknown (then a limit in money refuses the model); ``Price()`` if free.
    - ``local``: computed on this machine: no network, no money, no budget.
    - ``input_types``: the values of ``input_type`` that make a difference to its vectors.
    - ``default_input_type``: the one of them for texts that are stored. A call that names none is
      one of this type: the same request, and the same key in the cache.
    - ``truncation``: what the service does with a text that is too long, as the provider asks it:
      "error" refuses it, so that whatever is answered was used whole; "silent" cuts it and says
      nothing; "reported" cuts it and says so.
    - ``reply_models``: further names the provider may answer with; ``("*",)`` for any.
    - ``variant``: what else changes the vectors, for an embedder built by hand, without options.
    - ``endpoint``: where requests go, without credentials: rate limits are those of one endpoint.
    - ``account``: who pays there, as far as the options say it, without credentials: batch jobs are
      shared only within one account. A new key of the same account must not change it.
    """

    provider: str = ""
    model: str = ""
    dimensions: int | None = None
    max_input_tokens: int | None = None
    max_texts_per_request: int = 96
    best_texts_per_request: int | None = None
    max_tokens_per_request: int | None = None
    max_bytes_per_request: int | None = None
    request_bytes_per_token: int | None = None
    tokens_per_byte: int = 1
    overhead_tokens_per_text: int = 0
    max_concurrency: int = 8
    texts_per_minute: int | None = None
    price: Price | None = None
    local: bool = False
    input_types: tuple[str, ...] = ()
    default_input_type: str | None = None
    truncation: Truncation = "unknown"
    reply_models: tuple[str, ...] = ()
    variant: str = ""
    endpoint: str = ""
    account: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimits:
    """What a reply says of the rate limits: per minute, what is left, seconds until it is full."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests: float | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedRequest:
    """One HTTP request's worth of texts, within the model's limits.

    ``input_type``: None, or one of the model's ``input_types``. ``timeout``: seconds left for the
    whole attempt, or None for the provider's own. ``into``: a C-contiguous float32 array of shape
    (n, d) that the vectors may be written to; a reply that returns this very array saves a copy,
    and must not be kept. A provider may as well ignore it.
    """

    texts: Sequence[str] = ()
    input_type: str | None = None
    timeout: float | None = None
    into: Vectors | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedReply:
    """The answer to one request.

    ``vectors``: C-contiguous float32 array of shape (n, d), row i for text i. ``tokens``: what the
    provider says it billed, or None if it does not say. ``model``: the name it answered with, or
    None. ``limits``: what its headers say of the rate limits, or None.
    """

    vectors: Vectors
    tokens: int | None = None
    model: str | None = None
    request_id: str | None = None
    limits: RateLimits | None = None


BatchState: TypeAlias = Literal["running", "completed", "failed", "expired", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """How large one remote job may be. None for no limit.

    ``max_bytes``: of the whole input, as ``BatchStrategy.sizes`` counts them.
    ``max_enqueued_tokens``: of all jobs of the account that have not ended. ``window``: seconds
    within which a job ends. ``offered``: False where nothing new is to be submitted, and only what
    was submitted before is seen to. ``verify_rows``: so many random rows of each job are compared
    with single requests before any is kept, for a service that may mix rows up; at the immediate
    price.
    """

    max_items: int | None = None
    max_bytes: int | None = None
    max_enqueued_tokens: int | None = None
    window: float | None = None
    offered: bool = True
    verify_rows: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchItem:
    """One text of a job. ``id`` comes back with the result, and no item of any other job has it.

    It has at most 40 ASCII letters, digits and hyphens.
    """

    id: str = ""
    text: str = ""
    input_type: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOutcome:
    """What became of one item: ``vector`` (float32, shape (d,)) or ``error``, never both.

    ``tokens``: billed for this item, or None if that is not said. ``billed``: whether an item
    without a vector and without ``tokens`` cost anything. ``model``: the name that was answered
    with. ``retryable``: a new job may succeed with it. ``ran``: False if the job ended before it
    came to this item, which does not count as a try. ``too_long``: whether it was refused for its
    length; None: it may be. ``max_tokens``, ``text_tokens``: the limit and the length that the
    refusal names, as hints. An ``id`` that no item has, such as "", is
    counted and belongs to no text.
    """

    id: str = ""
    vector: Vectors | None = None
    tokens: int | None = None
    model: str | None = None
    error: str | None = None
    code: str | None = None
    billed: Billed = "no"
    retryable: bool = False
    ran: bool = True
    too_long: bool | None = None
    max_tokens: int | None = None
    text_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStatus:
    """A job as the provider sees it. A state the provider's plugin does not know is "running".

    ``detail``: the provider's own word for it. ``completed``, ``failed``, ``total``: items, where
    it says so. ``tokens``: billed for the whole job, or None as long as that is not known.
    ``errors``: item id, or its place among the items as uploaded ("0" is the first), or "" for the
    job as a whole → reason, for a job that failed validation.
    ``queue_full``: it failed only because too much is enqueued already; ``queue_limit``: the
    tokens that may be enqueued, where it names them.
    """

    state: BatchState = "running"
    detail: str = ""
    completed: int | None = None
    failed: int | None = None
    total: int | None = None
    tokens: int | None = None
    errors: dict[str, str] = field(default_factory=dict)
    queue_full: bool = False
    queue_limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundJob:
    """A remote job that carries our key or our input."""

    id: str = ""
    created_at: datetime | None = None
    state: BatchState = "running"
