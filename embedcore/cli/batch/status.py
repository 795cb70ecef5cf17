"""``embedcore batch status`` and ``list``: the state of batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from embedcore import money
from embedcore.cli.batch.records import Clients, local_batch, local_batches
from embedcore.cli.process import BUDGET, FAILED, OK, TRY_AGAIN, code_of
from embedcore.cli.text import as_typed, command, duration, facts, one_line, plural, tokens
from embedcore.config import Config
from embedcore.errors import EmbeddingError

if TYPE_CHECKING:
    from embedcore.cli.batch.records import LocalBatches
    from embedcore.cli.screen import Screen
    from embedcore.policy.batch.job import BatchJob
    from embedcore.policy.batch.report import BatchReport, RemoteJob
    from embedcore.storage.batches import BatchRecord


_WORDS: Final = {
    "running": "under way",
    "blocked": "waiting",
    "cancelling": "being cancelled",
    "done": "ended",
    "cancelled": "cancelled",
    "abandoned": "forgotten",
}
_PHASES: Final = {
    "planned": "to be uploaded",
    "creating": "being created",
    "fenced": "being looked for: whether it was created is not known",
    "lost": "charged; it is still looked for",
    "stray": "created twice: being stopped",
}
_LONGEST: Final = 300
_MOST_JOBS: Final = 10
_JOBS_IN_LINE: Final = 3
_REASONS: Final = 3
_REASON_LENGTH: Final = 200


def report_text(
    report: BatchReport,
    reasons: Mapping[str, int] | None = None,
    next_try: datetime | None = None,
) -> str:
    """A paragraph. ``reasons``: why texts failed, and how many. ``next_try``: after a trouble."""
    head = f"{report.id}  {state_word(report)}"
    pairs = [*_lines(report, next_try), *_failures(report, reasons or {}), *_times(report)]
    return f"{head}\n{facts(pairs, indent='  ')}"


def state_word(report: BatchReport) -> str:
    """The state in words."""
    return "waiting for budget" if waits_for_budget(report) else _WORDS[report.state]


def outcome(report: BatchReport) -> str:
    """The same, and how well it ended, if it did."""
    missing = report.texts - report.stored if report.has_ended else 0
    word = state_word(report)
    return f"{word}, {plural(missing, 'text')} without a vector" if missing else word


def commonest(reasons: Mapping[str, int]) -> Iterator[str]:
    """The few reasons that most have, one a line."""
    ordered = sorted(reasons.items(), key=lambda one: -one[1])
    for reason, count in ordered[:_REASONS]:
        yield f"{count:,} × {one_line(as_typed(reason), _REASON_LENGTH)}"
    if len(ordered) > _REASONS:
        yield f"and {plural(len(ordered) - _REASONS, 'other reason')}"


def waits_for_budget(report: BatchReport) -> bool:
    """Rather than for the provider's queue."""
    return report.state == "blocked" and (report.blocked or "").startswith("budget:")


def change_text(report: BatchReport) -> str:
    """One line for ``--watch`` and for a log."""
    parts = [outcome(report), f"{report.done:,} of {plural(report.texts, 'text')}"]
    busy = [job for job in report.jobs if job.phase != "done"]
    if len(busy) > _JOBS_IN_LINE:
        parts.append(f"{len(busy):,} jobs at work")
    else:
        parts += [f"{job.id or 'a job'} {_phase(job)}" for job in busy]
    if report.has_ended:
        parts.append(money.shown(report.usage.cost))
    return f"{report.id}: {', '.join(parts)}"


def report_fields(report: BatchReport) -> dict[str, Any]:
    """For ``--json``. Times in ISO 8601."""
    found = asdict(report)
    usage = found.pop("usage")
    return {
        **found,
        "created": report.created.isoformat(),
        "ended": report.ended and report.ended.isoformat(),
        "has_ended": report.has_ended,
        **usage,
    }


def troubles(report: BatchReport) -> list[str]:
    """What keeps it from going on, each once."""
    found = [one_line(as_typed(job.trouble), _LONGEST) for job in report.jobs if job.trouble]
    return list(dict.fromkeys(found))


def code_of_report(report: BatchReport) -> int:
    """The exit code that says how a batch stands."""
    if report.has_ended:
        return OK if report.stored == report.texts else FAILED
    return BUDGET if waits_for_budget(report) else TRY_AGAIN


