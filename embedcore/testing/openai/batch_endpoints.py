"""Endpoints ``/v1/files`` and ``/v1/batches`` of the fake, and the control of its jobs.

Follows the published API description and recorded replies of OpenAI as of November 2026.

``GET /_batches`` tells: ``jobs`` (id, status, input_file_id, metadata, lines, run, tokens),
``pending`` and ``landed``, and ``billed_twice``: how many texts were billed more than once.

``POST /_batches`` does what it is sent, in this order, and tells the same:

- ``{"set": {"progress": {"polls": 2}, "quirks": {"bom": true}, …}}``: fields of ``BatchSettings``;
- ``{"advance": seconds}``: the service's clock; ``{"land": true}``: all that is late happens;
- ``{"fail_lines": [{"marker": "BAD", "status": 500, …}]}``: the arguments of ``fail_lines``;
- ``{"jobs": [{"id": …, "do": "finish", "done": 3}, …]}``: a method of ``BatchService`` for a job
  and its arguments; without ``id`` it is the newest job. There are step, finish, expire, cancel,
  end_cancel, fail, vanish, vanish_output and swap_outputs (with ``other``, a job's id).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs

from embedcore.testing.openai.batch_files import Content, Part, parts, whole
from embedcore.testing.openai.batch_settings import change
from embedcore.testing.openai.batches import BatchService
from embedcore.testing.openai.embeddings import Answer, ApiError, Router, json_reply
from embedcore.testing.openai.http import HttpReply, HttpRequest

FILES, BATCHES = "/v1/files", "/v1/batches"
_ENDPOINTS = {
    "/v1/responses",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
}
_PURPOSES = {"assistants", "batch", "fine-tune", "vision", "user_data", "evals"}
_FIELDS = {
    "input_file_id",
    "endpoint",
    "completion_window",
    "metadata",
    "output_expires_after",
}
_SHORTEST, _LONGEST = 3600, 2_592_000
_IN_MEMORY = 1 << 20
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")

Parameters = Mapping[str, str]


def is_batch_path(path: str) -> bool:
    """Whether a path is one of this API's."""
    return path.split("/")[1:3] in (["v1", "files"], ["v1", "batches"])


