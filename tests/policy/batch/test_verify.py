"""Nothing of a job is kept whose rows are not what single requests give for its texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcore import BatchEmbeddingFailed, EmbeddingClient, errors
from embedcore.provider.types import BatchLimits, BatchOutcome
from embedcore.testing import vectors_of
from embedcore.testing.fakes.batch import FakeBatch, batch_embedder

TEXTS = [f"text {number:03d}" for number in range(60)]


class Doubted(FakeBatch):
    """``mixed``: of so many rows the vectors change places. ``reads``: how often results were
    begun."""

    mixed = 0
    reads = 0

    def results(self, job_id: str) -> Iterator[BatchOutcome]:
        self.reads += 1
        found = list(super().results(job_id))
        vectors = [each.vector for each in found[: self.mixed]]
        turned = vectors[1:] + vectors[:1]
        for outcome, vector in zip(found[: self.mixed], turned, strict=True):
            yield dataclasses.replace(outcome, vector=vector)
        yield from found[self.mixed :]


class World:
    def __init__(self, home: Path, rows: int = 16) -> None:
        self.embedder: Any = batch_embedder()
        service = self.embedder.batch.service
        self.strategy = Doubted(service, limits=BatchLimits(verify_rows=rows))
        self.embedder._batch = self.strategy
        self.embedder.batch = self.strategy
        self.service = service
        self.client = EmbeddingClient(embedder=self.embedder, config={"home": home})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    with closing(made.client):
        yield made


def test_a_sound_job_is_kept_and_read_twice(world: World) -> None:
    result = world.client.submit_batch(TEXTS).result(poll_interval=0.01)
    assert np.allclose(result.vectors, vectors_of(TEXTS, result.vectors.shape[1]), atol=1e-6)
    assert world.strategy.reads == 2


def test_where_nothing_is_doubted_results_are_read_once(tmp_path: Path) -> None:
    world = World(tmp_path, rows=0)
    with closing(world.client):
        assert world.client.submit_batch(TEXTS).result(poll_interval=0.01).ok.all()
    assert world.strategy.reads == 1


def test_of_a_small_job_every_row_is_compared_and_right(world: World) -> None:
    world.strategy.mixed = 2
    result = world.client.submit_batch(TEXTS[:10]).result(poll_interval=0.01)
    expected = vectors_of(TEXTS[:10], result.vectors.shape[1])
    assert np.allclose(result.vectors, expected, atol=1e-6)


def test_a_job_that_is_mixed_up_is_kept_in_no_part(world: World) -> None:
    world.strategy.mixed = 60
    with pytest.raises(BatchEmbeddingFailed, match="no vector") as caught:
        world.client.submit_batch(TEXTS).result(poll_interval=0.01)
    assert len(caught.value.failures) == 44
    assert all("single requests" in why for why in caught.value.failures.values())
    assert len(world.service.jobs) == 1
    kept = caught.value.result.ok
    expected = vectors_of(TEXTS, caught.value.result.vectors.shape[1])
    assert np.allclose(caught.value.result.vectors[kept], expected[kept], atol=1e-6)


def test_what_cannot_be_asked_decides_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: object) -> None:
        raise errors.PermissionDenied("not now", billed="no")

    with monkeypatch.context() as patch:
        patch.setattr(world.embedder, "embed", away)
        job = world.client.submit_batch(TEXTS)
        for _ in range(4):
            assert job.status().ended is None
    assert job.result(poll_interval=0.01).ok.all()
    assert len(world.service.jobs) == 1
