"""How is a batch stopped, or given up?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from embedcore.cli.batchbooks import Clients, books_of
from embedcore.cli.batchtext import report_fields, report_text
from embedcore.cli.batchwatch import fetch_command, watch_command
from embedcore.cli.exits import OK, USAGE
from embedcore.cli.text import dollars, plural
from embedcore.errors import ConfigurationError

if TYPE_CHECKING:
    from embedcore.cli.screen import Screen
    from embedcore.policy.batchreport import BatchReport


def cancel_batch(screen: Screen, name: str, model: str | None) -> int:
    """``embedcore batch cancel``."""
    with books_of(name) as (books, record), Clients(books=books, model=model) as clients:
        _require_open(books.report(record))
        report = clients.job(record).cancel()
    screen.answer(report_fields(report))
    screen.show(report_text(report))
    if report.has_ended:
        screen.say(f"What was done by then: {fetch_command(name)} --partial")
    else:
        screen.say(f"What was done is still collected. Look on with:\n  {watch_command(name)}")
    return OK


def abandon_batch(screen: Screen, name: str, model: str | None, *, yes: bool) -> int:
    """``embedcore batch abandon``."""
    with books_of(name) as (books, record), Clients(books=books, model=model) as clients:
        before = books.report(record)
        _require_open(before)
        if not _agreed(screen, _question(before), yes=yes):
            screen.complain("Nothing was changed.")
            return USAGE
        report = clients.job(record).abandon()
    screen.answer(report_fields(report))
    screen.show(report_text(report))
    return OK


def _require_open(report: BatchReport) -> None:
    if report.has_ended:
        raise ConfigurationError(
            f"batch {report.id} has ended already ({report.state}): {fetch_command(report.id)}"
        )


def _question(report: BatchReport) -> str:
    texts = plural(report.texts - report.stored - report.failed, "text")
    held = f" Of the {dollars(report.held_picodollars)} held for it, what may have been billed "
    money = f"{held}counts as spent." if report.held_tokens else ""
    return f"Batch {report.id} would end with {texts} without a vector.{money}"


def _agreed(screen: Screen, question: str, *, yes: bool) -> bool:
    if yes:
        return True
    if not screen.interactive:
        raise click.UsageError(f"{question} Nobody is here to be asked: --yes does it")
    return click.confirm(f"{question} Go on?", err=True)
