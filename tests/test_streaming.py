"""The streaming forms at the front door: over a socket, with the store, with memory in bounds."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from embedcore import Block, ConfigurationError, EmbeddingClient, EmbeddingError, InputRejected
from embedcore.testing import FakeOpenAI, vectors_of

WIDTH = 8


@pytest.fixture
def server():
    with FakeOpenAI() as server:
        yield server


@pytest.fixture
def client(server):
    options = {"base_url": server.base_url, "api_key": server.api_key, "dimensions": WIDTH}
    with EmbeddingClient(options=options) as client:
        yield client


def right(blocks, texts):
    assert [text for block in blocks for text in block.rows] == texts
    for block in blocks:
        assert isinstance(block, Block)
        assert (block.vectors == vectors_of(list(block.rows), WIDTH)).all()


def test_a_text_that_comes_again_is_paid_for_once_in_the_whole_stream(client, server):
    texts = [f"text {number % 7}" for number in range(100)]
    blocks = list(client.embed_iter(texts, block_size=5))
    right(blocks, texts)
    assert server.meter.billed_texts == {f"text {number}": 1 for number in range(7)}
    again = list(client.embed_iter(iter(texts), block_size=30))
    right(again, texts)
    assert all(block.reused.all() for block in again)
    assert sum(block.usage.tokens for block in again) == 0
    assert server.meter.billed_texts.total() == 7


def test_without_the_store_everything_is_billed_anew(client, server):
    for _ in range(2):
        right(list(client.embed_iter(["a", "b"], cache=False)), ["a", "b"])
    assert server.meter.billed_texts == {"a": 2, "b": 2}


def test_both_forms_side_by_side(client):
    texts = [f"text {number}" for number in range(50)]

    async def go():
        async def one(size):
            return [block async for block in client.aembed_iter(texts, block_size=size)]

        return await asyncio.gather(one(3), one(7), one(None))

    for blocks in asyncio.run(go()):
        right(blocks, texts)


def test_the_type_of_text_is_told_and_checked(client):
    right(list(client.embed_iter(["a"], input_type="document")), ["a"])
    with pytest.raises(ConfigurationError, match="input_type"):
        list(client.embed_iter(["a"], input_type="poem"))


@pytest.mark.parametrize("rows", ["one text", {"a": 1}, {"a"}, 7])
def test_what_is_no_stream_is_refused_at_once(client, rows):
    for form in (client.embed_iter, client.aembed_iter):
        with pytest.raises(InputRejected, match="iterable of rows"):
            form(rows)


# A connection that was just being made when the pool was closed is left to the garbage collector by
# the HTTP library.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_client_that_is_closed_in_the_middle_ends_the_stream_and_can_be_used_again(
    client, server
):
    stream = client.embed_iter((f"text {number}" for number in range(10_000)), block_size=2)
    first = next(stream)
    right([first], ["text 0", "text 1"])
    client.close()
    with pytest.raises(EmbeddingError):
        list(stream)
    right(list(client.embed_iter(["text 0"])), ["text 0"])
    assert server.meter.billed_twice == {}


MEMORY = """
import json, sys, time
from dataclasses import replace
import numpy as np
from embedcore import EmbeddingClient
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.types import EmbedReply
from embedcore.testing.fakes.embedder import FAKE_INFO, FakeTokenizer

class Fast(BaseEmbedder):
    info = replace(FAKE_INFO, dimensions=1536, max_texts_per_request=2048,
                   best_texts_per_request=128, max_concurrency=16)
    tokenizer = FakeTokenizer()
    def embed(self, request):
        time.sleep(0.005)
        vectors = np.empty((len(request.texts), 1536), dtype=np.float32)
        vectors[:] = [[float(text.split()[1])] for text in request.texts]
        return EmbedReply(vectors=vectors, tokens=len(request.texts), model=self.info.model)
    def close(self):
        pass

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

with EmbeddingClient(embedder=Fast(), config={"cache": False, "concurrency": 16}) as client:
    list(client.embed_iter(["row 0"]))
    base, rows = status("VmRSS"), 0
    for block in client.embed_iter(f"row {n} " + "x" * 400 for n in range(40_000)):
        assert (block.vectors[:, 0] == np.arange(rows, rows + len(block))).all()
        rows += len(block)
    print(json.dumps({"rows": rows, "grown": status("VmHWM") - base}))
"""


@pytest.mark.fault(8)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_stream():
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(answer.stdout)
    assert found["rows"] == 40_000
    # The vectors alone are 234 MB.
    assert found["grown"] < 110


@pytest.mark.parametrize("form", ["embed_iter", "aembed_iter"])
def test_what_is_no_sequence_of_rows_opens_nothing(client, form):
    with pytest.raises(InputRejected):
        getattr(client, form)("one text")
    assert not client._opened.is_there
