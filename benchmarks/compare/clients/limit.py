"""The raw limit: what the machine allows when nothing is done but the work itself.

``http.client`` with keep-alive, orjson, pybase64 and ``frombuffer`` into an array that is there
already, 250 texts per request. In order for CPU and memory, 16 threads where latency is to be
hidden, and 4 threads behind one gate under a rate limit.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from compare.clients.contract import KEY, MODEL, THREADS, WIDTH, Array, Client, Embed, Row, Setting

_TEXTS: Final = 250
_GATED_THREADS: Final = 4
_HEADERS: Final = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}


class _Gate:
    """Closed for everybody until the time that a refusal named."""

    def __init__(self) -> None:
        self._opens = 0.0

    def close(self, seconds: float) -> None:
        self._opens = max(self._opens, time.monotonic() + seconds)

    def wait(self) -> None:
        while (left := self._opens - time.monotonic()) > 0:
            time.sleep(left)


class _Limit:
    def __init__(self, base_url: str) -> None:
        import orjson
        import pybase64

        self._dumps, self._loads = orjson.dumps, orjson.loads
        self._decode: Callable[[str], bytes] = pybase64.b64decode
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port
        self._path = f"{parts.path}/embeddings"
        self._gate = _Gate()
        self._local = threading.local()

    def part(self, texts: list[str], into: Array) -> None:
        """One request. Repeated for as long as it is refused with a time."""
        body = self._dumps({"model": MODEL, "input": texts, "encoding_format": "base64"})
        connection = self._connection()
        while True:
            self._gate.wait()
            connection.request("POST", self._path, body, _HEADERS)
            response = connection.getresponse()
            content = response.read()
            if response.status == 429:
                self._gate.close(int(response.headers["retry-after-ms"]) / 1000)
                continue
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {content[:200]!r}")
            break
        data: list[dict[str, Any]] = self._loads(content)["data"]
        for item in data:
            into[item["index"]] = np.frombuffer(self._decode(item["embedding"]), dtype="<f4")

    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection(self._host, self._port)
        connection: http.client.HTTPConnection = self._local.connection
        return connection


def _open(setting: Setting) -> Embed:
    limit = _Limit(setting.base_url)
    threads = {"throughput": THREADS, "goodput": _GATED_THREADS}.get(setting.purpose, 1)

    def embed(texts: list[str]) -> Array:
        found = np.empty((len(texts), WIDTH), dtype=np.float32)
        starts = range(0, len(texts), _TEXTS)

        def part(start: int) -> None:
            limit.part(texts[start : start + _TEXTS], found[start : start + _TEXTS])

        if threads == 1:
            for start in starts:
                part(start)
        else:
            with ThreadPoolExecutor(threads) as executor:
                list(executor.map(part, starts))
        return found

    return embed


CLIENT = Client(
    name="limit",
    packages=("numpy", "orjson", "pybase64"),
    shown=("orjson", "pybase64", "numpy"),
    statement="import http.client",
    ready="import http.client; http.client.HTTPConnection('127.0.0.1')",
    rows=(
        Row(
            name="limit",
            title="the raw limit (http.client, orjson, pybase64)",
            label="raw limit",
            open=_open,
            missing={"reuse": "keeps nothing"},
        ),
    ),
)
