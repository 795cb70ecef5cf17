"""Advances a batch: everything that is due for it, once.

It may be called in any process and at any time: the normal path is the recovery path.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from embedcore.errors import BudgetExceeded, EmbeddingError, PermanentProviderError
from embedcore.events import BatchWaits, Progress
from embedcore.policy.batch import deadline as draining
from embedcore.policy.batch.part import PartWorker
from embedcore.storage.amounts import HeldLoosely
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.part_money import Ended
from embedcore.storage.standing import Standing, ToDo, standing, to_do

if TYPE_CHECKING:
    from embedcore.policy.batch.context import BatchContext
    from embedcore.storage.batches import BatchPhase, BatchRecord, Counts
    from embedcore.storage.parts import Part


logger = logging.getLogger("embedcore")

_BUDGET_SECONDS: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What one look at a batch found.

    ``problems``: errors that waiting alone does not mend. ``due``: seconds until it is worth while
    to look again; None: whenever the caller likes. ``changed``: something went on.
    """

    standing: Standing
    changed: bool = False
    problems: list[EmbeddingError] = field(default_factory=list)
    due: float | None = None

    @property
    def batch(self) -> BatchRecord:
        return self.standing.batch


def advance(context: BatchContext, batch: BatchRecord, *, asked: bool = False) -> Look:
    """Do what is due for a batch: plan, upload, create, poll, look for what was lost, collect.

    ``asked``: also what would be tried again a little later, such as results that are late.

    Raises ``StorageError`` only: what the provider says is in ``problems`` and in the parts, and
    changes nothing that was written down.
    """
    ledger, work = context.batches.ledger, PartWorker(context, asked=asked)
    there = to_do(ledger, batch)
    batch = there.batch
    if draining.is_due(context, batch, there.now):
        context.batches.drain(batch)
        batch = context.batches.again(batch)
    changed = _work_through(context, there, work)
    if batch.draining and batch.state == "open" and batch.retry <= there.now:
        changed |= draining.drain(context, batch, work.problems)
    elif _plan(context, batch, work, there.now):
        changed = True
        _work_through(context, to_do(ledger, batch), work)
    found = standing(ledger, batch)
    if found.counts.stopped and not found.batch.has_ended:
        work.problems.append(_stopped(batch, found.counts))
    # After what it writes down, the batch is not as it was found.
    if draining.is_late(context, batch, found) | _end(context, found):
        found = standing(ledger, batch)
    _tell_progress(context, found)
    return Look(standing=found, changed=changed, problems=work.problems, due=_due(found))


def cancel(context: BatchContext, batch: BatchRecord) -> BatchRecord:
    """Ask for nothing more. The next ``advance`` stops parts that no other batch waits for."""
    batch = context.batches.again(batch)
    if not batch.has_ended:
        context.batches.set_state(batch, "cancelling")
    return context.batches.again(batch)


def abandon(context: BatchContext, batch: BatchRecord) -> BatchRecord:
    """End a batch by hand, without a remote call. What is unconfirmed counts as spent.

    Parts for which others wait go on.
    """
    batch = context.batches.again(batch)
    if batch.has_ended:
        return batch
    context.batches.set_state(batch, "cancelling")
    for part in context.jobs.of_batch(batch):
        _abandon(context, part)
    _forget_texts(context, batch)
    context.batches.set_state(batch, "abandoned")
    return context.batches.again(batch)


def _abandon(context: BatchContext, part: Part) -> None:
    if part.state == "done" or context.jobs.is_wanted(part):
        return
    owned = context.jobs.take(part)
    if owned is None:
        logger.warning("part %d is being worked on by another process, which ends it", part.id)
        return
    if owned.attempt is None:
        context.steps.dissolve(owned)
        return
    named = f" Its job {owned.job} may go on" if owned.job else ""
    logger.warning("part %d is given up: its reserved cost counts as spent.%s", part.id, named)
    ended = Ended(actual=None, note="forgotten by hand", counts=False)
    context.tell(*context.steps.end(owned, ended))


def _work_through(context: BatchContext, there: ToDo, work: PartWorker) -> bool:
    changed, mine = False, {part.id for part in there.parts}
    for part in there.parts:
        changed |= work.work(part, there.now)
    if all(part.id in mine for part in there.live):
        return changed
    if mine:
        there = to_do(context.batches.ledger, there.batch)
    # Those of others may keep ours waiting, and who waits for them may be gone. What is wrong with
    # them is said in the log, and is no fault of this batch.
    others, waits = PartWorker(context), any(part.state == "planned" for part in there.parts)
    for part in there.live:
        if part.id in mine:
            continue
        # No batch waits for some any more, and yet their money and their jobs must find an end.
        if waits or part.state in ("lost", "stray") or not context.jobs.is_wanted(part):
            changed |= others.work(part, there.now)
    return changed


