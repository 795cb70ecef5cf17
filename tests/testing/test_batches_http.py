"""Does the fake serve the Files and Batch API as OpenAI does: recordings, description, real SDK?"""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedcore.testing import FakeOpenAI, vector_of
from embedcore.testing.openai.batches import BatchSettings, Listing, Progress, Quirks
from embedcore.testing.openai.embeddings import FakeModel

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"
SMALL = "text-embedding-3-small"
WIDTH = 8


def lines(count=3, *, width=WIDTH, **body):
    return b"\n".join(
        json.dumps(
            {
                "custom_id": str(place),
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": SMALL, "input": f"text {place}", "dimensions": width, **body},
            }
        ).encode()
        for place in range(count)
    )


def form(content, *, purpose="batch", filename="in.jsonl", **fields):
    """A multipart body and its header, as a plain client writes them."""
    fields = {"purpose": purpose, **fields}
    boundary = f"----{random.Random(len(content)).getrandbits(64):x}"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
        if value is not None
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
    parts.append(head.encode() + b"Content-Type: application/jsonl\r\n\r\n" + content)
    parts.append(f"\r\n--{boundary}--\r\n".encode())
    return b"".join(parts), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


class BatchClient:
    """The endpoints over a raw connection; replies as parsed JSON."""

    def __init__(self, client):
        self.raw = client
        self.server = client.server
        self.service = client.server.batches

    def upload(self, content=None, **more):
        body, headers = form(lines() if content is None else content, **more)
        return self.raw.send(path="/v1/files", body=body, headers=headers)

    def create(self, input_file_id, **more):
        asked = {"endpoint": "/v1/embeddings", "completion_window": "24h", **more}
        body = {"input_file_id": input_file_id, **asked}
        return self.raw.send(path="/v1/batches", body=body)

    def started(self, content=None, **more):
        return self.create(self.upload(content).json["id"], **more).json["id"]

    def get(self, path, **more):
        return self.raw.send("GET", path, **more)


@pytest.fixture
def batches(connect):
    """``batches(**options)``: a client of a server whose jobs move by hand."""

    def start(**options):
        options = {"batch": BatchSettings(progress=Progress()), **options}
        return BatchClient(connect(**options))

    return start


@pytest.fixture
def client(batches):
    return batches()


@pytest.fixture
def sdk():
    openai = pytest.importorskip("openai")
    with FakeOpenAI() as server:
        client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0)
        yield client, server
        client.close()


def without_nulls(value):
    """The published description has no null, where the API writes one for what is not there."""
    return {name: each for name, each in value.items() if each is not None}


# The recordings


def recorded(name):
    path = FIXTURES / name
    if not path.exists():
        pytest.skip("the recordings are not beside the repository")
    return json.loads(path.read_text())["interactions"]


def kinds(value, path=""):
    """Every key of a JSON value with the types found there."""
    if isinstance(value, dict) and not path.endswith("metadata"):
        found = {f"{path}{{}}": {"object"}}
        for key, each in value.items():
            for place, types in kinds(each, f"{path}.{key}").items():
                found.setdefault(place, set()).update(types)
        return found
    if isinstance(value, list):
        found = {f"{path}[]": {"array"}}
        for each in value:
            for place, types in kinds(each, f"{path}[]").items():
                found.setdefault(place, set()).update(types)
        return found
    return {path: {type(value).__name__}}


def assert_alike(ours, theirs):
    """The same keys in the same order, and the same types where both say something."""
    assert list(ours) == list(theirs)
    mine, real = kinds(ours), kinds(theirs)
    for place in set(mine) & set(real):
        if "NoneType" not in mine[place] | real[place]:
            assert mine[place] == real[place], place


