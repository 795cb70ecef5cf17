"""``embedcore demo``: real texts, embedded and searched, before there is a key."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from embedcore.cli.corpus import docstrings
from embedcore.cli.filerun import FileRun
from embedcore.cli.opening import Opened, opened
from embedcore.cli.options import model_option, scope_option, talking, yes_option
from embedcore.cli.screen import Screen
from embedcore.cli.summary import next_command, report_fields
from embedcore.cli.tally import Tally
from embedcore.cli.text import (
    command as shell_command,
    dollars,
    duration,
    facts,
    one_line,
    plural,
    shown_path,
)
from embedcore.errors import UnknownProvider
from embedcore.files.search import search
from embedcore.provider.known import how_to_install

if TYPE_CHECKING:
    from embedcore.files.search import Hit
    from embedcore.files.types import RunReport

OFFLINE: Final = "hashing:512"
PAID: Final = "openai:text-embedding-3-small"
QUESTIONS: Final = (
    "parse a date string into a datetime",
    "how can I pick a random element from a list",
    "wait for a process to terminate",
)
_HITS = 3
_SENTENCE = 72


@click.command(name="demo")
@model_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .npy, .jsonl or .parquet file; default embedcore-demo-MODEL.npy.",
)
@scope_option
@yes_option
@talking
@click.pass_obj
def command(
    screen: Screen, model: str | None, output: Path | None, scope: str | None, yes: bool
) -> int:
    """Embed the docstrings of your own Python's standard library, and ask them three questions.

    Offline and free by default, with the provider hashing, which compares words. With another
    model (-m) the price is shown and confirmed first.
    """
    started = time.monotonic()
    tally = Tally()
    try:
        with opened(model or OFFLINE, scope, [tally]) as ready:
            path = output or Path(f"embedcore-demo-{_in_name(ready.name)}.npy")
            report = _embedded(screen, ready, tally, path, yes=yes)
            if report.declined:
                screen.complain("Nothing was sent.")
                return 2
            found = search(ready.client, QUESTIONS, path, limit=_HITS, input_type="query")
            _show(screen, ready, report, path, found, time.monotonic() - started)
    except UnknownProvider as error:
        if model is not None:
            raise
        raise UnknownProvider(
            "the demo uses the provider 'hashing', which is not installed. "
            f"{how_to_install('hashing')}",
            installed=error.installed,
        ) from None
    return 0


def _embedded(screen: Screen, ready: Opened, tally: Tally, path: Path, *, yes: bool) -> RunReport:
    rows = docstrings()
    where = "computed here, nothing is sent" if ready.client.info.local else "sent to its provider"
    screen.say(
        f"{len(rows):,} docstrings of the standard library of Python {platform.python_version()}, "
        f"embedded with {ready.name} ({where})"
    )
    run = FileRun(screen, ready, tally, yes=yes, above=0)
    return run.run([rows], path)


def _show(
    screen: Screen,
    ready: Opened,
    report: RunReport,
    path: Path,
    found: Sequence[Sequence[Hit]],
    seconds: float,
) -> None:
    pairs = list(zip(QUESTIONS, found, strict=True))
    screen.answer(
        {
            **report_fields(report, ready),
            "seconds": seconds,
            "questions": [
                {"question": question, "hits": [asdict(hit) for hit in hits]}
                for question, hits in pairs
            ],
        }
    )
    for question, hits in pairs:
        screen.show(f"\n{question}?")
        for hit in hits:
            screen.show(f"  {hit.score:.2f}  {hit.id}\n        {_first_sentence(hit.text or '')}")
    screen.show("\n" + facts(_facts(report, path, seconds)))
    screen.show(f"\nAsk it something yourself:\n  {next_command(path)}")
    if ready.name != PAID:
        again = shell_command(["embedcore", "demo", "--model", PAID])
        screen.show(
            f"The same with OpenAI (OPENAI_API_KEY set; the price is shown first):\n  {again}"
        )


def _facts(report: RunReport, path: Path, seconds: float) -> list[tuple[str, str]]:
    bought = plural(report.bought, "text")
    if not report.bought:
        bought = f"nothing: all {plural(report.reused, 'text')} were embedded by an earlier run"
    elif report.reused:
        bought += f"; {report.reused:,} were embedded by an earlier run"
    return [
        ("embedded", bought),
        ("cost", dollars(report.usage.picodollars)),
        ("vectors", shown_path(path.resolve())),
        ("took", duration(seconds)),
    ]


def _first_sentence(text: str) -> str:
    paragraph = re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0]
    sentence = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]
    return one_line(sentence, _SENTENCE)


def _in_name(model: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model)[:80]
