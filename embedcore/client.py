"""The client for one model and one budget: immediate calls, streams, asyncio and batches."""

from __future__ import annotations

import copy
import logging
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from embedcore import assembly, choice
from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.events import Observer, Progress
from embedcore.forksafe import Lazy
from embedcore.observers import picklable
from embedcore.policy.coroutines import in_thread
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.estimate import Plan, plan_now
from embedcore.policy.immediate.call import OnBudget
from embedcore.policy.immediate.recipe import check_on_budget, check_on_error
from embedcore.policy.result import EmbeddingResult, OnArrival, listed
from embedcore.policy.stream.asyncstream import AsyncEmbeddingStream
from embedcore.policy.stream.pipeline import LoopSignal, OnError, Pipeline, check_stream
from embedcore.policy.stream.rows import RowReader
from embedcore.policy.stream.stream import EmbeddingStream
from embedcore.provider import registry
from embedcore.provider.options import HiddenValues

if TYPE_CHECKING:
    from embedcore.config import Config
    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.batch.job import BatchJob
    from embedcore.policy.batch.submit import Submission
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import ModelInfo
    from embedcore.settings import Strategy
    from embedcore.storage.batches import BatchRecord

logger = logging.getLogger("embedcore")


class EmbeddingClient:
    """Embeds texts with one model, in as many requests as it takes, inside a budget.

    - ``model``: a profile's name, ``provider:model``, or a model of the default provider; default
      ``text-embedding-3-small`` of ``openai``, or what the configuration says.
    - ``api_key``: a key, or a callable that returns one; default: the provider's own environment
      variable.
    - ``embedder``: any object of the ``Embedder`` protocol, used instead of a provider; it is
      closed with the client.
    - ``config``: a ``Config``, a mapping, or the path of a file; default: what ``Config.load()``
      finds.
    - ``scope``: the project whose budget is used.
    - ``options``: options of the provider, over those of the configuration.
    - ``observers``: callables that are told every ``embedcore.events.Event``.

    Building one needs neither a key nor a network. It may be shared between threads, and is usable
    again after ``close()``. ``copy`` and ``deepcopy`` give a client of the same key, embedder and
    observers; it pickles without keys and handles, and with those observers that can be pickled: a
    warning names the others. Cancelling an awaited call sends nothing more of it; what was under
    way is accounted for.
    """

    _warned_of_observers = False
    _warned_of_batch = False

    def __init__(
        self,
        model: str | None = None,
        api_key: choice.Key | None = None,
        *,
        embedder: Embedder | None = None,
        config: Config | Mapping[str, Any] | Path | str | None = None,
        scope: str | None = None,
        options: Mapping[str, Any] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        given = HiddenValues(options or {})
        if isinstance(config, Mapping):
            config = HiddenValues(config)
        if api_key is not None:
            given["api_key"] = api_key
        # What is raised below must not carry a key among the variables of this frame.
        api_key = options = None
        if embedder is not None and (model is not None or given):
            raise ConfigurationError(
                "embedder= is ready to use: model, api_key and options belong to a provider"
            )
        self._choice = choice.choose(model, config=config, scope=scope, options=given)
        self._embedder = embedder
        self._observers = tuple(observers)
        self._opened: Lazy[assembly.Running] = Lazy()
        if embedder is None:
            assembly.checked_options(self._choice, registry.load(self._choice.provider))

    @property
    def model(self) -> str:
        """The model's name, without its provider."""
        return self._choice.model if self._embedder is None else self._embedder.info.model

    @property
    def provider(self) -> str:
        """The provider's name."""
        return self._choice.provider if self._embedder is None else self._embedder.info.provider

    @property
    def scope(self) -> str:
        """The project whose budget is used."""
        return self._choice.scope

    @property
    def info(self) -> ModelInfo:
        """What is known of the model. Needs no network."""
        return self._engine.info

    @property
    def dimensions(self) -> int | None:
        """Width of the vectors; None if only the first reply can tell."""
        return self._engine.info.dimensions

    @property
    def fingerprint(self) -> str:
        """A name for everything that decides the vectors."""
        return self._engine.fingerprint

    def embed_text(self, text: str) -> list[float]:
        """The vector of one text."""
        return listed(self._embed([text], whole=True))[0]

    def embed_texts(
        self,
        texts: Iterable[str],
        check_budget: bool = True,
        *,
        on_budget: OnBudget = "raise",
    ) -> list[list[float]]:
        """The vectors of any number of texts, in their order.

        ``check_budget=False`` keeps no limit, and still records what is spent. ``on_budget`` as for
        ``embed``; with "stop" the list ends where the budget does: what is left to do is
        ``texts[len(vectors):]``. Raises any ``EmbeddingError``, for an empty text too, whatever the
        settings: a list has no place for a row that failed. Its ``.partial`` has what was billed.
        """
        return listed(
            self._embed(texts, check_budget=check_budget, on_budget=on_budget, whole=True)
        )

    def embed_documents(self, texts: Iterable[str]) -> list[list[float]]:
        """As ``embed_texts``, for texts that are to be found."""
        return listed(self._embed(texts, input_type="document", whole=True))

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question. It may use the share of the budget kept for queries."""
        return listed(self._embed([text], input_type="query", whole=True))[0]

    def embed(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        on_budget: OnBudget = "raise",
        progress: bool | Callable[[Progress], None] = False,
        on_arrival: OnArrival | None = None,
        cache: bool = True,
    ) -> EmbeddingResult:
        """Vectors as an array, and what became of every row.

        ``texts``: strings in an order: a list, a column of a table, an array of one dimension, of
        Arrow too, or an iterator. A mapping or a whole table is refused: ``InputRejected`` names
        what to choose from.

        ``on_error="keep"`` notes what is wrong with a row, and transient errors whose attempts
        are used up, instead of raising; everything else is raised in any case.

        ``on_budget``: a call that a limit does not allow as a whole is refused before anything is
        sent. With "stop" as many rows as the limits allow are embedded, in their order:
        ``stopped_at`` of the result names the first that was not done; those rows are not ``ok``,
        and ``errors`` has the limit for each. What is in the cache is done in any case. "wait" goes
        on when the limit's window ends, and raises what no waiting helps.

        ``progress``: shown on the terminal or in the log, or given to a callable. ``on_arrival``
        gets each request's vectors while the others are under way, one ``Arrival`` at a time and in
        another thread: a program that writes them down there loses no finished request to a crash.
        ``cache=False`` pays for everything anew and keeps nothing.
        """
        return self._embed(
            texts,
            input_type=input_type,
            on_error=on_error,
            on_budget=on_budget,
            progress=progress,
            on_arrival=on_arrival,
            cache=cache,
        )

    def plan(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        exact: bool = True,
        cache: bool = True,
        batch: bool = False,
    ) -> Plan:
        """What ``embed`` would send and what that costs. Sends and spends nothing.

        What is in the cache costs nothing: it is looked up and checked, and nothing is changed.
        ``cache=False``: as ``embed`` without it. ``exact=False``: a bound of the tokens is enough.
        ``batch``: what ``submit_batch`` would submit, at the batch price.
        """
        return plan_now(
            self._running.for_call(cache=cache),
            texts,
            input_type=input_type,
            exact=exact,
            context=self._context(new=True) if batch else None,
        )

    def embed_iter(
        self,
        rows: Iterable[Any],
        *,
        text: str | int | None = None,
        key: str | int | None = None,
        input_type: str | None = None,
        on_error: OnError = "raise",
        on_budget: OnBudget = "raise",
        progress: bool | Callable[[Progress], None] = False,
        block_size: int | None = None,
        cache: bool = True,
    ) -> EmbeddingStream:
        """Embed a stream of any length: yields ``Block``s in order, with keys and vectors.

        ``rows``: texts, ``(key, text)`` tuples, or with ``text`` (and ``key``) mappings and
        whatever else can be indexed by them. They are read in the thread that iterates, a few
        blocks ahead and no more; what was read is sent after a second at the latest. Memory stays
        bounded.

        ``on_error``: as for ``embed``. ``on_budget``: what to do when the budget is used up: raise;
        ``"stop"``, after which ``stopped_at`` of the stream names the first row that was not
        embedded; or ``"wait"`` until its window ends. ``block_size``: rows in one block, by default
        what four requests take. An error of the source, or of a row, is raised once everything
        before it was given; what was embedded and not given is in ``salvaged`` of the stream.
        """
        check_stream(on_error, on_budget, block_size)
        reader = RowReader(text=text, key=key)
        source = reader.elements(rows)
        pipeline = Pipeline(
            self._running.for_call(progress=progress, cache=cache),
            input_type=input_type,
            on_error=on_error,
            on_budget=on_budget,
            block_rows=block_size,
            total=len(rows) if isinstance(rows, Sized) else None,
        )
        return EmbeddingStream(pipeline, source, reader, on_error=on_error, on_budget=on_budget)

    def aembed_iter(
        self,
        rows: Iterable[Any] | AsyncIterable[Any],
        *,
        text: str | int | None = None,
        key: str | int | None = None,
        input_type: str | None = None,
        on_error: OnError = "raise",
        on_budget: OnBudget = "raise",
        progress: bool | Callable[[Progress], None] = False,
        block_size: int | None = None,
        cache: bool = True,
    ) -> AsyncEmbeddingStream:
        """``embed_iter`` for ``async for``; ``rows`` may be an asynchronous iterable as well."""
        check_stream(on_error, on_budget, block_size)
        reader = RowReader(text=text, key=key)
        # Before anything is opened, as for ``embed_iter``.
        source = rows if isinstance(rows, AsyncIterable) else reader.elements(rows)
        signal = LoopSignal()
        pipeline = Pipeline(
            self._running.for_call(progress=progress, cache=cache),
            input_type=input_type,
            on_error=on_error,
            on_budget=on_budget,
            block_rows=block_size,
            total=len(rows) if isinstance(rows, Sized) else None,
            signal=signal,
        )
        return AsyncEmbeddingStream(
            pipeline, signal, source, reader, on_error=on_error, on_budget=on_budget
        )

    async def aembed(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        on_budget: OnBudget = "raise",
        progress: bool | Callable[[Progress], None] = False,
        cache: bool = True,
    ) -> EmbeddingResult:
        """``embed`` without blocking the event loop."""
        return await self._aembed(
            texts,
            input_type=input_type,
            on_error=on_error,
            on_budget=on_budget,
            progress=progress,
            cache=cache,
        )

    async def aembed_text(self, text: str) -> list[float]:
        """``embed_text`` without blocking the event loop."""
        return (await self._alisted([text]))[0]

    async def aembed_texts(
        self,
        texts: Iterable[str],
        check_budget: bool = True,
        *,
        on_budget: OnBudget = "raise",
    ) -> list[list[float]]:
        """``embed_texts`` without blocking the event loop."""
        return await self._alisted(texts, check_budget=check_budget, on_budget=on_budget)

    async def aembed_documents(self, texts: Iterable[str]) -> list[list[float]]:
        """``embed_documents`` without blocking the event loop."""
        return await self._alisted(texts, input_type="document")

    async def aembed_query(self, text: str) -> list[float]:
        """``embed_query`` without blocking the event loop."""
        return (await self._alisted([text], input_type="query"))[0]

    def batch_embed_texts(
        self,
        texts: Iterable[str],
        poll_interval: float = 30,
        *,
        fallback: Literal["immediate", "error"] = "immediate",
        strategy: Strategy | None = None,
        deadline: float | None = None,
    ) -> list[list[float]]:
        """The vectors of texts that may take a day, for less money where the provider has a
        batch API; in their order.

        Returns when they are there. A process that is killed loses nothing: to call again with the
        same texts goes on with the same jobs. ``poll_interval``: seconds between two looks.
        ``strategy`` and ``deadline`` as for ``submit_batch``.

        Without a batch API the texts are embedded at once, at the full price, and a warning says
        so; ``fallback="error"`` raises ``ConfigurationError`` instead. Raises ``BudgetExceeded``
        before anything is sent, and ``BatchEmbeddingFailed`` if a row gets no vector.
        """
        if not poll_interval > 0:
            raise ConfigurationError(f"poll_interval = {poll_interval} must be above 0 seconds")
        if fallback not in ("immediate", "error"):
            raise ConfigurationError(f'fallback = {fallback!r} must be "immediate" or "error"')
        from embedcore.policy.batch.context import no_strategy
        from embedcore.policy.batch.job import finished, waiting_lease
        from embedcore.policy.batch.submit import Submission

        if fallback == "error":
            self._context(' and fallback = "error": nothing was sent; use embed_texts', new=True)
        elif not self._running.offers_batches():
            if not self._warned_of_batch:
                self._warned_of_batch = True
                logger.warning("%s", no_strategy(self._engine, ": the texts are embedded at once"))
            return self.embed_texts(texts)
        how = Submission(waiting=waiting_lease(poll_interval), strategy=strategy, deadline=deadline)
        return finished(self._submit(texts, how), poll_interval)

    def submit_batch(
        self,
        rows: Iterable[Any],
        *,
        text: str | int | None = None,
        key: str | int | None = None,
        input_type: str | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        on_budget: Literal["raise", "wait"] = "raise",
        progress: bool | Callable[[Progress], None] = False,
        resubmit_lost: bool = False,
        strategy: Strategy | None = None,
        deadline: float | None = None,
    ) -> BatchJob:
        """Submit rows as a batch and return without waiting for it.

        ``rows``, ``text``, ``key`` and ``on_error`` are as for ``embed_iter``; a key must be
        something that JSON has. Texts that are in flight already, in whichever process, are joined
        instead of being submitted again. The process may end at once: ``batch_job(id)`` of any
        other one goes on with it.

        ``on_budget="wait"`` submits what the budget allows, and the rest as it allows more.
        ``resubmit_lost`` pays again for what an earlier batch paid for and the provider lost.

        ``strategy``: "batch"; "immediate", at once and at the full price; or "auto": at once what
        is not worth a batch or cannot wait for one, and the rest as a batch, of which what is
        missing shortly before the ``deadline`` (seconds from now) is embedded at once, if the
        budget allows and a program asks for it then. Default: as the configuration says.

        Raises ``BudgetExceeded``, ``InputRejected`` and ``StorageFull`` before anything is sent,
        and what the provider refuses for good; nothing of the batch is left then.
        """
        from embedcore.policy.batch.submit import Submission

        how = Submission(
            text=text,
            key=key,
            input_type=input_type,
            on_error=on_error,
            on_budget=on_budget,
            resubmit_lost=resubmit_lost,
            strategy=strategy,
            deadline=deadline,
        )
        return self._submit(rows, how, progress=progress)

    def batch_jobs(self, *, ended: bool = True) -> list[BatchJob]:
        """The batches of this model, scope and account, oldest first, of every process.

        ``ended=False``: only those that are still open.
        """
        from embedcore.policy.batch.context import batches_of

        return [self._job(record) for record in batches_of(self._context(), ended=ended)]

    def batch_job(self, name: str) -> BatchJob:
        """The batch of that id, from any process. Raises ``ConfigurationError`` if there is none,
        or if it was made with another model, scope, option or account."""
        from embedcore.policy.batch.context import batch_named

        return self._job(batch_named(self._context(), name))

    def made_before(self, fingerprint: str) -> bool:
        """Whether an earlier version of embedcore gave the vectors of this client that name."""
        return fingerprint in self._engine.former

    def resume_batches(self) -> list[EmbeddingError]:
        """Do whatever is due for every open batch of this model, scope and account, once.

        Returns the errors that waiting alone does not mend. Fit for being called now and then.
        """
        from embedcore.policy.batch.cleanup import tidy

        problems = [problem for job in self.batch_jobs(ended=False) for problem in job.advance()]
        return problems + tidy(self._context())

    def open(self) -> None:
        """Do now, for free, what the first call would otherwise wait for: open the files, import
        what its threads need, connect to the provider, load the tokenizer.

        For services, before the first request of theirs; and before a fork, so that no child has to
        import. Harmless when repeated. Raises ``EmbeddingError`` if it cannot be done.
        """
        self._running.open()

    def close(self) -> None:
        """Close connections and end the threads. The next call opens them again."""
        running = self._opened.take()
        if running is not None:
            running.close()

    async def aopen(self) -> None:
        """``open`` without blocking the event loop."""
        await in_thread(self.open)

    async def aclose(self) -> None:
        """``close`` without blocking the event loop."""
        await in_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"EmbeddingClient({self.provider}:{self.model}, scope={self.scope!r})"

    def __getstate__(self) -> dict[str, Any]:
        by_hand = self._embedder is not None
        choice = self._choice if by_hand else self._choice.without_keys()
        observers = picklable(self._observers, warn=not self._warned_of_observers)
        self._warned_of_observers = True
        return {"choice": choice, "embedder": self._embedder, "observers": observers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._choice = state["choice"]
        self._embedder = state["embedder"]
        self._observers = state["observers"]
        self._opened = Lazy()

    def __copy__(self) -> Self:
        """Another client of the same settings, key, embedder and observers."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _opened=Lazy())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Settings are never changed; an embedder and an observer are the caller's objects.
        twin = memo[id(self)] = copy.copy(self)
        own = ("_choice", "_embedder", "_observers", "_opened")
        more = {name: value for name, value in self.__dict__.items() if name not in own}
        twin.__dict__.update(copy.deepcopy(more, memo))
        return twin

    @property
    def _engine(self) -> Engine:
        return self._running.engine

    @property
    def _running(self) -> assembly.Running:
        build = partial(assembly.build, self._choice, self._embedder, self._observers)
        return self._opened.get(build)

    def _embed(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        on_budget: OnBudget = "raise",
        progress: bool | Callable[[Progress], None] = False,
        check_budget: bool = True,
        stop: Stop | None = None,
        on_arrival: OnArrival | None = None,
        cache: bool = True,
        whole: bool = False,
    ) -> EmbeddingResult:
        check_on_error(on_error)
        check_on_budget(on_budget)
        return self._running.embed(
            texts,
            progress=progress,
            cache=cache,
            whole=whole,
            input_type=input_type,
            on_error=on_error,
            on_budget=on_budget,
            check_budget=check_budget,
            stop=stop,
            on_arrival=on_arrival,
        )

    async def _alisted(self, texts: Iterable[str], **how: Any) -> list[list[float]]:
        return listed(await self._aembed(texts, whole=True, **how))

    async def _aembed(self, texts: Iterable[str], **how: Any) -> EmbeddingResult:
        # The caller's task goes on meanwhile: its list may change.
        texts = list(texts) if isinstance(texts, list) else texts
        if self._opened.is_there:
            coming = self._running.aembed(texts, **how)
            if coming is not None:
                return await coming
        stop = Stop()
        return await in_thread(partial(self._embed, texts, stop=stop, **how), stop=stop)

    def _submit(
        self,
        rows: Iterable[Any],
        how: Submission,
        *,
        progress: bool | Callable[[Progress], None] = False,
    ) -> BatchJob:
        from embedcore.policy.batch.job import start
        from embedcore.policy.batch.submit import submit

        return start(self._job(submit(self._context(new=True), rows, how), progress=progress), how)

    def _job(
        self, record: BatchRecord, *, progress: bool | Callable[[Progress], None] = False
    ) -> BatchJob:
        from embedcore.policy.batch.job import BatchJob

        def shown() -> BatchContext:
            return replace(self._context(), engine=self._running.for_call(progress=progress))

        # A child of a fork has a context of its own.
        kept: Lazy[BatchContext] = Lazy()
        open_context = partial(kept.get, shown) if progress else self._context
        return BatchJob(record=record, open_context=open_context)

    def _context(self, *instead: str, new: bool = False) -> BatchContext:
        running = self._running
        context = running.batch_context()
        if context is not None and (not new or running.offers_batches()):
            return context
        from embedcore.policy.batch.context import no_strategy

        raise ConfigurationError(no_strategy(running.engine, *instead))
