"""``embedcore batch submit``: price, question, submission."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedcore import money
from embedcore.assembly import BATCHES_FOLDER
from embedcore.cli.batch.records import (
    CountedInputs,
    Note,
    absolute,
    digest_of,
    read_note,
    write_note,
)
from embedcore.cli.batch.status import (
    code_of_all,
    code_of_report,
    report_fields,
    report_text,
    watch,
    watch_command,
)
from embedcore.cli.estimate import (
    Estimate,
    agree,
    estimated,
    limit_text,
    perhaps,
    rows_text,
    will_be_cut,
)
from embedcore.cli.process import OK, USAGE
from embedcore.cli.progress import Shown
from embedcore.cli.session import Session, opened
from embedcore.cli.text import command, facts, plural
from embedcore.config import state_folder
from embedcore.errors import BudgetExceeded, ConfigurationError, InputRejected
from embedcore.files.run import DEFAULT_BLOCK, planned
from embedcore.files.scan import Scan, scan
from embedcore.files.types import Columns, FilePlan, FileProgress, InputFormat
from embedcore.provider.registry import load

if TYPE_CHECKING:
    from embedcore.cli.screen import Screen
    from embedcore.files.inputs import Inputs
    from embedcore.policy.batch.job import BatchJob


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What a batch would cost. ``plan`` has the batch's price, ``at_once`` that of ``embed``.

    ``same``: the id of an open batch with the same rows, whose texts it would join. ``mixed``: part
    of it, or all, may be embedded at once.
    """

    plan: FilePlan
    at_once: Decimal | None
    same: str | None
    mixed: bool = False

    @property
    def at_most(self) -> FilePlan:
        """With the most that it may cost."""
        return replace(self.plan, cost=self.at_once) if self.mixed else self.plan

    @property
    def at_least(self) -> FilePlan:
        """With the lower price of the ways that it may take: limits refuse what fits in none."""
        prices = [one for one in (self.plan.cost, self.at_once) if one is not None]
        if not self.mixed or not prices:
            return self.plan
        return replace(self.plan, cost=min(prices))

    def fields(self) -> dict[str, Any]:
        """For ``--json``."""
        plan = self.plan
        return {
            "rows": plan.rows,
            "empty": plan.empty,
            "duplicates": plan.duplicates,
            "rejected": plan.rejected,
            "cached": plan.cached,
            "in_flight": plan.in_flight,
            "to_embed": plan.to_embed,
            "tokens": plan.tokens,
            "exact": plan.exact,
            "truncated": plan.truncated,
            "perhaps_long": plan.perhaps_long,
            "cost": plan.cost,
            "cost_at_once": self.at_once,
            "joins": self.same,
        }

    def text(self, ready: Session, estimate: Estimate, *, waits: bool, brief: bool) -> str:
        """For a person. ``waits``: what is over a limit waits for budget. ``brief``: an error will
        say in full what a limit refuses."""
        plan = self.plan
        pairs = [("model", f"{ready.name}, as a batch"), ("rows", rows_text(plan))]
        if self.same is not None:
            pairs.append(("to embed", f"nothing: batch {self.same} has the same rows under way"))
        elif not plan.to_embed:
            pairs += [("to embed", "nothing: every text is cached or under way"), ("cost", "$0")]
        else:
            bound = "" if plan.exact else "at most "
            cut = will_be_cut(plan)
            texts = plural(plan.to_embed, "text")
            pairs.append(("to embed", f"{texts}, {bound}{plural(plan.tokens, 'token')}{cut}"))
            pairs.append(("cost", self._cost(ready)))
        verb = "will" if plan.exact else "may"
        then = f"{verb} make a part of it wait" if waits else f"{verb} refuse"
        for refusal in estimate.refusals:
            pairs.append(("limit", f"{then}: {limit_text(refusal, brief=brief)}"))
        return facts(pairs)

    def _cost(self, ready: Session) -> str:
        price = ready.client.info.price
        if price is None or self.plan.cost is None:
            return f"not known: the price of this model is not{perhaps(ready)}"
        if price.free:
            return "$0"
        if price.batch is None:
            return f"at most {money.shown(self.plan.cost)}: it has no price of its own for batches"
        at_once = "if all is embedded at once, it" if self.mixed else "at once it"
        return (
            f"at most {money.shown(self.plan.cost)} (${price.batch:f} per million tokens); "
            f"{at_once} would be {money.shown(self.at_once)}"
        )


