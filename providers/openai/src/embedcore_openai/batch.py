"""The Batch API: many texts as one job, at half the price, within a day.

Facts of the API: its reference and description of August 2026, the SDK, and recordings; what only
the real API can show is in the README under *Assumptions*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from embedcore.provider.batch_calls import Terms
from embedcore.provider.batch_files import MARK, FilesBatch, in_json
from embedcore.provider.types import BatchItem, ModelInfo
from embedcore_openai.encodings import Encodings, advice
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.session import Session

if TYPE_CHECKING:
    from embedcore.provider.batch_errors import Context
    from embedcore.provider.batch_spool import Spool
    from embedcore.provider.http import Answer, Call

ENDPOINT: Final = "/v1/embeddings"
# The longest that the API allows.
_OUTPUT_SECONDS: Final = 2_592_000


class OpenAIBatch(FilesBatch):
    """Implements ``embedcore.provider.protocol.BatchStrategy``. Shared freely between threads."""

    # Guide "Batch API": 50,000 requests, as many inputs, 200 MB, within 24 hours.
    max_items = 50_000
    max_bytes = 200_000_000

    def __init__(
        self, info: ModelInfo, options: OpenAIOptions, session: Session, encodings: Encodings
    ) -> None:
        terms = Terms(
            timeout=options.timeout,
            transfer_timeout=options.transfer_timeout,
            refusals_billed=options.refusals_billed,
            errors_billed=options.batch_errors_billed,
        )
        self._options = options
        self._encodings = encodings
        # For OpenAI's own endpoints, and where the option says that there are any.
        self.offered = options.is_openai if options.batch is None else options.batch
        self.max_enqueued_tokens = options.max_enqueued_tokens
        self.connect(info, terms, _Wire(session))

    def line(self, item: BatchItem) -> Mapping[str, Any]:
        return self._line(item, self._encodings.in_lines(self._options.encoding_of_lines))

    def sizes(self, items: Sequence[BatchItem]) -> list[int]:
        """The exact bytes of each item's line. Raises ``InputRejected`` for what is no Unicode."""
        # As was configured: what is learned by the time of the upload only makes a line shorter.
        encoding = self._options.encoding_of_lines
        return [len(in_json(self._line(item, encoding), item)) for item in items]

    def job(self, file: str, mark: str, note: str) -> Mapping[str, Any]:
        del note
        job: dict[str, Any] = {
            "input_file_id": file,
            "endpoint": ENDPOINT,
            "completion_window": "24h",
            "metadata": {MARK: mark},
        }
        if self._options.batch_output_expiry:
            job["output_expires_after"] = {"anchor": "created_at", "seconds": _OUTPUT_SECONDS}
        return job

    def advice(self, said: str) -> str:
        return advice(said, self._options.encoding_of_lines)

    def _line(self, item: BatchItem, encoding: str) -> Mapping[str, Any]:
        body: dict[str, object] = {"model": self.info.model, "input": item.text}
        if encoding != "omit":
            body["encoding_format"] = encoding
        return {
            "custom_id": item.id,
            "method": "POST",
            "url": ENDPOINT,
            "body": {**body, **(self._options.fields or {})},
        }


@dataclass(frozen=True, slots=True)
class _Wire:
    """Implements ``batch_calls.Wire`` over the SDK."""

    session: Session

    def key(self) -> str | None:
        return self.session.key()

    def secrets(self, key: str | None) -> list[str]:
        return self.session.secrets(key)

    def send(
        self, call: Call, key: str | None, context: Context, file: tuple[str, Spool] | None
    ) -> Answer:
        return self.session.send_by_sdk(call, key, context, file)
