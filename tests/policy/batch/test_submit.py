"""From rows to a batch: everything is there, or nothing is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from embedcore.errors import ConfigurationError, InputRejected, StorageFull
from embedcore.provider.types import Price
from embedcore.storage.amounts import Amount
from embedcore.testing import vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3
        )
    ),
    max_leaves=5,
)


class Named(NamedTuple):
    name: str
    body: str


def nothing_is_left(batch_desk: Any, client: Any) -> None:
    assert batch_desk.strategy.calls == []
    assert client.batch_jobs() == []
    assert batch_desk.files == []
    assert batch_desk.spent().held == batch_desk.spent().spent == Amount()


def keys_in(job: Any, size: int = 3) -> list[Any]:
    return [key for block in job.blocks(size) for key in block.keys]


# Keys and columns


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(keys=st.lists(json_values, min_size=1, max_size=8))
def test_a_key_that_json_has_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, keys: list[Any]
) -> None:
    made = batch_desk.__wrapped__(tmp_path_factory.mktemp("keys"))
    one = next(made)
    job = one.submit([(key, f"text {number}") for number, key in enumerate(keys)])
    # As another process reads them.
    again = one.client().batch_job(job.id)
    assert [(type(key), key) for key in keys_in(again)] == [(type(key), key) for key in keys]
    made.close()


@pytest.mark.parametrize(
    "key",
    [b"bytes", object(), (1, 2), {1: "x"}, float("nan"), {"a": float("inf")}, "\ud800", {"set"}],
    ids=lambda key: type(key).__name__,
)
@pytest.mark.parametrize("on_error", ["raise", "keep"])
def test_any_other_key_is_refused_with_its_position(
    batch_desk: Any, key: object, on_error: str
) -> None:
    client = batch_desk.client()
    with pytest.raises(InputRejected, match="row 1 has a key") as refused:
        client.submit_batch([("fine", "a"), (key, "b")], on_error=on_error)
    assert refused.value.position == 1
    nothing_is_left(batch_desk, client)


def test_rows_without_a_key_have_their_number(batch_desk: Any) -> None:
    assert keys_in(batch_desk.submit(["a", "b", "a", "c", "d"])) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("rows", "how"),
    [
        ([{"id": "x", "t": "a"}, {"id": "y", "t": "b"}], {"text": "t", "key": "id"}),
        ([["x", 0, "a"], ["y", 1, "b"]], {"text": 2, "key": 0}),
        ([Named("x", "a"), Named("y", "b")], {"text": "body", "key": "name"}),
        ([("x", "a"), ("y", "b")], {}),
    ],
)
def test_columns_are_named_as_for_a_stream(batch_desk: Any, rows: Any, how: Any) -> None:
    job = batch_desk.work(batch_desk.submit(iter(rows), **how))
    found = {key: vector for block in job.blocks() for key, vector in block}
    assert list(found) == ["x", "y"]
    for key, text in (("x", "a"), ("y", "b")):
        assert (found[key] == vectors_of([text], 32)[0]).all()


# What is billed


def test_equal_texts_are_billed_once_however_far_apart(batch_desk: Any) -> None:
    texts = [f"text {number % 4_500}" for number in range(9_200)]
    job = batch_desk.work(batch_desk.submit(texts))
    assert batch_desk.meter.billed_requests == 4_500
    result = batch_desk.check(job, texts)
    report = job.status()
    assert (report.rows, report.texts, report.stored) == (9_200, 4_500, 4_500)
    assert int(result.reused.sum()) > 0


def test_what_was_billed_before_is_neither_sent_nor_held(batch_desk: Any) -> None:
    texts = ["one", "two", "three"]
    batch_desk.client().embed(texts[:2])
    spent = batch_desk.spent().spent
    job = batch_desk.submit(texts)
    assert batch_desk.spent().held.tokens == 2
    batch_desk.work(job)
    assert batch_desk.check(job, texts).reused.tolist() == [True, True, False]
    assert job.status().reused == 2
    assert batch_desk.meter.billed_texts == {"three": 1}
    assert batch_desk.spent().spent.tokens == spent.tokens + 2


def test_if_everything_was_billed_before_there_is_no_job(batch_desk: Any) -> None:
    texts = ["one", "two"]
    batch_desk.client().embed(texts)
    job = batch_desk.submit(texts)
    assert job.record.has_ended
    assert batch_desk.strategy.calls == []
    assert batch_desk.check(job, texts).usage.tokens == 0


def test_no_rows_are_a_batch_that_has_ended(batch_desk: Any) -> None:
    job = batch_desk.submit([])
    assert job.status().state == "done"
    assert job.result().vectors.shape == (0, 32)
    assert list(job.blocks()) == []
    assert batch_desk.strategy.calls == []


def test_the_same_text_for_another_purpose_is_another_text(batch_desk: Any) -> None:
    batch_desk.provide(info=replace(FAKE_INFO, input_types=("query", "document")))
    for input_type in ("query", "document", "query"):
        batch_desk.work(batch_desk.submit(["a"], input_type=input_type))
    assert batch_desk.meter.billed_requests == 2


def test_texts_that_are_too_long_are_cut_and_that_is_noted(batch_desk: Any) -> None:
    batch_desk.provide(info=replace(FAKE_INFO, max_input_tokens=5))
    texts = ["a" * 20, "short", "a" * 29, "a" * 33]
    job = batch_desk.work(batch_desk.submit(texts))
    result = batch_desk.check(job, ["a" * 20, "short", "a" * 20, "a" * 20])
    assert result.tokens_cut == {2: 3, 3: 4}
    assert batch_desk.meter.billed_texts == {"a" * 20: 1, "short": 1}
    again = batch_desk.client().batch_job(job.id)
    assert [dict(block.tokens_cut) for block in again.blocks(2)] == [{}, {0: 3, 1: 4}]


def test_texts_that_must_not_be_cut_are_rejected(batch_desk: Any) -> None:
    batch_desk.provide(info=replace(FAKE_INFO, max_input_tokens=5))
    client = batch_desk.client(overlong="reject")
    with pytest.raises(InputRejected, match="row 1 is 3 tokens over") as refused:
        client.submit_batch(["short", "a" * 29])
    assert refused.value.position == 1
    nothing_is_left(batch_desk, client)
    job = batch_desk.work(client.submit_batch(["short", "a" * 29], on_error="keep"))
    assert "3 tokens over" in str(batch_desk.check(job, ["short", "-"], without=[1]).errors[1])


# Bad rows


def test_bad_rows_are_kept_with_their_reasons_and_the_others_billed(batch_desk: Any) -> None:
    rows = [{"no": 1}, {"t": ""}, {"t": "good"}, {"t": 7}, "text", {"t": "fine"}, {"t": None}]
    job = batch_desk.work(batch_desk.submit(rows, text="t", on_error="keep"))
    expected = ["", "", "good", "", "", "fine", ""]
    result = batch_desk.check(job, expected, without=[0, 1, 3, 4, 6])
    for row, error in result.errors.items():
        assert isinstance(error, InputRejected)
        assert error.position == row
        assert f"row {row} " in str(error), "the message names the same row"
    report = job.status()
    assert (report.rows, report.texts, report.failed) == (7, 2, 0)


@pytest.mark.parametrize("bad", ["", None, 7, b"bytes", {"a": "mapping"}])
def test_one_bad_row_refuses_everything(batch_desk: Any, bad: Any) -> None:
    client = batch_desk.client()
    with pytest.raises(InputRejected) as refused:
        client.submit_batch([*(f"text {number}" for number in range(5_000)), bad, "more"])
    assert refused.value.position == 5_000
    nothing_is_left(batch_desk, client)


@pytest.mark.parametrize("rows", ["one text", b"bytes", {"a": "b"}, {"a", "b"}, None, 7])
def test_what_is_no_sequence_of_rows_is_refused(batch_desk: Any, rows: Any) -> None:
    client = batch_desk.client()
    with pytest.raises(InputRejected, match="an iterable of rows is expected"):
        client.submit_batch(rows)
    nothing_is_left(batch_desk, client)


def test_rows_that_end_with_an_error_leave_nothing(batch_desk: Any) -> None:
    def rows() -> Any:
        yield from (f"text {number}" for number in range(9_000))
        raise KeyError("the caller's own")

    client = batch_desk.client()
    with pytest.raises(KeyError):
        client.submit_batch(rows())
    nothing_is_left(batch_desk, client)


# Room and price


@pytest.mark.parametrize("width", [32, None])
def test_vectors_that_would_not_fit_the_disk_are_not_billed(
    batch_desk: Any, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_desk.provide(info=replace(FAKE_INFO, dimensions=width))
    client = batch_desk.client(cache_cap=0)
    client.embed(["the width is known now"])
    batch_desk.strategy.calls.clear()
    before = batch_desk.spent()
    usage = type(shutil.disk_usage(batch_desk.home))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 150_000, 150_000))
    with pytest.raises(StorageFull, match=r"disk has 0\.15 MB left .*nothing was submitted"):
        client.submit_batch([f"text {number}" for number in range(2_000)])
    assert batch_desk.strategy.calls == []
    assert client.batch_jobs() == []
    assert batch_desk.files == []
    assert batch_desk.spent() == before


def test_a_limit_in_money_needs_a_price(batch_desk: Any) -> None:
    batch_desk.provide(info=replace(FAKE_INFO, price=None))
    client = batch_desk.client(budget={"monthly_cost_limit": 1})
    with pytest.raises(ConfigurationError, match="price"):
        client.submit_batch(["a"])
    nothing_is_left(batch_desk, client)


def test_without_a_batch_price_the_usual_one_is_held(batch_desk: Any) -> None:
    price = Price(immediate=Decimal("0.02"))
    batch_desk.provide(info=replace(FAKE_INFO, price=price))
    batch_desk.work(batch_desk.submit(["four"]))
    assert batch_desk.spent().spent == Amount(tokens=1, cost=20_000)


def test_what_cannot_cost_anything_is_billed_with_every_limit_used_up(batch_desk: Any) -> None:
    batch_desk.client(daily=2).embed(["one two"])
    job = batch_desk.client(daily=2).submit_batch(["one two"])
    assert job.record.has_ended


@pytest.mark.case("A11")
def test_a_key_that_is_a_scalar_is_kept_as_its_value(batch_desk: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"id": [7, 8], "text": ["one", "two"]})
    with batch_desk.client() as client:
        job = client.submit_batch(zip(*table.columns, strict=True))
        assert keys_in(job) == [7, 8]
        zero = pa.table({"id": [0, 1], "text": ["three", "four"]})
        assert keys_in(client.submit_batch(zip(*zero.columns, strict=True))) == [0, 1]
