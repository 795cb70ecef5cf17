"""Every way in takes the same things as texts, and refuses the same ones before it sends any."""

from __future__ import annotations

import asyncio
from collections import UserDict

import numpy as np
import pytest

from embedcore import EmbeddingClient, InputRejected
from embedcore.testing.fakes.batch import batch_embedder

TEXTS = ["one", "two", "three", "two"]
QUICK = 0.02


@pytest.fixture
def embedder():
    return batch_embedder()


@pytest.fixture
def client(embedder):
    with EmbeddingClient(embedder=embedder) as client:
        yield client


async def _all(stream):
    return [block async for block in stream]


def _keys_of(blocks):
    return [key for block in blocks for key in block.keys if block.ok.all()]


def _waited_for(job):
    job.wait(poll_interval=QUICK)
    return range(job.status().rows)


# Each returns what has one element for each row.
WAYS = {
    "embed": lambda client, given: client.embed(given).vectors,
    "embed_texts": lambda client, given: client.embed_texts(given),
    "embed_documents": lambda client, given: client.embed_documents(given),
    "aembed": lambda client, given: asyncio.run(client.aembed(given)).vectors,
    "aembed_texts": lambda client, given: asyncio.run(client.aembed_texts(given)),
    "aembed_documents": lambda client, given: asyncio.run(client.aembed_documents(given)),
    "embed_iter": lambda client, given: _keys_of(client.embed_iter(given)),
    "aembed_iter": lambda client, given: _keys_of(asyncio.run(_all(client.aembed_iter(given)))),
    "batch_embed_texts": lambda client, given: client.batch_embed_texts(given, QUICK),
    "submit_batch": lambda client, given: _waited_for(client.submit_batch(given)),
    "plan": lambda client, given: range(client.plan(given).rows),
    "plan of a batch": lambda client, given: range(client.plan(given, batch=True).rows),
}
UNSENT = {"plan", "plan of a batch"}


def nothing_was_sent(embedder):
    assert embedder.meter.billed_requests == 0
    assert list(embedder.batch.service.jobs) == []


def given_as_table(kind):
    pa = pytest.importorskip("pyarrow")
    columns = {"id": list(range(4)), "text": TEXTS}
    return {"mapping": UserDict(columns), "Table": pa.table(columns), "dict": columns}[kind]


@pytest.mark.case("A10")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["mapping", "dict", "Table"])
def test_a_table_is_refused_wherever_texts_are_taken(client, embedder, way, kind):
    with pytest.raises(InputRejected, match=r"'id', 'text'.*\[\"text\"\]"):
        WAYS[way](client, given_as_table(kind))
    nothing_was_sent(embedder)


@pytest.mark.case("A11")
# One function takes all of them in, from a call, a stream and a batch.
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        *((way, "array") for way in WAYS),
        *(
            (way, kind)
            for way in ("embed", "embed_iter", "submit_batch")
            for kind in ("chunked", "scalars", "numpy", "0-d")
        ),
    ],
)
def test_an_array_is_taken_wherever_texts_are(client, embedder, way, kind):
    pa = pytest.importorskip("pyarrow")
    array = pa.array(TEXTS)
    given = {
        "array": array,
        "chunked": pa.chunked_array([array[:1], array[1:]]),
        "scalars": list(array),
        "numpy": np.array(TEXTS, dtype=object),
        "0-d": [np.array(text) for text in TEXTS],
    }[kind]
    assert len(WAYS[way](client, given)) == len(TEXTS)
    sent = embedder.meter.billed_texts | embedder.batch.service.meter.billed_texts
    assert {type(text) for text in sent} <= {str}
    assert set(sent) == (set() if way in UNSENT else set(TEXTS))


@pytest.mark.case("A10")
@pytest.mark.parametrize("way", WAYS)
def test_a_missing_element_is_refused_by_its_row_wherever_texts_are_taken(client, embedder, way):
    pa = pytest.importorskip("pyarrow")
    given = pa.array(["one", None])
    if "plan" in way:
        assert client.plan(given, batch="batch" in way).rejected == 1
        return
    with pytest.raises(InputRejected, match="row 1 is of type NoneType") as caught:
        WAYS[way](client, given)
    assert caught.value.position == 1


@pytest.mark.case("A11")
def test_one_text_may_be_a_scalar_and_no_table(client, embedder):
    pa = pytest.importorskip("pyarrow")
    for one in (pa.scalar("one"), np.array("one"), np.str_("one")):
        assert client.embed_query(one) == client.embed_text("one")
        assert asyncio.run(client.aembed_query(one)) == client.embed_text("one")
    for form in (client.embed_query, client.embed_text):
        with pytest.raises(InputRejected, match="'id', 'text'"):
            form(given_as_table("Table"))


@pytest.mark.case("A11")
def test_keys_of_a_batch_may_be_scalars(client):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"id": ["x", "y"], "text": ["one", "two"]})
    job = client.submit_batch(zip(*table.columns, strict=True))
    job.wait(poll_interval=QUICK)
    assert _keys_of(job.blocks()) == ["x", "y"]
