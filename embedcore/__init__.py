"""Text to vectors, with the price first and a spending limit that holds."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedcore.client import (
        EmbeddingClient as EmbeddingClient,
    )
    from embedcore.config import (
        Config as Config,
    )
    from embedcore.errors import (
        AuthenticationFailed as AuthenticationFailed,
        BatchEmbeddingFailed as BatchEmbeddingFailed,
        BudgetExceeded as BudgetExceeded,
        ConfigurationError as ConfigurationError,
        CostBudgetExceeded as CostBudgetExceeded,
        EmbeddingError as EmbeddingError,
        InputNotReady as InputNotReady,
        InputRejected as InputRejected,
        InputTooLong as InputTooLong,
        InvalidResponse as InvalidResponse,
        ModelNotFound as ModelNotFound,
        OutcomeUnknown as OutcomeUnknown,
        PermanentProviderError as PermanentProviderError,
        PermissionDenied as PermissionDenied,
        PluginError as PluginError,
        ProviderError as ProviderError,
        ProviderUnavailable as ProviderUnavailable,
        QuotaExhausted as QuotaExhausted,
        RateLimited as RateLimited,
        RemoteGone as RemoteGone,
        ReplyMismatch as ReplyMismatch,
        RequestRejected as RequestRejected,
        RequestTooLarge as RequestTooLarge,
        StorageBusy as StorageBusy,
        StorageCorrupt as StorageCorrupt,
        StorageError as StorageError,
        StorageFull as StorageFull,
        StorageReadOnly as StorageReadOnly,
        StorageTooNew as StorageTooNew,
        TimedOut as TimedOut,
        TokenBudgetExceeded as TokenBudgetExceeded,
        TransientProviderError as TransientProviderError,
        UnknownProvider as UnknownProvider,
        UnsafeStorage as UnsafeStorage,
    )
    from embedcore.functions import (
        batch_embed_texts as batch_embed_texts,
        check_daily_limit as check_daily_limit,
        embed_texts as embed_texts,
        record_usage as record_usage,
    )
    from embedcore.policy.batch.job import (
        BatchJob as BatchJob,
    )
    from embedcore.policy.batch.report import (
        BatchReport as BatchReport,
        RemoteJob as RemoteJob,
    )
    from embedcore.policy.estimate import (
        Plan as Plan,
    )
    from embedcore.policy.result import (
        Arrival as Arrival,
        EmbeddingResult as EmbeddingResult,
        RowOutcome as RowOutcome,
        Spending as Spending,
        StoppedAt as StoppedAt,
        TextCut as TextCut,
    )
    from embedcore.policy.stream.asyncstream import (
        AsyncEmbeddingStream as AsyncEmbeddingStream,
    )
    from embedcore.policy.stream.rows import (
        Block as Block,
    )
    from embedcore.policy.stream.stream import (
        EmbeddingStream as EmbeddingStream,
    )
    from embedcore.provider.tokens import (
        estimate_tokens as estimate_tokens,
    )
    from embedcore.tracker import (
        TokenTracker as TokenTracker,
    )

# Loaded at first use: importing embedcore must cost a program nothing that it does not need.
_HOMES = {
    "Arrival": "embedcore.policy.result",
    "AsyncEmbeddingStream": "embedcore.policy.stream.asyncstream",
    "AuthenticationFailed": "embedcore.errors",
    "BatchEmbeddingFailed": "embedcore.errors",
    "BatchJob": "embedcore.policy.batch.job",
    "BatchReport": "embedcore.policy.batch.report",
    "Block": "embedcore.policy.stream.rows",
    "BudgetExceeded": "embedcore.errors",
    "Config": "embedcore.config",
    "ConfigurationError": "embedcore.errors",
    "CostBudgetExceeded": "embedcore.errors",
    "EmbeddingClient": "embedcore.client",
    "EmbeddingError": "embedcore.errors",
    "EmbeddingResult": "embedcore.policy.result",
    "EmbeddingStream": "embedcore.policy.stream.stream",
    "InputNotReady": "embedcore.errors",
    "InputRejected": "embedcore.errors",
    "InputTooLong": "embedcore.errors",
    "InvalidResponse": "embedcore.errors",
    "ModelNotFound": "embedcore.errors",
    "OutcomeUnknown": "embedcore.errors",
    "PermanentProviderError": "embedcore.errors",
    "PermissionDenied": "embedcore.errors",
    "Plan": "embedcore.policy.estimate",
    "PluginError": "embedcore.errors",
    "ProviderError": "embedcore.errors",
    "ProviderUnavailable": "embedcore.errors",
    "QuotaExhausted": "embedcore.errors",
    "RateLimited": "embedcore.errors",
    "RemoteGone": "embedcore.errors",
    "RemoteJob": "embedcore.policy.batch.report",
    "ReplyMismatch": "embedcore.errors",
    "RequestRejected": "embedcore.errors",
    "RequestTooLarge": "embedcore.errors",
    "RowOutcome": "embedcore.policy.result",
    "Spending": "embedcore.policy.result",
    "StoppedAt": "embedcore.policy.result",
    "StorageBusy": "embedcore.errors",
    "StorageCorrupt": "embedcore.errors",
    "StorageError": "embedcore.errors",
    "StorageFull": "embedcore.errors",
    "StorageReadOnly": "embedcore.errors",
    "StorageTooNew": "embedcore.errors",
    "TextCut": "embedcore.policy.result",
    "TimedOut": "embedcore.errors",
    "TokenBudgetExceeded": "embedcore.errors",
    "TokenTracker": "embedcore.tracker",
    "TransientProviderError": "embedcore.errors",
    "UnknownProvider": "embedcore.errors",
    "UnsafeStorage": "embedcore.errors",
    "batch_embed_texts": "embedcore.functions",
    "check_daily_limit": "embedcore.functions",
    "embed_texts": "embedcore.functions",
    "estimate_tokens": "embedcore.provider.tokens",
    "record_usage": "embedcore.functions",
}

__all__ = [
    "Arrival",
    "AsyncEmbeddingStream",
    "AuthenticationFailed",
    "BatchEmbeddingFailed",
    "BatchJob",
    "BatchReport",
    "Block",
    "BudgetExceeded",
    "Config",
    "ConfigurationError",
    "CostBudgetExceeded",
    "EmbeddingClient",
    "EmbeddingError",
    "EmbeddingResult",
    "EmbeddingStream",
    "InputNotReady",
    "InputRejected",
    "InputTooLong",
    "InvalidResponse",
    "ModelNotFound",
    "OutcomeUnknown",
    "PermanentProviderError",
    "PermissionDenied",
    "Plan",
    "PluginError",
    "ProviderError",
    "ProviderUnavailable",
    "QuotaExhausted",
    "RateLimited",
    "RemoteGone",
    "RemoteJob",
    "ReplyMismatch",
    "RequestRejected",
    "RequestTooLarge",
    "RowOutcome",
    "Spending",
    "StoppedAt",
    "StorageBusy",
    "StorageCorrupt",
    "StorageError",
    "StorageFull",
    "StorageReadOnly",
    "StorageTooNew",
    "TextCut",
    "TimedOut",
    "TokenBudgetExceeded",
    "TokenTracker",
    "TransientProviderError",
    "UnknownProvider",
    "UnsafeStorage",
    "batch_embed_texts",
    "check_daily_limit",
    "embed_texts",
    "estimate_tokens",
    "record_usage",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("embedcore")
    if name not in _HOMES:
        raise AttributeError(f"module 'embedcore' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
