"""The front door: a client for one model, inside one budget."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from embedcore import assembly
from embedcore.errors import ConfigurationError
from embedcore.events import Event, Observer, Progress
from embedcore.observers import ProgressLine
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.immediate import Plan, embed_now, plan_now
from embedcore.policy.result import EmbeddingResult
from embedcore.provider import registry

if TYPE_CHECKING:
    from embedcore.config import Config
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import ModelInfo
    from embedcore.storage.ledger import Ledger

Answer = TypeVar("Answer")
logger = logging.getLogger("embedcore")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    """What a client holds open, in the process that opened it."""

    process: int
    engine: Engine
    ledger: Ledger | None

    def close(self) -> None:
        self.engine.pool.close()
        self.engine.embedder.close()
        if self.ledger is not None:
            self.ledger.database.close()


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

    Building one needs neither a key nor a network. It may be shared between threads, is usable
    again after ``close()``, and pickles without keys or handles.
    """

    def __init__(
        self,
        model: str | None = None,
        api_key: assembly.Key | None = None,
        *,
        embedder: Embedder | None = None,
        config: Config | Mapping[str, Any] | Path | str | None = None,
        scope: str | None = None,
        options: Mapping[str, Any] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        given = dict(options or {})
        if api_key is not None:
            given["api_key"] = api_key
        if embedder is not None and (model is not None or given):
            raise ConfigurationError(
                "embedder= is ready to use: model, api_key and options belong to a provider"
            )
        self._choice = assembly.choose(model, config=config, scope=scope, options=given)
        self._embedder = embedder
        self._observers = tuple(observers)
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._told_of_batch = False
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

    def embed_texts(self, texts: Iterable[str], check_budget: bool = True) -> list[list[float]]:
        """The vectors of any number of texts, in their order.

        ``check_budget=False`` keeps no limit, and still records what is spent. Raises any
        ``EmbeddingError``; what was bought before it is in its ``.partial``.
        """
        result = embed_now(self._engine, texts, check_budget=check_budget)
        vectors: list[list[float]] = result.vectors.tolist()
        return vectors

    def embed_documents(self, texts: Iterable[str]) -> list[list[float]]:
        """As ``embed_texts``, for texts that are to be found."""
        vectors: list[list[float]] = self.embed(texts, input_type="document").vectors.tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question. It may use the share of the budget kept for queries."""
        return self._one(text, input_type="query")

    def embed(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        progress: bool | Callable[[Progress], None] = False,
    ) -> EmbeddingResult:
        """Vectors as an array, and what became of every row.

        ``on_error="keep"`` notes what is wrong with a row, and transient errors whose attempts
        are used up, instead of raising; everything else is raised in any case. ``progress``: shown
        on the terminal or in the log, or given to a callable.
        """
        return self._embed(texts, input_type, on_error, progress, None)

    def plan(
        self, texts: Iterable[str], *, input_type: str | None = None, exact: bool = True
    ) -> Plan:
        """What ``embed`` would send and what that costs. Sends and spends nothing."""
        return plan_now(self._engine, texts, input_type=input_type, exact=exact)

    def batch_embed_texts(
        self,
        texts: Iterable[str],
        poll_interval: float = 30,
        *,
        fallback: Literal["immediate", "error"] = "immediate",
    ) -> list[list[float]]:
        """The vectors of texts that may take a day, for less money where the provider has a
        batch API.

        Without one they are embedded at once, at the full price, and a warning says so;
        ``fallback="error"`` raises ``ConfigurationError`` instead. ``poll_interval``: seconds
        between two looks at a batch.
        """
        if not poll_interval > 0:
            raise ConfigurationError(f"poll_interval = {poll_interval} must be above 0 seconds")
        self._tell_of_batch(fallback)
        return self.embed_texts(texts)

    async def aembed(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        progress: bool | Callable[[Progress], None] = False,
    ) -> EmbeddingResult:
        """``embed`` without blocking the event loop. Cancelling it sends nothing more."""
        return await _in_thread(
            lambda stop: self._embed(texts, input_type, on_error, progress, stop)
        )

    async def aembed_text(self, text: str) -> list[float]:
        """``embed_text`` without blocking the event loop."""
        return (await self.aembed_texts([text]))[0]

    async def aembed_texts(
        self, texts: Iterable[str], check_budget: bool = True
    ) -> list[list[float]]:
        """``embed_texts`` without blocking the event loop."""
        result = await _in_thread(
            lambda stop: embed_now(self._engine, texts, check_budget=check_budget, stop=stop)
        )
        vectors: list[list[float]] = result.vectors.tolist()
        return vectors

    async def aembed_documents(self, texts: Iterable[str]) -> list[list[float]]:
        """``embed_documents`` without blocking the event loop."""
        vectors: list[list[float]] = (
            await self.aembed(texts, input_type="document")
        ).vectors.tolist()
        return vectors

    async def aembed_query(self, text: str) -> list[float]:
        """``embed_query`` without blocking the event loop."""
        vector: list[float] = (await self.aembed([text], input_type="query")).vectors[0].tolist()
        return vector

    def close(self) -> None:
        """Close connections and end the threads. The next call opens them again."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None and running.process == os.getpid():
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
        choice = self._choice
        if self._embedder is None:
            config = assembly.without_keys(choice.config, choice.provider)
            kept = {name: value for name, value in choice.options.items() if name != "api_key"}
            choice = replace(choice, config=config, options=kept)
        return {"choice": choice, "embedder": self._embedder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._choice = state["choice"]
        self._embedder = state["embedder"]
        self._observers = ()
        self._lock = threading.Lock()
        self._running = None
        self._told_of_batch = False

    @property
    def _engine(self) -> Engine:
        running = self._running
        if running is None or running.process != os.getpid():
            running = self._open()
        return running.engine

    def _open(self) -> _Running:
        if self._running is not None and self._running.process != os.getpid():
            # After a fork: the parent's lock may be held by a thread that does not exist here.
            self._lock = threading.Lock()
        with self._lock:
            if self._running is None or self._running.process != os.getpid():
                engine, ledger = assembly.build_engine(
                    self._choice, self._embedder, self._observers
                )
                self._running = _Running(process=os.getpid(), engine=engine, ledger=ledger)
            return self._running

    def _one(self, text: str, *, input_type: str | None) -> list[float]:
        vector: list[float] = self.embed([text], input_type=input_type).vectors[0].tolist()
        return vector

    def _embed(
        self,
        texts: Iterable[str],
        input_type: str | None,
        on_error: Literal["raise", "keep"],
        progress: bool | Callable[[Progress], None],
        stop: Stop | None,
    ) -> EmbeddingResult:
        if on_error not in ("raise", "keep"):
            raise ConfigurationError(f'on_error = {on_error!r} must be "raise" or "keep"')
        engine = self._engine
        if progress:
            engine = replace(engine, observe=_with_progress(engine.observe, progress))
        return embed_now(engine, texts, input_type=input_type, on_error=on_error, stop=stop)

    def _tell_of_batch(self, fallback: str) -> None:
        info = self.info
        message = (
            f"{self.provider}:{self.model} has no batch strategy here: the texts are embedded at "
            f"once, {_price_difference(info)}"
        )
        if fallback == "error":
            raise ConfigurationError(
                f"{self.provider}:{self.model} has no batch strategy here and fallback = "
                f'"error": nothing was sent; use embed_texts, {_price_difference(info)}'
            )
        if not self._told_of_batch:
            self._told_of_batch = True
            logger.warning("%s", message)


def _price_difference(info: ModelInfo) -> str:
    price = info.price
    if price is None:
        return "at a price that is not known"
    if price.free:
        return "which costs nothing"
    batch = f" instead of ${price.batch}" if price.batch is not None else ""
    return f"at ${price.immediate}{batch} per million tokens"


def _with_progress(observe: Observer, progress: bool | Callable[[Progress], None]) -> Observer:
    show: Observer = ProgressLine() if progress is True else _only_progress(progress)

    def both(event: Event) -> None:
        observe(event)
        registry.notify(show, event)

    return both


def _only_progress(callback: Any) -> Observer:
    def tell(event: Event) -> None:
        if isinstance(event, Progress):
            callback(event)

    return tell


async def _in_thread(work: Callable[[Stop], Answer]) -> Answer:
    stop = Stop()
    try:
        return await asyncio.to_thread(work, stop)
    finally:
        stop.set()
