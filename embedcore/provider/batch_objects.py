"""Objects of batch APIs, in OpenAI's form and in those of servers like it.

What a service says otherwise, its provider puts into this form first: ``FilesBatch.as_job`` and
``as_file``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from embedcore.provider.batchstates import batch_state
from embedcore.provider.replies import BadReply
from embedcore.provider.types import BatchState, BatchStatus, FoundJob

MARK: Final = "embedcore"
_PREFIX: Final = "embedcore-"
_SUFFIX: Final = ".jsonl"
_DOT: Final = "."
_FILE_NAME: Final = re.compile(rf"{_PREFIX}(.*){re.escape(_SUFFIX)}", re.S)

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
# Named with a line, and yet true of all lines: every line of ours has the same model and address.
_OF_THE_JOB: Final = frozenset({"model_not_found", "url_mismatch", "invalid_url", "invalid_method"})
_QUEUE_CODE: Final = "token_limit_exceeded"
# "Limit: 20,000,000 enqueued tokens."
_QUEUE_LIMIT: Final = re.compile(r"Limit:?\s*(\d{1,3}(?:,\d{3})+|\d{1,15})\s+enqueued", re.I)
_MOST: Final = 2**63 - 1

Shown = Callable[[str], str]
Advice = Callable[[str], str]


def no_advice(said: str) -> str:  # noqa: ARG001
    """What to set where a service refuses what was asked: nothing is known of it."""
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One entry of the list of batches.

    ``found``: None where it has no id that can be used. ``key``: our mark in its metadata; empty
    where these have others only. ``is_clear``: False where nothing that it says tells whose it is.
    """

    found: FoundJob | None = None
    key: str | None = None
    input_ref: str | None = None
    created_at: datetime | None = None
    is_clear: bool = True

    def is_of(self, key: str, input_ref: str) -> bool | None:
        """Whether it is the job of that key or that input; None: it may be, and cannot be used."""
        if key == self.key or input_ref == self.input_ref:
            return True if self.found is not None else None
        named = self.key is not None or self.input_ref is not None
        return False if named or self.is_clear else None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One entry of the list of files. ``key``: the mark in its name, if it is one of ours;
    ``note``: what was noted of its lines."""

    id: str
    key: str | None = None
    note: str = ""
    created_at: datetime | None = None


def is_id(value: object) -> bool:
    """True for what may stand in the path of a URL as an id."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def file_name(mark: str, note: str = "") -> str:
    """The name of an input; a mark has no dot."""
    return f"{_PREFIX}{mark}{_DOT * bool(note)}{note}{_SUFFIX}"


def id_of(document: dict[str, Any]) -> str:
    """Raises ``BadReply`` for an id of any other shape than ids have."""
    value = document.get("id")
    if not isinstance(value, str) or not is_id(value):
        raise BadReply("its 'id' is missing, or is no id")
    return value


