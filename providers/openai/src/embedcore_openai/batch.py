"""The Batch API strategy: many texts as one job, at half the price, within a day.

Uploading, listing, polling, reading and deleting cost nothing and may be repeated; only ``create``
starts what is billed. Facts of the API: its reference and description of August 2026, the SDK, and
recordings; what only the real API can show is in the README under *Assumptions*.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final

import orjson

from embedcore.errors import (
    ConfigurationError,
    EmbeddingError,
    InputNotReady,
    InvalidResponse,
    OutcomeUnknown,
    PermanentProviderError,
    PermissionDenied,
    ProviderUnavailable,
    RemoteGone,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.provider.batchstates import is_known, is_stopping
from embedcore.provider.types import (
    BatchItem,
    BatchLimits,
    BatchOutcome,
    BatchStatus,
    FoundJob,
    ModelInfo,
)
from embedcore_openai import batch_calls as jsonl, batch_objects as objects
from embedcore_openai.batch_calls import (
    BatchCalls,
    NewestFirst,
    Spool,
    all_pages,
    names_other_field,
)
from embedcore_openai.batch_objects import Job, LineReader
from embedcore_openai.encodings import Encodings
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.session import Session

# Guide "Batch API": 50,000 requests, as many inputs, 200 MB.
MAX_ITEMS: Final = 50_000
MAX_BYTES: Final = 200_000_000
_WINDOW_SECONDS: Final = 86_400.0
# The longest that the API allows.
_OUTPUT_SECONDS: Final = 2_592_000
_CLOCKS_DIFFER: Final = timedelta(hours=1)
# Words for the state of a file, without what is between their letters. OpenAI's own are "uploaded",
# "processed" and "error", and some servers never say more than the first, or nothing; Azure's begin
# with "pending".
_UNCLEAR: Final = frozenset({"", "uploaded"})
_PREPARED: Final = frozenset({"processed", "ready", "active", "available", "completed"})
_BROKEN: Final = frozenset({"error", "failed", "deleted", "deleting"})
_ENDED_ALREADY: Final = frozenset({400, 409, 422})

_log = logging.getLogger("embedcore.openai")


class OpenAIBatch:
    """Implements ``embedcore.provider.protocol.BatchStrategy``. Shared freely between threads.

    The API names the lines that it does not accept by their number, so ``poll`` gives their reasons
    by the place of the item among those that were uploaded.
    """

    def __init__(
        self, info: ModelInfo, options: OpenAIOptions, session: Session, encodings: Encodings
    ) -> None:
        self._info = info
        self._encodings = encodings
        self._options = options
        self._logged_words: set[str] = set()
        self._calls = BatchCalls(info, options, session)

    @property
    def limits(self) -> BatchLimits:
        """Batches are offered for OpenAI's own endpoints, and where the option ``batch`` says that
        there are any."""
        offered = self._options.batch
        return BatchLimits(
            offered=self._options.is_openai if offered is None else offered,
            max_items=MAX_ITEMS,
            max_bytes=MAX_BYTES,
            max_enqueued_tokens=self._options.max_enqueued_tokens,
            window=_WINDOW_SECONDS,
        )

    def sizes(self, items: Sequence[BatchItem]) -> list[int]:
        """The exact bytes of each item's line. Raises ``InputRejected`` for what is no Unicode."""
        # As was configured: what is learned by the time of the upload only makes a line shorter.
        encoding = self._options.encoding_of_lines
        return [len(self._line(item, encoding)) for item in items]

    def upload(self, items: Iterable[BatchItem], *, key: str) -> str:
        """Write the lines to a temporary file and send it, named after ``key``.

        Nothing is sent if ``items`` raises, or if the file would be larger than the API takes:
        ``RequestTooLarge``.
        """
        with _spool() as file:
            self._write(items, file)
            return self._calls.upload(objects.file_name(_mark(key)), file)

    def create(self, input_ref: str, *, key: str) -> str:
        """Start the job, with one request that is never repeated.

        A refusal because the input is not there yet, or not ready, is ``InputNotReady``.
        """
        _require_id(input_ref, "input file")
        body: dict[str, object] = {
            "input_file_id": input_ref,
            "endpoint": jsonl.ENDPOINT,
            "completion_window": "24h",
            "metadata": {objects.MARK: _mark(key)},
        }
        if self._options.batch_output_expiry:
            body["output_expires_after"] = {"anchor": "created_at", "seconds": _OUTPUT_SECONDS}
        try:
            return self._calls.create(orjson.dumps(body), input_ref)
        except (InputNotReady, RequestRejected, PermissionDenied) as error:
            refusal = error
        # Outside the handler, where what is raised would carry the refusal's way along.
        raise self._understood(refusal, input_ref).with_traceback(None)

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
                self._calls.batches(None)
            except RequestRejected as error:
                # There is no such API.
                return error
            except EmbeddingError as error:
                _log.debug("whether there is a batch API cannot be seen: %s", error)
        try:
            state = _folded(self._calls.file_status(input_ref))
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
        mark, first = _mark(key), since - _CLOCKS_DIFFER
        order = NewestFirst(first)
        found: dict[str, FoundJob] = {}
        unclear = 0
        try:
            for page in all_pages(self._calls.batches):
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
                f"the list of batches of {self._info.endpoint} has {unclear} entries that cannot "
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
        _require_id(input_ref, "input file")
        try:
            self._calls.delete(input_ref)
        except RemoteGone:
            return

    def orphans(self, *, before: datetime) -> Iterator[str]:
        """Files of ours by their name, which carries ``embedcore``, that no batch was made of.

        Raises ``InvalidResponse`` if the list of batches has an entry that may be made of one.
        """
        ours = {
            file.id: file.key
            for page in all_pages(self._calls.files)
            for file in page.entries
            if file.key is not None and file.created_at is not None and file.created_at < before
        }
        if not ours:
            return
        # Listed after the files: a batch that was made in between is seen.
        jobs = [job for page in all_pages(self._calls.batches) for job in page.entries]
        readable = (job.is_clear or (job.key, job.input_ref) != (None, None) for job in jobs)
        if not all(readable):
            raise InvalidResponse(
                f"the list of batches of {self._info.endpoint} has an entry that cannot be read: "
                "which files are used does not follow from it, and none is deleted",
                billed="no",
            )
        used = {job.input_ref for job in jobs} | {job.key for job in jobs}
        yield from (file for file, key in ours.items() if not {file, key} & used)

    def poll(self, job_id: str) -> BatchStatus:
        _require_id(job_id, "batch")
        status = self._calls.status(job_id)
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
        """Outcomes as they arrive; memory holds one line and one piece of the download."""
        _require_id(job_id, "batch")
        files = self._calls.result_files(job_id)
        if files is None:
            raise ProviderUnavailable(f"batch {job_id} has not ended: no results yet", billed="no")
        gone: list[RemoteGone] = []
        for file in files:
            try:
                yield from self._outcomes(file, job_id)
            except RemoteGone as error:
                # What the other file says is worth having all the same.
                gone.append(error)
        if gone:
            raise gone[0].with_traceback(None)

    def cancel(self, job_id: str) -> None:
        _require_id(job_id, "batch")
        try:
            self._calls.cancel(job_id)
            return
        except (RequestRejected, OutcomeUnknown) as error:
            if error.status not in _ENDED_ALREADY:
                raise
            refusal = error
        status = self.poll(job_id)
        if status.state == "running" and not is_stopping(status.detail):
            raise refusal.with_traceback(None)

    def __repr__(self) -> str:
        return f"OpenAIBatch({self._info.model!r}, endpoint={self._info.endpoint!r})"

    def _line(self, item: BatchItem, encoding: str) -> bytes:
        return jsonl.input_line(
            item,
            model=self._info.model,
            encoding=encoding,
            more=self._options.fields,
        )

    def _write(self, items: Iterable[BatchItem], file: Spool) -> None:
        count = size = 0
        encoding = self._encodings.in_lines(self._options.encoding_of_lines)
        for item in items:
            line = self._line(item, encoding)
            count, size = count + 1, size + len(line)
            if count > MAX_ITEMS or size > MAX_BYTES:
                raise RequestTooLarge(
                    f"a batch takes at most {MAX_ITEMS:,} texts and {MAX_BYTES:,} bytes; this one "
                    f"has {count:,} texts and {size:,} bytes, or more"
                )
            try:
                file.write(line)
            except OSError as error:
                raise _unwritable(error) from None
        if not count:
            raise RequestRejected("a batch needs at least one text", billed="no")
        try:
            file.seek(0)
        except OSError as error:
            raise _unwritable(error) from None

    def _outcomes(self, file: str, job_id: str) -> Iterator[BatchOutcome]:
        source = self._calls.open(file, job_id)
        reader = LineReader(
            shown=source.shown,
            errors_billed=self._options.batch_errors_billed,
            encoding=self._options.encoding_of_lines,
            asked=source.asked,
        )
        try:
            while line := source.next_line():
                yield reader.read(line)
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
            return self._calls.size(file)
        except PermanentProviderError:
            return None


def _folded(word: str) -> str:
    return "".join(filter(str.isalpha, word.casefold()))


def _mark(key: str) -> str:
    """The key as it is written into metadata and file names."""
    return key if objects.is_id(key) else hashlib.sha256(key.encode()).hexdigest()


def _require_id(value: str, what: str) -> None:
    if not objects.is_id(value):
        raise RequestRejected(f"that is not the id of a {what}: nothing was sent", billed="no")


def _spool() -> Spool:
    try:
        return Spool(tempfile.TemporaryFile(buffering=0))
    except OSError as error:
        raise _unwritable(error) from None


def _unwritable(error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"the temporary folder {tempfile.gettempdir()} cannot hold a batch's input "
        f"({error.strerror}): make room, or set TMPDIR"
    )
