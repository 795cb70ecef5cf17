"""The raw limit: what the machine allows when nothing is done but the work itself.

``http.client`` with keep-alive, orjson, pybase64 and ``frombuffer`` into an array that is there
already, 250 texts per request unless told otherwise. In order for CPU and memory, 16 threads where
latency is to be hidden, and 4 threads that wait together under a rate limit.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from compare.clients.contract import (
    KEY,
    MODEL,
    THREADS,
    WIDTH,
    Array,
    Ask,
    Block,
    Client,
    Embed,
    Row,
    Setting,
)
from compare.clients.limit_async import ask_async

_TEXTS: Final = 250
_FEW_THREADS: Final = 4
_HEADERS: Final = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}


class _Pause:
    """All threads wait until the time that a refusal named."""

    def __init__(self) -> None:
        self._ends = 0.0

    def at_least(self, seconds: float) -> None:
        self._ends = max(self._ends, time.monotonic() + seconds)

    def wait(self) -> None:
        while (left := self._ends - time.monotonic()) > 0:
            time.sleep(left)


class _Limit:
    def __init__(self, base_url: str) -> None:
        import orjson
        import pybase64

        self._dumps, self._loads = orjson.dumps, orjson.loads
        self._decode: Callable[[str], bytes] = pybase64.b64decode
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port
        self._connect = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._path = f"{parts.path}/embeddings"
        self._pause = _Pause()
        self._local = threading.local()

    def part(self, texts: list[str], into: Array) -> None:
        """One request. Repeated for as long as it is refused with a time."""
        body = self._dumps({"model": MODEL, "input": texts, "encoding_format": "base64"})
        connection = self._connection()
        while True:
            self._pause.wait()
            connection.request("POST", self._path, body, _HEADERS)
            response = connection.getresponse()
            content = response.read()
            if response.status == 429:
                self._pause.at_least(int(response.headers["retry-after-ms"]) / 1000)
                continue
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {content[:200]!r}")
            break
        data: list[dict[str, Any]] = self._loads(content)["data"]
        for item in data:
            into[item["index"]] = np.frombuffer(self._decode(item["embedding"]), dtype="<f4")

    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            self._local.connection = self._connect(self._host, self._port)
        connection: http.client.HTTPConnection = self._local.connection
        return connection


def _open(setting: Setting) -> Embed:
    limit = _Limit(setting.base_url)
    threads = {"throughput": THREADS, "goodput": _FEW_THREADS}.get(setting.purpose, 1)
    size = setting.request_texts or _TEXTS

    def embed(texts: list[str]) -> Array:
        found = np.empty((len(texts), WIDTH), dtype=np.float32)
        starts = range(0, len(texts), size)

        def part(start: int) -> None:
            limit.part(texts[start : start + size], found[start : start + size])

        if threads == 1:
            for start in starts:
                part(start)
        else:
            with ThreadPoolExecutor(threads) as executor:
                list(executor.map(part, starts))
        return found

    return embed


def _stream(setting: Setting, texts: Iterable[str]) -> Iterator[Block]:
    """Twice as many requests as threads are read ahead."""
    limit = _Limit(setting.base_url)
    size, rows = setting.request_texts or _TEXTS, iter(texts)

    def one(block: list[str]) -> Array:
        found = np.empty((len(block), WIDTH), dtype=np.float32)
        limit.part(block, found)
        return found

    under_way: deque[tuple[list[str], Future[Array]]] = deque()
    with ThreadPoolExecutor(_FEW_THREADS) as executor:
        while True:
            while len(under_way) < 2 * _FEW_THREADS and (block := list(islice(rows, size))):
                under_way.append((block, executor.submit(one, block)))
            if not under_way:
                return
            block, found = under_way.popleft()
            yield block, found.result()


def one_vector(base_url: str, text: str) -> Array:
    """What a process does that wants no more than this."""
    found = np.empty((1, WIDTH), dtype=np.float32)
    _Limit(base_url).part([text], found)
    return found


def _query(setting: Setting) -> Ask:
    embed = _open(setting)
    return lambda text: embed([text])[0]


CLIENT = Client(
    name="limit",
    packages=("numpy", "orjson", "pybase64"),
    shown=("orjson", "pybase64", "numpy"),
    statement="import http.client",
    ready="import http.client; http.client.HTTPConnection('127.0.0.1')",
    first=(
        "import os; from compare.clients import limit; "
        "vector = limit.one_vector(os.environ['OPENAI_BASE_URL'], text)"
    ),
    rows=(
        Row(
            name="limit",
            title="the raw limit (http.client, orjson, pybase64)",
            label="raw limit",
            open=_open,
            stream=_stream,
            query=_query,
            aquery=lambda setting: ask_async(setting.base_url),
            strict=True,
            missing={"reuse": "keeps nothing"},
        ),
        Row(
            name="limit-tls",
            title="the raw limit over TLS",
            open=_open,
            tls=True,
            only=("cpu",),
        ),
    ),
)
