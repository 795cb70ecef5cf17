"""Voyage's API as its specification 1.1 has it, single requests and batches, on a real socket."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pybase64

from embedcore.testing.batch_service import FakeBatchService, Job, StoredFile
from embedcore.testing.service import Refused
from embedcore.testing.vectors import tokens_of

# Model → tokens of a text, and of a request.
LIMITS = {
    "voyage-4": (32_000, 320_000),
    "voyage-4-large": (32_000, 120_000),
    "voyage-law-2": (16_000, 120_000),
}

BATCH_MODELS = ("voyage-4", "voyage-4-large", "voyage-4-lite", "voyage-3.5", "voyage-code-3")


class FakeVoyage(FakeBatchService):
    path = "/v1/embeddings"

    def wrong_key(self) -> Refused:
        return Refused(401, {"detail": "Provided API key is invalid."})

    def wrong_path(self) -> Refused:
        return Refused(404, {"detail": "Not Found"})

    def wrong_body(self, why: str) -> Refused:
        return Refused(400, {"detail": why})

    def reply(self, question: dict[str, Any]) -> object:
        self.take(
            question,
            {
                "input": (str, list),
                "model": str,
                "input_type?": [None, "query", "document"],
                "truncation?": bool,
                "output_dimension?": [None, 256, 512, 1024, 2048],
                "output_dtype?": [None, "float", "int8", "uint8", "binary", "ubinary"],
                # "float" is none of its values.
                "encoding_format?": [None, "base64"],
            },
        )
        model = question["model"]
        if model not in LIMITS:
            raise self.wrong_body(
                f"Model {model} is not supported. Supported models are {sorted(LIMITS)}."
            )
        texts = self.strings(question["input"])
        self._refuse_too_much(model, texts, cuts=question.get("truncation", True))
        width = question.get("output_dimension") or 1024
        rows = self.vectors(texts, width, salt=f"{model} {question.get('input_type')}")
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "embedding": packed(row), "index": place}
                for place, row in enumerate(rows)
            ],
            "model": model,
            "usage": {"total_tokens": self.bill(texts)},
        }

    def take_job(self, asked: dict[str, Any]) -> str:
        self.take(
            asked,
            {
                "endpoint": ["/v1/embeddings"],
                "completion_window": ["12h"],
                "request_params": dict,
                "input_file_id": str,
                "metadata?": (dict, type(None)),
            },
        )
        params = asked["request_params"]
        self.take(
            params,
            {
                "model": list(BATCH_MODELS),
                "input_type?": [None, "query", "document"],
                "truncation?": bool,
                "output_dimension?": [None, 256, 512, 1024, 2048],
                "output_dtype?": [None, "float", "int8", "uint8", "binary", "ubinary"],
            },
        )
        return str(asked["input_file_id"])

    def run_line(self, job: Job, line: dict[str, Any]) -> dict[str, Any]:
        # Of the model a line says nothing.
        self.take(line, {"custom_id": str, "body": dict})
        self.take(line["body"], {"input": (str, list)})
        params = job.asked["request_params"]
        texts, model = self.strings(line["body"]["input"]), params["model"]
        self._refuse_too_much(model, texts, cuts=params.get("truncation", True))
        width = params.get("output_dimension") or 1024
        rows = self.vectors(texts, width, salt=f"{model} {params.get('input_type')}")
        data = [
            {"object": "embedding", "index": place, "embedding": row}
            for place, row in enumerate(rows)
        ]
        usage = {"total_tokens": self.bill(texts)}
        body = {"object": "list", "data": data, "model": model, "usage": usage}
        return {
            "batch_id": job.id,
            "custom_id": line["custom_id"],
            "response": {"status_code": 200, "body": body},
            "error": None,
        }

    def error_row(self, job: Job, line: dict[str, Any], refused: Refused) -> dict[str, Any]:
        said = {"status_code": refused.status, "message": refused.body["detail"]}  # type: ignore[index]
        told = {"batch_id": job.id, "custom_id": line["custom_id"]}
        return {**told, "response": said, "error": None}

    def job_document(self, job: Job) -> dict[str, Any]:
        states = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelled_at")
        has_begun = job.state != "validating"
        return {
            "id": job.id,
            "object": "batch",
            "endpoint": "/v1/embeddings",
            "errors": None,
            "input_file_id": job.file,
            "completion_window": "12h",
            "model": job.asked["request_params"]["model"],
            "status": job.state,
            "output_file_id": job.output,
            "error_file_id": job.errors,
            "request_counts": {
                "total": job.total if has_begun else 0,
                "completed": len(job.good),
                "failed": len(job.bad),
            },
            "metadata": job.asked.get("metadata") or {},
            "created_at": told_at(job.created),
            "expected_completion_at": told_at(job.created),
            **dict.fromkeys(states),
        }

    def file_document(self, file: StoredFile) -> dict[str, Any]:
        return {
            "object": "file",
            "id": file.id,
            "purpose": file.purpose,
            "filename": file.name,
            "bytes": len(file.content),
            "created_at": told_at(file.created),
            "expires_at": told_at(file.created),
        }

    def not_found(self, what: str) -> Refused:
        return Refused(404, {"detail": f"{what} not found"})

    def _refuse_too_much(self, model: str, texts: list[str], *, cuts: bool) -> None:
        longest, most = LIMITS[model]
        if not 1 <= len(texts) <= 1_000:
            raise self.wrong_body(f"The batch size limit is 1000. Your batch size is {len(texts)}.")
        counts = [tokens_of(text) for text in texts]
        for place, tokens in enumerate(counts):
            if tokens > longest and not cuts:
                raise self.wrong_body(
                    f"Request to model '{model}' failed. The example at index {place} in your "
                    "batch has too many tokens and does not fit into the model's context window "
                    f"of {longest} tokens. Please lower the number of tokens or use truncation."
                )
        if sum(counts) > most:
            raise self.wrong_body(
                f"Request to model '{model}' failed. The max allowed tokens per submitted batch "
                f"is {most}. Your batch has {sum(counts)} tokens after truncation. Please lower "
                "the number of tokens in the batch."
            )


def told_at(moment: datetime) -> str:
    return moment.isoformat()


def packed(row: list[float]) -> str:
    return pybase64.b64encode(np.array(row, dtype="<f4").tobytes()).decode()
