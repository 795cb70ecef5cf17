"""All errors of embedcore, as one tree.

EmbeddingError                   .retryable  .billed  .position  .partial  .budget_blocked
├── ConfigurationError             your settings; nothing was sent
│   ├── UnknownProvider              lists the installed ones and how to install the missing one
│   └── PluginError                  a provider package that cannot be loaded
├── InputRejected                  .reason; nothing of that text was sent
│   └── InputTooLong                 overlong = "reject", or the server disagrees with our count
├── BudgetExceeded                 .limit .spent .held .asked .resets_at .never_fits
│   ├── TokenBudgetExceeded          amounts in tokens
│   └── CostBudgetExceeded           amounts in US dollars
├── ProviderError                  the remote side
│   ├── TransientProviderError       .retry_after .limits; trying again may help
│   │   ├── RateLimited
│   │   ├── ProviderUnavailable
│   │   ├── InputNotReady              a batch's input was uploaded and cannot be used yet
│   │   └── OutcomeUnknown
│   │       └── TimedOut               no reply in time; fewer texts may be quick enough
│   ├── PermanentProviderError       trying the same again cannot help
│   │   ├── AuthenticationFailed
│   │   ├── PermissionDenied
│   │   ├── ModelNotFound
│   │   ├── QuotaExhausted
│   │   ├── RequestRejected
│   │   ├── RequestTooLarge
│   │   └── RemoteGone                 a batch job or its results, gone or another account's
│   └── InvalidResponse              it answered, and the answer cannot be trusted
│       └── ReplyMismatch              another model or width than the settings say
├── BatchEmbeddingFailed           .jobs .failures .result
└── StorageError                   the state file
    ├── StorageBusy
    ├── StorageFull
    ├── StorageReadOnly
    ├── StorageCorrupt
    ├── StorageTooNew
    └── UnsafeStorage

The provider's author raises the classes under ``ProviderError`` and sets ``billed``; what each
value of ``billed`` costs is decided once, in the core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from decimal import Decimal

    from embedcore.policy.result import EmbeddingResult
    from embedcore.provider.types import RateLimits

Billed: TypeAlias = Literal["no", "yes", "unknown"]


def _rebuild(kind: type[EmbeddingError], state: dict[str, Any]) -> EmbeddingError:
    error = kind.__new__(kind)
    Exception.__init__(error, state.get("message", ""))
    error.__dict__.update(state)
    return error


class EmbeddingError(Exception):
    """The base of everything embedcore raises.

    ``retryable``: the same call may succeed later without a change.
    ``billed``: whether the provider may have charged for the failed request.
    ``position``: the row of the caller's input that is at fault, from 0, where one is.
    ``partial``: what did succeed before the failure, as an ``EmbeddingResult``, or None.
    ``budget_blocked``: a retry would have been made, but the budget no longer allowed it.
    ``billed_tokens``: what the provider says it billed for the failed request, or None.
    """

    retryable: bool = False
    billed: Billed = "no"

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        billed: Billed | None = None,
        partial: EmbeddingResult | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if retryable is not None:
            self.retryable = retryable
        if billed is not None:
            self.billed = billed
        self.position: int | None = None
        self.partial = partial
        self.budget_blocked = False
        self.billed_tokens: int | None = None

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only constructors do not survive Exception's own pickling; process pools need it.
        return _rebuild, (type(self), dict(self.__dict__))


class ConfigurationError(EmbeddingError):
    """A setting is wrong, missing or contradictory. Nothing was sent."""


class UnknownProvider(ConfigurationError):
    """No installed distribution offers this provider. ``installed`` names those that are there."""

    def __init__(self, message: str, *, installed: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.installed = tuple(installed)


class PluginError(ConfigurationError):
    """A provider package is installed and cannot be used; names the distribution and the cause."""

    def __init__(self, message: str, *, distribution: str | None = None) -> None:
        super().__init__(message)
        self.distribution = distribution


class InputRejected(EmbeddingError):
    """A text that cannot be embedded. ``reason`` says why, without its position."""

    def __init__(
        self,
        message: str,
        *,
        position: int | None = None,
        reason: str = "",
        billed: Billed | None = None,
        partial: EmbeddingResult | None = None,
    ) -> None:
        super().__init__(message, billed=billed, partial=partial)
        self.position = position
        self.reason = reason or message


class InputTooLong(InputRejected):
    """A text over the model's limit that must not, or could not, be cut.

    A provider raises it when the server names one text of a request; ``position`` is then the
    place in that request, and the core translates it to the caller's. ``max_tokens`` and
    ``tokens``: the server's limit and its count of the text, where the refusal names them. Hints:
    they make the search for the right length quicker, and decide nothing.
    """

    def __init__(
        self,
        message: str,
        *,
        position: int | None = None,
        reason: str = "",
        max_tokens: int | None = None,
        tokens: int | None = None,
        billed: Billed | None = None,
        partial: EmbeddingResult | None = None,
    ) -> None:
        super().__init__(message, position=position, reason=reason, billed=billed, partial=partial)
        self.max_tokens = max_tokens
        self.tokens = tokens


class BudgetExceeded(EmbeddingError):
    """The call does not fit a limit. Nothing was sent for the part that was refused.

    ``limit``, ``spent``, ``held`` and ``asked`` are in the unit of the subclass. ``resets_at`` is
    when the binding window ends (None for a limit in total). ``never_fits``: larger than the whole
    limit, so that waiting cannot help. ``period`` is day, month or total; ``scope`` the project,
    or ``*`` for all of them.
    """

    def __init__(
        self,
        message: str,
        *,
        limit: int | Decimal = 0,
        spent: int | Decimal = 0,
        held: int | Decimal = 0,
        asked: int | Decimal = 0,
        resets_at: datetime | None = None,
        never_fits: bool = False,
        period: str = "day",
        scope: str = "*",
        partial: EmbeddingResult | None = None,
    ) -> None:
        super().__init__(message, retryable=not never_fits, partial=partial)
        self.limit = limit
        self.spent = spent
        self.held = held
        self.asked = asked
        self.resets_at = resets_at
        self.never_fits = never_fits
        self.period = period
        self.scope = scope


class TokenBudgetExceeded(BudgetExceeded):
    """A limit in tokens."""

    limit: int
    spent: int
    held: int
    asked: int


class CostBudgetExceeded(BudgetExceeded):
    """A limit in money; amounts in US dollars, as ``Decimal``."""

    limit: Decimal
    spent: Decimal
    held: Decimal
    asked: Decimal


class ProviderError(EmbeddingError):
    """The remote side failed. ``status`` and ``code`` are the provider's own, when it gave any.

    ``free_by_status``: ``billed`` is "no" for the status alone, without a body that proves it.
    ``again``: the provider would ask differently now, with a new key say; the same request is sent
    once more, at once, for each value of it.

    Raised directly only for what escapes a plugin untyped; its outcome is then unknown.
    """

    billed: Billed = "unknown"
    free_by_status: bool = False
    again: str | None = None

    def __init__(
        self,
        message: str,
        *,
        billed: Billed | None = None,
        retryable: bool | None = None,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        partial: EmbeddingResult | None = None,
    ) -> None:
        super().__init__(message, retryable=retryable, billed=billed, partial=partial)
        self.status = status
        self.code = code
        self.request_id = request_id


class TransientProviderError(ProviderError):
    """Trying again may help.

    ``retry_after``: seconds the provider asked to wait, or None. ``limits``: what the reply said of
    the rate limits, or None.
    """

    retryable = True

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        limits: RateLimits | None = None,
        billed: Billed | None = None,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        partial: EmbeddingResult | None = None,
    ) -> None:
        super().__init__(
            message, billed=billed, status=status, code=code, request_id=request_id, partial=partial
        )
        self.retry_after = retry_after
        self.limits = limits
        self.retry_at: datetime | None = None


class RateLimited(TransientProviderError):
    """Too fast (HTTP 429). The request was not processed."""

    billed = "no"


class ProviderUnavailable(TransientProviderError):
    """The provider could not be reached, or said that it cannot serve now."""


class InputNotReady(TransientProviderError):
    """A job was refused because its input, which was uploaded, cannot be used yet."""

    billed = "no"


class OutcomeUnknown(TransientProviderError):
    """The request may or may not have been processed: its money counts as spent."""

    billed = "unknown"


class TimedOut(OutcomeUnknown):
    """The connection stood, and no complete reply came within the time-out."""


class PermanentProviderError(ProviderError):
    """Trying the same again cannot help. ``billed`` must be set by the code that raises it."""


class AuthenticationFailed(PermanentProviderError):
    """The key is missing, wrong or expired."""

    billed = "no"


class PermissionDenied(PermanentProviderError):
    """The key is valid and may not do this."""

    billed = "no"


class ModelNotFound(PermanentProviderError):
    """The provider does not know the model, or the key may not use it."""

    billed = "no"


class QuotaExhausted(PermanentProviderError):
    """The account has no money or quota left: waiting does not help."""

    billed = "no"


class RequestRejected(PermanentProviderError):
    """The provider refused the request as invalid. One of its texts may be the reason."""


class RequestTooLarge(PermanentProviderError):
    """The provider refused the request for its size: smaller ones may pass.

    ``max_texts``: the most texts in one request, where the refusal names a number. A hint: it makes
    the search for the right size quicker, and decides nothing.
    """

    billed = "no"

    def __init__(
        self,
        message: str,
        *,
        max_texts: int | None = None,
        billed: Billed | None = None,
        retryable: bool | None = None,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        partial: EmbeddingResult | None = None,
    ) -> None:
        super().__init__(
            message,
            billed=billed,
            retryable=retryable,
            status=status,
            code=code,
            request_id=request_id,
            partial=partial,
        )
        self.max_texts = max_texts


class RemoteGone(PermanentProviderError):
    """A batch job or its results are no longer there, or belong to another account."""

    billed = "unknown"


class InvalidResponse(ProviderError):
    """The provider answered and the answer cannot be trusted. Nothing of it is kept."""

    billed: Billed = "yes"


class ReplyMismatch(InvalidResponse):
    """The reply is of another model, or its vectors have another width, than the settings say.

    No text and no size can be the reason: it is said once, and nothing is sent again.
    """


class BatchEmbeddingFailed(EmbeddingError):
    """A batch ended without a vector for every text.

    ``jobs``: the provider's job ids. ``failures``: row → reason. ``result``: what was received.
    """

    def __init__(
        self,
        message: str,
        *,
        jobs: Sequence[str] = (),
        failures: Mapping[int, str] | None = None,
        result: EmbeddingResult | None = None,
        retryable: bool | None = None,
        billed: Billed | None = None,
    ) -> None:
        super().__init__(message, retryable=retryable, billed=billed, partial=result)
        self.jobs = tuple(jobs)
        self.failures = dict(failures or {})
        self.result = result


class StorageError(EmbeddingError):
    """The state file cannot be used."""


class StorageBusy(StorageError):
    """Another process held the write lock for longer than the time-out."""

    retryable = True


class StorageFull(StorageError):
    """The disk or the file's size limit is full."""


class StorageReadOnly(StorageError):
    """The state file or its folder cannot be written."""


class StorageCorrupt(StorageError):
    """The state file is damaged, replaced or gone. It is never recreated silently: that would
    reset the budget."""


class StorageTooNew(StorageError):
    """The state file was written by a newer version of embedcore."""


class UnsafeStorage(StorageError):
    """Locks on the state file cannot be trusted with money.

    ``reason``: ``"network"``, it is on a network file system; ``"links"``, it has several names;
    ``"fork"``, this process was forked off while it was in use.
    """

    def __init__(
        self, message: str, *, reason: Literal["network", "links", "fork"] = "network"
    ) -> None:
        super().__init__(message)
        self.reason = reason
