"""The client for one model and one budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from embedcore import assembly, choice
from embedcore.awaiting import AwaitedForms
from embedcore.batching import BatchForms
from embedcore.errors import ConfigurationError
from embedcore.events import Observer, Progress
from embedcore.forksafe import Lazy
from embedcore.observers import picklable
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.estimate import Plan, plan_now
from embedcore.policy.immediate.call import OnBudget
from embedcore.policy.immediate.recipe import check_on_budget, embed_now
from embedcore.policy.result import EmbeddingResult, OnArrival, listed
from embedcore.provider import registry
from embedcore.provider.options import HiddenValues
from embedcore.streaming import StreamedForms, check_on_error, equipped

if TYPE_CHECKING:
    from embedcore.config import Config
    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.batch.submit import Strategy
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import ModelInfo
    from embedcore.storage.ledger import Ledger


@dataclass(kw_only=True, slots=True)
class _Running:
    """What a client holds open. ``context``: once there was a batch."""

    engine: Engine
    ledger: Ledger | None
    context: BatchContext | None = None

    def close(self) -> None:
        self.engine.pool.close()
        self.engine.embedder.close()
        if self.engine.cache is not None:
            self.engine.cache.store.close()
        if self.context is not None:
            self.context.store.close()
        if self.ledger is not None:
            self.ledger.database.close()


class EmbeddingClient(AwaitedForms, StreamedForms, BatchForms):
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
    warning names the others.
    """

    _told_of_observers = False

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
        self._opened: Lazy[_Running] = Lazy()
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
        return self._one(text, input_type=None)

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
        settings: a list has no place for a row that failed. What was bought before it is in its
        ``.partial``.
        """
        return listed(
            self._embed(texts, check_budget=check_budget, on_budget=on_budget, whole=True)
        )

    def embed_documents(self, texts: Iterable[str]) -> list[list[float]]:
        """As ``embed_texts``, for texts that are to be found."""
        return listed(self._embed(texts, input_type="document", whole=True))

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question. It may use the share of the budget kept for queries."""
        return self._one(text, input_type="query")

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
        another thread: whoever writes them down there loses no finished request to a crash.
        ``cache=False`` buys
        everything anew and keeps nothing.
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
            equipped(self._engine, progress=False, cache=cache),
            texts,
            input_type=input_type,
            exact=exact,
            context=self._context() if batch else None,
        )

    def open(self) -> None:
        """Do now, for free, what the first call would otherwise wait for: open the files, import
        what its threads need, connect to the provider, load the tokenizer.

        For services, before the first request of theirs; and before a fork, so that no child has to
        import. Harmless when repeated. Raises ``EmbeddingError`` if it cannot be done.
        """
        running = self._opened.get(self._open)
        if running.engine.cache is not None:
            running.engine.cache.store.database.open()
        running.engine.tokenizer.count(["a"])
        running.engine.connect()

    def close(self) -> None:
        """Close connections and end the threads. The next call opens them again."""
        running = self._opened.take()
        if running is not None:
            running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EmbeddingClient({self.provider}:{self.model}, scope={self.scope!r})"

    def __getstate__(self) -> dict[str, Any]:
        by_hand = self._embedder is not None
        choice = self._choice if by_hand else self._choice.without_keys()
        observers = picklable(self._observers, warn=not self._told_of_observers)
        self._told_of_observers = True
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
        # Settings are never changed; an embedder and an observer are somebody's, not a value.
        twin = memo[id(self)] = copy.copy(self)
        own = ("_choice", "_embedder", "_observers", "_opened")
        more = {name: value for name, value in self.__dict__.items() if name not in own}
        twin.__dict__.update(copy.deepcopy(more, memo))
        return twin

    @property
    def _engine(self) -> Engine:
        return self._opened.get(self._open).engine

    def _open(self) -> _Running:
        engine, ledger = assembly.build_engine(self._choice, self._embedder, self._observers)
        return _Running(engine=engine, ledger=ledger)

    def _one(self, text: str, *, input_type: str | None) -> list[float]:
        result = self._embed([text], input_type=input_type, whole=True)
        vector: list[float] = result.vectors[0].tolist()
        return vector

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
        return embed_now(
            equipped(self._engine, progress=progress, cache=cache, whole=whole),
            texts,
            input_type=input_type,
            on_error=on_error,
            on_budget=on_budget,
            check_budget=check_budget,
            stop=stop,
            on_arrival=on_arrival,
        )

    def _embed_now(self, texts: Iterable[str]) -> list[list[float]]:
        return self.embed_texts(texts)

    def _pace(self) -> tuple[Strategy, float | None]:
        return self._choice.setting("strategy") or "batch", self._choice.setting("deadline")

    def _batch_context(self) -> BatchContext | None:
        running = self._opened.get(self._open)
        if running.context is None:
            running.context = assembly.build_office(self._choice, running.engine)
        return running.context
