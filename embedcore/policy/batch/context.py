"""What all batches of one client share: strategy, state file, cache and settings.

``BatchContext`` is to the recipe for "within a day" what ``Engine`` is to that for "now".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from embedcore.errors import ConfigurationError, EmbeddingError, TransientProviderError
from embedcore.forksafe import cached
from embedcore.policy.engine import Engine
from embedcore.policy.immediate.reuse import former_keys_of, keys_of, vector_width
from embedcore.settings import DEFAULTS, BatchSettings, Strategy
from embedcore.storage.batches import BatchAccount, Batches, BatchRecord
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.cutting import Cut, Cutter
from embedcore.storage.keys import Keys, Origin
from embedcore.storage.manifest import Manifest, Shortened
from embedcore.storage.part_money import PartMoney, Room
from embedcore.storage.parts import Parts, Queue

if TYPE_CHECKING:
    from embedcore.events import Event
    from embedcore.provider.protocol import BatchStrategy
    from embedcore.provider.types import ModelInfo, Vectors
    from embedcore.storage.manifest import Sent
    from embedcore.storage.vectors import VectorStore


_ITEMS_PER_PART: Final = 50_000
_FIRST_BACKOFF: Final = 2.0
_LONGEST_BACKOFF: Final = 300.0
DAY_SECONDS: Final = 86_400.0


@dataclass(frozen=True, kw_only=True)
class BatchContext:
    """Shared by the threads of one client. ``folder``: where the files of batches are.

    ``default_strategy``, ``default_deadline``: of a submission that names none.
    """

    engine: Engine
    strategy: BatchStrategy
    store: VectorStore
    folder: Path
    asked_as: str
    settings: BatchSettings = DEFAULTS.batch
    default_strategy: Strategy = DEFAULTS.strategy
    default_deadline: float | None = None
    allow_network_filesystem: bool = False
    jitter: Callable[[float, float], float] = random.uniform

    @cached
    def batches(self) -> Batches:
        ledger = self.engine.account.ledger
        if ledger is None or ledger.database.path is None:
            raise ConfigurationError(
                "a batch outlives this process and needs a state file: set EMBEDCORE_HOME to a "
                "folder on this machine that can be written"
            )
        return Batches(ledger)

    @cached
    def jobs(self) -> Parts:
        return Parts(self.batches.ledger)

    @cached
    def pool(self) -> BatchAccount:
        info = self.engine.info
        return self.batches.pool(
            scope=self.engine.account.scope,
            model=self.engine.label,
            fingerprint=self.engine.fingerprint,
            endpoint=info.endpoint,
            account=info.account,
        )

    @cached
    def steps(self) -> PartMoney:
        return PartMoney(self.jobs, self.pool, self.engine.account.limits)

    @cached
    def cutter(self) -> Cutter:
        account = self.engine.account
        return Cutter(
            self.batches.ledger,
            self.pool,
            account.limits,
            on_held=lambda amount: self.tell(account.held(amount)),
            exact=self.engine.tokenizer.exact,
        )

    def manifest(self, batch: BatchRecord) -> Manifest:
        """The file of a batch; the caller closes it."""
        return self.manifest_at(self.folder / f"{batch.name}.db")

    def manifest_at(self, path: Path) -> Manifest:
        """The same of the batch whose file that is."""
        return Manifest(path, allow_network_filesystem=self.allow_network_filesystem)

    def note_cuts(self, pool: int, sent: Iterable[tuple[bytes, Sent]]) -> None:
        """Tell every batch that wishes for these texts under which key their vector is. Harmless to
        repeat, and done before a text counts as stored."""
        for key, one in sent:
            for identity in self.jobs.batches_of(pool, key):
                batch = self.batches.numbered(identity)
                if batch is None:
                    continue
                characters = one.characters_cut if one.tokens_cut is None else None
                manifest = self.manifest(batch)
                if not manifest.path.exists():
                    continue
                try:
                    manifest.shorten(key, Shortened(one.key, one.tokens_cut, characters))
                finally:
                    manifest.close()

    def keys(self, input_type: str | None) -> Keys:
        return keys_of(self.engine, input_type)

    def keep(self, keys: Sequence[bytes], vectors: Vectors, origin: Origin, until: float) -> None:
        """Put what came for a batch where it is counted on until then, in seconds since 1970."""
        self.store.put(
            keys,
            vectors,
            origin,
            keep_until=until,
            zeros=True,
            to_stay=self.engine.cache is not None,
        )

    def stored(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these keys have a sound vector; a damaged one is deleted, to be sent again."""
        looked = self.store.look(keys, vector_width(self.engine))
        self.store.delete(looked.damaged)
        return {keys[place] for place in looked.there}

    def take_former(
        self, texts: Sequence[str], keys: Sequence[bytes], input_type: str | None
    ) -> None:
        """Copy what an earlier version kept under other keys: results are read by these."""
        engine = self.engine
        origin = Origin(model=engine.label, fingerprint=engine.fingerprint, input_type=input_type)

        def take(places: Sequence[int], vectors: Vectors) -> None:
            self.store.put([keys[place] for place in places], vectors, origin)

        for former in former_keys_of(engine, input_type):
            self.store.get(former.of(texts), vector_width(engine), take)

    @property
    def most_items(self) -> int:
        """How many texts a part may have."""
        return min(
            self.strategy.limits.max_items or _ITEMS_PER_PART,
            self.settings.part_texts or _ITEMS_PER_PART,
            _ITEMS_PER_PART,
        )

    def cut(self, now: int) -> Cut:
        """How large a part may be at that time."""
        limits, price = self.strategy.limits, self.engine.info.price
        rate = None
        if price is not None:
            rate = price.immediate if price.batch is None else price.batch
        return Cut(
            items=self.most_items,
            in_bytes=limits.max_bytes,
            tokens=self.room(self.jobs.queue(self.pool, now)).tokens,
            overhead=self.engine.info.overhead_tokens_per_text,
            price=rate,
            scale=self.engine.learned.scale,
        )

    def room(self, queue: Queue) -> Room:
        """How much may be in flight now: as many tokens as the account may have enqueued, as far as
        that is known."""
        known = (
            self.settings.enqueued_tokens,
            self.strategy.limits.max_enqueued_tokens,
            queue.limit,
        )
        return Room(
            parts=self.settings.parts,
            tokens=min([one for one in known if one is not None], default=None),
        )

    def tell(self, *events: Event) -> None:
        for event in events:
            self.engine.observe(event)

    def keep_until(self, now: int) -> float:
        """Until when vectors are pinned from then on, in seconds since 1970."""
        return now / MICROSECONDS + self.settings.keep_days * DAY_SECONDS

    def later(self, seconds: float) -> int:
        """A time of the ledger's clock, so many seconds from now."""
        return self.jobs.now() + round(seconds * MICROSECONDS)

    def next_look(self, since: int, end: int) -> int:
        """When to look again for what has been missing since then: at once, and then as long after
        as was waited already, but never less often than ``look_again`` and at the ``end``."""
        now = self.jobs.now()
        wait = min(now - since, round(self.settings.look_again * MICROSECONDS))
        return min(now + wait, max(end, now))

    def backoff(self, tries: int, error: EmbeddingError | None = None) -> int:
        """When to try again after so many errors in a row: doubled each time, and spread."""
        seconds = min(_FIRST_BACKOFF * 2 ** min(tries, 10), _LONGEST_BACKOFF)
        seconds *= self.jitter(0.5, 1.0)
        return max(self.later(seconds), self.not_before(error))

    def not_before(self, error: EmbeddingError | None) -> int:
        """Until when the provider asked, with this error, to be left alone; 0: it did not."""
        if not isinstance(error, TransientProviderError) or not error.retry_after:
            return 0
        return self.later(min(error.retry_after, _LONGEST_BACKOFF))


