"""``embedcore embed``: files, standard input or literal texts into vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from embedcore import money
from embedcore.cli.estimate import Estimate, agree, estimated
from embedcore.cli.options import (
    id_option,
    input_format_option,
    input_type_option,
    json_option,
    keep_option,
    model_option,
    quiet_option,
    scope_option,
    text_option,
    verbose_option,
    yes_option,
)
from embedcore.cli.process import BUDGET, OK, USAGE, code_of_rows
from embedcore.cli.progress import Shown
from embedcore.cli.screen import STDIN, Screen
from embedcore.cli.session import Session, opened
from embedcore.cli.summary import RunTotals, ask_it, report_fields, report_text
from embedcore.cli.text import amount_cut, perhaps_cut_text, plural, tokens
from embedcore.errors import InputRejected
from embedcore.files.cuts import codes_of, tally
from embedcore.files.run import embed_files, plan_files
from embedcore.files.types import FilePlan, FileProgress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.files.types import InputFormat, OnBudget, RunReport, Source
    from embedcore.policy.result import EmbeddingResult


def embed_literally(screen: Screen, wish: EmbedArguments) -> int:
    """``embedcore embed -c TEXT``: one JSON array per text, one a line; null for a failed one."""
    screen.paying = False
    with opened(wish.model, wish.scope) as ready:
        estimate = estimated(
            ready,
            _plan(ready, wish),
            lane="query" if wish.input_type == "query" else "all",
            on_budget=wish.on_budget,
        )
        if wish.dry_run:
            screen.json({"plan": estimate.fields(ready)})
            screen.result(estimate.text(ready))
            return OK
        if not agree(screen, ready, estimate, yes=wish.yes, ask_above=ready.config.confirm_above):
            screen.error("Nothing was sent.")
            return USAGE
        screen.paying = True
        result = ready.client.embed(
            list(wish.texts),
            input_type=wish.input_type,
            on_error=wish.on_error,
            on_budget=wish.on_budget,
        )
        screen.paying = None
    _show(screen, result)
    if result.stopped_at is not None:
        return BUDGET
    errors = result.errors.values()
    return code_of_rows(failed=len(errors), retryable=sum(error.retryable for error in errors))


def _plan(ready: Session, wish: EmbedArguments) -> FilePlan:
    plan = ready.client.plan(list(wish.texts), input_type=wish.input_type)
    return FilePlan(
        rows=plan.rows,
        duplicates=plan.rows - plan.unique - plan.rejected,
        cached=plan.cached,
        to_embed=plan.to_embed,
        rejected=plan.rejected,
        tokens=plan.tokens,
        exact=plan.exact,
        cost=plan.cost,
        requests=plan.requests,
        truncated=plan.truncated,
        perhaps_long=plan.perhaps_long,
    )


def _show(screen: Screen, result: EmbeddingResult) -> None:
    rows = [
        _numbers(row) if ok else None for row, ok in zip(result.vectors, result.ok, strict=True)
    ]
    usage = result.usage
    screen.json(
        {
            "model": result.model,
            "fingerprint": result.fingerprint,
            "vectors": rows,
            "errors": {row: str(error) for row, error in result.errors.items()},
            "tokens_cut": dict(result.tokens_cut),
            "characters_cut": dict(result.characters_cut),
            "perhaps_cut": sorted(result.perhaps_cut),
            **_cost_fields(result),
        }
    )
    for row in rows:
        screen.result(json.dumps(row), whole=True)
    for said in dict.fromkeys(str(error) for error in result.errors.values()):
        screen.error(said)
    cut = tally(codes_of(result.cuts, list(result.cuts)))
    if cut.rows:
        screen.error(f"{plural(cut.rows, 'text')} cut by {amount_cut(cut.tokens, cut.characters)}")
    if cut.unknown:
        screen.error(perhaps_cut_text(cut.unknown, "text"))
    if usage.tokens:
        requests = plural(usage.requests, "request")
        cost = money.shown(usage.cost)
        screen.info(
            f"{result.model}: {tokens(usage.tokens, exact=usage.exact)} in {requests}, {cost}"
        )


def _cost_fields(result: EmbeddingResult) -> dict[str, Any]:
    usage = result.usage
    return {
        "tokens": usage.tokens,
        "cost": usage.cost,
        "requests": usage.requests,
        "unconfirmed_tokens": usage.unconfirmed_tokens,
        "unconfirmed_cost": usage.unconfirmed_cost,
        "free_by_status_tokens": usage.free_by_status_tokens,
        "free_by_status_cost": usage.free_by_status_cost,
        "free_by_status_requests": usage.free_by_status_requests,
    }


def _numbers(vector: NDArray[np.float32]) -> list[float]:
    # The shortest digits that give the same float32, instead of those of its double.
    return [float(str(number)) for number in vector]


class FileRun:
    """One call of ``embed_files``. ``above``: ask before spending more US dollars than this."""

    def __init__(
        self,
        screen: Screen,
        ready: Session,
        tally: RunTotals,
        *,
        yes: bool,
        above: Decimal,
        on_budget: OnBudget = "raise",
    ) -> None:
        self._screen = screen
        self._ready = ready
        self._tally = tally
        self._yes = yes
        self._above = above
        self._on_budget: OnBudget = on_budget
        self._shown = Shown(screen)
        self.estimate: Estimate | None = None

    def run(self, sources: Sequence[Source], output: Path, **options: Any) -> RunReport:
        """Embed, and show how far it is. ``options``: those of ``embed_files``."""
        self._screen.paying = False
        with self._shown:
            # Counting the tokens of a large corpus takes its time as well. What moves would write
            # over what is typed.
            if not self._screen.awaits_input(sources, options.get("input_format")):
                self._shown.draw(FileProgress(stage="reading"))
            try:
                report = embed_files(
                    self._ready.client,
                    sources,
                    output,
                    on_plan=self._agree,
                    on_progress=self._shown.draw,
                    on_budget=self._on_budget,
                    **options,
                )
            except BaseException as error:
                self._shown.pause()
                if isinstance(error, InputRejected) and error.reason == "empty text":
                    error.add_note("--on-error keep lists them as failed and embeds the rest.")
                if spent := self._tally.text(self._ready.client.info):
                    self._screen.error(spent)
                raise
        self._screen.paying = None
        return report

    def _agree(self, plan: FilePlan) -> bool:
        self._shown.pause()
        estimate = self.estimate = estimated(self._ready, plan, on_budget=self._on_budget)
        self._screen.info(estimate.text(self._ready, brief=True))
        agreed = agree(self._screen, self._ready, estimate, yes=self._yes, ask_above=self._above)
        self._screen.paying = agreed
        return agreed


def run_files(screen: Screen, wish: EmbedArguments) -> int:
    """``embedcore embed`` with an output, or ``--dry-run``."""
    tally = RunTotals()
    with opened(wish.model, wish.scope, [tally]) as ready:
        if wish.dry_run:
            return _dry_run(screen, ready, wish)
        assert wish.output is not None  # noqa: S101 - the command has looked
        run = FileRun(
            screen,
            ready,
            tally,
            yes=wish.yes,
            above=ready.config.confirm_above,
            on_budget=wish.on_budget,
        )
        report = run.run(
            _sources(wish),
            wish.output,
            keep_text=wish.keep_text,
            on_error=wish.on_error,
            **_options(ready, wish),
        )
        if report.declined:
            screen.error("Nothing was sent.")
            return USAGE
        plan = run.estimate.fields(ready) if run.estimate else {}
        screen.json({"plan": plan, **report_fields(report, ready)})
        code = code_of_rows(failed=report.failed, retryable=report.retryable)
        if report.stopped_at is not None:
            code = BUDGET
        screen.report(report_text(report, ready, wish.output), failed=code != OK)
        if report.has_vectors:
            screen.info(ask_it(wish.output))
    return code


def _dry_run(screen: Screen, ready: Session, wish: EmbedArguments) -> int:
    sources = _sources(wish)
    screen.awaits_input(sources, wish.input_format)
    plan = plan_files(ready.client, sources, wish.output, **_options(ready, wish))
    estimate = estimated(ready, plan, on_budget=wish.on_budget)
    screen.json({"plan": estimate.fields(ready)})
    screen.result(estimate.text(ready))
    screen.info("Nothing was sent.")
    return OK


def _sources(wish: EmbedArguments) -> list[Source]:
    if wish.texts:
        return [wish.texts]
    return [STDIN if str(file) == STDIN else file for file in wish.files]


def _options(ready: Session, wish: EmbedArguments) -> dict[str, Any]:
    """What ``plan_files`` and ``embed_files`` both take."""
    on_empty = ready.profile.on_empty or ready.config.on_empty
    return {
        "text_column": wish.text,
        "id_column": wish.id,
        "keep": wish.keep,
        "input_type": wish.input_type,
        "input_format": wish.input_format,
        "on_empty": "keep" if "keep" in (on_empty, wish.on_error) else "raise",
        "overwrite": wish.overwrite,
    }


@dataclass(frozen=True, kw_only=True)
class EmbedArguments:
    """What was asked for on the command line."""

    files: tuple[Path, ...]
    texts: tuple[str, ...]
    text: str
    id: str | None
    keep: tuple[str, ...]
    input_format: InputFormat | None
    model: str | None
    output: Path | None
    keep_text: bool
    input_type: str | None
    on_error: Literal["raise", "keep"]
    on_budget: OnBudget
    scope: str | None
    overwrite: bool
    dry_run: bool
    yes: bool


def _existing(_: click.Context, __: click.Parameter, files: tuple[Path, ...]) -> tuple[Path, ...]:
    for file in files:
        if str(file) != STDIN and not file.exists():
            name = click.format_filename(file)
            raise click.BadParameter(f"{name!r}: there is no such file. A text goes after -c.")
    return files


@click.command(name="embed")
@click.argument(
    "files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path), callback=_existing
)
@click.option("-c", "texts", multiple=True, metavar="TEXT", help="A text itself. Repeatable.")
@text_option
@id_option
@keep_option
@input_format_option
@model_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A .parquet, .jsonl or .npy file."
)
@click.option(
    "--no-text",
    "keep_text",
    flag_value=False,
    default=True,
    type=bool,
    help="Leave the texts out of the output.",
)
@input_type_option
@click.option(
    "--on-error",
    type=click.Choice(["raise", "keep"]),
    default="raise",
    show_default=True,
    help="End at the first row that fails, or list them and go on.",
)
@click.option(
    "--on-budget",
    type=click.Choice(["raise", "stop", "wait"]),
    default="raise",
    show_default=True,
    help="What a limit does not allow: refuse it; embed as many rows as it does allow, in their "
    "order; or wait for the rest until the limit resets.",
)
@scope_option
@click.option(
    "--overwrite", "--force", is_flag=True, help="Replace an output that another model made."
)
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop there.")
@yes_option
@quiet_option
@json_option
@verbose_option
@click.pass_obj
def command(screen: Screen, /, **given: Any) -> int:
    """Embed FILES into one output: .txt (a text on each line), .jsonl or .csv; - is standard input.

    The price is shown first. Stop it at any time and run it again: what was paid for is not paid
    for again, and only texts that are missing or changed are sent.
    """
    wish = EmbedArguments(**given)
    if bool(wish.files) == bool(wish.texts):
        raise click.UsageError(
            "Name files, or texts with -c."
            if not wish.files
            else "Files and texts (-c) do not go together."
        )
    if wish.output is None and wish.files and not wish.dry_run:
        raise click.UsageError("Name the file for the vectors: -o vectors.npy (.jsonl, .parquet).")
    if wish.texts and wish.output is None:
        return embed_literally(screen, wish)

    return run_files(screen, wish)
