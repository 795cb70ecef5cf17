"""Calls of the Batch API: upload, create, list, poll, download, and the lines of its files.

Whatever goes wrong on the way is handed back instead of raised, up to where no frame holds the key
or an answer any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Generic, TypeVar

import orjson

from embedcore.errors import (
    EmbeddingError,
    InputNotReady,
    InputRejected,
    InvalidResponse,
    ProviderError,
)
from embedcore.provider.error_bodies import read_body
from embedcore.provider.http import Answer, Call, Download, UnreadableBody, without_frames
from embedcore.provider.replies import BadReply
from embedcore.provider.types import BatchItem, BatchStatus, ModelInfo
from embedcore_openai import batch_objects as objects, errors
from embedcore_openai.errors import BATCH_API, Context
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.session import Session

ENDPOINT: Final = "/v1/embeddings"

# Of any honest line: a vector of 16,384 dimensions as text, and as much again.
_LONGEST: Final = 1_000_000
_BOM: Final = b"\xef\xbb\xbf"


class Spool(io.BufferedRandom):
    """A temporary file to send."""

    def close(self) -> None:
        # What could not be written, for want of room, need not be written now.
        with contextlib.suppress(OSError):
            super().close()


class HalfLine(Exception):
    """A body has come to its end in the middle of a line."""


def input_line(
    item: BatchItem,
    *,
    model: str,
    encoding: str,
    more: Mapping[str, object] | None = None,
) -> bytes:
    """The line of one text, with its line end; ``more``: further fields of its request.

    Raises ``InputRejected`` for a text that is not Unicode.
    """
    body: dict[str, object] = {"model": model, "input": item.text}
    if encoding != "omit":
        body["encoding_format"] = encoding
    line = {
        "custom_id": item.id,
        "method": "POST",
        "url": ENDPOINT,
        "body": {**body, **(more or {})},
    }
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        raise InputRejected(
            f"the text of item {item.id!r} is no valid Unicode (a lone surrogate)",
            reason="no valid Unicode",
        ) from None


def whole_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a body that comes in pieces of any size, without blank ones and line ends.

    Keeps no more than one piece and one line. Raises ``HalfLine`` instead of giving half a last
    line, and ``UnreadableBody`` for a line without end.
    """
    begun: list[bytes] = []
    size = 0
    first = True
    for piece in pieces:
        at = 0
        while (end := piece.find(b"\n", at)) >= 0:
            line = piece[at:end]
            at = end + 1
            if begun:
                line = b"".join((*begun, line))
                begun, size = [], 0
            if first:
                line, first = line.removeprefix(_BOM), False
            # A vector's line has nothing to strip, and is not copied.
            if line := line.strip():
                yield line
        begun.append(piece[at:])
        size += len(piece) - at
        if size > _LONGEST:
            raise UnreadableBody(f"a line of it is longer than {_LONGEST:,} bytes")
    last = b"".join(begun)
    last = (last.removeprefix(_BOM) if first else last).strip()
    if last:
        if not _is_whole(last):
            raise HalfLine
        yield last


