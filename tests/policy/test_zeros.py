"""A vector of zeros says nothing: whoever got it is told, and nobody else gets it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest

from embedcore import EmbeddingClient
from embedcore.provider.types import BatchOutcome, EmbedReply
from embedcore.testing import FakeEmbedder, FakeOpenAI, vectors_of
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

batch_desk = run_path(str(Path(__file__).with_name("batch") / "batch_desk.py"))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(6)]
BAD = {1, 4}


class SometimesZeros(FakeEmbedder):
    """Zeros for the texts that are bad just now."""

    bad: frozenset[str] = frozenset()
    asked: int = 0
    gate: threading.Event | None = None

    def embed(self, request: Any) -> EmbedReply:
        self.asked += len(request.texts)
        if self.gate is not None:
            self.gate.wait(60)
        reply = super().embed(request)
        vectors = np.array(reply.vectors)
        for row, text in enumerate(request.texts):
            if text in self.bad:
                vectors[row] = -0.0 if row % 2 else 0.0
        return EmbedReply(vectors=vectors, tokens=reply.tokens, model=reply.model)


@pytest.fixture
def embedder() -> SometimesZeros:
    one = SometimesZeros()
    one.bad = frozenset(TEXTS[row] for row in BAD)
    return one


@pytest.fixture
def client(embedder: Any, tmp_path: Path) -> Any:
    with EmbeddingClient(embedder=embedder, config={"home": tmp_path, "cache": True}) as made:
        yield made


# At once


@pytest.mark.case("C12")
@pytest.mark.fault(41)
def test_zeros_are_flagged_and_never_kept(
    client: Any, embedder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="embedcore")
    result = client.embed(TEXTS)
    assert result.ok.all()
    assert set(np.flatnonzero(result.zeros)) == BAD
    assert "zeros" in caplog.text
    plan = client.plan(TEXTS)
    assert (plan.cached, plan.to_embed) == (4, 2)

    embedder.bad = frozenset()
    again = client.embed(TEXTS)
    assert {row for row in range(6) if not again.reused[row]} == BAD, "the others are billed"
    assert (again.vectors == vectors_of(TEXTS, again.vectors.shape[1])).all()
    assert not again.zeros.any()
    assert client.embed(TEXTS).reused.all()
    assert embedder.asked == 8


@pytest.mark.case("C12")
def test_nor_are_those_of_a_stream(client: Any, embedder: Any) -> None:
    (block,) = list(client.embed_iter(TEXTS))
    assert set(np.flatnonzero(block.zeros)) == BAD
    assert client.plan(TEXTS).to_embed == 2


@pytest.mark.case("C12")
def test_a_call_that_waits_for_another_ones_purchase_asks_itself(
    client: Any, embedder: Any, tmp_path: Path
) -> None:
    embedder.gate = threading.Event()
    results: dict[str, Any] = {}
    first = threading.Thread(target=lambda: results.update(first=client.embed(TEXTS)))
    first.start()
    while not embedder.asked:
        first.join(0.002)
    second = threading.Thread(target=lambda: results.update(second=client.embed(TEXTS)))
    second.start()
    embedder.gate.set()
    first.join(60)
    second.join(60)
    assert set(np.flatnonzero(results["first"].zeros)) == BAD
    assert embedder.asked in (8, 12), "for the zeros at least it asked itself"
    assert client.plan(TEXTS).to_embed == 2


@pytest.mark.case("C12")
def test_zeros_that_are_in_a_file_of_before_are_no_hit(client: Any, embedder: Any) -> None:
    embedder.bad = frozenset()
    client.embed(TEXTS)
    store = client._engine.cache.store
    keys = client_keys(client, TEXTS[:3])
    for key in keys:
        store.drop(key)
    from embedcore.storage.keys import Origin

    origin = Origin(model=client._engine.label, fingerprint=client.fingerprint)
    store.put(keys, np.zeros((3, 32), dtype=np.float32), origin, zeros=True)
    assert client.plan(TEXTS).cached == 3
    again = client.embed(TEXTS)
    assert not again.zeros.any()
    assert again.reused.tolist() == [False] * 3 + [True] * 3
    assert client.embed(TEXTS).reused.all(), "what was billed took their place"


def client_keys(client: Any, texts: list[str]) -> list[bytes]:
    from embedcore.policy.immediate.reuse import keys_of

    return keys_of(client._engine, None).of(texts)


# In a batch


def with_zeros(batch_desk: Any) -> Any:
    """A batch whose results have zeros for the bad rows."""
    truth = batch_desk.strategy.results

    def results(job_id: str) -> Any:
        bad = {f"-{row}" for row in BAD}
        for outcome in truth(job_id):
            if any(outcome.id.endswith(one) for one in bad) and job_id == batch_desk.jobs[0].id:
                zeros = np.zeros(32, dtype=np.float32)
                yield BatchOutcome(id=outcome.id, vector=zeros, tokens=2, model=outcome.model)
            else:
                yield outcome

    batch_desk.strategy.results = results
    return batch_desk.submit(TEXTS, cache=True)


@pytest.mark.case("C12")
@pytest.mark.fault(41)
def test_zeros_of_a_batch_are_kept_and_flagged(
    batch_desk: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="embedcore")
    job = with_zeros(batch_desk)
    batch_desk.work(job)
    assert "zeros for 2 texts of a batch" in caplog.text
    assert (job.status().stored, job.status().failed) == (6, 0)
    result = batch_desk.client().batch_job(job.id).result()
    assert result.ok.all()
    assert set(np.flatnonzero(result.zeros)) == BAD
    (block,) = job.blocks()
    assert set(np.flatnonzero(block.zeros)) == BAD
    batch_desk.check_money()


@pytest.mark.case("C12")
def test_zeros_of_a_batch_are_no_hit_for_another_call(batch_desk: Any) -> None:
    job = batch_desk.work(with_zeros(batch_desk))
    client = batch_desk.client(cache=True)
    assert client.plan(TEXTS).to_embed == 2
    again = client.embed(TEXTS)
    assert {row for row in range(6) if not again.reused[row]} == BAD
    assert not again.zeros.any()
    # Vectors belong to texts: the batch has the better ones by now as well.
    assert not job.result().zeros.any()


@pytest.mark.case("C12")
def test_nor_for_another_batch(batch_desk: Any) -> None:
    first = batch_desk.work(with_zeros(batch_desk))
    second = batch_desk.client().submit_batch([*TEXTS, "another"])
    assert len(batch_desk.service.input_lines(batch_desk.jobs[1].input_file_id)) == 3
    (block,) = second.blocks()
    missing = {row for row in range(7) if not block.ok[row]}
    assert missing == {*BAD, 6}, "what it waits for is not what another one got"
    batch_desk.work(second)
    batch_desk.check(second, [*TEXTS, "another"])
    assert not first.result().zeros.any()


@pytest.mark.case("C12")
def test_a_batch_that_never_gets_them_says_so(batch_desk: Any) -> None:
    batch_desk.work(with_zeros(batch_desk))
    batch_desk.service.fail_lines("text 01", status=400, message="not this one")
    second = batch_desk.work(batch_desk.client().submit_batch(TEXTS))
    result = second.result(on_error="keep")
    assert not result.ok[1]
    assert "not this one" in str(result.errors[1])
    assert np.isnan(result.vectors[1]).all()


@pytest.mark.case("C12")
def test_fetch_says_how_many_rows_have_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from embedcore.cli import main
    from embedcore.testing.openai import batch_lines as batchoutput

    def some_zeros(texts: list[str], width: int, *, salt: str = "") -> Any:
        vectors = vectors_of(texts, width, salt=salt)
        vectors[[text == "bad" for text in texts]] = 0
        return vectors

    monkeypatch.setattr(batchoutput, "vectors_of", some_zeros)
    with FakeOpenAI(batch=BatchSettings(progress=Progress(polls=1))) as server:
        monkeypatch.setenv("OPENAI_API_KEY", str(server.api_key))
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        Path("embedcore.toml").write_text("[options.openai]\nbatch = true\n")
        Path("texts.txt").write_text("good\nbad\nfine\n")
        assert main(["batch", "submit", "texts.txt", "--yes", "--wait", "--interval", "0.01"]) == 0
        capsys.readouterr()
        assert main(["batch", "list", "--all", "--json"]) == 0
        import json

        name = json.loads(capsys.readouterr().out)["batches"][0]["id"]
        assert main(["batch", "fetch", name, "-o", "v.npy"]) == 0
        assert "1 row with a vector of zeros" in capsys.readouterr().out
        assert main(["batch", "fetch", name, "-o", "v.npy", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["zero_rows"] == 1
    assert (~np.load("v.npy").any(axis=1)).tolist() == [False, True, False]
