"""The batch strategy over real sockets: what is sent, what comes back, what goes wrong."""

from __future__ import annotations

import gzip
import json
import logging
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import Message
from typing import Any

import numpy as np
import pytest
from embedcore_openai.batch import OpenAIBatch
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    InputNotReady,
    InputRejected,
    InvalidResponse,
    OutcomeUnknown,
    PermissionDenied,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    RemoteGone,
    RequestRejected,
    RequestTooLarge,
    TransientProviderError,
)
from embedcore.provider.batch_spool import Spool
from embedcore.provider.types import BatchItem, BatchOutcome
from embedcore.testing import FakeOpenAI, vectors_of
from embedcore.testing.openai.batch_settings import BatchSettings, Listing, Progress, Quirks

Make = Callable[..., OpenAIEmbedder]
BatchOf = Callable[..., OpenAIBatch]
Api = Any
KEY = "0123456789abcdef0123456789abcdef"
TEXTS = [f"text number {number}" for number in range(12)]
NOW = datetime.now(UTC)
REFUSED = {
    "error": {"message": "no", "type": "invalid_request_error", "code": "bad", "param": None}
}


def items(texts: list[str] = TEXTS) -> Iterator[BatchItem]:
    return (BatchItem(id=str(number), text=text) for number, text in enumerate(texts))


def started(batch: OpenAIBatch, texts: list[str] = TEXTS) -> str:
    return batch.create(batch.upload(items(texts), key=KEY), key=KEY)


def outcomes(batch: OpenAIBatch, job: str) -> dict[str, BatchOutcome]:
    return {outcome.id: outcome for outcome in batch.results(job)}


def parts_of(asked: Any) -> dict[str, Message]:
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    form = message_from_bytes(head + asked.body)
    found = {}
    for part in form.get_payload():
        assert isinstance(part, Message)
        found[str(part.get_param("name", header="content-disposition"))] = part
    return found


# Which servers have one


@pytest.mark.parametrize(
    ("options", "offered"),
    [
        ({}, True),
        ({"base_url": "https://eu.api.openai.com/v1"}, True),
        ({"base_url": "https://api.example.com/v1"}, False),
        ({"base_url": "https://api.example.com/v1", "batch": True}, True),
        ({"batch": False}, False),
    ],
)
def test_who_has_a_batch_api(options: dict[str, Any], offered: bool) -> None:
    embedder = create("text-embedding-3-small", OpenAIOptions(**options))
    assert embedder.batch is not None, "one may have been submitted before"
    assert embedder.batch.limits.offered == offered
    assert embedder.batch is embedder.batch


@pytest.mark.parametrize(
    ("options", "account"),
    [
        ({}, ""),
        ({"organization": "org-1"}, "org-1/"),
        ({"project": "proj-1"}, "/proj-1"),
        ({"organization": "org-1", "project": "proj-1", "api_key": "sk-other"}, "org-1/proj-1"),
    ],
)
def test_the_account_is_who_pays_and_no_key(options: dict[str, Any], account: str) -> None:
    assert create("m", OpenAIOptions(**options)).info.account == account


def test_limits_are_the_apis_and_the_accounts(batch_of: BatchOf) -> None:
    limits = batch_of(max_enqueued_tokens=90_000).limits
    assert (limits.max_items, limits.max_bytes) == (50_000, 200_000_000)
    assert (limits.max_enqueued_tokens, limits.window) == (90_000, 86_400)


# The whole way


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize(
    "quirks",
    [
        Quirks(),
        Quirks(string_body=True),
        Quirks(bom=True, line_end="\r\n", final_newline=False, blank_lines=True),
        Quirks(order="reversed", ignores_base64=True),
    ],
)
@pytest.mark.fault(69)
def test_texts_go_up_and_vectors_come_down(encoding: str, quirks: Quirks) -> None:
    with FakeOpenAI(batch=BatchSettings(quirks=quirks)) as server:
        options = OpenAIOptions(
            base_url=server.base_url, api_key=server.api_key, batch=True, batch_encoding=encoding
        )
        embedder = create("text-embedding-3-small", options)
        batch = embedder.batch
        assert batch is not None
        ref = batch.upload(items(), key=KEY)
        job = batch.create(ref, key=KEY)
        assert [one.id for one in batch.find(key=KEY, input_ref="other", since=NOW)] == [job]
        assert [one.id for one in batch.find(key="other", input_ref=ref, since=NOW)] == [job]
        assert batch.find(key="other", input_ref="other", since=NOW) == []
        with pytest.raises(TransientProviderError, match="not ended"):
            list(batch.results(job))
        while (status := batch.poll(job)).state == "running":
            pass
        assert (status.state, status.completed, status.total) == ("completed", 12, 12)
        found = {outcome.id: outcome for outcome in batch.results(job)}
        assert found.keys() == {str(number) for number in range(len(TEXTS))}
        vectors = np.array([found[str(number)].vector for number in range(len(TEXTS))])
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors, vectors_of(TEXTS, 1536))
        assert sum(outcome.tokens or 0 for outcome in found.values()) == status.tokens
        assert status.tokens == server.batches.meter.billed_tokens
        assert {outcome.model for outcome in found.values()} == {"text-embedding-3-small"}
        batch.cancel(job)
        batch.discard(ref)
        batch.discard(ref)
        embedder.close()


