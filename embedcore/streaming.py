"""The streaming methods of the client."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Sized
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedcore.errors import ConfigurationError
from embedcore.observers import with_progress
from embedcore.policy.immediate.call import OnBudget
from embedcore.policy.immediate.recipe import check_on_budget
from embedcore.policy.stream.asyncstream import AsyncEmbeddingStream
from embedcore.policy.stream.pipeline import OnError, Pipeline
from embedcore.policy.stream.rows import RowReader
from embedcore.policy.stream.stream import EmbeddingStream

if TYPE_CHECKING:
    from embedcore.events import Progress
    from embedcore.policy.engine import Engine


class StreamedForms:
    """What ``EmbeddingClient`` adds to itself by defining ``_engine``."""

    @property
    def _engine(self) -> Engine:
        raise NotImplementedError

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
        before it was given; what was bought and not given is in ``salvaged`` of the stream.
        """
        _check(on_error, on_budget, block_size)
        reader = RowReader(text=text, key=key)
        source = reader.elements(rows)
        pipeline = Pipeline(
            equipped(self._engine, progress=progress, cache=cache),
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
        _check(on_error, on_budget, block_size)

        def pipeline(on_ready: Callable[[], None]) -> Pipeline:
            return Pipeline(
                equipped(self._engine, progress=progress, cache=cache),
                input_type=input_type,
                on_error=on_error,
                on_budget=on_budget,
                block_rows=block_size,
                total=len(rows) if isinstance(rows, Sized) else None,
                on_ready=on_ready,
            )

        return AsyncEmbeddingStream(
            pipeline,
            rows,
            RowReader(text=text, key=key),
            on_error=on_error,
            on_budget=on_budget,
        )


def equipped(
    engine: Engine,
    *,
    progress: bool | Callable[[Progress], None],
    cache: bool,
    whole: bool = False,
) -> Engine:
    """The engine for one call that shows its progress, or does without the cache.

    ``whole``: what is returned has no place to say that a row failed, so that none may, whatever
    the settings.
    """
    if whole and engine.keep_empty:
        engine = replace(engine, keep_empty=False)
    if not cache:
        engine = replace(engine, cache=None)
    if progress:
        engine = replace(engine, observe=with_progress(engine.observe, progress))
    return engine


def check_on_error(on_error: str) -> None:
    """Raises ``ConfigurationError`` for anything but the two that there are."""
    if on_error not in ("raise", "keep"):
        raise ConfigurationError(f'on_error = {on_error!r} must be "raise" or "keep"')


def _check(on_error: str, on_budget: str, block_size: int | None) -> None:
    check_on_error(on_error)
    check_on_budget(on_budget)
    if block_size is not None and not block_size > 0:
        raise ConfigurationError(f"block_size = {block_size} must be at least 1 row")
