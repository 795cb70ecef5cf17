"""Does each fault of the fake do what its name says, and is the meter right about it?"""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import math
import socket
import time
from email.utils import parsedate_to_datetime

import numpy as np
import pytest

from embedcore.testing import openai_tokens, vector_of
from embedcore.testing.openai.faults import Fault
from embedcore.testing.openai.modes import MODES, table

SMALL = "text-embedding-3-small"
CUT = (http.client.HTTPException, OSError)

# Options that keep a mode short; those not named here need none.
QUICK = {
    "hang": {"seconds": 0.05},
    "late": {"seconds": 0.05},
    "drip": {"interval": 0.0},
    "endless": {"limit": 100_000},
    "gzip_bomb": {"size": 100_000},
}
NO_REPLY = {"reset", "reset_billed", "reset_unread", "close_silent", "hang", "endless"}


@pytest.mark.parametrize("bills", [None, True, False])
@pytest.mark.parametrize("mode", MODES)
def test_meter_knows_whether_a_fault_bills(client, server, mode, bills):
    server.faults.push(mode, bills=bills, **QUICK.get(mode, {}))
    with contextlib.suppress(CUT):
        client.embed("one", "two")
    client.connection.close()
    expected = MODES[mode].bills if bills is None else bills
    if mode == "reset_unread":
        expected = False  # what was never read cannot be billed
    tokens = sum(openai_tokens(["one", "two"])) * expected
    assert server.meter.billed_tokens == tokens
    assert server.meter.billed_requests == expected
    assert server.meter.rejected_requests == 1 - expected
    assert [request.fault for request in server.requests] == [mode]
    assert server.requests[0].billed_tokens == tokens
    assert client.embed("after").status == 200
    assert server.faults.pending == 0


@pytest.mark.parametrize("mode", sorted(NO_REPLY))
def test_no_whole_reply_arrives(client, server, mode):
    server.faults.push(mode, **QUICK.get(mode, {}))
    with pytest.raises(CUT):
        client.embed("one")


@pytest.mark.parametrize("mode", sorted(mode for mode in MODES if MODES[mode].bills))
def test_refused_request_is_never_billed(client, server, mode):
    server.faults.push(mode, **QUICK.get(mode, {}))
    try:
        client.embed("")
    except CUT:
        client.connection.close()
    assert server.meter.billed_requests == 0
    assert server.meter.rejected_requests == 1


def test_table_lists_every_mode():
    lines = table().splitlines()
    assert len(lines) == len(MODES) + 1
    assert any(line.startswith("reset_billed         yes") for line in lines)
    assert all(mode.summary for mode in MODES.values())


# Refusals


@pytest.mark.parametrize(
    ("options", "header", "value"),
    [
        ({"retry_after": 2}, "retry-after", "2"),
        ({"retry_after": "soon"}, "retry-after", "soon"),
        ({"retry_after": -1.5}, "retry-after", "-1.5"),
        ({"retry_after_ms": 250}, "retry-after-ms", "250"),
    ],
)
def test_rate_limit_says_what_it_is_told(client, server, conforms, options, header, value):
    server.faults.push("rate_limited", **options)
    reply = client.embed("one")
    assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
    assert reply.headers[header] == value
    assert reply.headers["x-request-id"]
    conforms("ErrorResponse", reply.json)


def test_rate_limit_with_and_without_a_time(client, server):
    server.faults.push("rate_limited")
    assert "retry-after" not in client.embed("one").headers
    server.faults.push("rate_limited", retry_after_date=30)
    date = parsedate_to_datetime(client.embed("one").headers["retry-after"])
    assert date.timestamp() == pytest.approx(time.time() + 30, abs=2)


@pytest.mark.parametrize(
    ("mode", "status", "code"),
    [
        ("over_rate", 429, "rate_limit_exceeded"),
        ("quota_exhausted", 429, "insufficient_quota"),
        ("bad_text", 400, None),
        ("context_length", 400, None),
        ("request_too_large", 400, "max_tokens_per_request"),
        ("echo_key", 401, "invalid_api_key"),
    ],
)
def test_refusals_have_the_apis_form(client, server, conforms, mode, status, code):
    server.faults.push(mode)
    reply = client.embed("one")
    assert (reply.status, reply.error["code"]) == (status, code)
    conforms("ErrorResponse", reply.json)