def code_of_all(codes: Sequence[int]) -> int:
    """What needs a person first comes first."""
    return min((code for code in codes if code != OK), default=OK)


def ago(moment: datetime) -> str:
    """``2026-11-24 03:48 UTC, 2 h 5 min ago``."""
    passed = max((datetime.now(UTC) - moment).total_seconds(), 0.0)
    if passed >= 2 * 86_400:
        since = f"{passed // 86_400:.0f} days"
    else:
        since = "less than a minute" if passed < 60 else duration(passed)
    return f"{moment:%Y-%m-%d %H:%M} UTC, {since} ago"


def _lines(report: BatchReport, next_try: datetime | None) -> Iterator[tuple[str, str]]:
    yield "model", f"{report.model}, scope {report.scope}"
    different = "" if report.texts == report.rows else f", {report.texts:,} different texts"
    before = f", {report.reused:,} cached" if report.reused else ""
    yield "rows", f"{report.rows:,}{different}{before}"
    if report.has_ended:
        yield "vectors", f"{report.stored:,} of {plural(report.texts, 'text')}"
    else:
        share = f" ({report.done / report.texts:.0%})" if report.texts else ""
        yield "done", f"{report.done:,} of {plural(report.texts, 'text')}{share}"
        if report.to_submit:
            yield "waiting", f"{plural(report.to_submit, 'text')} to be submitted"
        if report.stopped:
            yield (
                "stopped",
                f"{plural(report.stopped, 'text')} of a job that was cancelled at the provider",
            )
    yield from _jobs(report.jobs)
    if report.blocked:
        yield "blocked", one_line(as_typed(report.blocked), _LONGEST)
    for trouble in troubles(report):
        yield "trouble", trouble
    if next_try is not None and not report.has_ended:
        yield "next try", f"not before {next_try:%H:%M:%S} UTC"
    yield "cost", _cost(report)