class BatchesApi:
    """The endpoints over a ``BatchService``."""

    def __init__(self, service: BatchService) -> None:
        self._service = service

    def register(self, router: Router) -> None:
        router.add("POST", FILES, self.upload)
        router.add("GET", FILES, self.files)
        router.add("GET", f"{FILES}/{{id}}", self.file)
        router.add("DELETE", f"{FILES}/{{id}}", self.delete)
        router.add("GET", f"{FILES}/{{id}}/content", self.content)
        router.add("POST", BATCHES, self.create)
        router.add("GET", BATCHES, self.batches)
        router.add("GET", f"{BATCHES}/{{id}}", self.retrieve)
        router.add("POST", f"{BATCHES}/{{id}}/cancel", self.cancel)

    def upload(self, request: HttpRequest, parameters: Parameters) -> Answer:  # noqa: ARG002
        data = request.body if request.spool is None else request.spool
        form = parts(request.headers.get("content-type", ""), data)
        file = form.get("file")
        if file is None or file.filename is None:
            raise ApiError(400, "Missing required parameter: 'file'.", param="file")
        purpose = form["purpose"].text if "purpose" in form else ""
        if purpose not in _PURPOSES:
            message = f"'{purpose}' is not one of {sorted(_PURPOSES)} - 'purpose'"
            raise ApiError(400, message, param="purpose")
        return _said(
            self._service.upload(
                file.content,
                filename=file.filename,
                purpose=purpose,
                expires_after=_form_expiry(form),
            )
        )

    def files(self, request: HttpRequest, parameters: Parameters) -> Answer:  # noqa: ARG002
        query = _query(request)
        return _said(
            self._service.files(
                after=query.get("after"),
                limit=_limit(query, default=10_000, most=10_000),
                purpose=query.get("purpose"),
            )
        )

    def file(self, request: HttpRequest, parameters: Parameters) -> Answer:  # noqa: ARG002
        return _said(self._service.file(parameters["id"]))

    def delete(self, request: HttpRequest, parameters: Parameters) -> Answer:  # noqa: ARG002
        return _said(self._service.delete(parameters["id"]))

    def content(self, request: HttpRequest, parameters: Parameters) -> Answer:
        content: Content = self._service.content(parameters["id"])
        asked = _RANGE.fullmatch(request.headers.get("range", ""))
        if asked is None or not self._service.settings.ranges:
            return _sent(content)
        start, end = int(asked[1]), min(int(asked[2] or content.size), content.size - 1)
        if start >= content.size or end < start:
            raise ApiError(416, "The range is not in the file.")
        headers = {"content-range": f"bytes {start}-{end}/{content.size}"}
        return _sent(_Piece(content=content, start=start, end=end + 1), 206, headers)

    def create(self, request: HttpRequest, parameters: Parameters) -> Answer:  # noqa: ARG002
        asked = _checked(request)
        return _said(
            self._service.create(
                str(asked["input_file_id"]),
                endpoint=str(asked["endpoint"]),
                completion_window=str(asked["completion_window"]),
                metadata=_metadata(asked.get("metadata")),
                output_expires_after=_expiry(asked.get("output_expires_after")),
            )
        )

    def batches(self, request: HttpRequest, parameters: Parameters) -> Answer:  # noqa: ARG002
        query = _query(request)
        limit = _limit(query, default=20, most=100)
        return _said(self._service.batches(after=query.get("after"), limit=limit))

    def retrieve(self, request: HttpRequest, parameters: Parameters) -> Answer:  # noqa: ARG002
        return _said(self._service.retrieve(parameters["id"]))

    def cancel(self, request: HttpRequest, parameters: Parameters) -> Answer:  # noqa: ARG002
        return _said(self._service.cancel(parameters["id"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Bytes ``start`` to ``end`` of a content."""

    content: Content
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        left = self.size - start
        for block in self.content.blocks(self.start + start):
            if left <= 0:
                return
            yield block[:left]
            left -= len(block)


def _said(found: dict[str, object]) -> Answer:
    return Answer(reply=json_reply(found))


def _sent(content: Content, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    headers = {"content-type": "application/octet-stream", **(headers or {})}
    # A small body in one piece is open to every fault; a large one to those of its delivery.
    if content.size <= _IN_MEMORY:
        return Answer(reply=HttpReply(status=status, headers=headers, body=whole(content)))
    return Answer(reply=HttpReply(status=status, headers=headers, stream=content))


def _query(request: HttpRequest) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(request.query).items()}


def _limit(query: Mapping[str, str], *, default: int, most: int) -> int:
    asked = query.get("limit", str(default))
    if not asked.isdecimal() or not 1 <= int(asked) <= most:
        raise ApiError(400, f"Invalid 'limit': must be from 1 to {most}.", param="limit")
    return int(asked)


def _checked(request: HttpRequest) -> dict[str, object]:
    try:
        asked = request.json()
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise ApiError(400, "We could not parse the JSON body of your request.")
    for name in asked:
        if name not in _FIELDS:
            raise ApiError(400, f"Unknown parameter: '{name}'.", param=name)
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(asked.get(name), str):
            raise ApiError(400, f"Missing required parameter: '{name}'.", param=name)
    if asked["endpoint"] not in _ENDPOINTS:
        raise ApiError(400, f"Invalid value: '{asked['endpoint']}'.", param="endpoint")
    if asked["completion_window"] != "24h":
        raise ApiError(400, "Invalid value: only '24h' is allowed.", param="completion_window")
    return cast(dict[str, object], asked)


def _metadata(given: object) -> dict[str, str] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or len(given) > 16:
        raise ApiError(400, "Invalid 'metadata': at most 16 pairs.", param="metadata")
    for key, value in given.items():
        if len(key) > 64 or not isinstance(value, str) or len(value) > 512:
            message = "Invalid 'metadata': strings, keys up to 64 and values up to 512 characters."
            raise ApiError(400, message, param="metadata")
    return given


def _expiry(given: object, *, name: str = "output_expires_after") -> int | None:
    if given is None:
        return None
    known = isinstance(given, dict) and given.get("anchor") == "created_at"
    seconds = given.get("seconds") if isinstance(given, dict) else None
    if not known or not isinstance(seconds, int) or not _SHORTEST <= seconds <= _LONGEST:
        message = f"Invalid '{name}': created_at and {_SHORTEST} to {_LONGEST} seconds."
        raise ApiError(400, message, param=name)
    return seconds


def _form_expiry(form: Mapping[str, Part]) -> int | None:
    if "expires_after[seconds]" not in form:
        return None
    seconds, anchor = form["expires_after[seconds]"].text, form.get("expires_after[anchor]")
    number = int(seconds) if seconds.isdecimal() else None
    given = {"anchor": anchor.text if anchor else None, "seconds": number}
    return _expiry(given, name="expires_after")


PATH = "/_batches"
_PARTS = {"set", "advance", "land", "fail_lines", "jobs"}


def control_batches(request: HttpRequest, service: BatchService) -> HttpReply:
    """The reply to a request to ``/_batches``."""
    try:
        if request.method == "POST":
            drive(service, request.json())
        elif request.method != "GET":
            return json_reply({"error": "there are GET and POST /_batches"}, status=405)
    except (TypeError, ValueError, ApiError) as error:
        return json_reply({"error": str(error)}, status=400)
    service.refresh()
    return json_reply(described(service))


def described(service: BatchService) -> dict[str, object]:
    return {
        "jobs": [
            {
                "id": job.id,
                "status": job.status,
                "input_file_id": job.input_file_id,
                "metadata": job.metadata,
                "lines": len(job.lines),
                "run": len(job.results),
                "tokens": job.billed_tokens,
            }
            for job in service.jobs
        ],
        "pending": service.pending,
        "landed": service.landed,
        "billed_twice": len(service.meter.billed_twice),
    }


def drive(service: BatchService, script: object) -> None:
    """Do what a script says; raises ``ValueError`` or ``TypeError`` for one without sense."""
    if not isinstance(script, dict):
        raise TypeError("a JSON object was expected")
    unknown = sorted(set(script) - _PARTS)
    if unknown:
        raise ValueError(f"no part {unknown[0]!r} in a script; there are {sorted(_PARTS)}")
    change(service.settings, script.get("set", {}))
    service.clock.advance(float(script.get("advance", 0)))
    if script.get("land"):
        service.land()
    for rule in script.get("fail_lines", []):
        service.fail_lines(**rule)
    for deed in script.get("jobs", []):
        _do(service, deed)


def _do(service: BatchService, deed: Mapping[str, object]) -> None:
    arguments = cast(dict[str, Any], {**deed})
    jobs = service.jobs
    job_id = arguments.pop("id", jobs[-1].id if jobs else "")
    name = arguments.pop("do", None)
    deeds: dict[object, Callable[..., object]] = {
        "step": service.step,
        "finish": service.finish,
        "expire": service.expire,
        "cancel": service.cancel,
        "end_cancel": service.end_cancel,
        "fail": service.fail,
        "vanish": service.vanish,
        "vanish_output": service.vanish_output,
        "swap_outputs": service.swap_outputs,
    }
    if name not in deeds:
        raise ValueError(f"no deed {name!r}; there are {', '.join(map(str, deeds))}")
    deeds[name](job_id, **arguments)