def test_a_recorded_life_of_a_batch_is_lived_again(batches):
    steps = recorded("openai_embedding_batch_lifecycle.json")
    upload, create, polls, last = steps[0], steps[1], steps[2:-2], steps[-1]
    client = batches()
    text = upload["request_body"]["file_text"].encode()
    file = client.upload(text, filename=upload["response_body"]["filename"])
    assert_alike(file.json, upload["response_body"])
    assert file.json["bytes"] == upload["response_body"]["bytes"]
    life = file.json["expires_at"] - file.json["created_at"]
    assert life == upload["response_body"]["expires_at"] - upload["response_body"]["created_at"]
    job = client.create(file.json["id"]).json
    assert_alike(job, create["response_body"])
    assert job["expires_at"] - job["created_at"] == 86400
    for poll in polls:
        if poll["response_body"]["status"] == "completed" and job["status"] != "completed":
            client.service.finish(job["id"])
        job = client.get(f"/v1/batches/{job['id']}").json
        assert_alike(job, poll["response_body"])
        assert job["status"] == poll["response_body"]["status"]
        assert job["request_counts"] == poll["response_body"]["request_counts"]
    reply = client.get(f"/v1/files/{job['output_file_id']}/content")
    assert reply.headers["content-type"] == last["response_headers"]["content-type"]
    assert not any(name.startswith("x-ratelimit") for name in reply.headers)


def test_output_lines_are_as_recorded(client):
    path = FIXTURES / "openai_embedding_batch_output.jsonl"
    if not path.exists():
        pytest.skip("the recordings are not beside the repository")
    theirs = [json.loads(one) for one in path.read_text().splitlines()]
    job = client.started((FIXTURES / "openai_embedding_batch_input.jsonl").read_bytes())
    client.service.finish(job)
    file = client.service.job(job).output_file_id
    ours = [json.loads(one) for one in client.get(f"/v1/files/{file}/content").body.splitlines()]
    assert {one["custom_id"] for one in ours} == {one["custom_id"] for one in theirs}
    for one in ours:
        (real,) = [each for each in theirs if each["custom_id"] == one["custom_id"]]
        assert_alike(one, real)
        assert kinds(one) == kinds(real)
        width = len(real["response"]["body"]["data"][0]["embedding"])
        assert len(one["response"]["body"]["data"][0]["embedding"]) == width


def test_lists_cancels_and_deletes_are_as_recorded(client):
    job = client.started()
    reply = client.raw.send("POST", f"/v1/batches/{job}/cancel")
    (cancel,) = recorded("openai_batches_cancel.json")
    older = {"model", "usage"}  # they came after these were recorded
    assert set(reply.json) - older == set(cancel["response_body"])
    assert reply.json["status"] == cancel["response_body"]["status"] == "cancelling"
    listed = recorded("openai_batches_list.json")[0]
    page = client.get("/v1/batches").json
    assert set(page) == set(listed["response_body"])
    assert kinds(page)[".has_more"] == {"bool"}
    assert set(page["data"][0]) - older == set(listed["response_body"]["data"][0])
    (deleted,) = recorded("openai_files_delete.json")
    file = client.upload().json["id"]
    ours = client.raw.send("DELETE", f"/v1/files/{file}").json
    assert ours == {**deleted["response_body"], "id": file}
    (downloaded,) = recorded("openai_files_content.json")
    text = downloaded["response_body"].encode()
    kept = client.upload(text, purpose="fine-tune").json["id"]
    assert client.get(f"/v1/files/{kept}/content").body == text


# The published description


