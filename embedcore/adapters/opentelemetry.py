"""What did embedcore send, what did it take, and what did it cost, as OpenTelemetry sees it?

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
    Held,
    Refused,
    RequestFailed,
    RequestFinished,
    Reused,
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
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

Attributes: TypeAlias = dict[str, str | int | float | bool]

_SCHEMA: Final = "https://opentelemetry.io/schemas/1.41.0"
_OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"
_LATEST: Final = "gen_ai_latest_experimental"
# The boundaries that the conventions advise: seconds, tokens.
_SECONDS: Final = [0.01 * 2**power for power in range(14)]
_TOKENS: Final = [4**power for power in range(14)]
_SCOPE: Final = "embedcore.scope"
_PICODOLLARS: Final = 10**12
_PORTS: Final = {"https": 443, "http": 80}


class OpenTelemetryObserver:
    """``EmbeddingClient(observers=[OpenTelemetryObserver()])``: a span for each attempt.

    The convention would have one span for all attempts of a request; with one for each, a retry and
    the wait before it can be seen. A failed attempt has ``error.type``, the name of the class in
    ``embedcore.errors``, and ``embedcore.retry.wait`` if it is tried again. Tokens are recorded
    only where the provider named them. Neither a text nor a vector nor a key is in an event, and so
    none is exported. Without providers those that are set for the process are used.

    Besides, as counters: ``embedcore.budget.held`` and ``.settled`` in tokens, ``.cost`` in
    dollars, ``.refused`` in calls, ``embedcore.throttled`` in seconds, ``embedcore.reused`` in
    texts that needed no request.
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
        self._held = meter.create_counter("embedcore.budget.held", "{token}", "Set aside")
        self._settled = meter.create_counter("embedcore.budget.settled", "{token}", "Charged")
        self._cost = meter.create_counter("embedcore.budget.cost", "{USD}", "Charged, in dollars")
        self._refused = meter.create_counter("embedcore.budget.refused", "{call}", "Over a limit")
        self._throttled = meter.create_counter("embedcore.throttled", "s", "Told to wait, in all")
        self._reused = meter.create_counter("embedcore.reused", "{text}", "Not bought again")

    def __call__(self, event: object) -> None:
        """Tell of an event. Others, those of later versions among them, say nothing here."""
        match event:
            case RequestFinished():
                self._finished(event)
            case RequestFailed():
                self._failed(event)
            case Throttled():
                self._throttled.add(event.seconds, _server(event.endpoint))
            case Reused():
                self._reused.add(event.texts, _common(event))
            case Held():
                self._held.add(event.tokens, {_SCOPE: event.scope})
            case Settled():
                where: Attributes = {_SCOPE: event.scope, "embedcore.uncertain": event.uncertain}
                self._settled.add(event.tokens, where)
                self._cost.add(event.picodollars / _PICODOLLARS, where)
            case Refused():
                self._refused.add(1, {_SCOPE: event.scope})

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


def _common(event: RequestFinished | RequestFailed | Reused) -> Attributes:
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
