"""Voyage's batch API: a file of texts, and a job that says what is asked of all of them.

Facts: its guide and its specification 1.1 (100,000 inputs and 1 GB a file, 100 jobs and 1,000
million tokens at once). What only the service itself can show is in docs/assumptions.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedcore.provider.batch_files import MARK, FilesBatch
from embedcore.provider.types import BatchItem


class VoyageBatch(FilesBatch):
    """Implements ``BatchStrategy``. The input type is the same for all texts of a job, so it is
    noted with their file."""

    max_items = 100_000
    max_bytes = 1_000_000_000
    max_enqueued_tokens = 1_000_000_000
    window = 43_200.0

    def line(self, item: BatchItem) -> Mapping[str, Any]:
        return {"custom_id": item.id, "body": {"input": [item.text]}}

    def note(self, item: BatchItem) -> str:
        return self.embedder.word_of(item.input_type) or ""

    def job(self, file: str, mark: str, note: str) -> Mapping[str, Any]:
        # As one request has it, without the texts; numbers come as lists, whatever is asked for.
        asked = self.embedder.question([], note or None)
        del asked["input"], asked["encoding_format"]
        return {
            "endpoint": "/v1/embeddings",
            "completion_window": "12h",
            "request_params": asked,
            "input_file_id": file,
            "metadata": {MARK: mark},
        }
