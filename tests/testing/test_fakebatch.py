"""Is the fake batch strategy one, is its bill right, and do its faults do what they say?"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import (
    InputNotReady,
    OutcomeUnknown,
    ProviderUnavailable,
    RateLimited,
    RemoteGone,
    RequestRejected,
    TransientProviderError,
)
from embedcore.provider.protocol import BatchStrategy, Embedder
from embedcore.provider.types import BatchItem, BatchLimits, EmbedRequest, Price
from embedcore.testing import FakeClock, tokens_of, vector_of
from embedcore.testing.fakes.batch import EFFECTS, Crashed, FakeBatch, batch_embedder
from embedcore.testing.fakes.embedder import FAKE_INFO
from embedcore.testing.openai.batches import BatchSettings, FileLimits, Listing, Progress, Quirks

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
WIDTH = 32


def items(*texts):
    return [BatchItem(id=f"id {place}", text=text) for place, text in enumerate(texts)]


def by_hand(**settings):
    return batch_embedder(settings=BatchSettings(progress=Progress(), **settings)).batch


def started(batch, *texts, key="key"):
    return batch.create(batch.upload(items(*texts), key=key), key=key)


def outcomes(batch, job):
    return {outcome.id: outcome for outcome in batch.results(job)}


@pytest.fixture
def batch():
    return by_hand()


def test_it_is_a_strategy_of_an_embedder():
    embedder = batch_embedder()
    strategy: BatchStrategy = embedder.batch
    whole: Embedder = embedder
    assert whole.batch is strategy
    assert isinstance(strategy, FakeBatch)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=20, unique=True))
def test_every_text_gets_its_vector_and_is_billed_once(texts):
    batch = by_hand()
    job = started(batch, *texts)
    batch.service.finish(job)
    found = outcomes(batch, job)
    assert set(found) == {item.id for item in items(*texts)}
    for item in items(*texts):
        outcome = found[item.id]
        assert np.array_equal(outcome.vector, vector_of(item.text, WIDTH))
        assert outcome.vector.dtype == np.float32
        assert (outcome.tokens, outcome.error) == (tokens_of(item.text), None)
        assert outcome.model == FAKE_INFO.model
    assert batch.service.meter.billed_texts == dict.fromkeys(texts, 1)
    assert batch.poll(job).tokens == sum(map(tokens_of, texts))


def test_sizes_are_the_bytes_of_the_file(batch):
    found = items("a", "ü👩", 'quotes " and \n lines')
    file = batch.upload(found, key="key")
    assert sum(batch.sizes(found)) == batch.service.file(file)["bytes"]


def test_both_ways_give_one_vector_at_one_price():
    info = replace(
        FAKE_INFO,
        dimensions=16,
        overhead_tokens_per_text=3,
        price=Price(immediate=Decimal(2), batch=Decimal(1)),
    )
    limits = BatchLimits(max_items=2)
    embedder = batch_embedder(info=info, limits=limits, salt="other")
    now = embedder.embed(EmbedRequest(texts=["a text"]))
    job = started(embedder.batch, "a text")
    embedder.batch.service.finish(job)
    (later,) = embedder.batch.results(job)
    assert np.array_equal(later.vector, now.vectors[0])
    assert later.tokens == now.tokens == tokens_of("a text") + 3
    assert embedder.batch.limits == limits
    assert embedder.info.price.batch == 1


def test_states_are_those_of_the_contract(batch):
    jobs = [started(batch, "a", "b") for _ in range(4)]
    assert [batch.poll(job).state for job in jobs] == ["running"] * 4
    batch.service.step(jobs[0], done=1)
    status = batch.poll(jobs[0])
    assert (status.state, status.detail) == ("running", "in_progress")
    assert (status.completed, status.failed, status.total, status.tokens) == (1, 0, 2, None)
    batch.service.finish(jobs[0])
    batch.service.expire(jobs[1], done=1)
    batch.cancel(jobs[2])
    assert batch.poll(jobs[2]).detail == "cancelling"
    batch.service.end_cancel(jobs[2], done=1)
    batch.service.fail(jobs[3], "invalid_json_line", "not JSON", line=2)
    states = [batch.poll(job).state for job in jobs]
    assert states == ["completed", "expired", "cancelled", "failed"]
    assert batch.poll(jobs[3]).errors == {"id 1": "not JSON"}
    assert not batch.poll(jobs[3]).queue_full
    assert list(batch.results(jobs[3])) == []
    assert set(outcomes(batch, jobs[1])) == {"id 0", "id 1"}
    expired = outcomes(batch, jobs[1])["id 1"]
    assert (expired.code, expired.retryable, expired.billed) == ("batch_expired", True, "no")
    assert set(outcomes(batch, jobs[2])) == {"id 0"}
    batch.cancel(jobs[0])  # that it has ended is fine
    batch.service.settings.quirks.status_word = "pondering"
    assert batch.poll(started(batch, "a")).state == "running"


def test_a_full_queue_is_told_apart():
    batch = by_hand(enqueued_token_limit=1)
    job = started(batch, "a text that is too long")
    batch.service.step(job)
    status = batch.poll(job)
    assert (status.state, status.queue_full, status.queue_limit) == ("failed", True, 1)
    assert "" in status.errors


def test_lines_fail_each_on_its_own(batch):
    batch.service.fail_lines("BAD")
    batch.service.fail_lines("BUSY", status=500)
    batch.service.fail_lines("ODD", http=False, code="odd")
    job = started(batch, "BAD", "BUSY", "ODD", "fine")
    batch.service.finish(job)
    found = outcomes(batch, job)
    assert {name: (one.code, one.retryable) for name, one in found.items()} == {
        "id 0": ("400", False),
        "id 1": ("500", True),
        "id 2": ("odd", True),
        "id 3": (None, False),
    }
    assert all((one.vector is None) == (one.error is not None) for one in found.values())


def test_oddities_reach_the_outcomes():
    quirks = Quirks(duplicate_different="TWICE", missing="LOST", no_id="NONE", order="input")
    batch = by_hand(quirks=quirks)
    job = started(batch, "a", "TWICE", "LOST", "NONE")
    batch.service.finish(job)
    found = list(batch.results(job))
    assert [one.id for one in found] == ["id 0", "id 1", "id 1", ""]
    assert not np.array_equal(found[1].vector, found[2].vector)


def test_a_file_that_is_cut_is_an_error_after_its_whole_lines():
    batch = by_hand(quirks=Quirks(cut=0.5))
    job = started(batch, *"abcd")
    batch.service.finish(job)
    given = []
    with pytest.raises(TransientProviderError):
        given.extend(batch.results(job))
    given = []
    reading = batch.results(job)
    given = [next(reading), next(reading)]
    with pytest.raises(TransientProviderError):
        next(reading)
    assert len({one.id for one in given}) == 2


def test_what_is_gone_is_gone(batch):
    job = started(batch, "a")
    batch.service.finish(job)
    batch.service.vanish_output(job)
    with pytest.raises(RemoteGone):
        list(batch.results(job))
    batch.service.vanish(job)
    for call in (batch.poll, batch.cancel):
        with pytest.raises(RemoteGone):
            call(job)
    with pytest.raises(RemoteGone):
        list(batch.results(job))


def test_results_of_a_running_job_are_a_mistake(batch):
    with pytest.raises(ProviderUnavailable, match="validating"):
        list(batch.results(started(batch, "a")))


@pytest.mark.parametrize(("status", "kind"), [(400, RequestRejected), (404, InputNotReady)])
def test_a_create_without_its_input_is_proof_that_there_is_no_job(status, kind):
    batch = by_hand(missing_input_status=status)
    file = batch.upload(items("a"), key="key")
    batch.discard(file)
    batch.discard(file)
    with pytest.raises(kind) as refused:
        batch.create(file, key="key")
    assert refused.value.billed == "no"
    assert batch.service.jobs == []


def test_jobs_are_found_by_key_or_input_earliest_first(batch):
    file = batch.upload(items("a"), key="one")
    first, second = batch.create(file, key="one"), batch.create(file, key="other")
    third = started(batch, "b", key="one")

    def find(key, input_ref, since=LONG_AGO):
        return [job.id for job in batch.find(key=key, input_ref=input_ref, since=since)]

    assert find("one", "file-x") == [first, third]
    assert find("nobody", file) == [first, second]
    assert find("one", file) == [first, second, third]
    assert find("nobody", "file-x") == []
    (found,) = batch.find(key="other", input_ref="", since=LONG_AGO)
    assert found.state == "running"
    assert abs(found.created_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert find("one", file, datetime.now(UTC) + timedelta(hours=1)) == []


def test_all_pages_are_looked_through(batch):
    first = started(batch, "a", key="needle")
    for number in range(150):
        started(batch, "b", key=f"hay {number}")
    (found,) = batch.find(key="needle", input_ref="", since=LONG_AGO)
    assert found.id == first
    batch.service.settings.listing = Listing(repeats=True)
    with pytest.raises(TransientProviderError):
        batch.find(key="needle", input_ref="", since=LONG_AGO)


def test_orphans_are_ours_old_and_unused():
    clock = FakeClock()
    settings = BatchSettings(progress=Progress())
    batch = batch_embedder(settings=settings, clock=clock.time).batch
    orphan = batch.upload(items("a"), key="orphan")
    started(batch, "b")
    batch.service.upload(b"{}", filename="somebody-else.jsonl")
    clock.advance(60)
    batch.upload(items("c"), key="young")
    assert list(batch.orphans(before=clock.now() - timedelta(seconds=30))) == [orphan]


# Faults


def acts(batch):
    """Every method as a call, on a job that runs and one that has ended."""
    file, done = batch.upload(items("a"), key="k"), started(batch, "b")
    running, spare = started(batch, "c"), batch.upload(items("d"), key="spare")
    batch.service.finish(done)
    return {
        "upload": lambda: batch.upload(items("new"), key="new"),
        "create": lambda: batch.create(file, key="new"),
        "find": lambda: batch.find(key="k", input_ref="", since=LONG_AGO),
        "discard": lambda: batch.discard(spare),
        "orphans": lambda: list(batch.orphans(before=datetime.now(UTC) + timedelta(hours=1))),
        "poll": lambda: batch.poll(running),
        "results": lambda: list(batch.results(done)),
        "cancel": lambda: batch.cancel(running),
    }


def state(batch):
    service = batch.service
    files = [(file.id, file.gone) for file in service._files._files.values()]
    return files, [(job.id, job.status) for job in service.jobs]


CHANGING = {"upload", "create", "discard", "cancel"}


@pytest.mark.parametrize("method", sorted(CHANGING | {"find", "orphans", "poll", "results"}))
@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("effect", EFFECTS)
def test_every_call_fails_before_after_or_too_early(batch, method, effect, crash):
    act, before = acts(batch)[method], None
    batch.faults.push(method, effect, crash=crash)
    before = state(batch)
    default = ProviderUnavailable if effect == "before" else OutcomeUnknown
    with pytest.raises(Crashed if crash else default) as raised:
        act()
    if not crash:
        assert raised.value.billed == ("no" if effect == "before" else "unknown")
    changes = method in CHANGING
    assert (state(batch) != before) == (changes and effect == "after")
    batch.service.land()
    assert (state(batch) != before) == (changes and effect != "before")
    assert batch.faults.pending == 0
    act()
    assert batch.calls[-2:] == [method, method]


def test_faults_have_errors_times_and_an_order(batch):
    mine = RateLimited("slow down")
    batch.faults.push("poll", error=mine, times=2)
    batch.faults.push("poll", crash=True)
    batch.faults.push("cancel")
    job = started(batch, "a")
    for _ in range(2):
        with pytest.raises(RateLimited) as raised:
            batch.poll(job)
        assert raised.value is mine
    with pytest.raises(Crashed):
        batch.poll(job)
    assert batch.poll(job).state == "running"
    assert batch.faults.pending == 1
    batch.faults.clear()
    batch.cancel(job)
    with pytest.raises(ValueError, match="no fault"):
        batch.faults.push("pol")
    with pytest.raises(ValueError, match="no fault"):
        batch.faults.push("poll", "sometime")


def test_a_crash_is_caught_by_nobody():
    assert not issubclass(Crashed, Exception)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_results_break_off_where_they_are_told(batch, at):
    job = started(batch, *"abc")
    batch.service.finish(job)
    batch.faults.push("results", at=at)
    got = []
    with pytest.raises(ProviderUnavailable):
        for outcome in batch.results(job):
            got.append(outcome)  # noqa: PERF402 - what came before the error counts
    assert len(got) == at
    assert len(list(batch.results(job))) == 3


def test_a_late_create_lands_after_so_many_calls(batch):
    file = batch.upload(items("a"), key="key")
    batch.faults.push("create", "late", requests=2)
    with pytest.raises(OutcomeUnknown):
        batch.create(file, key="key")
    found = [len(batch.find(key="key", input_ref=file, since=LONG_AGO)) for _ in range(3)]
    assert found == [0, 0, 1]


@pytest.mark.parametrize("accepts", [False, True])
def test_the_fence_holds_unless_the_assumption_is_false(accepts):
    batch = by_hand(accepts_deleted_input=accepts)
    file = batch.upload(items("a"), key="key")
    batch.faults.push("create", "late", crash=True)
    with pytest.raises(Crashed):
        batch.create(file, key="key")
    batch.discard(file)
    batch.service.land()
    assert len(batch.find(key="key", input_ref=file, since=LONG_AGO)) == accepts


def test_an_upload_that_its_items_end_leaves_nothing(batch):
    def broken():
        yield from items("a")
        raise KeyError("mine")

    with pytest.raises(KeyError):
        batch.upload(broken(), key="key")
    assert list(batch.orphans(before=datetime.now(UTC) + timedelta(hours=1))) == []


def test_a_file_over_the_limit_fails_like_any_other():
    batch = by_hand(file_limits=FileLimits(max_lines=1))
    job = started(batch, "a", "b")
    batch.service.step(job)
    assert batch.poll(job).errors.keys() == {""}


def test_threads_share_it():
    batch = batch_embedder(settings=BatchSettings(progress=Progress(polls=1))).batch
    seen = []

    def run(number):
        job = started(batch, f"text {number}", key=f"key {number}")
        assert batch.poll(job).state == "completed"
        seen.extend(
            np.array_equal(one.vector, vector_of(f"text {number}", WIDTH))
            for one in batch.results(job)
        )

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 16
    assert not batch.service.meter.billed_twice


@pytest.mark.campaign(short=True)
def test_it_is_fast_enough_for_a_state_machine():
    began = time.perf_counter()
    for _ in range(20):
        batch = by_hand()
        for number in range(10):
            job = started(batch, f"text {number}", key=f"key {number}")
            batch.service.finish(job)
            batch.poll(job)
            batch.find(key=f"key {number}", input_ref="", since=LONG_AGO)
            list(batch.results(job))
    # A thousand calls; thirty times as long as they took where this was written.
    assert time.perf_counter() - began < 1.5
