"""Money of batch parts: each step one transaction with the part's state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from embedcore.errors import StorageCorrupt
from embedcore.events import Settled
from embedcore.storage import counters, grants, outcomes
from embedcore.storage.amounts import Amount, Attempt, Grant, Limit
from embedcore.storage.batches import close_unwanted
from embedcore.storage.parts import Part, Parts, change, in_flight

if TYPE_CHECKING:
    import sqlite3

    from embedcore.events import Event, LimitNear
    from embedcore.storage.batches import BatchAccount
    from embedcore.storage.counters import Moment
    from embedcore.storage.manifest import Sent


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """How much may be in flight at once. None: as much as there is."""

    parts: int
    tokens: int | None = None

    def is_full(self, parts: int, tokens: int, part: Part) -> bool:
        """Whether a part must wait for those that are in flight. Alone, none has to."""
        return parts >= self.parts or (
            self.tokens is not None and parts > 0 and tokens + part.tokens > self.tokens
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a part's remote job ended.

    - ``actual``: what it cost; None: not known, and what was reserved counts as spent.
      ``reported``: the provider named the tokens. ``note``: for the record.
    - ``retry``: texts without an outcome are submitted again, for at most ``most_tries`` times that
      count; ``counts``: this was one of them. Otherwise they have failed, or are ``lost``: paid for
      and gone. ``stopped``: what is to be submitted again waits until a person says so.
    - ``reason``: why they have no outcome.
    - ``unbelieved``: ids of texts that have failed, and may be believed with other settings.
    """

    actual: Amount | None
    reported: bool = True
    note: str = ""
    retry: bool = True
    counts: bool = True
    reason: str = ""
    lost: bool = False
    stopped: bool = False
    unbelieved: tuple[int, ...] = ()
    most_tries: int = 3