def test_objects_conform_to_the_published_description(client, conforms):
    asked = {
        "input_file_id": client.upload().json["id"],
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
        "metadata": {"job": "1"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    }
    conforms("CreateBatchRequest", asked)
    created = client.raw.send(path="/v1/batches", body=asked).json
    assert created["metadata"] == {"job": "1"}
    seen = [created]
    client.service.fail_lines("text 1")
    for _ in range(3):
        client.service.step(created["id"])
        seen.append(client.get(f"/v1/batches/{created['id']}").json)
    failed = client.started(b"nonsense")
    client.service.finish(failed)
    seen.append(client.get(f"/v1/batches/{failed}").json)
    for job in seen:
        shown = without_nulls(job)
        if job["errors"]:
            shown["errors"]["data"] = [without_nulls(one) for one in job["errors"]["data"]]
        conforms("Batch", shown)
    page = client.get("/v1/batches").json
    conforms("ListBatchesResponse", {**page, "data": [without_nulls(one) for one in page["data"]]})
    files = client.get("/v1/files").json
    for file in files["data"]:
        conforms("OpenAIFile", without_nulls(file))
    shown = [without_nulls(one) for one in files["data"]]
    conforms("ListFilesResponse", {**files, "data": shown})
    reply = client.raw.send("DELETE", f"/v1/files/{asked['input_file_id']}")
    conforms("DeleteFileResponse", reply.json)
    error = seen[-2]["error_file_id"]
    (line,) = client.get(f"/v1/files/{error}/content").body.splitlines()
    conforms("ErrorResponse", json.loads(line)["response"]["body"])


# Refusals


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/nonesuch"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": "file-nonesuch"}, "input_file_id"),
        ({"nonsense": 1}, "nonsense"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 3599}},
            "output_expires_after",
        ),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after"),
    ],
)
def test_a_wrong_create_is_refused_at_once(client, conforms, changes, param):
    file = client.upload().json["id"]
    reply = client.create(**{"input_file_id": file, **changes})
    assert (reply.status, reply.error["param"]) == (400, param)
    conforms("ErrorResponse", reply.json)
    assert client.service.jobs == []


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"purpose": "nonsense"}, "purpose"),
        ({"purpose": None}, "purpose"),
        ({"content": b""}, "file"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, "expires_after"),
        ({"expires_after[seconds]": "soon"}, "expires_after"),
    ],
)
def test_a_wrong_upload_is_refused(client, more, param):
    reply = client.upload(**more)
    assert (reply.status, reply.error["param"]) == (400, param)


def test_a_body_that_is_no_whole_form_is_refused(client):
    body, headers = form(lines())
    cut = body[:-4]  # all but the end of the last boundary
    for wrong, sent in (
        (body[:-60], headers),
        (cut, headers),
        (body, {}),
        (b"{}", headers),
        (b"", headers),
    ):
        reply = client.raw.send(path="/v1/files", body=wrong, headers=sent)
        assert reply.status == 400
    assert client.get("/v1/files").json["data"] == []


def test_only_batch_files_make_batches(client):
    file = client.upload(purpose="fine-tune").json["id"]
    assert client.create(file).error["param"] == "input_file_id"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files/file-x"),
        ("DELETE", "/v1/files/file-x"),
        ("GET", "/v1/files/file-x/content"),
        ("GET", "/v1/batches/batch_x"),
        ("POST", "/v1/batches/batch_x/cancel"),
    ],
)
def test_what_is_not_there_is_404_and_needs_a_key(client, conforms, method, path):
    reply = client.raw.send(method, path)
    assert reply.status == 404
    conforms("ErrorResponse", reply.json)
    assert client.raw.send(method, path, key="sk-another-key-of-someone").status == 401


def test_limits_of_pages_are_checked(client):
    for query in ("limit=0", "limit=101", "limit=x"):
        assert client.get(f"/v1/batches?{query}").error["param"] == "limit"
    assert client.get("/v1/files?purpose=batch_output&limit=10000").json["data"] == []


# Bodies


