"""Settings of the fake Batch API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Literal, TypeAlias

DAY = 86400.0
NOT_READY = "file_not_processed"

Order: TypeAlias = Literal["shuffled", "input", "reversed"]
Late: TypeAlias = Literal["no file", "missing", "empty", "first line", "half", "error"]


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a job is: complete at its ``polls``-th poll, or ``seconds`` after it was created.

    With neither it moves only by hand. A cancelled job ends ``cancel_polls`` polls, or
    ``cancel_seconds``, after the cancellation, by whichever of both measures it progresses.
    """

    polls: int | None = None
    seconds: float | None = None
    cancel_polls: int = 1
    cancel_seconds: float = 0.0


@dataclass(kw_only=True, slots=True)
class Listing:
    """What is wrong with the list of jobs.

    A job is missing from the first ``lag_listings`` first pages, and for ``lag_seconds``, after it
    was created. ``has_more``: what every page says instead of the truth. ``repeats``: the cursor
    is ignored, so that every page is the first one.
    """

    lag_listings: int = 0
    lag_seconds: float = 0.0
    has_more: bool | None = None
    repeats: bool = False


@dataclass(kw_only=True, slots=True)
class Quirks:
    """What is odd about job objects and about the files that a job leaves.

    Objects: ``status_word`` stands for every status until the job has ended; ``words`` are told in
    place of those of the API, those of the end among them. ``counts`` and
    ``usage`` are honest, or left out in one of the ways there are; "wrong" counts are one too high,
    and "few" are one too low, but for their total.

    Files: ``order`` of the lines; ``string_body``: ``response.body`` is a string with JSON in it;
    ``ignores_base64``: floats whatever was asked; ``line_usage``: lines say what they cost;
    ``reply_model``: the name in every line; ``cut``: only this share of the output's lines is
    there, and half of the next one; ``bom``, ``blank_lines``, ``line_end`` and ``final_newline``
    are about its form.
    ``empty_error``: every line has an error object that says nothing;
    ``no_output_file``: a completed job has none, and what was in it is in no file;
    ``empty_error_file``: it has an error file of 0 bytes where nothing failed.

    Results that are late, which holds for jobs that have ended already as well: ``late`` is what
    there is instead of ``late_files``: the object names no file, or the content of the file is
    answered 404, has 0 bytes, is its first line only, or its first half, which ends midway in a
    line, or is an error object. So it is until
    ``late_seconds`` after the job's end, and for ``late_looks`` looks, whichever ends first; None:
    neither ends it.

    Lines: ``numeric_ids``: a ``custom_id`` is the number of the line instead. By a marker in their
    text: written a second time with an equal vector
    (``duplicate_equal``) or another one (``duplicate_different``), left out of both files
    (``missing``), written without a ``custom_id`` (``no_id``). ``unknown_id``: one line more, with
    an id that was not sent.
    """

    status_word: str | None = None
    words: dict[str, str] = field(default_factory=dict)
    counts: Literal["honest", "null", "absent", "wrong", "few"] = "honest"
    usage: Literal["honest", "null", "absent", "zero"] = "honest"
    order: Order = "shuffled"
    string_body: bool = False
    ignores_base64: bool = False
    line_usage: bool = True
    reply_model: str | None = None
    cut: float | None = None
    bom: bool = False
    blank_lines: bool = False
    line_end: str = "\n"
    final_newline: bool = True
    empty_error: bool = False
    no_output_file: bool = False
    empty_error_file: bool = False
    late: Late | None = None
    late_files: Literal["output", "error", "both"] = "output"
    late_looks: int | None = 1
    late_seconds: float | None = None
    numeric_ids: bool = False
    duplicate_equal: str | None = None
    duplicate_different: str | None = None
    missing: str | None = None
    no_id: str | None = None
    unknown_id: bool = False


@dataclass(kw_only=True, slots=True)
class FileLimits:
    """The largest input file, as OpenAI documents it."""

    max_lines: int = 50_000
    max_inputs: int = 50_000
    max_bytes: int = 200_000_000


@dataclass(kw_only=True, slots=True)
class BatchSettings:
    """All of it. May be changed at any time.

    - ``enqueued_token_limit``: of all jobs of one model that were validated and have not ended; a
      job over it fails with ``token_limit_exceeded``.
    - ``missing_input_status``: how a create on a file that is not there is refused.
    - ``accepts_deleted_input``: it is not refused if the file was there once, and validation still
      reads it: the case that an assumption of embedcore about the real API is false.
    - ``not_ready_creates``, ``not_ready_seconds``: so many creates on a new file, and for so long
      after its upload, are refused with ``not_ready_status``; meanwhile the file's own state is
      ``not_ready_word``; None: there is no such file.
    - ``window``: seconds until a job expires; None: never.
    - ``ranges``: downloads honour the Range header.
    """

    progress: Progress = field(default_factory=lambda: Progress(polls=3))
    listing: Listing = field(default_factory=Listing)
    quirks: Quirks = field(default_factory=Quirks)
    file_limits: FileLimits = field(default_factory=FileLimits)
    enqueued_token_limit: int | None = None
    missing_input_status: int = 400
    accepts_deleted_input: bool = False
    not_ready_creates: int = 0
    not_ready_seconds: float = 0.0
    not_ready_status: int = 400
    not_ready_word: str | None = "pending"
    window: float | None = DAY
    ranges: bool = False


def change(settings: object, changes: Mapping[str, object]) -> None:
    """Set fields by name, nested ones by a mapping; raises ``ValueError`` for one there is not."""
    if not is_dataclass(settings):
        raise TypeError(f"{settings!r} has no fields")
    known = {each.name for each in fields(settings)}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"no setting {name!r}; there are {', '.join(sorted(known))}")
        if isinstance(value, Mapping) and is_dataclass(getattr(settings, name)):
            change(getattr(settings, name), value)
        else:
            setattr(settings, name, value)
