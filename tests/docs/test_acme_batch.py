"""Is what the how-to for a provider's author says of batches true, and does its example work?"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest

from embedcore import BatchEmbeddingFailed, EmbeddingClient, errors
from embedcore.provider import protocol
from embedcore.provider.types import BatchItem, BatchStatus
from embedcore.testing.openai.http import Delivery, HttpReply, HttpRequest, Listener, RequestHead
from embedcore.testing.vectors import tokens_of, vector_of, vectors_of

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTH = 16


class AcmeJobs:
    """The service as the page describes it. ``cut``: results end after so many bytes."""

    def __init__(self) -> None:
        self.uploads: dict[str, list[dict[str, str]]] = {}
        self.jobs: list[dict[str, Any]] = []
        self.cut: int | None = None
        self._lock = threading.Lock()

    def unread(self, head: RequestHead) -> Delivery | None:
        return None

    def spools(self, head: RequestHead) -> bool:
        return False

    def answer(self, request: HttpRequest) -> HttpReply:
        with self._lock:
            try:
                found = self._answer(request.method, request.path.strip("/").split("/"), request)
            except LookupError:
                return HttpReply(status=404)
        return HttpReply(body=found if isinstance(found, bytes) else json.dumps(found).encode())

    def _answer(self, method: str, path: list[str], request: HttpRequest) -> object:
        match method, path:
            case "POST", ["uploads"]:
                name = f"upload-{len(self.uploads)}"
                lines = request.body.decode().splitlines()
                self.uploads[name] = [json.loads(line) for line in lines]
                return {"id": name}
            case "GET", ["uploads"]:
                used = {job["upload"] for job in self.jobs}
                return {
                    "uploads": [
                        {"id": name, "used": name in used, "created": 0} for name in self.uploads
                    ]
                }
            case "DELETE", ["uploads", name]:
                del self.uploads[name]
                return {}
            case "POST", ["jobs"]:
                return self._create(cast("dict[str, Any]", request.json()))
            case "GET", ["jobs"]:
                # One on each page.
                start = int(request.query.partition("=")[2] or 0)
                more = start + 1 < len(self.jobs)
                page = self.jobs[start : start + 1]
                return {"jobs": page, "next": f"/jobs?after={start + 1}" if more else None}
            case "GET", ["jobs", name]:
                return self._job(name)
            case "GET", ["jobs", name, "results"]:
                return self._results(self._job(name))[: self.cut]
            case "POST", ["jobs", name, "stop"]:
                return self._job(name)
        raise LookupError(path)

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        texts = len(self.uploads[wanted["upload"]])
        job = {**wanted, "id": f"job-{len(self.jobs)}", "created": len(self.jobs)}
        self.jobs.append({**job, "state": "done", "done": texts, "texts": texts})
        return job

    def _job(self, name: str) -> dict[str, Any]:
        return {job["id"]: job for job in self.jobs}[name]

    def _results(self, job: dict[str, Any]) -> bytes:
        lines: list[dict[str, object]] = []
        for one in reversed(self.uploads[job["upload"]]):
            if "forbidden" in one["text"]:
                lines.append({"id": one["id"], "error": "forbidden"})
                continue
            (vector,) = vectors_of([one["text"]], WIDTH).tolist()
            lines.append({"id": one["id"], "vector": vector, "tokens": tokens_of(one["text"])})
        return "".join(f"{json.dumps(line)}\n" for line in [*lines, {"lines": len(lines)}]).encode()


@pytest.fixture(scope="session")
def page(how_to: Path) -> str:
    return (how_to / "write-a-provider.md").read_text(encoding="utf-8")


@pytest.fixture
def jobs() -> AcmeJobs:
    return AcmeJobs()


@pytest.fixture
def strategy(page: str, plugin: ModuleType, jobs: AcmeJobs) -> Iterator[Any]:
    """The strategy of the page, over a real connection."""
    (code,) = (block for block in BLOCK.findall(page) if "class AcmeBatch:" in block)
    names = dict(vars(plugin))
    exec(code, names)
    listener = Listener(jobs)
    address = listener.url.removeprefix("http://").rstrip("/")
    connections: list[HTTPConnection] = []

    def call(method: str, path: str, body: bytes) -> HTTPResponse:
        connection = HTTPConnection(address, timeout=10)
        connections.append(connection)
        connection.request(method, path, body)
        response = connection.getresponse()
        if response.status == 404:
            response.close()
            raise errors.RemoteGone(f"no {path}", billed="no")
        return response

    yield names["AcmeBatch"]("v1", call)
    for connection in connections:
        connection.close()
    listener.close()


@pytest.fixture
def client(strategy: Any, plugin: ModuleType) -> Iterator[EmbeddingClient]:
    embedder = plugin.AcmeEmbedder("v1", plugin.AcmeOptions(api_key="a key"))
    embedder.batch = strategy
    with closing(EmbeddingClient(embedder=embedder)) as found:
        yield found


def test_texts_become_their_vectors(client: EmbeddingClient, jobs: AcmeJobs) -> None:
    texts = ["a red apple", "a green pear", "a red apple", "été 🍏"]
    vectors = client.batch_embed_texts(texts)
    for text, vector in zip(texts, vectors, strict=True):
        assert np.array_equal(np.array(vector, np.float32), vector_of(text, WIDTH))
    assert [job["texts"] for job in jobs.jobs] == [3]


def test_an_error_of_a_text_is_its_own(client: EmbeddingClient) -> None:
    with pytest.raises(BatchEmbeddingFailed) as failed:
        client.batch_embed_texts(["good", "a forbidden text"])
    assert failed.value.failures == {1: "row 1: forbidden"}


# The last 13 bytes are the line that says how many there were.
@pytest.mark.parametrize("cut", [-1, -13, -20, 0])
def test_results_that_break_off_are_read_again(
    client: EmbeddingClient, jobs: AcmeJobs, cut: int
) -> None:
    jobs.cut = cut
    job = client.submit_batch(["a red apple", "a green pear"])
    (remote,) = job.status().jobs
    assert remote.phase == "collecting"
    assert remote.trouble is not None
    assert "broke off" in remote.trouble
    jobs.cut = None
    assert job.result(poll_interval=0.1).ok.all()
    assert len(jobs.jobs) == 1


def test_a_job_is_found_by_mark_and_by_input_on_every_page(strategy: Any, jobs: AcmeJobs) -> None:
    since = datetime.now(UTC) - timedelta(days=1)
    for number in range(3):
        ref = strategy.upload([BatchItem(id="0", text="a pear")], key=f"key-{number}")
        strategy.create(ref, key=f"key-{number}")
    assert [job.id for job in strategy.find(key="key-2", input_ref="none", since=since)] == [
        "job-2"
    ]
    assert [job.id for job in strategy.find(key="none", input_ref="upload-1", since=since)] == [
        "job-1"
    ]
    assert strategy.find(key="none", input_ref="none", since=since) == []


def test_the_other_methods_keep_their_word(strategy: Any, jobs: AcmeJobs) -> None:
    items = [BatchItem(id="0", text="a pear"), BatchItem(id="1", text="été")]
    ref = strategy.upload(items, key="key")
    assert strategy.sizes(items) == [len(strategy.line(item)) for item in items]
    assert list(strategy.orphans(before=datetime.now(UTC))) == [ref]
    strategy.discard(ref)
    strategy.discard(ref)
    assert list(strategy.orphans(before=datetime.now(UTC))) == []
    with pytest.raises(errors.RemoteGone):
        strategy.create(ref, key="key")
    assert jobs.jobs == []
    name = strategy.create(strategy.upload(items, key="key"), key="key")
    jobs.jobs[0]["state"] = "a word of tomorrow"
    status = strategy.poll(name)
    assert isinstance(status, BatchStatus)
    assert status.state == "running"
    strategy.cancel(name)


def test_every_method_is_in_the_table(page: str) -> None:
    (rows,) = re.findall(r"^\| Method \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    named = {row.split("|")[1].strip(" `").partition("(")[0] for row in rows.splitlines()}
    assert named == {name for name in vars(protocol.BatchStrategy) if not name.startswith("_")}


def test_the_fake_of_the_page_does_what_is_promised(page: str, forks: Any) -> None:
    (code,) = (block for block in BLOCK.findall(page) if "import batch_embedder" in block)
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    strict = "import warnings; warnings.simplefilter('error')\n"
    run = forks(strict + code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out.splitlines() == promised