def test_what_is_sent_is_what_the_api_describes(
    api: Api, batch_of: BatchOf, conforms: Callable[[str, object], None], canary: str
) -> None:
    api.routes["POST /v1/files"] = {"id": "file-1"}
    api.routes["POST /v1/batches"] = {"id": "batch_1"}
    batch = batch_of(organization="org-1", project="proj-1", dimensions=64)
    assert started(batch) == "batch_1"
    upload, creation = api.asked
    parts = parts_of(upload)
    assert parts["purpose"].get_payload() == "batch"
    assert parts["file"].get_filename() == f"embedcore-{KEY}.jsonl"
    content = parts["file"].get_payload(decode=True)
    assert isinstance(content, bytes)
    conforms("CreateFileRequest", {"purpose": "batch", "file": content.decode()})
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["custom_id"] for line in lines] == [str(number) for number in range(12)]
    assert [line["body"]["input"] for line in lines] == TEXTS
    assert all(line["url"] == "/v1/embeddings" and line["method"] == "POST" for line in lines)
    for line in lines:
        conforms("CreateEmbeddingRequest", line["body"])
    assert batch.sizes(list(items())) == [len(line) for line in content.splitlines(keepends=True)]
    conforms("CreateBatchRequest", creation.json())
    assert creation.json() == {
        "input_file_id": "file-1",
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
        "metadata": {"embedcore": KEY},
        "output_expires_after": {"anchor": "created_at", "seconds": 2_592_000},
    }
    conforms("Metadata", creation.json()["metadata"])
    for asked in api.asked:
        assert asked.headers["authorization"] == f"Bearer {canary}"
        assert asked.headers["openai-organization"] == "org-1"
        assert asked.headers["openai-project"] == "proj-1"


def test_what_asks_has_no_body(api: Api, batch_of: BatchOf) -> None:
    """A server that does not expect one takes it for the next request."""
    api.routes["GET /v1/batches/batch_1"] = {"id": "batch_1", "status": "in_progress"}
    batch_of().poll("batch_1")
    (asked,) = api.asked
    assert not {"content-length", "transfer-encoding"} & set(asked.headers)
    assert asked.headers["accept-encoding"] == "identity"


def test_the_expiry_of_results_can_be_left_to_the_server(api: Api, batch_of: BatchOf) -> None:
    api.routes["POST /v1/batches"] = {"id": "batch_1"}
    batch_of(batch_output_expiry=False).create("file-1", key=KEY)
    assert "output_expires_after" not in api.asked[-1].json()


@pytest.mark.parametrize("key", ["a b", "x" * 600, "../k", "schlüssel"])
def test_any_key_becomes_a_mark_that_is_found_again(
    api: Api, batch_of: BatchOf, key: str, conforms: Callable[[str, object], None]
) -> None:
    api.routes["POST /v1/files"] = {"id": "file-1"}
    api.routes["POST /v1/batches"] = {"id": "batch_1"}
    batch = batch_of()
    batch.create(batch.upload(items(), key=key), key=key)
    metadata = api.asked[-1].json()["metadata"]
    conforms("Metadata", metadata)
    name = str(parts_of(api.asked[0])["file"].get_filename())
    assert name == f"embedcore-{metadata['embedcore']}.jsonl"
    assert "/" not in name
    api.routes["GET /v1/batches"] = {"data": [{"id": "batch_1", "metadata": metadata}]}
    assert [job.id for job in batch.find(key=key, input_ref="-", since=NOW)] == ["batch_1"]


# Uploading


