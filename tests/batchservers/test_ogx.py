"""Does a batch on OGX end with the right vectors, or a clear reason? Whatever dies meanwhile."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest

from embedcore.errors import BatchEmbeddingFailed
from embedcore.testing import vector_of

pytestmark = pytest.mark.batch_servers

WIDTH = 1_536
OFTEN = 0.2


def texts_of(name, count):
    return [f"{name}: text {number} ☃" for number in range(count)]


def are_right(vectors, texts):
    expected = np.array([vector_of(text, WIDTH) for text in texts])
    return np.allclose(np.asarray(vectors), expected, atol=1e-6)


def billed(upstream):
    return upstream.meter()["billed_texts"]


@pytest.mark.fault(69)
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_come_in_the_order_of_the_texts(ogx, upstream, clients, encoding):
    """Lines whose body is a string of JSON, in a file without a final newline."""
    texts, before = texts_of(encoding, 25), billed(upstream)
    client = clients.make(ogx, batch_encoding=encoding)
    vectors = client.batch_embed_texts([*texts, texts[3]], poll_interval=OFTEN)
    assert are_right(vectors, [*texts, texts[3]])
    assert billed(upstream) - before == 25


def test_a_thousand_lines(ogx, upstream, clients):
    texts, before = texts_of("thousand", 1_000), billed(upstream)
    job = clients.make(ogx).submit_batch(texts)
    assert are_right(job.result(poll_interval=OFTEN).vectors, texts)
    assert billed(upstream) - before == 1_000
    assert job.status().usage.exact


def test_what_ogx_sends_is_still_what_the_tests_are_about(ogx, clients):
    """If this fails, OGX has changed, and the others prove less than they say."""
    clients.make(ogx).batch_embed_texts(["what does it send?"], poll_interval=OFTEN)
    newest = ogx.jobs()[0]
    output = ogx.content(newest["output_file_id"])
    assert not output.endswith(b"\n")
    assert b'"body": "{' in output
    assert b'"request_counts"' not in output
    assert newest["usage"] is None
    assert ogx.create("file-0123456789abcdef")["request_counts"] is None


@pytest.mark.fault(66)
def test_a_line_that_fails_costs_only_its_own_row(ogx, upstream, clients):
    """Lines of the error file have no ``response``; their error has a ``type`` and no ``code``."""
    texts = [*texts_of("lines", 3), "lines: a BAD one", "lines: the last"]
    upstream.faults(when=[{"marker": "BAD", "mode": "bad_text"}])
    with pytest.raises(BatchEmbeddingFailed) as why:
        clients.make(ogx).batch_embed_texts(texts, poll_interval=OFTEN)
    assert list(why.value.failures) == [3]
    assert "request_failed" in why.value.failures[3]
    arrived = why.value.result
    assert arrived.ok.tolist() == [True, True, True, False, True]
    assert are_right(arrived.vectors[arrived.ok], [texts[at] for at in (0, 1, 2, 4)])


@pytest.mark.fault(65)
def test_all_lines_fail(ogx, upstream, clients):
    upstream.faults(when=[{"marker": "BAD", "mode": "bad_text"}])
    with pytest.raises(BatchEmbeddingFailed) as why:
        clients.make(ogx).batch_embed_texts(["BAD one", "BAD two"], poll_interval=OFTEN)
    assert sorted(why.value.failures) == [0, 1]
    assert all("request_failed" in reason for reason in why.value.failures.values())


@pytest.mark.fault(62)
def test_an_unknown_model_is_named_for_each_row(ogx, upstream, clients):
    """A job that fails its validation, with ``line`` and ``param``."""
    ogx_without = clients.settings(ogx)
    ogx_without["model"] = "openai:upstream/no-such-model"
    before = billed(upstream)
    with pytest.raises(BatchEmbeddingFailed) as why:
        clients.of(ogx_without).batch_embed_texts(["one", "two"], poll_interval=OFTEN)
    assert sorted(why.value.failures) == [0, 1]
    assert all("no-such-model" in reason for reason in why.value.failures.values())
    assert billed(upstream) == before


def test_an_input_that_is_gone_is_a_reason(ogx, clients, until):
    """Such a batch is created, and fails: the fence of DESIGN.md holds here."""
    strategy = clients.strategy(ogx)
    job = ogx.create("file-0123456789abcdef")["id"]
    until(lambda: strategy.poll(job).state == "failed")
    assert "Cannot find file" in strategy.poll(job).errors[""]
    assert list(strategy.results(job)) == []


@pytest.mark.fault(67)
def test_two_lines_of_one_id_are_both_read(ogx, clients, until):
    """Ours are unique; another program's may not be, and OGX takes them."""
    strategy = clients.strategy(ogx)
    body = {"model": ogx.model, "encoding_format": "float"}
    lines = [
        {"custom_id": "0", "method": "POST", "url": "/v1/embeddings", "body": {**body, "input": x}}
        for x in ("the same", "the same", "another")
    ]
    job = ogx.create(ogx.upload(lines))["id"]
    until(lambda: strategy.poll(job).state == "completed")
    found = list(strategy.results(job))
    assert [one.id for one in found] == ["0", "0", "0"]
    assert np.array_equal(found[0].vector, found[1].vector)
    assert not np.array_equal(found[0].vector, found[2].vector)


