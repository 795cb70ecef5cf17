"""A call that names no input type is one for stored texts: one request, one key, one bill."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from embedcore import EmbeddingClient
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import ModelInfo
from embedcore.testing import FakeEmbedder
from embedcore.testing.fakes.embedder import FAKE_INFO

batch_desk = run_path(str(Path(__file__).with_name("batch") / "batch_desk.py"))["batch_desk"]

TYPES = ("query", "document", "clustering")
BEFORE = replace(FAKE_INFO, dimensions=8, input_types=TYPES)
NOW = replace(BEFORE, default_input_type="document")

Open = Callable[[ModelInfo], tuple[EmbeddingClient, FakeEmbedder]]


@pytest.fixture
def open_one(home: Path) -> Iterator[Open]:
    opened: list[EmbeddingClient] = []

    def open_one(info: ModelInfo) -> tuple[EmbeddingClient, FakeEmbedder]:
        fake = FakeEmbedder(info=info)
        opened.append(EmbeddingClient(embedder=fake, config={"home": home, "cache": True}))
        return opened[-1], fake

    yield open_one
    for client in opened:
        client.close()


def test_the_service_is_told_the_type_of_stored_texts(open_one: Open) -> None:
    client, fake = open_one(NOW)
    client.embed(["a"])
    client.embed(["b"], input_type="query")
    assert [call.input_type for call in fake.calls] == ["document", "query"]


def test_no_type_and_that_of_stored_texts_are_billed_once(open_one: Open) -> None:
    client, fake = open_one(NOW)
    for kind in (None, "document", None):
        client.embed(["a"], input_type=kind)
    client.embed_documents(["a"])
    assert fake.meter.billed_requests == 1
    assert client.plan(["a"]).requests == 0
    assert client.plan(["a"], input_type="query").requests == 1


def test_each_text_of_each_type_is_billed_once(open_one: Open) -> None:
    client, fake = open_one(NOW)
    numbers = itertools.count()

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, *TYPES]))))
    def is_billed_once(calls: list[tuple[str, str | None]]) -> None:
        number, before = next(numbers), fake.meter.billed_requests
        for text, kind in calls:
            client.embed([f"{text} {number}"], input_type=kind)
        different = {(text, kind or "document") for text, kind in calls}
        assert fake.meter.billed_requests - before == len(different)

    is_billed_once()


def test_what_was_kept_before_the_default_was_named_is_found(open_one: Open) -> None:
    before, _ = open_one(BEFORE)
    vectors = before.embed(["a", "b"]).vectors
    client, fake = open_one(NOW)
    for kind in (None, "document"):
        assert client.plan(["a", "b"], input_type=kind).requests == 0
        result = client.embed(["a", "b"], input_type=kind)
        assert result.reused.all()
        assert (result.vectors == vectors).all()
    assert fake.meter.billed_requests == 0
    # It is no vector of another type.
    assert not client.embed(["a"], input_type="query").reused.any()


def test_without_a_default_no_type_stays_a_kind_of_its_own(open_one: Open) -> None:
    client, fake = open_one(BEFORE)
    client.embed(["a"])
    client.embed(["a"], input_type="document")
    assert [call.input_type for call in fake.calls] == [None, "document"]


def test_a_batch_takes_what_is_there_under_either_key(batch_desk: Any) -> None:
    batch_desk.provide(info=replace(BEFORE, dimensions=32))
    batch_desk.work(batch_desk.submit(["a", "b"]))
    batch_desk.provide(info=replace(NOW, dimensions=32))
    for kind in (None, "document"):
        job = batch_desk.work(batch_desk.submit(["a", "b"], input_type=kind))
        batch_desk.check(job, ["a", "b"])
    # It is the meter of the second service.
    assert batch_desk.meter.billed_texts == {}
    for kind in (None, "document"):
        batch_desk.work(batch_desk.submit(["c"], input_type=kind))
    assert batch_desk.meter.billed_texts == {"c": 1}


@pytest.mark.case("A9")
@pytest.mark.parametrize(
    ("truncation", "doubtful"), [("error", set()), ("unknown", {0}), ("silent", {0})]
)
def test_what_a_service_that_refuses_long_texts_answers_is_whole(
    home: Path, truncation: Any, doubtful: set[int]
) -> None:
    info = replace(FAKE_INFO, dimensions=8, max_input_tokens=100, truncation=truncation)
    fake = FakeEmbedder(info=info, tokenizer=EstimatingTokenizer())
    with EmbeddingClient(embedder=fake, config={"home": home}) as client:
        result = client.embed(["several words " * 10, "short"])
    assert result.perhaps_cut == doubtful