@pytest.mark.fault(73)
def test_the_size_of_a_file_is_checked_to_the_byte(
    api: Api, batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.routes["POST /v1/files"] = {"id": "file-1"}
    batch = batch_of()
    total = sum(batch.sizes(list(items())))
    monkeypatch.setattr(type(batch), "max_bytes", total)
    assert batch.upload(items(), key=KEY) == "file-1"
    monkeypatch.setattr(type(batch), "max_bytes", total - 1)
    monkeypatch.setattr(type(batch), "max_items", 12)
    with pytest.raises(RequestTooLarge) as caught:
        batch.upload(items(), key=KEY)
    assert caught.value.billed == "no"
    monkeypatch.setattr(type(batch), "max_bytes", total)
    monkeypatch.setattr(type(batch), "max_items", 11)
    with pytest.raises(RequestTooLarge):
        batch.upload(items(), key=KEY)
    assert len(api.asked) == 1


def test_an_error_of_the_items_ends_the_upload_unsent(api: Api, batch_of: BatchOf) -> None:
    def broken() -> Iterator[BatchItem]:
        yield BatchItem(id="0", text="a")
        raise LookupError("gone")

    with pytest.raises(LookupError):
        batch_of().upload(broken(), key=KEY)
    with pytest.raises(InputRejected):
        batch_of().upload([BatchItem(id="0", text="\ud800")], key=KEY)
    with pytest.raises(RequestRejected):
        batch_of().upload([], key=KEY)
    assert api.asked == []


def test_a_large_file_is_streamed(api: Api, batch_of: BatchOf) -> None:
    class Sink:
        size = 0

    def swallow(asked: Any) -> dict[str, str]:
        Sink.size = int(asked.headers["content-length"])
        return {"id": "file-1"}

    api.routes["POST /v1/files"] = {"id": "file-0"}
    batch = batch_of()
    batch.upload(items(), key=KEY)
    api.routes["POST /v1/files"] = swallow
    many = (BatchItem(id=str(number), text="x" * 10_000) for number in range(4_000))
    tracemalloc.start()
    batch.upload(many, key=KEY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The server runs in this process and reads the body whole, once; the client adds nothing to it.
    assert Sink.size > 40_000_000
    assert peak < Sink.size * 1.2, f"{peak:,} bytes for {Sink.size:,}"


def test_a_full_disk_is_named(api: Api, batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    batch = batch_of()
    monkeypatch.setattr(Spool, "write", full)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        batch.upload(items(), key=KEY)
    assert api.asked == []


# Creating: sent once, and what is certain about it


@pytest.mark.fault(57)
@pytest.mark.parametrize(
    ("reply", "kind", "billed"),
    [
        ((400, REFUSED), RequestRejected, "no"),
        ((401, REFUSED), AuthenticationFailed, "no"),
        ((404, REFUSED), InputNotReady, "no"),
        ((429, REFUSED), RateLimited, "no"),
        ((400, b"<html>"), RequestRejected, "unknown"),
        ((402, b"<html>"), QuotaExhausted, "unknown"),
        ((400, {"statusCode": 400, "reason": "no"}), RequestRejected, "unknown"),
        ((429, {"usage": {"total_tokens": 3}}), RateLimited, "unknown"),
        ((408, REFUSED), OutcomeUnknown, "unknown"),
        ((409, REFUSED), OutcomeUnknown, "unknown"),
        ((500, REFUSED), ProviderUnavailable, "unknown"),
        ((502, b""), OutcomeUnknown, "unknown"),
        ((503, REFUSED), ProviderUnavailable, "unknown"),
        ((504, REFUSED), OutcomeUnknown, "unknown"),
        ((303, b""), ConfigurationError, "unknown"),
        ((200, b"not json"), InvalidResponse, "unknown"),
        ((200, b"[]"), InvalidResponse, "unknown"),
        ((200, {"id": "../../x"}), InvalidResponse, "unknown"),
        ((200, {}), InvalidResponse, "unknown"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{", OutcomeUnknown, "unknown"),
        (b"HTTP/1.1 ", OutcomeUnknown, "unknown"),
    ],
)
def test_no_job_is_only_what_the_api_itself_refused(
    api: Api, batch_of: BatchOf, reply: Any, kind: type[EmbeddingError], billed: str
) -> None:
    api.routes["POST /v1/batches"] = reply
    api.routes["GET /v1/batches"] = {"data": [], "has_more": False}
    with pytest.raises(kind) as caught:
        batch_of().create("file-1", key=KEY)
    assert type(caught.value) is kind
    assert caught.value.billed == billed
    assert not getattr(caught.value, "free_by_status", False)
    assert [one.method for one in api.asked].count("POST") == 1, "a create is never sent twice"


GATEWAYS = [
    ((401, b"<html>Sign in</html>"), AuthenticationFailed, True),
    ((403, b""), PermissionDenied, True),
    ((404, b"<html>"), InputNotReady, True),
    ((405, b""), RequestRejected, True),
    ((413, b"<html>"), RequestTooLarge, True),
    ((429, b""), RateLimited, True),
    ((429, b"<html><title>429 Too Many Requests</title></html>"), RateLimited, True),
    ((429, {"statusCode": 429, "reason": "slower"}), RateLimited, False),
    ((431, b"<html>"), RequestRejected, True),
    ((451, b"<html>"), RequestRejected, True),
]


@pytest.mark.case("C1")
@pytest.mark.parametrize(("reply", "kind", "by_status"), GATEWAYS)
@pytest.mark.parametrize("billed", ["no", "unknown"])
def test_what_a_gateway_refuses_started_no_job_by_its_status(
    api: Api,
    batch_of: BatchOf,
    reply: Any,
    kind: type[EmbeddingError],
    by_status: bool,
    billed: str,
) -> None:
    api.routes["POST /v1/batches"] = reply
    api.routes["GET /v1/batches"] = {"data": [], "has_more": False}
    with pytest.raises(EmbeddingError) as caught:
        batch_of(refusals_billed=billed).create("file-1", key=KEY)
    error = caught.value
    assert error.billed == billed
    if billed == "no":
        assert type(error) is kind
    assert getattr(error, "free_by_status", False) == (by_status and billed == "no")


def saying(message: str = "", **more: object) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **more}}


NOT_IN_STATE = saying("the input is not in processed state")


@pytest.mark.case("E4")
@pytest.mark.parametrize(
    ("reply", "file"),
    [
        ((404, saying("no such file")), {"id": "file-1", "status": "processed"}),
        ((404, {"detail": "Input file not found"}), {"id": "file-1"}),
        ((404, saying("no such file")), (404, saying("no such file"))),
        ((404, saying("no such file")), (500, saying("not now"))),
        ((400, NOT_IN_STATE), {"id": "file-1", "status": "pending"}),
        ((400, NOT_IN_STATE), {"id": "file-1", "status": "Running"}),
        ((400, saying("the file is not processed")), {"id": "file-1", "status": "processed"}),
        ((400, saying("not yet", param="input_file_id")), {"id": "file-1", "status": "uploaded"}),
        ((422, saying("not yet", code="file_not_ready")), (404, saying("no such file"))),
        ((425, {"detail": "too early for this file"}), {"id": "file-1", "status": "validating"}),
        ((425, {"detail": "too early"}), {"id": "file-1", "status": "processed"}),
        ((423, saying("locked")), {"id": "file-1", "status": "processed"}),
        ((412, saying("the document is pending")), {"id": "file-1", "status": "processed"}),
        ((400, saying("the upload is still at work")), {"id": "file-1", "status": "processed"}),
        ((400, NOT_IN_STATE), {"id": "file-1", "status": "processed"}),
        ((400, saying("文件尚未就绪")), {"id": "file-1", "status": "uploaded"}),
        ((400, REFUSED), {"id": "file-1"}),
        ((403, saying("no access to it yet")), {"id": "file-1", "status": "pending"}),
    ],
)
def test_a_refusal_because_of_a_new_file_is_worth_another_try(
    api: Api, batch_of: BatchOf, reply: Any, file: Any
) -> None:
    api.routes["POST /v1/batches"] = reply
    api.routes["GET /v1/batches"] = {"data": [], "has_more": False}
    api.routes["GET /v1/files/file-1"] = file
    with pytest.raises(InputNotReady) as caught:
        batch_of().create("file-1", key=KEY)
    assert (caught.value.billed, caught.value.status) == ("no", reply[0])
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert [one.method for one in api.asked].count("POST") == 1


@pytest.mark.case("E4")
@pytest.mark.parametrize(
    ("reply", "file"),
    [
        ((400, REFUSED), {"id": "file-1", "status": "processed"}),
        ((400, saying("no such endpoint")), {"id": "file-1", "status": "uploaded"}),
        ((422, saying("completion_window: 24h is too much")), {"id": "file-1"}),
        ((400, saying("not processed: output_expires_after")), {"id": "file-1"}),
        ((400, NOT_IN_STATE), {"id": "file-1", "status": "error"}),
        ((422, saying("the file is broken")), {"id": "file-1", "status": "Failed"}),
    ],
)
def test_a_refusal_for_another_reason_is_told_at_once(
    api: Api, batch_of: BatchOf, reply: Any, file: Any
) -> None:
    api.routes["POST /v1/batches"] = reply
    api.routes["GET /v1/files/file-1"] = file
    with pytest.raises(RequestRejected) as caught:
        batch_of().create("file-1", key=KEY)
    assert caught.value.billed == "no"


@pytest.mark.case("E4")
def test_where_there_is_no_batch_api_nothing_is_waited_for(api: Api, batch_of: BatchOf) -> None:
    api.routes["GET /v1/files/file-1"] = {"id": "file-1", "status": "processed"}
    with pytest.raises(RequestRejected, match="has no batch API"):
        batch_of().create("file-1", key=KEY)


def test_a_refused_connection_is_proof_that_there_is_no_job() -> None:
    options = OpenAIOptions(base_url="http://127.0.0.1:9/v1", api_key="sk-x", batch=True)
    batch = create("m", options).batch
    assert batch is not None
    with pytest.raises(ProviderUnavailable) as caught:
        batch.create("file-1", key=KEY)
    assert caught.value.billed == "no"


@pytest.mark.fault(61)
def test_a_create_without_an_answer_may_have_made_a_job(
    api: Api, batch_of: BatchOf, too_late: Any
) -> None:
    answered = threading.Event()
    api.routes["POST /v1/batches"] = lambda _: (answered.wait(120), {"id": "batch_1"})[1]

    def attempt(seconds: float) -> EmbeddingError:
        with pytest.raises(EmbeddingError) as caught:
            batch_of(timeout=seconds).create("file-1", key=KEY)
        return caught.value

    error = too_late(attempt)
    answered.set()
    assert isinstance(error, OutcomeUnknown)
    assert error.billed == "unknown"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 429, 500, 502, 503])
def test_everything_but_creating_is_free(api: Api, batch_of: BatchOf, status: int) -> None:
    for route in ("POST /v1/files", "GET /v1/batches", "GET /v1/batches/batch_1", "GET /v1/files"):
        api.routes[route] = (status, REFUSED)
    batch = batch_of()
    for call in (
        lambda: batch.upload(items(), key=KEY),
        lambda: batch.find(key=KEY, input_ref="file-1", since=NOW),
        lambda: batch.poll("batch_1"),
        lambda: list(batch.orphans(before=NOW)),
    ):
        with pytest.raises(EmbeddingError) as caught:
            call()
        assert caught.value.billed == "no"


# Finding


def listed(*jobs: dict[str, Any], size: int = 100) -> Callable[[Any], dict[str, Any]]:
    """Serves these entries in pages, as the API does."""

    def page(asked: Any) -> dict[str, Any]:
        assert asked.query["limit"] == "100"
        ids = [job["id"] for job in jobs]
        begin = ids.index(asked.query["after"]) + 1 if "after" in asked.query else 0
        entries = jobs[begin : begin + size]
        return {"object": "list", "data": entries, "has_more": begin + size < len(jobs)}

    return page


def job(number: int, *, age: float | None = 0, **more: object) -> dict[str, Any]:
    """A job of somebody else's, so many hours old."""
    created = None if age is None else int((NOW - timedelta(hours=age)).timestamp())
    return {"id": f"batch_{number}", "status": "in_progress", "created_at": created, **more}


@pytest.mark.fault(78)
def test_a_job_is_found_on_any_page(api: Api, batch_of: BatchOf) -> None:
    mine = {"metadata": {"embedcore": KEY}}
    others = [job(number, age=number / 100) for number in range(250)]
    entries = [*others, job(900, age=3, **mine), job(901, age=3.5, input_file_id="file-1")]
    api.routes["GET /v1/batches"] = listed(*entries)
    found = batch_of().find(key=KEY, input_ref="file-1", since=NOW - timedelta(hours=4))
    assert [one.id for one in found] == ["batch_901", "batch_900"]
    assert found[0].created_at is not None
    assert found[0].state == "running"


@pytest.mark.fault(78)
def test_older_pages_are_not_read(api: Api, batch_of: BatchOf) -> None:
    entries = [job(number, age=number / 10) for number in range(1000)]
    api.routes["GET /v1/batches"] = listed(*entries)
    assert batch_of().find(key=KEY, input_ref="file-1", since=NOW - timedelta(hours=5)) == []
    assert len(api.asked) == 2


@pytest.mark.fault(77)
def test_clocks_may_differ_by_an_hour(api: Api, batch_of: BatchOf) -> None:
    mine = job(3, age=0.9, metadata={"embedcore": KEY})
    entries = [job(1, age=0), job(2, age=0.5), mine, *(job(9 + n, age=5) for n in range(9))]
    api.routes["GET /v1/batches"] = listed(*entries, size=2)
    found = batch_of().find(key=KEY, input_ref="file-1", since=NOW)
    assert [one.id for one in found] == ["batch_3"]
    assert len(api.asked) == 3


@pytest.mark.fault(77)
def test_where_a_time_is_missing_everything_is_read(api: Api, batch_of: BatchOf) -> None:
    mine = {"metadata": {"embedcore": KEY}}
    old = [job(10 + n, age=5 + n) for n in range(9)]
    entries = [job(1, age=None), *old, job(3, age=0.9, **mine), job(4, age=None, **mine)]
    api.routes["GET /v1/batches"] = listed(*entries, size=2)
    found = batch_of().find(key=KEY, input_ref="file-1", since=NOW)
    assert [one.id for one in found] == ["batch_3", "batch_4"]


@pytest.mark.fault(78)
@pytest.mark.parametrize(
    "reply",
    [
        {"data": [{"id": "batch_1"}], "has_more": True},
        {"data": [], "has_more": True},
        {"data": [{"id": "../x"}], "has_more": False},
        {"data": [{}], "has_more": False},
        {"data": None},
        {"error": "odd"},
        b"<html>",
    ],
)
def test_a_list_that_cannot_be_read_is_not_none(api: Api, batch_of: BatchOf, reply: Any) -> None:
    api.routes["GET /v1/batches"] = reply
    with pytest.raises(InvalidResponse):
        batch_of().find(key=KEY, input_ref="file-1", since=NOW)
    assert len(api.asked) < 4


OTHERS = [
    {"id": "batch_2", "metadata": {"embedcore": "other"}, "status": 3},
    {"id": None, "input_file_id": "file-2"},
    {"metadata": {"by": "somebody else"}},
    {"id": "batch_3", "input_file_id": "file-3", "metadata": ["?"], "created_at": "now"},
]
NOBODYS = [None, 3, "batch_4", [], {}, {"id": "batch_5", "metadata": "?"}]


@pytest.mark.fault(78)
@pytest.mark.parametrize("odd", [*OTHERS, *NOBODYS])
def test_an_odd_entry_of_the_list_hides_no_job(api: Api, batch_of: BatchOf, odd: Any) -> None:
    mine = job(1, metadata={"embedcore": KEY})
    for entries in ([odd, mine], [mine, odd], [job(7), odd, odd, mine, odd]):
        api.routes["GET /v1/batches"] = {"data": entries, "has_more": False}
        (found,) = batch_of().find(key=KEY, input_ref="file-1", since=NOW)
        assert found.id == "batch_1"


@pytest.mark.fault(78)
def test_odd_entries_prove_no_absence_where_they_may_be_ours(api: Api, batch_of: BatchOf) -> None:
    def found(*entries: Any) -> Any:
        api.routes["GET /v1/batches"] = {"data": entries, "has_more": False}
        return batch_of().find(key=KEY, input_ref="file-1", since=NOW)

    assert found(job(7), *OTHERS) == []
    mine = [{"input_file_id": "file-1"}, {"id": "..", "metadata": {"embedcore": KEY}}]
    for odd in [*NOBODYS, *mine]:
        with pytest.raises(InvalidResponse, match="nothing follows from it"):
            found(job(7), odd)
        # So old that it is not the one: by its place, or by what it says.
        assert found(job(7), job(8, age=30), odd) == []
        if isinstance(odd, dict):
            assert found({**odd, "created_at": job(9, age=30)["created_at"]}, job(7)) == []


@pytest.mark.fault(78)
def test_a_page_that_is_refused_takes_nothing_from_those_before(
    api: Api, batch_of: BatchOf
) -> None:
    def page(asked: Any) -> Any:
        if "after" in asked.query:
            return (400, saying("no such cursor"))
        return {"data": [*entries, {"id": "batch_x"}], "has_more": False}

    api.routes["GET /v1/batches"] = page
    entries = [job(1, metadata={"embedcore": KEY})]
    (found,) = batch_of().find(key=KEY, input_ref="file-1", since=NOW)
    assert found.id == "batch_1"
    entries = [job(1)]
    with pytest.raises(RequestRejected):
        batch_of().find(key=KEY, input_ref="file-1", since=NOW)


@pytest.mark.parametrize("odd", [None, 3, {}, {"id": "../x", "filename": f"embedcore-{KEY}.jsonl"}])
def test_an_odd_entry_of_the_list_of_files_hides_none(
    api: Api, batch_of: BatchOf, odd: Any
) -> None:
    mine = {"id": "file-1", "filename": f"embedcore-{KEY}.jsonl", "created_at": 5}
    api.routes["GET /v1/files"] = {"data": [odd, mine, odd], "has_more": False}

    def left(*jobs: Any) -> list[str]:
        api.routes["GET /v1/batches"] = {"data": jobs, "has_more": False}
        return list(batch_of().orphans(before=NOW))

    assert left() == left(*OTHERS) == ["file-1"]
    assert left({"id": "batch_1", "metadata": {"embedcore": KEY}}) == []
    for unclear in NOBODYS:
        with pytest.raises(InvalidResponse, match="none is deleted"):
            left(job(1), unclear)


@pytest.mark.fault(78)
@pytest.mark.parametrize(
    ("listing", "complete"),
    [
        (Listing(has_more=False), True),
        # It is among those that were shown, and more of them would change nothing.
        (Listing(has_more=True), True),
        (Listing(repeats=True), False),
    ],
)
def test_lists_that_lie_over_a_full_account(listing: Listing, complete: bool) -> None:
    progress = Progress()
    with FakeOpenAI(batch=BatchSettings(progress=progress, listing=listing)) as server:
        options = OpenAIOptions(base_url=server.base_url, api_key=server.api_key, batch=True)
        batch = create("text-embedding-3-small", options).batch
        assert batch is not None
        mine = started(batch)  # type: ignore[arg-type]
        line = json.dumps({"custom_id": "0", "method": "POST", "url": "/v1/embeddings", "body": {}})
        for _ in range(150):
            server.batches.create(server.batches.upload(line.encode())["id"])
        if complete:
            found = batch.find(key=KEY, input_ref="-", since=NOW)
            assert [one.id for one in found] == [mine]
        else:
            with pytest.raises(InvalidResponse):
                batch.find(key=KEY, input_ref="-", since=NOW)


# Polling


@pytest.mark.fault(71)
@pytest.mark.fault(82)
def test_a_job_that_is_gone_names_itself_and_the_key(
    api: Api, batch_of: BatchOf, canary: str
) -> None:
    other = "sk-another-key-of-another-project"
    prints = []
    for key in (canary, other):
        with pytest.raises(RemoteGone, match="batch_17") as caught:
            batch_of(api_key=key).poll("batch_17")
        assert key not in str(caught.value)
        prints.append(str(caught.value).split("fingerprint ")[1][:8])
    assert len(set(prints)) == 2
    assert all(int(each, 16) >= 0 for each in prints)
    for call in (lambda one: list(one.results("batch_17")), lambda one: one.cancel("batch_17")):
        with pytest.raises(RemoteGone, match="batch_17"):
            call(batch_of())


@pytest.mark.fault(81)
def test_an_unknown_word_is_told_once_and_means_running(
    api: Api, batch_of: BatchOf, caplog: pytest.LogCaptureFixture
) -> None:
    api.routes["GET /v1/batches/batch_1"] = {"id": "batch_1", "status": "scheduling"}
    batch = batch_of()
    with caplog.at_level(logging.WARNING, "embedcore.batches"):
        assert [batch.poll("batch_1").state for _ in range(3)] == ["running"] * 3
    assert [record.message for record in caplog.records if "scheduling" in record.message] == [
        "batch batch_1 is 'scheduling', a state that is not known; it counts as running"
    ]


@pytest.mark.fault(135)
@pytest.mark.parametrize("odd", ["../../x", "", "a/b", "x" * 129, "a?b", "a\r\nb", "%2e%2e"])
def test_an_odd_id_is_not_sent(api: Api, batch_of: BatchOf, odd: str) -> None:
    batch = batch_of()
    for call in (
        lambda: batch.poll(odd),
        lambda: list(batch.results(odd)),
        lambda: batch.cancel(odd),
        lambda: batch.discard(odd),
        lambda: batch.create(odd, key=KEY),
    ):
        with pytest.raises(RequestRejected) as caught:
            call()
        assert caught.value.billed == "no"
    assert api.asked == []


def test_ids_of_other_shapes_are_taken(api: Api, batch_of: BatchOf) -> None:
    uuid = "0b8f6a9e-5d0c-4f7e-9d8b-2a1f3c4d5e6f"
    api.routes[f"GET /v1/batches/{uuid}"] = {"id": uuid, "status": "finalizing"}
    assert batch_of().poll(uuid).state == "running"


@pytest.mark.fault(62)
def test_a_refused_line_is_named_by_its_item(batch_of: BatchOf) -> None:
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as server:
        options = OpenAIOptions(base_url=server.base_url, api_key=server.api_key, batch=True)
        batch = create("text-embedding-3-small", options).batch
        assert isinstance(batch, OpenAIBatch)
        one = started(batch)
        server.batches.fail(one, code="invalid_json_line", message="not JSON", line=5)
        status = batch.poll(one)
        assert (status.state, status.errors) == ("failed", {"4": "invalid_json_line: not JSON"})
        assert list(batch.results(one)) == []
        two = started(batch)
        server.batches.fail(two)
        assert batch.poll(two).queue_full


# Results


def line(item: str, number: float) -> bytes:
    entry = {"object": "embedding", "index": 0, "embedding": [number] * 4}
    body = {"data": [entry], "model": "m", "usage": {"prompt_tokens": 2}}
    document = {"custom_id": item, "response": {"status_code": 200, "body": body}, "error": None}
    return json.dumps(document).encode() + b"\n"


LINES = b"".join(line(str(number), number / 4) for number in range(40))
ENDED = {"id": "batch_1", "status": "completed", "output_file_id": "file-o"}


@pytest.mark.fault(65)
def test_only_an_error_file(api: Api, batch_of: BatchOf) -> None:
    document = {**ENDED, "output_file_id": None, "error_file_id": "file-e"}
    api.routes["GET /v1/batches/batch_1"] = document
    told = {"code": "batch_expired", "message": "too late"}
    api.routes["GET /v1/files/file-e/content"] = json.dumps(
        {"custom_id": "3", "response": None, "error": told}
    ).encode()
    (outcome,) = batch_of().results("batch_1")
    assert (outcome.id, outcome.code, outcome.retryable) == ("3", "batch_expired", True)
    assert outcome.error == "batch_expired: too late"
    api.routes["GET /v1/files/file-e/content"] = b""
    assert list(batch_of().results("batch_1")) == []


@pytest.mark.fault(70)
@pytest.mark.parametrize("gone", ["file-o", "file-e"])
def test_one_vanished_file_does_not_hide_the_other(api: Api, batch_of: BatchOf, gone: str) -> None:
    api.routes["GET /v1/batches/batch_1"] = {**ENDED, "error_file_id": "file-e"}
    (kept,) = {"file-o", "file-e"} - {gone}
    api.routes[f"GET /v1/files/{kept}/content"] = line("7", 1.0)
    seen = []
    with pytest.raises(RemoteGone, match="batch_1"):
        for outcome in batch_of().results("batch_1"):
            seen += [outcome.id]
    assert seen == ["7"]


@pytest.mark.fault(79)
@pytest.mark.parametrize("kept", [0, 1, 50, len(LINES) // 2, len(LINES) - 1])
@pytest.mark.parametrize("framing", ["length", "chunked", "gzip", "none"])
def test_a_download_that_breaks_off_is_noticed_and_can_be_read_again(
    api: Api, batch_of: BatchOf, kept: int, framing: str
) -> None:
    whole, head = LINES, b""
    if framing == "length":
        head = b"content-length: %d\r\n\r\n" % len(LINES)
    elif framing == "chunked":
        head = b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(LINES)
    elif framing == "gzip":
        whole = gzip.compress(LINES)
        kept = kept * len(whole) // len(LINES)
        head = b"content-encoding: gzip\r\nconnection: close\r\n\r\n"
    else:
        head = b"connection: close\r\n\r\n"
    api.routes["GET /v1/batches/batch_1"] = ENDED
    api.routes["GET /v1/files/file-o"] = {"id": "file-o", "bytes": len(LINES)}
    api.routes["GET /v1/files/file-o/content"] = b"HTTP/1.1 200 OK\r\n" + head + whole[:kept]
    batch = batch_of()
    seen = []
    with pytest.raises(TransientProviderError) as caught:
        for outcome in batch.results("batch_1"):
            seen += [outcome]
    assert caught.value.billed == "no"
    assert [outcome.id for outcome in seen] == [str(number) for number in range(len(seen))]
    assert all(outcome.vector is not None for outcome in seen)
    api.routes["GET /v1/files/file-o/content"] = LINES
    assert len(outcomes(batch, "batch_1")) == 40


@pytest.mark.fault(79)
def test_a_cut_at_the_end_of_a_line_is_noticed_without_a_length(
    api: Api, batch_of: BatchOf
) -> None:
    api.routes["GET /v1/batches/batch_1"] = ENDED
    half = LINES[: LINES.index(b"\n", 900) + 1]
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    api.routes["GET /v1/files/file-o/content"] = head + half
    api.routes["GET /v1/files/file-o"] = {"id": "file-o", "bytes": len(LINES)}
    with pytest.raises(TransientProviderError, match="broke off"):
        list(batch_of().results("batch_1"))
    api.routes["GET /v1/files/file-o/content"] = head + LINES
    assert len(outcomes(batch_of(), "batch_1")) == 40
    # A server that does not know its files' sizes is believed.
    del api.routes["GET /v1/files/file-o"]
    assert len(outcomes(batch_of(), "batch_1")) == 40


class Downloads:
    """A server that says that a job has ended, and then sends its file as ``parts`` have it.

    ``over`` ends it.
    """

    def __init__(self, parts: Callable[[], Iterator[bytes]], pause: float) -> None:
        self._parts, self._pause = parts, pause
        self.over = threading.Event()

    def __call__(self, connection: Any) -> None:
        document = json.dumps(ENDED).encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(document))
        connection.sendall(document)
        try:
            if not connection.recv(10_000):
                return
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 999999\r\n\r\n")
            for part in self._parts():
                connection.sendall(part)
                if self.over.wait(self._pause):
                    return
        except OSError:
            return  # the client went


def _stands_still() -> Iterator[bytes]:
    yield LINES[:2000]
    while True:
        yield b""


def _drips() -> Iterator[bytes]:
    while True:
        yield LINES[:1]


@pytest.mark.fault(79)
@pytest.mark.parametrize(
    ("parts", "bound"), [(_stands_still, "timeout"), (_drips, "transfer_timeout")]
)
def test_a_download_that_never_ends_is_left(listen: Any, parts: Any, bound: str) -> None:
    """By its time-out: the server would go on for ever."""
    downloads = Downloads(parts, pause=0.02)
    url = listen(downloads)
    errors = []
    # A machine that stands still before the download begins is given longer.
    for seconds in (0.3, 2.0, 10.0, 50.0):
        options = {"base_url": url, "api_key": "sk-x", "batch": True, bound: seconds}
        batch = create("m", OpenAIOptions(**options)).batch
        assert batch is not None
        with pytest.raises(TransientProviderError) as caught:
            list(batch.results("batch_1"))
        errors.append(str(caught.value))
        if "broke off" in errors[-1]:
            break
    downloads.over.set()
    assert "broke off" in errors[-1], errors


def test_reading_results_takes_no_memory_and_can_be_left_early(api: Api, batch_of: BatchOf) -> None:
    api.routes["GET /v1/batches/batch_1"] = ENDED
    body = b"".join(line(str(number), 0.5) for number in range(15_000))
    api.routes["GET /v1/files/file-o/content"] = body
    batch = batch_of()
    assert next(batch.results("batch_1")).id == "0"
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    count = sum(outcome.vector is not None for outcome in batch.results("batch_1"))
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert count == 15_000
    assert peak < 1_000_000 < len(body) // 3, f"{peak:,} bytes for {len(body):,}"


@pytest.mark.fault(66)
def test_error_lines_over_the_whole_way() -> None:
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as server:
        options = OpenAIOptions(base_url=server.base_url, api_key=server.api_key, batch=True)
        batch = create("text-embedding-3-small", options).batch
        assert isinstance(batch, OpenAIBatch)
        server.batches.fail_lines("number 3", status=400)
        server.batches.fail_lines("number 5", status=500)
        one = started(batch)
        server.batches.expire(one, done=8)
        status = batch.poll(one)
        assert status.state == "expired"
        found = outcomes(batch, one)
        assert {item for item, outcome in found.items() if outcome.vector is None} >= {"3", "5"}
        assert not found["3"].retryable
        assert found["5"].retryable
        late = [outcome for outcome in found.values() if outcome.code == "batch_expired"]
        assert len(late) == 4
        assert all(outcome.retryable and outcome.billed == "no" for outcome in late)


# Cancelling, discarding, orphans


@pytest.mark.parametrize("status", [400, 409])
@pytest.mark.parametrize(
    ("word", "fine"),
    [("completed", True), ("cancelled", True), ("cancelling", True), ("in_progress", False)],
)
def test_cancelling_what_has_ended_is_fine(
    api: Api, batch_of: BatchOf, status: int, word: str, fine: bool
) -> None:
    api.routes["POST /v1/batches/batch_1/cancel"] = (status, REFUSED)
    api.routes["GET /v1/batches/batch_1"] = {"id": "batch_1", "status": word}
    if fine:
        batch_of().cancel("batch_1")
    else:
        with pytest.raises(EmbeddingError):
            batch_of().cancel("batch_1")


def test_only_what_is_gone_counts_as_discarded(api: Api, batch_of: BatchOf) -> None:
    batch = batch_of()
    batch.discard("file-1")
    api.routes["DELETE /v1/files/file-1"] = {"id": "file-1", "deleted": True}
    batch.discard("file-1")
    for reply in ({"id": "file-1", "deleted": False}, b"<html>", (500, REFUSED), (403, REFUSED)):
        api.routes["DELETE /v1/files/file-1"] = reply
        with pytest.raises(EmbeddingError):
            batch.discard("file-1")


def stored(
    number: int, *, age: float | None = 9, name: str = "embedcore-k.jsonl"
) -> dict[str, Any]:
    created = None if age is None else int((NOW - timedelta(hours=age)).timestamp())
    return {"id": f"file-{number}", "filename": name, "purpose": "batch", "created_at": created}


@pytest.mark.fault(56)
def test_orphans_are_ours_old_and_unused(api: Api, batch_of: BatchOf) -> None:
    files = [
        stored(1),
        stored(2, name="corpus.jsonl"),
        stored(3, age=0),
        stored(4, age=None),
        stored(5),
        {**stored(6), "purpose": "user_data"},
        *(stored(100 + number, name="x.jsonl") for number in range(120)),
        stored(7),
    ]
    api.routes["GET /v1/files"] = listed(*files)
    used = {**job(1, age=99), "status": "completed", "input_file_id": "file-5"}
    api.routes["GET /v1/batches"] = listed(*(job(number + 2) for number in range(130)), used)
    batch = batch_of()
    assert list(batch.orphans(before=NOW - timedelta(hours=1))) == ["file-1", "file-7"]
    api.routes["GET /v1/batches"] = {"data": [{"id": "batch_1"}], "has_more": True}
    with pytest.raises(InvalidResponse):
        list(batch.orphans(before=NOW - timedelta(hours=1)))
