"""OpenTelemetry: embedcore's requests, tokens and costs as spans and metrics.

Spans and metrics follow the semantic conventions for generative AI, operation ``embeddings``, as
of release 1.41.0: https://opentelemetry.io/docs/specs/semconv/gen-ai/. They are in development.
Those that have been published apart from it since, as semantic-conventions-genai, give embeddings
metrics of their own; these are used where ``OTEL_SEMCONV_STABILITY_OPT_IN`` has
``gen_ai_latest_experimental`` in its list, the variable the conventions name for that.

Needs OpenTelemetry: ``pip install opentelemetry-api``.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import urlsplit

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
    Reserved,
    Settled,
    Throttled,
)

try:
    from opentelemetry import metrics, trace
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "opentelemetry":
        raise
    raise ModuleNotFoundError(
        "embedcore.adapters.opentelemetry needs OpenTelemetry: pip install opentelemetry-api",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import TracerProvider

Attributes: TypeAlias = dict[str, str | int | float | bool]

_SCHEMA: Final = "https://opentelemetry.io/schemas/1.41.0"
_OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"
_LATEST: Final = "gen_ai_latest_experimental"
# The boundaries that the conventions advise: seconds, tokens.
_SECONDS: Final = [0.01 * 2**power for power in range(14)]
_TOKENS: Final = [4**power for power in range(14)]
_SCOPE: Final = "embedcore.scope"
_PORTS: Final = {"https": 443, "http": 80}


class OpenTelemetryObserver:
    """``EmbeddingClient(observers=[OpenTelemetryObserver()])``: a span for each attempt.

    The convention would have one span for all attempts of a request; with one for each, a retry and
    the wait before it can be seen. A failed attempt has ``error.type``, the name of the class in
    ``embedcore.errors``, and ``embedcore.retry.wait`` if it is tried again. Tokens are recorded
    only where the provider named them. Neither a text nor a vector nor a key is in an event, and so
    none is exported. Without providers those that are set for the process are used.

    Every other event is counted, or is a gauge: docs/how-to/trace-with-opentelemetry.md lists them.
    An attempt is recorded once it has ended, so ``RequestSent`` says nothing here.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        latest = _LATEST in os.environ.get(_OPT_IN, "").replace(" ", "").split(",")
        schema = None if latest else _SCHEMA
        self._tracer = trace.get_tracer("embedcore", None, tracer_provider, schema)
        meter = metrics.get_meter("embedcore", "", meter_provider, schema)
        self._token_type: Attributes = {} if latest else {"gen_ai.token.type": "input"}
        self._duration = meter.create_histogram(
            "gen_ai.client.embeddings.duration" if latest else "gen_ai.client.operation.duration",
            "s",
            "Duration of one attempt",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.embeddings.operation.input_tokens"
            if latest
            else "gen_ai.client.token.usage",
            "{token}",
            "Tokens that the provider billed for one request",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )
        self._held = meter.create_counter("embedcore.budget.reserved", "{token}", "Reserved")
        self._settled = meter.create_counter("embedcore.budget.settled", "{token}", "Charged")
        self._cost = meter.create_counter("embedcore.budget.cost", "{USD}", "Charged, in dollars")
        self._refused = meter.create_counter("embedcore.budget.refused", "{call}", "Over a limit")
        self._throttled = meter.create_counter("embedcore.throttled", "s", "Told to wait, in all")
        self._reused = meter.create_counter("embedcore.cached", "{text}", "Taken from the cache")
        self._meter = _Meter(meter)

    def __call__(self, event: object) -> None:
        """Tell of an event. Others, those of later versions among them, say nothing here."""
        match event:
            case RequestFinished():
                self._finished(event)
            case RequestFailed():
                self._failed(event)
            case Throttled():
                self._throttled.add(event.seconds, _server(event.endpoint))
            case Cached():
                self._reused.add(event.texts, _common(event))
            case Reserved():
                self._held.add(event.tokens, _paid(event))
            case Settled():
                self._charged(event)
            case Refused():
                self._refused.add(1, _paid(event))
            case _:
                self._meter(event)

    def _charged(self, event: Settled) -> None:
        cost = float(event.cost)
        if event.tokens < 0 or cost < 0:
            # A counter only goes up: what is taken back has its own.
            self._meter.corrected(-event.tokens, -cost, _paid(event))
            return
        where: Attributes = {**_paid(event), "embedcore.unconfirmed": event.unconfirmed}
        self._settled.add(event.tokens, where)
        self._cost.add(cost, where)

    def _finished(self, event: RequestFinished) -> None:
        common, usage = _common(event), Attributes()
        if event.reported:
            usage["gen_ai.usage.input_tokens"] = event.tokens
            self._tokens.record(event.tokens, {**common, **self._token_type})
        self._span(event, common, usage)

    def _failed(self, event: RequestFailed) -> None:
        details: Attributes = {"embedcore.billed": event.billed}
        if event.status is not None:
            details["http.response.status_code"] = event.status
        if event.wait is not None:
            details["embedcore.retry.wait"] = event.wait
        self._span(event, {**_common(event), "error.type": event.error}, details)

    def _span(
        self, event: RequestFinished | RequestFailed, common: Attributes, more: Attributes
    ) -> None:
        """A span that ends now and began as long ago as the attempt lasted, and its duration."""
        end = time.time_ns()
        span = self._tracer.start_span(
            f"embeddings {event.model}",
            kind=trace.SpanKind.CLIENT,
            attributes={**common, "embedcore.inputs": event.inputs},
            start_time=end - round(event.seconds * 1e9),
        )
        span.set_attributes(more)
        if event.request_id is not None:
            span.set_attribute("embedcore.request_id", event.request_id)
        if isinstance(event, RequestFailed):
            span.set_status(trace.StatusCode.ERROR)
        span.end(end)
        self._duration.record(event.seconds, common)


