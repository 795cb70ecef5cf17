"""The recipe for "within a day": whatever is due for a batch, once.

Whoever calls it, in whichever process and however often: the normal path is the recovery path.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from embedcore.errors import BudgetExceeded, EmbeddingError, PermanentProviderError
from embedcore.events import BatchWaits, Progress
from embedcore.policy import draining
from embedcore.policy.parts import PartWork
from embedcore.storage.amounts import HeldLoosely
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.jobsteps import Ended

if TYPE_CHECKING:
    from embedcore.policy.batchoffice import BatchOffice
    from embedcore.storage.batchrecords import BatchPhase, BatchRecord, Counts
    from embedcore.storage.partrecords import Part

logger = logging.getLogger("embedcore")

_BUDGET_SECONDS: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one look at a batch found.

    ``problems``: errors that waiting alone does not mend. ``due``: seconds until it is worth while
    to look again; None: whenever the caller likes. ``changed``: something went on.
    """

    batch: BatchRecord
    changed: bool = False
    problems: list[EmbeddingError] = field(default_factory=list)
    due: float | None = None


def advance(office: BatchOffice, batch: BatchRecord, *, asked: bool = False) -> Pass:
    """Do what is due for a batch: plan, upload, create, poll, look for what was lost, collect.

    ``asked``: also what would be tried again a little later, such as results that are late.

    Raises ``StorageError`` only: what the provider says is in ``problems`` and in the parts, and
    changes nothing that was written down.
    """
    work = PartWork(office, asked=asked)
    batch = office.batches.again(batch)
    if draining.is_due(office, batch):
        office.batches.drain(batch)
        batch = office.batches.again(batch)
    changed = _work_through(office, batch, work)
    if batch.draining and batch.state == "open" and batch.retry <= office.jobs.now():
        changed |= draining.drain(office, batch, work.problems)
    elif _plan(office, batch, work):
        changed = True
        _work_through(office, batch, work)
    counts = office.batches.counts(batch)
    if counts.stopped and not batch.has_ended:
        work.problems.append(_stopped(batch, counts))
    if counts.open:
        draining.look_at_the_clock(office, batch)
    if not batch.has_ended:
        batch = _end(office, batch, counts)
    _tell_progress(office, batch, counts)
    return Pass(
        batch=batch,
        changed=changed,
        problems=work.problems,
        due=_due(office, batch),
    )


def cancel(office: BatchOffice, batch: BatchRecord) -> BatchRecord:
    """Ask for nothing more. Jobs that nobody else waits for are stopped by the next ``advance``."""
    batch = office.batches.again(batch)
    if not batch.has_ended:
        office.batches.set_state(batch, "cancelling")
    return office.batches.again(batch)


def abandon(office: BatchOffice, batch: BatchRecord) -> BatchRecord:
    """End a batch by hand, without a remote call. What is uncertain counts as spent.

    Parts for which others wait go on.
    """
    batch = office.batches.again(batch)
    if batch.has_ended:
        return batch
    office.batches.set_state(batch, "cancelling")
    for part in office.jobs.of_batch(batch):
        _abandon(office, part)
    _forget_texts(office, batch)
    office.batches.set_state(batch, "abandoned")
    return office.batches.again(batch)


def _abandon(office: BatchOffice, part: Part) -> None:
    if part.state == "done" or office.jobs.is_wanted(part):
        return
    owned = office.jobs.take(part)
    if owned is None:
        logger.warning("part %d is being worked on by another process, which ends it", part.id)
        return
    if owned.attempt is None:
        office.steps.dissolve(owned)
        return
    named = f" Its job {owned.job} may go on" if owned.job else ""
    logger.warning("part %d is given up: what was held for it counts as spent.%s", part.id, named)
    ended = Ended(actual=None, note="abandoned by hand", counts=False)
    office.tell(*office.steps.end(owned, ended))


def _work_through(office: BatchOffice, batch: BatchRecord, work: PartWork) -> bool:
    changed = False
    mine = office.jobs.of_batch(batch)
    for part in mine:
        changed |= work.work(part)
    # Those of others may keep ours waiting, and who waits for them may be gone. What is wrong with
    # them is said in the log, and is no fault of this batch.
    others, numbers = PartWork(office), {part.id for part in mine}
    waits = any(part.state == "planned" for part in office.jobs.of_batch(batch))
    for part in office.jobs.live(office.pool):
        if part.id in numbers:
            continue
        # Nobody waits for some any more, and yet their money and their jobs must find an end.
        if waits or part.state in ("lost", "stray") or not office.jobs.is_wanted(part):
            changed |= others.work(part)
    return changed