def _failures(report: BatchReport, reasons: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    if report.failed:
        yield "failed", plural(report.failed, "text")
    for line in commonest(reasons):
        yield "", line


def _times(report: BatchReport) -> Iterator[tuple[str, str]]:
    yield "submitted", ago(report.created)
    if report.ended is not None:
        yield "ended", ago(report.ended)


def _jobs(jobs: Sequence[RemoteJob]) -> Iterator[tuple[str, str]]:
    lines = [f"{job.id or '(no id yet)'}  {_phase(job)}{_progress(job)}" for job in jobs]
    if len(jobs) > _MOST_JOBS:
        # Of many, those that are still something to look at.
        busy = [line for job, line in zip(jobs, lines, strict=True) if job.phase != "done"]
        rest = len(jobs) - len(busy[:_MOST_JOBS])
        ended = len(jobs) - len(busy)
        lines = [*busy[:_MOST_JOBS], f"and {rest:,} more, of which {ended:,} have ended"]
    for number, line in enumerate(lines):
        yield ("" if number else "jobs"), line


def _progress(job: RemoteJob) -> str:
    if job.phase != "submitted" or job.completed is None or not job.total:
        return ""
    return f", {job.completed:,} of {job.total:,}"


def _phase(job: RemoteJob) -> str:
    return one_line(_PHASES.get(job.phase, job.status or job.phase), 80)


def _cost(report: BatchReport) -> str:
    usage = report.usage
    parts = [f"{money.shown(usage.cost)} for {tokens(usage.tokens, exact=usage.exact)}"]
    if report.reserved_tokens:
        parts.append(f"{money.shown(report.reserved_cost)} reserved")
    if usage.unconfirmed_tokens:
        unconfirmed = money.shown(usage.unconfirmed_cost)
        parts.append(f"of that {unconfirmed} unconfirmed: it may not have been billed")
    return "; ".join(parts)


_RECENT: Final = timedelta(days=7)
_HEADS: Final = (
    "ID",
    "STATE",
    "ROWS",
    "DONE",
    "FAILED",
    "COST",
    "MODEL",
    "SCOPE",
    "SUBMITTED (UTC)",
)


def show_list(screen: Screen, *, everything: bool) -> None:
    """``embedcore batch list``: open ones and those that ended within a week, or all."""
    with local_batches(Config.load()) as local:
        reports = [local.report(one) for one in local.batches.all()] if local is not None else []
    shown = [one for one in reports if everything or _is_recent(one)]
    screen.json({"batches": [report_fields(one) for one in shown]})
    if shown:
        rows = [_row(one) for one in shown]
        spare = ("SUBMITTED (UTC)", "COST")
        screen.table(_HEADS, rows, numbers={2, 3, 4, 5}, spare=spare)
    older = len(reports) - len(shown)
    if older:
        screen.info(f"{older:,} that ended over a week ago: --all shows them")
    elif not shown:
        screen.result("no batch was submitted from here: embedcore batch submit FILE")


def _is_recent(report: BatchReport) -> bool:
    return report.ended is None or report.ended > datetime.now(UTC) - _RECENT


def _row(report: BatchReport) -> tuple[str, ...]:
    done = f"{report.done / report.texts:.0%}" if report.texts else "100%"
    return (
        report.id,
        state_word(report),
        f"{report.rows:,}",
        done,
        f"{report.failed:,}",
        money.shown(report.usage.cost + report.reserved_cost),
        report.model,
        report.scope,
        f"{report.created:%Y-%m-%d %H:%M}",
    )


def look(screen: Screen, name: str | None, *, model: str | None, interval: float | None) -> int:
    """``embedcore batch status``. ``interval``: look again after so many seconds; None: once."""
    if name is not None:
        with local_batch(name) as (local, record):
            return _look_at(screen, local, [record], model, interval)
    with local_batches(Config.load()) as found:
        if found is None or not found.open:
            screen.json({"batches": []})
            screen.result("no batch is open; embedcore batch list shows those that have ended")
            return OK
        return _look_at(screen, found, found.open, model, interval)


def _look_at(
    screen: Screen,
    local: LocalBatches,
    records: Sequence[BatchRecord],
    model: str | None,
    interval: float | None,
) -> int:
    codes: list[int] = []
    with Clients(local=local, model=model) as clients:
        jobs: list[BatchJob] = []
        for record in records:
            try:
                jobs.append(clients.job(record))
            except EmbeddingError as error:
                # Another one may go on, and what is written down can be shown.
                if not record.has_ended:
                    screen.error(f"Error: {error}")
                    codes.append(code_of(error))
        if interval is not None:
            codes.append(watch(screen, jobs, interval=interval))
        else:
            codes += [_advance(screen, job) for job in jobs]
    reports = [local.report(record) for record in records]
    codes += [code_of_report(one) for one in reports]
    reasons = [local.reasons(record) for record in records]
    both = list(zip(reports, reasons, strict=True))
    screen.json({"batches": [{**report_fields(one), "reasons": why} for one, why in both]})
    tries = [local.next_try(record) for record in records]
    shown = zip(reports, reasons, tries, strict=True)
    screen.result("\n".join(report_text(one, why, again) for one, why, again in shown))
    for report in reports:
        if report.has_ended:
            screen.info(f"Its vectors: {fetch_command(report.id)}")
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
    said: dict[str, str] = {}
    try:
        while True:
            codes: list[int] = []
            left = [job for job in jobs if not job.record.has_ended]
            for job in left:
                code = _advance(screen, job, said)
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
        screen.error(
            f"It goes on at the provider, and nothing of it is lost. Look again with:\n  {again}"
        )
        raise


def _advance(screen: Screen, job: BatchJob, said: dict[str, str] | None = None) -> int:
    """Do what is due for a batch. The code of what keeps it from going on, if nothing goes on.

    ``said``: what was said of each batch before. The first look is the one that was asked for.
    """
    asked = said is None or job.id not in said
    problems = job.advance(asked=asked) if not job.record.has_ended else []
    report = job.status(poll=False)
    if said is not None:
        _tell(screen, report, said)
    if not problems or _goes_on(report):
        return OK
    return code_of(problems[0])


def _tell(screen: Screen, report: BatchReport, said: dict[str, str]) -> None:
    lines = [change_text(report), *(f"{report.id}: {one}" for one in troubles(report))]
    if report.blocked:
        lines.append(f"{report.id}: {report.blocked}")
    for line in lines if said.get(report.id) != "\n".join(lines) else ():
        screen.info(f"{time.strftime('%H:%M:%S')} {line}")
    said[report.id] = "\n".join(lines)


def _goes_on(report: BatchReport) -> bool:
    phases = ("creating", "submitted", "collecting")
    return any(job.phase in phases and job.trouble is None for job in report.jobs)
