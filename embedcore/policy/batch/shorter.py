"""Shortens texts that a job of a batch refused as too long: the next job is sent less of them.

A job may take a day. So what passes is taken, and nothing is sent to see whether more of a text
would have fitted; otherwise what holds for a request holds here as well
(``docs/decisions/0019-cut-by-counts.md``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedcore.errors import EmbeddingError, InputTooLong, RequestRejected
from embedcore.policy.immediate.shortening import Guesses
from embedcore.provider.tokens import utf8_length
from embedcore.provider.types import BatchItem
from embedcore.storage.manifest import Sent
from embedcore.storage.parts import longest_id

if TYPE_CHECKING:
    from embedcore.policy.batch.collect import Found
    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.engine import Engine
    from embedcore.provider.types import BatchOutcome
    from embedcore.storage.parts import Part, Refused


def next_beginning(engine: Engine, sent: str, refusal: BatchOutcome, *, last: bool) -> str | None:
    """What the next job is sent of a text of which ``sent`` was refused; None: nothing shorter
    helps. ``last``: no job comes after that one, so that it is what is most likely to fit."""
    error: EmbeddingError = RequestRejected("")
    if refusal.too_long:
        tokens = refusal.text_tokens or _tokens_in(engine, sent)
        error = InputTooLong("", max_tokens=refusal.max_tokens, tokens=tokens)
    guesses = Guesses(engine, sent)
    beginning = guesses.fitting(error).next()
    if beginning is not None and last:
        beginning = min(beginning, guesses.safest(error), key=len)
    return beginning if beginning and beginning.strip() else None


def _tokens_in(engine: Engine, text: str) -> int:
    """Its count, or what the bills so far let expect."""
    if engine.tokenizer.exact:
        return engine.tokenizer.count([text])[0]
    return round(engine.learned.tokens_in(utf8_length(text)))


class Shortener:
    """Decides which refused texts of a part go into another job, and how much of them."""

    def __init__(self, context: BatchContext) -> None:
        self._context = context
        self._engine = context.engine

    def take(self, part: Part, found: Found) -> dict[int, Sent]:
        """Item → what is sent of it from now on. These count as tried, and no more as failed."""
        shorter: dict[int, Sent] = {}
        if not found.long:
            return shorter
        reasons = dict(found.refused)
        for one in self._context.jobs.refused(part, list(found.long)):
            sent = self._sent(part, one, found.long[one.item])
            if sent is not None:
                shorter[one.item] = sent
                found.retry.append((one.item, one.reason or reasons[one.item]))
            elif one.characters_cut is not None and one.reason:
                # A beginning that must fit was refused as well: it was not the length.
                reasons[one.item] = one.reason
        found.refused = [one for one in reasons.items() if one[0] not in shorter]
        return shorter

    def _sent(self, part: Part, one: Refused, refusal: BatchOutcome) -> Sent | None:
        most = self._context.settings.attempts
        text = self._text(part, one.key) if one.tries + 1 < most else None
        if text is None:
            return None
        before = text[: len(text) - (one.characters_cut or 0)]
        beginning = next_beginning(self._engine, before, refusal, last=one.tries + 2 >= most)
        if beginning is None:
            return None
        tokenizer = self._engine.tokenizer
        whole, tokens = tokenizer.count([text, beginning])
        input_type = part.input_type or None
        item = BatchItem(
            id=longest_id(self._context.most_items), text=beginning, input_type=input_type
        )
        return Sent(
            characters_cut=len(text) - len(beginning),
            key=self._context.keys(input_type).of([beginning])[0],
            tokens=tokens,
            in_bytes=self._context.strategy.sizes([item])[0],
            tokens_cut=whole - tokens if tokenizer.exact else None,
        )

    def _text(self, part: Part, key: bytes) -> str | None:
        for identity in self._context.jobs.batches_of(part.pool, key):
            text = _text_in(self._context, identity, key)
            if text is not None:
                return text
        return None


def _text_in(context: BatchContext, identity: int, key: bytes) -> str | None:
    batch = context.batches.numbered(identity)
    if batch is None:
        return None
    manifest = context.manifest(batch)
    try:
        return manifest.texts([key]).get(key) if manifest.path.exists() else None
    finally:
        manifest.close()