def test_an_empty_file_has_no_results(ogx, clients, until):
    """It is completed, 0 of 0."""
    strategy = clients.strategy(ogx)
    job = ogx.create(ogx.upload([]))["id"]
    until(lambda: strategy.poll(job).state == "completed")
    assert strategy.poll(job).completed == 0
    assert list(strategy.results(job)) == []


@pytest.mark.parametrize(
    ("line", "item", "reason"),
    [
        ({"custom_id": "0", "method": "POST", "url": "/v1/other", "body": {}}, "", "invalid_url"),
        ("this is no JSON", "1", "invalid_json_line"),
        ({"method": "POST", "url": "/v1/embeddings", "body": {}}, "1", "missing_required_param"),
    ],
    ids=["another url", "no JSON", "no custom_id"],
)
def test_what_ogx_refuses_is_told_by_its_line(ogx, clients, line, item, reason, until):
    """An address is the same in every line of ours: that it is wrong is said of the job."""
    good = {"custom_id": "0", "method": "POST", "url": "/v1/embeddings"}
    good |= {"body": {"model": ogx.model, "input": "good"}}
    strategy = clients.strategy(ogx)
    job = ogx.create(ogx.upload([good, line]))["id"]
    until(lambda: strategy.poll(job).state == "failed")
    told = strategy.poll(job).errors
    assert list(told) == [item]
    assert reason in told[item]


@pytest.mark.fault(64)
def test_a_cancelled_batch_says_so_for_each_row(ogx, upstream, clients, until):
    """OGX counts what was done of it, and drops the results."""
    upstream.faults(always={"mode": "late", "seconds": 0.5})
    job = clients.make(ogx).submit_batch(texts_of("cancelled", 60), on_error="keep")
    until(lambda: (job.status().jobs[0].completed or 0) > 0)
    job.cancel()
    report = job.wait(30, poll_interval=OFTEN)
    assert report.state == "cancelled"
    result = job.result()
    assert not result.ok.any()
    assert np.isnan(result.vectors).all()
    dropped = ogx.job(report.jobs[0].id)
    assert dropped["status"] == "cancelled"
    assert dropped["output_file_id"] is None
    assert 0 < dropped["request_counts"]["completed"] < 60


@pytest.mark.fault(72)
def test_what_was_done_of_a_cancelled_batch_may_have_been_billed(ogx, upstream, clients, until):
    upstream.faults(always={"mode": "late", "seconds": 0.5})
    job = clients.make(ogx).submit_batch(texts_of("billed", 60), on_error="keep")
    until(lambda: (job.status().jobs[0].completed or 0) > 0)
    job.cancel()
    report = job.wait(30, poll_interval=OFTEN)
    assert report.usage.tokens > 0
    assert not report.usage.exact, "what it cost is a bound"


@pytest.mark.fault(61)
def test_a_server_that_is_killed_and_never_goes_on(ogx, upstream, clients, until):
    """OGX does not resume: the job stays ``in_progress`` for ever."""
    texts = texts_of("killed", 60)
    upstream.faults(always={"mode": "late", "seconds": 0.4})
    client = clients.make(ogx)
    job = client.submit_batch(texts)
    until(lambda: (job.status().jobs[0].completed or 0) > 0)
    ogx.kill()
    down = job.status()
    assert down.jobs[0].trouble
    assert (down.state, down.in_flight) == ("running", 60)
    upstream.faults()
    ogx.start()
    begun = time.monotonic()
    stuck = job.wait(3, poll_interval=OFTEN)
    assert time.monotonic() - begun < 10
    assert not stuck.has_ended
    assert stuck.jobs[0].status == "in_progress"
    with pytest.raises(BatchEmbeddingFailed) as why:
        job.result(1, poll_interval=OFTEN)
    assert why.value.retryable
    assert why.value.jobs == (stuck.jobs[0].id,)
    assert "has not ended" in why.value.failures[0]
    # To cancel it is not enough either: nobody there does it.
    job.cancel()
    assert job.wait(2, poll_interval=OFTEN).state == "cancelling"
    ended = job.forget()
    assert ended.state == "abandoned"
    assert ended.usage.unconfirmed_tokens > 0
    # After that the same texts can be billed again.
    assert are_right(client.batch_embed_texts(texts, poll_interval=OFTEN), texts)