def _plan(context: BatchContext, batch: BatchRecord, work: PartWorker, now: int) -> bool:
    """Cut parts of what is still to be submitted, as far as there is money for it."""
    if batch.state != "open" or batch.draining or batch.retry > now:
        return False
    planned = False
    try:
        # What is reserved and not needed is released where nothing is left to be submitted.
        if batch.grant is not None or context.batches.to_submit(batch, 1, stopped=True):
            draining.take_what_is_there(context, batch)
            cut = context.cut(now)
            part, after = context.cutter.plan(batch, cut)
            while part is not None:
                planned = True
                part, after = context.cutter.plan(batch, cut, after=after)
    except HeldLoosely as wait:
        _block(context, batch, wait.refusal)
    except BudgetExceeded as error:
        _block(context, batch, error)
        if error.never_fits:
            work.problems.append(error)
    else:
        if batch.blocked is not None and batch.blocked.startswith("budget"):
            context.batches.block(batch, None)
    return planned


def _block(context: BatchContext, batch: BatchRecord, error: BudgetExceeded) -> None:
    # A limit may be raised, or others may settle for less, long before its window ends.
    until = context.later(_BUDGET_SECONDS)
    if batch.blocked is None:
        context.engine.observe(
            BatchWaits(
                batch=batch.name,
                scope=context.pool.scope,
                until=error.resets_at,
                message=str(error),
            )
        )
    context.batches.block(batch, f"budget: {error}", until=until)


def _stopped(batch: BatchRecord, counts: Counts) -> EmbeddingError:
    """What only a person can decide: whether to send again what was cancelled by hand."""
    return PermanentProviderError(
        f"{counts.stopped} texts of batch {batch.name} are not sent again, since their job was "
        f"cancelled at the provider. To send them: embedcore batch resume --resubmit-cancelled "
        f"{batch.name}, or resubmit_cancelled() of the job. To end it without them: embedcore "
        f"batch cancel {batch.name}",
        billed="no",
    )


def _end(context: BatchContext, found: Standing) -> bool:
    """Write down that a batch has ended, if it has. Returns whether it has now."""
    batch = found.batch
    if batch.state == "open" and not found.counts.open:
        state: BatchPhase = "done"
    elif batch.state == "cancelling" and not _still_mine(context, found.parts):
        state = "cancelled"
    else:
        return False
    # First, since no process would do it after a crash in between.
    _forget_texts(context, batch)
    context.batches.set_state(batch, state)
    return True


def _still_mine(context: BatchContext, parts: list[Part]) -> bool:
    """Whether a job that only this batch waited for is still being stopped."""
    waiting = ("creating", "fenced", "submitted", "collecting")
    return any(part.state in waiting and not context.jobs.is_wanted(part) for part in parts)


def _forget_texts(context: BatchContext, batch: BatchRecord) -> None:
    manifest = context.manifest(batch)
    try:
        if manifest.path.exists():
            manifest.forget_texts()
    finally:
        manifest.close()


def _due(found: Standing) -> float | None:
    batch = found.batch
    if batch.has_ended:
        return None
    times = [part.next for part in found.parts if part.state != "done"]
    if batch.blocked is not None:
        times.append(batch.retry)
    later = [one for one in times if one > found.now]
    return (min(later) - found.now) / MICROSECONDS if later else None


def _tell_progress(context: BatchContext, found: Standing) -> None:
    """Texts with an outcome, and those that the provider says are done."""
    spent = found.spent
    context.engine.observe(
        Progress(
            done=done_so_far(found),
            total=found.batch.texts,
            tokens=spent.actual.tokens + spent.held.tokens,
            cost=(spent.actual + spent.held).dollars,
            exact=not spent.held.tokens or context.engine.tokenizer.exact,
        )
    )


def done_so_far(found: Standing) -> int:
    """Texts that have their outcome, or for which the provider has a result."""
    batch, counts = found.batch, found.counts
    if batch.has_ended:
        return batch.texts
    remote = sum(
        (part.completed or 0) + (part.failed or 0)
        for part in found.parts
        if part.state == "submitted"
    )
    return batch.reused + counts.stored + counts.failed + min(remote, counts.in_flight)
