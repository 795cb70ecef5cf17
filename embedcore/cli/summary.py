"""What became of a run over files, and what it has cost so far."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from embedcore import money
from embedcore.cli.estimate import damaged_text
from embedcore.cli.text import (
    amount_cut,
    as_typed,
    command,
    duration,
    facts,
    one_line,
    perhaps_cut_text,
    plural,
    shown_path,
    tokens,
)
from embedcore.events import Event, Settled

if TYPE_CHECKING:
    from pathlib import Path

    from embedcore.cli.session import Session
    from embedcore.files.types import RunReport
    from embedcore.provider.types import ModelInfo


class RunTotals:
    """An observer of the client that adds up what its requests cost, from any thread."""

    def __init__(self) -> None:
        self.tokens = 0
        self.cost = Decimal(0)
        self.exact = True
        self.unconfirmed_tokens = 0
        self.unconfirmed_cost = Decimal(0)
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Settled):
            return
        with self._lock:
            self.tokens += event.tokens
            self.cost += event.cost
            self.exact = self.exact and event.exact
            if event.unconfirmed:
                self.unconfirmed_tokens += event.tokens
                self.unconfirmed_cost += event.cost

    def text(self, info: ModelInfo) -> str | None:
        """For a run that did not finish; None if nothing was spent."""
        if not self.tokens:
            return None
        spent = tokens(self.tokens, exact=self.exact)
        said = f"Spent by this run: {spent}{_at_cost(self.cost, info)}"
        if self.unconfirmed_tokens:
            said += (
                f", of which {tokens(self.unconfirmed_tokens, exact=False)}"
                f"{_of_it(self.unconfirmed_cost, info)}, for requests that "
                "brought no vectors and may have been billed"
            )
        return f"{said}."


def report_text(report: RunReport, ready: Session, path: Path) -> str:
    """For a person: what was embedded, what was not, and where it is."""
    if report.unchanged:
        missing = "" if path.exists() else " (there is none yet)"
        return f"{shown_path(path)} unchanged{missing}\n" + facts(
            list(_lines(report, ready.client.info)), indent="  "
        )
    rows = report.rows - report.failed - report.not_done
    width = ready.client.dimensions
    shape = f"{plural(rows, 'vector')} of {width} dimensions" if width else plural(rows, "vector")
    return f"{shown_path(path)}: {shape} by {ready.name}\n" + facts(
        list(_lines(report, ready.client.info)), indent="  "
    )


def ask_it(path: Path) -> str:
    """The hint at the end of a run that wrote vectors."""
    return f"Ask it something:\n  {next_command(path)}"


def next_command(path: Path) -> str:
    """How to search the output."""
    return command(["embedcore", "similar", "-c", "your question", "-i", str(path)])


def report_fields(report: RunReport, ready: Session) -> dict[str, Any]:
    """For ``--json``."""
    fields = asdict(report)
    usage = fields.pop("usage")
    stopped = report.stopped_at
    if stopped is not None:
        resets_at = None if stopped.resets_at is None else stopped.resets_at.isoformat()
        fields["stopped_at"] = {**asdict(stopped), "resets_at": resets_at}
    return {
        "model": ready.name,
        "fingerprint": ready.client.fingerprint,
        "dimensions": ready.client.dimensions,
        **fields,
        **usage,
    }


def _lines(report: RunReport, info: ModelInfo) -> Iterator[tuple[str, str]]:
    usage = report.usage
    if not report.rows:
        yield "rows", "none in the input"
    if report.embedded and info.local:
        yield "embedded", f"{plural(report.embedded, 'text')}, computed here for nothing"
    elif report.embedded or usage.tokens:
        yield (
            "billed",
            f"{plural(report.embedded, 'text')}, {tokens(usage.tokens, exact=usage.exact)} in "
            f"{plural(usage.requests, 'request')}{_at_cost(usage.cost, info)}",
        )
    else:
        yield "billed", "nothing: $0"
    if report.reused:
        yield "cached", f"{plural(report.reused, 'text')} embedded before, not paid for again"
    if report.damaged:
        yield "damaged", damaged_text(report.damaged)
    if report.duplicates:
        # Of a run that was stopped, some of them are among the rows that are not done.
        whose = " of the whole input" if report.not_done else ", paid once"
        yield "duplicates", f"{plural(report.duplicates, 'row')}{whose}"
    if report.truncated:
        cut = amount_cut(report.tokens_cut, report.characters_cut)
        yield "truncated", f"{plural(report.truncated, 'row')} cut to fit the model, by {cut}"
    if report.perhaps_cut:
        yield "perhaps cut", perhaps_cut_text(report.perhaps_cut)
    if report.failed and report.failed_path is not None:
        listed = shown_path(report.failed_path)
        yield "failed", f"{plural(report.failed, 'row')}, listed in {listed}"
        if report.reason is not None:
            yield "", one_line(as_typed(report.reason), 500)
        if report.retryable:
            rows = "them" if report.retryable == report.failed else plural(report.retryable, "row")
            yield "", f"run the same again for {rows}: what was embedded is not paid for again"
    if report.journaled:
        texts = plural(report.journaled, "vector")
        yield "journal", f"{texts} of texts that are not in this input stay beside the output"
    stopped = report.stopped_at
    if stopped is not None:
        listed = f", listed in {shown_path(report.failed_path)}" if report.failed_path else ""
        yield "not done", f"{plural(report.not_done, 'row')}, from {stopped.where} on{listed}"
        yield "", one_line(stopped.reason, 500).rstrip(".") + "."
        yield "", "Run the same again to go on: what was embedded is not paid for again"
    if usage.unconfirmed_tokens:
        most = tokens(usage.unconfirmed_tokens, exact=False)
        yield (
            "unconfirmed",
            f"{most}{_of_it(usage.unconfirmed_cost, info)}: for requests that "
            "brought no vectors and may have been billed",
        )
    yield "took", duration(report.seconds)


def _at_cost(dollars: Decimal, info: ModelInfo) -> str:
    """To be put after an amount of tokens. What has no known price counts as 0, which is no cost
    to show."""
    return f", {money.shown(None if info.price is None else dollars)}"


def _of_it(dollars: Decimal, info: ModelInfo) -> str:
    """The same of a part, where the whole has said already that the price is not known."""
    return "" if info.price is None else f", {money.shown(dollars)} of the cost"
