"""Which batches are there? From what is written down, without network, key or settings."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from embedcore.cli.batchbooks import batch_books
from embedcore.cli.batchtext import report_fields, state_word
from embedcore.cli.text import dollars, table
from embedcore.config import Config

if TYPE_CHECKING:
    from embedcore.cli.screen import Screen
    from embedcore.policy.batchreport import BatchReport

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
    with batch_books(Config.load()) as books:
        reports = [books.report(one) for one in books.batches.all()] if books is not None else []
    shown = [one for one in reports if everything or _is_recent(one)]
    screen.answer({"batches": [report_fields(one) for one in shown]})
    if shown:
        screen.show(table(_HEADS, [_row(one) for one in shown], numbers={2, 3, 4, 5}))
    older = len(reports) - len(shown)
    if older:
        screen.say(f"{older:,} that ended over a week ago: --all shows them")
    elif not shown:
        screen.show("no batch was submitted from here: embedcore batch submit FILE")


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
        dollars(report.usage.picodollars + report.held_picodollars),
        report.model,
        report.scope,
        f"{report.created:%Y-%m-%d %H:%M}",
    )
