"""Requests: which texts go together, how large a request may be, and its price.

The size that a server takes is learned where a request failed and its parts did not.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import eq
from typing import TYPE_CHECKING, Final, TypeVar

from embedcore.errors import EmbeddingError, ProviderError
from embedcore.forksafe import in_child
from embedcore.provider.types import ModelInfo, Price
from embedcore.storage.amounts import Amount

if TYPE_CHECKING:
    from embedcore.provider.protocol import Tokenizer


Answer = TypeVar("Answer")
Item = TypeVar("Item")


class CheckedTokenizer:
    """A ``Tokenizer`` that never lets anything but an ``EmbeddingError`` escape.

    Money is reserved by these counts and texts are cut by these prefixes, so nonsense is an error.
    """

    def __init__(self, inner: Tokenizer, typed: Callable[[Exception], EmbeddingError]) -> None:
        self._inner = inner
        self._typed = typed

    @property
    def exact(self) -> bool:
        return bool(self._inner.exact)

    def count(self, texts: Sequence[str]) -> list[int]:
        counts = self._ask(lambda: list(map(int, self._inner.count(texts))))
        if len(counts) != len(texts) or min(counts, default=0) < 0:
            raise self._nonsense("one count ≥ 0 for each text")
        return counts

    def prefix(self, text: str, max_tokens: int) -> str:
        kept: object = self._ask(lambda: self._inner.prefix(text, max_tokens))
        if not isinstance(kept, str) or not text.startswith(kept):
            raise self._nonsense("a prefix of the text")
        return kept

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except Exception as error:  # noqa: BLE001 - raised again, as one of ours
            failure = self._typed(error)
        # Not inside the handler, where the raw error, a key perhaps in it, would become a context.
        raise failure

    def _nonsense(self, expected: str) -> ProviderError:
        kind = type(self._inner).__name__
        return ProviderError(
            f"the tokenizer {kind} did not return {expected}. Nothing was sent; please report "
            "this to the provider's author",
            billed="no",
        )


# So many requests of about the largest size that is known to pass, and a larger one is tried.
_GROW_AFTER: Final = 8
# Servers change, and what failed once may have failed for another reason.
_FORGET_SECONDS: Final = 600.0
# Between what passes and what fails, nothing is tried that could gain less than a quarter.
_WORTH_TRYING: Final = 1.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A number of texts, and their UTF-8 bytes."""

    texts: int
    in_bytes: int

    def allows(self, other: Size) -> bool:
        """Whether a request is no larger than this, in texts or in bytes.

        Either is enough: whether the server minds the number or the bytes is not known, and two
        long texts that failed say nothing against a thousand short ones.
        """
        return other.texts <= self.texts or other.in_bytes <= self.in_bytes


