"""Ollama's ``/api/embed`` as its specification of 2026-08-21 has it, on a real socket."""

from __future__ import annotations

from typing import Any

from embedcore.testing.service import FakeService, Refused
from embedcore.testing.vectors import tokens_of

# Model → width and context.
MODELS = {"nomic-embed-text": (768, 2_048), "all-minilm": (384, 256)}


class FakeOllama(FakeService):
    path = "/api/embed"

    def wrong_key(self) -> Refused:
        return Refused(401, {"error": "unauthorized"})

    def wrong_path(self) -> Refused:
        return Refused(404, {"error": "404 page not found"})

    def wrong_body(self, why: str) -> Refused:
        return Refused(400, {"error": why})

    def reply(self, question: dict[str, Any]) -> object:
        self.take(
            question,
            {
                "model": str,
                "input": (str, list),
                "truncate?": bool,
                "dimensions?": int,
                "keep_alive?": str,
                "options?": dict,
            },
        )
        name = question["model"].removesuffix(":latest")
        if name not in MODELS:
            raise Refused(404, {"error": f"model '{question['model']}' not found"})
        full, context = MODELS[name]
        texts = self.strings(question["input"])
        if not question.get("truncate", True) and any(tokens_of(text) > context for text in texts):
            raise self.wrong_body("the input length exceeds the context length")
        width = question.get("dimensions") or full
        return {
            "model": question["model"],
            "embeddings": self.vectors(texts, min(width, full), salt=name),
            "total_duration": 14_143_917,
            "load_duration": 1_019_500,
            "prompt_eval_count": self.bill(texts),
        }
