"""Which texts go together into one request, and what may that request cost at most?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedcore.provider.types import ModelInfo, Price
from embedcore.storage.amounts import Amount


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    """Indices of texts that are sent together, and what is held for them."""

    indices: tuple[int, ...]
    amount: Amount

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What planning knows of each text: UTF-8 bytes, and tokens or a bound of them."""

    in_bytes: Sequence[int]
    tokens: Sequence[int]
    exact: bool

    def amount(self, indices: Sequence[int], info: ModelInfo, scale: float = 1.0) -> Amount:
        """What these texts can cost in one request."""
        tokens = sum(self.tokens[index] for index in indices)
        return priced(tokens + info.overhead_tokens_per_text * len(indices), info.price, scale)


def priced(tokens: int, price: Price | None, scale: float = 1.0) -> Amount:
    """Tokens with their price. ``scale`` above 1: the provider was seen to bill more than said."""
    tokens = tokens if scale == 1.0 else int(-(-tokens * scale // 1))
    return Amount(tokens=tokens, cost=price.picodollars(tokens) if price is not None else 0)


def plan_requests(
    indices: Sequence[int],
    sizes: Sizes,
    info: ModelInfo,
    *,
    max_texts: int | None = None,
    scale: float = 1.0,
) -> list[PlannedRequest]:
    """Pack texts in order into as few requests as the model's limits allow.

    Nothing is lost and nothing reordered; a text that is over a limit by itself goes alone.
    ``max_texts``: a smaller number than the model's, learned from a refusal.
    """
    return [
        PlannedRequest(indices=tuple(group), amount=sizes.amount(group, info, scale))
        for group in _groups(indices, sizes, info, max_texts)
    ]


def _groups(
    indices: Sequence[int], sizes: Sizes, info: ModelInfo, max_texts: int | None
) -> Iterator[list[int]]:
    most = min(info.max_texts_per_request, max_texts or info.max_texts_per_request)
    group: list[int] = []
    tokens = total_bytes = 0
    for index in indices:
        more_tokens = sizes.tokens[index] + info.overhead_tokens_per_text
        more_bytes = sizes.in_bytes[index]
        full = len(group) >= most or not _fits(tokens + more_tokens, total_bytes + more_bytes, info)
        if group and full:
            yield group
            group, tokens, total_bytes = [], 0, 0
        group.append(index)
        tokens += more_tokens
        total_bytes += more_bytes
    if group:
        yield group


def _fits(tokens: int, total_bytes: int, info: ModelInfo) -> bool:
    if info.max_bytes_per_request is not None and total_bytes > info.max_bytes_per_request:
        return False
    if info.max_tokens_per_request is None:
        return True
    per_token = info.request_bytes_per_token
    gauged = -(-total_bytes // per_token) if per_token else 0
    return max(tokens, gauged) <= info.max_tokens_per_request
