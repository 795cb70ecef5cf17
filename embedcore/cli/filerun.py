"""A run over files as a person sees it: the price, the progress, what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedcore.cli.estimate import Estimate, agree, ask_above, estimated
from embedcore.cli.exits import BUDGET, FAILED, OK
from embedcore.cli.opening import Opened, opened
from embedcore.cli.progress import Shown
from embedcore.cli.summary import report_fields, report_text
from embedcore.cli.tally import Tally
from embedcore.errors import InputRejected
from embedcore.files.plan import plan_files
from embedcore.files.run import embed_files
from embedcore.files.types import FileProgress

if TYPE_CHECKING:
    from embedcore.cli.embed import Wish
    from embedcore.cli.screen import Screen
    from embedcore.files.types import FilePlan, OnBudget, RunReport, Source


class FileRun:
    """One call of ``embed_files``. ``above``: ask before spending more picodollars than this."""

    def __init__(
        self,
        screen: Screen,
        ready: Opened,
        tally: Tally,
        *,
        yes: bool,
        above: int,
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
        self._screen.buying = False
        with self._shown:
            # Counting the tokens of a large corpus takes its time as well.
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
                if spent := self._tally.text():
                    self._screen.complain(spent)
                raise
        self._screen.buying = None
        return report

    def _agree(self, plan: FilePlan) -> bool:
        self._shown.pause()
        estimate = self.estimate = estimated(self._ready, plan, on_budget=self._on_budget)
        self._screen.say(estimate.text(self._ready))
        agreed = agree(self._screen, self._ready, estimate, yes=self._yes, ask_above=self._above)
        self._screen.buying = agreed
        return agreed


def run_files(screen: Screen, wish: Wish) -> int:
    """``embedcore embed`` with an output, or ``--dry-run``."""
    tally = Tally()
    with opened(wish.model, wish.scope, [tally]) as ready:
        if wish.dry_run:
            return _dry_run(screen, ready, wish)
        assert wish.output is not None  # noqa: S101 - the command has looked
        run = FileRun(
            screen,
            ready,
            tally,
            yes=wish.yes,
            above=ask_above(ready),
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
            screen.complain("Nothing was sent.")
            return 2
        plan = run.estimate.fields(ready) if run.estimate else {}
        screen.answer({"plan": plan, **report_fields(report, ready)})
        screen.show(report_text(report, ready, wish.output))
    if report.stopped_at is not None:
        return BUDGET
    return FAILED if report.failed else OK


def _dry_run(screen: Screen, ready: Opened, wish: Wish) -> int:
    plan = plan_files(ready.client, _sources(wish), wish.output, **_options(ready, wish))
    estimate = estimated(ready, plan, on_budget=wish.on_budget)
    screen.answer({"plan": estimate.fields(ready)})
    screen.show(estimate.text(ready))
    screen.say("Nothing was sent.")
    return 0


def _sources(wish: Wish) -> list[Source]:
    if wish.texts:
        return [wish.texts]
    return ["-" if str(file) == "-" else file for file in wish.files]


def _options(ready: Opened, wish: Wish) -> dict[str, Any]:
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