@pytest.mark.parametrize("status", [401, 403, 404, 408, 409, 413, 422, 500, 502, 503, 504, 529])
def test_any_status_with_any_body(client, server, conforms, status):
    server.faults.push("status", status=status)
    reply = client.embed("one")
    assert reply.status == status
    conforms("ErrorResponse", reply.json)
    kinds = {"none": b"", "html": b"<html>", "text": b"upstream", "string": b'{"error": "'}
    for kind, start in kinds.items():
        server.faults.push("status", status=status, body=kind)
        reply = client.embed("one")
        assert reply.status == status
        assert reply.body.startswith(start)
        assert "x-request-id" not in reply.headers  # a proxy's, not the API's own
    server.faults.push("status", status=status, body="huge")
    assert len(client.embed("one").error["message"]) == 1_000_000


def test_key_is_echoed_in_every_form(client, server):
    server.faults.push("echo_key")
    reply = client.embed("one")
    key = server.api_key
    assert key in reply.error["message"]
    assert base64.b64encode(key.encode()).decode() in reply.error["message"]
    assert reply.headers["x-debug-key"] == key


def test_marker_names_the_text_that_is_too_long(client, server):
    server.faults.when(marker="LONG", mode="context_length")
    assert "input[1]" in client.embed("a", "so LONG", "b").error["message"]
    assert client.embed("a", "b").status == 200


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_points_elsewhere_and_the_key_is_seen_there(client, server, status):
    server.faults.push("redirect", status=status)
    reply = client.embed("one")
    target = reply.headers["location"]
    assert reply.status == status
    assert not target.startswith(server.url)
    assert server.elsewhere == []
    port = int(target.split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"model": SMALL, "input": ["one"]})
    connection.request("POST", "/v1/embeddings", body, {"Authorization": "Bearer key"})
    connection.getresponse().read()
    connection.close()
    assert [request.headers["authorization"] for request in server.elsewhere] == ["Bearer key"]
    assert server.meter.billed_requests == 0


# On the wire


def test_reset_is_a_reset(client, server):
    server.faults.push("reset")
    with pytest.raises(ConnectionResetError):
        client.embed("one")