def contexts_of(context: BatchContext) -> list[BatchContext]:
    """This one, and those for what was submitted under an earlier fingerprint."""
    return [context, *(_renamed(context, former) for former in context.engine.former)]


def batches_of(context: BatchContext, *, ended: bool) -> list[BatchRecord]:
    """The batches of ``contexts_of``, or only those that are still open."""
    return [
        record
        for one in contexts_of(context)
        for record in one.batches.all(one.pool)
        if ended or not record.has_ended
    ]


def context_of(context: BatchContext, record: BatchRecord) -> BatchContext:
    """The one of ``contexts_of`` that goes on with a batch."""
    if not context.engine.former:
        return context
    name = context.batches.pool_of(record).fingerprint
    return _renamed(context, name) if name in context.engine.former else context


def batch_named(context: BatchContext, name: str) -> BatchRecord:
    """The batch of that id. Raises ``ConfigurationError`` if there is none, or if it was made with
    another model, scope, option or account."""
    record = context.batches.named(name)
    if record is None:
        raise ConfigurationError(
            f"there is no batch {name!r} in this state folder: embedcore batch list shows them"
        )
    pool = context.batches.pool_of(record)
    mine = context_of(context, record).pool
    for field_name in ("model", "scope", "endpoint", "account", "fingerprint"):
        theirs, ours = getattr(pool, field_name), getattr(mine, field_name)
        if theirs != ours:
            what = "options" if field_name == "fingerprint" else field_name
            raise ConfigurationError(
                f"batch {name} was submitted with {what} {theirs!r}, and this client has "
                f"{ours!r}: make a client like the one that submitted it"
            )
    return record


def no_strategy(engine: Engine, instead: str = ": use embed or embed_iter") -> str:
    """That a model has no batches, what is done or to be done ``instead``, and its price."""
    return f"{engine.label} has no batches here{instead}. {_prices(engine.info)}"


def _renamed(context: BatchContext, fingerprint: str) -> BatchContext:
    return replace(context, engine=replace(context.engine, fingerprint=fingerprint))


def _prices(info: ModelInfo) -> str:
    price = info.price
    if price is None:
        return "Its price is not known"
    if price.free:
        return "It costs nothing"
    batch = "" if price.batch is None else f", and ${price.batch} in batches"
    return f"It costs ${price.immediate} per million tokens{batch}"
