"""Does each fault of the fake Batch API do, or not do, what was asked, whatever the client sees?"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
import urllib.request

import pytest

from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batches import BatchSettings, Progress
from embedcore.testing.openai.faults import Fault
from embedcore.testing.openai.modes import MODES

CUT = (http.client.HTTPException, OSError)
SMALL = "text-embedding-3-small"
LINE = json.dumps(
    {
        "custom_id": "0",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": SMALL, "input": "a text", "dimensions": 8},
    }
).encode()
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    + LINE
    + b"\r\n--b--\r\n"
)
QUICK = {
    "hang": {"seconds": 0.05},
    "late": {"seconds": 0.05},
    "drip": {"interval": 0.0},
    "endless": {"limit": 100_000},
    "gzip_bomb": {"size": 100_000},
}


class Doer:
    """One deed of every kind, each with a way to see whether it was done."""

    def __init__(self, client):
        self.client = client
        self.service = client.server.batches
        self.file = self.service.upload(LINE)["id"]
        self.job = self.service.create(self.file)["id"]
        self.deeds = {
            "POST /v1/files": self.upload,
            "POST /v1/batches": self.create,
            "POST /v1/batches/{id}/cancel": self.cancel,
            "DELETE /v1/files/{id}": self.delete,
        }

    def send(self, *arguments, **more):
        """The status of the reply; None if there was none."""
        try:
            return self.client.send(*arguments, **more).status
        except CUT:
            self.client.connection.close()
            return None

    def upload(self):
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        return self.send(path="/v1/files", body=FORM, headers=headers)

    def create(self):
        body = {"endpoint": "/v1/embeddings", "completion_window": "24h"}
        return self.send(path="/v1/batches", body={"input_file_id": self.file, **body})

    def cancel(self):
        return self.send("POST", f"/v1/batches/{self.job}/cancel")

    def delete(self):
        return self.send("DELETE", f"/v1/files/{self.file}")

    def state(self):
        """What there is, without a request that would count."""
        service = self.service
        return len(service._files.newest_first()), len(service.jobs), service.job(self.job).status


@pytest.fixture
def doer(connect):
    return Doer(connect(batch=BatchSettings(progress=Progress())))


DEEDS = [
    "POST /v1/files",
    "POST /v1/batches",
    "POST /v1/batches/{id}/cancel",
    "DELETE /v1/files/{id}",
]
LOSSES = [
    ("reset", {}, None),
    ("hang", {"seconds": 0.05}, None),
    ("close_silent", {}, None),
    ("status", {"status": 500}, 500),
    ("status", {"status": 502, "body": "html"}, 502),
    ("rate_limited", {}, 429),
]


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize(("mode", "options", "status"), LOSSES)
@pytest.mark.parametrize("effect", ["before", "after", "late"])
def test_every_loss_is_of_an_effect_that_was_or_was_not(doer, deed, mode, options, status, effect):
    before = doer.state()
    doer.client.server.faults.push(mode, path=deed, effect=effect, **options)
    assert doer.deeds[deed]() == status
    assert (doer.state() != before) == (effect == "after")
    doer.service.refresh()
    assert (doer.state() != before) == (effect == "after")
    assert doer.service.land() == (effect == "late")
    assert (doer.state() != before) == (effect != "before")
    assert doer.client.server.faults.pending == 0


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_does_what_it_bills(doer, deed, mode):
    before = doer.state()
    doer.client.server.faults.push(mode, path=deed, **QUICK.get(mode, {}))
    doer.deeds[deed]()
    assert (doer.state() != before) == MODES[mode].bills
    assert doer.client.server.meter.requests == 0


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_sense_of_a_download(doer, mode):
    doer.service.finish(doer.job)
    path = f"/v1/files/{doer.service.job(doer.job).output_file_id}/content"
    honest = doer.client.send("GET", path)
    doer.client.server.faults.push(mode, path="/v1/files/{id}/content", **QUICK.get(mode, {}))
    with contextlib.suppress(*CUT):
        reply = doer.client.send("GET", path)
        changed = {"cut_json", "broken_json", "leading_space", "gzip_bomb", "html", "raw"}
        if reply.status == 200 and mode not in changed | {"duplicate_keys"}:
            assert reply.body == honest.body
    doer.client.connection.close()
    assert doer.client.send("GET", path).body == honest.body


def test_a_landing_by_requests_comes_before_the_next_one(doer):
    faults = doer.client.server.faults
    faults.push("reset", path="POST /v1/batches", effect="late", after_requests=2)
    assert doer.create() is None
    counts = [len(doer.client.send("GET", "/v1/batches").json["data"]) for _ in range(3)]
    assert counts == [1, 1, 2]


def test_a_landing_by_time(doer):
    faults = doer.client.server.faults
    faults.push("status", path="POST /v1/batches", effect="late", after_seconds=60)
    assert doer.create() == 500
    doer.service.clock.advance(59)
    assert len(doer.client.send("GET", "/v1/batches").json["data"]) == 1
    doer.service.clock.advance(1)
    assert len(doer.client.send("GET", "/v1/batches").json["data"]) == 2


@pytest.mark.parametrize("accepts", [False, True])
def test_a_late_create_meets_the_fence(doer, accepts):
    doer.service.settings.accepts_deleted_input = accepts
    doer.client.server.faults.push("reset", path="POST /v1/batches", effect="late")
    assert doer.create() is None
    assert doer.delete() == 200
    doer.service.land()
    assert len(doer.service.jobs) == (2 if accepts else 1)


def test_paths_with_and_without_a_method(doer):
    faults = doer.client.server.faults
    faults.push("status", path="/v1/batches", status=500)
    faults.push("status", path="GET /v1/batches/{id}", status=502)
    assert doer.client.send("GET", f"/v1/batches/{doer.job}").status == 502
    assert doer.cancel() == 200
    assert doer.create() == 500
    faults.always("status", path="GET /v1/batches", status=503)
    assert doer.client.send("GET", "/v1/batches").status == 503
    assert doer.create() == 200


def test_an_upload_may_be_reset_before_it_is_read(doer):
    before = doer.state()
    doer.client.server.faults.push("reset_unread", path="POST /v1/files")
    assert doer.upload() is None
    assert doer.state() == before
    assert doer.upload() == 200


def test_effects_are_checked_and_options_still_are():
    with pytest.raises(ValueError, match="no effect 'soon'"):
        Fault(mode="reset", effect="soon")
    with FakeOpenAI() as server, pytest.raises(ValueError, match="none of these faults"):
        server.faults.push("reset", "ok", nonsense=1)


def test_following_a_redirect_starts_no_job_elsewhere(doer):
    doer.client.server.faults.push("redirect", path="POST /v1/batches")
    reply = doer.client.send(path="/v1/batches", body={})
    other = http.client.HTTPConnection(reply.headers["location"].split("/")[2])
    body = {"input_file_id": doer.file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    key = {"Authorization": f"Bearer {doer.client.server.api_key}"}
    other.request("POST", "/v1/batches", json.dumps(body), key)
    assert other.getresponse().status == 503
    other.close()
    assert len(doer.service.jobs) == 1


# From another process


def call(url, path, value=None, *, key="", method=None):
    request = urllib.request.Request(
        url + path,
        None if value is None else json.dumps(value).encode(),
        {"Authorization": f"Bearer {key}"},
        method=method or ("GET" if value is None else "POST"),
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def test_jobs_are_driven_over_http(doer):
    url = doer.client.server.url
    job = call(url, "/_batches")["jobs"][0]
    assert (job["id"], job["status"], job["run"]) == (doer.job, "validating", 0)
    call(url, "/_batches", {"jobs": [{"do": "step", "done": 1}]})
    assert call(url, "/_batches")["jobs"][0]["run"] == 1
    found = call(url, "/_batches", {"jobs": [{"id": doer.job, "do": "finish"}]})
    assert found["jobs"][0]["status"] == "completed"
    assert (found["pending"], found["landed"], found["billed_twice"]) == (0, [], 0)
    meter = call(url, "/_meter")
    assert meter["batches"]["billed_requests"] == 1
    assert meter["billed_requests"] == 0


def test_settings_time_lines_and_landings_are_driven_over_http(doer):
    url = doer.client.server.url
    script = {
        "set": {"quirks": {"bom": True}, "progress": {"seconds": 100}, "window": None},
        "fail_lines": [{"marker": "a text", "status": 500}],
        "advance": 100,
    }
    assert call(url, "/_batches", script)["jobs"][0]["status"] == "completed"
    assert doer.service.settings.quirks.bom
    assert doer.service.job(doer.job).error_file_id
    fault = {"mode": "reset", "path": "POST /v1/batches", "effect": "late"}
    call(url, "/_faults", {"push": [fault]})
    assert doer.create() is None
    assert call(url, "/_batches")["pending"] == 1
    assert len(call(url, "/_batches", {"land": True})["jobs"]) == 2


def test_reading_the_meter_lets_jobs_catch_up_with_the_clock(doer):
    doer.service.settings.progress.seconds = 100
    doer.service.clock.advance(100)
    assert call(doer.client.server.url, "/_meter")["batches"]["billed_requests"] == 1


@pytest.mark.parametrize(
    "script",
    [
        [],
        {"nonsense": 1},
        {"set": {"nonsense": 1}},
        {"jobs": [{"do": "nonsense"}]},
        {"jobs": [{"do": "finish", "id": "batch_nonesuch"}]},
        {"jobs": [{"do": "finish", "nonsense": 1}]},
        {"fail_lines": [{"status": 500}]},
    ],
)
def test_a_script_without_sense_is_refused(doer, script):
    assert doer.client.send(path="/_batches", body=script, key="").status == 400


def test_a_server_of_its_own_runs_batches_by_the_clock():
    command = [sys.executable, "-m", "embedcore.testing.openai.server", "--until-eof"]
    options = ["--batch-seconds", "0.2", "--dimensions", "4", "--batch-queue", "1000"]
    with subprocess.Popen(
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        place = json.loads(process.stdout.readline())
        url, key = place["url"], place["api_key"]
        line = json.loads(LINE)
        del line["body"]["dimensions"]
        form = FORM.replace(LINE, json.dumps(line).encode())
        request = urllib.request.Request(
            f"{url}/v1/files",
            form,
            {"Authorization": f"Bearer {key}", "Content-Type": "multipart/form-data; boundary=b"},
        )
        with urllib.request.urlopen(request) as reply:
            file = json.load(reply)["id"]
        asked = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        job = call(url, "/v1/batches", asked, key=key)
        ends = time.monotonic() + 20
        while job["status"] != "completed" and time.monotonic() < ends:
            time.sleep(0.05)
            job = call(url, f"/v1/batches/{job['id']}", key=key)
        request = urllib.request.Request(
            f"{url}/v1/files/{job['output_file_id']}/content",
            headers={"Authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(request) as reply:
            body = json.load(reply)["response"]["body"]
        assert len(body["data"][0]["embedding"]) == 4
        assert call(url, "/_meter")["batches"]["billed_texts"] == 1
        process.stdin.close()
        assert process.wait(10) == 0


def test_a_server_of_its_own_may_leave_batches_to_hands_or_polls():
    from embedcore.testing.openai.server import _parser, _progress

    def progress(*arguments):
        return _progress(_parser().parse_args(arguments))

    assert progress() == Progress(polls=3)
    assert progress("--batch-polls", "7") == Progress(polls=7)
    assert progress("--batch-seconds", "2") == Progress(seconds=2)
    assert progress("--batch-by-hand") == Progress()
