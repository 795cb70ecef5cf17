"""Mistral's batch API: a file of requests, and a job for all of them.

Its other form has the requests in the call itself. Files are used: once one is deleted, no call
that was lost can make a job of it, so that none is paid for twice. And they take a hundred times as
many texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from embedcore.provider.batch_files import MARK, FilesBatch, Paging
from embedcore.provider.types import BatchItem

_PAGES: Final = Paging(by="number", size="page_size", cursor="page")


class MistralBatch(FilesBatch):
    """Implements ``BatchStrategy``. Of the specification of 2026-08-21: 1,000,000 requests that
    have not ended, 512 MB a file."""

    jobs = "/batch/jobs"
    paging = file_paging = _PAGES
    max_items = 1_000_000
    max_bytes = 512_000_000

    def line(self, item: BatchItem) -> Mapping[str, Any]:
        asked = self.embedder.question([item.text], None)
        del asked["model"]
        return {"custom_id": item.id, "body": asked}

    def job(self, file: str, mark: str, note: str) -> Mapping[str, Any]:
        del note
        return {
            "endpoint": "/v1/embeddings",
            "model": self.info.model,
            "input_files": [file],
            "metadata": {MARK: mark},
            "timeout_hours": 24,
        }

    def as_job(self, document: dict[str, Any]) -> dict[str, Any]:
        files = document.get("input_files") or [None]
        return {
            **document,
            "input_file_id": files[0],
            "output_file_id": document.get("output_file"),
            "error_file_id": document.get("error_file"),
            "request_counts": {
                "total": document.get("total_requests"),
                "completed": document.get("succeeded_requests"),
                "failed": document.get("failed_requests"),
            },
            # Of small jobs they are there as well, and again in the file.
            "outputs": None,
        }