def _plan(office: BatchOffice, batch: BatchRecord, work: PartWork) -> bool:
    """Cut parts of what is still to be submitted, as far as there is money for it."""
    if batch.state != "open" or batch.draining or batch.retry > office.jobs.now():
        return False
    draining.take_what_is_there(office, batch)
    cut, after, planned = office.cut(), 0, False
    try:
        while True:
            part, after = office.cutter.plan(batch, cut, after=after)
            if part is None:
                break
            planned = True
    except HeldLoosely as wait:
        _block(office, batch, wait.refusal)
    except BudgetExceeded as error:
        _block(office, batch, error)
        if error.never_fits:
            work.problems.append(error)
    else:
        if batch.blocked is not None and batch.blocked.startswith("budget"):
            office.batches.block(batch, None)
    return planned


def _block(office: BatchOffice, batch: BatchRecord, error: BudgetExceeded) -> None:
    # A limit may be raised, or others may settle for less, long before its window ends.
    until = office.later(_BUDGET_SECONDS)
    if batch.blocked is None:
        office.engine.observe(
            BatchWaits(
                batch=batch.name,
                scope=office.pool.scope,
                until=error.resets_at,
                message=str(error),
            )
        )
    office.batches.block(batch, f"budget: {error}", until=until)


def _stopped(batch: BatchRecord, counts: Counts) -> EmbeddingError:
    """What only a person can decide: whether to send again what somebody else cancelled."""
    return PermanentProviderError(
        f"{counts.stopped} texts of batch {batch.name} are not sent again, since their job was "
        "cancelled at the provider: embedcore batch resume --resubmit-cancelled "
        f"{batch.name}, or resubmit_cancelled() of the job, sends them again; embedcore batch "
        f"cancel {batch.name} ends it without them",
        billed="no",
    )


def _end(office: BatchOffice, batch: BatchRecord, counts: Counts) -> BatchRecord:
    """Write down that a batch has ended, if it has."""
    if batch.state == "open" and not counts.open:
        state: BatchPhase = "done"
    elif batch.state == "cancelling" and not _still_mine(office, batch):
        state = "cancelled"
    else:
        return office.batches.again(batch)
    # First, since nobody would do it after a crash in between.
    _forget_texts(office, batch)
    office.batches.set_state(batch, state)
    return office.batches.again(batch)


def _still_mine(office: BatchOffice, batch: BatchRecord) -> bool:
    """Whether a job that only this batch waited for is still being stopped."""
    waiting = ("creating", "fenced", "submitted", "collecting")
    return any(
        part.state in waiting and not office.jobs.is_wanted(part)
        for part in office.jobs.of_batch(batch)
    )


def _forget_texts(office: BatchOffice, batch: BatchRecord) -> None:
    manifest = office.manifest(batch)
    try:
        if manifest.path.exists():
            manifest.forget_texts()
    finally:
        manifest.close()


def _due(office: BatchOffice, batch: BatchRecord) -> float | None:
    if batch.has_ended:
        return None
    now = office.jobs.now()
    times = [part.next for part in office.jobs.of_batch(batch) if part.state != "done"]
    if batch.blocked is not None:
        times.append(batch.retry)
    later = [one for one in times if one > now]
    return (min(later) - now) / MICROSECONDS if later else None


def _tell_progress(office: BatchOffice, batch: BatchRecord, counts: Counts) -> None:
    """Texts with an outcome, and those that the provider says are done."""
    parts = office.jobs.of_batch(batch)
    spent = office.jobs.spent(batch)
    office.engine.observe(
        Progress(
            done=done_so_far(batch, counts, parts),
            total=batch.texts,
            tokens=spent.actual.tokens + spent.held.tokens,
            picodollars=spent.actual.cost + spent.held.cost,
            exact=not spent.held.tokens or office.engine.tokenizer.exact,
        )
    )


def done_so_far(batch: BatchRecord, counts: Counts, parts: list[Part]) -> int:
    """Texts that have their outcome, or for which the provider has a result."""
    if batch.has_ended:
        return batch.texts
    remote = sum(
        (part.completed or 0) + (part.failed or 0) for part in parts if part.state == "submitted"
    )
    return batch.reused + counts.stored + counts.failed + min(remote, counts.in_flight)
