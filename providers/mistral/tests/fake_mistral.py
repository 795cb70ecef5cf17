"""Mistral's API as its specification of 2026-08-21 has it, single requests and batches, on a real
socket."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from embedcore.testing.batch_service import FakeBatchService, Job, StoredFile
from embedcore.testing.service import Refused
from embedcore.testing.vectors import tokens_of

# Model → its width, and the widest.
WIDTHS = {"mistral-embed": (1024, 1024), "codestral-embed": (1536, 3072)}
LONGEST, MOST = 8_192, 16_384
STATES = {
    "in_progress": "RUNNING",
    "completed": "SUCCESS",
    "failed": "FAILED",
    "expired": "TIMEOUT_EXCEEDED",
    "cancelling": "CANCELLATION_REQUESTED",
    "cancelled": "CANCELLED",
}


class FakeMistral(FakeBatchService):
    path = "/v1/embeddings"
    jobs_path = "/batch/jobs"

    def headers_of_reply(self) -> Mapping[str, str]:
        return {
            "mistral-correlation-id": "01a01a71-df7d-7f75-9ff4-414194d0a6c9",
            "x-ratelimit-limit-req-minute": "360",
            "x-ratelimit-remaining-req-minute": "354",
        }

    def wrong_key(self) -> Refused:
        return Refused(401, {"detail": "Unauthorized"})

    def wrong_path(self) -> Refused:
        return Refused(404, {"detail": "Not Found"})

    def wrong_body(self, why: str) -> Refused:
        told = {"type": "extra_forbidden", "loc": ["body"], "msg": why, "input": {}}
        return Refused(422, {"detail": [told]})

    def reply(self, question: dict[str, Any]) -> object:
        self.take(
            question,
            {
                "model": str,
                "input": (str, list),
                "metadata?": dict,
                "output_dimension?": int,
                "output_dtype?": ["float", "int8", "uint8", "binary", "ubinary"],
                "encoding_format?": ["float", "base64"],
            },
        )
        model, texts = question["model"], self.strings(question["input"])
        if model not in WIDTHS:
            raise refused(f"Invalid model: {model}", "invalid_model", "1500")
        usual, widest = WIDTHS[model]
        width = question.get("output_dimension", usual)
        if not 1 <= width <= widest or (usual == widest and "output_dimension" in question):
            raise refused("This model does not support output_dimension", None, None)
        counts = [tokens_of(text) for text in texts]
        if not texts:
            raise refused("Please provide at least one input element.", None, None)
        if len(texts) > 256:
            raise refused(f"Too many inputs in request: {len(texts)}, max 256", None, "3210")
        if sum(counts) > MOST:
            raise refused(f"Too many tokens in batch. Max is {MOST} got {sum(counts)}", None, None)
        if max(counts) > LONGEST:
            said = f"Input id 0 has {max(counts)} tokens, exceeding max {LONGEST} tokens."
            raise refused(said, None, None)
        tokens = self.bill(texts)
        rows = self.vectors(texts, width, salt=model)
        return {
            "id": "817dcfa8ae51473e92a6594928a1fb9b",
            "object": "list",
            "data": [
                {"object": "embedding", "embedding": row, "index": place}
                for place, row in enumerate(rows)
            ],
            "model": model,
            "usage": {
                "prompt_audio_seconds": None,
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "completion_tokens": 0,
                "request_count": None,
                "prompt_tokens_details": None,
            },
        }

    def new_id(self, kind: str) -> str:
        del kind
        return str(uuid.uuid4())

    def take_job(self, asked: dict[str, Any]) -> str:
        self.take(
            asked,
            {
                "endpoint": ["/v1/embeddings"],
                "model": list(WIDTHS),
                "input_files?": list,
                "requests?": list,
                "metadata?": (dict, type(None)),
                "timeout_hours?": int,
            },
        )
        if not 24 <= asked.get("timeout_hours", 24) < 168:
            raise refused("timeout_hours must be between 24 and 168", None, None)
        for name, value in (asked.get("metadata") or {}).items():
            if not 1 <= len(name) <= 32 or not 1 <= len(value) <= 512:
                raise self.wrong_body("metadata is too long")
        if requests := asked.get("requests"):
            if len(requests) > 10_000:
                raise self.wrong_body("List should have at most 10000 items")
            content = "".join(f"{json.dumps(each)}\n" for each in requests).encode()
            return self.store("requests.jsonl", content).id
        (file,) = asked["input_files"]
        return str(file)

    def file_missing(self) -> Refused:
        return refused("The file could not be found.", None, None)

    def run_line(self, job: Job, line: dict[str, Any]) -> dict[str, Any]:
        self.take(line, {"custom_id?": str, "body": dict})
        body = self.reply({"model": job.asked["model"], **line["body"]})
        return {
            "id": f"batch-{job.id[:8]}-{job.file[:8]}-0",
            "custom_id": line["custom_id"],
            "response": {"status_code": 200, "body": body},
            "error": None,
        }

    def job_document(self, job: Job) -> dict[str, Any]:
        done = len(job.good) + len(job.bad)
        return {
            "id": job.id,
            "object": "batch",
            "input_files": [job.file],
            "metadata": job.asked.get("metadata"),
            "endpoint": "/v1/embeddings",
            "model": job.asked.get("model"),
            "agent_id": None,
            "output_file": job.output,
            "error_file": job.errors,
            "errors": [{"message": "bad request", "count": len(job.bad)}] if job.bad else [],
            # Of small jobs they are here as well.
            "outputs": job.good[:3] if job.output else None,
            "status": STATES.get(job.state, job.state),
            "created_at": int(job.created.timestamp()),
            "total_requests": job.total,
            "completed_requests": done,
            "succeeded_requests": len(job.good),
            "failed_requests": len(job.bad),
            "started_at": None,
            "completed_at": None,
        }

    def file_document(self, file: StoredFile) -> dict[str, Any]:
        return {
            "id": file.id,
            "object": "file",
            "bytes": len(file.content),
            "created_at": int(file.created.timestamp()),
            "filename": file.name,
            "purpose": "batch",
            "sample_type": "batch_request" if file.purpose == "batch" else "batch_result",
            "source": "upload" if file.purpose == "batch" else "mistral",
        }

    def page(self, entries: list[Any], query: Mapping[str, str]) -> dict[str, Any]:
        size = min(int(query.get("page_size", 100)), 20)
        start = int(query.get("page", 0)) * size
        return {"object": "list", "data": entries[start : start + size], "total": len(entries)}


def refused(message: str, kind: str | None, code: str | None) -> Refused:
    return Refused(
        400,
        {
            "object": "error",
            "message": message,
            "type": kind or "invalid_request_error",
            "param": None,
            "code": code,
        },
    )