def test_a_client_that_dies_in_an_upload_leaves_no_file(client):
    body, headers = form(lines(50))
    port = int(client.server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as dying:
        head = [
            "POST /v1/files HTTP/1.1",
            f"Authorization: Bearer {client.server.api_key}",
            f"Content-Type: {headers['Content-Type']}",
            f"Content-Length: {len(body)}",
        ]
        dying.sendall("\r\n".join([*head, "\r\n"]).encode() + body[:-1])
        dying.shutdown(socket.SHUT_WR)
        assert dying.recv(1) == b""
    assert client.get("/v1/files").json["data"] == []


def test_an_upload_may_come_in_chunks(client):
    body, headers = form(lines(2000))
    pieces = iter([body[:100], body[100:70_000], body[70_000:]])
    connection = client.raw.connection
    headers["Authorization"] = f"Bearer {client.server.api_key}"
    connection.request("POST", "/v1/files", pieces, headers, encode_chunked=True)
    file = json.loads(connection.getresponse().read())
    assert file["bytes"] == len(lines(2000))
    assert client.get(f"/v1/files/{file['id']}/content").body == lines(2000)


def test_ranges_are_honoured_only_if_they_are_to_be(client):
    file = client.upload().json["id"]
    whole = lines()
    path, headers = f"/v1/files/{file}/content", {"Range": "bytes=10-19"}
    assert client.get(path, headers=headers).status == 200
    client.service.settings.ranges = True
    reply = client.get(path, headers=headers)
    assert (reply.status, reply.body) == (206, whole[10:20])
    assert reply.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert client.get(path, headers={"Range": "bytes=10-"}).body == whole[10:]
    assert client.get(path, headers={"Range": f"bytes={len(whole)}-"}).status == 416


class Apart:
    """A server in a process of its own, over one connection, and the memory it took."""

    def __init__(self, process):
        place = json.loads(process.stdout.readline())
        self.status = Path(f"/proc/{process.pid}/status")
        self.key = {"Authorization": f"Bearer {place['api_key']}"}
        self.connection = http.client.HTTPConnection(place["url"].partition("//")[2], timeout=60)

    def ask(self, method, path, body=None, headers=None):
        self.connection.request(method, path, body, {**self.key, **(headers or {})})
        return self.connection.getresponse()

    def said(self, *arguments):
        return json.loads(self.ask(*arguments).read())

    def peak(self):
        """The most bytes of memory it ever had."""
        (line,) = [one for one in self.status.read_text().splitlines() if "VmHWM" in one]
        return int(line.split()[1]) * 1024


@pytest.fixture
def apart():
    if not Path("/proc/self/status").exists():
        pytest.skip("the memory of a process is read from /proc")
    command = [sys.executable, "-m", "embedcore.testing.openai.server", "--until-eof"]
    with subprocess.Popen(
        [*command, "--batch-polls", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        server = Apart(process)
        yield server
        server.connection.close()
        process.stdin.close()


@pytest.mark.parametrize(
    ("encoding", "rows"),
    [("base64", 8000), pytest.param("float", 2500, marks=pytest.mark.campaign(short=True))],
)
def test_a_large_output_is_streamed_and_not_held(apart, encoding, rows):
    body, headers = form(lines(rows, width=1536, encoding_format=encoding))
    file = apart.said("POST", "/v1/files", body, headers)["id"]
    create = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    job = apart.said("POST", "/v1/batches", json.dumps(create))["id"]
    output = apart.said("GET", f"/v1/batches/{job}")["output_file_id"]
    file = apart.said("GET", f"/v1/files/{output}")
    assert file["bytes"] > 60_000_000
    before, size, sample = apart.peak(), 0, b""
    reply = apart.ask("GET", f"/v1/files/{output}/content")
    assert int(reply.headers["content-length"]) == file["bytes"]
    while block := reply.read(1 << 20):
        sample = sample or block
        size += len(block)
    assert size == file["bytes"]
    assert apart.peak() - before < 20_000_000
    first = json.loads(sample.splitlines()[0])
    found = first["response"]["body"]["data"][0]["embedding"]
    if encoding == "float":
        wanted = vector_of(f"text {first['custom_id']}", 1536)
        assert np.array_equal(np.asarray(found, np.float32), wanted)


@pytest.mark.campaign(short=True)
def test_a_large_input_is_not_held_twice(apart):
    body, headers = form(b" " * 60_000_000, purpose="fine-tune")
    before = apart.peak()
    assert apart.said("POST", "/v1/files", body, headers)["bytes"] == 60_000_000
    # The mapped pages of the spool are the one copy there may be.
    assert apart.peak() - before < 80_000_000


# The SDK


def test_the_sdk_runs_a_batch_from_end_to_end(sdk):
    client, server = sdk
    file = client.files.create(
        file=("in.jsonl", lines(25), "application/jsonl"),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (file.bytes, file.purpose) == (len(lines(25)), "batch")
    assert file.expires_at == file.created_at + 7200
    job = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/embeddings",
        completion_window="24h",
        metadata={"mine": "yes"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    seen = [job]
    while seen[-1].status != "completed":
        seen.append(client.batches.retrieve(job.id))
    assert [one.status for one in seen] == [
        "validating",
        "in_progress",
        "in_progress",
        "completed",
    ]
    assert seen[-1].usage.total_tokens == server.batches.meter.billed_tokens > 0
    assert seen[-1].metadata == {"mine": "yes"}
    output = client.files.retrieve(seen[-1].output_file_id)
    assert output.expires_at == output.created_at + 3600
    with client.files.with_streaming_response.content(output.id) as reply:
        found = {one["custom_id"]: one for one in map(json.loads, reply.iter_lines())}
    for number in range(25):
        item = found[str(number)]["response"]["body"]["data"][0]["embedding"]
        assert np.array_equal(np.asarray(item, np.float32), vector_of(f"text {number}", WIDTH))
    assert client.files.delete(file.id).deleted
    assert [one.id for one in client.files.list(purpose="batch_output")] == [output.id]
    assert server.meter.requests == 0


def test_the_sdk_pages_cancels_and_meets_errors(sdk):
    import openai

    client, server = sdk
    file = client.files.create(file=("in.jsonl", lines(), "application/jsonl"), purpose="batch")
    more = {"endpoint": "/v1/embeddings", "completion_window": "24h"}
    jobs = [client.batches.create(input_file_id=file.id, **more).id for _ in range(7)]
    assert [job.id for job in client.batches.list(limit=3)] == jobs[::-1]
    assert client.batches.cancel(jobs[0]).status == "cancelling"
    assert client.batches.retrieve(jobs[0]).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(jobs[0])
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_x")
    with pytest.raises(openai.BadRequestError):
        client.batches.create(input_file_id="file-x", **more)
    wrong = client.files.create(file=("in.jsonl", b"{", "application/jsonl"), purpose="batch")
    failed = client.batches.create(input_file_id=wrong.id, **more)
    server.batches.finish(failed.id)
    (error,) = client.batches.retrieve(failed.id).errors.data
    assert (error.code, error.line) == ("invalid_json_line", 1)


def test_the_server_takes_models_salt_and_count_into_its_batches(batches):
    client = batches(
        models={SMALL: FakeModel(dimensions=4)},
        salt="other",
        count=lambda texts: [7 for _ in texts],
        batch=BatchSettings(quirks=Quirks(order="input"), listing=Listing()),
    )
    job = client.started(lines(2, width=4))
    for _ in range(3):
        found = client.get(f"/v1/batches/{job}").json
    assert found["usage"]["total_tokens"] == client.service.meter.billed_tokens == 14
    reply = client.get(f"/v1/files/{found['output_file_id']}/content")
    first = json.loads(reply.body.splitlines()[0])["response"]["body"]["data"][0]["embedding"]
    wanted = vector_of("text 0", 4, salt="other")
    assert np.array_equal(np.asarray(first, np.float32), wanted)


def test_a_half_file_is_sent_whole_and_a_cut_download_is_not(batches):
    client = batches(batch=BatchSettings(progress=Progress(), quirks=Quirks(cut=0.4)))
    job = client.started(lines(5))
    client.service.finish(job)
    path = f"/v1/files/{client.service.job(job).output_file_id}/content"
    reply = client.get(path)
    assert len(reply.body) == int(reply.headers["content-length"])
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(reply.body.splitlines()[-1])
    client.server.faults.push("truncated", path="/v1/files/{id}/content")
    with pytest.raises(http.client.IncompleteRead):
        client.get(path)
    client.raw.connection.close()
    assert client.get(path).body == reply.body