class PartMoney:
    """Moves parts and their money. ``limits``: of the caller who plans and who is told of them."""

    def __init__(self, jobs: Parts, pool: BatchAccount, limits: Sequence[Limit] = ()) -> None:
        self.jobs = jobs
        self.pool = pool
        self.limits = tuple(limits)

    def ask(self, part: Part, room: Room) -> Part | None:
        """The job is about to be created: committed before that call leaves. None: no room now."""
        with self.jobs.step(part) as (connection, moment):
            if room.is_full(*in_flight(connection, self.pool), part):
                return None
            grant, amount = self._grant(part), _amount(part)
            windows = grants.take(connection, grant, amount, None)
            if windows is None:
                raise StorageCorrupt(
                    f"the money of part {part.id} of a batch is not reserved any more: forget the "
                    "batch and submit it again"
                )
            counters.hold(connection, windows, Amount(), requests=1)
            attempt = grants.open_attempt(
                connection,
                grant,
                windows,
                amount,
                moment,
                lease=None,
                model=self.pool.model,
                inputs=part.items,
            )
            return change(
                connection,
                part,
                state="creating",
                attempt=attempt.id,
                asked=moment.now,
                looks=0,
                trouble=None,
            )

    def not_created(
        self,
        part: Part,
        *,
        next_at: int,
        why: str,
        new_input: bool,
        since: int | None = None,
        not_before: int = 0,
        by_status: bool = False,
    ) -> Part:
        """Proof that there is no job: as before it was asked for. ``new_input``: upload again.

        ``since``: it is no error, but has to wait since then. ``not_before``: the provider said so.
        ``by_status``: the proof is the status of the answer alone.
        """
        with self.jobs.step(part) as (connection, moment):
            outcomes.give_back(
                connection, self._attempt(part), moment, note=why, by_status=by_status
            )
            return change(
                connection,
                part,
                state="planned",
                attempt=None,
                tries=part.tries + (since is None),
                next=next_at,
                since=since,
                not_before=not_before,
                input=None if new_input else part.input,
                trouble=why,
            )

    def charge_extra(self, part: Part, job: str) -> list[Event]:
        """A second job of the same part was found and cancelled: what it may cost is spent."""
        with self.jobs.step(part) as (connection, moment):
            known = connection.execute("SELECT jobs FROM part WHERE id = ?", (part.id,)).fetchone()[
                0
            ]
            if job in known.split(","):
                return []
            amount = _amount(part)
            windows = counters.ids(connection, self.pool.scope, "all", moment)
            counters.spend(connection, windows, amount)
            grants.log(
                connection,
                self.pool.scope,
                windows,
                "recorded",
                amount,
                moment,
                model=self.pool.model,
                note=f"batch job {job} was created twice and cancelled: unconfirmed",
            )
            change(connection, part, jobs=f"{known},{job}".strip(","))
            return [self._settled(amount, unconfirmed=True)]

    def lose(self, part: Part, *, next_at: int, note: str) -> list[Event]:
        """It is not known whether there is a job, and its input is gone: charged as unconfirmed.

        Its texts may be submitted in another part.
        """
        with self.jobs.step(part) as (connection, moment):
            before = _booked(connection, part)
            near = outcomes.charge(connection, self._attempt(part), moment, note=note)
            _free_items(connection, part)
            change(connection, part, state="lost", next=next_at, tries=0, trouble=note)
            return [*near, *self._changed(before, _booked(connection, part))]

    def clear(self, part: Part) -> list[Event]:
        """Long after, still nothing shows such a job: what was charged is corrected to zero."""
        with self.jobs.step(part) as (connection, moment):
            before = _booked(connection, part)
            outcomes.give_back(connection, self._attempt(part), moment, note="no such job appeared")
            _end(connection, part, moment, trouble=None)
            return self._changed(before, _booked(connection, part))

    def end(
        self,
        part: Part,
        ended: Ended,
        tried: Sequence[tuple[int, str]] = (),
        shorter: Mapping[int, Sent] | None = None,
    ) -> list[Event]:
        """The remote job has ended and all that it had to give is stored.

        The money is settled, and every text without an outcome is to be submitted again, or has
        failed. ``tried``: those with an error that a new job may not have, and why; they count one
        more try in any case. ``shorter``: what is sent of some of these from now on. Returns what
        observers are told once it is committed. Raises ``Superseded``.
        """
        with self.jobs.step(part) as (connection, moment):
            before = _booked(connection, part)
            near = self._account(connection, part, ended, moment)
            reason = ended.reason or "the job ended without a result for it"
            mine = "WHERE part = ? AND state = 'open'"
            others = f"{mine} AND id NOT IN (SELECT value FROM json_each(?))"
            tried_ids = json.dumps([one for one, _ in tried])
            connection.executemany(
                f"UPDATE item SET tries = tries + 1, reason = ? WHERE id = ? AND {mine[6:]}",
                [(why, one, part.id) for one, why in tried],
            )
            if ended.counts:
                connection.execute(
                    f"UPDATE item SET tries = tries + 1, reason = ? {others}",
                    (reason, part.id, tried_ids),
                )
            if not ended.retry:
                connection.execute(
                    f"UPDATE item SET state = ?, reason = ?, paid = max(paid, ?) {others}",
                    (
                        "lost" if ended.lost else "failed",
                        reason,
                        ended.lost,
                        part.id,
                        tried_ids,
                    ),
                )
            connection.execute(
                "UPDATE item SET state = 'failed', reason = coalesce(reason, ?) "
                f"{mine} AND tries >= ?",
                (reason, part.id, ended.most_tries),
            )
            connection.executemany(
                "UPDATE item SET characters_cut = ?, sent_key = ?, tokens = ?, bytes = ?, "
                f"tokens_cut = ? WHERE id = ? AND {mine[6:]}",
                [
                    (
                        one.characters_cut,
                        one.key,
                        one.tokens,
                        one.in_bytes,
                        one.tokens_cut,
                        item,
                        part.id,
                    )
                    for item, one in (shorter or {}).items()
                ],
            )
            if ended.stopped:
                connection.execute(
                    f"UPDATE item SET stopped = 1, reason = ? {mine}", (reason, part.id)
                )
            _remember_unread(connection, part, ended.unbelieved)
            _free_items(connection, part)
            _end(connection, part, moment, trouble=None)
            return [*near, *self._changed(before, _booked(connection, part))]

    def _changed(self, before: _Booked, after: _Booked) -> list[Event]:
        """What changed in what an attempt counts as, as events."""
        if before == after:
            return []
        changes: list[Event] = []
        if before.unconfirmed:
            changes.append(self._settled(before.amount, unconfirmed=True, sign=-1))
        if after.amount != Amount():
            changes.append(self._settled(after.amount, unconfirmed=after.unconfirmed))
        return changes

    def _settled(self, amount: Amount, *, unconfirmed: bool, sign: int = 1) -> Settled:
        provider, _, model = self.pool.model.partition(":")
        return Settled(
            scope=self.pool.scope,
            tokens=sign * amount.tokens,
            cost=sign * amount.dollars,
            unconfirmed=unconfirmed,
            provider=provider,
            model=model,
        )

    def _account(
        self, connection: sqlite3.Connection, part: Part, ended: Ended, moment: Moment
    ) -> list[LimitNear]:
        if part.attempt is None:
            return []
        attempt = self._attempt(part)
        if ended.actual is None:
            return outcomes.charge(connection, attempt, moment, note=ended.note)
        if ended.actual == Amount():
            outcomes.give_back(
                connection, attempt, moment, note=ended.note, request_id=part.job or ""
            )
            return []
        return outcomes.settle(
            connection,
            attempt,
            ended.actual,
            moment,
            reported=ended.reported,
            request_id=part.job,
        )

    def dissolve(self, part: Part) -> None:
        """Nothing of it was asked for: its texts and its money are free again."""
        with self.jobs.step(part) as (connection, moment):
            _free_items(connection, part)
            _end(connection, part, moment, trouble="never submitted")

    def _grant(self, part: Part) -> Grant:
        return Grant(
            id=part.grant, scope=self.pool.scope, lane="all", limits=self.limits, loose=False
        )

    def _attempt(self, part: Part) -> Attempt:
        return Attempt(id=part.attempt or 0, grant=self._grant(part), amount=_amount(part))


