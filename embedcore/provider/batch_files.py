"""Batches of a service with files: upload, create, poll, download.

A subclass says what the service calls things, what a line asks for, and what a job is::

    class AcmeBatch(FilesBatch):
        max_items, max_bytes, window = 50_000, 200_000_000, 86_400.0

        def line(self, item):
            return {"custom_id": item.id, "body": {"input": item.text}}

        def job(self, file, mark, note):
            return {"input_file_id": file, "metadata": {"embedcore": mark}}

Uploading, listing, polling, reading and deleting cost nothing and may be repeated; only ``create``
starts what is billed. Rows are joined by the id that their line carries, never by their place.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import orjson

from embedcore.errors import (
    EmbeddingError,
    InputNotReady,
    InputRejected,
    InvalidResponse,
    OutcomeUnknown,
    PermanentProviderError,
    PermissionDenied,
    ProviderUnavailable,
    RemoteGone,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.provider import batch_objects as objects
from embedcore.provider.base import unit_length
from embedcore.provider.batch_calls import (
    BatchCalls,
    FilesApi,
    Terms,
    Wire,
    names_other_field,
)
from embedcore.provider.batch_http import HttpWire, terms_of
from embedcore.provider.batch_lines import LineReader
from embedcore.provider.batch_listing import NewestFirst, Paging, all_pages
from embedcore.provider.batch_spool import Spool, no_room, spool
from embedcore.provider.batchstates import is_known, is_stopping
from embedcore.provider.types import (
    BatchItem,
    BatchLimits,
    BatchOutcome,
    BatchStatus,
    FoundJob,
    ModelInfo,
)

if TYPE_CHECKING:
    from embedcore.provider.batch_objects import Job, Results
    from embedcore.provider.http_embedder import HttpEmbedder

# What is stable; the rest is for the strategies of this repository.
__all__ = ["MARK", "FilesBatch", "Paging"]

MARK: Final = objects.MARK
# Between an uploaded file and what ``create`` must know of its lines.
_NOTE: Final = ":"
_CLOCKS_DIFFER: Final = timedelta(hours=1)
# Words for the state of a file, without what is between their letters. OpenAI's own are "uploaded",
# "processed" and "error", and some servers never say more than the first, or nothing; Azure's begin
# with "pending".
_UNCLEAR: Final = frozenset({"", "uploaded"})
_PREPARED: Final = frozenset({"processed", "ready", "active", "available", "completed"})
_BROKEN: Final = frozenset({"error", "failed", "deleted", "deleting"})
_ENDED_ALREADY: Final = frozenset({400, 409, 422})

_log = logging.getLogger("embedcore.batches")


class FilesBatch(FilesApi):
    """Implements ``embedcore.provider.protocol.BatchStrategy``. Shared freely between threads.

    ``max_items``, ``max_bytes``: of one input, as the service takes them; ``window``: seconds in
    which a job ends; None for no limit. ``max_enqueued_tokens``, ``offered``: as in
    ``BatchLimits``; an instance may have its own. ``verify_rows``: as there.

    A service names the lines that it does not accept by their number, so ``poll`` gives their
    reasons by the place of the item among those that were uploaded.
    """

    max_items: int | None = None
    max_bytes: int | None = None
    window: float | None = 86_400.0
    max_enqueued_tokens: int | None = None
    offered: bool = True
    verify_rows: int = 0
    # Whether vectors are given length 1, as those of single requests are.
    normalises: bool = False

    def __init__(self, embedder: HttpEmbedder) -> None:
        """``embedder``: what sends the same texts one request at a time. Its options may be
        ``BatchOptions``."""
        self.embedder = embedder
        self.normalises = embedder.normalises
        terms, enqueued = terms_of(embedder.options)
        if enqueued is not None:
            self.max_enqueued_tokens = enqueued
        self.connect(embedder.info, terms, HttpWire(embedder, self))

    def connect(self, info: ModelInfo, terms: Terms, wire: Wire) -> None:
        """What a constructor has to do that has no ``HttpEmbedder``."""
        self.info = info
        self._terms = terms
        self._logged_words: set[str] = set()
        self.calls = BatchCalls(info, terms, wire, self)

    def line(self, item: BatchItem) -> Mapping[str, Any]:
        """The line of one text, as JSON, with the item's id in it."""
        raise NotImplementedError(f"{type(self).__name__} must define line(item)")

    def job(self, file: str, mark: str, note: str) -> Mapping[str, Any]:
        """What starts a job of an uploaded file, as JSON, with the mark in it. ``note``: of its
        lines."""
        raise NotImplementedError(f"{type(self).__name__} must define job(file, mark, note)")

    def note(self, item: BatchItem) -> str:  # noqa: ARG002
        """What the job must say of all its lines alike, in a word; it is kept with the file."""
        return ""

    def as_line(self, document: dict[str, Any]) -> dict[str, Any]:
        """A line of the results in OpenAI's form: ``custom_id``, ``response`` with ``status_code``
        and ``body``, ``error``. Replace it only where the service has another one."""
        return document

    @property
    def limits(self) -> BatchLimits:
        return BatchLimits(
            offered=self.offered,
            max_items=self.max_items,
            max_bytes=self.max_bytes,
            max_enqueued_tokens=self.max_enqueued_tokens,
            window=self.window,
            verify_rows=self.verify_rows,
        )

    def sizes(self, items: Sequence[BatchItem]) -> list[int]:
        """The exact bytes of each item's line. Raises ``InputRejected`` for what is no Unicode."""
        return [len(self.line_of(item)) for item in items]

    def line_of(self, item: BatchItem) -> bytes:
        """The line of one text, with its line end. Raises ``InputRejected`` for no Unicode."""
        return in_json(self.line(item), item)

    def upload(self, items: Iterable[BatchItem], *, key: str) -> str:
        """Write the lines to a temporary file and send it, named after ``key``.

        Nothing is sent if ``items`` raises, or if the file would be larger than the service takes:
        ``RequestTooLarge``.
        """
        with spool() as file:
            note = self._write(items, file)
            name = self.calls.upload(objects.file_name(mark_of(key), note), file)
        return _reference(name, note)

    def create(self, input_ref: str, *, key: str) -> str:
        """Start the job, with one request that is never repeated.

        A refusal because the input is not there yet, or not ready, is ``InputNotReady``.
        """
        file, note = _parts(input_ref)
        body = orjson.dumps(self.job(file, mark_of(key), note))
        try:
            return self.calls.create(body, file)
        except (InputNotReady, RequestRejected, PermissionDenied) as error:
            refusal = error
        # Outside the handler, where what is raised would carry the refusal's way along.
        raise self._understood(refusal, file).with_traceback(None)

    def _understood(
        self, refusal: InputNotReady | RequestRejected | PermissionDenied, input_ref: str
    ) -> EmbeddingError:
        """A refused ``create`` by the state of its file: does waiting help?

        No wording decides it. To be wrong about that only costs time, and what was said is shown
        meanwhile.
        """
        if refusal.billed != "no":
            return refusal
        if refusal.status == 404:
            try:
                self.calls.batches(None)
            except RequestRejected as error:
                # There is no such API.
                return error
            except EmbeddingError as error:
                _log.debug("whether there is a batch API cannot be seen: %s", error)
        try:
            state = _folded(self.calls.file_status(input_ref))
        except EmbeddingError:
            # Nor is the file to be seen, perhaps: what was said of the job is all that is known.
            return refusal
        if state in _BROKEN:
            return RequestRejected(
                f"{refusal.message}; the file is {state!r}",
                billed="no",
                status=refusal.status,
                code=refusal.code,
            )
        if state in _PREPARED or isinstance(refusal, InputNotReady):
            return refusal
        elsewhere = names_other_field(refusal.message)
        if state in _UNCLEAR and (elsewhere or isinstance(refusal, PermissionDenied)):
            return refusal
        waits = InputNotReady(
            f"{refusal.message}; the file is {state or 'without a state'!r}",
            billed="no",
            status=refusal.status,
            code=refusal.code,
        )
        waits.free_by_status = refusal.free_by_status
        return waits

    def find(self, *, key: str, input_ref: str, since: datetime) -> list[FoundJob]:
        """Jobs that carry the key or the input, by the time of their creation.

        The list is read until everything on a page is older than an hour before ``since``, or to
        its end. Jobs without a time come last. Entries that cannot be used are passed over where
        they say that they are others'. If none is found and one may be it, that is
        ``InvalidResponse``: from such a list it does not follow that there is none.
        """
        mark, first = mark_of(key), since - _CLOCKS_DIFFER
        input_ref = input_ref.partition(_NOTE)[0]
        order = NewestFirst(first)
        found: dict[str, FoundJob] = {}
        unclear = 0
        try:
            for page in self._jobs():
                unclear += self._look_through(page.entries, order, found, (mark, input_ref), first)
                times = [job.created_at for job in page.entries]
                # A whole page of it: some lists are not quite in order.
                if order.has_passed and all(time is None or time < first for time in times):
                    break
        except (InvalidResponse, RequestRejected):
            # From a part of a list follows what is in it, and nothing else.
            if not found:
                raise
        if unclear and not found:
            raise InvalidResponse(
                f"the list of batches of {self.info.endpoint} has {unclear} entries that cannot "
                "be read, and one may be the job that is looked for: nothing follows from it",
                billed="no",
            )
        return sorted(
            found.values(), key=lambda job: (job.created_at is None, job.created_at or since)
        )

    def _look_through(
        self,
        jobs: Sequence[Job],
        order: NewestFirst,
        found: dict[str, FoundJob],
        wanted: tuple[str, str],
        first: datetime,
    ) -> int:
        """Add to ``found``; returns how many entries may be what is wanted and cannot be used."""
        unclear = 0
        for job in jobs:
            is_wanted = job.is_of(*wanted)
            is_old = order.has_passed or (job.created_at is not None and job.created_at < first)
            if is_wanted and job.found is not None:
                found[job.found.id] = job.found
            elif is_wanted is None and not is_old:
                unclear += 1
            if job.found is not None:
                order.see(job.created_at)
        return unclear

    def discard(self, input_ref: str) -> None:
        file, _ = _parts(input_ref)
        try:
            self.calls.delete(file)
        except RemoteGone:
            return

    def orphans(self, *, before: datetime) -> Iterator[str]:
        """Files of ours by their name, which carries ``embedcore``, that no batch was made of.

        Raises ``InvalidResponse`` if the list of batches has an entry that may be made of one.
        """
        ours = {
            file.id: file
            for page in self._uploads()
            for file in page.entries
            if file.key is not None and file.created_at is not None and file.created_at < before
        }
        if not ours:
            return
        # Listed after the files: a batch that was made in between is seen.
        jobs = [job for page in self._jobs() for job in page.entries]
        readable = (job.is_clear or (job.key, job.input_ref) != (None, None) for job in jobs)
        if not all(readable):
            raise InvalidResponse(
                f"the list of batches of {self.info.endpoint} has an entry that cannot be read: "
                "which files are used does not follow from it, and none is deleted",
                billed="no",
            )
        used = {job.input_ref for job in jobs} | {job.key for job in jobs}
        unused = (file for file in ours.values() if not {file.id, file.key} & used)
        yield from (_reference(file.id, file.note) for file in unused)

    def poll(self, job_id: str) -> BatchStatus:
        _require_id(job_id, "batch")
        status = self.calls.status(job_id)
        word = status.detail
        if status.state == "running" and not is_known(word) and word not in self._logged_words:
            self._logged_words.add(word)
            _log.warning(
                "batch %s is %r, a state that is not known; it counts as running",
                job_id,
                word,
            )
        return status

    def results(self, job_id: str) -> Iterator[BatchOutcome]:
        """Outcomes as they arrive; memory holds one line and one piece of the download.

        Fewer lines than the service counts are ``InvalidResponse``, after the last one.
        """
        _require_id(job_id, "batch")
        found = self.calls.results(job_id)
        if found is None:
            raise ProviderUnavailable(f"batch {job_id} has not ended: no results yet", billed="no")
        lines = 0
        gone: list[RemoteGone] = []
        for file in found.files:
            try:
                for outcome in self._outcomes(file, job_id):
                    lines += 1
                    yield outcome
            except RemoteGone as error:
                # What the other file says is worth having all the same.
                gone.append(error)
        if not found.files:
            for outcome in self._in_the_job(found, job_id):
                lines += 1
                yield outcome
        if gone:
            raise gone[0].with_traceback(None)
        if lines < found.counted:
            raise InvalidResponse(
                f"its provider counts {found.counted} lines of batch {job_id} done, and there are "
                f"results for {lines}",
                billed="no",
            )

    def cancel(self, job_id: str) -> None:
        _require_id(job_id, "batch")
        try:
            self.calls.cancel(job_id)
            return
        except (RequestRejected, OutcomeUnknown) as error:
            if error.status not in _ENDED_ALREADY:
                raise
            refusal = error
        status = self.poll(job_id)
        if status.state == "running" and not is_stopping(status.detail):
            raise refusal.with_traceback(None)

    def __repr__(self) -> str:
        name, info = type(self).__name__, self.info
        return f"{name}({info.model!r}, endpoint={info.endpoint!r})"

    def _jobs(self) -> Iterator[Any]:
        return all_pages(self.calls.batches, named=self.paging.by == "token")

    def _uploads(self) -> Iterator[Any]:
        return all_pages(self.calls.uploads, named=self.file_paging.by == "token")

    def _write(self, items: Iterable[BatchItem], file: Spool) -> str:
        """The lines into the file; returns what is noted of them all."""
        count = size = 0
        notes: set[str] = set()
        for item in items:
            line = self.line_of(item)
            count, size = count + 1, size + len(line)
            notes.add(self.note(item))
            self.refuse_beyond(count, size)
            try:
                file.write(line)
            except OSError as error:
                raise no_room(error) from None
        note = self.note_of(notes)
        try:
            file.seek(0)
        except OSError as error:
            raise no_room(error) from None
        return note

    def note_of(self, notes: set[str]) -> str:
        """What is noted of all lines alike. Raises ``RequestRejected`` where they differ, and where
        there are none."""
        if not notes:
            raise RequestRejected("a batch needs at least one text", billed="no")
        if len(notes) > 1:
            raise RequestRejected("the texts of one job must be of one input type", billed="no")
        return next(iter(notes))

    def refuse_beyond(self, count: int, size: int) -> None:
        """Raises ``RequestTooLarge`` for more items or bytes than the service takes at once."""
        limits = self.limits
        if count > (limits.max_items or count) or size > (limits.max_bytes or size):
            raise RequestTooLarge(
                f"a batch takes at most {limits.max_items or count:,} texts and "
                f"{limits.max_bytes or size:,} bytes; this one has {count:,} texts and {size:,} "
                "bytes, or more"
            )

    def _reader(self, shown: objects.Shown, asked: Any = None) -> LineReader:
        is_own = type(self).as_line is not FilesBatch.as_line
        return LineReader(
            shown=shown,
            errors_billed=self._terms.errors_billed,
            advice=self.advice,
            asked=asked,
            as_line=self.as_line if is_own else None,
        )

    def _in_the_job(self, found: Results, job_id: str) -> Iterator[BatchOutcome]:
        shown = self.calls.context(f"results of batch {job_id}").shown
        yield from map(self._finished, map(self._reader(shown).of, found.rows))

    def _finished(self, outcome: BatchOutcome) -> BatchOutcome:
        if self.normalises and outcome.vector is not None:
            vector = outcome.vector.copy()
            unit_length(vector[None])
            return replace(outcome, vector=vector)
        return outcome

    def _outcomes(self, file: str, job_id: str) -> Iterator[BatchOutcome]:
        source = self.calls.open(file, job_id)
        reader = self._reader(source.shown, source.asked)
        try:
            while line := source.next_line():
                yield self._finished(reader.read(line))
        finally:
            source.close()
        size = source.received if source.delimited else self._size(file)
        if source.ends_midway and size == source.received:
            # Nothing broke: this is all that the server has of it, for now or for good.
            raise InvalidResponse(
                f"the results of batch {job_id} end in the middle of a line", billed="no"
            )
        if source.ends_midway or size not in (None, source.received):
            raise ProviderUnavailable(f"the download for batch {job_id} broke off", billed="no")

    def _size(self, file: str) -> int | None:
        try:
            return self.calls.size(file)
        except PermanentProviderError:
            return None


def _folded(word: str) -> str:
    return "".join(filter(str.isalpha, word.casefold()))


def mark_of(key: str) -> str:
    """The key as it is written into metadata and file names."""
    return key if objects.is_id(key) else hashlib.sha256(key.encode()).hexdigest()


def in_json(document: Mapping[str, Any], item: BatchItem) -> bytes:
    """A line with its line end. Raises ``InputRejected`` for a text that is no Unicode."""
    try:
        return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        raise InputRejected(
            f"the text of item {item.id!r} is no valid Unicode (a lone surrogate)",
            reason="no valid Unicode",
        ) from None


def _reference(file: str, note: str) -> str:
    return f"{file}{_NOTE}{note}" if note else file


def _parts(input_ref: str) -> tuple[str, str]:
    """The file that a reference names, and what was noted with it."""
    file, _, note = input_ref.partition(_NOTE)
    _require_id(file, "input file")
    return file, note


def _require_id(value: str, what: str) -> None:
    if not objects.is_id(value):
        raise RequestRejected(f"that is not the id of a {what}: nothing was sent", billed="no")