def test_unread_request_is_reset_before_it_was_sent(server):
    server.faults.push("reset_unread")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(b"POST /v1/embeddings HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            raw.recv(1)
    assert server.requests[0].body == b""


def test_silent_end_is_an_end(client, server):
    server.faults.push("close_silent")
    with pytest.raises(http.client.RemoteDisconnected):
        client.embed("one")


def test_hang_lasts(client, server):
    server.faults.push("hang", seconds=0.3)
    begun = time.monotonic()
    with pytest.raises(ConnectionResetError):
        client.embed("one")
    assert time.monotonic() - begun >= 0.3


def test_late_and_dripping_replies_are_whole(client, server):
    for mode, options in (("late", {"seconds": 0.2}), ("drip", {"interval": 0.001})):
        server.faults.push(mode, **options)
        begun = time.monotonic()
        assert client.embed("one").json["data"][0]["embedding"] == vector_of("one", 8).tolist()
        assert time.monotonic() - begun >= 0.2


@pytest.mark.parametrize("mode", ["truncated", "short_chunk"])
def test_body_is_cut_off(client, server, mode):
    server.faults.push(mode)
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.embed("one")
    assert len(caught.value.partial) < 200


def test_endless_body_ends_only_with_the_client(client, server):
    server.faults.push("endless")
    client.connection.request(
        "POST",
        "/v1/embeddings",
        json.dumps({"model": SMALL, "input": ["one"]}),
        {"Authorization": f"Bearer {server.api_key}"},
    )
    reply = client.connection.getresponse()
    assert len(reply.read(5_000_000)) == 5_000_000
    reply.close()


def test_connection_closes_unannounced_after_a_reply(client, server):
    server.faults.push("close_after")
    reply = client.embed("one")
    assert (reply.status, reply.headers.get("connection")) == (200, None)
    time.sleep(0.05)
    with pytest.raises(CUT):
        client.embed("two")


# The body


def test_raw_body_is_to_the_letter(client, server):
    server.faults.push("raw", body="{nonsense", status=203, content_type="text/x")
    reply = client.embed("one")
    assert (reply.status, reply.body) == (203, b"{nonsense")
    assert reply.headers["content-type"] == "text/x"


@pytest.mark.parametrize("mode", ["cut_json", "broken_json", "html"])
def test_body_is_not_json(client, server, mode):
    server.faults.push(mode)
    reply = client.embed("one")
    assert reply.status == 200
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        json.loads(reply.body)


def test_content_type_may_be_wrong_or_absent(client, server):
    server.faults.push("wrong_type")
    server.faults.push("wrong_type", content_type="")
    first, second = client.embed("one"), client.embed("one")
    assert first.headers["content-type"] == "text/plain"
    assert "content-type" not in second.headers
    assert first.json["data"] == second.json["data"]


def test_gzip_bomb_is_small_and_opens_to_an_honest_reply(client, server):
    server.faults.push("gzip_bomb", size=64 << 20)
    reply = client.embed("one")
    assert reply.headers["content-encoding"] == "gzip"
    assert len(reply.body) < 100_000
    opened = gzip.decompress(reply.body)
    assert len(opened) > 64 << 20
    assert json.loads(opened)["data"][0]["embedding"] == vector_of("one", 8).tolist()


def test_space_in_front_is_legal_json(client, server):
    server.faults.push("leading_space")
    reply = client.embed("one")
    assert reply.body.startswith(b" \n")
    assert reply.json["usage"]["total_tokens"] == 1


def test_duplicate_keys_fool_a_plain_reader(client, server):
    server.faults.push("duplicate_keys")
    reply = client.embed("one", "two")
    assert reply.json["data"][0]["index"] == 0
    pairs = json.loads(reply.body, object_pairs_hook=lambda pairs: [name for name, _ in pairs])
    assert pairs[1] == "data"
    assert reply.body.count(b'"index":1,"index":0') == 1


# The contents


def data(client, *texts, encoding="float"):
    return client.embed(*texts, encoding=encoding).json["data"]


def test_fewer_and_more(client, server):
    server.faults.push("fewer", "more", count=2)
    assert len(data(client, "a", "b", "c")) == 1
    assert [item["index"] for item in data(client, "a", "b", "c")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", range(2, 8))
def test_shuffled_is_true_but_out_of_order(client, server, count):
    texts = [f"text {number}" for number in range(count)]
    server.faults.push("shuffled")
    items = data(client, *texts)
    order = [item["index"] for item in items]
    assert sorted(order) == list(range(count))
    assert order != sorted(order)
    for item in items:
        assert item["embedding"] == vector_of(texts[item["index"]], 8).tolist()


def test_indices_that_are_none(client, server):
    server.faults.push("duplicate_index", "missing_index")
    assert [item["index"] for item in data(client, "a", "b")] == [0, 0]
    assert ["index" in item for item in data(client, "a", "b")] == [False, False]
    for value in (-1, "0", True, 0.0, None):
        server.faults.push("index_value", value=value)
        found = data(client, "a", "b")[0]["index"]
        assert (found, type(found)) == (value, type(value))
    server.faults.push("index_value", value="n")
    assert data(client, "a", "b")[0]["index"] == 2


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "null", '"0.5"'])
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_component_that_is_no_number(client, server, literal, encoding):
    server.faults.push("component", literal=literal, position=1)
    reply = client.embed("a", "b", encoding=encoding)
    value = reply.json["data"][1]["embedding"]
    packed = encoding == "base64" and literal not in ("null", '"0.5"')
    assert isinstance(value, str) == packed
    first = np.frombuffer(base64.b64decode(value), "<f4")[0] if packed else value[0]
    assert first is None or first == "0.5" or not math.isfinite(first)
    if not packed:
        assert f"[{literal},".encode() in reply.body


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_widths_and_zeros(client, server, encoding):
    def widths(*texts):
        values = [item["embedding"] for item in data(client, *texts, encoding=encoding)]
        if encoding == "base64":
            values = [np.frombuffer(base64.b64decode(value), "<f4") for value in values]
        return [len(value) for value in values], np.count_nonzero(values[0])

    server.faults.push("wrong_width", "mixed_width", "zero_vector")
    server.faults.push("wrong_width", width=10)
    assert widths("a", "b")[0] == [7, 7]
    assert widths("a", "b")[0] == [8, 7]
    assert widths("a", "b") == ([8, 8], 0)
    assert widths("a", "b")[0] == [10, 10]


def test_base64_that_is_wrong(client, server):
    for kind in ("alphabet", "length"):
        server.faults.push("bad_base64", kind=kind)
        coded = data(client, "a", encoding="base64")[0]["embedding"]
        with pytest.raises(ValueError, match=r"(?i)base64|padd"):
            base64.b64decode(coded, validate=True)
    server.faults.push("bad_base64", kind="bytes")
    coded = data(client, "a", encoding="base64")[0]["embedding"]
    assert len(base64.b64decode(coded, validate=True)) % 4 == 3
    server.faults.push("big_endian")
    coded = data(client, "a", encoding="base64")[0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(coded), ">f4"), vector_of("a", 8))


