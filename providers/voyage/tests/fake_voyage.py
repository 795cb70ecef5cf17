"""Voyage's ``/v1/embeddings`` as its specification 1.1 has it, on a real socket."""

from __future__ import annotations

from typing import Any

import numpy as np
import pybase64

from embedcore.testing.service import FakeService, Refused
from embedcore.testing.vectors import tokens_of

# Model → tokens of a text, and of a request.
LIMITS = {
    "voyage-4": (32_000, 320_000),
    "voyage-4-large": (32_000, 120_000),
    "voyage-law-2": (16_000, 120_000),
}


class FakeVoyage(FakeService):
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


def packed(row: list[float]) -> str:
    return pybase64.b64encode(np.array(row, dtype="<f4").tobytes()).decode()
