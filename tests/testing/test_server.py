"""Does the fake answer as OpenAI does, and is its meter right, when nothing is made to go wrong?"""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedcore.testing import FakeOpenAI, openai_tokens, tokens_of, vector_of
from embedcore.testing.openai.embeddings import FakeModel, Limits
from embedcore.testing.openai.server import Quota, go_duration

SMALL = "text-embedding-3-small"


def body(**changes):
    return {"model": SMALL, "input": ["a text"], **changes}


# Success


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("model", ["text-embedding-3-small", "text-embedding-3-large"])
def test_success_conforms_to_the_published_description(client, conforms, encoding, model):
    request = {"model": model, "input": ["one", "two"], "encoding_format": encoding}
    conforms("CreateEmbeddingRequest", request)
    reply = client.send(body=request)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    conforms("CreateEmbeddingResponse", reply.json)


def test_published_description_refuses_what_is_not_it(conforms):
    good = {"object": "list", "model": SMALL, "data": [], "usage": {}}
    with pytest.raises(AssertionError, match="prompt_tokens"):
        conforms("CreateEmbeddingResponse", good)


@pytest.mark.parametrize("dimensions", [None, 256, 8])
def test_vectors_are_those_of_the_texts(client, dimensions):
    texts = ["one", "two", "one", "\x00 <|endoftext|> 👩‍👩‍👧"]
    width = dimensions or 1536
    for encoding in ("float", "base64"):
        reply = client.embed(*texts, encoding=encoding, dimensions=dimensions).json
        assert [item["index"] for item in reply["data"]] == [0, 1, 2, 3]
        for item, text in zip(reply["data"], texts, strict=True):
            value = item["embedding"]
            got = np.frombuffer(base64.b64decode(value), "<f4") if encoding == "base64" else value
            assert np.array_equal(np.asarray(got, np.float32), vector_of(text, width))


def test_float_is_the_default_and_a_string_is_one_text(client):
    reply = client.send(body=body(input="a text")).json
    assert np.allclose(reply["data"][0]["embedding"], vector_of("a text", 1536))
    assert reply["model"] == SMALL


def test_token_arrays_are_counted_by_length(client, server):
    flat = client.send(body=body(input=[1, 2, 3])).json
    nested = client.send(body=body(input=[[1, 2, 3], [4, 5]])).json
    assert flat["usage"]["total_tokens"] == 3
    assert nested["usage"]["total_tokens"] == 5
    assert flat["data"][0] == nested["data"][0]
    assert server.meter.billed_tokens == 8


def test_headers_are_those_of_the_api(client):
    first, second = client.embed("a"), client.embed("b")
    assert first.headers["x-request-id"].startswith("req_")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.headers["openai-model"] == SMALL
    for name in ("limit-requests", "remaining-requests", "limit-tokens", "remaining-tokens"):
        assert int(first.headers[f"x-ratelimit-{name}"]) > 0
    assert "x-ratelimit-reset-requests" in first.headers


def test_models_are_listed(client, conforms):
    listed = client.send("GET", "/v1/models").json
    conforms("ListModelsResponse", listed)
    assert {model["id"] for model in listed["data"]} >= {SMALL, "text-embedding-3-large"}
    conforms("Model", client.send("GET", f"/v1/models/{SMALL}").json)
    assert client.send("GET", "/v1/models/nonesuch").status == 404


# Refusals


