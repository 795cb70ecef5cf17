"""Batches over a real socket, with a server that is late, confused, or stopped by somebody else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from embedcore import EmbeddingClient
from embedcore.errors import PermanentProviderError
from embedcore.policy.batch.job import BatchJob
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeOpenAI, vectors_of
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

TEXTS = [f"text number {number}" for number in range(6)]
LATE = ["no file", "missing", "empty", "first line", "half", "error"]
# Each of them once; all of it in a campaign.
WAYS = [
    pytest.param(late, said, marks=[] if number % 2 == which else pytest.mark.campaign(short=True))
    for number, late in enumerate(LATE)
    for which, said in enumerate(["honest", "absent"])
]
ASKED = {"POST /v1/batches", "POST /v1/files"}


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    """Its jobs move by hand, and its clock is that of the clients."""
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as fake:
        yield fake


@pytest.fixture
def client_of(server: FakeOpenAI, tmp_path: Path) -> Iterator[Callable[..., EmbeddingClient]]:
    with ExitStack() as opened:

        def client_of(*, options: Any = None, **config: Any) -> EmbeddingClient:
            client = EmbeddingClient(
                "openai:text-embedding-3-small",
                options={
                    "base_url": server.base_url,
                    "api_key": server.api_key,
                    "batch": True,
                    **(options or {}),
                },
                config={"home": tmp_path / "state", **config},
            )
            ledger = client._engine.account.ledger
            assert ledger is not None
            ledger._clock = server.batches.clock
            return opened.enter_context(client)

        yield client_of


def quirky(server: FakeOpenAI, **quirks: Any) -> None:
    for name, value in quirks.items():
        setattr(server.batches.settings.quirks, name, value)


def finish(server: FakeOpenAI) -> None:
    for job in server.batches.jobs:
        if not job.ended:
            server.batches.finish(job.id)


def look(server: FakeOpenAI, job: BatchJob, *, looks: int = 40, seconds: float = 61.0) -> BatchJob:
    for _ in range(looks):
        finish(server)
        job.advance()
        if job.record.has_ended:
            return job
        server.batches.clock.advance(seconds)
    raise AssertionError(job.status(poll=False))


def input_of(server: FakeOpenAI, number: int) -> str:
    """The input of the job of that number, as it was uploaded."""
    return "".join(
        one.decode()
        for one in server.batches.input_lines(server.batches.jobs[number].input_file_id)
    )


def right(job: BatchJob, texts: list[str]) -> bool:
    return bool((job.result().vectors == vectors_of(texts, 1536)).all())


@pytest.mark.case("E2")
@pytest.mark.case("E3")
@pytest.mark.parametrize(("late", "counts"), WAYS)
def test_late_results_are_read_when_they_are_there(
    server: FakeOpenAI, client_of: Any, late: Any, counts: Any
) -> None:
    quirky(server, late=late, late_looks=3, counts=counts)
    job = look(server, client_of().submit_batch(TEXTS), seconds=1)
    assert right(job, TEXTS)
    assert len(server.batches.jobs) == 1


@pytest.mark.case("E2")
@pytest.mark.case("E3")
@pytest.mark.parametrize(("late", "usage"), WAYS)
def test_results_that_never_come_are_not_billed_again_and_can_be_read_later(
    server: FakeOpenAI, client_of: Any, late: Any, usage: Any
) -> None:
    quirky(server, late=late, late_looks=None, usage=usage)
    # It is looked for twice again: how long is the matter of test_late_results.py.
    job = look(server, client_of(batch={"output_wait": 100.0}).submit_batch(TEXTS))
    result = job.result(on_error="keep")
    assert result.ok.sum() == {"first line": 1, "half": 3}.get(late, 0)
    assert all("output_gone" in error.message for error in result.errors.values())
    assert server.batches.meter.billed_twice == {}
    quirky(server, late=None)
    job.read_again()
    assert right(job, TEXTS)
    assert len(server.batches.jobs) == 1


@pytest.mark.case("E1")
def test_the_output_of_another_job_is_nobodys(server: FakeOpenAI, client_of: Any) -> None:
    client = client_of()
    one, other = client.submit_batch(TEXTS[:3]), client.submit_batch(TEXTS[3:])
    finish(server)
    server.batches.swap_outputs(*(job.id for job in server.batches.jobs))
    for job in (one, other):
        look(server, job)
        assert not job.result(on_error="keep").ok.any()
    context = client._context()
    assert context.stored(context.keys(None).of(TEXTS)) == set()
    assert len(server.batches.jobs) == 2


@pytest.mark.case("E2")
def test_lines_with_numbers_for_names_are_nobodys(server: FakeOpenAI, client_of: Any) -> None:
    quirky(server, numeric_ids=True)
    job = look(server, client_of().submit_batch(TEXTS))
    assert not job.result(on_error="keep").ok.any()
    assert len(server.batches.jobs) == 1


@pytest.mark.case("E4")
@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("word", ["pending", "uploaded", None])
def test_a_new_file_that_is_not_ready_is_waited_for(
    server: FakeOpenAI, client_of: Any, status: int, word: str | None
) -> None:
    settings = server.batches.settings
    settings.not_ready_creates, settings.not_ready_status = 3, status
    settings.not_ready_word = word
    job = look(server, client_of().submit_batch(TEXTS), seconds=1)
    assert right(job, TEXTS)
    uploads = [one for one in server.requests if (one.method, one.path) == ("POST", "/v1/files")]
    assert len(uploads) == 1
    files = server.batches.files(purpose="batch")["data"]
    assert len(files) == 1, "no orphans"


@pytest.mark.case("E5")
def test_another_models_name_is_believed_when_a_setting_says_so(
    server: FakeOpenAI, client_of: Any
) -> None:
    quirky(server, reply_model="the-same-model-2026")
    job = look(server, client_of().submit_batch(TEXTS))
    assert "reply_models" in job.result(on_error="keep").errors[0].message
    again = client_of(options={"reply_models": ["the-same-model-2026"]})
    assert again.batch_job(job.id).read_again() == 6
    assert again.batch_embed_texts(TEXTS) == vectors_of(TEXTS, 1536).tolist()
    assert len(server.batches.jobs) == 1


@pytest.mark.case("E6")
@pytest.mark.case("E7")
@pytest.mark.parametrize(
    ("word", "stopping"),
    [("cancelled", "cancelling"), ("canceled", "canceling"), ("CANCELED", "CANCELLING")],
)
def test_what_somebody_cancelled_is_not_started_again(
    server: FakeOpenAI, client_of: Any, word: str, stopping: str
) -> None:
    quirky(server, words={"cancelled": word, "cancelling": stopping})
    job = client_of().submit_batch(TEXTS)
    (remote,) = server.batches.jobs
    server.batches.step(remote.id)
    server.batches.cancel(remote.id)
    assert job.status().state == "running"
    server.batches.end_cancel(remote.id, done=2)
    for _ in range(5):
        job.advance()
        server.batches.clock.advance(100)
    assert len(server.batches.jobs) == 1
    assert (job.status().stored, job.status().stopped) == (2, 4)
    with pytest.raises(PermanentProviderError):
        job.result()
    job.resubmit_cancelled()
    quirky(server, words={})
    assert right(look(server, job), TEXTS)


@pytest.mark.case("E7")
@pytest.mark.parametrize("word", ["Completed", "COMPLETED", "succeeded", "JOB_STATE_SUCCEEDED"])
def test_an_end_in_other_words_is_seen(server: FakeOpenAI, client_of: Any, word: str) -> None:
    quirky(server, words={"completed": word, "in_progress": "Running"})
    job = client_of().submit_batch(TEXTS)
    server.batches.step(server.batches.jobs[0].id)
    assert job.status().state == "running"
    assert right(look(server, job), TEXTS)


@pytest.mark.case("E8")
@pytest.mark.parametrize("string_body", [False, True])
def test_an_empty_error_beside_a_vector_is_none(
    server: FakeOpenAI, client_of: Any, string_body: bool
) -> None:
    quirky(server, empty_error=True, string_body=string_body)
    assert right(look(server, client_of().submit_batch(TEXTS)), TEXTS)


# Encodings


@pytest.mark.case("B3")
@pytest.mark.parametrize("http", [True, False])
def test_lines_that_are_refused_for_their_encoding_say_what_to_set(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient], http: bool
) -> None:
    message = "encoding_format is not supported by this model"
    for text in TEXTS:
        server.batches.fail_lines(text, status=400, message=message, http=http, times=1)
    job = look(server, client_of().submit_batch(TEXTS, on_error="keep"))
    result = job.result(on_error="keep")
    assert not result.ok.any()
    assert all('batch_encoding = "omit"' in error.message for error in result.errors.values())
    assert len(server.batches.jobs) == 1, "nor is it tried again as it is"
    assert server.batches.meter.billed_tokens == 0

    again = client_of(options={"batch_encoding": "omit"}).submit_batch(TEXTS)
    assert right(look(server, again), TEXTS)
    assert "encoding_format" not in input_of(server, -1)


@pytest.mark.case("B3")
def test_a_job_that_is_refused_for_its_encoding_says_so_and_ends(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient]
) -> None:
    job = client_of(options={"batch_encoding": "base64"}).submit_batch(TEXTS)
    for _ in range(40):
        for one in server.batches.jobs:
            if not one.ended:
                server.batches.fail(one.id, "invalid_request", "base64 is not supported")
        job.advance()
        server.batches.clock.advance(61.0)
        if job.record.has_ended:
            break
    result = job.result(on_error="keep")
    assert not result.ok.any()
    advice = 'set batch_encoding = "float" or "omit"'
    assert all(advice in error.message for error in result.errors.values())
    assert len(server.batches.jobs) == 3, "attempts"
    assert server.batches.meter.billed_tokens == 0


@pytest.mark.case("B3")
@pytest.mark.parametrize(
    ("taken", "wanted", "form"),
    [
        ({"float"}, "base64", "float"),
        (set(), "base64", None),
        (set(), "float", None),
        ({"base64", "float"}, "base64", "base64"),
        ({"base64", "float"}, "float", "float"),
        ({"float"}, "omit", None),
    ],
)
def test_what_requests_have_learned_of_the_endpoint_holds_for_lines(
    server: FakeOpenAI,
    client_of: Callable[..., EmbeddingClient],
    taken: set[str],
    wanted: str,
    form: str | None,
) -> None:
    client = client_of(options={"batch_encoding": wanted})
    if "base64" not in taken:
        server.faults.push("refusal", message="encoding_format base64: no")
    if not taken:
        server.faults.push("refusal", message="encoding_format: no such field")
    client.embed(["a question"])
    job = client.submit_batch(TEXTS)
    assert (f'"encoding_format":"{form}"' in input_of(server, -1)) == (form is not None)
    assert ("encoding_format" in input_of(server, -1)) == (form is not None)
    assert right(look(server, job), TEXTS)


@pytest.mark.case("B3")
def test_requests_that_are_configured_without_the_field_leave_it_out_of_lines_too(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient]
) -> None:
    client_of(options={"encoding": "omit"}).submit_batch(TEXTS)
    assert "encoding_format" not in input_of(server, -1)
    client_of(options={"encoding": "omit", "batch_encoding": "float"}).submit_batch(["another"])
    assert "encoding_format" in input_of(server, -1)


# Cut off


@pytest.mark.case("E2")
@pytest.mark.parametrize("looks", [3, None])
def test_an_output_that_the_server_has_only_half_is_waited_for(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient], looks: int | None
) -> None:
    """Its length is that of what it sends: no connection broke."""
    quirky(server, late="half", late_looks=looks)
    began = server.batches.clock()
    job = look(server, client_of().submit_batch(TEXTS), seconds=20)
    assert len(server.batches.jobs) == 1
    if looks:
        assert right(job, TEXTS)
        return
    assert 600 <= server.batches.clock() - began < 800, "output_wait, and not so many reads"
    result = job.result(on_error="keep")
    assert result.ok.sum() == 3
    message = next(iter(result.errors.values())).message
    assert "output_gone" in message
    assert "end in the middle of a line" in message
    quirky(server, late=None)
    assert right(job, TEXTS), "once it is whole"


# Refusals


OUTPUTS = "GET /v1/files/{id}/content"


@pytest.mark.case("E3")
@pytest.mark.parametrize("status", [301, 302, 307, 308, 405, 413])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_download_that_is_refused_or_sent_elsewhere_comes_to_an_end(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient], status: int, lasting: bool
) -> None:
    mode: dict[str, Any] = {"mode": "status", "status": status}
    if status < 400:
        mode = {"mode": "redirect", "status": status, "location": "https://files.example/out?k=1"}
    server.faults.when(path=OUTPUTS, times=None if lasting else 2, **mode)
    began = server.batches.clock()
    seconds = 61 if lasting else 20
    job = look(server, client_of().submit_batch(TEXTS), seconds=seconds)
    assert len(server.batches.jobs) == 1
    if not lasting:
        assert right(job, TEXTS)
        return
    assert 600 <= server.batches.clock() - began < 800, "output_wait"
    message = job.result(on_error="keep").errors[0].message
    assert "output_gone" in message
    assert f"HTTP {status}" in message
    if status < 400:
        assert "a redirect to https://files.example/out," in message
        assert "embedcore batch fetch" in message
    server.faults.clear()
    assert right(job, TEXTS), "whenever it is given"


@pytest.mark.case("E3")
def test_a_key_that_may_not_read_results_is_for_a_person(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient]
) -> None:
    server.faults.when(path=OUTPUTS, mode="status", status=401)
    job = client_of().submit_batch(TEXTS)
    for _ in range(30):
        finish(server)
        job.advance()
        server.batches.clock.advance(61)
    assert job.status().in_flight == 6
    assert job.status().jobs[0].lasting
    server.faults.clear()
    assert right(look(server, job), TEXTS)


@pytest.mark.case("C1")
@pytest.mark.parametrize("times", [1, 3])
def test_a_job_that_a_gateway_refuses_by_its_status_is_asked_for_again_and_counted(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient], times: int
) -> None:
    page = {"body": "<html>slow down</html>", "content_type": "text/html", "bills": False}
    server.faults.push("raw", status=429, path="POST /v1/batches", times=times, **page)
    client = client_of()
    job = look(server, client.submit_batch(TEXTS))
    assert right(job, TEXTS)
    assert len(server.batches.jobs) == 1
    ledger = client._engine.account.ledger
    assert ledger is not None
    (used,) = [one for one in usage.by_model(ledger) if one.period == "total"]
    assert used.free_by_status_requests == times
    assert used.free_by_status == Amount(
        tokens=times * used.spent.tokens, cost=times * used.spent.cost
    )
    assert used.spent.tokens == server.batches.meter.billed_tokens
    assert used.unconfirmed == Amount()


@pytest.mark.case("E2")
@pytest.mark.parametrize(
    ("status", "times", "total"),
    # Every two of them together; all three in a campaign.
    [
        pytest.param(
            status,
            times,
            total,
            marks=[] if (row + column) % 2 == which else pytest.mark.campaign(short=True),
        )
        for row, status in enumerate([408, 429, 500, 503])
        for column, times in enumerate([1, 2, None])
        for which, total in enumerate(["honest", "absent"])
    ],
)
def test_what_failed_for_the_moment_and_was_billed_is_in_the_ledger_and_bounded(
    server: FakeOpenAI,
    client_of: Callable[..., EmbeddingClient],
    caplog: pytest.LogCaptureFixture,
    status: int,
    times: int | None,
    total: Any,
) -> None:
    quirky(server, usage=total)
    how = {"status": status, "times": times, "billed": True, "usage": True}
    server.batches.fail_lines("number 3", message="try again later", **how)
    client = client_of()
    job = look(server, client.submit_batch(TEXTS, on_error="keep"))
    result = job.result(on_error="keep")
    assert len(server.batches.jobs) == (3 if times is None else times + 1)
    assert result.ok.tolist() == [row != 3 or times is not None for row in range(6)]
    if times is None:
        assert "try again later" in result.errors[3].message
        assert "it was billed" in result.errors[3].message
    ledger = client._engine.account.ledger
    assert ledger is not None
    used = usage.of_scope(ledger, "default", "total")
    assert used.spent.tokens == server.batches.meter.billed_tokens
    assert used.held == Amount()
    assert job.status().usage.tokens == server.batches.meter.billed_tokens
    assert "1 texts failed for the moment and were billed all the same" in caplog.text


# Too long


@pytest.mark.case("A8")
@pytest.mark.parametrize(
    ("status", "message", "most"),
    [
        (400, "Invalid 'input[0]': maximum input length is 100 tokens.", 100),
        (400, "maximum context length is 100 tokens, however you requested 400 tokens", 110),
        (413, "the input is too long: at most 100 tokens are allowed", 100),
        (422, "input text exceeds the context window", 400),
    ],
)
@pytest.mark.parametrize("http", [True, False])
def test_a_line_refused_for_its_length_is_shortened_for_the_next_job(
    server: FakeOpenAI,
    client_of: Callable[..., EmbeddingClient],
    status: int,
    message: str,
    most: int,
    http: bool,
) -> None:
    long = "word " * 400 + "THE END"
    server.batches.fail_lines("THE END", status=status, message=message, http=http)
    client = client_of()
    job = look(server, client.submit_batch([long, *TEXTS]))
    assert len(server.batches.jobs) == 2
    result = job.result()
    cut = result.tokens_cut[0]
    assert cut is not None
    assert 0.9 * most <= 402 - cut <= most
    sent = json.loads(input_of(server, 1))["body"]["input"]
    assert long.startswith(sent)
    assert (result.vectors == vectors_of([sent, *TEXTS], 1536)).all()
    ledger = client._engine.account.ledger
    assert ledger is not None
    used = usage.of_scope(ledger, "default", "total")
    assert used.spent.tokens == server.batches.meter.billed_tokens
    assert used.held == Amount()


@pytest.mark.case("A8")
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the API key has expired"),
        (402, "no credits left"),
        (400, "encoding_format is not supported by this model"),
    ],
)
def test_what_is_refused_for_another_reason_is_never_cut(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient], status: int, message: str
) -> None:
    long = "word " * 8_000
    server.batches.fail_lines("word", status=status, message=message, times=1)
    job = look(server, client_of().submit_batch([long, *TEXTS], on_error="keep"))
    assert job.result(on_error="keep").ok.tolist() == [False] + [True] * 6
    assert len(server.batches.jobs) == 1


# What one look does not find


@pytest.mark.case("E3")
@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("times", [1, 5])
def test_a_job_that_a_server_does_not_find_for_a_while_is_not_billed_again(
    server: FakeOpenAI, client_of: Callable[..., EmbeddingClient], status: int, times: int
) -> None:
    server.faults.when(path="GET /v1/batches/{id}", mode="status", status=status, times=times)
    job = look(server, client_of().submit_batch(TEXTS, resubmit_lost=True))
    assert right(job, TEXTS)
    assert len(server.batches.jobs) == 1
    assert server.batches.meter.billed_twice == {}


@pytest.mark.fault(78)
@pytest.mark.parametrize("odd", [None, 3, [], {}, "x", {"id": None, "metadata": {"by": "others"}}])
def test_a_lost_job_is_found_beside_entries_that_cannot_be_used(
    server: FakeOpenAI,
    client_of: Callable[..., EmbeddingClient],
    monkeypatch: pytest.MonkeyPatch,
    odd: Any,
) -> None:
    listed = server.batches.batches

    def batches(**how: Any) -> Any:
        page = listed(**how)
        return {**page, "data": [odd, *page["data"], odd]}

    monkeypatch.setattr(server.batches, "batches", batches)
    server.faults.push("reset_billed", path="POST /v1/batches")
    job = look(server, client_of().submit_batch(TEXTS))
    assert right(job, TEXTS)
    assert len(server.batches.jobs) == 1
