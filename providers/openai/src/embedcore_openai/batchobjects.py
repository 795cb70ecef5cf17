"""What do the batch API's objects say, in OpenAI's form and in those of servers like it?"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from embedcore.provider.batchstates import batch_state
from embedcore.provider.replies import BadReply
from embedcore.provider.types import BatchStatus, FoundJob
from embedcore_openai.encodings import advice

MARK: Final = "embedcore"
_PREFIX: Final = "embedcore-"
_SUFFIX: Final = ".jsonl"

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
# Named with a line, and yet true of all lines: every line of ours has the same model and address.
_OF_THE_JOB: Final = frozenset({"model_not_found", "url_mismatch", "invalid_url", "invalid_method"})
_QUEUE_CODE: Final = "token_limit_exceeded"
# "Limit: 20,000,000 enqueued tokens."
_QUEUE_LIMIT: Final = re.compile(r"Limit:?\s*(\d{1,3}(?:,\d{3})+|\d{1,15})\s+enqueued", re.I)
_MOST: Final = 2**63 - 1

Shown = Callable[[str], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One entry of the list of batches."""

    found: FoundJob
    key: str | None = None
    input_ref: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One entry of the list of files."""

    id: str
    ours: bool
    created_at: datetime | None = None


def is_id(value: object) -> bool:
    """True for what may stand in the path of a URL as an id."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def file_name(mark: str) -> str:
    return f"{_PREFIX}{mark}{_SUFFIX}"


def id_of(document: dict[str, Any]) -> str:
    """Raises ``BadReply`` for an id of any other shape than ids have."""
    value = document.get("id")
    if not isinstance(value, str) or not is_id(value):
        raise BadReply("its 'id' is missing, or is no id")
    return value


def status_of(
    document: dict[str, Any], *, job_id: str, shown: Shown, encoding: str = "omit"
) -> BatchStatus:
    """The state of the job ``job_id``; errors by line are given by the item's place.

    ``encoding``: how its lines asked for their vectors, which may be what is wrong with them.

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
    told = document.get("errors") if state == "failed" else None
    errors, queue_full, queue_limit = _errors(told, shown, encoding)
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


def result_files(document: dict[str, Any], *, job_id: str, shown: Shown) -> list[str] | None:
    """The files with the results, none of which need exist; None while the job runs."""
    if status_of(document, job_id=job_id, shown=shown).state == "running":
        return None
    files = [document.get("output_file_id"), document.get("error_file_id")]
    given = [file for file in files if file is not None and file != ""]
    if not all(map(is_id, given)):
        raise BadReply("the id of a result file is no id")
    return list(dict.fromkeys(given))


def job_of(document: dict[str, Any]) -> Job:
    metadata = document.get("metadata")
    key = metadata.get(MARK) if isinstance(metadata, dict) else None
    input_ref = document.get("input_file_id")
    word = document.get("status")
    return Job(
        found=FoundJob(
            id=id_of(document),
            created_at=_moment(document.get("created_at")),
            state=batch_state(word) if isinstance(word, str) else "running",
        ),
        key=key if isinstance(key, str) else None,
        input_ref=input_ref if isinstance(input_ref, str) else None,
    )


def file_of(document: dict[str, Any]) -> StoredFile:
    name = document.get("filename")
    named = isinstance(name, str) and name.startswith(_PREFIX) and name.endswith(_SUFFIX)
    return StoredFile(
        id=id_of(document),
        ours=named and document.get("purpose", "batch") == "batch",
        created_at=_moment(document.get("created_at")),
    )


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


def _errors(errors: object, shown: Shown, encoding: str) -> tuple[dict[str, str], bool, int | None]:
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
        told = f"{code} {message} {_text(entry.get('param'))}"
        reasons.setdefault(item, reason + advice(told, encoding))
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
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        return None
