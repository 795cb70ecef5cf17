"""The reader of replies is the core's: ``embedcore.provider.replies``."""

from embedcore.provider.error_bodies import tokens_in
from embedcore.provider.replies import (
    NUMBERS,
    BadReply,
    name_in,
    refuse_constant,
    row_of,
    strings_in,
    without_repetition,
)

__all__ = [
    "NUMBERS",
    "BadReply",
    "name_in",
    "refuse_constant",
    "row_of",
    "strings_in",
    "tokens_in",
    "without_repetition",
]
