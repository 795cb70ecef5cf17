"""The raw limit of questions that are asked one by one in an event loop.

What is asked in the same turn of the loop goes out as one request, and what comes alone goes alone,
at once: the fewest requests that need no waiting. Plain streams of asyncio, orjson and pybase64.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import numpy as np

from compare.clients.contract import KEY, MODEL, Array, AskAsync

_MOST_TEXTS: Final = 2_048
_Connection: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Queries:
    def __init__(self, base_url: str) -> None:
        import orjson
        import pybase64

        self._dumps, self._loads, self._decode = orjson.dumps, orjson.loads, pybase64.b64decode
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port
        self._head = (
            f"POST {parts.path}/embeddings HTTP/1.1\r\nhost: {parts.netloc}\r\n"
            f"authorization: Bearer {KEY}\r\ncontent-type: application/json\r\ncontent-length: "
        ).encode()
        self._waiting: list[tuple[str, asyncio.Future[Array]]] = []
        self._free: list[_Connection] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def ask(self, text: str) -> Array:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._send)
        answer: asyncio.Future[Array] = loop.create_future()
        self._waiting.append((text, answer))
        return await answer

    async def close(self) -> None:
        for _, writer in self._free:
            writer.close()
            await writer.wait_closed()
        self._free.clear()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), _MOST_TEXTS):
            request = asyncio.ensure_future(self._request(waiting[start : start + _MOST_TEXTS]))
            self._under_way.add(request)
            request.add_done_callback(self._under_way.discard)

    async def _request(self, asked: list[tuple[str, asyncio.Future[Array]]]) -> None:
        try:
            data = await self._exchange([text for text, _ in asked])
        except Exception as error:  # noqa: BLE001 - it is what every one of them gets
            for _, answer in asked:
                answer.set_exception(error)
            return
        for item, (_, answer) in zip(data, asked, strict=True):
            answer.set_result(np.frombuffer(self._decode(item["embedding"]), dtype="<f4"))

    async def _exchange(self, texts: list[str]) -> list[dict[str, Any]]:
        body = self._dumps({"model": MODEL, "input": texts, "encoding_format": "base64"})
        connection = (
            self._free.pop()
            if self._free
            else await asyncio.open_connection(self._host, self._port)
        )
        reader, writer = connection
        writer.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.startswith(b"content-length:")
        )
        content = await reader.readexactly(length)
        self._free.append(connection)
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{head[:20]!r}: {content[:200]!r}")
        data: list[dict[str, Any]] = self._loads(content)["data"]
        return data


def ask_async(base_url: str) -> AskAsync:
    return Queries(base_url).ask
