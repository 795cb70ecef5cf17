"""Batches and their files through the openai package, over the session of the core.

Its ``http_client`` is the door: a transport that sends what the package has built. The package
sees the status of an answer and never its body, and nothing of it waits, repeats or follows.
"""

from __future__ import annotations

import logging
import os
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import openai
from openai import DefaultHttpxClient, Omit

from embedcore.errors import EmbeddingError, ProviderError
from embedcore.provider.http import Answer, Call, Session

if TYPE_CHECKING:
    from embedcore.provider.batch_spool import Spool
    from embedcore.provider.refusals import Asked

_LOGGERS: Final = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


@dataclass(kw_only=True, slots=True, repr=False)
class _Exchange:
    """What goes down to the transport and what comes back past the package."""

    call: Call
    asked: Asked
    answer: Answer | None = None
    failure: EmbeddingError | None = None


# How an argument reaches the transport through the package, which builds and passes on the request.
_under_way: ContextVar[_Exchange] = ContextVar("embedcore_openai_exchange")


class SDK:
    """The openai package for one endpoint, usable from several threads. Holds no key."""

    def __init__(self, session: Session, base_url: str) -> None:
        # Options decide what is sent where; the package adds these whatever the address.
        left_out = dict.fromkeys(_headers_of_the_environment(), Omit())
        # Those of the session are sent; the package would take them from the environment.
        own = ("Authorization", "OpenAI-Organization", "OpenAI-Project")
        self._headers: dict[str, str | Omit] = {**left_out, **dict.fromkeys(own, Omit())}
        # Its HTTP library would ask for more than can be bounded.
        self._headers["Accept-Encoding"] = "identity"
        # httpx for openai 2, httpx2 for openai 3.
        door: Any = _Door(session, urlsplit(base_url).path)
        http = DefaultHttpxClient(transport=door)
        library = type(http.build_request("GET", base_url)).__module__.partition(".")[0]
        self._response: type[Any] = import_module(library).Response
        self._client = openai.OpenAI(
            # The real one travels with each request, and is not kept.
            api_key="(none)",
            base_url=base_url,
            max_retries=0,
            http_client=http,
        )
        # The package asks about the platform once, and may run a program for that, under a lock of
        # Python's own. A fork would leave it locked in the child; for what is done here, it waits.
        _ = self._client.default_headers
        _quieten()

    def send(self, call: Call, asked: Asked, file: tuple[str, Spool] | None = None) -> Answer:
        """Send one request, once; ``file``: of a form, in place of a body. An HTTP answer of any
        status is an answer.

        Raises the errors of ``Session.send``.
        """
        exchange = _Exchange(call=call, asked=asked)
        token = _under_way.set(exchange)
        error: Exception | None = None
        try:
            self._ask(call, file)
        except Exception as raised:  # noqa: BLE001 - of the package and of its HTTP library
            error = exchange.failure or raised
        finally:
            _under_way.reset(token)
        if exchange.answer is not None:
            return exchange.answer
        if isinstance(error, EmbeddingError):
            raise error
        name = type(error).__name__
        raise ProviderError(f"the openai package cannot send a request ({name})", billed="no")

    def _ask(self, call: Call, file: tuple[str, Spool] | None) -> None:
        options: Any = {"headers": {**self._headers, **call.headers}, "params": call.query}
        if call.stream:
            options["headers"]["Accept"] = "application/binary"
        if call.method == "GET":
            self._client.get(call.path, cast_to=self._response, options=options)
        elif call.method == "DELETE":
            self._client.delete(call.path, cast_to=self._response, options=options)
        elif file is None:
            body: Any = call.body
            self._client.post(call.path, cast_to=self._response, content=body, options=options)
        else:
            options["headers"]["Content-Type"] = "multipart/form-data"
            name, content = file
            self._client.post(
                call.path,
                cast_to=self._response,
                body={"purpose": "batch"},
                files={"file": (name, content, "application/jsonl")},
                options=options,
            )


class _Door:
    """A transport of either HTTP library: sends what was built over the session."""

    def __init__(self, session: Session, prefix: str) -> None:
        self._session = session
        self._prefix = prefix

    def handle_request(self, request: Any) -> Any:
        exchange = _under_way.get()
        headers = dict(request.headers)
        has_body = "content-length" in headers or "transfer-encoding" in headers
        call = replace(
            exchange.call,
            path=request.url.raw_path.decode().removeprefix(self._prefix),
            query={},
            headers=headers,
            body=request.stream if has_body else None,
        )
        try:
            exchange.answer = answer = self._session.send(call, exchange.asked)
        except EmbeddingError as failure:
            exchange.failure = failure
            # An error of the package's own kind passes through it as it is.
            raise openai.OpenAIError from None
        return import_module(type(request).__module__.partition(".")[0]).Response(
            answer.status, request=request
        )

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The session is its owner's."""


def _headers_of_the_environment() -> list[str]:
    """The headers that the package would add to each request by itself."""
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
    return [line.partition(":")[0].strip() for line in lines if ":" in line]


def _quieten() -> None:
    """One line per request is embedcore's own; at DEBUG these loggers print texts.

    A level that was set on purpose, by hand or with ``OPENAI_LOG``, stays.
    """
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
