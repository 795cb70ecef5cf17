"""The words that servers have for the state of a batch job.

One table for all providers: case, spaces, hyphens and underscores make no difference,
and the prefixes of Google's and Cohere's enumerations are taken off.
"""

from __future__ import annotations

import re
from typing import Final

from embedcore.provider.types import BatchState

_NO_LETTER: Final = re.compile(r"[\W_]+")
_PREFIX: Final = re.compile(r"^(?:batch|job)(?:state|status)")

_ENDED: Final[dict[str, BatchState]] = {
    "completed": "completed",
    "complete": "completed",
    "succeeded": "completed",
    "success": "completed",
    "successful": "completed",
    # Some of its lines failed: so they do in a job that is called completed.
    "partiallycompleted": "completed",
    "partiallysucceeded": "completed",
    "failed": "failed",
    "failure": "failed",
    "expired": "expired",
    "timeoutexceeded": "expired",
    "cancelled": "cancelled",
    "canceled": "cancelled",
}
# Words for what has not ended. Any further one means "running" as well, and is worth a warning.
_AT_WORK: Final = frozenset(
    {
        "validating",
        "inprogress",
        "finalizing",
        "cancelling",
        "submitted",
        "queued",
        "pending",
        "scheduled",
        "running",
        "processing",
        "unspecified",
    }
)


def batch_state(word: str) -> BatchState:
    """What a server's word for the state of a job means; any that is not known means "running"."""
    return _ENDED.get(_folded(word), "running")


def is_known(word: str) -> bool:
    """Whether the word needs no guess."""
    return _folded(word) in _ENDED.keys() | _AT_WORK or is_stopping(word)


def is_stopping(word: str) -> bool:
    """Whether the word says that the job was told to stop, and has not ended yet."""
    return batch_state(word) == "running" and "cancel" in _folded(word)


def _folded(word: str) -> str:
    letters = _NO_LETTER.sub("", word.casefold())
    return _PREFIX.sub("", letters)
