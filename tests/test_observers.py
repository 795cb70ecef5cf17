"""What the log says, how often, and what it never says."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import subprocess
import sys
import threading
import typing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from types import ModuleType, SimpleNamespace

import pytest

from embedcore import (
    EmbeddingClient,
    EmbeddingError,
    OutcomeUnknown,
    RateLimited,
    TokenBudgetExceeded,
    events,
)
from embedcore.events import (
    BatchChanged,
    BatchDuplicate,
    BatchStopped,
    BatchWaits,
    BoundViolated,
    BudgetWait,
    Cached,
    CacheProblem,
    LimitNear,
    LimitsLearned,
    Progress,
    Refused,
    RequestFailed,
    RequestFinished,
    RequestSent,
    Reserved,
    Settled,
    Throttled,
)
from embedcore.money import in_dollars
from embedcore.observers import ProgressLine, log, shown, with_progress
from embedcore.testing import FakeEmbedder, FakeOpenAI
from embedcore.testing.fakes.embedder import FAKE_INFO

MODEL = "text-embedding-3-small"
SDK_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")
QUICK = {"retry": {"first_wait": 0.0, "attempts": 3}}

EXAMPLES = [
    (
        RequestFinished(
            provider="openai",
            model=MODEL,
            inputs=3,
            tokens=42,
            reported=True,
            request_id="req_1",
            seconds=0.125,
        ),
        logging.INFO,
        f"openai:{MODEL}: 3 inputs, 42 tokens, request req_1, 0.12 s",
    ),
    (
        RequestFinished(
            provider="p", model="m", inputs=1, tokens=9, reported=False, request_id=None, seconds=2
        ),
        logging.INFO,
        "p:m: 1 inputs, 9 tokens (not reported), request -, 2.00 s",
    ),
    (
        RequestFailed(
            provider="p",
            model="m",
            inputs=2,
            error="RateLimited",
            status=429,
            request_id="r",
            billed="no",
            seconds=0.5,
            wait=1.25,
        ),
        logging.INFO,
        "p:m: 2 inputs, RateLimited (HTTP 429), billed: no, request r, 0.50 s; again in 1.25 s",
    ),
    (
        RequestFailed(
            provider="p",
            model="m",
            inputs=2,
            error="OutcomeUnknown",
            status=None,
            request_id=None,
            billed="unknown",
            seconds=0.5,
            wait=None,
        ),
        logging.INFO,
        "p:m: 2 inputs, OutcomeUnknown, billed: unknown, request -, 0.50 s; not tried again",
    ),
    (
        Throttled(endpoint="https://a.example", seconds=3),
        logging.INFO,
        "https://a.example: rate limited, waiting 3.0 s",
    ),
    (
        LimitNear(scope="s", period="day", unit="tokens", used=950, limit=1000),
        logging.WARNING,
        "scope s: 95 % of 1,000 tokens per day are used: 950 tokens",
    ),
    (
        LimitNear(scope="*", period="month", unit="cost", used=0, limit=0),
        logging.WARNING,
        "scope *: 100 % of $0 per month are used: $0",
    ),
    (Refused(scope="s", message="nothing was sent"), logging.ERROR, "scope s: nothing was sent"),
    (
        BoundViolated(provider="p", model="m", reserved=2, billed=3),
        logging.WARNING,
        "p:m billed 3 tokens where 2 were reserved: its count is wrong; "
        "from now on more is reserved",
    ),
    (
        BatchChanged(
            job="batch_1", status="in_progress", completed=2, failed=1, total=5, scope="s"
        ),
        logging.INFO,
        "Batch batch_1: in_progress (2/5 complete)",
    ),
    (
        BatchDuplicate(job="batch_1", scope="s", tokens=1000, cost=in_dollars(2 * 10**7)),
        logging.WARNING,
        "Batch batch_1: created twice, or after it was given up; told to stop. "
        "1,000 tokens, $0.000020 count as spent",
    ),
    (
        BatchStopped(batch="20261124-1", job="batch_1", texts=3, scope="s"),
        logging.WARNING,
        "Batch batch_1: cancelled at the provider, and not by embedcore; 3 texts of batch "
        "20261124-1 are sent again when you say so: embedcore batch resume --resubmit-cancelled "
        "20261124-1",
    ),
    (
        BatchWaits(
            batch="20261124-1",
            scope="s",
            until=datetime(2026, 11, 25, tzinfo=UTC),
            message="not sent",
        ),
        logging.WARNING,
        "batch 20261124-1 waits until 2026-11-25 00:00:00+00:00: not sent",
    ),
    (
        BatchWaits(batch="20261124-1", scope="s", until=None, message="not sent"),
        logging.WARNING,
        "batch 20261124-1 waits until its budget is raised: not sent",
    ),
    (
        Cached(provider="p", model="m", texts=3),
        logging.INFO,
        "p:m: 3 inputs not paid for again",
    ),
    (
        CacheProblem(path="/v/vectors", message="/v/vectors is empty"),
        logging.WARNING,
        "cache: /v/vectors is empty",
    ),
    (
        LimitsLearned(
            endpoint="https://a.example",
            model="m",
            requests_per_minute=3000,
            tokens_per_minute=None,
        ),
        logging.INFO,
        "https://a.example, m: 3,000 requests and any number of tokens per minute are allowed",
    ),
    (
        BudgetWait(scope="s", until=datetime(2026, 11, 25, tzinfo=UTC), message="not sent"),
        logging.WARNING,
        "scope s: waiting for its budget until 2026-11-25 00:00:00+00:00: not sent",
    ),
    (RequestSent(provider="p", model="m", inputs=1, tokens=1, attempt=1), None, ""),
    (Reserved(scope="s", tokens=1, cost=Decimal(1)), None, ""),
    (Settled(scope="s", tokens=1, cost=Decimal(1), unconfirmed=False), None, ""),
    (Progress(done=1, total=2, tokens=3, cost=Decimal(4)), None, ""),
]


@pytest.mark.parametrize(("event", "level", "line"), EXAMPLES)
def test_each_event_is_at_most_one_line(event, level, line, caplog):
    with caplog.at_level(logging.DEBUG, logger="embedcore"):
        log(event)
    written = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert written == ([] if level is None else [(level, line)])


def test_there_is_an_example_of_every_event():
    assert {type(event) for event, _, _ in EXAMPLES} == set(typing.get_args(events.Event))


def test_events_are_plain_frozen_values():
    for event, _, _ in EXAMPLES:
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        assert all(
            isinstance(value, str | int | float | datetime | Decimal | None)
            for value in fields.values()
        )
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, next(iter(fields)), "other")
        assert replace(event) == event


def test_amounts_have_a_unit():
    assert shown("tokens", 1234567) == "1,234,567 tokens"
    assert shown("cost", Decimal("1.5")) == "$1.50"


@pytest.fixture
def server(monkeypatch):
    with FakeOpenAI() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
        yield server


@pytest.fixture(params=[logging.DEBUG, logging.INFO])
def everything(request, monkeypatch):
    """The log of a program that wants every line of every library."""
    for name in SDK_LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s|%(name)s|%(message)s"))
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", request.param)
    root.manager._clear_cache()  # type: ignore[attr-defined]
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)
    root.manager._clear_cache()  # type: ignore[attr-defined]


def test_every_call_of_the_api_is_one_line(server, everything):
    texts = ["the secret of the first text", "the secret of the second"]
    with EmbeddingClient(config=QUICK) as client:
        client.embed_texts(texts)
        server.faults.push("status", status=500)
        client.embed_texts(["a third secret"])
    lines = everything.getvalue().splitlines()
    ours = [line.split("|", 2) for line in lines if "|embedcore|" in line]
    assert all(level == "INFO" for level, _, _ in ours)
    of_once = ("vectors are kept in", "per minute are allowed")
    ours = [line for line in ours if not any(words in line[2] for words in of_once)]
    assert len(ours) == 3
    answered = re.compile(
        rf"openai:{MODEL}: (\d+) inputs, (\d+) tokens, request req_[0-9a-f]+, \d+\.\d\d s"
    )
    first, failed, last = (line for _, _, line in ours)
    assert answered.fullmatch(first).groups() == ("2", str(server.requests[0].billed_tokens))
    assert answered.fullmatch(last)[1] == "1"
    assert "HTTP 500" in failed
    assert "again in" in failed
    others = [line for line in lines if line.split("|")[1].partition(".")[0] in SDK_LOGGERS]
    assert others == []
    assert "secret" not in everything.getvalue()
    assert server.api_key not in everything.getvalue()


def test_a_closed_gate_is_one_line(server, everything):
    server.faults.push("rate_limited", retry_after=0.01)
    with EmbeddingClient(config=QUICK) as client:
        client.embed_text("a")
    assert f"INFO|embedcore|{server.base_url}: rate limited, waiting 0.0" in everything.getvalue()


def lines_at(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_a_refusal_is_one_error(caplog):
    config = {"budget": {"daily_token_limit": 10}}
    with EmbeddingClient(embedder=FakeEmbedder(), config=config, scope="team") as client:
        for _ in range(2):
            with pytest.raises(TokenBudgetExceeded) as caught:
                client.embed_texts(["a rather private text", "x" * 40])
    assert lines_at(caplog, logging.ERROR) == [f"scope team: {caught.value}"] * 2
    assert "private" not in caplog.text


def test_a_warning_once_per_window_over_threads_and_clients(caplog):
    config = {"budget": {"daily_token_limit": 100, "monthly_token_limit": 105}}
    clients = [EmbeddingClient(embedder=FakeEmbedder(), config=config) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: clients[n % 4].embed_text(f"t{n:03d}"), range(98)))
    for client in clients:
        client.close()
    warnings = lines_at(caplog, logging.WARNING)
    assert Counter(line.split(" are used")[0].split(" % of ")[1] for line in warnings) == {
        "100 tokens per day": 1,
        "105 tokens per month": 1,
    }


def test_a_warning_once_per_window_over_processes(forks):
    program = (
        "import logging; logging.basicConfig(level=logging.WARNING)\n"
        "from embedcore import EmbeddingClient\n"
        "from embedcore.testing import FakeEmbedder\n"
        "config = {'budget': {'daily_token_limit': 100}, 'cache': False}\n"
        "with EmbeddingClient(embedder=FakeEmbedder(), config=config) as client:\n"
        "    for n in range(33): client.embed_text(f't{n:03d}')\n"
    )
    running = [forks(program, stderr=subprocess.PIPE) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "".join(errors).count("tokens per day are used") == 1


def test_no_warning_without_a_limit_or_below_nine_tenths(caplog):
    with EmbeddingClient(embedder=FakeEmbedder()) as client:
        client.embed_text("x" * 4000)
    with EmbeddingClient(
        embedder=FakeEmbedder(), scope="s", config={"budget": {"daily_token_limit": 100}}
    ) as client:
        client.embed_text("x" * 4 * 89)
        assert lines_at(caplog, logging.WARNING) == []
        client.embed_text("x" * 4)
        assert len(lines_at(caplog, logging.WARNING)) == 1


@pytest.mark.fault(46)
def test_a_bill_above_the_bound_is_told(caplog):
    def dear(request, honest):
        return replace(honest, tokens=honest.tokens + 1000)

    from embedcore.testing.fakes.embedder import Outcome

    with EmbeddingClient(embedder=FakeEmbedder(script=[Outcome(reply=dear)])) as client:
        client.embed_text("a")
    (warning,) = lines_at(caplog, logging.WARNING)
    assert "billed 1001 tokens" in warning


def test_events_tell_the_same_story_as_the_bill():
    told: list[events.Event] = []
    lock = threading.Lock()

    def remember(event):
        with lock:
            told.append(event)

    info = replace(FAKE_INFO, max_texts_per_request=5)
    script = [RateLimited("slow down"), OutcomeUnknown("lost")]
    fake = FakeEmbedder(info=info, script=script)
    config = {**QUICK, "budget": {"daily_token_limit": 10_000}}
    with EmbeddingClient(embedder=fake, config=config, observers=[remember]) as client:
        result = client.embed([f"text number {n}" for n in range(23)])
    kinds = Counter(type(event).__name__ for event in told)
    assert kinds["RequestSent"] == len(fake.calls) == 7
    assert kinds["RequestFinished"] == 5
    assert kinds["RequestFailed"] == 2
    assert kinds["Reserved"] == 1
    settled = [event for event in told if isinstance(event, Settled)]
    assert sum(event.tokens for event in settled) == result.usage.tokens >= fake.billed_tokens
    assert [event.unconfirmed for event in settled].count(True) == 1
    assert max(event.done for event in told if isinstance(event, Progress)) == 23


def test_a_failing_observer_changes_nothing(caplog):
    def broken(_):
        raise KeyError("an observer's own trouble")

    with EmbeddingClient(embedder=FakeEmbedder(), observers=[broken]) as client:
        assert client.embed_text("a")
    assert "an observer's own trouble" in caplog.text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_written_over():
    stream, now = Terminal(), [0.0]
    line = ProgressLine(stream, monotonic=lambda: now[0])
    for done in (1, 2, 3):
        line(Progress(done=done, total=4, tokens=done * 10, cost=Decimal(done)))
        now[0] += 0.15
    line(Reserved(scope="s", tokens=1, cost=Decimal(1)))
    line(Progress(done=4, total=4, tokens=4000, cost=Decimal(2)))
    parts = stream.getvalue().split("\r")[1:]
    assert [part.split(" of")[0] for part in parts] == ["1", "3", "4"]
    assert parts[-1] == "4 of 4 texts, 4,000 tokens, $2.00\n"


def test_progress_elsewhere_is_a_line_now_and_then(caplog):
    now = [0.0]
    line = ProgressLine(io.StringIO(), monotonic=lambda: now[0])
    with caplog.at_level(logging.INFO, logger="embedcore"):
        for done in range(1, 101):
            line(Progress(done=done, total=100, tokens=done, cost=Decimal(0)))
            now[0] += 0.5
    assert len(caplog.records) == 6, "one every ten seconds, and the last"


@pytest.mark.case("H8")
@pytest.mark.parametrize("stream", [None, "closed"])
def test_progress_without_standard_error_goes_to_the_log(monkeypatch, caplog, stream):
    """As under pythonw, or in a service that has closed it."""
    if stream == "closed":
        stream = Terminal()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with (
        caplog.at_level(logging.INFO, logger="embedcore"),
        EmbeddingClient(embedder=FakeEmbedder()) as client,
    ):
        assert client.embed(["a"], progress=True).ok.all()
        list(client.embed_iter(["b"], progress=True))
    assert "1 of 1 texts" in caplog.text


@pytest.mark.case("G3")
def test_progress_in_a_notebook_is_one_line_written_over(monkeypatch):
    """A kernel's standard error is no terminal, and is shown below the cell."""
    kernel, shell = ModuleType("IPython"), SimpleNamespace(kernel=object())
    kernel.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with EmbeddingClient(embedder=FakeEmbedder()) as client:
        client.embed(["a"], progress=True)
    assert stream.getvalue().startswith("\r1 of 1 texts")
    assert stream.getvalue().endswith("\n")
    # IPython in a terminal whose output goes to a file, and a stream that was chosen by hand.
    assert ProgressLine(io.StringIO())._screen is None
    del shell.kernel
    assert ProgressLine()._screen is None


