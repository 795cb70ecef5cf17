"""Mistral's batches: what is sent, how rows come home, and what a job costs; in both forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from embedcore_mistral.batch import MistralBatch
from embedcore_mistral.plugin import MistralEmbedder, MistralOptions
from fake_mistral import FakeMistral

from embedcore import EmbeddingClient
from embedcore.provider.batch_inline import InlineBatch
from embedcore.provider.batch_lines import LineReader
from embedcore.provider.batch_objects import job_of, results_of, status_of
from embedcore.provider.protocol import BatchStrategy
from embedcore.provider.types import BatchItem, EmbedRequest
from embedcore.testing.batch_service import ServiceBatchContract

KEY = "CANARY0123456789abcdefghijklmnop"
VENDORS = Path(__file__).parents[4] / "shared" / "fixtures" / "vendors"


@pytest.fixture
def server() -> Iterator[FakeMistral]:
    with FakeMistral(key=KEY) as fake:
        yield fake


def embedder(server: FakeMistral, model: str = "mistral-embed", **options: Any) -> MistralEmbedder:
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, **options}
    return MistralEmbedder(model, MistralOptions(**options))


class TestMistralBatch(ServiceBatchContract):
    def strategy_of(self, server: FakeMistral) -> BatchStrategy:
        return embedder(server).batch

    def refused_text(self) -> str:
        return "word " * 9_000


class Inline(InlineBatch):
    """The service's other form, which the provider does not use."""

    jobs, max_items = MistralBatch.jobs, 10_000
    paging = MistralBatch.paging
    line, as_job = MistralBatch.line, MistralBatch.as_job  # type: ignore[assignment]

    def job_of(self, lines: Sequence[Any], mark: str, note: str) -> Any:
        return {
            "endpoint": "/v1/embeddings",
            "model": self.info.model,
            "requests": lines,
            "metadata": {"embedcore": mark},
        }


class TestInline(ServiceBatchContract):
    keeps_inputs = False

    def strategy_of(self, server: FakeMistral) -> BatchStrategy:
        return Inline(embedder(server))

    def uploaded_bytes(self) -> None:
        """Nothing is uploaded before the job."""
        return


