"""Batches of a service that takes all its requests in the call that creates the job.

::

    class AcmeBatch(InlineBatch):
        max_items, max_bytes = 10_000, 20_000_000

        def line(self, item):
            return {"id": item.id, "text": item.text}

        def job_of(self, lines, mark, note):
            return {"model": self.info.model, "requests": lines, "name": mark}

What a service with files has over this is a fence: once its input is deleted, no call that is still
on its way can make a job of it. Here one can, and is then found by its mark.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import orjson

from embedcore.errors import RemoteGone
from embedcore.provider.batch_calls import Terms, Wire
from embedcore.provider.batch_files import FilesBatch, mark_of
from embedcore.provider.types import BatchItem, ModelInfo

# The comma between two lines.
_BETWEEN: Final = 1


class InlineBatch(FilesBatch):
    """Implements ``embedcore.provider.protocol.BatchStrategy``. Shared freely between threads.

    ``max_bytes``: of the requests in one call. The input of a job is kept in this process from
    ``upload`` to ``discard``. A process that goes on after a crash has none: ``create`` is then
    ``RemoteGone``, proof that nothing was sent, and the core gives the texts again.

    Results are in the job itself (``outputs``, as ``as_job`` gives it), or in its files.
    """

    # An answer has a vector for each line.
    largest_job = 1_000_000_000

    def line(self, item: BatchItem) -> Mapping[str, Any]:
        """The request of one text, as JSON, with the item's id in it."""
        raise NotImplementedError(f"{type(self).__name__} must define line(item)")

    def job_of(self, lines: Sequence[Any], mark: str, note: str) -> Mapping[str, Any]:
        """What starts a job, as JSON, with ``lines`` and the mark in it. ``note``: of all lines."""
        raise NotImplementedError(f"{type(self).__name__} must define job_of(lines, mark, note)")

    def connect(self, info: ModelInfo, terms: Terms, wire: Wire) -> None:
        super().connect(info, terms, wire)
        self._lock = threading.Lock()
        self._inputs: dict[str, tuple[list[bytes], str]] = {}

    def sizes(self, items: Sequence[BatchItem]) -> list[int]:
        """The exact bytes of each item in the call. Raises ``InputRejected`` for what is no
        Unicode."""
        return [len(self._bare(item)) + _BETWEEN for item in items]

    def upload(self, items: Iterable[BatchItem], *, key: str) -> str:
        """Keep the lines. Nothing is sent.

        Raises ``RequestTooLarge`` for more than the service takes.
        """
        del key
        lines: list[bytes] = []
        notes: set[str] = set()
        size = 0
        for item in items:
            lines.append(self._bare(item))
            notes.add(self.note(item))
            size += len(lines[-1]) + _BETWEEN
            self.refuse_beyond(len(lines), size)
        name = f"inline-{secrets.token_hex(8)}"
        note = self.note_of(notes)
        with self._lock:
            self._inputs[name] = lines, note
        return name

    def create(self, input_ref: str, *, key: str) -> str:
        """Start the job, with one request that is never repeated."""
        with self._lock:
            found = self._inputs.get(input_ref)
        if found is None:
            raise RemoteGone(
                "the requests of the job are no longer in this process; nothing was sent",
                billed="no",
            )
        lines, note = found
        job = self.job_of([orjson.Fragment(line) for line in lines], mark_of(key), note)
        return self.calls.create(orjson.dumps(job), None)

    def discard(self, input_ref: str) -> None:
        """Forget the input. A job that was asked for may be created all the same."""
        with self._lock:
            self._inputs.pop(input_ref, None)

    def orphans(self, *, before: datetime) -> Iterator[str]:  # noqa: ARG002
        """None: nothing was uploaded."""
        return iter(())

    def _bare(self, item: BatchItem) -> bytes:
        return self.line_of(item).rstrip(b"\n")
