"""Gemini's batches: what is sent, how rows come home, what is believed of them, what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedcore_gemini.batch import GeminiBatch
from embedcore_gemini.plugin import GeminiEmbedder, GeminiOptions
from fake_gemini import FakeGemini

from embedcore import EmbeddingClient, errors
from embedcore.provider.batch_lines import LineReader
from embedcore.provider.batch_objects import job_of, status_of
from embedcore.provider.protocol import BatchStrategy
from embedcore.provider.types import BatchItem, EmbedRequest
from embedcore.testing.batch_service import ServiceBatchContract

KEY = "AIza-CANARY0123456789abcdefghijk"
VENDORS = Path(__file__).parents[4] / "shared" / "fixtures" / "vendors"


@pytest.fixture
def server() -> Iterator[FakeGemini]:
    with FakeGemini(key=KEY) as fake:
        yield fake


def embedder(
    server: FakeGemini, model: str = "gemini-embedding-001", **options: Any
) -> GeminiEmbedder:
    options = {"base_url": f"{server.url}/v1beta", "api_key": KEY, "dimensions": 64, **options}
    return GeminiEmbedder(model, GeminiOptions(**options))


class TestGeminiBatch(ServiceBatchContract):
    def strategy_of(self, server: FakeGemini) -> BatchStrategy:
        return embedder(server).batch

    def refused_text(self) -> str:
        return ""


def test_what_is_sent_is_what_is_documented(server: FakeGemini) -> None:
    batch = embedder(server).batch
    reference = batch.upload([BatchItem(id="p-0", text="a", input_type="query")], key="k" * 32)
    batch.create(reference, key="k" * 32)
    assert server.paths == ["/v1beta/models/gemini-embedding-001:asyncBatchEmbedContent"]
    assert server.seen == [
        {
            "batch": {
                "displayName": f"embedcore-{'k' * 32}",
                "inputConfig": {"fileName": f"files/{reference}"},
            }
        }
    ]
    assert json.loads(server.files[reference].content) == {
        "key": "p-0",
        "request": {
            "content": {"parts": [{"text": "a"}]},
            "taskType": "RETRIEVAL_QUERY",
            "outputDimensionality": 64,
        },
    }


def test_a_recorded_job_is_understood(server: FakeGemini) -> None:
    path = VENDORS / "ruby_llm.batch_with_gemini_gemini-2_5-flash.json"
    if not path.is_file():
        pytest.skip("the recording is not beside the repository")
    told = [each["body"] for each in json.loads(path.read_text("utf-8"))["interactions"]]
    batch = GeminiBatch(embedder(server))
    found = [batch.as_job(document) for document in told]
    job = told[0]["name"].removeprefix("batches/")
    states = [status_of(each, job_id=job, shown=str) for each in found]
    assert [each.state for each in states] == ["running", "running", "completed"]
    assert (states[-1].completed, states[-1].failed, states[-1].total) == (2, 0, 2)
    listed = job_of(found[-1]).found
    assert listed is not None
    assert listed.created_at is not None
    assert f"{listed.created_at:%Y-%m-%d %H:%M:%S.%f}" == "2026-08-19 14:34:12.267870"


def test_recorded_rows_are_understood(server: FakeGemini) -> None:
    path = VENDORS / "google_cookbook.gemini_embedding_batch_output.jsonl"
    if not path.is_file():
        pytest.skip("the recording is not beside the repository")
    reader = LineReader(
        shown=str, errors_billed="no", as_line=GeminiBatch(embedder(server)).as_line
    )
    lines = path.read_bytes().splitlines()
    for line, name, width in zip(lines, ("request_1", "request_2"), (3, 4), strict=True):
        found = reader.read(line)
        assert (found.id, found.tokens, found.error) == (name, 1, None)
        assert found.vector is not None
        assert found.vector.tolist() == pytest.approx(
            json.loads(line)["response"]["embedding"]["values"]
        )
        assert found.vector.shape == (width,)


@pytest.mark.parametrize(
    "odd",
    [
        b"{}",
        b"[]",
        b'{"key": 3, "response": {}}',
        b'{"key": "a", "response": {"embedding": 7}}',
        b"{",
    ],
)
def test_a_row_of_another_form_is_no_vector(server: FakeGemini, odd: bytes) -> None:
    reader = LineReader(
        shown=str, errors_billed="no", as_line=GeminiBatch(embedder(server)).as_line
    )
    found = reader.read(odd)
    assert found.vector is None
    assert found.error


@pytest.mark.parametrize("model", ["gemini-embedding-001", "gemini-embedding-2"])
def test_a_job_gives_the_vectors_of_single_requests(server: FakeGemini, model: str) -> None:
    one = embedder(server, model)
    batch = one.batch
    texts = ["été", "two", ""]
    items = [BatchItem(id=f"p-{place}", text=text) for place, text in enumerate(texts)]
    job = batch.create(batch.upload(items, key="k"), key="k")
    assert batch.poll(job).state == "running"
    server.finish()
    found = {outcome.id: outcome for outcome in batch.results(job)}
    rows = one.embed(EmbedRequest(texts=texts[:2])).vectors
    for item, row in zip(items, rows, strict=False):
        vector = found[item.id].vector
        assert vector is not None
        # As single ones: the service leaves those of one model shorter than 1.
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        assert vector == pytest.approx(row, abs=1e-6)
    # With words before it, no text is empty.
    assert ("empty" in str(found["p-2"].error)) == (model == "gemini-embedding-001")


def client_of(server: FakeGemini, home: Path, **config: Any) -> EmbeddingClient:
    return EmbeddingClient(
        "gemini:gemini-embedding-001",
        options={"base_url": f"{server.url}/v1beta", "api_key": KEY, "dimensions": 64},
        config={"home": home, "cache": True, **config},
    )


def test_sixteen_rows_are_checked_and_the_bill_is_that_of_both(
    server: FakeGemini, tmp_path: Path
) -> None:
    with client_of(server, tmp_path) as client:
        server.ends_after = 1
        texts = [f"text {number:04d}" for number in range(200)]
        job = client.submit_batch(texts)
        result = job.result(poll_interval=0.1)
        assert result.ok.all()
        # Nine bytes are three tokens; a single request of this model does not say what it costs,
        # and what was reserved counts: a token for each byte.
        batch, single = 200 * 3, 16 * 9
        assert server.meter.billed_tokens == batch + 16 * 3
        price = Decimal("0.075") * batch + Decimal("0.15") * single
        assert result.usage.cost == price / 1_000_000
        assert result.usage.tokens == batch + single
        assert client.embed(texts).reused.all()
    assert len(server.meter.billed_twice) == 16
    assert sum(len(asked.get("requests", [])) for asked in server.seen) == 16


def test_a_plan_has_the_rows_that_are_checked(server: FakeGemini, tmp_path: Path) -> None:
    with client_of(server, tmp_path) as client:
        texts = [f"text {number:04d}" for number in range(200)]
        plan = client.plan(texts, batch=True)
        at_once = client.plan(texts)
        assert at_once.tokens == 200 * 9
        assert plan.tokens == 216 * 9
        assert plan.cost == (Decimal("0.075") * 200 * 9 + Decimal("0.15") * 16 * 9) / 1_000_000
    assert server.seen == []


def test_rows_of_a_job_that_mixes_them_are_withheld(server: FakeGemini, tmp_path: Path) -> None:
    with client_of(server, tmp_path) as client:
        server.mixes, server.ends_after = 200, 1
        texts = [f"text {number:04d}" for number in range(200)]
        job = client.submit_batch(texts)
        with pytest.raises(errors.BatchEmbeddingFailed) as caught:
            job.result(poll_interval=0.1)
        # What was compared came from single requests, and is all that is kept.
        assert len(caught.value.failures) == 184
        why = set(caught.value.failures.values())
        assert all("are not those of its texts" in reason for reason in why)
        assert len(server.jobs) == 1
        assert int(client.embed(texts).reused.sum()) == 16


def test_a_service_that_is_away_decides_nothing(server: FakeGemini, tmp_path: Path) -> None:
    class Away(GeminiEmbedder):
        away = True

        def embed(self, request: EmbedRequest) -> Any:
            if self.away:
                raise errors.PermissionDenied("away", billed="no")
            return super().embed(request)

    options = GeminiOptions(base_url=f"{server.url}/v1beta", api_key=KEY, dimensions=64)
    made = Away("gemini-embedding-001", options)
    server.ends_after = 0
    with EmbeddingClient(embedder=made, config={"home": tmp_path}) as client:
        job = client.submit_batch(["a", "b"])
        assert job.status().ended is None
        made.away = False
        assert job.result(poll_interval=0.05).ok.all()
    assert len(server.jobs) == 1
