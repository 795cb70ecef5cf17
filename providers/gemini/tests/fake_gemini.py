"""Gemini's API as it was recorded and reported, single requests and batches, on a real socket."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from embedcore.testing.batch_service import (
    FakeBatchService,
    Job,
    StoredFile,
    content_of,
    parts_of,
)
from embedcore.testing.openai.http import HttpRequest
from embedcore.testing.service import Refused
from embedcore.testing.vectors import tokens_of

MODELS = ("gemini-embedding-001", "gemini-embedding-2")
FULL = 3072
TASKS = [
    "RETRIEVAL_QUERY",
    "RETRIEVAL_DOCUMENT",
    "SEMANTIC_SIMILARITY",
    "CLASSIFICATION",
    "CLUSTERING",
    "CODE_RETRIEVAL_QUERY",
    "QUESTION_ANSWERING",
    "FACT_VERIFICATION",
]
# What 001 was recorded to give at 768.
LENGTH = 0.579
LONGEST = {"gemini-embedding-001": 2_048, "gemini-embedding-2": 8_192}


STATES = {
    "in_progress": "BATCH_STATE_RUNNING",
    "completed": "BATCH_STATE_SUCCEEDED",
    "failed": "BATCH_STATE_FAILED",
    "expired": "BATCH_STATE_EXPIRED",
    "cancelling": "BATCH_STATE_RUNNING",
    "cancelled": "BATCH_STATE_CANCELLED",
}


class FakeGemini(FakeBatchService):
    """It cuts what is too long and says nothing: whether the service does is not known.

    ``mixes``: of so many rows of each job the vectors change places.
    """

    key_header = ("x-goog-api-key", "")
    root = "/v1beta"
    mixes = 0

    def is_path(self, path: str) -> bool:
        model, _, method = path.removeprefix("/v1beta/models/").partition(":")
        return (
            path.startswith("/v1beta/models/")
            and method == "batchEmbedContents"
            and "/" not in model
        )

    def wrong_key(self) -> Refused:
        return self.wrong_body("API key not valid. Please pass a valid API key.")

    def wrong_path(self) -> Refused:
        return refused(404, "Requested entity was not found.", "NOT_FOUND")

    def wrong_body(self, why: str) -> Refused:
        return refused(400, why, "INVALID_ARGUMENT")

    def too_fast(self) -> Refused:
        said = "You exceeded your current quota. Please retry in 20s."
        return refused(429, said, "RESOURCE_EXHAUSTED")

    def reply(self, question: dict[str, Any]) -> object:
        self.take(question, {"requests": list})
        entries = question["requests"]
        if len(json.dumps(question, ensure_ascii=False).encode()) > 4_194_304:
            raise self.wrong_body("Request payload size exceeds the limit: 4194304 bytes.")
        if not 1 <= len(entries) <= 100:
            raise self.wrong_body("at most 100 requests can be in one batch")
        read = [self._entry(entry) for entry in entries]
        if len({(model, width) for model, _, _, width in read}) != 1:
            raise self.wrong_body("all requests must have one model and one width")
        model = read[0][0]
        texts = [text[: 4 * LONGEST[model]] for _, text, _, _ in read]
        rows = [self._row(*each) for each in read]
        tokens = self.bill(texts)
        answer: dict[str, Any] = {"embeddings": [{"values": row} for row in rows]}
        if model == "gemini-embedding-2":
            told = [{"modality": "TEXT", "tokenCount": tokens}]
            answer["usageMetadata"] = {"promptTokenCount": tokens, "promptTokenDetails": told}
        return answer

    def is_upload(self, request: HttpRequest) -> bool:
        return request.path == "/upload/v1beta/files" or request.path.endswith(
            ":asyncBatchEmbedContent"
        )

    def route(
        self, method: str, path: str, query: Mapping[str, str], request: HttpRequest
    ) -> object:
        name, _, action = path.removeprefix("/batches/").removeprefix("/files/").partition(":")
        if method == "POST" and path == "/upload/v1beta/files":
            return {"file": self.uploads(request)}
        if method == "POST" and action == "asyncBatchEmbedContent":
            self.paths.append(request.path)
            return self.creates(request)
        if method == "POST" and path.startswith("/batches/") and action == "cancel":
            self.cancels(self.job(name))
            return {}
        if method == "GET" and path.startswith("/files/") and action == "download":
            if query != {"alt": "media"} or self.file(name).purpose == "batch":
                raise self.wrong_body("Only generated files can be downloaded.")
            return self.downloads(name)
        if method == "DELETE" and path.startswith("/files/") and not action:
            self.deletes(name)
            return {}
        if method == "GET" and not action:
            return super().route(method, path, query, request)
        raise self.wrong_path()

    def upload_of(self, request: HttpRequest) -> StoredFile:
        kind = request.headers.get("content-type", "")
        protocol = request.headers.get("x-goog-upload-protocol")
        if protocol != "multipart" or not kind.startswith("multipart/related"):
            raise self.wrong_body("Upload protocol is not supported.")
        described, content = parts_of(request)
        told = json.loads(content_of(described))
        self.take(told, {"file": dict})
        self.take(told["file"], {"displayName": str, "mimeType": ["application/jsonl"]})
        return self.store(told["file"]["displayName"], content_of(content))

    def new_id(self, kind: str) -> str:
        return f"{kind[:1]}{uuid.uuid4().hex[:11]}"

    def not_found(self, what: str) -> Refused:
        return refused(404, f"{what} not found.", "NOT_FOUND")

    def file_missing(self) -> Refused:
        return refused(404, "Requested entity was not found.", "NOT_FOUND")

    def take_job(self, asked: dict[str, Any]) -> str:
        self.take(asked, {"batch": dict})
        self.take(asked["batch"], {"displayName": str, "inputConfig": dict, "priority?": str})
        self.take(asked["batch"]["inputConfig"], {"fileName": str})
        return str(asked["batch"]["inputConfig"]["fileName"]).removeprefix("files/")

    def without_mark(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return {"batch": {**asked["batch"], "displayName": "another"}}

    def run_line(self, job: Job, line: dict[str, Any]) -> dict[str, Any]:
        self.take(line, {"key": str, "request": dict})
        model = self.paths[-1].removeprefix("/v1beta/models/").partition(":")[0]
        if "model" in line["request"]:
            raise self.wrong_body("unknown field 'model'")
        read = self._entry({"model": f"models/{model}", **line["request"]})
        tokens = self.bill([read[1][: 4 * LONGEST[model]]])
        vector = {"values": self._row(*read)}
        # The key comes after what it names, and numbers are texts.
        return {"response": {"tokenCount": str(tokens), "embedding": vector}, "key": line["key"]}

    def error_row(self, job: Job, line: dict[str, Any], refused: Refused) -> dict[str, Any]:
        del job
        said: Any = refused.body
        return {"key": line["key"], "error": {"code": 3, "message": said["error"]["message"]}}

    def write_results(self, job: Job) -> None:
        rows = job.good[: self.mixes]
        vectors = [row["response"] for row in rows]
        for row, vector in zip(rows, vectors[1:] + vectors[:1], strict=True):
            row["response"] = vector
        job.output = self._as_file(job, [*job.bad, *job.good], "output")

    def job_document(self, job: Job) -> dict[str, Any]:
        counts = {
            "requestCount": job.total,
            "successfulRequestCount": len(job.good),
            "failedRequestCount": len(job.bad),
            "pendingRequestCount": 0 if job.has_ended else job.total,
        }
        told: dict[str, Any] = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.EmbedContentBatch",
            "model": self.paths[-1].removeprefix("/v1beta/").partition(":")[0],
            "displayName": job.asked["batch"]["displayName"],
            "createTime": f"{job.created:%Y-%m-%dT%H:%M:%S.%f}123Z",
            # What is zero is left out.
            "batchStats": {name: str(count) for name, count in counts.items() if count},
            "state": STATES.get(job.state, job.state),
            "name": f"batches/{job.id}",
        }
        document: dict[str, Any] = {"name": f"batches/{job.id}", "metadata": told}
        if job.has_ended and job.output:
            output = {"responsesFile": f"files/{job.output}"}
            told["output"] = output
            document |= {"done": True, "response": {"@type": "…", **output}}
        return document

    def file_document(self, file: StoredFile) -> dict[str, Any]:
        return {
            "name": f"files/{file.id}",
            "displayName": file.name,
            "mimeType": "application/jsonl",
            "sizeBytes": str(len(file.content)),
            "createTime": f"{file.created:%Y-%m-%dT%H:%M:%S.%f}Z",
            "state": "ACTIVE",
            "source": "UPLOADED",
        }

    def lists(self, query: Mapping[str, str], *, files: bool) -> object:
        listed: list[Any]
        if files:
            listed = [self.file_document(each) for each in self.files.values()]
        else:
            listed = [self.job_document(each) for each in self.jobs.values()]
        start = int(query.get("pageToken", "at-0").removeprefix("at-"))
        end = start + min(int(query.get("pageSize", 20)), 20)
        name = "files" if files else "operations"
        page: dict[str, Any] = {name: listed[start:end]} if listed else {}
        return {**page, "nextPageToken": f"at-{end}"} if end < len(listed) else page

    def _row(self, model: str, text: str, task: str | None, width: int) -> list[float]:
        salt = model if model == "gemini-embedding-2" else f"{model} {task}"
        (row,) = self.vectors([text[: 4 * LONGEST[model]]], width, salt=salt)
        short = width < FULL and model == "gemini-embedding-001"
        return list((np.array(row) * (LENGTH if short else 1.0)).tolist())

    def _entry(self, entry: Any) -> tuple[str, str, str | None, int]:
        if not isinstance(entry, dict):
            raise self.wrong_body("Invalid JSON payload received.")
        self.take(
            entry,
            {
                "model": str,
                "content": dict,
                "taskType?": TASKS,
                "title?": str,
                "outputDimensionality?": int,
            },
        )
        model = entry["model"].removeprefix("models/")
        if model not in MODELS or not self.paths[-1].startswith("/v1beta/models/gemini"):
            said = f"models/{model} is not found for API version v1beta"
            raise refused(404, said, "NOT_FOUND")
        parts = entry["content"].get("parts")
        # Several parts are one text to the service.
        if not isinstance(parts, list) or [set(part) for part in parts] != [{"text"}]:
            raise self.wrong_body("this fake takes one text in an entry")
        (text,) = self.strings(parts[0]["text"])
        if not text:
            raise self.wrong_body("* EmbedContentRequest.content contains an empty Part.")
        width = entry.get("outputDimensionality", FULL)
        if not 1 <= width <= FULL:
            raise self.wrong_body("outputDimensionality must be between 1 and 3072")
        assert tokens_of(text) > 0
        return model, text, entry.get("taskType"), width


def refused(code: int, message: str, status: str, **more: Any) -> Refused:
    return Refused(code, {"error": {"code": code, "message": message, "status": status, **more}})
