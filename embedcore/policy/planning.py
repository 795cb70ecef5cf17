"""Which texts go together into one request, and what may that request cost at most?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from embedcore.policy.sizes import Size
from embedcore.provider.types import ModelInfo, Price
from embedcore.storage.amounts import Amount

_ANY: Final = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    """Indices of texts that are sent together, in ascending order, and what is held for them.

    ``scale``: the amount is that many times the counted tokens. ``in_bytes``: of all the texts.
    """

    indices: tuple[int, ...]
    amount: Amount
    in_bytes: int = 0
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def size(self) -> Size:
        return Size(texts=len(self.indices), in_bytes=self.in_bytes)

    def at_scale(self, scale: float, price: Price | None) -> PlannedRequest:
        """The same request, once the provider was seen to bill more than it was planned with."""
        if scale <= self.scale:
            return self
        amount = priced(self.amount.tokens, price, scale / self.scale)
        return replace(self, amount=amount, scale=scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What planning knows of each text: UTF-8 bytes, and tokens or a bound of them."""

    in_bytes: Sequence[int]
    tokens: Sequence[int]

    def request(self, indices: Sequence[int], info: ModelInfo, scale: float) -> PlannedRequest:
        """These texts in one request, with what they can cost."""
        tokens = sum(self.tokens[index] for index in indices)
        tokens += info.overhead_tokens_per_text * len(indices)
        amount = priced(tokens, info.price, scale)
        return PlannedRequest(
            indices=tuple(indices),
            amount=amount,
            in_bytes=sum(self.in_bytes[index] for index in indices),
            scale=scale,
        )


def priced(tokens: int, price: Price | None, scale: float = 1.0) -> Amount:
    """Tokens with their price. ``scale`` above 1: the provider was seen to bill more than said."""
    tokens = tokens if scale == 1.0 else math.ceil(tokens * scale)
    return Amount(tokens=tokens, cost=price.picodollars(tokens) if price is not None else 0)


def plan_requests(
    indices: Sequence[int],
    sizes: Sizes,
    info: ModelInfo,
    *,
    size: Size | None = None,
    scale: float = 1.0,
    texts: int | None = None,
) -> list[PlannedRequest]:
    """Pack texts in order into as few requests as the model's limits allow.

    Nothing is lost and nothing reordered; a text that is over a limit by itself goes alone.
    ``size``: a limit below the model's, learned from what failed. ``texts``: no more in one
    request, by default those that are cheapest.
    """
    most = min(texts or info.best_texts_per_request or _ANY, info.max_texts_per_request)
    # Two equal halves are done sooner than a full request and a small rest.
    requests = max(-(-len(indices) // most), 1)
    most = max(-(-len(indices) // requests), 1)
    groups = _groups(indices, sizes, replace(info, max_texts_per_request=most), size)
    return [sizes.request(group, info, scale) for group in groups]


def _groups(
    indices: Sequence[int], sizes: Sizes, info: ModelInfo, size: Size | None
) -> Iterator[list[int]]:
    group: list[int] = []
    tokens = total_bytes = 0
    for index in indices:
        tokens += sizes.tokens[index] + info.overhead_tokens_per_text
        total_bytes += sizes.in_bytes[index]
        if group and not _fits(len(group) + 1, tokens, total_bytes, info, size):
            yield group
            group = []
            tokens = sizes.tokens[index] + info.overhead_tokens_per_text
            total_bytes = sizes.in_bytes[index]
        group.append(index)
    if group:
        yield group


def _fits(texts: int, tokens: int, total_bytes: int, info: ModelInfo, size: Size | None) -> bool:
    if texts > info.max_texts_per_request:
        return False
    if size is not None and not size.allows(Size(texts=texts, in_bytes=total_bytes)):
        return False
    if info.max_bytes_per_request is not None and total_bytes > info.max_bytes_per_request:
        return False
    if info.max_tokens_per_request is None:
        return True
    per_token = info.request_bytes_per_token
    gauged = -(-total_bytes // per_token) if per_token else 0
    return max(tokens, gauged) <= info.max_tokens_per_request
