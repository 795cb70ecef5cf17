"""Calls of a batch API: upload, create, list, poll, download.

Whatever goes wrong on the way is handed back instead of raised, up to where no frame holds the key
or an answer any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import orjson

from embedcore.errors import Billed, EmbeddingError, InputNotReady, ProviderError
from embedcore.provider import batch_errors as errors, batch_objects as objects
from embedcore.provider.batch_errors import BATCH_API, Context
from embedcore.provider.batch_lines import HalfLine, whole_lines
from embedcore.provider.batch_listing import OPENAI, Page, Paging, page_of
from embedcore.provider.batch_spool import Form as UploadForm, Spool, form_of
from embedcore.provider.error_bodies import read_body
from embedcore.provider.http import Answer, Call, Download, without_frames
from embedcore.provider.replies import BadReply
from embedcore.provider.types import BatchStatus, ModelInfo

if TYPE_CHECKING:
    from embedcore.provider.batch_listing import Cursor


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What options say of all calls. ``timeout``: seconds for each; ``transfer_timeout``: for a
    file. ``refusals_billed``: as in ``Asked``; ``errors_billed``: what lines that failed cost."""

    timeout: float
    transfer_timeout: float
    refusals_billed: Billed = "no"
    errors_billed: Billed = "no"


class Wire(Protocol):
    """How requests of a batch API are sent."""

    def key(self) -> str | None:
        """The key for one request; None where none is sent."""
        ...

    def secrets(self, key: str | None) -> list[str]:
        """What must not be shown of a request with this key."""
        ...

    def send(
        self, call: Call, key: str | None, context: Context, file: tuple[str, Spool] | None
    ) -> Answer:
        """Send one request, once; ``file``: the name and the content of an upload, as its body.

        An answer of any status is an answer. Raises the errors of ``http.Session.send``.
        """
        ...


class FilesApi:
    """What a batch API with files calls things: as OpenAI does, unless a subclass says otherwise.

    ``files``, ``jobs``: their paths below the service's address; ``content`` and ``stop`` follow
    the path of a file or a job. ``paging``, ``file_paging``: how jobs and files are listed.
    ``largest_job``: bytes of the answer to a poll.
    """

    files: str = "/files"
    jobs: str = "/batches"
    content: str = "/content"
    stop: str = "/cancel"
    paging: Paging = OPENAI
    file_paging: Paging = OPENAI
    largest_job: int = 64_000_000

    def create_path(self) -> str:
        """Where a job is created."""
        return self.jobs

    def as_job(self, document: dict[str, Any]) -> dict[str, Any]:
        """A job in OpenAI's form: ``id``, ``status``, ``input_file_id``, ``metadata``,
        ``created_at``, ``request_counts``, ``usage``, ``errors``, ``output_file_id``,
        ``error_file_id``, as far as the service has them."""
        return document

    def as_file(self, document: dict[str, Any]) -> dict[str, Any]:
        """A file in OpenAI's form: ``id``, ``filename``, ``created_at``, ``status``, ``bytes``."""
        return document

    def upload_root(self, base_url: str) -> str:
        """The address below which files are uploaded."""
        return base_url

    def upload_form(self, name: str, file: Spool) -> UploadForm:
        """The body that uploads a file of that name."""
        return form_of(name, file, purpose="batch")

    def file_query(self) -> Mapping[str, str]:
        """What the list of files is narrowed down with."""
        return {"purpose": "batch"}

    def content_query(self) -> Mapping[str, str]:
        """What the content of a file is asked for with."""
        return {}

    def advice(self, said: str) -> str:  # noqa: ARG002
        """What to add to a reason that the service gives, by its words; mostly nothing."""
        return ""


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
_OTHER_FIELDS: Final = (
    "endpoint",
    "completion_window",
    "metadata",
    "output_expires_after",
    "request_params",
    "timeout_hours",
)