def _is_whole(line: bytes) -> bool:
    """No part of a JSON object from its beginning on is itself one."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


PAGE_SIZE: Final = 100
# 2,000 batches may be created per hour; no account has more than ten million of them.
_MOST_PAGES: Final = 100_000

Listed = TypeVar("Listed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[Listed]):
    """``ids``: of the entries that have one, in order. ``more``: the server says that there are
    more."""

    entries: Sequence[Listed]
    ids: Sequence[str]
    more: bool


def page_of(
    document: dict[str, Any], read: Callable[[object], Listed | None], name: str
) -> Page[Listed]:
    """A page with what ``read`` makes of its entries; those of which it makes None are left out.

    An entry that is null, of another type or without an id takes nothing from the others. Raises
    ``BadReply`` for what is no list at all.
    """
    data = document.get("data")
    if not isinstance(data, list):
        raise BadReply(f"it is not a list of {name}")
    found = [entry.get("id") for entry in data if isinstance(entry, dict)]
    ids = [each for each in found if isinstance(each, str)]
    return Page(
        entries=[entry for entry in map(read, data) if entry is not None],
        ids=ids,
        more=document.get("has_more") is True,
    )


def all_pages(fetch: Callable[[str | None], Page[Listed]]) -> Iterator[Page[Listed]]:
    """Every page of a list. ``fetch`` gets the id after which the page begins.

    That there is no more is believed only when the page after it brings nothing new. Raises
    ``InvalidResponse`` when the server says that there is more and does not give it.
    """
    seen: set[str] = set()
    after: str | None = None
    for _ in range(_MOST_PAGES):
        page = fetch(after)
        fresh = [each for each in page.ids if each not in seen]
        if fresh or not page.ids:
            yield page
        if not fresh:
            if page.more:
                break
            return
        seen.update(fresh)
        after = page.ids[-1]
    raise InvalidResponse(
        "the list cannot be read to its end: the server says that there is more and repeats "
        "itself. Nothing follows from a part of a list",
        billed="no",
    )


class NewestFirst:
    """Notices when everything that is still to come was created before a moment.

    That holds only in a list which is seen to run from new to old, and in which every entry has
    its time.
    """

    def __init__(self, moment: datetime) -> None:
        self._moment = moment
        self._newest: datetime | None = None
        self._last: datetime | None = None
        self._descends = True

    @property
    def has_passed(self) -> bool:
        """Whether what follows the entries so far is older than the moment."""
        if not self._descends or self._newest is None or self._last is None:
            return False
        return self._newest > self._last and self._last < self._moment

    def see(self, time: datetime | None) -> None:
        """The time of the next entry."""
        if time is None or (self._last is not None and time > self._last):
            self._descends = False
        if time is not None:
            self._newest = self._newest or time
            self._last = time


_LARGEST_OBJECT: Final = 64_000_000
# A file of 200 MB is looked at before the answer comes.
_WAITS_AFTER_UPLOAD: Final = 5

# A server that does not find the input, or finds that it cannot be used, answers one of these; what
# it says besides names the file, but for those that can mean nothing else.
_ABOUT_THE_INPUT: Final = frozenset({400, 404, 412, 422, 423, 425})
_ONLY_ABOUT_THE_INPUT: Final = frozenset({404, 423, 425})
# Words that speak of the input, or of what still happens to it, whatever its state is.
_OF_AN_INPUT: Final = ("file", "upload", "process", "pending", "not ready", "validat")
# What else the request for a job names: a refusal that is about one of these does not pass.
_OTHER_FIELDS: Final = ("endpoint", "completion_window", "metadata", "output_expires_after")

T = TypeVar("T")
Document = dict[str, Any]
Read = Callable[[Document, objects.Shown], T]


class Source:
    """The lines of one result file, as they arrive. ``ends_midway``: it had half a last line."""

    def __init__(self, download: Download, context: Context) -> None:
        self._download = download
        self._context = context
        self._lines = whole_lines(download.pieces())
        self.ends_midway = False

    @property
    def asked(self) -> Context:
        """What the job was, for judging what its lines say."""
        return self._context

    @property
    def delimited(self) -> bool:
        return self._download.delimited

    @property
    def received(self) -> int:
        return self._download.received

    def shown(self, message: str) -> str:
        return self._context.shown(message)

    @without_frames
    def next_line(self) -> bytes | None:
        """None at the end."""
        try:
            return next(self._lines, None)
        except HalfLine:
            self.ends_midway = True
            return None
        except Exception as error:  # noqa: BLE001 - of the socket, of HTTP
            raise errors.from_download(error, self._context) from None

    def close(self) -> None:
        self._download.close()


class BatchCalls:
    """Raises the errors under ``ProviderError``, and ``ConfigurationError``."""

    def __init__(self, info: ModelInfo, options: OpenAIOptions, session: Session) -> None:
        self._info = info
        self._options = options
        self._session = session

    def upload(self, name: str, file: Spool) -> str:
        call = Call(
            path="/files",
            timeout=self._options.timeout * _WAITS_AFTER_UPLOAD,
            longest=self._options.transfer_timeout,
            max_bytes=_LARGEST_OBJECT,
        )
        return self._ask(call, _id, BATCH_API, file=(name, file))

    def create(self, body: bytes, input_ref: str) -> str:
        call = self._call("POST", "/batches", body=body)
        return self._ask(call, _id, f"input file {input_ref}", creates=True)

    def delete(self, file: str) -> None:
        self._ask(self._call("DELETE", f"/files/{file}"), _deleted, f"file {file}")

    def file_status(self, file: str) -> str:
        """The server's word for the state of a file; empty where it has none."""
        return self._ask(self._call("GET", f"/files/{file}"), _word, f"file {file}")

    def size(self, file: str) -> int | None:
        """The bytes that a file should have."""
        return self._ask(self._call("GET", f"/files/{file}"), _size, f"file {file}")

    def status(self, job: str) -> BatchStatus:
        def read(document: Document, shown: objects.Shown) -> BatchStatus:
            encoding = self._options.encoding_of_lines
            return objects.status_of(document, job_id=job, shown=shown, encoding=encoding)

        return self._ask(self._call("GET", f"/batches/{job}"), read, f"batch {job}")

    def result_files(self, job: str) -> list[str] | None:
        def read(document: Document, shown: objects.Shown) -> list[str] | None:
            return objects.result_files(document, job_id=job, shown=shown)

        return self._ask(self._call("GET", f"/batches/{job}"), read, f"batch {job}")

    def cancel(self, job: str) -> None:
        self._do(self._call("POST", f"/batches/{job}/cancel"), f"batch {job}")

    def batches(self, after: str | None) -> Page[objects.Job]:
        def read(document: Document, _: objects.Shown) -> Page[objects.Job]:
            return page_of(document, objects.job_of, "batches")

        return self._ask(self._call("GET", "/batches", query=_page(after)), read, BATCH_API)

    def files(self, after: str | None) -> Page[objects.StoredFile]:
        def read(document: Document, _: objects.Shown) -> Page[objects.StoredFile]:
            return page_of(document, objects.file_of, "files")

        query = {"purpose": "batch", **_page(after)}
        return self._ask(self._call("GET", "/files", query=query), read, BATCH_API)

    @without_frames
    def open(self, file: str, job: str) -> Source:
        """The content of a result file of a job, from its beginning."""
        call = Call(
            method="GET",
            path=f"/files/{file}/content",
            stream=True,
            timeout=self._options.timeout,
            longest=self._options.transfer_timeout,
        )
        answer, context = self._sent(call, f"results of batch {job}", creates=False)
        if answer.download is None:
            raise errors.from_batch_answer(answer, context)
        return Source(answer.download, context)

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Call:
        return Call(
            method=method,
            path=path,
            query=query or {},
            headers={} if body is None else {"Content-Type": "application/json"},
            body=body,
            timeout=self._options.timeout,
            max_bytes=_LARGEST_OBJECT,
        )

    @without_frames
    def _ask(
        self,
        call: Call,
        read: Read[T],
        about: str,
        *,
        creates: bool = False,
        file: tuple[str, Spool] | None = None,
    ) -> T:
        answer, context = self._sent(call, about, creates, file)
        try:
            return read(_document(answer), context.shown)
        except BadReply as bad:
            raise errors.from_bad_batch_reply(bad, answer, context) from None
        finally:
            answer.release()

    @without_frames
    def _do(self, call: Call, about: str) -> None:
        """A success is all there is to know."""
        answer, _ = self._sent(call, about, creates=False)
        answer.release()

    def _sent(
        self, call: Call, about: str, creates: bool, file: tuple[str, Spool] | None = None
    ) -> tuple[Answer, Context]:
        key = self._session.key()
        context = Context(
            model=self._info.model,
            endpoint=self._info.endpoint,
            secrets=self._session.secrets(key),
            refusals_billed=self._options.refusals_billed,
            # Of what a server's own trouble left behind, nothing is assumed where it may be a job.
            server_errors_billed="unknown",
            batch=about,
            creates=creates,
            downloads=call.stream,
            key_print=self._key_print(key),
        )
        try:
            answer = self._session.send_by_sdk(call, key, context, file)
        except EmbeddingError as error:
            raise errors.of_batch(error, context) from None
        if not 200 <= answer.status < 300:
            refused = errors.from_batch_answer(answer, context)
            raise _about_its_input(refused, answer) if creates else refused
        return answer, context

    def _key_print(self, key: str | None) -> str:
        secret = key or "\n".join(self._session.secrets(None))
        return hashlib.sha256(secret.encode()).hexdigest()[:8] if secret else "(no key)"


