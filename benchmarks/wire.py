"""What does a request cost on top of the work itself, by which way it goes?

CPU (user + system) of the client alone for 20,000 texts in requests of 250, base64, against a
server in a process of its own. Every way runs in a fresh process; rounds alternate, and the median
of each way's ratio to the raw limit of the same round counts.

    python benchmarks/wire.py [--rounds 7] [--only limit,session] [--texts 20000]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

HERE: Final = Path(__file__).parent
sys.path.insert(0, str(HERE))

from compare import corpus  # noqa: E402 - found beside this file
from compare.clients.contract import KEY, MODEL, WIDTH  # noqa: E402
from compare.serving import Serving, cores  # noqa: E402

PER_REQUEST: Final = 250
HEADERS: Final = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}

Send = Callable[[bytes], Any]
Embed = Callable[[list[str], Any], None]


def _over(send: Send) -> Embed:
    """The least that has to be done with an answer."""
    import orjson
    import pybase64

    def embed(texts: list[str], into: Any) -> None:
        body = orjson.dumps({"model": MODEL, "input": texts, "encoding_format": "base64"})
        content = orjson.loads(send(body))
        if "data" not in content:
            raise SystemExit(content)
        for item in content["data"]:
            into[item["index"]] = np.frombuffer(pybase64.b64decode(item["embedding"]), dtype="<f4")

    return embed


def limit(url: str) -> Embed:
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)

    def send(body: bytes) -> bytes:
        connection.request("POST", f"{parts.path}/embeddings", body, HEADERS)
        return connection.getresponse().read()

    return _over(send)


def bare_urllib3(url: str) -> Embed:
    import urllib3

    pool = urllib3.PoolManager()

    def send(body: bytes) -> bytes:
        return pool.request("POST", f"{url}/embeddings", body=body, headers=HEADERS).data

    return _over(send)


def session(url: str) -> Embed:
    """``embedcore.provider.http`` with the same parser as the limit."""
    from embedcore.provider import http, refusals

    opened = http.Session(url)
    asked = refusals.Asked(model=MODEL, endpoint=url)

    def embed(texts: list[str], into: Any) -> None:
        def send(body: bytes) -> memoryview:
            call = http.Call(
                path="/embeddings", headers=HEADERS, body=body, timeout=60.0, max_bytes=1 << 26
            )
            answer = opened.send(call, asked)
            lent.append(answer)
            return answer.body  # type: ignore[return-value]

        lent: list[Any] = []
        _over(send)(texts, into)
        lent[0].release()

    return embed


def door(url: str) -> Embed:
    """The SDK, whose ``http_client`` sends over the session; the SDK never sees the body."""
    import openai

    from embedcore.provider import http, refusals

    opened = http.Session(url.removesuffix("/v1"))
    asked = refusals.Asked(model=MODEL, endpoint=url)
    answers: list[Any] = []
    library = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]

    class Door(library.BaseTransport):  # type: ignore[name-defined, misc]
        def handle_request(self, request: Any) -> Any:
            call = http.Call(
                path=request.url.raw_path.decode(),
                headers=dict(request.headers),
                body=request.read(),
                timeout=60.0,
                max_bytes=1 << 26,
            )
            answers.append(opened.send(call, asked))
            return library.Response(answers[0].status)

    client = openai.OpenAI(
        api_key=KEY,
        base_url=url,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(transport=Door()),
    )

    def embed(texts: list[str], into: Any) -> None:
        def send(body: bytes) -> Any:
            options: Any = {"headers": {"Content-Type": "application/json"}}
            client.post("/embeddings", cast_to=library.Response, content=body, options=options)
            return answers[0].body

        _over(send)(texts, into)
        answers.pop().release()

    return embed


def provider(url: str) -> Embed:
    """``OpenAIEmbedder.embed``: the parser, the checks and the errors of the product as well."""
    from embedcore_openai.embedder import OpenAIEmbedder
    from embedcore_openai.options import OpenAIOptions

    from embedcore.provider.types import EmbedRequest

    options: Any = {"api_key": KEY, "base_url": url}
    embedder = OpenAIEmbedder(MODEL, OpenAIOptions(**options))

    def embed(texts: list[str], into: Any) -> None:
        request = EmbedRequest(texts=tuple(texts), into=into)
        found = embedder.embed(request).vectors
        if found is not into:
            into[:] = found

    return embed


def client(url: str) -> Embed:
    """The whole product without its cache. Everything goes into one call."""
    import tempfile

    from embedcore import EmbeddingClient

    config = {"home": tempfile.mkdtemp(), "options": {"openai": {"base_url": url}}, "cache": False}
    opened = EmbeddingClient(f"openai:{MODEL}", api_key=KEY, config=config)

    def embed(texts: list[str], into: Any) -> None:
        into[:] = opened.embed(texts).vectors

    return embed


WHOLE: Final = "client"
WAYS: Final = {
    "limit": limit,
    "urllib3": bare_urllib3,
    "session": session,
    "door": door,
    "provider": provider,
    WHOLE: client,
}


def child(name: str, url: str, count: int) -> None:
    mine = cores()[1]
    if mine:
        os.sched_setaffinity(0, mine)
    # Without the vocabulary the server estimates, and finds the longest of them too long.
    texts = [text for text in corpus.texts(count + count // 50) if len(text) < 8_000][:count]
    embed = WAYS[name](url)
    found = np.zeros((len(texts), WIDTH), dtype=np.float32)
    embed(texts[:PER_REQUEST], found[:PER_REQUEST])
    found[:] = 0
    size = len(texts) if name == WHOLE else PER_REQUEST
    before = time.process_time()
    for start in range(0, len(texts), size):
        embed(texts[start : start + size], found[start : start + size])
    cpu = time.process_time() - before
    assert found.any(axis=1).all(), "a row has no vector"
    print(json.dumps(cpu))


def rounds(ways: list[str], count: int, number: int) -> Iterator[dict[str, float]]:
    with Serving(count) as serving:
        for _ in range(number):
            used = {}
            for name in ways:
                serving.reset()
                command = [sys.executable, __file__, "--child", name, "--texts", str(count)]
                told = subprocess.run(
                    [*command, "--url", serving.base_url()],
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=200,
                )
                used[name] = float(told.stdout)
            yield used


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.url, given.texts)
        return
    ways = given.only.split(",")
    every = list(rounds(ways, given.texts, given.rounds))
    per = given.texts / 10_000
    print(f"{'way':10} {'ms CPU/10k':>11} {'x ' + ways[0]:>9}")
    for name in ways:
        cpu = statistics.median(used[name] for used in every) / per
        ratio = statistics.median(used[name] / used[ways[0]] for used in every)
        print(f"{name:10} {cpu * 1000:11.0f} {ratio:9.2f}")


if __name__ == "__main__":
    main()
