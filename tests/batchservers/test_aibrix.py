"""Does a batch on AIBrix end with a clear reason for each row? In its dry run it has no vectors."""

from __future__ import annotations

import re

import numpy as np
import pytest

from embedcore.errors import BatchEmbeddingFailed

pytestmark = pytest.mark.batch_servers

OFTEN = 0.2
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def texts_of(name, count):
    return [f"{name}: text {number} ☃" for number in range(count)]


def test_an_echo_instead_of_a_vector_is_an_error_of_its_row(aibrix, clients):
    """Status 200, and the body of the request as that of the answer."""
    client = clients.make(aibrix)
    with pytest.raises(BatchEmbeddingFailed) as why:
        client.batch_embed_texts(texts_of("echo", 5), poll_interval=OFTEN)
    assert sorted(why.value.failures) == [0, 1, 2, 3, 4]
    assert all("no list of embeddings" in reason for reason in why.value.failures.values())
    assert np.isnan(why.value.result.vectors).all()
    (job,) = why.value.jobs
    assert UUID.fullmatch(job)
    # What was asked for is spent, as nobody can say that it was not computed.
    (batch,) = client.batch_jobs()
    assert batch.status(poll=False).usage.tokens > 0


def test_a_thousand_lines(aibrix, clients):
    job = clients.make(aibrix).submit_batch(texts_of("thousand", 1_000), on_error="keep")
    result = job.result(poll_interval=OFTEN)
    assert not result.ok.any()
    assert len(result.errors) == 1_000
    assert job.status().jobs[0].completed == 1_000


@pytest.mark.fault(81)
def test_a_state_that_openai_does_not_have_counts_as_running(aibrix, clients, caplog):
    job = clients.make(aibrix).submit_batch(["scheduling"])
    report = job.status(poll=False)
    assert (report.state, report.jobs[0].status) == ("running", "scheduling")
    assert "'scheduling', a state that is not known" in caplog.text
    assert job.wait(30, poll_interval=OFTEN).state == "done"


def test_what_aibrix_sends_is_still_what_the_tests_are_about(aibrix, clients):
    """If this fails, AIBrix has changed, and the others prove less than they say."""
    made = aibrix.create("3b8b4567-0000-4000-8000-000000000000")
    assert UUID.fullmatch(made["id"])
    assert made["status"] == "scheduling"
    assert made["completion_window"] == "1d"
    assert "request_counts" not in made


@pytest.mark.fault(64)
def test_a_batch_is_cancelled_at_once(aibrix, clients):
    job = clients.make(aibrix).submit_batch(texts_of("cancelled", 200), on_error="keep")
    report = job.cancel()
    if not report.has_ended:
        report = job.wait(30, poll_interval=OFTEN)
    assert report.state == "cancelled"
    assert not job.result().ok.any()
    assert aibrix.job(report.jobs[0].id)["status"] == "cancelled"


def test_an_unknown_model_is_not_noticed_there(aibrix, clients):
    settings = clients.settings(aibrix)
    settings["model"] = "openai:no-such-model"
    with pytest.raises(BatchEmbeddingFailed) as why:
        clients.of(settings).batch_embed_texts(["a text"], poll_interval=OFTEN)
    assert list(why.value.failures) == [0]


def test_an_input_that_is_gone_is_a_reason(aibrix, clients, until):
    """Such a batch is created, and fails: the fence holds here as well."""
    strategy = clients.strategy(aibrix)
    job = aibrix.create("3b8b4567-0000-4000-8000-000000000000")["id"]
    until(lambda: strategy.poll(job).state == "failed")
    assert strategy.poll(job).errors[""]
    assert list(strategy.results(job)) == []


@pytest.mark.fault(62)
@pytest.mark.parametrize(
    "line",
    [
        None,
        "this is no JSON",
        {"method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}},
        {"custom_id": "0", "method": "POST", "url": "/v1/other", "body": {"model": "m"}},
    ],
    ids=["empty", "no JSON", "no custom_id", "another url"],
)
def test_what_aibrix_refuses_has_a_reason(aibrix, clients, until, line):
    """Without the number of a line: it is the reason of the whole job."""
    strategy = clients.strategy(aibrix)
    job = aibrix.create(aibrix.upload([] if line is None else [line]))["id"]
    until(lambda: strategy.poll(job).state == "failed")
    assert list(strategy.poll(job).errors) == [""]


@pytest.mark.fault(59)
@pytest.mark.fault(78)
@pytest.mark.parametrize("later", [0, 130], ids=["first page", "second page"])
def test_a_job_that_nobody_has_the_name_of_is_adopted(aibrix, clients, later):
    texts = texts_of(f"adopted behind {later}", 5)
    jobs = len(aibrix.jobs())
    clients.die(aibrix, f"client.batch_embed_texts({texts!r}, poll_interval=0.2)", at="create")
    for _ in range(later):
        aibrix.create("3b8b4567-0000-4000-8000-000000000000")
    client = clients.make(aibrix)
    with pytest.raises(BatchEmbeddingFailed) as why:
        client.batch_embed_texts(texts, poll_interval=OFTEN)
    assert len(why.value.failures) == 5
    assert len(aibrix.jobs()) == jobs + later + 1


@pytest.mark.fault(57)
def test_a_job_is_found_by_its_input_alone(aibrix, clients, hour_ago):
    strategy = clients.strategy(aibrix)
    ref = aibrix.upload(["{}"])
    job = aibrix.create(ref)["id"]
    found = strategy.find(key="another", input_ref=ref, since=hour_ago)
    assert [one.id for one in found] == [job]
    assert strategy.find(key="another", input_ref="another", since=hour_ago) == []


@pytest.mark.fault(56)
def test_a_file_that_nothing_was_made_of_is_found_and_goes(aibrix, clients, in_an_hour):
    clients.die(aibrix, "client.submit_batch(['an orphan file'])", at="upload")
    strategy = clients.strategy(aibrix)
    (file,) = strategy.orphans(before=in_an_hour)
    assert file in aibrix.inputs()
    strategy.discard(file)
    strategy.discard(file)
    assert list(strategy.orphans(before=in_an_hour)) == []


@pytest.mark.fault(61)
@pytest.mark.fault(72)
def test_a_server_that_is_killed_and_goes_on(aibrix, clients, until):
    """AIBrix goes on with the job, and now and then loses a line: what is missing is sent again."""
    job = clients.make(aibrix).submit_batch(texts_of("killed", 1_000), on_error="keep")
    until(lambda: (job.status().jobs[0].completed or 0) > 0)
    aibrix.kill()
    down = job.status()
    assert "cannot be reached" in down.jobs[0].trouble
    assert down.in_flight == 1_000
    aibrix.start()
    report = job.wait(90, poll_interval=OFTEN)
    assert report.state == "done"
    assert len(job.result().errors) == 1_000
    first, *further = report.jobs
    lines = aibrix.content(aibrix.job(first.id)["output_file_id"]).count(b'"custom_id"')
    assert sum(one.texts for one in further) == 1_000 - lines
