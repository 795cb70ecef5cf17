"""The fake OpenAI server: what a program really sends, and what it really costs.

::

    with FakeOpenAI() as server:
        server.faults.push("rate_limited", retry_after=1)
        ...                             # a client with server.base_url and server.api_key
        assert server.meter.billed_tokens == ...
        assert server.requests[-1].texts == [...]

For clients in several processes at full speed it also runs in a process of its own:
``python -m embedcore.testing.openai.server --port 0`` prints one JSON line with ``url``,
``base_url``, ``api_key`` and how it counts ``tokens``, and serves until it is terminated, or with
``--until-eof`` until its standard input ends. ``embedcore.testing.openai.control`` says how to read
its meter and script its faults.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from embedcore.testing.meter import Meter
from embedcore.testing.openai.batch_endpoints import (
    FILES,
    PATH,
    BatchesApi,
    control_batches,
    is_batch_path,
)
from embedcore.testing.openai.batch_settings import BatchSettings, Listing, Progress
from embedcore.testing.openai.batches import BatchService
from embedcore.testing.openai.control import control
from embedcore.testing.openai.embeddings import (
    EMBEDDINGS,
    OPENAI_MODELS,
    Answer,
    ApiError,
    Count,
    EmbeddingsApi,
    FakeModel,
    Limits,
    ModelsApi,
    Router,
    check_key,
)
from embedcore.testing.openai.faults import Fault, Faults
from embedcore.testing.openai.http import (
    Delivery,
    HttpReply,
    HttpRequest,
    Listener,
    Received,
    RequestHead,
    received,
    reset,
)
from embedcore.testing.openai.modes import Exchange
from embedcore.testing.openai.quirks import Quirks, QuirkyEmbeddings, Sidelines
from embedcore.testing.vectors import openai_encoding

if TYPE_CHECKING:
    from collections.abc import Callable


_MINUTE = 60.0


def go_duration(seconds: float) -> str:
    """As the ``x-ratelimit-reset-*`` headers are written: 12ms, 1s, 6m0s, 23m16.298s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(seconds, _MINUTE)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{text}s" if minutes else f"{text}s"


