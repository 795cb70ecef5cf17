"""The key is in the request and nowhere else."""

from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import pytest
from embedcore_openai.batch import OpenAIBatch
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create

from embedcore.errors import AuthenticationFailed, EmbeddingError
from embedcore.provider.types import BatchItem, EmbedRequest
from embedcore.testing import FakeOpenAI

MODEL = "text-embedding-3-small"
TEXT = "a sentence that nobody but the server may read"
LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")

FAULTS = [
    "echo_key",
    "html",
    "redirect",
    "reset",
    "truncated",
    "rate_limited",
    "quota_exhausted",
    "context_length",
    "bad_text",
    "status",
    "endless",
    "cut_json",
    "duplicate_keys",
    "hang",
]


@pytest.fixture
def everything_logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log of a program that wants every line of every library."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", logging.DEBUG)
    for name in LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
        logging.getLogger(name).manager._clear_cache()  # type: ignore[attr-defined]
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)


def frames_of(error: BaseException | None) -> Iterator[TracebackType]:
    seen: set[int] = set()
    pending = [error]
    while pending:
        link = pending.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        pending += [link.__cause__, link.__context__]
        trace = link.__traceback__
        while trace is not None:
            yield trace
            trace = trace.tb_next


def everything_in(error: BaseException) -> str:
    """Message, attributes, chain, and every local variable that a debugger would show."""
    own = [
        repr(value)
        for trace in frames_of(error)
        if "embedcore" in trace.tb_frame.f_code.co_filename
        and "/tests/" not in trace.tb_frame.f_code.co_filename
        for value in trace.tb_frame.f_locals.values()
    ]
    said = [str(error), repr(error), repr(vars(error)), "".join(traceback.format_exception(error))]
    return "\n".join([*own, *said])


@pytest.mark.fault(131)
@pytest.mark.fault(132)
@pytest.mark.parametrize("mode", FAULTS)
def test_no_failure_shows_the_key(
    server: FakeOpenAI,
    make: Callable[..., OpenAIEmbedder],
    mode: str,
    canary: str,
    everything_logged: io.StringIO,
    capfd: pytest.CaptureFixture[str],
) -> None:
    embedder = make(headers={"X-Gateway": canary[::-1]})
    server.faults.push(mode)
    with pytest.raises(EmbeddingError) as caught:
        embedder.embed(EmbedRequest(texts=[TEXT], timeout=2))
    error = caught.value
    shown = everything_in(error) + everything_logged.getvalue() + "".join(capfd.readouterr())
    encoded = base64.b64encode(canary.encode()).decode().rstrip("=")[:-1]
    for secret in (canary, canary[::-1], encoded):
        for start in range(len(secret) - 7):
            assert secret[start : start + 8] not in shown
    assert error.__context__ is None
    assert error.__cause__ is None
    frames = [trace.tb_frame.f_code.co_name for trace in frames_of(error)]
    assert frames[-1] == "only_this_frame", "frames below it hold the key"
    assert canary.encode() not in pickle.dumps(error)


@pytest.mark.fault(131)
@pytest.mark.parametrize("key", ["sk-CANARY7d1f0e5b\n", "sk-CANARY 7d1f0e5b"])
def test_a_malformed_key_is_not_shown(make: Callable[..., OpenAIEmbedder], key: str) -> None:
    with pytest.raises(EmbeddingError) as caught:
        make(api_key=key).embed(EmbedRequest(texts=[TEXT]))
    assert "CANARY" not in everything_in(caught.value)


@pytest.mark.fault(131)
def test_an_error_of_the_callable_key_passes_without_its_frames(
    make: Callable[..., OpenAIEmbedder], canary: str
) -> None:
    def refused() -> str:
        token = canary
        raise AuthenticationFailed(f"a token of {len(token)} characters has expired")

    with pytest.raises(AuthenticationFailed, match="has expired") as caught:
        make(api_key=refused).embed(EmbedRequest(texts=[TEXT]))
    assert [trace.tb_frame.f_code.co_name for trace in frames_of(caught.value)][
        -1
    ] == "only_this_frame"


@pytest.mark.fault(131)
def test_success_is_silent(
    make: Callable[..., OpenAIEmbedder], canary: str, everything_logged: io.StringIO
) -> None:
    embedder = make()
    embedder.embed(EmbedRequest(texts=[TEXT]))
    assert TEXT not in everything_logged.getvalue()
    assert canary not in everything_logged.getvalue()
    assert "POST" not in everything_logged.getvalue()
    for shown in (repr(embedder), str(embedder), repr(vars(embedder)), repr(embedder.info)):
        assert canary not in shown


