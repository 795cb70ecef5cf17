"""Cohere's ``/v2/embed`` as its specification of 2026-08-20 has it, on a real socket."""

from __future__ import annotations

from typing import Any

from embedcore.testing.service import FakeService, Refused
from embedcore.testing.vectors import tokens_of

WIDTHS = {
    "embed-v4.0": (1536, (256, 512, 1024, 1536)),
    "embed-v5.0-pro": (2048, (256, 512, 768, 1024, 1536, 2048)),
    "embed-english-v3.0": (1024, ()),
}
LONGEST = {"embed-english-v3.0": 512}


class FakeCohere(FakeService):
    path = "/v2/embed"

    def wrong_body(self, why: str) -> Refused:
        return Refused(400, {"id": "0", "message": f"invalid request: {why}"})

    def too_fast(self) -> Refused:
        said = "You are past the per minute request limit, please wait and try again later."
        return Refused(429, {"id": "0", "message": said})

    def reply(self, question: dict[str, Any]) -> object:
        self.take(
            question,
            {
                "model": str,
                "texts": list,
                "input_type": ["search_document", "search_query", "classification", "clustering"],
                "embedding_types?": list,
                "truncate?": ["NONE", "START", "END"],
                "max_tokens?": int,
                "output_dimension?": int,
                "priority?": int,
            },
        )
        model, texts = question["model"], self.strings(question["texts"])
        if model not in WIDTHS:
            said = f"model '{model}' not found, make sure the correct model ID was used"
            raise Refused(404, {"id": "0", "message": said})
        full, widths = WIDTHS[model]
        width = question.get("output_dimension", full)
        if width != full and width not in widths:
            raise self.wrong_body("output_dimension is not supported by this model")
        if question.get("embedding_types") != ["float"]:
            raise self.wrong_body("this fake gives floats only")
        self._refuse_too_much(texts, LONGEST.get(model, 128_000), question.get("truncate", "END"))
        tokens = self.bill(texts)
        rows = self.vectors(texts, width, salt=f"{model} {question['input_type']}")
        return {
            "id": "199299d7-f43d-45af-903c-347fff81bbe4",
            # v3 repeats English texts in lower case: they are no names of their rows.
            "texts": [text.lower() for text in texts],
            "embeddings": {"float": rows},
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": tokens, "image_tokens": 0},
            },
            "response_type": "embeddings_by_type",
        }

    def _refuse_too_much(self, texts: list[str], longest: int, truncate: str) -> None:
        if not 1 <= len(texts) <= 96:
            raise self.wrong_body(
                f"total number of texts must be at most 96 - received {len(texts)}"
            )
        if "" in texts:
            raise self.wrong_body(
                f"inputs contains an element that is the empty string at index {texts.index('')}"
            )
        for text in texts:
            if truncate == "NONE" and tokens_of(text) > longest:
                said = (
                    f"too many tokens: total number of tokens in the prompt cannot exceed {longest}"
                )
                raise self.wrong_body(f"{said} - received {tokens_of(text)}")