class Quota:
    """Requests and tokens per minute, refilled steadily, as the real limits are.

    With ``enforced=False`` the headers count down and nothing is ever refused. ``burst_requests``:
    so many fit into the bucket; by default a minute of them. ``refused_count``: a refused request
    takes one from it as well, as at OpenAI.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int = 5000,
        tokens_per_minute: int = 1_000_000,
        enforced: bool = False,
        burst_requests: int | None = None,
        refused_count: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = {"requests": float(requests_per_minute), "tokens": float(tokens_per_minute)}
        burst = float(burst_requests or requests_per_minute)
        self._size = {**self._limit, "requests": burst}
        self._left = dict(self._size)
        self._enforced, self._refused_count = enforced, refused_count
        self._clock = clock
        self._seen = clock()
        self._lock = threading.Lock()

    def take(self, tokens: int) -> tuple[float, str]:
        """Use one request and ``tokens``: seconds to wait (0: granted), and for which of both."""
        with self._lock:
            self._refill()
            asked = {"requests": 1.0, "tokens": float(tokens)}
            waits = {
                kind: max(0.0, amount - self._left[kind]) / self._limit[kind] * _MINUTE
                for kind, amount in asked.items()
            }
            kind = max(waits, key=lambda name: waits[name])
            if self._enforced and waits[kind] > 0:
                if self._refused_count:
                    self._left["requests"] = max(0.0, self._left["requests"] - 1.0)
                return waits[kind], kind
            for name, amount in asked.items():
                self._left[name] = max(0.0, self._left[name] - amount)
            return 0.0, kind

    def headers(self) -> dict[str, str]:
        with self._lock:
            self._refill()
            headers = {}
            for kind, size in self._size.items():
                left = self._left[kind]
                headers[f"x-ratelimit-limit-{kind}"] = str(self.limit(kind))
                headers[f"x-ratelimit-remaining-{kind}"] = str(int(left))
                reset = (size - left) / self._limit[kind] * _MINUTE
                headers[f"x-ratelimit-reset-{kind}"] = go_duration(reset)
            return headers

    def limit(self, kind: str) -> int:
        return int(self._limit[kind])

    def _refill(self) -> None:
        now = self._clock()
        passed, self._seen = now - self._seen, now
        for kind, size in self._size.items():
            filled = self._left[kind] + self._limit[kind] * passed / _MINUTE
            self._left[kind] = min(size, filled)


FAKE_KEY = "sk-fake-0f1e2d3c4b5a69788796a5b4c3d2e1f0"


class FakeOpenAI:
    """Listens on 127.0.0.1 from its construction to ``close``, or to the end of ``with``.

    - ``api_key``: the only key it takes; None takes any request. ``models``: those it serves.
    - ``limits``: the largest request. ``count``: tokens of each text; by default OpenAI's models
      bill what OpenAI bills (``openai_tokens``), others a token for four bytes.
    - ``salt``: gives its vectors another value, as another model would.
    - ``latency``: seconds before each reply. ``quota``: rate limits, enforced or only announced.
    - ``record``: keep every request in ``requests``, bodies included (but those of uploads).
    - ``batch``: how the Batch API behaves. ``quirks``: it is another server with this API, such as
      one of ``embedcore.testing.openai.quirks.SERVERS``.

    ``meter`` is the truth about money and ``faults`` the script of what goes wrong. ``batches`` is
    the Batch API without HTTP, to be driven by hand, with a meter of its own. ``elsewhere``
    lists what arrived at the second port, where the ``redirect`` fault points. An error of the fake
    itself is answered 500 and raised at ``close``.
    """

    def __init__(
        self,
        *,
        api_key: str | None = FAKE_KEY,
        models: Mapping[str, FakeModel] = OPENAI_MODELS,
        limits: Limits | None = None,
        count: Count | None = None,
        salt: str = "",
        latency: float = 0.0,
        quota: Quota | None = None,
        seed: int = 0,
        port: int = 0,
        record: bool = True,
        batch: BatchSettings | None = None,
        quirks: Quirks | None = None,
    ) -> None:
        self.api_key = api_key
        self.meter = Meter()
        self.faults = Faults(seed=seed)
        self.requests: list[Received] = []
        self.elsewhere: list[Received] = []
        self.router = Router()
        self._own_headers = {} if quirks is None else dict(quirks.headers)
        if quirks is None:
            ModelsApi(models).register(self.router)
            EmbeddingsApi(models=models, limits=limits, count=count, salt=salt).register(
                self.router
            )
        else:
            QuirkyEmbeddings(quirks, models=models, count=count, salt=salt).register(self.router)
            if quirks.lists_models:
                ModelsApi(models, owner=quirks.owner).register(self.router)
            Sidelines(quirks).register(self.router)
        self.batches = BatchService(
            models=models, limits=limits, count=count, salt=salt, settings=batch
        )
        BatchesApi(self.batches).register(self.router)
        self._quota = quota or Quota()
        self._latency = latency
        self._record_requests = record
        self._numbers = itertools.count(1)
        self._crashes: list[Exception] = []
        self._closed = False
        self._elsewhere = Listener(_Elsewhere(self))
        self._listener = Listener(_Guarded(self), port=port)

    @property
    def url(self) -> str:
        """Scheme, host and port, as in ``http://127.0.0.1:12345``."""
        return self._listener.url

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as ``base_url``."""
        return f"{self.url}/v1"

    def close(self) -> None:
        """Stop listening, end open connections, raise what went wrong inside. Callable twice."""
        if self._closed:
            return
        self._closed = True
        self._listener.close()
        self._elsewhere.close()
        if self._crashes:
            raise RuntimeError("the fake server itself failed") from self._crashes[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def crashed(self, error: Exception) -> HttpReply:
        """Remember an error of the fake's own, and answer with it."""
        traceback.print_exception(error, file=sys.stderr)
        self._crashes.append(error)
        return ApiError(500, f"the fake itself failed: {error!r}").reply()

    def unread(self, head: RequestHead) -> Delivery | None:
        fault = self.faults.take_unread(head)
        if fault is None:
            return None
        request = HttpRequest(
            method=head.method, path=head.path, query=head.query, headers=head.headers
        )
        self._keep(request, fault, HttpReply(), self._settle(request, Answer(), fault))
        return reset

    def answer(self, request: HttpRequest) -> HttpReply:
        if request.path == PATH:
            return control_batches(request, self.batches)
        if request.path.startswith("/_"):
            self.batches.refresh()
            bills = {"batches": self.batches.meter}
            return control(request, meter=self.meter, faults=self.faults, bills=bills)
        with self.meter.one_request():
            if self._latency:
                self._listener.closing.wait(self._latency)
            if is_batch_path(request.path):
                fault = self.faults.take(request, ())
                answer = self._worked(request, fault)
            else:
                answer = self.honest(request)
                fault = self.faults.take(request, answer.texts)
            # What it costs is on the meter before the client can see any of the reply.
            billed = self._settle(request, answer, fault)
            reply = self._reply(request, answer, fault)
        self._keep(request, fault, reply, billed)
        return reply

    def honest(self, request: HttpRequest, *, metered: bool = True) -> Answer:
        """The answer without any fault."""
        try:
            check_key(request, self.api_key)
        except ApiError as error:
            return Answer(reply=error.reply(), headers=self._headers())
        answer = self.router.answer(request)
        if metered and request.path == EMBEDDINGS:
            wait, kind = self._quota.take(answer.tokens)
            if wait:
                answer = Answer(reply=self._over_quota(wait, kind).reply())
        headers = self._headers(limited=not is_batch_path(request.path))
        return replace(answer, headers={**headers, **answer.headers})

    def _worked(self, request: HttpRequest, fault: Fault | None) -> Answer:
        """The answer of an API that does something, if the fault lets it do it now."""
        if fault is None or fault.works == "after":
            return self.honest(request)
        if fault.works == "late":
            self.batches.defer(
                lambda: self._landed(request),
                requests=fault.after_requests,
                seconds=fault.after_seconds,
            )
        else:
            self.batches.refresh()
        return Answer(reply=_undone().reply(), headers=self._headers(limited=False))

    def _landed(self, request: HttpRequest) -> str:
        body = self.honest(request).written().body
        return str(json.loads(body).get("id", body.decode()))

    def _reply(self, request: HttpRequest, answer: Answer, fault: Fault | None) -> HttpReply:
        if fault is None:
            return answer.written()
        exchange = Exchange(
            request=request,
            answer=answer,
            options=fault.options,
            elsewhere=self._elsewhere.url,
            marker=fault.marker,
        )
        return fault.details.apply(exchange)

    def _settle(self, request: HttpRequest, answer: Answer, fault: Fault | None) -> int:
        if answer.bills and (fault is None or fault.is_billed):
            self.meter.bill(answer.texts, answer.tokens)
            return answer.tokens
        if request.path == EMBEDDINGS:
            self.meter.reject()
        return 0

    def _keep(
        self, request: HttpRequest, fault: Fault | None, reply: HttpReply, billed: int
    ) -> None:
        if self._record_requests:
            name = fault.mode if fault else None
            self.requests.append(received(request, name, reply.status, billed))

    def _over_quota(self, wait: float, kind: str) -> ApiError:
        message = f"Rate limit reached on {kind} per min: Limit {self._quota.limit(kind)}."
        headers = {"retry-after": str(int(wait) + 1), "retry-after-ms": str(int(wait * 1000) + 1)}
        return ApiError(429, message, kind=kind, code="rate_limit_exceeded", headers=headers)

    def _headers(self, *, limited: bool = True) -> dict[str, str]:
        return {
            **self._own_headers,
            **(self._quota.headers() if limited else {}),
            "x-request-id": f"req_{next(self._numbers):032x}",
            "openai-organization": "org-fake",
            "openai-processing-ms": "1",
            "openai-version": "2020-10-01",
        }