def test_a_logger_that_was_set_on_purpose_stays(
    make: Callable[..., OpenAIEmbedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    make().embed(EmbedRequest(texts=[TEXT]))
    assert all(logging.getLogger(name).level == logging.INFO for name in LOGGERS)


@pytest.mark.fault(131)
def test_an_embedder_pickles_when_the_key_is_in_the_environment(
    make: Callable[..., OpenAIEmbedder], canary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    embedder = make(dimensions=64)
    embedder.embed(EmbedRequest(texts=[TEXT]))
    pickled = pickle.dumps(embedder)
    assert canary.encode() not in pickled
    copy = pickle.loads(pickled)
    assert copy.info == embedder.info
    assert copy.embed(EmbedRequest(texts=[TEXT])).tokens
    copy.close()


@pytest.mark.case("D2")
def test_a_key_that_a_local_server_is_not_sent_is_not_sent_by_a_copy_either(
    server: FakeOpenAI, canary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    copy = pickle.loads(pickle.dumps(create(MODEL, OpenAIOptions(base_url=server.base_url))))
    with pytest.raises(AuthenticationFailed):
        copy.embed(EmbedRequest(texts=[TEXT]))
    assert not any(canary in str(request.headers) for request in server.requests)
    copy.close()


@pytest.mark.fault(131)
def test_an_embedder_does_not_pickle_when_that_would_lose_its_key(canary: str) -> None:
    for options in (
        OpenAIOptions(api_key=canary),
        OpenAIOptions(headers={"api-key": canary}),
        OpenAIOptions(api_key=lambda: canary),
    ):
        with pytest.raises(TypeError, match="OPENAI_API_KEY"):
            pickle.dumps(create(MODEL, options))


@pytest.mark.fault(52)
def test_texts_that_a_server_repeats_are_not_shown(
    server: FakeOpenAI, make: Callable[..., OpenAIEmbedder]
) -> None:
    body = '{"detail":[{"msg":"bad value: ' + TEXT + '","input":["' + TEXT + '"]}]}'
    server.faults.push("raw", status=422, body=body)
    with pytest.raises(EmbeddingError) as caught:
        make().embed(EmbedRequest(texts=[TEXT]))
    assert "bad value" in str(caught.value)
    assert TEXT[:24] not in str(caught.value)


ECHO = {"error": {"message": "not with KEY", "type": "invalid_request_error", "code": "KEY"}}
ODD_JOB = {"id": "KEY!", "status": "KEY", "output_file_id": "KEY!"}
FAILED_JOB = {
    "id": "batch_1",
    "status": "failed",
    "errors": {"data": [{"code": "KEY", "message": "KEY", "line": 1}]},
}
CALLS: dict[str, Callable[[OpenAIBatch], object]] = {
    "POST /v1/files": lambda batch: batch.upload([BatchItem(id="0", text=TEXT)], key="k"),
    "POST /v1/batches": lambda batch: batch.create("file-1", key="k"),
    "GET /v1/batches/batch_1": lambda batch: batch.poll("batch_1"),
    "GET /v1/batches": lambda batch: batch.find(key="k", input_ref="f", since=datetime.now(UTC)),
    "GET /v1/files": lambda batch: list(batch.orphans(before=datetime.now(UTC))),
    "GET /v1/files/file-o/content": lambda batch: list(batch.results("batch_1")),
    "DELETE /v1/files/file-1": lambda batch: batch.discard("file-1"),
    "POST /v1/batches/batch_1/cancel": lambda batch: batch.cancel("batch_1"),
}
ENDED = {"id": "batch_1", "status": "completed", "output_file_id": "file-o"}
CUT = b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{KEY"


@pytest.mark.fault(131)
@pytest.mark.fault(132)
@pytest.mark.parametrize("route", CALLS)
@pytest.mark.parametrize("reply", [(400, ECHO), (404, ECHO), (500, ECHO), b"KEY {", ODD_JOB, CUT])
def test_no_failure_of_a_batch_shows_the_key(
    api: Any,
    batch_of: Callable[..., OpenAIBatch],
    route: str,
    reply: Any,
    canary: str,
    everything_logged: io.StringIO,
    capfd: pytest.CaptureFixture[str],
) -> None:
    told: Any = (200, reply) if not isinstance(reply, tuple) else reply
    content = told[1] if isinstance(told[1], bytes) else json.dumps(told[1]).encode()
    api.routes["GET /v1/batches/batch_1"] = ENDED
    api.routes[route] = (told[0], content.replace(b"KEY", canary.encode()))
    error = failure_of(lambda: CALLS[route](batch_of()))
    if error is None:
        # Nothing is read of these, or it was gone, or a line of nobody came.
        assert route.startswith("DELETE") or route.endswith(("/cancel", "/content"))
        return
    shown = everything_in(error) + everything_logged.getvalue() + "".join(capfd.readouterr())
    for start in range(len(canary) - 7):
        assert canary[start : start + 8] not in shown
    assert TEXT not in str(error) + everything_logged.getvalue()
    assert error.__context__ is None
    assert error.__cause__ is None
    assert canary.encode() not in pickle.dumps(error)


def failure_of(call: Callable[[], object]) -> EmbeddingError | None:
    try:
        call()
    except EmbeddingError as error:
        return error
    return None


@pytest.mark.fault(131)
def test_no_reason_of_a_batch_shows_the_key(
    api: Any, batch_of: Callable[..., OpenAIBatch], canary: str
) -> None:
    told = json.dumps(FAILED_JOB).replace("KEY", canary).encode()
    api.routes["GET /v1/batches/batch_1"] = told
    assert canary[:12] not in repr(batch_of().poll("batch_1"))
    line = {"custom_id": "0", "response": {"status_code": 400, "body": ECHO}}
    api.routes["GET /v1/batches/batch_1"] = ENDED
    api.routes["GET /v1/files/file-o/content"] = (
        json.dumps(line).replace("KEY", canary).encode() + b"\n"
    )
    (outcome,) = batch_of().results("batch_1")
    assert "[hidden]" in repr(outcome)
    assert canary[:12] not in repr(outcome)
