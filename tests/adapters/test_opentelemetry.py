"""Does OpenTelemetry hear what was sent and what it cost, by the conventions, and nothing else?"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import get_args

import pytest

WHY = "needs the extra integrations: make test-integrations"
pytest.importorskip("opentelemetry.sdk", reason=WHY)

from hypothesis import (  # noqa: E402
    HealthCheck,
    given,
    settings,
    strategies as st,
)
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

from embedcore import (  # noqa: E402
    EmbeddingClient,
    EmbeddingError,
    TokenBudgetExceeded,
    errors as tree,
)
from embedcore.adapters.opentelemetry import OpenTelemetryObserver  # noqa: E402
from embedcore.events import (  # noqa: E402
    BatchChanged,
    BatchDuplicate,
    BatchStopped,
    BatchWaits,
    BoundViolated,
    BudgetWait,
    Cached,
    CacheProblem,
    Event,
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
from embedcore.testing import FakeEmbedder, FakeOpenAI, vectors_of  # noqa: E402
from embedcore.testing.openai.modes import MODES  # noqa: E402

MODEL = "text-embedding-3-small"
QUICK = {"first_wait": 0.0, "longest_wait": 0.01, "attempts": 3, "request_timeout": 1.0}
COMMON = {
    "gen_ai.operation.name": "embeddings",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": MODEL,
}
DURATION, TOKENS = "gen_ai.client.operation.duration", "gen_ai.client.token.usage"
LATER = "gen_ai.client.embeddings.duration", "gen_ai.client.embeddings.operation.input_tokens"


class Telemetry:
    """An observer, and what a back end would get of it."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.observer = OpenTelemetryObserver(
            tracer_provider=self.tracers, meter_provider=self._meters
        )

    @property
    def spans(self):
        return self._exporter.get_finished_spans()

    def read(self):
        """Every point by its metric's name, at once: some readers forget what was read."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        found = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        return {metric.name: list(metric.data.data_points) for metric in found}

    def total(self, name, **attributes):
        wanted = {f"embedcore.{key}": value for key, value in attributes.items()}
        points = self.read().get(name, [])
        return sum(p.value for p in points if wanted.items() <= dict(p.attributes).items())

    def exported(self):
        """Everything, as text."""
        data = self._reader.get_metrics_data()
        spans = "".join(span.to_json() for span in self.spans)
        return spans + ("" if data is None else data.to_json())

    def close(self):
        self.tracers.shutdown()
        self._meters.shutdown()


@pytest.fixture
def telemetry():
    telemetry = Telemetry()
    yield telemetry
    telemetry.close()


@pytest.fixture
def connect(server, telemetry):
    opened = []

    def connect(*, retry=None, options=None, **config):
        client = EmbeddingClient(
            options={"dimensions": 8, **(options or {})},
            observers=[telemetry.observer],
            config={"retry": {**QUICK, **(retry or {})}, **config},
        )
        opened.append(client)
        return client

    yield connect
    for client in opened:
        client.close()


def shown(span):
    """A span's attributes but those that differ from run to run, or with the server's place."""
    varying = ("embedcore.request_id", "server.address", "server.port")
    return {key: value for key, value in span.attributes.items() if key not in varying}


# Spans


def test_a_request_is_a_span_by_the_conventions(connect, server, telemetry):
    began = time.time_ns()
    connect().embed_texts(["one text", "another"])
    ended = time.time_ns()
    (span,) = telemetry.spans
    assert span.name == f"embeddings {MODEL}"
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.UNSET
    assert shown(span) == {
        **COMMON,
        "gen_ai.usage.input_tokens": server.meter.billed_tokens,
        "embedcore.inputs": 2,
    }
    assert span.attributes["embedcore.request_id"].startswith("req_")
    assert began <= span.start_time < span.end_time <= ended
    assert span.instrumentation_scope.name == "embedcore"
    assert "1.41.0" in span.instrumentation_scope.schema_url


def test_a_span_lasts_as_long_as_its_request(monkeypatch, telemetry):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    seconds = []
    with FakeOpenAI(api_key=None, latency=0.2) as server:
        client = EmbeddingClient(
            options={"base_url": server.base_url},
            observers=[
                telemetry.observer,
                lambda event: seconds.append(getattr(event, "seconds", None)),
            ],
        )
        client.embed_text("a")
        client.close()
    (span,) = telemetry.spans
    (lasted,) = filter(None, seconds)
    assert lasted >= 0.2
    assert span.end_time - span.start_time == pytest.approx(lasted * 1e9, abs=1000)
    (point,) = telemetry.read()[DURATION]
    assert point.sum == pytest.approx(lasted)


def test_a_retry_shows_as_a_failed_attempt_and_another(connect, server, telemetry):
    server.faults.push("rate_limited", retry_after_ms=20)
    connect().embed_texts(["one text"])
    failed, finished = telemetry.spans
    assert failed.status.status_code is StatusCode.ERROR
    wait = failed.attributes["embedcore.retry.wait"]
    assert shown(failed) == {
        **COMMON,
        "error.type": "RateLimited",
        "http.response.status_code": 429,
        "embedcore.billed": "no",
        "embedcore.retry.wait": wait,
        "embedcore.inputs": 1,
    }
    assert 0.02 <= wait < 1
    assert finished.status.status_code is StatusCode.UNSET
    assert failed.end_time <= finished.start_time
    assert telemetry.total("embedcore.throttled") == pytest.approx(wait)
    by_error = {point.attributes.get("error.type"): point for point in telemetry.read()[DURATION]}
    assert {error: point.count for error, point in by_error.items()} == {"RateLimited": 1, None: 1}


@pytest.mark.parametrize("mode", ["quota_exhausted", "reset", "status", "fewer", "cut_json"])
def test_a_failure_is_an_error_by_the_name_of_its_class(connect, server, telemetry, mode):
    server.faults.always(mode)
    with pytest.raises(EmbeddingError) as caught:
        connect().embed_texts(["one text"])
    last = telemetry.spans[-1]
    assert last.attributes["error.type"] == type(caught.value).__name__
    assert last.attributes["embedcore.billed"] == caught.value.billed
    assert "embedcore.retry.wait" not in last.attributes
    assert all("embedcore.retry.wait" in span.attributes for span in telemetry.spans[:-1])
    assert len(telemetry.spans) == server.meter.requests
    assert TOKENS not in telemetry.read()
    assert "gen_ai.usage.input_tokens" not in last.attributes


def test_every_request_of_many_threads_is_told(connect, server, telemetry):
    client = connect(options={"max_texts_per_request": 2}, concurrency=8)
    server.faults.when(probability=0.2, mode="status", status=503)
    threads = [
        threading.Thread(target=client.embed, args=([f"text {n} {m}" for m in range(20)],))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(telemetry.spans) == server.meter.requests >= 60
    assert sum(point.count for point in telemetry.read()[DURATION]) == server.meter.requests
    (tokens,) = telemetry.read()[TOKENS]
    assert tokens.sum == server.meter.billed_tokens


def test_a_span_belongs_to_that_of_its_caller(connect, server, telemetry):
    tracer = telemetry.tracers.get_tracer("a program")
    client = connect(options={"max_texts_per_request": 1})
    with tracer.start_as_current_span("index") as parent:
        client.embed_texts(["one", "two", "three"])
    *spans, outer = telemetry.spans
    assert outer.name == "index"
    assert len(spans) == 3
    for span in spans:
        assert span.parent is not None, "the engine does not carry the caller's context"
        assert span.parent.span_id == parent.get_span_context().span_id
        assert span.context.trace_id == parent.get_span_context().trace_id


# Metrics


def test_the_metrics_are_those_of_the_conventions(connect, server, telemetry):
    connect().embed_texts(["one text", "another"])
    read = telemetry.read()
    (seconds,), (tokens,) = read[DURATION], read[TOKENS]
    assert COMMON.items() <= dict(seconds.attributes).items()
    assert {**COMMON, "gen_ai.token.type": "input"}.items() <= dict(tokens.attributes).items()
    assert (tokens.count, tokens.sum) == (1, server.meter.billed_tokens)
    assert seconds.explicit_bounds == (
        0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    )  # fmt: skip
    assert tokens.explicit_bounds == (
        1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864,
    )  # fmt: skip
    assert not set(LATER) & set(read)


@pytest.mark.parametrize(
    "chosen", ["gen_ai_latest_experimental", "http, gen_ai_latest_experimental"]
)
def test_later_conventions_can_be_chosen(monkeypatch, server, chosen):
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", chosen)
    telemetry = Telemetry()
    with EmbeddingClient(observers=[telemetry.observer]) as client:
        client.embed_text("a")
    read = telemetry.read()
    telemetry.close()
    assert set(LATER) <= set(read)
    assert not {DURATION, TOKENS} & set(read)
    assert "gen_ai.token.type" not in read[LATER[1]][0].attributes


def test_tokens_that_nobody_named_are_not_told(telemetry):
    fake = FakeEmbedder(reports_tokens=False)
    with EmbeddingClient(embedder=fake, observers=[telemetry.observer]) as client:
        client.embed_texts(["a text"])
    (span,) = telemetry.spans
    assert "gen_ai.usage.input_tokens" not in span.attributes
    assert TOKENS not in telemetry.read()


def test_the_budget_is_counted_by_scope(connect, server, telemetry):
    client = connect(scope="team", budget={"daily_token_limit": 30})
    with pytest.raises(TokenBudgetExceeded):
        for number in range(100):
            client.embed_texts([f"text number {number}"])
    billed = server.meter.billed_tokens
    assert telemetry.total("embedcore.budget.settled", scope="team", unconfirmed=False) == billed
    assert telemetry.total("embedcore.budget.reserved", scope="team") >= billed > 0
    assert telemetry.total("embedcore.budget.refused", scope="team") == 1
    assert telemetry.total("embedcore.budget.cost") == pytest.approx(billed * 0.02e-6)


@pytest.mark.case("H2")
def test_what_is_held_settled_and_refused_names_the_model(connect, telemetry):
    client = connect(scope="team", budget={"daily_token_limit": 6})
    client.embed_texts(["one text"])
    with pytest.raises(TokenBudgetExceeded):
        client.embed_texts(["many words of which there are far too many for it"])
    for name in ("reserved", "settled", "cost", "refused"):
        points = telemetry.read()[f"embedcore.budget.{name}"]
        for point in points:
            assert point.attributes["gen_ai.provider.name"] == "openai"
            assert point.attributes["gen_ai.request.model"] == MODEL
            assert point.attributes["embedcore.scope"] == "team"


@pytest.mark.case("H2")
def test_a_batch_costs_what_it_cost(server, canary, telemetry, tmp_path):
    client = EmbeddingClient(
        options={"batch": True},
        observers=[telemetry.observer],
        config={"home": tmp_path / "batches", "scope": "team"},
    )
    with client:
        client.batch_embed_texts(["one text", "two texts"], poll_interval=0.01)
    billed = server.batches.meter.billed_tokens
    assert billed > 0
    assert telemetry.total("embedcore.budget.settled", scope="team", unconfirmed=False) == billed
    assert telemetry.total("embedcore.budget.reserved", scope="team") >= billed
    assert telemetry.total("embedcore.budget.cost") == pytest.approx(billed * 0.01e-6)
    (settled,) = telemetry.read()["embedcore.budget.settled"]
    assert settled.attributes["gen_ai.request.model"] == MODEL
    assert telemetry.total("embedcore.batch.changes", scope="team") > 0


@pytest.mark.case("H2")
def test_what_is_taken_back_has_a_counter_of_its_own(telemetry):
    told = {"scope": "s", "provider": "p", "model": "m"}
    for tokens, unconfirmed in ((9, True), (-9, True), (5, False)):
        telemetry.observer(
            Settled(tokens=tokens, cost=Decimal(tokens), unconfirmed=unconfirmed, **told)
        )
    assert telemetry.total("embedcore.budget.settled") == 14
    assert telemetry.total("embedcore.budget.corrected") == 9
    assert telemetry.total("embedcore.budget.cost") == 14
    assert telemetry.total("embedcore.budget.corrected_cost") == 9


@pytest.mark.case("H2")
def test_every_event_reaches_it(telemetry):
    """But the one that an attempt begins: it is told when it has ended."""
    moment = datetime(2026, 11, 30, tzinfo=UTC)
    who = {"provider": "p", "model": "m"}
    events = {
        "waits": BudgetWait(scope="s", until=moment, message="later"),
        "batch waits": BatchWaits(batch="b", scope="s", until=None, message="later"),
        "near": LimitNear(scope="s", period="day", unit="tokens", used=9, limit=10),
        "underestimated": BoundViolated(reserved=3, billed=10, **who),
        "problems": CacheProblem(path="/secret/place", message="full of secrets"),
        "changes": BatchChanged(
            job="j", status="completed", completed=2, failed=0, total=2, scope="s"
        ),
        "duplicates": BatchDuplicate(job="j", scope="s", tokens=3, cost=Decimal(4)),
        "stopped": BatchStopped(batch="b", job="j", texts=6, scope="s"),
        "limits": LimitsLearned(
            endpoint="https://host/v1", model="m", requests_per_minute=60, tokens_per_minute=None
        ),
        "progress": Progress(done=3, total=None, tokens=1, cost=Decimal(1)),
    }
    for event in events.values():
        telemetry.observer(event)
    read = telemetry.read()
    assert {name: [point.value for point in points] for name, points in read.items()} == {
        "embedcore.budget.waits": [1, 1],
        "embedcore.budget.near": [1],
        "embedcore.budget.underestimated": [7],
        "embedcore.cache.problems": [1],
        "embedcore.batch.changes": [1],
        "embedcore.batch.duplicates": [1],
        "embedcore.batch.stopped": [6],
        "embedcore.rate_limit.requests": [60],
        "embedcore.progress.done": [3],
    }
    assert "secret" not in telemetry.exported()
    known = {
        RequestSent,
        RequestFinished,
        RequestFailed,
        Throttled,
        Cached,
        Reserved,
        Settled,
        Refused,
    }
    assert known | {type(event) for event in events.values()} == set(get_args(Event))


def test_what_nobody_can_prove_is_unconfirmed(connect, server, telemetry):
    server.faults.push("reset_billed")
    connect().embed_texts(["one text"])
    unconfirmed = telemetry.total("embedcore.budget.settled", unconfirmed=True)
    certain = telemetry.total("embedcore.budget.settled", unconfirmed=False)
    assert unconfirmed > 0
    assert certain + unconfirmed >= server.meter.billed_tokens


# Events


FINISHED = {
    "provider": "acme",
    "model": "m",
    "inputs": 1,
    "tokens": 3,
    "reported": True,
    "request_id": None,
    "seconds": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Later(RequestFinished):
    """As a later version may tell it, with the endpoint."""

    endpoint: str


@pytest.mark.parametrize(
    ("endpoint", "address", "port"),
    [
        ("https://api.openai.com/v1", "api.openai.com", 443),
        ("http://10.0.0.1:8080/v1", "10.0.0.1", 8080),
        ("http://embed.local/", "embed.local", 80),
        ("http://[::1]:9/", "::1", 9),
        ("https://user:secret@host/v1", "host", 443),
        ("https://host:99999999/", None, None),
        ("https://[broken/", None, None),
        ("acme:m", None, None),
        ("", None, None),
    ],
)
def test_the_server_is_named_where_it_is_known(telemetry, endpoint, address, port):
    telemetry.observer(Later(endpoint=endpoint, **FINISHED))
    telemetry.observer(Throttled(endpoint=endpoint, seconds=2.0))
    (span,) = telemetry.spans
    (throttled,) = telemetry.read()["embedcore.throttled"]
    for attributes in (span.attributes, throttled.attributes):
        assert attributes.get("server.address") == address
        assert attributes.get("server.port") == port
    assert "secret" not in telemetry.exported()


def test_what_was_reused_is_counted(telemetry):
    for texts in (2, 3):
        telemetry.observer(Cached(provider="openai", model=MODEL, texts=texts))
    (point,) = telemetry.read()["embedcore.cached"]
    assert (point.value, dict(point.attributes)) == (5, COMMON)
    assert telemetry.spans == ()


def test_other_events_say_nothing(telemetry):
    for event in (
        object(),
        None,
        RequestSent(provider="p", model="m", inputs=1, tokens=1, attempt=1),
    ):
        telemetry.observer(event)
    assert telemetry.spans == ()
    assert telemetry.read() == {}


def test_the_errors_that_it_names_are_those_of_the_tree(telemetry):
    kinds = [name for name, kind in vars(tree).items() if isinstance(kind, type)]
    for name in kinds:
        told = {key: value for key, value in FINISHED.items() if key not in ("tokens", "reported")}
        telemetry.observer(RequestFailed(error=name, status=None, billed="no", wait=None, **told))
    assert [span.attributes["error.type"] for span in telemetry.spans] == kinds


def test_without_a_provider_nothing_happens(server):
    with EmbeddingClient(observers=[OpenTelemetryObserver()]) as client:
        assert client.embed_texts(["a"]) == vectors_of(["a"], 1536).tolist()


# Secrets

SLOW = {"hang", "late", "drip", "endless", "gzip_bomb"}
PRIVATE = st.text("ABCDEFGHJKLMNPQRSTUVWXYZ", min_size=10, max_size=20)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.sampled_from(sorted(set(MODES) - SLOW)), max_size=6),
    st.lists(PRIVATE, min_size=1, max_size=5, unique=True),
)
@pytest.mark.filterwarnings("default::ResourceWarning")
@pytest.mark.fault(131)
def test_neither_a_text_nor_a_vector_nor_the_key_is_exported(server, canary, modes, texts):
    telemetry = Telemetry()
    server.faults.clear()
    for mode in modes:
        options = {"body": texts[0]} if mode == "raw" else {}
        server.faults.push(mode, **options)
    client = EmbeddingClient(
        options={"dimensions": 8, "max_texts_per_request": 2},
        observers=[telemetry.observer],
        config={"retry": QUICK, "budget": {"daily_token_limit": 10**7}},
    )
    with client, contextlib.suppress(EmbeddingError):
        client.embed(texts, on_error="keep")
    exported = telemetry.exported()
    telemetry.close()
    assert json.dumps(MODEL)[1:-1] in exported
    keys = (canary, base64.b64encode(canary.encode()).decode())
    assert not [word for word in (*texts, *keys) if word[3:] in exported]
    components = [repr(number)[:14] for number in vectors_of(texts, 8).ravel().tolist()]
    assert not [number for number in components if len(number) > 12 and number in exported]