class RequestSizes:
    """The sizes that one endpoint and model takes. Safe to share between threads.

    Nothing is known until a request has failed and all of its parts have passed. From then on
    requests are no larger than the largest of those parts. After some successes at that size one
    request at a time tries a larger one: halfway to the smallest that failed, or twice the size
    once that is long ago.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._good: Size | None = None
        self._bad: Size | None = None
        self._failed_at = 0.0
        self._at_limit = 0
        self._is_trying = False
        # The largest that passed lately, and when.
        self._proved: tuple[Size, float] | None = None
        self._longest_text: int | None = None

    @property
    def longest_text(self) -> int | None:
        """About how many UTF-8 bytes were taken of the last text that was refused as too long.

        None: no text was, and whether the server refuses such texts, or cuts them, is not known.
        """
        with self._lock:
            return self._longest_text

    @property
    def refuses_long(self) -> bool:
        """Whether the server was seen to refuse a text as too long: then it cuts none unasked."""
        return self.longest_text is not None

    def learn_longest(self, in_bytes: int) -> None:
        """A text was refused, and so much of it was taken."""
        with self._lock:
            self._longest_text = in_bytes

    @property
    def known(self) -> Size | None:
        """The largest size that is known to pass; None: no size ever failed."""
        with self._lock:
            return self._good

    @property
    def wanted(self) -> Size | None:
        """The size to plan new requests with: the one that is known, or that to be tried next."""
        with self._lock:
            return self._next() or self._good

    @contextlib.contextmanager
    def turn(self, size: Size) -> Iterator[bool]:
        """Tells whether a request of that size may leave as it is; it does so inside the block.

        A larger size than the known one is allowed to one request at a time.
        """
        with self._lock:
            is_known = self._good is None or self._good.allows(size)
            trial = None if is_known or self._is_trying else self._next()
            is_trial = trial is not None and trial.allows(size)
            self._is_trying = self._is_trying or is_trial
        try:
            yield is_known or is_trial
        finally:
            if is_trial:
                with self._lock:
                    self._is_trying = False
                    self._at_limit = 0

    def passed(self, size: Size) -> None:
        """A request of that size brought all of its vectors."""
        with self._lock:
            if not self._has_passed(size):
                self._proved = size, self._monotonic()
            good = self._good
            if good is None:
                return
            trial = self._next()
            if not good.allows(size):
                # Beyond the trial it was planned before anything was known.
                self._good = trial if trial is not None and trial.allows(size) else good
            elif 4 * size.texts >= 3 * good.texts or 4 * size.in_bytes >= 3 * good.in_bytes:
                self._at_limit += 1

    def learn(self, failed: Size, passed: Sequence[Size], *, lasting: bool = True) -> None:
        """A request of one size failed, and all the parts of it, of these sizes, passed.

        ``lasting``: it was refused, or took too long. Any other failure for the moment says nothing
        against a size that has passed lately: a server that is down now and then would be sent ever
        smaller requests.
        """
        texts = max(part.texts for part in passed)
        in_bytes = max(part.in_bytes for part in passed)
        with self._lock:
            if not lasting and self._has_passed(failed):
                return
            good, bad = self._good, self._bad
            if good is not None:
                # Only the measure by which it had been allowed was too large.
                texts = texts if failed.texts <= good.texts else good.texts
                in_bytes = in_bytes if failed.in_bytes <= good.in_bytes else good.in_bytes
            self._good = Size(texts=texts, in_bytes=in_bytes)
            self._bad = failed if bad is None or bad.allows(failed) else bad
            self._failed_at = self._monotonic()
            self._at_limit = 0

    def _has_passed(self, size: Size) -> bool:
        """Whether one at least as large, in texts and in bytes, passed lately."""
        if self._proved is None or self._monotonic() - self._proved[1] > _FORGET_SECONDS:
            return False
        most = self._proved[0]
        return size.texts <= most.texts and size.in_bytes <= most.in_bytes

    def _next(self) -> Size | None:
        """The larger size to try; None: it is not time for one, or not worth it."""
        good, bad = self._good, self._bad
        if good is None or self._at_limit < _GROW_AFTER:
            return None
        if bad is None or self._monotonic() - self._failed_at > _FORGET_SECONDS:
            return Size(texts=2 * good.texts, in_bytes=2 * good.in_bytes)
        texts, in_bytes = max(bad.texts, good.texts), max(bad.in_bytes, good.in_bytes)
        if texts <= _WORTH_TRYING * good.texts and in_bytes <= _WORTH_TRYING * good.in_bytes:
            return None
        return Size(texts=(good.texts + texts) // 2, in_bytes=(good.in_bytes + in_bytes) // 2)


@cache
def sizes_for(endpoint: str, model: str) -> RequestSizes:  # noqa: ARG001 - the cache's key
    """What everything in this process shares of one endpoint and model."""
    return RequestSizes()


def refuses_long(info: ModelInfo, sizes: RequestSizes) -> bool:
    """Whether the service is known to refuse a text that is too long, or was seen to: then it cuts
    none unasked."""
    return info.truncation == "error" or sizes.refuses_long


# A child must not inherit a lock that a thread of the parent was holding.
in_child(sizes_for.cache_clear)


_ANY: Final = 2**31
_LARGEST_IN_WAVES: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    """Indices of texts that are sent together, in ascending order, and what is reserved for them.

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
        tokens, in_bytes = self.total(indices, info)
        return PlannedRequest(
            indices=tuple(indices),
            amount=priced(tokens, info.price, scale),
            in_bytes=in_bytes,
            scale=scale,
        )

    def total(self, indices: Sequence[int], info: ModelInfo) -> tuple[int, int]:
        """Tokens and bytes of these texts together."""
        tokens, in_bytes = sum(chosen(self.tokens, indices)), sum(chosen(self.in_bytes, indices))
        return tokens + info.overhead_tokens_per_text * len(indices), in_bytes


def chosen(items: Sequence[Item], indices: Sequence[int]) -> Sequence[Item]:
    """Those with these indices, in the order of the indices."""
    if indices and all(map(eq, indices, range(indices[0], indices[0] + len(indices)))):
        # As nearly always: all of them, or some that are neighbours.
        return items[indices[0] : indices[-1] + 1]
    return [items[index] for index in indices]


def priced(tokens: int, price: Price | None, scale: float = 1.0) -> Amount:
    """Tokens with their price. ``scale`` above 1: the provider was seen to bill more than said."""
    tokens = tokens if scale == 1.0 else math.ceil(tokens * scale)
    return Amount(tokens=tokens, cost=price.picodollars(tokens) if price is not None else 0)


def in_waves(texts: int, best: int, slots: int) -> int:
    """How many texts to put into one request, so that all are done in the fewest waves.

    A wave is one request in each of the ``slots``. ``best``: the size that is cheapest to read;
    none is smaller, but for the texts there are, nor more than three times as large: each wave
    takes the time of a round trip, and what is lost with one request is paid again.
    """
    waves = max(-(-texts // (slots * _LARGEST_IN_WAVES * best)), 1)
    return min(max(-(-texts // (slots * waves)), best), _LARGEST_IN_WAVES * best)


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
) -> Iterator[Sequence[int]]:
    start = 0
    while start < len(indices):
        group = indices[start : start + info.max_texts_per_request]
        # What fits as a whole fits in each of its parts.
        if not fits(len(group), *sizes.total(group, info), info, size):
            group = _beginning(group, sizes, info, size)
        yield group
        start += len(group)


def _beginning(
    indices: Sequence[int], sizes: Sizes, info: ModelInfo, size: Size | None
) -> Sequence[int]:
    """As many of the first ones as fit together, at least one."""
    tokens = total_bytes = 0
    for number, index in enumerate(indices):
        tokens += sizes.tokens[index] + info.overhead_tokens_per_text
        total_bytes += sizes.in_bytes[index]
        if number and not fits(number + 1, tokens, total_bytes, info, size):
            return indices[:number]
    return indices


def fits(texts: int, tokens: int, total_bytes: int, info: ModelInfo, size: Size | None) -> bool:
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