T = TypeVar("T")
Document = dict[str, Any]
Form = Callable[[Document], Document]
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

    def __init__(self, info: ModelInfo, terms: Terms, wire: Wire, api: FilesApi) -> None:
        self._info = info
        self._terms = terms
        self._wire = wire
        self._api = api

    def upload(self, name: str, file: Spool) -> str:
        call = Call(
            path=self._api.files,
            timeout=self._terms.timeout * _WAITS_AFTER_UPLOAD,
            longest=self._terms.transfer_timeout,
            max_bytes=_LARGEST_OBJECT,
        )
        return self._ask(call, self._file(objects.id_of), BATCH_API, file=(name, file))

    def create(self, body: bytes, file: str | None) -> str:
        """Start a job of an uploaded file; None: of what is in the request itself."""
        call = self._call("POST", self._api.create_path(), body=body)
        about = BATCH_API if file is None else f"input file {file}"
        return self._ask(call, self._job(objects.id_of), about, creates=True)

    def delete(self, file: str) -> None:
        self._ask(self._call("DELETE", self._path(file)), _deleted, f"file {file}")

    def file_status(self, file: str) -> str:
        """The server's word for the state of a file; empty where it has none."""
        return self._ask(self._call("GET", self._path(file)), self._file(_word), f"file {file}")

    def size(self, file: str) -> int | None:
        """The bytes that a file should have."""
        read = self._file(objects.size_of)
        return self._ask(self._call("GET", self._path(file)), read, f"file {file}")

    def status(self, job: str) -> BatchStatus:
        def read(document: Document, shown: objects.Shown) -> BatchStatus:
            document = _in_form(self._api.as_job, document)
            advice = self._api.advice
            return objects.status_of(document, job_id=job, shown=shown, advice=advice)

        return self._ask(self._get_job(job), read, f"batch {job}")

    def results(self, job: str) -> objects.Results | None:
        """Where the results of a job are; None while it runs."""

        def read(document: Document, shown: objects.Shown) -> objects.Results | None:
            document = _in_form(self._api.as_job, document)
            return objects.results_of(document, job_id=job, shown=shown)

        return self._ask(self._get_job(job), read, f"batch {job}")

    def cancel(self, job: str) -> None:
        self._do(self._call("POST", f"{self._api.jobs}/{job}{self._api.stop}"), f"batch {job}")

    def batches(self, cursor: Cursor) -> Page[objects.Job]:
        paging = self._api.paging

        def read(document: Document, _: objects.Shown) -> Page[objects.Job]:
            return page_of(
                document,
                objects.job_of,
                "batches",
                paging=paging,
                cursor=cursor,
                as_entry=_entry(self._api.as_job),
            )

        call = self._call("GET", self._api.jobs, query=paging.query(cursor))
        return self._ask(call, read, BATCH_API)

    def uploads(self, cursor: Cursor) -> Page[objects.StoredFile]:
        paging = self._api.file_paging

        def read(document: Document, _: objects.Shown) -> Page[objects.StoredFile]:
            return page_of(
                document,
                objects.file_of,
                "files",
                paging=paging,
                cursor=cursor,
                as_entry=_entry(self._api.as_file),
            )

        query = {**self._api.file_query(), **paging.query(cursor)}
        return self._ask(self._call("GET", self._api.files, query=query), read, BATCH_API)

    def _path(self, file: str) -> str:
        return f"{self._api.files}/{file}"

    def _get_job(self, job: str) -> Call:
        return self._call("GET", f"{self._api.jobs}/{job}", most=self._api.largest_job)

    def _file(self, read: Callable[[Document], T]) -> Read[T]:
        return lambda document, _: read(_in_form(self._api.as_file, document))

    def _job(self, read: Callable[[Document], T]) -> Read[T]:
        return lambda document, _: read(_in_form(self._api.as_job, document))

    @without_frames
    def open(self, file: str, job: str) -> Source:
        """The content of a result file of a job, from its beginning."""
        call = Call(
            method="GET",
            path=self._path(file) + self._api.content,
            query=self._api.content_query(),
            stream=True,
            timeout=self._terms.timeout,
            longest=self._terms.transfer_timeout,
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
        most: int = 0,
    ) -> Call:
        return Call(
            method=method,
            path=path,
            query=query or {},
            headers={} if body is None else {"Content-Type": "application/json"},
            body=body,
            timeout=self._terms.timeout,
            max_bytes=most or _LARGEST_OBJECT,
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
        key = self._wire.key()
        context = self._context(key, about, creates=creates, downloads=call.stream)
        try:
            answer = self._wire.send(call, key, context, file)
        except EmbeddingError as error:
            raise errors.of_batch(error, context) from None
        if not 200 <= answer.status < 300:
            refused = errors.from_batch_answer(answer, context)
            has_file = creates and about != BATCH_API
            raise _about_its_input(refused, answer) if has_file else refused
        return answer, context

    def context(self, about: str) -> Context:
        """What is shown of an answer, outside of a request."""
        return self._context(self._wire.key(), about, creates=False, downloads=True)

    def _context(self, key: str | None, about: str, *, creates: bool, downloads: bool) -> Context:
        return Context(
            model=self._info.model,
            endpoint=self._info.endpoint,
            secrets=self._wire.secrets(key),
            refusals_billed=self._terms.refusals_billed,
            # Of what a server's own trouble left behind, nothing is assumed where it may be a job.
            server_errors_billed="unknown",
            batch=about,
            creates=creates,
            downloads=downloads,
            key_print=self._key_print(key),
        )

    def _key_print(self, key: str | None) -> str:
        secret = key or "\n".join(self._wire.secrets(None))
        return hashlib.sha256(secret.encode()).hexdigest()[:8] if secret else "(no key)"


def _in_form(form: Form, document: Document) -> Document:
    """A document in OpenAI's form. Raises ``BadReply`` for one that has not the service's own."""
    try:
        return form(document)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise BadReply("it has another form than the service's objects have") from None


def _entry(form: Form) -> Form:
    """The same for an entry of a list: one that cannot be read says nothing of itself."""

    def read(entry: Document) -> Document:
        try:
            return form(entry)
        except (LookupError, TypeError, ValueError, AttributeError):
            return {}

    return read


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


def _word(document: Document) -> str:
    word = document.get("status")
    return word if isinstance(word, str) else ""


def _deleted(document: Document, _: objects.Shown) -> None:
    # A job can be made of a file that is still there: its end must not be assumed.
    if document.get("deleted") is False:
        raise BadReply("it was not deleted")