@pytest.mark.case("G3")
def test_a_shorter_line_covers_the_longer_one():
    stream = Terminal()
    line = ProgressLine(stream)
    line(Progress(done=1, total=None, tokens=10**9, cost=Decimal(0)))
    line._next = 0.0
    line(Progress(done=2, total=2, tokens=1, cost=Decimal(0)))
    first, last = stream.getvalue().split("\r")[1:]
    assert len(last.rstrip("\n")) == len(first)


@pytest.mark.case("G3")
def test_what_is_done_has_its_cost_in_it():
    """Several threads tell of it; the last of them says what all of it cost."""
    told = []
    fake = FakeEmbedder(info=replace(FAKE_INFO, max_texts_per_request=2))
    with EmbeddingClient(embedder=fake) as client:
        result = client.embed([f"text {n}" for n in range(60)], progress=told.append)
    (last,) = [one for one in told if one.done == one.total]
    assert last.tokens == result.usage.tokens
    assert sorted(one.done for one in told) == list(range(2, 61, 2))


def test_a_callable_is_told_of_progress_alone():
    told, heard = [], []
    observe = with_progress(told.append, heard.append)
    progress = Progress(done=1, total=1, tokens=0, cost=Decimal(0))
    for event in (Reserved(scope="s", tokens=1, cost=Decimal(1)), progress):
        observe(event)
    assert len(told) == 2
    assert heard == [progress]


def test_nothing_is_said_of_a_refused_text(caplog):
    with (
        caplog.at_level(logging.DEBUG),
        EmbeddingClient(embedder=FakeEmbedder()) as client,
        pytest.raises(EmbeddingError) as caught,
    ):
        client.embed_texts(["fine", "a private \ud800 text"])
    assert "private" not in str(caught.value)
    assert "private" not in caplog.text