@dataclass(frozen=True, kw_only=True)
class SubmitArguments:
    """What ``batch submit`` was asked for on the command line."""

    files: tuple[Path, ...]
    text: str
    id: str | None
    keep: tuple[str, ...]
    input_format: InputFormat | None
    model: str | None
    input_type: str | None
    on_error: Literal["raise", "keep"]
    on_budget: Literal["raise", "wait"]
    resubmit_lost: bool
    deadline: float | None
    scope: str | None
    dry_run: bool
    yes: bool
    wait: bool
    interval: float


def submit_files(screen: Screen, wish: SubmitArguments) -> int:
    """``embedcore batch submit``."""
    columns = Columns(text=wish.text, id=wish.id, keep=wish.keep)
    screen.paying = False
    screen.awaits_input(wish.files, wish.input_format)
    with (
        opened(wish.model, wish.scope) as ready,
        CountedInputs(
            absolute(wish.files), columns=columns, input_format=wish.input_format
        ) as inputs,
    ):
        if inputs.are_empty():
            return _nothing(screen)
        _require_batches(ready)
        with Shown(screen) as shown:
            shown.draw(FileProgress(stage="reading"))
            found = _scanned(ready, wish, inputs, shown)
            plan = _planned(ready, wish, inputs, found)
        estimate = estimated(ready, plan.at_least)
        waits = wish.on_budget == "wait"
        text = plan.text(ready, estimate, waits=waits, brief=not wish.dry_run)
        if wish.dry_run:
            screen.result(text)
            screen.json({"plan": plan.fields()})
            screen.info("Nothing was sent.")
            return OK
        screen.info(text)
        if not _agreed(screen, ready, wish, plan):
            screen.error("Nothing was sent.")
            return USAGE
        job = _Submission(screen, ready, wish, inputs, found).submit()
        screen.paying = None
        code = watch(screen, [job], interval=wish.interval) if wish.wait else OK
        report = job.status(poll=False)
        screen.json({"plan": plan.fields(), **report_fields(report)})
        if wish.wait:
            code = code_of_all([code, code_of_report(report)])
        text = report.id if screen.quiet and code == OK else report_text(report)
        screen.result(text)
        screen.info(_next_steps(job, wish, watched=wish.wait))
    return code


def _require_batches(ready: Session) -> None:
    try:
        ready.client.plan([], batch=True)
    except ConfigurationError as error:
        provider = ready.client.provider
        # A server of one's own is not taken to have batches, and its provider may let one say so.
        if "batch" in load(provider).options.model_fields:
            error.add_note(
                f"If the server at {ready.client.info.endpoint} has a batch API, say so: "
                f"batch = true under [options.{provider}]"
            )
        error.add_note("At once, at the full price: embedcore embed FILE -o vectors.npy")
        raise


def _scanned(ready: Session, wish: SubmitArguments, inputs: Inputs, shown: Shown) -> Scan:
    on_empty = ready.profile.on_empty or ready.config.on_empty
    keeps = "keep" in (on_empty, wish.on_error)
    try:
        found = scan(
            inputs,
            on_empty="keep" if keeps else "raise",
            on_rows=lambda done: shown.draw(FileProgress(stage="reading", done=done)),
        )
    except InputRejected as error:
        if error.reason == "empty text":
            error.add_note("--on-error keep lists them as failed and submits the rest.")
        raise
    return found


def _nothing(screen: Screen) -> int:
    screen.json({"plan": BatchPlan(plan=FilePlan(), at_once=Decimal(0), same=None).fields()})
    screen.result("There is no row in what was named: nothing was submitted.")
    return OK


def _planned(ready: Session, wish: SubmitArguments, inputs: Inputs, found: Scan) -> BatchPlan:
    plan = planned(
        ready.client,
        inputs,
        found,
        found.firsts,
        input_type=wish.input_type,
        block=DEFAULT_BLOCK,
        batch=True,
    )
    same = _same_rows(ready, found)
    if same is not None:
        # In its jobs or about to be: the open batch has the money for all of it.
        under_way = plan.in_flight + plan.to_embed
        plan = replace(plan, in_flight=under_way, to_embed=0, tokens=0, cost=Decimal(0))
    price = ready.client.info.price
    return BatchPlan(
        plan=plan,
        at_once=plan.cost if price is None else money.in_dollars(price.picodollars(plan.tokens)),
        same=same,
        mixed=wish.deadline is not None,
    )