def _page(after: str | None) -> dict[str, str]:
    limit = {"limit": str(PAGE_SIZE)}
    return limit if after is None else {**limit, "after": after}


def _document(answer: Answer) -> Document:
    if answer.status == 204:
        return {}
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        raise BadReply("it is not valid JSON") from None
    if not isinstance(document, dict):
        raise BadReply("it is not a JSON object")
    return document


def names_other_field(words: str) -> bool:
    """Whether a refused ``create`` speaks of something else than its input."""
    return any(name in words for name in _OTHER_FIELDS)


def _about_its_input(error: EmbeddingError, answer: Answer) -> EmbeddingError:
    """A refused ``create`` may be about the file that was uploaded for it: then it is that error.

    To be wrong about that only costs time: it is asked for again for a while, with the same file.
    """
    if error.billed != "no" or answer.status not in _ABOUT_THE_INPUT:
        return error
    said = read_body(bytes(answer.body))
    words = f"{said.parameter} {said.code} {said.message}".casefold()
    named = any(word in words for word in _OF_AN_INPUT) and not names_other_field(words)
    if answer.status not in _ONLY_ABOUT_THE_INPUT and not named:
        return error
    names = ("status", "code", "request_id", "retry_after")
    facts = {name: getattr(error, name, None) for name in names}
    waits = InputNotReady(error.message, billed="no", **facts)
    waits.free_by_status = isinstance(error, ProviderError) and error.free_by_status
    return waits


def _word(document: Document, _: objects.Shown) -> str:
    word = document.get("status")
    return word if isinstance(word, str) else ""


def _id(document: Document, _: objects.Shown) -> str:
    return objects.id_of(document)


def _size(document: Document, _: objects.Shown) -> int | None:
    return objects.size_of(document)


def _deleted(document: Document, _: objects.Shown) -> None:
    # A job can be made of a file that is still there: its end must not be assumed.
    if document.get("deleted") is False:
        raise BadReply("it was not deleted")