def _undone() -> ApiError:
    return ApiError(503, "Nothing was done.", kind="service_unavailable_error")


class _Guarded:
    """The server as an application that never raises."""

    def __init__(self, server: FakeOpenAI) -> None:
        self._server = server

    def unread(self, head: RequestHead) -> Delivery | None:
        return self._server.unread(head)

    def spools(self, head: RequestHead) -> bool:
        return (head.method, head.path) == ("POST", FILES)

    def answer(self, request: HttpRequest) -> HttpReply:
        try:
            return self._server.answer(request)
        except Exception as error:  # noqa: BLE001 - shown at close, and to the client
            return self._server.crashed(error)


class _Elsewhere:
    """Another server: it answers as the fake would, bills nothing, and takes notes."""

    def __init__(self, server: FakeOpenAI) -> None:
        self._server = server

    def unread(self, head: RequestHead) -> Delivery | None:  # noqa: ARG002
        return None

    def spools(self, head: RequestHead) -> bool:  # noqa: ARG002
        return False

    def answer(self, request: HttpRequest) -> HttpReply:
        if is_batch_path(request.path):
            reply = _undone().reply()
        else:
            reply = self._server.honest(request, metered=False).written()
        self._server.elsewhere.append(received(request, None, reply.status, 0))
        return reply


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until terminated; ``embedcore.testing.openai.server`` says how to use it."""
    options = _parser().parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with _server(options) as server:
        place = {
            "url": server.url,
            "base_url": server.base_url,
            "api_key": server.api_key,
            "tokens": openai_encoding(),
        }
        sys.stdout.write(json.dumps(place) + "\n")
        sys.stdout.flush()
        if options.until_eof:
            sys.stdin.read()
        else:
            ended.wait()


def server_of(arguments: Sequence[str]) -> FakeOpenAI:
    """The server that the command would start with these arguments."""
    return _server(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m embedcore.testing.openai.server")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each reply")
    parser.add_argument("--api-key", default=FAKE_KEY)
    parser.add_argument("--until-eof", action="store_true", help="end with standard input")
    parser.add_argument("--dimensions", type=int, help="of every model, instead of its own")
    parser.add_argument("--batch-polls", type=int, help="a batch is complete at this poll (3)")
    parser.add_argument("--batch-seconds", type=float, help="a batch is complete after so long")
    parser.add_argument("--batch-by-hand", action="store_true", help="only /_batches moves it")
    parser.add_argument("--batch-lag", type=float, default=0.0, help="seconds until it is listed")
    parser.add_argument("--batch-queue", type=int, help="the limit of enqueued tokens")
    return parser


def _server(options: argparse.Namespace) -> FakeOpenAI:
    models = OPENAI_MODELS
    if options.dimensions is not None:
        models = {
            name: replace(model, dimensions=options.dimensions) for name, model in models.items()
        }
    return FakeOpenAI(
        port=options.port,
        latency=options.latency,
        api_key=options.api_key,
        models=models,
        record=False,
        batch=BatchSettings(
            progress=_progress(options),
            listing=Listing(lag_seconds=options.batch_lag),
            enqueued_token_limit=options.batch_queue,
        ),
    )


def _progress(options: argparse.Namespace) -> Progress:
    if options.batch_by_hand:
        return Progress()
    if options.batch_seconds is not None:
        return Progress(polls=options.batch_polls, seconds=options.batch_seconds)
    return Progress(polls=3 if options.batch_polls is None else options.batch_polls)


if __name__ == "__main__":
    main()
