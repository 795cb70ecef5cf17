"""One HTTP exchange through the openai package: capped, timed, never redirected, never retried."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import ssl
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import openai
from openai import Omit

from embedcore.errors import ConfigurationError
from embedcore_openai import options as endpoint
from embedcore_openai.bodies import CappedClient, Download, Exchange, exchange_under_way

_LOGGERS: Final = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Any HTTP answer, whatever its status. ``headers`` does not mind upper and lower case.

    ``body`` may be lent: it must not be looked at after ``release()``. ``download``: the body of a
    success that was asked for as a stream; the caller who takes it closes it.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | memoryview = b""
    download: Download | None = None
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One HTTP request. ``timeout`` in seconds: for all of it, or with ``stream`` or ``file`` for
    each wait; then ``longest`` is for all the waiting. ``max_bytes``: of the body that is read.

    All of it: connecting, sending, the headers and the body, however they drip.
    """

    method: str = "POST"
    path: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    file: tuple[str, Spool] | None = None
    stream: bool = False
    timeout: float = 60.0
    longest: float | None = None
    max_bytes: int = 0


class Spool(io.BufferedRandom):
    """A temporary file to send, which can be read until the moment ``deadline``."""

    deadline = math.inf

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self.deadline:
            raise TimeoutError("the upload takes too long")
        return super().read(size)

    def close(self) -> None:
        # What could not be written, for want of room, need not be written now.
        with contextlib.suppress(OSError):
            super().close()


class Transport:
    """Connections to one endpoint, usable from several threads. Holds no key."""

    def __init__(
        self,
        *,
        base_url: str,
        organization: str | None,
        project: str | None,
        connect_timeout: float,
        verify: bool | str = True,
    ) -> None:
        self._connect_timeout = connect_timeout
        # Options decide what is sent where; the SDK adds these whatever the address.
        self._left_out = dict.fromkeys(_headers_of_the_environment(), Omit())
        self._headers = {
            # Vectors hardly compress, and unpacking costs four times the rest of the decoding.
            "Accept-Encoding": "identity",
            # Named here or left out: the SDK would take them from the environment.
            "OpenAI-Organization": organization or Omit(),
            "OpenAI-Project": project or Omit(),
        }
        http = CappedClient(verify=_certificates(verify), mounts=_direct(base_url))
        self._client = openai.OpenAI(
            # The real one travels with each request, and is not kept.
            api_key="(none)",
            base_url=base_url,
            max_retries=0,
            http_client=http,
        )
        # The SDK asks about the platform once, and may run a program for that, under a lock of
        # Python's own. A fork would leave it locked in the child; for what is done here, it waits.
        _ = self._client.default_headers
        # httpx for openai 2, httpx2 for openai 3.
        library = type(http.build_request("GET", base_url)).__module__.partition(".")[0]
        self._response: type[Any] = import_module(library).Response
        # A caller who forgets to close leaves no open sockets behind.
        weakref.finalize(self, http.close)
        _quieten()

    def send(self, call: Call, headers: Mapping[str, str]) -> Answer:
        """Send one request, once.

        Without ``Authorization`` in ``headers``, none is sent. Raises the exceptions of the openai
        package where there is no HTTP answer, and ``UnreadableBody``.
        """
        began = time.monotonic()
        deadline = began + (call.longest or call.timeout)
        exchange = Exchange(
            max_bytes=call.max_bytes,
            deadline=deadline,
            # Of a stream, the head.
            bound=began + call.timeout if call.stream else deadline,
            stream=call.stream,
        )
        token = exchange_under_way.set(exchange)
        try:
            response = self._response_to(call, headers, deadline)
        except openai.APIStatusError as error:
            response = error.response
        except BaseException:
            exchange.release()
            raise
        finally:
            exchange_under_way.reset(token)
        return Answer(
            status=response.status_code,
            headers=response.headers,
            body=response.content if exchange.body is None else exchange.body,
            download=exchange.download,
            release=exchange.release,
        )

    def _response_to(self, call: Call, headers: Mapping[str, str], deadline: float) -> Any:
        connect = min(call.timeout, self._connect_timeout)
        options: Any = {
            "headers": {
                **self._left_out,
                "Authorization": Omit(),
                **self._headers,
                **headers,
            },
            "timeout": openai.Timeout(call.timeout, connect=connect),
            "params": call.query,
        }
        if call.stream:
            options["headers"]["Accept"] = "application/binary"
        if call.method == "GET":
            return self._client.get(call.path, cast_to=self._response, options=options)
        if call.method == "DELETE":
            return self._client.delete(call.path, cast_to=self._response, options=options)
        if call.file is None:
            return self._client.post(
                call.path, cast_to=self._response, content=call.body, options=options
            )
        name, file = call.file
        file.deadline = deadline
        options["headers"]["Content-Type"] = "multipart/form-data"
        return self._client.post(
            call.path,
            cast_to=self._response,
            body={"purpose": "batch"},
            files={"file": (name, file, "application/jsonl")},
            options=options,
        )

    def close(self) -> None:
        self._client.close()


def _direct(base_url: str) -> dict[str, None]:
    """What the environment's proxies are not asked for: its own machine is another "localhost"."""
    where = endpoint.parse(base_url)
    host = f"[{where.host}]" if ":" in where.host else where.host
    return {f"all://{host}": None} if where.reach == "loopback" else {}


def _certificates(verify: bool | str) -> bool | ssl.SSLContext:
    """What a certificate is checked against. Raises ``ConfigurationError``."""
    if not isinstance(verify, str):
        return verify
    path = Path(verify).expanduser()
    try:
        if path.is_dir():
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ConfigurationError(
            f"verify = {verify!r} is no file of certificates ({type(error).__name__}): give the "
            "path of a PEM file, or of a folder of them"
        ) from None


def _headers_of_the_environment() -> list[str]:
    """The headers that the SDK would add to each request by itself."""
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