def test_list_though_base64_was_asked(client, server):
    server.faults.push("float_list")
    assert data(client, "a", encoding="base64")[0]["embedding"] == vector_of("a", 8).tolist()


@pytest.mark.parametrize("value", [None, 0, -1, 3.5, 2**70, "7"])
def test_usage_may_be_anything_and_the_bill_stays_true(client, server, value):
    server.faults.push("usage", value=value)
    assert client.embed("12345").json["usage"]["prompt_tokens"] == value
    assert server.meter.billed_tokens == 2


def test_usage_missing_null_or_too_high(client, server):
    server.faults.push("usage")
    server.faults.push("usage", value="null")
    server.faults.push("usage", factor=10)
    assert "usage" not in client.embed("12345").json
    assert client.embed("12345").json["usage"] is None
    assert client.embed("12345").json["usage"]["total_tokens"] == 20
    assert server.meter.billed_tokens == 6


def test_other_model_or_none(client, server):
    server.faults.push("other_model")
    server.faults.push("other_model", model="")
    assert client.embed("a").json["model"] == "another-model"
    assert "model" not in client.embed("a").json


# The script


def test_pushed_faults_come_in_order_then_rules_then_always(client, server):
    server.faults.always("quota_exhausted")
    server.faults.when(marker="BAD", mode="bad_text", times=1)
    server.faults.push("rate_limited", "ok", times=2)
    codes = [client.embed("a BAD text").status for _ in range(6)]
    assert codes == [429, 200, 429, 200, 400, 429]
    server.faults.clear()
    assert client.embed("a BAD text").status == 200


def test_rule_by_predicate(client, server):
    server.faults.when(lambda request: len(request.body) > 1000, mode="status", status=413)
    assert client.embed("short").status == 200
    assert client.embed("long " * 500).status == 413


def test_probability_is_repeatable(connect):
    def outcomes(seed):
        client = connect(seed=seed)
        client.server.faults.when(probability=0.3, mode="status", status=503)
        return [client.embed("a").status for _ in range(60)]

    first = outcomes(1)
    assert first == outcomes(1)
    assert first != outcomes(2)
    assert 5 < first.count(503) < 35


def test_faults_meet_only_their_path(client, server):
    server.faults.push("status", path="/v1/models", status=503)
    assert client.embed("a").status == 200
    assert client.send("GET", "/v1/models").status == 503
    assert client.send("GET", "/v1/models").status == 200


def test_mistakes_in_a_script_are_found_at_once(server):
    faults = server.faults
    with pytest.raises(ValueError, match="no fault mode 'rate_limit'; there are"):
        faults.push("rate_limit")
    with pytest.raises(ValueError, match="option 'retry'"):
        faults.push("rate_limited", retry=1)
    with pytest.raises(ValueError, match="has no option 'seconds'; its options: none"):
        Fault(mode="reset", options={"seconds": 1})
    with pytest.raises(ValueError, match="none of these faults has an option 'second'"):
        faults.push("reset", "hang", second=1)
    assert faults.pending == 0


def test_script_from_another_process(client, server):
    script = {
        "push": [{"mode": "rate_limited", "retry_after": 1}, {"mode": "ok"}],
        "when": [{"marker": "BAD", "mode": "bad_text", "times": 1}],
        "always": {"mode": "status", "status": 503, "bills": True},
    }
    assert client.send(path="/_faults", body=script, key="").json == {"pending": 2}
    assert [client.embed("BAD").status for _ in range(4)] == [429, 200, 400, 503]
    assert server.meter.billed_requests == 2
    client.send(path="/_faults", body={"clear": True}, key="")
    assert client.embed("BAD").status == 200
    snapshot = client.send("GET", "/_meter", key="").json
    assert (snapshot["requests"], snapshot["billed_requests"]) == (5, 3)


@pytest.mark.parametrize(
    "script",
    [
        [],
        {"pushed": []},
        {"push": "reset"},
        {"push": [{"mode": "nonesuch"}]},
        {"push": [{"bills": True}]},
        {"when": [{"mode": "ok", "probability": "often"}]},
    ],
)
def test_senseless_script_is_refused(client, server, script):
    reply = client.send(path="/_faults", body=script)
    assert reply.status == 400
    assert reply.json["error"]
    assert server.faults.pending == 0
