"""Gemini's batch API with files: one text a line, each with a key of its own.

Jobs that have their requests in the call itself give them back in any order, and without a key that
is known to come back. Files have the key in each row; a report says that it may be another row's,
so that some rows of each job are compared with vectors of single requests (``verify_rows``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from embedcore.provider.batch_files import MARK, FilesBatch, Paging
from embedcore.provider.batch_spool import Form, Spool, related
from embedcore.provider.types import BatchItem

_BEFORE: Final = "embedcore-"
_PAGES: Final[Any] = {
    "by": "token",
    "size": "pageSize",
    "cursor": "pageToken",
    "following": "nextPageToken",
}


class GeminiBatch(FilesBatch):
    """Implements ``BatchStrategy``. Of its guide: 2 GB a file, which is kept for 48 hours, as a job
    is that has not ended; of recordings: the form of jobs and rows."""

    stop = ":cancel"
    content = ":download"
    paging = Paging(entries="operations", **_PAGES)
    file_paging = Paging(entries="files", **_PAGES)
    max_items = 50_000
    max_bytes = 2_000_000_000
    window = 172_800.0
    verify_rows = 16

    def create_path(self) -> str:
        return f"/models/{self.info.model}:asyncBatchEmbedContent"

    def content_query(self) -> Mapping[str, str]:
        return {"alt": "media"}

    def file_query(self) -> Mapping[str, str]:
        return {}

    def upload_root(self, base_url: str) -> str:
        scheme, _, rest = base_url.partition("://")
        host, _, version = rest.partition("/")
        return f"{scheme}://{host}/upload/{version}"

    def upload_form(self, name: str, file: Spool) -> Form:
        told = {"file": {"displayName": name, "mimeType": "application/jsonl"}}
        return related(orjson.dumps(told), file, more={"X-Goog-Upload-Protocol": "multipart"})

    def line(self, item: BatchItem) -> Mapping[str, Any]:
        asked: Any = self.embedder.question([item.text], self.embedder.word_of(item.input_type))
        (request,) = asked["requests"]
        del request["model"]
        return {"key": item.id, "request": request}

    def job(self, file: str, mark: str, note: str) -> Mapping[str, Any]:
        del note
        return {
            "batch": {"displayName": _BEFORE + mark, "inputConfig": {"fileName": f"files/{file}"}}
        }

    def as_file(self, document: dict[str, Any]) -> dict[str, Any]:
        told = document.get("file", document)
        size = told.get("sizeBytes")
        return {
            "id": told["name"].removeprefix("files/"),
            "filename": told.get("displayName"),
            "created_at": told.get("createTime"),
            "status": told.get("state"),
            "bytes": None if size is None else int(size),
        }

    def as_job(self, document: dict[str, Any]) -> dict[str, Any]:
        told = document.get("metadata") or {}
        stats, error = told.get("batchStats") or {}, document.get("error")
        output = (document.get("response") or told.get("output") or {}).get("responsesFile")
        source = (told.get("inputConfig") or {}).get("fileName")
        name = str(told.get("displayName", ""))
        return {
            "id": document["name"].removeprefix("batches/"),
            "status": "failed" if error else told.get("state"),
            "metadata": {MARK: name.removeprefix(_BEFORE)} if name.startswith(_BEFORE) else {},
            "input_file_id": source and source.removeprefix("files/"),
            "output_file_id": output and output.removeprefix("files/"),
            "created_at": told.get("createTime"),
            "request_counts": {
                "total": _number(stats, "requestCount"),
                "completed": _number(stats, "successfulRequestCount"),
                "failed": _number(stats, "failedRequestCount"),
            },
            "errors": [error] if error else None,
        }

    def as_line(self, document: dict[str, Any]) -> dict[str, Any]:
        row, error = document.get("response") or {}, document.get("error")
        usage = row.get("usageMetadata") or {}
        tokens = row.get("tokenCount", usage.get("promptTokenCount"))
        body = {
            "data": [{"embedding": row["embedding"]["values"]}] if row else [],
            "usage": {"total_tokens": tokens},
        }
        return {
            "custom_id": document.get("key"),
            "response": {"status_code": 200, "body": body} if row else None,
            "error": error,
        }


def _number(stats: dict[str, Any], name: str) -> int:
    """A count; those that are zero are left out, and the others are texts."""
    return int(stats.get(name, 0))