@pytest.fixture
def conforms() -> Callable[[str, object], None]:
    """``conforms("BatchJobIn", value)``: a value is what the vendor publishes under that name."""
    path = VENDORS / "specs" / "mistral.openapi.json"
    if not path.is_file():
        pytest.skip("the vendor's specification is not beside the repository")
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    components = json.loads(path.read_text(encoding="utf-8"))["components"]

    def check(name: str, value: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": components}
        wrong = list(jsonschema_rs.Draft202012Validator(schema).iter_errors(value))
        assert not wrong, f"not a {name}: {wrong[0].message}"

    return check


def test_what_is_sent_and_answered_is_what_is_specified(
    server: FakeMistral, conforms: Callable[[str, object], None]
) -> None:
    batch = embedder(server, "codestral-embed", dimensions=64).batch
    reference = batch.upload([BatchItem(id="p-0", text="a")], key="k" * 32)
    job = batch.create(reference, key="k" * 32)
    (asked,) = server.seen
    conforms("BatchJobIn", asked)
    assert asked["metadata"] == {"embedcore": "k" * 32}
    line = json.loads(server.files[reference].content)
    conforms("BatchRequest", line)
    assert line == {"custom_id": "p-0", "body": {"input": ["a"], "output_dimension": 64}}
    conforms("EmbeddingRequest", {"model": "codestral-embed", **line["body"]})
    server.finish()
    conforms("BatchJobOut", server.job_document(server.jobs[job]))
    conforms("UploadFileOut", server.file_document(server.files[reference]))
    (found,) = batch.results(job)
    assert found.vector is not None
    assert found.vector.shape == (64,)


def test_a_recorded_job_is_understood(server: FakeMistral) -> None:
    path = VENDORS / "ruby_llm.batch_with_mistral_mistral-small-latest.json"
    if not path.is_file():
        pytest.skip("the recording is not beside the repository")
    told = [each["body"] for each in json.loads(path.read_text("utf-8"))["interactions"]]
    batch = embedder(server).batch
    states = []
    for document in told:
        canonical = batch.as_job(document)  # type: ignore[attr-defined]
        states.append(status_of(canonical, job_id=document["id"], shown=str))
    assert [each.state for each in states] == ["running"] * 3 + ["completed"] * 2
    assert (states[-1].completed, states[-1].failed, states[-1].total) == (2, 0, 2)
    listed = job_of(canonical)
    assert listed.found is not None
    assert listed.input_ref == told[0]["input_files"][0]
    ended = results_of(canonical, job_id=document["id"], shown=str)
    assert ended is not None
    assert (ended.files, ended.counted) == ([told[-1]["output_file"]], 2)


def test_documented_lines_are_understood() -> None:
    path = VENDORS / "documented.mistral_embedding_batch_output.jsonl"
    if not path.is_file():
        pytest.skip("the documented lines are not beside the repository")
    read = LineReader(shown=str, errors_billed="no").of
    for line, tokens in zip(path.read_text("utf-8").splitlines(), (28, 21, 40), strict=True):
        document = json.loads(line)
        (entry,) = document["response"]["body"]["data"]
        # What the documentation left out, and the texts that it left out with it.
        entry["embedding"].pop()
        entry["index"] = 0
        found = read(document)
        assert (found.id, found.tokens, found.model) == (
            document["custom_id"],
            tokens,
            "mistral-embed",
        )
        assert found.vector is not None
        assert found.vector.tolist() == entry["embedding"]


@pytest.mark.parametrize("kind", [MistralBatch, Inline])
def test_a_job_gives_the_vectors_of_single_requests(server: FakeMistral, kind: Any) -> None:
    one = embedder(server)
    batch = kind(one)
    texts = ["été", "two", "long " * 9_000]
    items = [BatchItem(id=f"p-{place}", text=text) for place, text in enumerate(texts)]
    job = batch.create(batch.upload(items, key="k"), key="k")
    server.finish()
    found = {outcome.id: outcome for outcome in batch.results(job)}
    for item, row in zip(items, one.embed(EmbedRequest(texts=texts[:2])).vectors, strict=False):
        assert found[item.id].vector == pytest.approx(row, abs=1e-6)
    refused = found["p-2"]
    assert refused.vector is None
    assert (refused.too_long, refused.max_tokens) == (True, 8_192)
    assert sum(each.tokens or 0 for each in found.values()) == 3


def test_a_process_that_has_lost_an_inline_input_is_given_it_again(
    server: FakeMistral, tmp_path: Path
) -> None:
    class Forgetful(Inline):
        forgets = 1

        def create(self, input_ref: str, *, key: str) -> str:
            if self.forgets:
                # As in a process that goes on after a crash.
                self.forgets = 0
                self.discard(input_ref)
            return super().create(input_ref, key=key)

    made = embedder(server)
    strategy = Forgetful(made)

    class WithInline(MistralEmbedder):
        batch = strategy  # type: ignore[assignment]

    options = MistralOptions(base_url=f"{server.url}/v1", api_key=KEY)
    server.ends_after = 0
    with EmbeddingClient(
        embedder=WithInline("mistral-embed", options), config={"home": tmp_path}
    ) as client:
        result = client.submit_batch(["a", "b"]).result(poll_interval=0.05)
        assert result.ok.all()
    assert strategy.forgets == 0
    assert len(server.jobs) == 1
    assert server.meter.billed_twice == {}


def test_a_program_pays_the_price_of_batches(server: FakeMistral, tmp_path: Path) -> None:
    with EmbeddingClient(
        "mistral:mistral-embed",
        options={"base_url": f"{server.url}/v1", "api_key": KEY},
        config={"home": tmp_path, "cache": True},
    ) as client:
        server.ends_after = 1
        texts = [f"text {number}" for number in range(40)] + ["long " * 9_000]
        result = client.submit_batch(texts).result(poll_interval=0.1)
        assert result.ok.all()
        assert result.usage.tokens == server.meter.billed_tokens
        assert result.usage.cost == Decimal("0.05") * result.usage.tokens / 1_000_000
        assert client.embed(texts[:40]).reused.all()
    assert server.meter.billed_twice == {}
