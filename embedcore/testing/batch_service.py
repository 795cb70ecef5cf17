"""A strict service with batches on a real socket, for the tests of a provider's strategy.

::

    class FakeAcme(FakeBatchService):
        def reply(self, question): ...              # one request, as in ``FakeService``
        def take_job(self, asked): ...              # what a job may say; the id of its file
        def run_line(self, job, line): ...          # the row of a line, with its vector

Files, jobs and their ends are kept here, and so is what goes wrong: ``lose_answer``, ``cut``,
``short``, ``late``, ``swapped``, ``word``. It is as OpenAI's unless a method says otherwise.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email import message_from_bytes
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

import pytest

from embedcore.testing.contract import BatchContract
from embedcore.testing.openai.http import HttpReply, HttpRequest, cut_off, reset
from embedcore.testing.service import FakeService, Refused, in_json

if TYPE_CHECKING:
    from embedcore.provider.protocol import BatchStrategy

_PAGE: Final = 20


@dataclass(kw_only=True)
class StoredFile:
    """``used``: a job was made of it."""

    id: str
    name: str
    content: bytes
    created: datetime
    purpose: str = "batch"
    used: bool = False


@dataclass(kw_only=True)
class Job:
    """``asked``: the request that made it. ``state``: of OpenAI's words. ``good``, ``bad``: rows of
    its results; ``output``, ``errors``: files with them. ``polls``: how often it was asked for."""

    id: str
    file: str
    asked: Mapping[str, Any]
    created: datetime
    state: str = "in_progress"
    total: int = 0
    good: list[Any] = field(default_factory=list)
    bad: list[Any] = field(default_factory=list)
    output: str | None = None
    errors: str | None = None
    polls: int = 0
    late: int = 0

    @property
    def has_ended(self) -> bool:
        return self.state in ("completed", "failed", "expired", "cancelled")


class FakeBatchService(FakeService):
    """``ends_after``: a job ends when it was polled so often; None: with ``finish()``.

    ``lose_answer``: the next job is created, and its answer lost; ``bad_gateway``: answered by
    502. ``not_ready``: so many creates
    are refused, since their file is not there yet. ``cut``: the next content that is read breaks
    off. ``short``: it lacks its last line, and nothing breaks. ``late``: a job that has ended shows
    no file for so many polls. ``word``: what each job is said to be instead. ``swapped``: a job
    gives the results of the job before it, or after.
    """

    root: str = "/v1"
    files_path: str = "/files"
    jobs_path: str = "/batches"
    stop: str = "cancel"

    def __init__(self, *, key: str | None = None) -> None:
        super().__init__(key=key)
        self.files: dict[str, StoredFile] = {}
        self.jobs: dict[str, Job] = {}
        self.ends_after: int | None = None
        self.uploaded = 0
        self.lose_answer = False
        self.bad_gateway = False
        self.not_ready = 0
        self.cut = False
        self.short = False
        self.late = 0
        self.word: str | None = None
        self.swapped = False
        self._numbers = itertools.count(1)

    # What a service says.

    def take_job(self, asked: dict[str, Any]) -> str:
        """The id of the file that a job is to be made of; ``Refused`` for a request that may not
        be."""
        raise NotImplementedError

    def run_line(self, job: Job, line: dict[str, Any]) -> dict[str, Any]:
        """The row of one line of a job's input. What is refused becomes ``error_row``."""
        raise NotImplementedError

    def error_row(self, job: Job, line: dict[str, Any], refused: Refused) -> dict[str, Any]:
        del job
        said = {"status_code": refused.status, "body": refused.body}
        return {"custom_id": line.get("custom_id"), "response": said, "error": None}

    def job_document(self, job: Job) -> dict[str, Any]:
        raise NotImplementedError

    def file_document(self, file: StoredFile) -> dict[str, Any]:
        raise NotImplementedError

    def page(self, entries: list[Any], query: Mapping[str, str]) -> dict[str, Any]:
        """One page of a list."""
        size = min(int(query.get("limit", _PAGE)), _PAGE)
        ids = [entry["id"] for entry in entries]
        start = ids.index(query["after"]) + 1 if "after" in query else 0
        some = entries[start : start + size]
        return {"object": "list", "data": some, "has_more": start + size < len(entries)}

    def not_found(self, what: str) -> Refused:
        return Refused(404, {"detail": f"{what} not found"})

    def file_missing(self) -> Refused:
        """What a job of a file is refused with that is not there, or not yet."""
        return self.not_found("Input file")

    def without_mark(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The request for a job, as one that is not ours sends it."""
        return {**asked, "metadata": None}

    def new_id(self, kind: str) -> str:
        return f"{kind}-{next(self._numbers)}-{uuid.uuid4().hex[:8]}"

    def upload_of(self, request: HttpRequest) -> StoredFile:
        """The file in a form that a browser would send."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise self.wrong_body("an upload is multipart/form-data")
        parts = {
            str(part.get_param("name", header="content-disposition")): part
            for part in parts_of(request)
        }
        if set(parts) != {"purpose", "file"} or content_of(parts["purpose"]) != b"batch":
            raise self.wrong_body("an upload has a purpose, which is batch, and a file")
        return self.store(str(parts["file"].get_filename()), content_of(parts["file"]))

    # What happens to files and jobs.

    def store(self, name: str, content: bytes, purpose: str = "batch") -> StoredFile:
        file = StoredFile(
            id=self.new_id("file"), name=name, content=content, created=_now(), purpose=purpose
        )
        self.files[file.id] = file
        return file

    def create(self, file: str, asked: Mapping[str, Any]) -> Job:
        """A job of a file; ``asked``: with what."""
        job = Job(id=self.new_id("batch"), file=file, asked=asked, created=_now(), late=self.late)
        lines = self.lines_of(job)
        if not lines:
            raise self.wrong_body("the input has no lines")
        job.total = len(lines)
        self.jobs[job.id] = job
        return job

    def lines_of(self, job: Job) -> list[dict[str, Any]]:
        stored = self.files.get(job.file)
        if stored is None or self.not_ready:
            self.not_ready = max(self.not_ready - 1, 0)
            raise self.file_missing()
        stored.used = True
        return [json.loads(line) for line in stored.content.splitlines()]

    def finish(self, state: str = "completed", *, done: int | None = None) -> None:
        """Let all jobs that run end so; ``done``: lines that each came to, of all."""
        for job in self.jobs.values():
            if job.state == "cancelling":
                self._end(job, "cancelled", 0)
            elif not job.has_ended:
                self._end(job, state, done)

    def _end(self, job: Job, state: str, done: int | None) -> None:
        lines = self.lines_of(job)
        for line in lines[:done]:
            try:
                job.good.append(self.run_line(job, line))
            except Refused as refused:
                job.bad.append(self.error_row(job, line, refused))
        # No service promises an order.
        job.good.reverse()
        job.state = state
        self.write_results(job)

    def write_results(self, job: Job) -> None:
        """The rows of a job into files."""
        job.output = self._as_file(job, job.good, "output")
        job.errors = self._as_file(job, job.bad, "errors")

    def _as_file(self, job: Job, rows: list[Any], kind: str) -> str | None:
        if not rows:
            return None
        content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        return self.store(f"{job.id}_{kind}.jsonl", content, f"batch-{kind}").id

    def shown(self, job: Job) -> Job:
        """A job as it is told, with what goes wrong."""
        job.polls += 1
        if self.ends_after is not None and job.polls > self.ends_after and not job.has_ended:
            self._end(job, "cancelled" if job.state == "cancelling" else "completed", None)
        told = replace(job, state=self.word or job.state)
        if job.has_ended and job.late:
            job.late -= 1
            return replace(told, output=None, errors=None)
        if self.swapped and len(self.jobs) > 1:
            ids = list(self.jobs)
            other = self.jobs[ids[(ids.index(job.id) + 1) % len(ids)]]
            return replace(told, output=other.output, errors=other.errors)
        return told

    # Requests.

    def _answered(self, request: HttpRequest) -> object:
        path = request.path.removeprefix(self.root)
        for each in (self.files_path, self.jobs_path):
            if path == each or path.startswith((f"{each}/", f"{each}:")):
                break
        else:
            if not self.is_upload(request):
                return super()._answered(request)
        self.check_key(request)
        with self._lock:
            refusal = self.next_refusals.pop(0) if self.next_refusals else None
            if refusal is not None:
                raise refusal
            return self.route(request.method, path, dict(parse_qsl(request.query)), request)

    def is_upload(self, request: HttpRequest) -> bool:  # noqa: ARG002
        """Whether a request that is under no path of files uploads one."""
        return False

    def route(
        self, method: str, path: str, query: Mapping[str, str], request: HttpRequest
    ) -> object:
        """The answer to a request about files or jobs, as JSON or as a whole reply."""
        is_file = path.startswith(self.files_path)
        rest = path.removeprefix(self.files_path if is_file else self.jobs_path).strip("/")
        name, _, action = rest.partition("/")
        match method, name, action:
            case "POST", "", "":
                return self.uploads(request) if is_file else self.creates(request)
            case "GET", "", "":
                return self.lists(query, files=is_file)
            case "GET", _, "" if not is_file:
                return self.job_document(self.shown(self.job(name)))
            case "POST", _, self.stop if not is_file:
                return self.cancels(self.job(name))
            case "GET", _, "":
                return self.file_document(self.file(name))
            case "DELETE", _, "" if is_file:
                return self.deletes(name)
            case "GET", _, "content" if is_file:
                return self.downloads(name)
        raise self.wrong_path()

    def uploads(self, request: HttpRequest) -> object:
        file = self.upload_of(request)
        self.uploaded = len(file.content)
        return self.file_document(file)

    def creates(self, request: HttpRequest) -> object:
        asked = request.json()
        if not isinstance(asked, dict):
            raise self.wrong_body("no JSON object")
        self.seen.append(asked)
        made = self.create(self.take_job(asked), asked)
        if self.bad_gateway:
            self.bad_gateway = False
            return HttpReply(status=502, body=b"<html>Bad Gateway</html>")
        answer = in_json(200, self.job_document(made), self.headers_of_reply())
        if self.lose_answer:
            self.lose_answer = False
            return replace(answer, deliver=reset)
        return answer

    def lists(self, query: Mapping[str, str], *, files: bool) -> object:
        """Newest first, as every service that is known has them."""
        if files:
            listed = [self.file_document(each) for each in reversed(self.files.values())]
        else:
            listed = [self.job_document(each) for each in reversed(self.jobs.values())]
        return self.page(listed, query)

    def cancels(self, job: Job) -> object:
        if job.has_ended:
            raise Refused(400, {"detail": f"a job that is {job.state} cannot be cancelled"})
        job.state = "cancelling"
        return self.job_document(job)

    def deletes(self, name: str) -> object:
        file = self.file(name)
        del self.files[file.id]
        return {"id": name, "object": "file", "deleted": True}

    def downloads(self, name: str) -> HttpReply:
        content = self.file(name).content
        if self.short:
            self.short = False
            content = b"".join(content.splitlines(keepends=True)[:-1])
        reply = HttpReply(headers={"content-type": "application/octet-stream"}, body=content)
        if self.cut:
            self.cut = False
            return replace(reply, deliver=cut_off(0.6))
        return reply

    def job(self, name: str) -> Job:
        if name not in self.jobs:
            raise self.not_found("Batch")
        return self.jobs[name]

    def file(self, name: str) -> StoredFile:
        if name not in self.files:
            raise self.not_found("File")
        return self.files[name]


def parts_of(request: HttpRequest) -> list[Any]:
    """The parts of a multipart body."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    parts: Any = message_from_bytes(head + request.body).get_payload()
    if not isinstance(parts, list):
        raise Refused(400, {"detail": "the body has no parts"})
    return parts


def content_of(part: Any) -> bytes:
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    return content


def _now() -> datetime:
    return datetime.now(UTC)


class ServiceBatchContract(BatchContract):
    """The contract over a fixture ``server`` that is a ``FakeBatchService``: define
    ``strategy_of``."""

    server: FakeBatchService

    @pytest.fixture(autouse=True)
    def _of_a_service(self, server: FakeBatchService) -> None:
        self.server = server

    def strategy_of(self, server: Any) -> BatchStrategy:
        """A strategy that asks this server."""
        raise NotImplementedError(f"{type(self).__name__} must define strategy_of(server)")

    def make_strategy(self) -> BatchStrategy:
        return self.strategy_of(self.server)

    def another_strategy(self) -> BatchStrategy:
        return self.strategy_of(self.server)

    def finish_jobs(self) -> None:
        self.server.finish()

    def server_jobs(self) -> list[str]:
        return list(self.server.jobs)

    def uploaded_bytes(self) -> int:
        return self.server.uploaded

    def lose_next_answer(self) -> bool:
        self.server.lose_answer = True
        return True

    def fill_pages(self) -> bool:
        model = next(iter(self.server.jobs.values()))
        for _ in range(_PAGE + 5):
            other = self.server.store("another.jsonl", b"{}\n")
            job = Job(id=self.server.new_id("batch"), file=other.id, asked={}, created=_now())
            job.asked = self.server.without_mark(model.asked)
            self.server.jobs[job.id] = job
        return True

    def cut_results(self) -> bool:
        self.server.cut = True
        return True

    def shorten_results(self) -> bool:
        self.server.short = True
        return True

    def delay_results(self) -> bool:
        for job in self.server.jobs.values():
            job.late = 1
        return True

    def swap_results(self) -> bool:
        self.server.swapped = True
        return True

    def say_state(self, word: str) -> bool:
        self.server.word = word
        return True

    def expire_jobs(self) -> bool:
        self.server.finish("expired", done=0)
        return True

    def fail_next_create(self) -> bool:
        self.server.bad_gateway = True
        return True

    def server_bill(self) -> int:
        return self.server.meter.billed_tokens
