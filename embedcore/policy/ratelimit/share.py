"""What one process has of a rate that it shares with the others of its state folder.

While no other process sends there, its own limiter decides, and only tells and looks ten times a
second. With others every request has a turn, which is reserved beforehand in blocks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from embedcore.errors import EmbeddingError, StorageBusy, StorageCorrupt
from embedcore.policy.ratelimit.pace import Rates
from embedcore.storage.rate_buckets import REQUESTS, TOKENS, Amounts, RateBucket, Remaining
from embedcore.storage.rates import Key, News, Slot, Wanted

if TYPE_CHECKING:
    from embedcore.policy.ratelimit.bucket import Bucket
    from embedcore.provider.types import RateLimits
    from embedcore.storage.rates import RateShare, Standing

_Found = TypeVar("_Found")

LOOK: Final = 0.1
_LOOK_AMONG_OTHERS: Final = 0.5
_JOINING: Final = 0.2
# A block is what all processes together may send in that time, divided among them.
_BLOCK_SECONDS: Final = 0.25
# A turn that was not taken by then, as the process stood still, is lost.
_TURN_SECONDS: Final = 0.5
_NOT_YET: Final = 0.02
_OFF_SECONDS: Final = 60.0
_BUSY_SECONDS: Final = 5.0

logger = logging.getLogger("embedcore")


@dataclass(kw_only=True, slots=True, eq=False)
class Permit:
    """One request that waits for its turn (``left`` is None), or that left at that time.

    ``part``: where its process shares a rate with others; ``slot``: the turn that it took there.
    """

    tokens: int
    texts: int = 1
    rates: Rates = field(default_factory=Rates)
    left: float | None = None
    in_flight: bool = False
    taken: bool = True
    informed: bool = False
    part: Part | None = None
    slot: Slot | None = None

    @property
    def amounts(self) -> Amounts:
        return Amounts(1, self.tokens, self.texts)


def all_amounts(permits: Iterable[Permit]) -> Amounts:
    """The sum of their amounts. A loop without an object for each: all that wait ask for it, many
    times a second."""
    requests = tokens = texts = 0
    for one in permits:
        requests += 1
        tokens += one.tokens
        texts += one.texts
    return Amounts(requests, tokens, texts)


class Part:
    """The part of one gate in one state folder. Used with that gate's lock only.

    No method raises: without the file the gate is by itself, as if it were alone.
    """

    def __init__(self, share: RateShare, key: Key, buckets: Mapping[str, Bucket]) -> None:
        self._share, self._key, self._buckets = share, key, buckets
        self._looked = self._joined = self._asked = self._off_until = -math.inf
        self._others = 0
        self._is_free = self._was_corrupt = False
        self._news = News()
        self._heard: set[str] = set()
        self._turns: dict[int, tuple[Permit, Slot]] = {}
        self._shared: Mapping[str, RateBucket] = {}
        self.closed_until = -math.inf

    @property
    def is_shared(self) -> bool:
        """Whether others send there as well, so that each request needs a turn."""
        return self._others > 0 and not self._is_free

    def look(self, now: float) -> None:
        """Say what is new, and see what the others said, now and then."""
        since = now - self._looked
        if since >= _JOINING:
            # Others may begin at the same moment: they must see what leaves.
            self._joined = now
        often = 0.0 if now - self._joined < _JOINING else LOOK
        if since >= (_LOOK_AMONG_OTHERS if self._others else often):
            self._step(now)

    def wait(self, now: float, one: Permit, waiting: Iterable[Permit]) -> float:
        """Seconds until the turn of ``one``, of those that wait, the first ones first."""
        if not (self.is_shared or one.rates.kinds) or now < self._off_until:
            return 0.0
        known = self._turns.get(id(one))
        if known is not None and now - known[1].due > _TURN_SECONDS:
            del self._turns[id(one)]
            known = None
        if known is None and now - self._asked >= _NOT_YET:
            self._reserve(now, waiting)
            known = self._turns.get(id(one))
        if known is not None:
            return max(known[1].due - now, 0.0)
        if now < self._off_until or not (self.is_shared or one.rates.kinds):
            return 0.0
        # There is room for another turn once one of ours was taken.
        last = max((slot.due for _, slot in self._turns.values()), default=now)
        return max(last - now, _NOT_YET)

    def left(self, one: Permit) -> None:
        known = self._turns.pop(id(one), None)
        if known is not None:
            one.slot = known[1]
        else:
            self._news.sent = self._news.sent.and_more(one.amounts)

    def gave_up(self, now: float, one: Permit) -> None:
        known = self._turns.pop(id(one), None)
        if known is not None:
            slot = known[1]
            self._safely(now, lambda: self._share.returned(self._key, now, slot, one.amounts))

    def answered(self, now: float, one: Permit, limits: RateLimits | None, more: int) -> None:
        """``more``: tokens that were billed beyond what was thought."""
        self._news.more_tokens += more
        for kind, bucket in self._buckets.items():
            shared = self._shared.get(kind)
            if not bucket.known and shared is not None and shared.named is not None:
                self._forget(now, kind)
        if limits is not None and (limits.limit_requests or limits.limit_tokens):
            self._saw(now, one, limits, is_refused=False)
        elif one.slot is not None and self.is_shared and self._is_unknown:
            self._learn(
                now, self._safely(now, lambda: self._share.answered(self._key, now, one.tokens))
            )

    def refused(
        self, now: float, one: Permit, limits: RateLimits | None, closed_until: float
    ) -> None:
        """Told at once: until then the others shall not try either."""
        self._news.closed_until = max(self._news.closed_until, closed_until)
        if limits is not None:
            self._saw(now, one, limits, is_refused=True)
        self._step(now)

    @property
    def _is_unknown(self) -> bool:
        return all(one.is_trial for one in self._shared.values() if not one.is_set)

    def _forget(self, now: float, kind: str) -> None:
        self._learn(now, self._safely(now, lambda: self._share.forget(self._key, now, kind)))

    def _saw(self, now: float, one: Permit, limits: RateLimits, *, is_refused: bool) -> None:
        """Told with the next step, but at once if it is the first that is known."""
        for kind, limit, remaining in (
            (REQUESTS, limits.limit_requests, limits.remaining_requests),
            (TOKENS, limits.limit_tokens, limits.remaining_tokens),
        ):
            if limit is None or remaining is None or not 0 <= remaining < math.inf:
                continue
            self._heard.add(kind)
            if one.slot is not None and one.left is not None:
                mark, amount = one.slot.requests, 1
                if kind == TOKENS:
                    mark, amount = one.slot.tokens, one.tokens
                self._news.seen[kind] = Remaining(one.left, mark, amount, remaining, is_refused)
        if self._is_unknown:
            self._step(now)

    def _reserve(self, now: float, waiting: Iterable[Permit]) -> None:
        without = [one for one in waiting if one.part is self and id(one) not in self._turns]
        most = self._block(without) - len(self._turns)
        if most <= 0 or not without:
            return
        wanted = without[:most]
        asked = [Wanted(one.tokens, one.rates.kinds, one.texts) for one in wanted]
        news = self._take_news(now)
        found = self._safely(now, lambda: self._share.reserve(self._key, now, asked, news))
        if found is not None:
            slots, standing = found
            self._learn(now, standing)
            if not slots:
                self._asked = now
            for one, slot in zip(wanted, slots, strict=False):
                self._turns[id(one)] = (one, slot)

    def _block(self, wanted: list[Permit]) -> int:
        """How many turns may be reserved at once, so that others have theirs soon as well."""
        most = math.inf
        amounts = all_amounts(wanted)
        for bucket in self._shared.values():
            each = max(amounts.of(bucket.kind) / max(len(wanted), 1), 1.0)
            amount = bucket.size if bucket.is_trial else bucket.rate * _BLOCK_SECONDS
            most = min(most, amount / each / (self._others + 1))
        return max(int(most), 1) if math.isfinite(most) else 1

    def _step(self, now: float) -> None:
        news = self._take_news(now)
        self._learn(now, self._safely(now, lambda: self._share.look(self._key, now, news)))

    def _take_news(self, now: float) -> News:
        news, self._news = self._news, News()
        heard, self._heard = self._heard, set()
        for kind, bucket in self._buckets.items():
            facts = bucket.facts(now)
            # Among others only what was just heard: they may know better what is older.
            if facts is not None and (kind in heard or not self._others):
                reserved = sum(
                    one.tokens if kind == TOKENS else 1 for one, _ in self._turns.values()
                )
                news.facts[kind] = facts._replace(left=facts.left - reserved)
        return news

    def _learn(self, now: float, standing: Standing | None) -> None:
        if standing is None:
            return
        self._looked = now
        self._others, self._shared = standing.others, standing.buckets
        self._is_free, self.closed_until = standing.is_free, standing.closed_until
        for kind, bucket in self._buckets.items():
            shared = standing.buckets[kind]
            if not bucket.known and shared.named is not None:
                bucket.start_from(now, shared.facts(now))

    def _safely(self, now: float, step: Callable[[], _Found]) -> _Found | None:
        """What ``step`` returns; None if it cannot be done, for the next minute."""
        if now < self._off_until:
            return None
        try:
            found = step()
        except (EmbeddingError, OSError, ValueError, ArithmeticError) as error:
            off = _BUSY_SECONDS if isinstance(error, StorageBusy) else _OFF_SECONDS
            self._off_until, self._others, self._shared = now + off, 0, {}
            self._turns.clear()
            self._news = News()
            self.closed_until = -math.inf
            logger.info("each process keeps the rate limit by itself: %s", error)
            if isinstance(error, StorageCorrupt):
                self._mend()
            return None
        self._was_corrupt = False
        return found

    def _mend(self) -> None:
        # The first time another process may just have done it.
        if self._was_corrupt:
            try:
                self._share.mend()
            except (EmbeddingError, OSError) as error:
                logger.info("a damaged file cannot be deleted: %s", error)
        self._was_corrupt = not self._was_corrupt