REFUSALS = {
    "no key": ({}, 401, None, "No API key"),
    "empty text": ({"input": ["fine", ""]}, 400, None, "input[1]"),
    "empty string": ({"input": ""}, 400, None, "input cannot be an empty string"),
    "empty list": ({"input": []}, 400, None, "'$.input' is invalid"),
    "number": ({"input": 7.5}, 400, None, "'$.input' is invalid"),
    "null": ({"input": [None]}, 400, None, "'$.input' is invalid"),
    "mixed": ({"input": ["a", [1]]}, 400, None, "'$.input' is invalid"),
    "empty array": ({"input": [[]]}, 400, None, "'$.input' is invalid"),
    "lone surrogate": ({"input": ["\ud800"]}, 400, None, "'$.input' is invalid"),
    "too many": ({"input": ["a"] * 2049}, 400, "array_above_max_length", "maximum length 2048"),
    "too long": (
        {"input": ["fine", "word " * 8192]},
        400,
        None,
        "Invalid 'input[1]': maximum input length is 8192 tokens.",
    ),
    "too large": (
        {"input": ["x" * 30_000] * 41},
        400,
        "max_tokens_per_request",
        "Requested 307500 tokens, max 300000 tokens per request",
    ),
    "unknown model": (
        {"model": "nonexistent"},
        404,
        "model_not_found",
        "The model `nonexistent` does not exist or you do not have access to it.",
    ),
    "no model": ({"model": None}, 400, None, "model"),
    "too wide": ({"dimensions": 1537}, 400, None, "Must be less than or equal to 1536"),
    "no width": ({"dimensions": 0}, 400, None, "dimensions"),
    "boolean width": ({"dimensions": True}, 400, None, "dimensions"),
    "old model": (
        {"model": "text-embedding-ada-002", "dimensions": 8},
        400,
        None,
        "does not support",
    ),
    "encoding": ({"encoding_format": "int8"}, 400, None, "Invalid value"),
    "unknown field": ({"input_type": "query"}, 400, None, "Unrecognized request argument"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_has_the_apis_form_and_costs_nothing(client, server, conforms, name):
    changes, status, code, words = REFUSALS[name]
    reply = client.send(body=body(**changes), key="" if name == "no key" else None)
    assert reply.status == status
    conforms("ErrorResponse", reply.json)
    assert reply.error["code"] == code
    assert words in reply.error["message"]
    assert reply.headers["x-request-id"]
    assert server.meter.snapshot()["billed_tokens"] == 0
    assert server.meter.rejected_requests == 1
    assert server.requests[0].billed_tokens == 0


def test_wrong_key_is_masked(client, server, conforms):
    wrong = "sk-wrong-0123456789abcdef"
    reply = client.send(body=body(), key=wrong)
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert reply.json["status"] == 401
    assert wrong not in reply.error["message"]
    conforms("ErrorResponse", reply.json)
    assert server.meter.rejected_requests == 1


def test_body_that_is_not_json_is_refused(client, conforms):
    for junk in (b"", b"{", b"[1]", b"\xff\xfe"):
        reply = client.send(body=junk)
        assert reply.status == 400
        conforms("ErrorResponse", reply.json)


def test_unknown_paths_and_methods_are_refused(client, server, conforms):
    for method, path in (("GET", "/v1/embeddings"), ("POST", "/v1/nothing"), ("GET", "/")):
        reply = client.send(method, path)
        assert reply.status == 404
        conforms("ErrorResponse", reply.json)
    assert server.meter.billed_requests == 0


def test_largest_requests_pass(client):
    assert client.embed(*["a"] * 2048).status == 200
    assert client.embed(*["x" * 30_000] * 40).status == 200  # 300,000 by the server's gauge


def test_gauge_of_a_request_is_bytes_not_tokens(connect):
    client = connect(count=lambda texts: [1 for _ in texts])
    assert client.embed(*["x" * 30_000] * 41).error["code"] == "max_tokens_per_request"


def test_limits_can_be_small(connect):
    limits = Limits(max_texts=2, max_text_tokens=3, max_request_tokens=5)
    client = connect(limits=limits, count=lambda texts: [tokens_of(text) for text in texts])
    assert client.embed("a" * 12, "b" * 8).status == 200
    assert client.embed("a", "b", "c").error["code"] == "array_above_max_length"
    assert "maximum input length is 3" in client.embed("a" * 13).error["message"]
    assert client.embed("a" * 12, "b" * 12).error["code"] == "max_tokens_per_request"


def test_other_models_keys_and_vectors(connect):
    client = connect(api_key=None, models={"mini": FakeModel(dimensions=4)}, salt="other")
    reply = client.send(body=body(model="mini"), key="")
    assert reply.json["data"][0]["embedding"] == vector_of("a text", 4, salt="other").tolist()
    assert client.send(body=body(), key="anything").status == 404


# The meter


def test_meter_bills_what_was_answered(client, server):
    client.embed("one", "two words", "one")
    client.embed("three")
    client.embed("")
    tokens = sum(openai_tokens(["one", "two words", "one", "three"]))
    assert server.meter.billed_tokens == tokens
    assert (server.meter.billed_requests, server.meter.rejected_requests) == (2, 1)
    assert server.meter.requests == 3
    assert server.meter.billed_texts == {"one": 2, "two words": 1, "three": 1}
    assert server.meter.billed_twice == {"one": 2}


def test_usage_is_what_the_count_says(connect):
    client = connect(count=lambda texts: [len(text.split()) for text in texts])
    assert client.embed("a b c", "d").json["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert client.server.meter.billed_tokens == 4


def test_meter_counts_requests_in_flight(connect):
    server = connect(latency=0.2).server
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: _one(server), range(4)))
    assert server.meter.max_in_flight == 4
    assert server.meter.in_flight == 0


def _one(server):
    request = urllib.request.Request(
        f"{server.base_url}/embeddings",
        json.dumps(body()).encode(),
        {"Authorization": f"Bearer {server.api_key}"},
    )
    with urllib.request.urlopen(request) as reply:
        return reply.status == 200


def test_many_threads_lose_no_request(connect):
    server = connect().server
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda _: _one(server), range(400)))
    assert server.meter.billed_requests == len(server.requests) == 400
    assert server.meter.billed_tokens == 400 * sum(openai_tokens(["a text"]))


