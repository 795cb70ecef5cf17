"""``embedcore batch submit``: what does it cost, may it, and what is its id?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from embedcore.assembly import BATCHES_FOLDER
from embedcore.cli.batchnotes import (
    CountedInputs,
    Note,
    absolute,
    digest_of,
    read_note,
    write_note,
)
from embedcore.cli.batchplan import BatchPlan
from embedcore.cli.batchtext import code_of_all, code_of_report, report_fields, report_text
from embedcore.cli.batchwatch import watch, watch_command
from embedcore.cli.estimate import Estimate, agree, ask_above, estimated
from embedcore.cli.exits import OK, USAGE
from embedcore.cli.opening import Opened, opened
from embedcore.cli.progress import Shown
from embedcore.cli.text import command
from embedcore.configfile import state_folder
from embedcore.errors import BudgetExceeded, ConfigurationError, InputRejected
from embedcore.files.plan import DEFAULT_BLOCK, planned
from embedcore.files.scan import Scan, scan
from embedcore.files.types import Columns, FilePlan, FileProgress
from embedcore.provider.registry import load

if TYPE_CHECKING:
    from embedcore.cli.batch import BatchWish
    from embedcore.cli.screen import Screen
    from embedcore.files.inputs import Inputs
    from embedcore.policy.batchjob import BatchJob


def submit_files(screen: Screen, wish: BatchWish) -> int:
    """``embedcore batch submit``."""
    columns = Columns(text=wish.text, id=wish.id, keep=wish.keep)
    screen.buying = False
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
        screen.say(plan.text(ready, estimate, waits=wish.on_budget == "wait"))
        if wish.dry_run:
            screen.answer({"plan": plan.fields()})
            screen.say("Nothing was sent.")
            return OK
        if not _agreed(screen, ready, wish, plan):
            screen.complain("Nothing was sent.")
            return USAGE
        job = _Submission(screen, ready, wish, inputs, found).submit()
        screen.buying = None
        code = watch(screen, [job], interval=wish.interval) if wish.wait else OK
        report = job.status(poll=False)
        screen.answer({"plan": plan.fields(), **report_fields(report)})
        screen.show(report_text(report))
        screen.say(_next_steps(job, wish, watched=wish.wait))
    return code_of_all([code, code_of_report(report)]) if wish.wait else OK


def _require_batches(ready: Opened) -> None:
    try:
        ready.client.batch_jobs(ended=False)
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


def _scanned(ready: Opened, wish: BatchWish, inputs: Inputs, shown: Shown) -> Scan:
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
    screen.answer({"plan": BatchPlan(plan=FilePlan(), at_once=0, same=None).fields()})
    screen.show("There is no row in what was named: nothing was submitted.")
    return OK


def _planned(ready: Opened, wish: BatchWish, inputs: Inputs, found: Scan) -> BatchPlan:
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
        plan = replace(plan, in_flight=under_way, to_embed=0, tokens=0, picodollars=0)
    price = ready.client.info.price
    return BatchPlan(
        plan=plan,
        at_once=plan.picodollars if price is None else price.picodollars(plan.tokens),
        same=same,
        mixed=wish.deadline is not None,
    )


def _same_rows(ready: Opened, found: Scan) -> str | None:
    digest, folder = digest_of(found), _folder(ready)
    for job in ready.client.batch_jobs(ended=False):
        note = read_note(folder, job.id)
        if note is not None and note.texts == digest and job.record.state == "open":
            return job.id
    return None


def _agreed(screen: Screen, ready: Opened, wish: BatchWish, plan: BatchPlan) -> bool:
    """A limit that is in the way is left to the client: it knows what was bought before."""
    price = Estimate(plan=plan.at_most)
    return agree(screen, ready, price, yes=wish.yes, ask_above=ask_above(ready))


def _folder(ready: Opened) -> Path:
    return state_folder(ready.config) / BATCHES_FOLDER


@dataclass(frozen=True)
class _Submission:
    """Submits, and remembers where the rows came from, whatever ends it."""

    screen: Screen
    ready: Opened
    wish: BatchWish
    inputs: CountedInputs
    found: Scan

    def submit(self) -> BatchJob:
        client, wish = self.ready.client, self.wish
        on_empty = self.ready.profile.on_empty or self.ready.config.on_empty
        before = {job.id for job in client.batch_jobs()}
        self.screen.say("Submitting …")
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
            self.screen.buying = None
            self.screen.complain(
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


def _next_steps(job: BatchJob, wish: BatchWish, *, watched: bool) -> str:
    first = wish.files[0]
    name = "vectors" if str(first) == "-" else first.stem
    ending = ".parquet" if find_spec("pyarrow") is not None else ".npy"
    fetch = command(["embedcore", "batch", "fetch", job.id, "-o", f"{name}{ending}"])
    if job.record.has_ended:
        return f"Its vectors:\n  {fetch}"
    look = "" if watched else f"Look after it, now or tomorrow:\n  {watch_command(job.id)}\n"
    return f"{look}Then:\n  {fetch}"
