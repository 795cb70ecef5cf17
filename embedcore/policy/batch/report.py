"""The report of a batch, from the state file alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, TypeAlias

from embedcore.policy.batch import advance as recipe
from embedcore.policy.result import Spending
from embedcore.storage.calendar import as_datetime
from embedcore.storage.parts import ACTIVE

if TYPE_CHECKING:
    from embedcore.policy.batch.context import BatchContext
    from embedcore.storage.batches import BatchAccount, BatchRecord, Counts
    from embedcore.storage.parts import Part
    from embedcore.storage.standing import Standing


BatchStateName: TypeAlias = Literal[
    "running", "blocked", "cancelling", "done", "cancelled", "abandoned"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteJob:
    """One job at the provider. ``id``: None as long as it has none.

    - ``phase``: where embedcore is with it: planned, creating, fenced, lost, stray, submitted,
      collecting or done. ``status``: the provider's own word.
    - ``completed``, ``failed``, ``total``: texts, by what the provider last said.
    - ``trouble``: the last error, or None; ``lasting``: waiting alone does not mend it.
    """

    id: str | None
    phase: str
    status: str
    texts: int
    completed: int | None
    failed: int | None
    total: int | None
    trouble: str | None
    lasting: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReport:
    """A batch at one moment.

    - ``rows``: of the caller; ``texts``: different ones, of which ``reused`` were cached,
      ``stored`` have a vector now (the reused ones included) and ``failed`` get none;
      ``to_submit`` and ``in_flight`` are still open; so are those ``stopped``, whose job was
      cancelled by hand at the provider: ``BatchJob.resubmit_cancelled`` sends them again.
    - ``done``: texts with an outcome, and those that the provider says are done.
    - ``blocked``: why nothing new is sent, or None.
    - ``usage``: what it cost so far; ``reserved_tokens``, ``reserved_cost``: for what is
      not settled.
    """

    id: str
    state: BatchStateName
    model: str
    scope: str
    rows: int
    texts: int
    reused: int
    stored: int
    failed: int
    to_submit: int
    in_flight: int
    stopped: int
    done: int
    blocked: str | None
    jobs: tuple[RemoteJob, ...]
    usage: Spending
    reserved_tokens: int
    reserved_cost: Decimal
    created: datetime
    ended: datetime | None

    @property
    def has_ended(self) -> bool:
        """No text of it is open any more."""
        return self.state in ("done", "cancelled", "abandoned")


def report_of(context: BatchContext, found: Standing) -> BatchReport:
    """What is written down of a batch, without network."""
    batch, parts, counts, spent, _ = found
    pool = context.batches.pool_of(batch)
    blocked = batch.blocked or _stopped(batch, counts) or _queue_of(context, found, pool)
    return BatchReport(
        id=batch.name,
        state=_state_name(batch, blocked),
        model=pool.model,
        scope=pool.scope,
        rows=batch.rows,
        texts=batch.texts,
        reused=batch.reused,
        stored=batch.stored if batch.has_ended else batch.reused + counts.stored,
        failed=batch.failed if batch.has_ended else counts.failed,
        to_submit=0 if batch.has_ended else counts.to_submit,
        in_flight=0 if batch.has_ended else counts.in_flight,
        stopped=0 if batch.has_ended else counts.stopped,
        done=recipe.done_so_far(found),
        blocked=blocked,
        # Parts that were cut and given up before anything was asked for are of no interest.
        jobs=tuple(_remote(part) for part in parts if part.state != "done" or part.attempt),
        usage=Spending(
            tokens=spent.actual.tokens,
            cost=spent.actual.dollars,
            requests=sum(part.attempt is not None for part in parts),
            unconfirmed_tokens=spent.unconfirmed.tokens,
            unconfirmed_cost=spent.unconfirmed.dollars,
            exact=spent.reported,
        ),
        reserved_tokens=spent.held.tokens,
        reserved_cost=spent.held.dollars,
        created=as_datetime(batch.created),
        ended=None if batch.ended is None else as_datetime(batch.ended),
    )


def _state_name(batch: BatchRecord, blocked: str | None) -> BatchStateName:
    if batch.state == "open" or batch.state == "preparing":
        return "running" if blocked is None else "blocked"
    return batch.state


def _stopped(batch: BatchRecord, counts: Counts) -> str | None:
    if batch.has_ended or not counts.stopped:
        return None
    return (
        f"cancelled: the job of {counts.stopped} texts was cancelled at the provider; embedcore "
        f"batch resume --resubmit-cancelled {batch.name} sends them again, and embedcore batch "
        "cancel ends it without them"
    )


def _queue_of(context: BatchContext, found: Standing, pool: BatchAccount) -> str | None:
    """Why jobs that are to be created have to wait, if it is not for jobs of the same scope."""
    batch, now = found.batch, found.now
    if batch.has_ended:
        return None
    queue = context.jobs.queue(pool, now)
    planned = any(part.state == "planned" for part in found.parts)
    if queue.until > now and (planned or context.batches.to_submit(batch, 1)):
        return (
            "queue: the account has too many tokens enqueued; the next job is created at "
            f"{as_datetime(queue.until):%Y-%m-%d %H:%M:%S} UTC at the earliest"
        )
    others = context.jobs.in_flight(pool)[0]
    if planned and others and not any(part.state in ACTIVE for part in context.jobs.live(pool)):
        return (
            f"queue: {others} jobs of other scopes or options are at work for this account; "
            "embedcore batch resume looks after all of them"
        )
    return None


def _remote(part: Part) -> RemoteJob:
    return RemoteJob(
        id=part.job,
        phase=part.state,
        status=part.status,
        texts=part.items,
        completed=part.completed,
        failed=part.failed,
        total=part.total,
        trouble=part.trouble,
        lasting=part.needs_a_person,
    )
