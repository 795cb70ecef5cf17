"""Builds what a client runs on: embedder, engine, ledger, cache and observers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, SecretStr, ValidationError

from embedcore.choice import Choice
from embedcore.config import CONFIG_VARIABLE, Config, state_folder
from embedcore.errors import ConfigurationError, EmbeddingError, StorageReadOnly, UnsafeStorage
from embedcore.events import Observer, Progress
from embedcore.facts import Described, laid_over
from embedcore.folders import expanded
from embedcore.observers import observed_by, with_progress
from embedcore.policy.budget import Account
from embedcore.policy.cache import VectorCache
from embedcore.policy.engine import Engine
from embedcore.policy.immediate.front import Front
from embedcore.policy.immediate.recipe import check_on_budget, check_on_error, embed_now
from embedcore.policy.planning import sizes_for
from embedcore.policy.ratelimit.pace import Rates
from embedcore.policy.ratelimit.queue import gate_for
from embedcore.policy.retry import RetryQuota
from embedcore.policy.threads import Pool
from embedcore.provider import registry
from embedcore.provider.called_keys import Called, called, called_in
from embedcore.provider.options import (
    ADDRESS,
    ResolvedOptions,
    embedder_fingerprint,
    former_fingerprints,
    options_fingerprint,
)
from embedcore.storage.database import SPENDING, Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.rates import RateShare, share_for

if TYPE_CHECKING:
    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.result import EmbeddingResult
    from embedcore.provider.hookspecs import Provider
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import ModelInfo
    from embedcore.settings import Settings
    from embedcore.storage.amounts import Limit
    from embedcore.storage.vectors import VectorStore

STATE_FILE: Final = "state.db"
VECTORS_FOLDER: Final = "vectors"
BATCHES_FOLDER: Final = "batches"

logger = logging.getLogger("embedcore")


def checked_options(choice: Choice, provider: Provider) -> BaseModel | None:
    """The validated options; None while a ``"$NAME"`` reference leads nowhere yet."""
    resolved = choice.resolve(provider)
    if resolved.missing:
        return None
    return _valid_options(provider, resolved)


def create_embedder(choice: Choice) -> tuple[Embedder, tuple[str, ...], _Secrets, str]:
    """The embedder, its fingerprint and those of earlier versions, the secrets that must never be
    shown, and why it may have no key."""
    provider = registry.load(choice.provider)
    resolved = choice.resolve(provider)
    if resolved.missing:
        name, variable = next(iter(resolved.missing.items()))
        raise ConfigurationError(
            f"{name} of provider {choice.provider!r} is ${variable} "
            f"({resolved.origins[name]}), and that variable is not set: export {variable}=…"
        )
    options = _valid_options(provider, resolved)
    try:
        embedder = registry.build(provider, choice.model, options)
    except ConfigurationError as error:
        error.message += _why_no_key(resolved)
        error.args = (error.message,)
        raise
    laid = laid_over(embedder, choice, provider, resolved, options)
    described = (choice.provider, choice.model, options, laid.info, laid.of_vectors)
    names = (options_fingerprint(*described), *former_fingerprints(*described))
    functions = list(called_in(options))
    if functions or (laid.info, laid.tokenizer) != (embedder.info, embedder.tokenizer):
        embedder = Described(embedder, laid, asks_for_keys=bool(functions))
    return embedder, names, _secrets(options), _why_no_key(resolved)


def _valid_options(provider: Provider, resolved: ResolvedOptions) -> BaseModel:
    try:
        return provider.options.model_validate(called(provider.options, resolved.values))
    except ValidationError as error:
        sources = ", ".join(sorted(set(resolved.origins.values())))
        where = f"options of provider {provider.name!r} ({sources})"
        message = registry.explain_validation(error, where, provider.options)
        message += _why_no_key(resolved)
    # Outside of the handler: the original error quotes values, and one may be a key.
    raise ConfigurationError(message)


def _why_no_key(resolved: ResolvedOptions) -> str:
    """A sentence for the message of an error that is about a key; empty if none was withheld."""
    if not resolved.withheld:
        return ""
    variables = " and ".join(resolved.withheld.values())
    file = resolved.origins[ADDRESS]
    return (
        f". {variables} is set and was not sent: {ADDRESS} is from {file}, which was found and not "
        f"named. embedcore trust FILE or {CONFIG_VARIABLE}=FILE allows it"
    )


@dataclass(kw_only=True, slots=True)
class Running:
    """What a client holds open. ``context``: once there was a batch."""

    choice: Choice
    engine: Engine
    ledger: Ledger | None = None
    context: BatchContext | None = None
    front: Front = field(init=False)

    def __post_init__(self) -> None:
        self.front = Front(self.engine)

    def open(self) -> None:
        if self.engine.cache is not None:
            self.engine.cache.store.database.open()
        self.engine.tokenizer.count(["a"])
        self.engine.connect()

    def for_call(
        self,
        *,
        progress: bool | Callable[[Progress], None] = False,
        cache: bool = True,
        whole: bool = False,
    ) -> Engine:
        """The engine for one call that shows its progress, or does without the cache.

        ``whole``: what is returned has no place to say that a row failed, so that none may,
        whatever the settings.
        """
        engine = self.engine
        if whole and engine.keep_empty:
            engine = replace(engine, keep_empty=False)
        if not cache:
            engine = replace(engine, cache=None)
        if progress:
            engine = replace(engine, observe=with_progress(engine.observe, progress))
        return engine

    def embed(
        self,
        texts: Iterable[str],
        *,
        progress: bool | Callable[[Progress], None] = False,
        cache: bool = True,
        whole: bool = False,
        **how: Any,
    ) -> EmbeddingResult:
        """As ``embed_now``; calls of few texts by way of the front."""
        engine = self.for_call(progress=progress, cache=cache, whole=whole)
        if not progress and self.front.takes(texts, how):
            return self.front.embed(engine, list(texts), **how)
        return embed_now(engine, texts, **how)

    def aembed(
        self,
        texts: Iterable[str],
        *,
        progress: bool | Callable[[Progress], None] = False,
        cache: bool = True,
        whole: bool = False,
        **how: Any,
    ) -> Coroutine[Any, Any, EmbeddingResult] | None:
        """The same to be awaited, without a thread that waits; None: it takes one."""
        check_on_error(how.get("on_error", "raise"))
        check_on_budget(how.get("on_budget", "raise"))
        if progress or not self.front.takes(texts, how):
            return None
        engine = self.for_call(cache=cache, whole=whole)
        return self.front.aembed(engine, list(texts), **how)

    def offers_batches(self) -> bool:
        """Whether new ones may be submitted."""
        strategy = self.engine.embedder.batch
        return strategy is not None and strategy.limits.offered

    def batch_context(self) -> BatchContext | None:
        """What its batches need; None where the provider has no batch strategy."""
        if self.context is None:
            self.context = _batch_context(self.choice, self.engine)
        return self.context

    def close(self) -> None:
        self.front.close()
        self.engine.pool.close()
        self.engine.embedder.close()
        if self.engine.cache is not None:
            self.engine.cache.store.close()
        if self.context is not None:
            self.context.store.close()
        if self.engine.share is not None:
            # Nothing in that file is missed.
            with contextlib.suppress(EmbeddingError):
                self.engine.share.close()
        if self.ledger is not None:
            self.ledger.end()


def build(choice: Choice, embedder: Embedder | None, observers: Sequence[Observer]) -> Running:
    """Everything a recipe needs."""
    secrets, by_hand, no_key = _Secrets(), embedder is not None, ""
    if embedder is None:
        embedder, names, secrets, no_key = create_embedder(choice)
        if no_key:
            logger.info("%s", no_key.removeprefix(". "))
    else:
        names = (embedder_fingerprint(embedder),)
    info, settings, (limits, wait) = embedder.info, choice.settings, choice.budget
    observe = observed_by(observers)
    ledger = None if info.local else open_ledger(choice.config, limits)
    concurrency = settings.concurrency or info.max_concurrency
    engine = Engine(
        embedder=embedder,
        account=Account(
            ledger=ledger,
            scope=choice.scope,
            limits=limits,
            wait=wait,
            provider=info.provider,
            model=info.model,
        ),
        pool=Pool(max(min(concurrency, info.max_concurrency), 1)),
        gate=gate_for(info.endpoint or info.provider, info.model, info.account),
        share=_share(choice.config, ledger),
        rates=Rates(
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            texts_per_minute=settings.texts_per_minute or info.texts_per_minute,
        ),
        quota=RetryQuota(settings.retry.quota, settings.retry.quota_ratio),
        sizes=sizes_for(info.endpoint or info.provider, info.model),
        cache=(
            VectorCache(vector_store(choice.config, settings), observe=observe)
            if keeps_vectors(settings, info)
            else None
        ),
        retry=settings.retry,
        overlong=settings.overlong,
        keep_empty=settings.on_empty == "keep",
        reject_zero=settings.on_zero == "reject",
        label=f"{info.provider}:{info.model}",
        fingerprint=names[0],
        former=names[1:],
        secrets=secrets,
        no_key=no_key,
        observe=observe,
        lends_room=not by_hand,
    )
    return Running(choice=choice, engine=engine, ledger=ledger)


def keeps_vectors(settings: Settings, info: ModelInfo) -> bool:
    """Whether vectors are cached: as the settings say, else if they cost money."""
    if settings.cache is not None:
        return settings.cache
    return not info.local and info.price is not None and not info.price.free


def vector_store(config: Config, settings: Settings) -> VectorStore:
    """The cache that the settings name, whether or not anything is to be kept in it."""
    from embedcore.storage.vectors import VectorStore

    folder = settings.cache_dir
    return VectorStore(
        (expanded(folder) if folder else state_folder(config)) / VECTORS_FOLDER,
        cap=int(settings.cache_cap),
        allow_network_filesystem=config.allow_network_filesystem,
    )


def _batch_context(choice: Choice, engine: Engine) -> BatchContext | None:
    from embedcore.policy.batch.context import BatchContext

    strategy = engine.embedder.batch
    if strategy is None:
        return None
    config, settings = choice.config, choice.settings
    return BatchContext(
        engine=engine,
        strategy=strategy,
        # Vectors of a batch are kept whatever the settings say: the provider's copy is deleted.
        store=vector_store(config, settings) if engine.cache is None else engine.cache.store,
        folder=state_folder(config) / BATCHES_FOLDER,
        asked_as=f"{choice.provider}:{choice.model}",
        settings=settings.batch,
        default_strategy=settings.strategy,
        default_deadline=settings.deadline,
        allow_network_filesystem=config.allow_network_filesystem,
    )


def _share(config: Config, ledger: Ledger | None) -> RateShare | None:
    """What the processes of this state folder share of a rate; None: each is by itself."""
    # On another machine there is another clock.
    if ledger is None or ledger.database.path is None or config.allow_network_filesystem:
        return None
    return share_for(ledger.database.path.parent)


def open_ledger(config: Config, limits: Sequence[Limit], *, compare: bool = True) -> Ledger:
    """The ledger of this state folder.

    Where it cannot be kept safely and there is no limit to keep, the ledger is in memory.
    ``compare=False``: also if its counters do not agree with its entries, to find out why.
    """
    # Loads sqlite-utils: a client that is only built needs none of it.
    from embedcore.storage.schema import STATE

    path = state_folder(config) / STATE_FILE
    database = Database(
        path,
        STATE,
        allow_network_filesystem=config.allow_network_filesystem,
        contents=SPENDING if compare else SPENDING._replace(differs=None),
    )
    try:
        database.open()
    except (StorageReadOnly, UnsafeStorage) as error:
        # The others can be mended by the person who runs the program, and would be a gap in the
        # ledger.
        if limits or getattr(error, "reason", "network") != "network":
            raise
        logger.warning("usage is not recorded: %s", error)
        database = Database(None, STATE)
    return Ledger(database, zone=config.timezone)


class _Secrets:
    """Keys to look for in what is shown; not shown themselves, not even among local variables."""

    __slots__ = ("_functions", "_values")

    def __init__(self, values: Iterable[str] = (), functions: Iterable[Called] = ()) -> None:
        self._values = tuple(values)
        self._functions = tuple(functions)

    def __iter__(self) -> Iterator[str]:
        yield from self._values
        for function in self._functions:
            # Other threads may ask for a key meanwhile.
            yield from tuple(function.given)

    def __len__(self) -> int:
        # Not tuple(self), which asks for the length first.
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<{len(self)} secrets>"


def _secrets(options: BaseModel) -> _Secrets:
    values = [getattr(options, name) for name in type(options).model_fields]
    tables = [value.values() for value in values if isinstance(value, Mapping)]
    functions = tuple(called_in(options))
    plain = (
        value.get_secret_value()
        for value in chain(values, *tables)
        # One that is a function is not asked before there is a request.
        if isinstance(value, SecretStr) and not isinstance(value, Called)
    )
    return _Secrets(filter(None, plain), functions)
