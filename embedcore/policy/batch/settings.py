"""Settings of batches, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSettings:
    """See ``embedcore.config.Batch``, whose plain form this is. Times in seconds."""

    parts: int = 8
    part_texts: int | None = None
    enqueued_tokens: int | None = None
    attempts: int = 3
    grace: float = 600.0
    look_again: float = 60.0
    watch: float = 90_000.0
    output_wait: float = 600.0
    input_wait: float = 600.0
    keep_days: float = 30.0
    small_texts: int = 2048
    worth: float = 0.01
    quickest: float = 3600.0
    drain_before: float = 1800.0
