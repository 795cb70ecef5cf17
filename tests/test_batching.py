"""Batches at the front door: one call that outlives its process, and batches by their names."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcore import ConfigurationError, EmbeddingClient
from embedcore.errors import BatchEmbeddingFailed
from embedcore.events import RequestSent
from embedcore.money import in_dollars
from embedcore.storage import batches
from embedcore.testing import FakeEmbedder, vectors_of
from embedcore.testing.fakes.batch import Crashed, batch_embedder
from embedcore.testing.openai.batches import BatchSettings, Progress
from embedcore.testing.vectors import tokens_of

TEXTS = ["one", "two", "three", "two"]
QUICK = 0.02
HASTY = {"grace": 0.1, "look_again": 0.05}


@pytest.fixture
def embedder() -> Any:
    return batch_embedder(settings=BatchSettings(progress=Progress(polls=3)))


@pytest.fixture
def client(embedder: Any) -> Any:
    with EmbeddingClient(embedder=embedder) as client:
        yield client


def right(vectors: Any, texts: list[str]) -> None:
    assert isinstance(vectors, list)
    assert np.array_equal(np.array(vectors, dtype=np.float32), vectors_of(texts, 32))


def test_one_call_returns_lists_in_order_for_the_price_of_a_batch(
    client: Any, embedder: Any
) -> None:
    right(client.batch_embed_texts(TEXTS, poll_interval=QUICK), TEXTS)
    assert embedder.batch.service.meter.billed_twice == {}
    assert embedder.meter.billed_requests == 0
    (job,) = client.batch_jobs()
    assert job.status().usage.cost == in_dollars(job.status().usage.tokens * 10_000)


def test_the_same_call_again_is_free(client: Any, embedder: Any) -> None:
    for _ in range(2):
        right(client.batch_embed_texts(iter(TEXTS), QUICK), TEXTS)
    assert len(embedder.batch.service.jobs) == 1


def test_rows_without_a_vector_are_an_error_with_everything_else_in_it(
    client: Any, embedder: Any
) -> None:
    embedder.batch.service.fail_lines("two", message="this one is not allowed")
    with pytest.raises(BatchEmbeddingFailed) as failed:
        client.batch_embed_texts(TEXTS, QUICK)
    assert sorted(failed.value.failures) == [1, 3]
    assert "this one is not allowed" in failed.value.failures[3]
    assert failed.value.jobs == (embedder.batch.service.jobs[0].id,)
    assert failed.value.result.ok.tolist() == [True, False, True, False]


@pytest.mark.parametrize("interval", [0, -3, float("nan")])
def test_an_interval_must_be_one(client: Any, interval: float) -> None:
    with pytest.raises(ConfigurationError, match="poll_interval"):
        client.batch_embed_texts(TEXTS, interval)


# Processes


@pytest.fixture(scope="module")
def dead() -> str:
    """The name of a process of this machine that has ended."""
    said = "from embedcore.storage.grants import myself; print(myself())"
    run = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.fault(59)
@pytest.mark.fault(76)
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize(
    "seam", ["complete", "plan", "upload", "ask", "create", "poll", "put", "store", "end"]
)
def test_after_the_process_has_died_the_same_call_goes_on(
    embedder: Any,
    dead: str,
    monkeypatch: pytest.MonkeyPatch,
    state_home: Path,
    seam: str,
    after: bool,
) -> None:
    """One job, one bill, one batch; even with money for no more than that."""
    # Whether there is a job that nobody saw cannot be known: that one is charged.
    unconfirmed = (seam, after) in (("ask", True), ("create", False))
    money = sum(map(tokens_of, set(TEXTS))) * (1 + unconfirmed)
    config = {"budget": {"daily_token_limit": money}, "batch": HASTY}
    with EmbeddingClient(embedder=embedder, config=config) as client:
        context = client._context()
        parts = (context.batches, context.cutter, context.strategy, context.steps, context.jobs)
        target = next(one for one in (*parts, context.store) if hasattr(one, seam))
        real = getattr(target, seam)

        def dying(*arguments: Any, **more: Any) -> None:
            if after:
                real(*arguments, **more)
            raise Crashed

        with monkeypatch.context() as patch:
            patch.setattr(target, seam, dying)
            patch.setattr(batches, "myself", lambda: dead)
            with pytest.raises(Crashed):
                client.batch_embed_texts(TEXTS, QUICK)
    with EmbeddingClient(embedder=embedder, config=config) as client:
        right(client.batch_embed_texts(TEXTS, QUICK), TEXTS)
        (job,) = client.batch_jobs()
        assert job.status().reserved_tokens == 0
    assert len(embedder.batch.service.jobs) == 1
    assert embedder.batch.service.meter.billed_twice == {}
    assert len(list((state_home / "batches").glob("*.db"))) == 1, "nothing of the dead one is left"


def test_a_batch_is_found_by_its_name_in_another_client(embedder: Any) -> None:
    with EmbeddingClient(embedder=embedder) as client:
        name = client.submit_batch([("x", "one"), ("y", "two")]).id
    with EmbeddingClient(embedder=embedder) as other:
        job = other.batch_job(name)
        assert job.wait(poll_interval=QUICK, timeout=20).state == "done"
        assert [key for block in job.blocks() for key, _ in block] == ["x", "y"]


def test_a_name_that_nobody_gave_is_an_error(client: Any) -> None:
    for name in ("20260101-00000000", "", "../../state", "x" * 5_000):
        with pytest.raises(ConfigurationError, match="there is no batch"):
            client.batch_job(name)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"scope": "another"}, "scope"),
        ({"embedder": "salted"}, "options|fingerprint"),
    ],
)
def test_a_batch_of_another_project_or_model_is_not_mixed_in(
    client: Any, embedder: Any, other: dict[str, str], told: str
) -> None:
    name = client.submit_batch(TEXTS).id
    different = batch_embedder(salt="x") if "embedder" in other else embedder
    with EmbeddingClient(embedder=different, scope=other.get("scope")) as stranger:
        assert stranger.batch_jobs() == []
        with pytest.raises(ConfigurationError, match=told):
            stranger.batch_job(name)


def test_open_batches_are_listed_oldest_first_and_resumed_together(
    client: Any, embedder: Any
) -> None:
    names = [client.submit_batch([f"text {number}"]).id for number in range(3)]
    assert [job.id for job in client.batch_jobs()] == names
    for _ in range(4):
        assert client.resume_batches() == []
    assert [job.id for job in client.batch_jobs(ended=False)] == []
    assert len(client.batch_jobs()) == 3


# Without a batch API


def test_without_a_batch_api_texts_are_billed_now_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent: list[Any] = []
    embedder = FakeEmbedder()
    with EmbeddingClient(embedder=embedder, observers=[sent.append]) as client:
        for texts in (TEXTS, ["another"]):
            right(client.batch_embed_texts(texts), texts)
    assert any(isinstance(event, RequestSent) for event in sent)
    warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
    (warning,) = warnings
    assert "$0.02 per million tokens, and $0.01 in batches" in warning.getMessage()


def test_who_does_not_want_that_is_told_before_anything_is_sent() -> None:
    embedder = FakeEmbedder()
    with EmbeddingClient(embedder=embedder) as client:
        with pytest.raises(ConfigurationError, match="nothing was sent"):
            client.batch_embed_texts(TEXTS, fallback="error")
        with pytest.raises(ConfigurationError, match="no batches here"):
            client.submit_batch(TEXTS)
    assert embedder.meter.requests == 0


@pytest.mark.parametrize("batch", [True, False])
def test_a_fallback_there_is_not_is_refused(batch: bool, embedder: Any) -> None:
    with (
        EmbeddingClient(embedder=embedder if batch else FakeEmbedder()) as client,
        pytest.raises(ConfigurationError, match="fallback"),
    ):
        client.batch_embed_texts(TEXTS, fallback="whatever")


@pytest.mark.parametrize("how", [{"on_error": "x"}, {"on_budget": "x"}, {"strategy": "x"}])
def test_options_there_are_not_are_refused(client: Any, embedder: Any, how: Any) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(how))):
        client.submit_batch(TEXTS, **how)
    assert embedder.batch.calls == []


def test_a_batch_needs_a_state_file(client: Any, embedder: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "no folder"
    blocked.write_text("")
    with (
        EmbeddingClient(embedder=embedder, config={"home": blocked}) as lost,
        pytest.raises(ConfigurationError, match="EMBEDCORE_HOME"),
    ):
        lost.submit_batch(TEXTS)
    assert embedder.batch.calls == []


def test_vectors_of_a_batch_are_kept_where_the_store_is_off(embedder: Any) -> None:
    with EmbeddingClient(embedder=embedder, config={"cache": False}) as client:
        right(client.batch_embed_texts(TEXTS, QUICK), TEXTS)


@pytest.mark.parametrize(
    "count", [2_000, pytest.param(50_000, marks=pytest.mark.campaign(short=True))]
)
def test_a_large_batch_takes_little_time_for_each_text(
    client: Any, embedder: Any, count: int
) -> None:
    """50,000 texts in one job: measured 8 s on two slow cores, of which the fake needs a third."""
    texts = [f"text number {number}" for number in range(count)]
    job = client.submit_batch(texts)
    result = job.result(timeout=300, poll_interval=0.05)
    assert result.ok.all()
    sample = list(range(0, count, 997))
    assert (result.vectors[sample] == vectors_of([texts[row] for row in sample], 32)).all()
    assert len(embedder.batch.service.jobs) == 1
    assert embedder.batch.service.meter.billed_requests == count
