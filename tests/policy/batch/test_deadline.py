"""What cannot wait is embedded at once, and nothing that a job has done is paid for twice."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import BudgetExceeded, ConfigurationError, ProviderUnavailable
from embedcore.events import CacheProblem
from embedcore.money import in_dollars
from embedcore.policy.batch.deadline import choose_now
from embedcore.provider.types import Price
from embedcore.testing.fakes.embedder import FAKE_INFO

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

TEXTS = [f"text {number:02d}" for number in range(12)]
HOUR = 3600.0
PRICED = replace(FAKE_INFO, price=Price(immediate=Decimal("0.02"), batch=Decimal("0.01")))
BATCH_ONLY = {"small_texts": 0, "quickest": 0, "drain_before": HOUR}


@pytest.fixture
def priced(batch_desk: Any) -> Any:
    batch_desk.provide(info=PRICED)
    return batch_desk


def submit(batch_desk: Any, texts: Any, *, batch: Any = None, **how: Any) -> Any:
    config = {"batch": {**BATCH_ONLY, **(batch or {})}, **how.pop("config", {})}
    return batch_desk.client(**config).submit_batch(texts, **how)


def billed_now(batch_desk: Any) -> list[str]:
    """The texts of every request that was no batch, as often as they were billed."""
    return sorted(batch_desk.embedder.meter.billed_texts.elements())


def billed_twice(batch_desk: Any) -> list[str]:
    return [
        text
        for text, times in (
            batch_desk.meter.billed_texts + batch_desk.embedder.meter.billed_texts
        ).items()
        if times > 1
    ]


@pytest.mark.parametrize(
    ("strategy", "texts", "tokens", "deadline", "now"),
    [
        ("batch", 1, 10, None, False),
        ("batch", 1, 10, 1.0, False),
        ("immediate", 10**6, 10**9, None, True),
        ("auto", 0, 0, None, False),
        ("auto", 2_048, 900_000, None, True),
        ("auto", 2_049, 900_000, None, False),
        ("auto", 2_048, 1_000_000, None, False),
        ("auto", 10**6, 10**9, 3_599.0, True),
        ("auto", 10**6, 10**9, 3_600.0, False),
    ],
)
def test_what_is_small_or_urgent_is_not_put_into_a_batch(
    priced: Any, caplog: Any, strategy: Any, texts: int, tokens: int, deadline: Any, now: bool
) -> None:
    context = priced.client()._context()
    with caplog.at_level(logging.INFO, logger="embedcore"):
        why = choose_now(context, texts=texts, tokens=tokens, strategy=strategy, deadline=deadline)
    assert (why is not None) == now
    assert any(line.startswith("auto: ") for line in caplog.messages) == (
        strategy == "auto" and texts > 0
    )


def test_small_work_is_done_when_it_is_submitted(priced: Any) -> None:
    job = priced.client().submit_batch([*TEXTS, TEXTS[0]], strategy="auto")
    assert job.record.state == "done"
    assert priced.jobs == []
    priced.check(job, [*TEXTS, TEXTS[0]])
    assert billed_now(priced) == sorted(TEXTS)
    usage = job.status().usage
    assert (usage.tokens, usage.cost) == (24, in_dollars(PRICED.price.picodollars(24)))


def test_the_configuration_may_say_so(priced: Any) -> None:
    client = priced.client(strategy="immediate")
    assert len(client.batch_embed_texts(TEXTS)) == len(TEXTS)
    assert priced.jobs == []
    assert len(client.batch_embed_texts(["one more"], strategy="immediate")) == 1


def test_what_the_budget_refuses_at_once_leaves_nothing(priced: Any) -> None:
    client = priced.client(daily=10)
    with pytest.raises(BudgetExceeded):
        client.submit_batch(TEXTS, strategy="immediate")
    assert client.batch_jobs() == []
    assert priced.files == []
    assert billed_now(priced) == []
    priced.check_money()


# 24 tokens: 480,000 picodollars at once, 240,000 (and 12 for rounding) as a batch.
FITS_HALF = {"daily_cost_limit": "0.0000003"}


@pytest.mark.case("C10")
@pytest.mark.parametrize("on_budget", ["raise", "wait"])
@pytest.mark.parametrize("deadline", [None, 60.0])
def test_auto_takes_the_batch_where_only_its_price_fits(
    priced: Any, on_budget: Any, deadline: float | None
) -> None:
    """Small and urgent work is embedded at once, but for a limit that allows only the batch."""
    client = priced.client(budget=FITS_HALF)
    with pytest.raises(BudgetExceeded):
        client.submit_batch(TEXTS, strategy="immediate")
    job = client.submit_batch(TEXTS, strategy="auto", deadline=deadline, on_budget=on_budget)
    assert len(priced.jobs) == 1
    assert billed_now(priced) == []
    priced.work(job)
    priced.check(job, TEXTS)
    assert billed_now(priced) == []
    assert priced.spent().spent.cost <= 300_000
    priced.check_money()


@pytest.mark.case("C10")
@pytest.mark.parametrize("on_budget", ["raise", "wait"])
def test_auto_embeds_at_once_where_only_that_fits(batch_desk: Any, on_budget: Any) -> None:
    dear = Price(immediate=Decimal("0.01"), batch=Decimal("0.02"))
    batch_desk.provide(info=replace(FAKE_INFO, price=dear))
    with pytest.raises(BudgetExceeded):
        submit(batch_desk, TEXTS, strategy="batch", config={"budget": FITS_HALF})
    job = submit(
        batch_desk, TEXTS, strategy="auto", on_budget=on_budget, config={"budget": FITS_HALF}
    )
    assert job.record.state == "done"
    assert batch_desk.jobs == []
    batch_desk.check(job, TEXTS)


@pytest.mark.case("C10")
def test_auto_refuses_what_fits_in_no_way_and_leaves_nothing(priced: Any) -> None:
    budget = {"daily_cost_limit": "0.0000001"}
    for batch in ({}, BATCH_ONLY):
        client = priced.client(budget=budget, batch=batch)
        with pytest.raises(BudgetExceeded):
            client.submit_batch(TEXTS, strategy="auto")
        assert client.batch_jobs() == []
    assert priced.jobs == priced.files == billed_now(priced) == []
    assert priced.spent().held.tokens == 0


@pytest.mark.case("C10")
def test_auto_with_enough_for_both_ways_chooses_as_without_a_limit(priced: Any) -> None:
    job = priced.client(budget={"daily_cost_limit": 1}).submit_batch(TEXTS, strategy="auto")
    assert job.record.state == "done"
    assert priced.jobs == []


@pytest.mark.parametrize("done", [0, 5, 12])
def test_what_is_late_is_embedded_at_once_and_what_was_done_is_kept(priced: Any, done: int) -> None:
    job = submit(priced, TEXTS, strategy="auto", deadline=24 * HOUR)
    (remote,) = priced.jobs
    priced.service.step(remote.id)
    if done:
        priced.service.step(remote.id, done=done)
    priced.clock.advance(22 * HOUR)
    job.advance()
    assert remote.status == "in_progress", "there is time yet"
    priced.clock.advance(1.1 * HOUR)
    job.advance()
    assert remote.status == "cancelling"
    assert billed_now(priced) == [], "not before it is known what the job has done"
    priced.service.end_cancel(remote.id, done=done)
    job.advance()
    assert job.record.state == "done"
    priced.check(job, TEXTS)
    assert len(billed_now(priced)) == len(TEXTS) - done
    assert billed_twice(priced) == []
    assert priced.spent().held.tokens == 0
    assert priced.spent().spent.tokens == 24
    assert len(priced.jobs) == 1


def test_without_the_money_the_batch_goes_on(priced: Any, caplog: Any) -> None:
    # Held at $0.01: the full price would need as much again.
    budget = {"daily_cost_limit": "0.0000003"}
    job = submit(priced, TEXTS, strategy="auto", deadline=12 * HOUR, config={"budget": budget})
    priced.clock.advance(11.5 * HOUR)
    job.advance()
    (remote,) = priced.jobs
    assert remote.status != "cancelling"
    assert "the budget does not allow" in (job.status(poll=False).blocked or "")
    job.advance()
    assert caplog.text.count("the budget does not allow") == 1
    priced.work(job)
    priced.check(job, TEXTS)
    assert billed_now(priced) == []


def test_a_deadline_that_was_not_kept_is_said_once(priced: Any, caplog: Any) -> None:
    job = submit(priced, TEXTS, strategy="auto", deadline=12 * HOUR)
    priced.clock.advance(11.5 * HOUR)
    for _ in range(4):
        job.advance()
        priced.clock.advance(0.4 * HOUR)
    assert "deadline has passed" in (job.status(poll=False).blocked or "")
    assert caplog.text.count("deadline has passed") == 1
    priced.service.end_cancel(priced.jobs[0].id, done=3)
    job.advance()
    priced.check(job, TEXTS)


def test_a_job_that_others_wait_for_is_not_stopped(priced: Any) -> None:
    urgent = submit(priced, TEXTS, strategy="auto", deadline=24 * HOUR)
    patient = priced.client().submit_batch(TEXTS[:3])
    priced.clock.advance(23.5 * HOUR)
    urgent.advance()
    (remote,) = priced.jobs
    assert remote.status != "cancelling"
    priced.work(patient)
    urgent.advance()
    assert urgent.record.state == "done"
    assert billed_twice(priced) == []


@settings(max_examples=settings.default.max_examples // 5, deadline=None)
@given(crashes=st.lists(st.integers(1, 4), max_size=4), done=st.integers(0, 12))
def test_who_is_killed_while_he_drains_pays_only_for_what_was_in_flight(
    tmp_path_factory: pytest.TempPathFactory, crashes: list[int], done: int
) -> None:
    made = batch_desk.__wrapped__(tmp_path_factory.mktemp("drain"))
    one = next(made)
    one.provide(info=replace(PRICED, max_texts_per_request=2, max_concurrency=1))
    job = submit(one, TEXTS, strategy="auto", deadline=24 * HOUR)
    (remote,) = one.jobs
    one.service.step(remote.id)
    one.clock.advance(23.5 * HOUR)
    job.advance()
    one.service.end_cancel(remote.id, done=done)
    honest = one.embedder.embed
    for number in crashes:
        left = iter(range(number))

        def dies(request: Any, left: Any = left) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return honest(request)

        one.embedder.embed = dies
        with contextlib.suppress(KeyboardInterrupt):
            one.client(batch=BATCH_ONLY).batch_job(job.id).advance()
    one.embedder.embed = honest
    last = one.client(batch=BATCH_ONLY).batch_job(job.id)
    last.advance()
    one.check(last, TEXTS)
    assert billed_twice(one) == []
    made.close()


def test_an_outage_fails_a_text_only_after_several_looks(priced: Any) -> None:
    job = submit(priced, TEXTS[:2], strategy="auto", deadline=24 * HOUR, batch={"attempts": 2})
    (remote,) = priced.jobs
    priced.clock.advance(23.5 * HOUR)
    job.advance()
    priced.service.end_cancel(remote.id, done=0)

    def broken(request: Any) -> Any:
        del request
        raise ProviderUnavailable("out of order", billed="no")

    honest, priced.embedder.embed = priced.embedder.embed, broken
    job.advance()
    assert job.status(poll=False).state == "running"
    priced.embedder.embed = honest
    job.advance()
    priced.check(job, TEXTS[:2])


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"strategy": "soon"}, '"immediate", "batch" or "auto"'),
        ({"strategy": "auto", "deadline": 0}, "above 0"),
        ({"deadline": 60}, 'strategy = "auto"'),
    ],
)
def test_what_makes_no_sense_is_refused(priced: Any, how: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        priced.client().submit_batch(TEXTS, **how)
    assert priced.jobs == []


@pytest.mark.parametrize("cap", [0, 4_000])
def test_what_is_embedded_at_once_is_kept_beyond_the_cap_without_a_warning(
    batch_desk: Any, caplog: pytest.LogCaptureFixture, cap: int
) -> None:
    client = batch_desk.client(cache_cap=cap)
    texts = [f"text {number}" for number in range(60)]
    job = client.submit_batch(texts, strategy="immediate")
    assert job.result().ok.all()
    assert "does not fit" not in caplog.text
    assert batch_desk.told(CacheProblem) == []
    billed = batch_desk.embedder.meter.billed_tokens
    batch_desk.check(client.submit_batch(texts, strategy="immediate"), texts)
    assert batch_desk.embedder.meter.billed_tokens == billed, "all of it is kept"
