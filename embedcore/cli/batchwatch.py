"""How does a batch stand now, and until it has ended?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedcore.cli.batchbooks import Clients, batch_books, books_of
from embedcore.cli.batchtext import (
    change_text,
    code_of_all,
    code_of_report,
    report_fields,
    report_text,
    troubles,
)
from embedcore.cli.exits import OK, code_of
from embedcore.cli.text import command
from embedcore.config import Config
from embedcore.errors import EmbeddingError

if TYPE_CHECKING:
    from embedcore.cli.batchbooks import BatchBooks
    from embedcore.cli.screen import Screen
    from embedcore.policy.batchjob import BatchJob
    from embedcore.policy.batchreport import BatchReport
    from embedcore.storage.batchrecords import BatchRecord


def look(screen: Screen, name: str | None, *, model: str | None, interval: float | None) -> int:
    """``embedcore batch status``. ``interval``: look again after so many seconds; None: once."""
    if name is not None:
        with books_of(name) as (books, record):
            return _look_at(screen, books, [record], model, interval)
    with batch_books(Config.load()) as found:
        if found is None or not found.open:
            screen.answer({"batches": []})
            screen.show("no batch is open; embedcore batch list shows those that have ended")
            return OK
        return _look_at(screen, found, found.open, model, interval)


def _look_at(
    screen: Screen,
    books: BatchBooks,
    records: Sequence[BatchRecord],
    model: str | None,
    interval: float | None,
) -> int:
    codes: list[int] = []
    with Clients(books=books, model=model) as clients:
        jobs: list[BatchJob] = []
        for record in records:
            try:
                jobs.append(clients.job(record))
            except EmbeddingError as error:
                # Another one may go on, and what is written down can be shown.
                if not record.has_ended:
                    screen.complain(f"Error: {error}")
                    codes.append(code_of(error))
        if interval is not None:
            codes.append(watch(screen, jobs, interval=interval))
        else:
            codes += [_advance(screen, job) for job in jobs]
    reports = [books.report(record) for record in records]
    codes += [code_of_report(one) for one in reports]
    reasons = [books.reasons(record) for record in records]
    both = list(zip(reports, reasons, strict=True))
    screen.answer({"batches": [{**report_fields(one), "reasons": why} for one, why in both]})
    tries = [books.next_try(record) for record in records]
    shown = zip(reports, reasons, tries, strict=True)
    screen.show("\n".join(report_text(one, why, again) for one, why, again in shown))
    for report in reports:
        if report.has_ended:
            screen.say(f"Its vectors: {fetch_command(report.id)}")
    return code_of_all(codes)


def fetch_command(name: str) -> str:
    """How to have the vectors."""
    return command(["embedcore", "batch", "fetch", name, "-o", "vectors.npy"])


def watch_command(name: str) -> str:
    return command(["embedcore", "batch", "status", name, "--watch"])


def watch(screen: Screen, jobs: Sequence[BatchJob], *, interval: float) -> int:
    """Look after batches until all have ended, or none can go on; a line for every change.

    Returns the code of what keeps one from going on.
    """
    told: dict[str, str] = {}
    try:
        while True:
            codes: list[int] = []
            left = [job for job in jobs if not job.record.has_ended]
            for job in left:
                code = _advance(screen, job, told)
                if code == OK and not job.record.has_ended:
                    codes.append(OK)
                elif code != OK:
                    codes.append(code)
            if OK not in codes:
                return code_of_all(codes)
            time.sleep(interval)
    except KeyboardInterrupt:
        names = [job.id for job in jobs if not job.record.has_ended]
        again = watch_command(names[0]) if len(names) == 1 else watch_command("").replace("'' ", "")
        screen.complain(
            f"It goes on at the provider, and nothing of it is lost. Look again with:\n  {again}"
        )
        raise


def _advance(screen: Screen, job: BatchJob, told: dict[str, str] | None = None) -> int:
    """Do what is due for a batch. The code of what keeps it from going on, if nothing goes on.

    ``told``: what was said of each batch before. The first look is the one that somebody asked for.
    """
    asked = told is None or job.id not in told
    problems = job.advance(asked=asked) if not job.record.has_ended else []
    report = job.status(poll=False)
    if told is not None:
        _tell(screen, report, told)
    if not problems or _goes_on(report):
        return OK
    return code_of(problems[0])


def _tell(screen: Screen, report: BatchReport, told: dict[str, str]) -> None:
    lines = [change_text(report), *(f"{report.id}: {one}" for one in troubles(report))]
    if report.blocked:
        lines.append(f"{report.id}: {report.blocked}")
    for line in lines if told.get(report.id) != "\n".join(lines) else ():
        screen.say(f"{time.strftime('%H:%M:%S')} {line}")
    told[report.id] = "\n".join(lines)


def _goes_on(report: BatchReport) -> bool:
    phases = ("creating", "submitted", "collecting")
    return any(job.phase in phases and job.trouble is None for job in report.jobs)
