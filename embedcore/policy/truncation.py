"""What of a text fits the model? The longest prefix that does, and what was cut off."""

from __future__ import annotations

from dataclasses import dataclass

from embedcore.provider.protocol import Tokenizer
from embedcore.provider.tokens import utf8_length

# Counting ten megabytes exactly, only to say how much of them was thrown away, is not worth it.
_COUNTED_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A shortened text: ``kept`` is sent, ``tokens_cut`` tokens of its end are not."""

    kept: str
    tokens: int
    tokens_cut: int


def cut_overlong(
    text: str, size: int, limit: int | None, tokenizer: Tokenizer, *, tokens_per_byte: int = 1
) -> Cut | None:
    """The longest prefix of whole characters within ``limit`` tokens; None if the text fits.

    ``size`` is the text's UTF-8 bytes, which bound its tokens, so that most never meet the
    tokenizer. For a text of more than a megabyte ``tokens_cut`` is extrapolated from them.
    """
    if limit is None or size * tokens_per_byte <= limit:
        return None
    head, whole = _counted_part(text, size)
    tokens = tokenizer.count([head])[0]
    if whole and tokens <= limit:
        return None
    kept = tokenizer.prefix(text, limit)
    if len(kept) == len(text):
        return None
    kept_tokens = tokenizer.count([kept])[0] if kept else 0
    total = tokens if whole else round(tokens * size / max(utf8_length(head), 1))
    return Cut(kept=kept, tokens=kept_tokens, tokens_cut=max(total - kept_tokens, 1))


def _counted_part(text: str, size: int) -> tuple[str, bool]:
    if size <= _COUNTED_BYTES:
        return text, True
    return text[: _COUNTED_BYTES * len(text) // size], False