class _Booked(NamedTuple):
    """What a part's attempt counts as spent; ``unconfirmed``: without proof."""

    amount: Amount
    unconfirmed: bool


def _booked(connection: sqlite3.Connection, part: Part) -> _Booked:
    row = connection.execute(
        "SELECT actual_tokens, actual_cost, state FROM attempt "
        "WHERE id = ? AND state IN ('settled', 'charged')",
        (part.attempt,),
    ).fetchone()
    if row is None:
        return _Booked(Amount(), False)
    amount = Amount(tokens=row["actual_tokens"], cost=row["actual_cost"])
    return _Booked(amount, row["state"] == "charged")


def _amount(part: Part) -> Amount:
    return Amount(tokens=part.tokens, cost=part.cost)


def _remember_unread(connection: sqlite3.Connection, part: Part, unbelieved: Sequence[int]) -> None:
    """What was paid for and has no vector can be read again, as long as the provider has it."""
    connection.execute(
        "INSERT INTO unread (part, ordinal, key, sent_key) "
        "SELECT part, ordinal, key, sent_key FROM item "
        "WHERE part = ? AND (state = 'lost' OR (state = 'failed' AND id IN "
        "(SELECT value FROM json_each(?)))) ON CONFLICT DO NOTHING",
        (part.id, json.dumps(unbelieved)),
    )


def _free_items(connection: sqlite3.Connection, part: Part) -> None:
    close_unwanted(connection, "part = ?", part.id)
    connection.execute("UPDATE item SET part = NULL, ordinal = NULL WHERE part = ?", (part.id,))


def _end(
    connection: sqlite3.Connection, part: Part, moment: Moment, *, trouble: str | None
) -> None:
    grants.close_grant(connection, part.grant)
    change(
        connection,
        part,
        state="done",
        ended=moment.now,
        since=None,
        trouble=trouble,
        owner=None,
        lease=None,
    )
