"""Voyage's batches: what is sent, how rows come home, and what a job costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedcore_voyage.plugin import MODELS, VoyageEmbedder, VoyageOptions
from fake_voyage import FakeVoyage

from embedcore import EmbeddingClient, errors
from embedcore.provider.batch_lines import LineReader
from embedcore.provider.batch_objects import job_of, results_of, status_of
from embedcore.provider.protocol import BatchStrategy
from embedcore.provider.types import BatchItem, EmbedRequest
from embedcore.testing.batch_service import ServiceBatchContract

KEY = "pa-CANARY0123456789abcdefXYZ"
SHAPES = (
    Path(__file__).parents[4] / "shared" / "fixtures" / "vendors" / "documented.batch_shapes.json"
)


@pytest.fixture
def server() -> Iterator[FakeVoyage]:
    with FakeVoyage(key=KEY) as fake:
        yield fake


def embedder(server: FakeVoyage, model: str = "voyage-4", **options: Any) -> VoyageEmbedder:
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, **options}
    return VoyageEmbedder(model, VoyageOptions(**options))


def batch_of(server: FakeVoyage, model: str = "voyage-4", **options: Any) -> BatchStrategy:
    found = embedder(server, model, **options).batch
    assert found is not None
    return found


class TestVoyageBatch(ServiceBatchContract):
    def strategy_of(self, server: FakeVoyage) -> BatchStrategy:
        return batch_of(server)

    def refused_text(self) -> str:
        return "word " * 27_000


@pytest.fixture
def shapes() -> Any:
    if not SHAPES.is_file():
        pytest.skip("the documented shapes are not beside the repository")
    return json.loads(SHAPES.read_text(encoding="utf-8"))["voyage"]


def test_what_is_sent_is_what_is_documented(server: FakeVoyage, shapes: Any) -> None:
    batch = batch_of(server, dimensions=512)
    reference = batch.upload([BatchItem(id="p-0", text="a", input_type="query")], key="k" * 32)
    batch.create(reference, key="k" * 32)
    (asked,) = server.seen
    assert asked.keys() == shapes["create_request"].keys()
    assert asked["request_params"] == {
        "model": "voyage-4",
        "input_type": "query",
        "truncation": False,
        "output_dimension": 512,
    }
    assert asked["metadata"] == {"embedcore": "k" * 32}
    line = json.loads(server.files[asked["input_file_id"]].content)
    assert line == {"custom_id": "p-0", "body": {"input": ["a"]}}
    assert line.keys() == shapes["input_line"].keys()


def test_documented_objects_are_understood(shapes: Any) -> None:
    for name, state in (("batch_validating", "running"), ("batch_cancelled", "cancelled")):
        told = shapes[name]
        assert status_of(told, job_id=told["id"], shown=str).state == state
        found = job_of(told).found
        assert found is not None
        assert found.created_at is not None
        assert found.created_at.isoformat() == told["created_at"]
    ended = results_of(shapes["batch_cancelled"], job_id="batch-def456", shown=str)
    assert ended is not None
    assert (ended.files, ended.counted) == (["file-klm789"], 2)


def test_documented_lines_are_understood(shapes: Any) -> None:
    read = LineReader(shown=str, errors_billed="no").of
    good = read(shapes["output_line"])
    assert (good.id, good.tokens, good.model) == ("task_0", 33, "voyage-4-large")
    assert good.vector is not None
    assert good.vector.tolist() == pytest.approx([-0.0076687671244, 0.023722406476])
    failed, expired = map(read, shapes["error_lines"])
    assert (failed.error, failed.retryable) == ("Internal Server Error (HTTP 500)", True)
    assert (expired.ran, expired.billed) == (False, "no")


def test_a_job_gives_the_vectors_of_single_requests(server: FakeVoyage) -> None:
    one = embedder(server, dimensions=256)
    batch = one.batch
    assert batch is not None
    texts = ["été", "two", ""]
    items = [BatchItem(id=f"p-{place}", text=text) for place, text in enumerate(texts)]
    job = batch.create(batch.upload(items, key="k"), key="k")
    assert batch.poll(job).state == "running"
    server.finish()
    found = {outcome.id: outcome for outcome in batch.results(job)}
    reply = one.embed(EmbedRequest(texts=texts))
    for item, row in zip(items, reply.vectors, strict=True):
        vector = found[item.id].vector
        assert vector is not None
        assert np.allclose(vector, row, atol=1e-6)


def test_texts_of_two_types_are_no_job(server: FakeVoyage) -> None:
    items = [BatchItem(id=kind, text="a", input_type=kind) for kind in ("query", "document")]
    with pytest.raises(errors.RequestRejected, match="one input type"):
        batch_of(server).upload(items, key="k")
    assert server.files == {}


def test_a_file_that_is_not_there_yet_is_waited_for(server: FakeVoyage) -> None:
    batch = batch_of(server)
    reference = batch.upload([BatchItem(id="p-0", text="a")], key="k")
    server.not_ready = 1
    with pytest.raises(errors.InputNotReady) as caught:
        batch.create(reference, key="k")
    assert caught.value.billed == "no"
    assert batch.create(reference, key="k") in server.jobs


def test_which_models_have_batches(server: FakeVoyage) -> None:
    for name, info in MODELS.items():
        batch = embedder(server, name).batch
        assert info.price is not None
        assert (info.price.batch is None) == (batch is None)
        if info.price.batch is not None:
            assert info.price.batch == info.price.immediate * Decimal("0.67")
    assert embedder(server, "voyage-next").batch is not None


def test_a_program_pays_the_price_of_batches(server: FakeVoyage, tmp_path: Path) -> None:
    with EmbeddingClient(
        "voyage:voyage-4",
        options={"base_url": f"{server.url}/v1", "api_key": KEY},
        config={"home": tmp_path, "cache": True},
    ) as client:
        server.not_ready, server.ends_after = 1, 1
        texts = [f"text {number}" for number in range(40)] + ["long " * 27_000]
        job = client.submit_batch(texts)
        result = job.result(poll_interval=0.1)
        assert result.ok.all()
        assert result.usage.tokens == server.meter.billed_tokens
        assert result.usage.cost == Decimal("0.0402") * result.usage.tokens / 1_000_000
        assert client.embed(texts[:40]).reused.all()
    assert server.meter.billed_twice == {}
