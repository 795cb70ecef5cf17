"""Mistral's ``/v1/embeddings`` as its specification of 2026-08-21 has it, on a real socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedcore.testing.service import FakeService, Refused
from embedcore.testing.vectors import tokens_of

# Model → its width, and the widest.
WIDTHS = {"mistral-embed": (1024, 1024), "codestral-embed": (1536, 3072)}
LONGEST, MOST = 8_192, 16_384


class FakeMistral(FakeService):
    path = "/v1/embeddings"

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