def _same_rows(ready: Session, found: Scan) -> str | None:
    digest, folder = digest_of(found), _folder(ready)
    for job in ready.client.batch_jobs(ended=False):
        note = read_note(folder, job.id)
        if note is not None and note.texts == digest and job.record.state == "open":
            return job.id
    return None


def _agreed(screen: Screen, ready: Session, wish: SubmitArguments, plan: BatchPlan) -> bool:
    """A limit that is in the way is left to the client: it knows what is cached."""
    price = Estimate(plan=plan.at_most)
    return agree(
        screen, ready, price, yes=wish.yes, ask_above=ready.config.confirm_above, batch=True
    )


def _folder(ready: Session) -> Path:
    return state_folder(ready.config) / BATCHES_FOLDER


@dataclass(frozen=True)
class _Submission:
    """Submits, and remembers where the rows came from, whatever ends it."""

    screen: Screen
    ready: Session
    wish: SubmitArguments
    inputs: CountedInputs
    found: Scan

    def submit(self) -> BatchJob:
        client, wish = self.ready.client, self.wish
        on_empty = self.ready.profile.on_empty or self.ready.config.on_empty
        before = {job.id for job in client.batch_jobs()}
        self.screen.info("Submitting …")
        try:
            job = client.submit_batch(
                self._rows(),
                input_type=wish.input_type,
                on_error="keep" if "keep" in (on_empty, wish.on_error) else "raise",
                on_budget=wish.on_budget,
                resubmit_lost=wish.resubmit_lost,
                strategy="batch" if wish.deadline is None else "auto",
                deadline=wish.deadline,
            )
        except BaseException as error:
            self._explain(error, before)
            raise
        self._remember(job)
        return job

    def _rows(self) -> Iterator[tuple[str, str]]:
        for row in self.inputs.rows():
            self.found.check(row)
            yield row.id, row.text

    def _explain(self, error: BaseException, before: set[str]) -> None:
        if isinstance(error, BudgetExceeded) and error.resets_at is not None:
            error.add_note(
                "--on-budget wait submits what fits now, and the rest when there is budget again."
            )
        if isinstance(error, InputRejected) and error.position is not None:
            row = next(islice(self.inputs.rows(), error.position, None), None)
            if row is not None:
                error.add_note(f"this is row {row.position} of the input, {row.where}")
        # It is written down before anything is sent, and goes on in whichever process.
        jobs = self.ready.client.batch_jobs(ended=False)
        left = [job for job in jobs if job.id not in before and job.record.rows == self.found.rows]
        for job in left:
            self._remember(job)
            self.screen.paying = None
            self.screen.error(
                f"Batch {job.id} is written down. It goes on with:\n  {watch_command(job.id)}"
            )

    def _remember(self, job: BatchJob) -> None:
        wish = self.wish
        note = Note(
            model=wish.model,
            folder=str(Path.cwd()),
            files=absolute(wish.files),
            text=wish.text,
            id=wish.id,
            keep=wish.keep,
            input_format=wish.input_format,
            input_type=wish.input_type,
            rows=self.found.rows,
            texts=digest_of(self.found),
            ids=self.inputs.ids,
        )
        write_note(_folder(self.ready), job.id, note, self.found.raw)


def _next_steps(job: BatchJob, wish: SubmitArguments, *, watched: bool) -> str:
    first = wish.files[0]
    name = "vectors" if str(first) == "-" else first.stem
    ending = ".parquet" if find_spec("pyarrow") is not None else ".npy"
    fetch = command(["embedcore", "batch", "fetch", job.id, "-o", f"{name}{ending}"])
    if job.record.has_ended:
        return f"Its vectors:\n  {fetch}"
    look = "" if watched else f"Look after it, now or tomorrow:\n  {watch_command(job.id)}\n"
    return f"{look}Then:\n  {fetch}"
