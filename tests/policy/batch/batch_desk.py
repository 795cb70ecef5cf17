"""Clients over one state folder, one provider with a bill, and one clock that only tests move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcore import EmbeddingClient
from embedcore.events import Event, Reserved, Settled
from embedcore.policy.batch.job import BatchJob
from embedcore.provider.types import BatchOutcome
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeClock, vectors_of
from embedcore.testing.fakes.batch import batch_embedder, custom_id_of
from embedcore.testing.openai.batch_jobs import Job
from embedcore.testing.openai.batches import BatchSettings, Progress

LOOK = 61.0


class BatchDesk:
    """``client()`` is what another process would have. Parts move by hand, or with ``work``."""

    def __init__(self, home: Path, opened: ExitStack) -> None:
        self.home = home
        self.clock = FakeClock()
        self.events: list[Event] = []
        self._opened = opened
        self.provide()

    def provide(self, **how: Any) -> None:
        """Another provider, before the first client."""
        settings = how.pop("settings", None) or BatchSettings(progress=Progress())
        self.embedder = batch_embedder(settings=settings, clock=self.clock.time, **how)
        self.strategy = self.embedder.batch
        self.service, self.faults = self.strategy.service, self.strategy.faults
        self.meter = self.service.meter

    def client(self, *, daily: int | None = None, **config: Any) -> EmbeddingClient:
        budget = {} if daily is None else {"daily_token_limit": daily}
        client = EmbeddingClient(
            embedder=self.embedder,
            config={"home": self.home, "budget": budget, **config},
            observers=[self.events.append],
        )
        ledger = client._engine.account.ledger
        assert ledger is not None
        ledger._clock = self.clock.time
        # Whoever waits, waits by the same clock: it takes no time.
        running = client._running
        by_clock = replace(running.engine, monotonic=self.clock.monotonic, wait_for=self.clock.wait)
        client._opened._thing = replace(running, engine=by_clock)
        self.last = self._opened.enter_context(client)
        return client

    def submit(self, rows: Any, **how: Any) -> BatchJob:
        """A batch of a new client. ``batch``, ``daily``, …: its configuration."""
        options = ("text", "key", "input_type", "on_error", "on_budget", "progress")
        given = {name: how.pop(name) for name in (*options, "resubmit_lost") if name in how}
        return self.client(**how).submit_batch(rows, **given)

    @property
    def jobs(self) -> list[Job]:
        """The jobs at the provider, oldest first."""
        return self.service.jobs

    def named(self, number: int, outcomes: Sequence[BatchOutcome]) -> list[BatchOutcome]:
        """What a strategy gives of the job of that number, where ids that are places ("0", "1", …)
        are as this job has them."""
        lines = self.service.input_lines(self.jobs[number].input_file_id)
        ids = {str(place): custom_id_of(line) for place, line in enumerate(lines)}
        return [replace(one, id=ids.get(one.id, one.id)) for one in outcomes]

    def finish_all(self) -> None:
        """Every job that the provider has is run to its end, if it has not expired before."""
        self.service.refresh()
        for job in self.jobs:
            if not job.ended:
                self.service.finish(job.id)

    def work(
        self,
        job: BatchJob,
        *,
        looks: int = 60,
        seconds: float = LOOK,
        meanwhile: Callable[[], object] | None = None,
    ) -> BatchJob:
        """Look after a batch until it ends, while the provider does its part (or ``meanwhile``)."""
        for _ in range(looks):
            (meanwhile or self.finish_all)()
            job.advance()
            if job.record.has_ended:
                return job
            self.clock.advance(seconds)
        raise AssertionError(f"not ended after {looks} looks: {job.status(poll=False)}")

    def spent(self, period: str = "total") -> usage.Usage:
        ledger = self.last._engine.account.ledger
        assert ledger is not None
        return usage.of_scope(ledger, "default", period)  # type: ignore[arg-type]

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def check(self, job: BatchJob, texts: Sequence[str], *, without: Sequence[int] = ()) -> Any:
        """Row i has the vector of text i, but for those that have none, which say why."""
        result = job.result(on_error="keep")
        assert result.ok.tolist() == [row not in without for row in range(len(texts))]
        right = vectors_of(list(texts), self.embedder.info.dimensions or 32)
        assert (result.vectors[result.ok] == right[result.ok]).all()
        assert np.isnan(result.vectors[~result.ok]).all()
        assert sorted(result.errors) == sorted(without)
        return result

    def check_money(self, *, certain: bool = True, left: int = 0) -> None:
        """Nothing billed twice, nothing held, and the ledger says what the provider bills."""
        assert self.meter.billed_twice == {}
        used = self.spent()
        assert used.held == Amount(tokens=left, cost=used.held.cost if left else 0)
        billed = self.meter.billed_tokens
        assert used.spent.tokens == billed if certain else used.spent.tokens >= billed
        self.check_events(used.spent)

    def check_events(self, spent: Amount) -> None:
        """Observers were told of all that was spent, and on what."""
        settled = self.told(Settled)
        assert sum(one.tokens for one in settled) == spent.tokens
        assert sum(one.cost for one in settled) == spent.dollars
        info = self.embedder.info
        names = {(one.provider, one.model) for one in [*settled, *self.told(Reserved)]}
        assert names <= {(info.provider, info.model)}

    @property
    def files(self) -> list[str]:
        """The files of batches."""
        folder = self.home / "batches"
        return sorted(path.name for path in folder.glob("*.db")) if folder.is_dir() else []


@pytest.fixture
def batch_desk(tmp_path: Path) -> Iterator[BatchDesk]:
    with ExitStack() as opened:
        yield BatchDesk(tmp_path / "state", opened)
