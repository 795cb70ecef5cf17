"""The fake server, over real sockets: the right vectors, the right bill, the limit it was given."""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from compare import corpus, truth
from compare.limits import Limit

if TYPE_CHECKING:
    from compare.serving import Serving
    from compare.tokens import Counter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXTS = corpus.texts(300)


@pytest.fixture
def connection(serving: Serving) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection("127.0.0.1", serving.port, timeout=30)) as opened:
        yield opened


def ask(
    connection: http.client.HTTPConnection, texts: Any, encoding: str | None = "base64"
) -> tuple[int, dict[str, str], dict[str, Any]]:
    body = {"model": "text-embedding-3-small", "input": texts}
    if encoding is not None:
        body["encoding_format"] = encoding
    connection.request("POST", "/v1/embeddings", json.dumps(body).encode())
    response = connection.getresponse()
    content = json.load(response)
    return response.status, dict(response.getheaders()), content


def vectors(content: dict[str, Any]) -> Any:
    rows = []
    for place, item in enumerate(content["data"]):
        assert item["index"] == place
        vector = item["embedding"]
        if isinstance(vector, str):
            vector = np.frombuffer(base64.b64decode(vector), dtype="<f4")
        rows.append(np.asarray(vector, dtype=np.float32))
    return np.stack(rows)


@pytest.mark.parametrize("encoding", ["base64", "float", None])
def test_row_i_is_the_vector_of_text_i(
    connection: http.client.HTTPConnection, encoding: str | None
) -> None:
    for chosen in (TEXTS[:40], TEXTS[40:20:-1], [TEXTS[7]]):
        status, _, content = ask(connection, chosen, encoding)
        assert status == 200
        assert np.array_equal(vectors(content), truth.vectors(chosen))


def test_over_tls_the_replies_are_the_same_and_others_do_not_trust_it(serving: Serving) -> None:
    trusted = ssl.create_default_context(cafile=str(serving.authority))
    port = serving.tls_port
    with closing(
        http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=trusted)
    ) as opened:
        # Larger than what a socket or a record takes at once, and a second one on the connection.
        for chosen in (TEXTS, TEXTS[:3]):
            status, _, content = ask(opened, chosen)
            assert status == 200
            assert np.array_equal(vectors(content), truth.vectors(chosen))
    meter = serving.meter()
    assert (meter["answered"], meter["texts"]) == (2, len(TEXTS) + 3)
    with (
        closing(http.client.HTTPSConnection("127.0.0.1", port, timeout=30)) as opened,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ask(opened, TEXTS[:3])
    assert serving.meter()["requests"] == 2


def test_short_texts_are_prepared_too(
    connection: http.client.HTTPConnection, serving: Serving
) -> None:
    chosen = corpus.short_texts(50)
    _, _, content = ask(connection, chosen)
    assert np.array_equal(vectors(content), truth.vectors(chosen))
    assert serving.meter()["unknown_texts"] == 0


def test_a_text_that_is_not_of_the_corpus_gets_its_own_vector(
    connection: http.client.HTTPConnection, serving: Serving
) -> None:
    chosen = [TEXTS[0], TEXTS[0] + " ", "never seen"]
    _, _, content = ask(connection, chosen)
    assert np.array_equal(vectors(content), truth.vectors(chosen))
    assert serving.meter()["unknown_texts"] == 2


def test_lists_of_tokens_are_the_texts_they_spell(connection: http.client.HTTPConnection) -> None:
    # "hello world" in cl100k_base.
    _, _, content = ask(connection, [[15339, 1917]])
    assert np.array_equal(vectors(content), truth.vectors(["hello world"]))
    assert content["usage"]["prompt_tokens"] == 2


def test_the_bill_is_every_text_of_every_answer(
    connection: http.client.HTTPConnection, serving: Serving, counter: Counter
) -> None:
    chosen = [*TEXTS, TEXTS[3], "never seen"]
    counts = [counter.count(text) for text in chosen]
    for start in range(0, len(chosen), 50):
        _, _, content = ask(connection, chosen[start : start + 50])
        assert content["usage"]["prompt_tokens"] == sum(counts[start : start + 50])
    meter = serving.meter()
    assert meter["billed"] == sum(counts)
    assert (meter["texts"], meter["answered"]) == (len(chosen), 7)
    serving.reset()
    assert serving.meter()["billed"] == 0


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "invalid"),
        (["a", ""], "empty string"),
        (["a"] * 2049, "array too long"),
        (["word " * 9000], "'input[0]': maximum input length"),
        (["word " * 8000] * 38, "max 300000 tokens"),
    ],
    ids=["none", "empty", "too many", "too long", "too many tokens"],
)
def test_what_openai_refuses_is_refused_and_not_billed(
    connection: http.client.HTTPConnection, serving: Serving, texts: list[str], message: str
) -> None:
    status, _, content = ask(connection, texts)
    assert status == 400
    assert message in content["error"]["message"]
    meter = serving.meter()
    assert (meter["refused"], meter["billed"]) == (1, 0)


def test_a_limit_answers_429_with_a_time_after_which_it_grants(
    connection: http.client.HTTPConnection, serving: Serving
) -> None:
    serving.reset(limit=Limit(tokens_per_minute=6000, burst_tokens=100))
    text = "word " * 60
    assert ask(connection, [text])[0] == 200
    status, headers, content = ask(connection, [text])
    assert status == 429
    assert content["error"]["code"] == "rate_limit_exceeded"
    assert {name for name in headers if name.startswith("x-ratelimit-")} == {
        f"x-ratelimit-{what}-{kind}"
        for what in ("limit", "remaining", "reset")
        for kind in ("requests", "tokens")
    }
    billed = serving.meter()["billed"]
    time.sleep(int(headers["retry-after-ms"]) / 1000)
    assert int(headers["retry-after"]) >= int(headers["retry-after-ms"]) / 1000
    assert ask(connection, [text])[0] == 200
    meter = serving.meter()
    assert (meter["throttled"], meter["answered"]) == (1, 2)
    assert meter["billed"] == 2 * billed


@pytest.mark.campaign(short=True)
def test_latency_is_per_request_and_requests_overlap(serving: Serving) -> None:
    serving.reset(latency=0.2)
    opened = [http.client.HTTPConnection("127.0.0.1", serving.port) for _ in range(8)]
    body = json.dumps({"input": TEXTS[:5], "encoding_format": "base64"}).encode()
    started = time.monotonic()
    for one in opened:
        one.request("POST", "/v1/embeddings", body)
    for one in opened:
        assert len(json.load(one.getresponse())["data"]) == 5
        one.close()
    assert 0.2 <= time.monotonic() - started < 8 * 0.2
    assert serving.meter()["most_in_flight"] == 8


def test_the_server_ends_with_whoever_started_it(vocabulary: None) -> None:
    command = [sys.executable, "-m", "compare.server", "--texts", "1", "--attached"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        plain, tls = map(int, process.stdout.readline().split())
        assert (plain > 0, tls) == (True, 0)
        process.stdin.close()
        assert process.wait(timeout=20) == 0
