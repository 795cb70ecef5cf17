"""The batch methods of the client: within a day, at half the price."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.forksafe import Lazy
from embedcore.observers import with_progress
from embedcore.streaming import check_on_error

if TYPE_CHECKING:
    from embedcore.events import Progress
    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.batch.job import BatchJob
    from embedcore.policy.batch.submit import Strategy, Submission
    from embedcore.policy.engine import Engine
    from embedcore.provider.types import ModelInfo
    from embedcore.storage.batches import BatchRecord

logger = logging.getLogger("embedcore")


class BatchForms:
    """What ``EmbeddingClient`` adds to itself by defining ``_engine`` and ``_batch_context``."""

    _told_of_batch = False

    @property
    def _engine(self) -> Engine:
        raise NotImplementedError

    def _batch_context(self) -> BatchContext | None:
        """None where the provider has no batch strategy."""
        raise NotImplementedError

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
        if self._batch_context() is None:
            self._tell_of_batch(fallback)
            return self._embed_now(texts)
        from embedcore.policy.batch.job import waiting_lease
        from embedcore.policy.batch.submit import Submission

        how = self._timed(Submission(waiting=waiting_lease(poll_interval)), strategy, deadline)
        job = self._submit(texts, how)
        try:
            result = job.result(poll_interval=poll_interval)
        except KeyboardInterrupt:
            logger.warning(
                "batch %s goes on at the provider: to call again with the same texts goes on with "
                "it, and so does embedcore batch status %s",
                job.id,
                job.id,
            )
            raise
        listed: list[list[float]] = result.vectors.tolist()
        return listed

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
        ``resubmit_lost`` buys again what was paid for in an earlier batch and lost at the provider.

        ``strategy``: "batch"; "immediate", at once and at the full price; or "auto": at once what
        is not worth a batch or cannot wait for one, and the rest as a batch, of which what is
        missing shortly before the ``deadline`` (seconds from now) is embedded at once, if the
        budget allows and somebody looks after it then. Default: as the configuration says.

        Raises ``BudgetExceeded``, ``InputRejected`` and ``StorageFull`` before anything is sent,
        and what the provider refuses for good; nothing of the batch is left then.
        """
        from embedcore.policy.batch.submit import Submission

        check_on_error(on_error)
        if on_budget not in ("raise", "wait"):
            raise ConfigurationError(f'on_budget = {on_budget!r} must be "raise" or "wait"')
        how = Submission(
            text=text,
            key=key,
            input_type=input_type,
            on_error=on_error,
            on_budget=on_budget,
            resubmit_lost=resubmit_lost,
        )
        return self._submit(rows, self._timed(how, strategy, deadline), progress=progress)

    def batch_jobs(self, *, ended: bool = True) -> list[BatchJob]:
        """The batches of this model, scope and account, oldest first, whoever submitted them.

        ``ended=False``: only those that are still open.
        """
        return [
            self._job(record)
            for context in self._offices()
            for record in context.batches.all(context.pool)
            if ended or not record.has_ended
        ]

    def batch_job(self, name: str) -> BatchJob:
        """The batch of that id, from any process. Raises ``ConfigurationError`` if there is none,
        or if it was made with another model, scope, option or account."""
        context = self._context()
        record = context.batches.named(name)
        if record is None:
            raise ConfigurationError(
                f"there is no batch {name!r} in this state folder: embedcore batch list shows them"
            )
        pool = context.batches.pool_of(record)
        mine = self._office_of(record).pool
        for field in ("model", "scope", "endpoint", "account", "fingerprint"):
            theirs, ours = getattr(pool, field), getattr(mine, field)
            if theirs != ours:
                what = "options" if field == "fingerprint" else field
                raise ConfigurationError(
                    f"batch {name} was submitted with {what} {theirs!r}, and this client has "
                    f"{ours!r}: make a client like the one that submitted it"
                )
        return self._job(record)

    def made_before(self, fingerprint: str) -> bool:
        """Whether an earlier version of embedcore gave the vectors of this client that name."""
        return fingerprint in self._engine.former

    def resume_batches(self) -> list[EmbeddingError]:
        """Do whatever is due for every open batch of this model, scope and account, once.

        Returns the errors that waiting alone does not mend. Fit for being called now and then.
        """
        from embedcore.policy.batch.cleanup import tidy

        problems = [problem for job in self.batch_jobs(ended=False) for problem in job.advance()]
        return problems + [problem for context in self._offices() for problem in tidy(context)]

    def _timed(
        self, how: Submission, strategy: Strategy | None, deadline: float | None
    ) -> Submission:
        configured, seconds = self._pace()
        chosen = strategy or configured
        if chosen not in ("immediate", "batch", "auto"):
            raise ConfigurationError(
                f'strategy = {chosen!r} must be "immediate", "batch" or "auto"'
            )
        wanted = seconds if deadline is None else deadline
        if wanted is not None and not wanted > 0:
            raise ConfigurationError(f"deadline = {wanted} must be above 0 seconds")
        if deadline is not None and chosen != "auto":
            raise ConfigurationError(
                f'a deadline needs strategy = "auto", not {chosen!r}: a batch may take a day'
            )
        return replace(how, strategy=chosen, deadline=wanted)

    def _pace(self) -> tuple[Strategy, float | None]:
        """Strategy and deadline as the configuration says."""
        raise NotImplementedError

    def _submit(
        self,
        rows: Iterable[Any],
        how: Submission,
        *,
        progress: bool | Callable[[Progress], None] = False,
    ) -> BatchJob:
        from embedcore.policy.batch.cleanup import forget
        from embedcore.policy.batch.submit import submit

        context = self._context()
        job = self._job(submit(context, rows, how), progress=progress)
        job.on_error = how.on_error
        job.transient = how.waiting is not None
        try:
            problems = job.advance()
            refused = problems and not any(
                part.attempt is not None for part in context.jobs.of_batch(job.record)
            )
        except BaseException:
            if not job.transient:
                logger.warning("batch %s is written down and goes on when it is resumed", job.id)
            raise
        if refused:
            # Nothing of it was created, and waiting does not help: as if it had not been asked for.
            job.forget()
            forget(context, job.record)
            raise problems[0]
        return job

    def _job(
        self, record: BatchRecord, *, progress: bool | Callable[[Progress], None] = False
    ) -> BatchJob:
        from embedcore.policy.batch.job import BatchJob

        if not progress:
            return BatchJob(record=record, open_office=lambda: self._office_of(record))
        # A child of a fork has an context of its own.
        shown: Lazy[BatchContext] = Lazy()
        return BatchJob(
            record=record, open_office=lambda: shown.get(lambda: self._shown(record, progress))
        )

    def _shown(
        self, record: BatchRecord, progress: bool | Callable[[Progress], None]
    ) -> BatchContext:
        plain = self._office_of(record)
        observe = with_progress(plain.engine.observe, progress)
        return replace(plain, engine=replace(plain.engine, observe=observe))

    def _offices(self) -> list[BatchContext]:
        """That of this client, and those for what was submitted under an earlier fingerprint."""
        context = self._context()
        return [context, *(_renamed(context, former) for former in context.engine.former)]

    def _office_of(self, record: BatchRecord) -> BatchContext:
        """The one that goes on with a batch."""
        context = self._context()
        if not context.engine.former:
            return context
        name = context.batches.pool_of(record).fingerprint
        return _renamed(context, name) if name in context.engine.former else context

    def _context(self) -> BatchContext:
        context = self._batch_context()
        if context is None:
            raise ConfigurationError(
                f"{self._engine.label} has no batch strategy here: use embed or embed_iter, "
                f"{_price_difference(self._engine.info)}"
            )
        return context

    def _embed_now(self, texts: Iterable[str]) -> list[list[float]]:
        raise NotImplementedError

    def _tell_of_batch(self, fallback: str) -> None:
        label, price = self._engine.label, _price_difference(self._engine.info)
        if fallback == "error":
            raise ConfigurationError(
                f'{label} has no batch strategy here and fallback = "error": nothing was sent; use '
                f"embed_texts, {price}"
            )
        if not self._told_of_batch:
            self._told_of_batch = True
            logger.warning(
                "%s has no batch strategy here: the texts are embedded at once, %s", label, price
            )


def _renamed(context: BatchContext, fingerprint: str) -> BatchContext:
    return replace(context, engine=replace(context.engine, fingerprint=fingerprint))


def _price_difference(info: ModelInfo) -> str:
    price = info.price
    if price is None:
        return "at a price that is not known"
    if price.free:
        return "which costs nothing"
    batch = f" instead of ${price.batch}" if price.batch is not None else ""
    return f"at ${price.immediate}{batch} per million tokens"