def test_requests_are_recorded(client, server):
    client.embed("one", "two", encoding="base64")
    client.send("GET", "/v1/models?limit=1")
    first, second = server.requests
    assert (first.method, first.path, first.status) == ("POST", "/v1/embeddings", 200)
    assert first.headers["authorization"] == f"Bearer {server.api_key}"
    assert first.texts == ["one", "two"]
    assert first.billed_tokens == 2
    assert (second.path, second.query, second.texts) == ("/v1/models", "limit=1", [])


def test_recording_can_be_turned_off(connect):
    client = connect(record=False)
    client.embed("one")
    assert client.server.requests == []
    assert client.server.meter.billed_requests == 1


# The wire


def test_one_connection_serves_many_requests(client):
    client.embed("first")
    kept = client.connection.sock
    for number in range(20):
        assert client.embed(f"text {number}").status == 200
    assert client.connection.sock is kept


def test_client_may_close_the_connection(client):
    reply = client.send(body=body(), headers={"Connection": "close"})
    assert reply.status == 200
    client.connection.close()
    assert client.embed("again").status == 200


def test_chunked_request_body_is_read(client):
    content = json.dumps(body()).encode()
    client.connection.request(
        "POST",
        "/v1/embeddings",
        iter([content[:10], content[10:]]),
        {"Authorization": f"Bearer {client.server.api_key}", "Transfer-Encoding": "chunked"},
        encode_chunked=True,
    )
    assert client.connection.getresponse().status == 200


def test_close_frees_the_port_and_may_be_repeated():
    server = FakeOpenAI()
    port = int(server.url.rpartition(":")[2])
    server.close()
    server.close()
    with FakeOpenAI(port=port) as again:
        assert again.url.endswith(str(port))


def test_close_wakes_what_hangs(connect):
    server = connect().server
    server.faults.push("hang", seconds=3600)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(_one, server)
        while not server.requests:
            threading.Event().wait(0.01)
        server.close()
        with pytest.raises(OSError, match=r"reset|closed|aborted"):
            hanging.result(timeout=120)


def test_error_of_the_fake_itself_is_loud(capsys):
    server = FakeOpenAI(count=lambda texts: 1 // 0)
    with pytest.raises(OSError, match="500"):
        _one(server)
    with pytest.raises(RuntimeError, match="fake server itself failed"):
        server.close()
    assert "ZeroDivisionError" in capsys.readouterr().err


# Rate limits


def test_quota_is_only_announced_unless_enforced(connect):
    client = connect(quota=Quota(requests_per_minute=2, tokens_per_minute=10))
    for _ in range(5):
        assert client.embed("a").status == 200
    assert client.embed("a").headers["x-ratelimit-remaining-requests"] == "0"


def test_enforced_quota_refuses_and_says_how_long(connect, conforms):
    now = [0.0]
    quota = Quota(requests_per_minute=60, tokens_per_minute=10, enforced=True, clock=lambda: now[0])
    client = connect(quota=quota, count=lambda texts: [tokens_of(text) for text in texts])
    assert client.embed("x" * 40).status == 200  # 10 tokens
    refused = client.embed("x" * 20)
    assert (refused.status, refused.error["type"]) == (429, "tokens")
    assert float(refused.headers["retry-after"]) >= 30
    assert float(refused.headers["retry-after-ms"]) == pytest.approx(30_000, abs=1)
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    conforms("ErrorResponse", refused.json)
    now[0] = 30.0
    assert client.embed("x" * 20).status == 200
    assert client.server.meter.rejected_requests == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s"), (1396.298, "23m16.298s")],
)
def test_durations_are_written_as_go_does(seconds, text):
    assert go_duration(seconds) == text


# Its own process


def test_runs_in_a_process_of_its_own():
    command = [sys.executable, "-m", "embedcore.testing.openai.server", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            place = json.loads(process.stdout.readline())
            assert place["base_url"] == f"{place['url']}/v1"
            remote = _Remote(place)
            assert remote.embed("a text")["usage"]["total_tokens"] == 2
            remote.call("POST", "/_faults", {"push": [{"mode": "usage", "value": 7}]})
            assert remote.embed("a text")["usage"]["total_tokens"] == 7
            meter = remote.call("GET", "/_meter")
            assert (meter["billed_requests"], meter["billed_tokens"]) == (2, 4)
            assert meter["distinct_texts"] == 1
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_ends_with_its_input_when_asked():
    command = [sys.executable, "-m", "embedcore.testing.openai.server", "--until-eof"]
    run = subprocess.run(command, input="", capture_output=True, text=True, timeout=20, check=True)
    assert json.loads(run.stdout)["url"].startswith("http://127.0.0.1:")


class _Remote:
    def __init__(self, place):
        self.url, self.key = place["url"], place["api_key"]

    def call(self, method, path, value=None):
        request = urllib.request.Request(
            self.url + path,
            None if value is None else json.dumps(value).encode(),
            {"Authorization": f"Bearer {self.key}"},
            method=method,
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def embed(self, text):
        return self.call("POST", "/v1/embeddings", body(input=[text]))
