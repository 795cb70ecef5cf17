"""Gemini's ``:batchEmbedContents`` as it was recorded and reported, on a real socket."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from embedcore.testing.service import FakeService, Refused
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


class FakeGemini(FakeService):
    """It cuts what is too long and says nothing: whether the service does is not known."""

    key_header = ("x-goog-api-key", "")

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
        model, _, _, width = read[0]
        texts = [text[: 4 * LONGEST[model]] for _, text, _, _ in read]
        rows = []
        for text, (_, _, task, _) in zip(texts, read, strict=True):
            salt = model if model == "gemini-embedding-2" else f"{model} {task}"
            (row,) = self.vectors([text], width, salt=salt)
            short = width < FULL and model == "gemini-embedding-001"
            rows.append((np.array(row) * (LENGTH if short else 1.0)).tolist())
        tokens = self.bill(texts)
        answer: dict[str, Any] = {"embeddings": [{"values": row} for row in rows]}
        if model == "gemini-embedding-2":
            told = [{"modality": "TEXT", "tokenCount": tokens}]
            answer["usageMetadata"] = {"promptTokenCount": tokens, "promptTokenDetails": told}
        return answer

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