@pytest.mark.fault(59)
@pytest.mark.fault(78)
@pytest.mark.parametrize("later", [0, 130], ids=["first page", "second page"])
def test_a_job_that_nobody_has_the_name_of_is_adopted(ogx, upstream, clients, later):
    """Our process dies between ``create`` and writing the id down; the list has its job."""
    texts = texts_of(f"adopted behind {later}", 5)
    before, jobs = billed(upstream), len(ogx.jobs())
    clients.die(ogx, f"client.batch_embed_texts({texts!r}, poll_interval=0.2)", at="create")
    for _ in range(later):
        ogx.create("file-0123456789abcdef")
    client = clients.make(ogx)
    assert are_right(client.batch_embed_texts(texts, poll_interval=OFTEN), texts)
    assert billed(upstream) - before == 5
    assert len(ogx.jobs()) == jobs + later + 1
    (batch,) = client.batch_jobs()
    assert batch.status(poll=False).usage.unconfirmed_tokens == 0


@pytest.mark.fault(57)
def test_a_job_is_found_by_its_input_alone(ogx, clients, hour_ago):
    strategy = clients.strategy(ogx)
    ref = ogx.upload(["{}"])
    job = ogx.create(ref)["id"]
    assert [one.id for one in strategy.find(key="another", input_ref=ref, since=hour_ago)] == [job]
    assert strategy.find(key="another", input_ref="file-00", since=hour_ago) == []


@pytest.mark.fault(58)
def test_a_create_that_never_arrived_is_fenced(ogx, upstream, clients, caplog):
    """Our process dies before ``create`` is answered, and no job appears: its input goes."""
    texts = texts_of("fenced", 4)
    before, known = billed(upstream), ogx.inputs()
    clients.die(ogx, f"client.submit_batch({texts!r})", at="create", before=True)
    (file,) = ogx.inputs() - known
    with caplog.at_level(logging.WARNING, "embedcore"):
        client = clients.make(ogx)
        assert are_right(client.batch_embed_texts(texts, poll_interval=OFTEN), texts)
    assert "no job of it appeared" in caplog.text
    assert file not in ogx.inputs()
    assert billed(upstream) - before == 4


@pytest.mark.fault(56)
def test_a_file_that_nothing_was_made_of_is_found_and_goes(ogx, clients, in_an_hour):
    known = ogx.inputs()
    clients.die(ogx, "client.submit_batch(['an orphan file'])", at="upload")
    strategy = clients.strategy(ogx)
    (file,) = set(strategy.orphans(before=in_an_hour)) - known
    assert file in ogx.inputs()
    strategy.discard(file)
    strategy.discard(file)
    assert file not in ogx.inputs()
    assert set(strategy.orphans(before=in_an_hour)) <= known


def test_the_command_line_in_processes_of_its_own(ogx, upstream, clients, name_settings):
    """Submitted by one, watched by another, written by a third."""
    texts, before = texts_of("command line", 5), billed(upstream)
    Path("texts.txt").write_text("\n".join(texts), encoding="utf-8")
    name_settings(clients.file(ogx))
    clients.run("batch", "submit", "texts.txt")
    (listed,) = json.loads(clients.run("batch", "list", "--json"))["batches"]
    clients.run("batch", "resume")
    clients.run("batch", "status", listed["id"], "--watch")
    clients.run("batch", "fetch", listed["id"], "-o", "vectors.npy")
    assert are_right(np.load("vectors.npy"), texts)
    assert billed(upstream) - before == 5
    assert "nothing to delete" in clients.run("batch", "gc")


def test_a_model_that_openai_does_not_have(ogx, clients):
    """Its tokenizer, width and price are unknown; no key is needed."""
    settings = clients.settings(ogx)
    del settings["options"]["base_model"], settings["api_key"]
    settings["options"]["price"] = 0
    texts = texts_of("unknown to us", 3)
    vectors = clients.of(settings).batch_embed_texts(texts, poll_interval=OFTEN)
    assert are_right(vectors, texts)