def status_of(
    document: dict[str, Any], *, job_id: str, shown: Shown, advice: Advice = no_advice
) -> BatchStatus:
    """The state of the job ``job_id``; errors by line are given by the item's place.

    ``advice``: what to add to a reason, by what is said.

    Line n belongs to the item at the place ``str(n - 1)`` among those that were uploaded. Raises
    ``BadReply`` for the state of another job or none.
    """
    word = document.get("status")
    if not isinstance(word, str) or not word:
        raise BadReply("it has no 'status'")
    if id_of(document) != job_id:
        raise BadReply("it is another job")
    state = batch_state(word)
    completed, failed, total = _counts(document.get("request_counts"))
    listed = document.get("errors") if state == "failed" else None
    errors, queue_full, queue_limit = _errors(listed, shown, advice)
    return BatchStatus(
        state=state,
        detail=shown(word)[:80],
        completed=completed,
        failed=failed,
        total=total,
        tokens=None if state == "running" else _tokens(document.get("usage")),
        errors=errors,
        queue_full=queue_full,
        queue_limit=queue_limit,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """``files``: those with the results, none of which need exist. ``rows``: lines in the job
    itself, for a service that has no files. ``counted``: for how many lines the service says that
    it is done with; ``ended``: as what the job has."""

    files: list[str]
    rows: list[Any]
    counted: int
    ended: BatchState


def results_of(document: dict[str, Any], *, job_id: str, shown: Shown) -> Results | None:
    """Where the results of the job ``job_id`` are; None while it runs."""
    status = status_of(document, job_id=job_id, shown=shown)
    if status.state == "running":
        return None
    files = [document.get("output_file_id"), document.get("error_file_id")]
    given = [file for file in files if file is not None and file != ""]
    if not all(map(is_id, given)):
        raise BadReply("the id of a result file is no id")
    rows = document.get("outputs")
    return Results(
        files=list(dict.fromkeys(given)),
        rows=rows if isinstance(rows, list) else [],
        counted=(status.completed or 0) + (status.failed or 0),
        ended=status.state,
    )


def job_of(entry: object) -> Job:
    """An entry of the list of batches, whatever it is: one that cannot be used hides no other."""
    if not isinstance(entry, dict):
        return Job(is_clear=False)
    key, has_key = _mark_in(entry.get("metadata"))
    input_ref = entry.get("input_file_id")
    has_input = input_ref is None or isinstance(input_ref, str)
    created_at, word, name = _moment(entry.get("created_at")), entry.get("status"), entry.get("id")
    found = None
    if isinstance(name, str) and is_id(name):
        found = FoundJob(
            id=name,
            created_at=created_at,
            state=batch_state(word) if isinstance(word, str) else "running",
        )
    return Job(
        found=found,
        key=key,
        input_ref=input_ref if isinstance(input_ref, str) else None,
        created_at=created_at,
        is_clear=found is not None and has_key and has_input,
    )


def _mark_in(metadata: object) -> tuple[str | None, bool]:
    """Our mark, and whether that could be read."""
    if metadata is None or metadata == {}:
        return None, True
    if not isinstance(metadata, dict):
        return None, False
    key = metadata.get(MARK, "")
    return (key, True) if isinstance(key, str) else (None, False)


def file_of(entry: object) -> StoredFile | None:
    """An entry of the list of files; None for one that cannot be used, which is no file of ours
    that could be deleted."""
    name = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(name, str) or not is_id(name):
        return None
    key, note, called = None, "", entry.get("filename")
    if entry.get("purpose", "batch") == "batch" and isinstance(called, str):
        found = _FILE_NAME.fullmatch(called)
        if found is not None:
            key, _, note = found[1].partition(_DOT)
    return StoredFile(id=name, key=key, note=note, created_at=_moment(entry.get("created_at")))


def size_of(document: dict[str, Any]) -> int | None:
    return _count(document.get("bytes"))


def _counts(counts: object) -> tuple[int | None, int | None, int | None]:
    """Completed, failed, total. Before a job is validated all of them are 0, or missing."""
    if not isinstance(counts, dict):
        return None, None, None
    total = _count(counts.get("total")) or None
    return _count(counts.get("completed")), _count(counts.get("failed")), total


def _tokens(usage: object) -> int | None:
    """What was billed. Nothing but zeros is what servers send that do not count."""
    if not isinstance(usage, dict):
        return None
    names = ("input_tokens", "prompt_tokens", "total_tokens")
    return max((_count(usage.get(name)) or 0 for name in names), default=0) or None


def _errors(
    errors: object, shown: Shown, advice: Advice
) -> tuple[dict[str, str], bool, int | None]:
    """Reasons by place, whether they all are that the queue is full, and how much it takes."""
    entries = errors.get("data") if isinstance(errors, dict) else errors
    reasons: dict[str, str] = {}
    full: list[bool] = []
    limit = None
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        code, message = _text(entry.get("code")), _text(entry.get("message"))
        line = entry.get("line")
        item = ""
        if type(line) is int and line > 0 and code not in _OF_THE_JOB:
            item = str(line - 1)
        reason = shown(": ".join(filter(None, (code, message)))) or "no reason given"
        said = f"{code} {message} {_text(entry.get('param'))}"
        reasons.setdefault(item, reason + advice(said))
        full.append(code == _QUEUE_CODE)
        if full[-1] and (found := _QUEUE_LIMIT.search(message)):
            limit = int(found[1].replace(",", ""))
    queue_full = bool(full) and all(full)
    return reasons, queue_full, limit if queue_full else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST else None


def _moment(value: object) -> datetime | None:
    """A time in seconds since 1970, or as ISO 8601 with its zone."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        if not isinstance(value, str):
            return datetime.fromtimestamp(value, UTC)
        moment = datetime.fromisoformat(value)
        return None if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        return None