class _Meter:
    """The events of which there is nothing more to say than how often, or how much."""

    def __init__(self, meter: Meter) -> None:
        counter, gauge = meter.create_counter, meter.create_gauge
        self._corrected = counter("embedcore.budget.corrected", "{token}", "Charged, taken back")
        self._refunded = counter("embedcore.budget.corrected_cost", "{USD}", "The same in dollars")
        self._waits = counter("embedcore.budget.waits", "{wait}", "Waits for a budget")
        self._near = counter("embedcore.budget.near", "{warning}", "Limits that are nearly used up")
        self._under = counter(
            "embedcore.budget.underestimated", "{token}", "Billed beyond what was reserved"
        )
        self._problems = counter("embedcore.cache.problems", "{problem}", "The cache cannot help")
        self._changes = counter("embedcore.batch.changes", "{change}", "News of batch jobs")
        self._duplicates = counter(
            "embedcore.batch.duplicates", "{job}", "Created twice, told to stop"
        )
        self._stopped = counter("embedcore.batch.stopped", "{text}", "Cancelled at the provider")
        self._requests = gauge("embedcore.rate_limit.requests", "{request}", "Allowed per minute")
        self._rate = gauge("embedcore.rate_limit.tokens", "{token}", "Allowed per minute")
        self._done = gauge("embedcore.progress.done", "{text}", "Of the call that told it last")
        self._total = gauge("embedcore.progress.total", "{text}", "Of the call that told it last")

    def corrected(self, tokens: int, dollars: float, where: Attributes) -> None:
        self._corrected.add(tokens, where)
        self._refunded.add(dollars, where)

    def __call__(self, event: object) -> None:
        match event:
            case BudgetWait():
                self._waits.add(1, {_SCOPE: event.scope, "embedcore.waits": "stream"})
            case BatchWaits():
                self._waits.add(1, {_SCOPE: event.scope, "embedcore.waits": "batch"})
            case LimitNear():
                named = {"embedcore.period": event.period, "embedcore.unit": event.unit}
                self._near.add(1, {_SCOPE: event.scope, **named})
            case BoundViolated():
                self._under.add(event.billed - event.reserved, _model(event))
            case CacheProblem():
                self._problems.add(1)
            case BatchChanged():
                named = {"embedcore.batch.status": event.status}
                self._changes.add(1, {_SCOPE: event.scope, **named})
            case BatchDuplicate():
                self._duplicates.add(1, {_SCOPE: event.scope})
            case BatchStopped():
                self._stopped.add(event.texts, {_SCOPE: event.scope})
            case LimitsLearned():
                self._learned(event)
            case Progress():
                self._done.set(event.done)
                if event.total is not None:
                    self._total.set(event.total)

    def _learned(self, event: LimitsLearned) -> None:
        where = {"gen_ai.request.model": event.model, **_server(event.endpoint)}
        if event.requests_per_minute is not None:
            self._requests.set(event.requests_per_minute, where)
        if event.tokens_per_minute is not None:
            self._rate.set(event.tokens_per_minute, where)


def _paid(event: Reserved | Settled | Refused) -> Attributes:
    """Who pays, and for what, as far as the event says it."""
    return {_SCOPE: event.scope, **(_model(event) if event.model else {})}


def _model(event: Reserved | Settled | Refused | BoundViolated) -> Attributes:
    return {"gen_ai.provider.name": event.provider, "gen_ai.request.model": event.model}


def _common(event: RequestFinished | RequestFailed | Cached) -> Attributes:
    # Not every event names its endpoint.
    return {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": event.provider,
        "gen_ai.request.model": event.model,
        **_server(getattr(event, "endpoint", "")),
    }


def _server(endpoint: str) -> Attributes:
    """Host and port of an endpoint; nothing if it names none."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return {}
    if not parts.hostname or port is None:
        return {}
    return {"server.address": parts.hostname, "server.port": port}
