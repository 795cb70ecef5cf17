"""The ledger: reserve, send, and settle, give back or charge, each one transaction.

Every method of ``Ledger`` is one immediate transaction, so that any number of threads and processes
agree. A call reserves its whole amount before it sends anything; each request then moves its part
from the grant to an attempt, committed before the first byte leaves. What a crash leaves open is
charged or released when its lease ends, or when its process is seen to have ended. What became of
requests that have ended waits in the ``spool`` for the next commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from embedcore.errors import ConfigurationError
from embedcore.storage import counters, crosscheck, grants, outcomes as steps
from embedcore.storage.amounts import ALL_SCOPES, Amount, Attempt, Grant, Lane, Limit
from embedcore.storage.calendar import MICROSECONDS, day_ends, zone_named
from embedcore.storage.counters import Moment
from embedcore.storage.spool import Spool, flush_all

if TYPE_CHECKING:
    import sqlite3

    from embedcore.events import LimitNear
    from embedcore.storage.database import Database
    from embedcore.storage.outcomes import Outcome


def _set_back(connection: sqlite3.Connection, now: int, *, lease: int, attempt_lease: int) -> None:
    """Make ``now`` the latest time seen. Leases from the future end as if taken now.

    Otherwise what a crash left open would stay reserved, and what a batch has to do put off, until
    the time of the wrong clock.
    """
    connection.execute("UPDATE book SET clock = ?, tight_until = 0", (now,))
    connection.execute('UPDATE "grant" SET lease = min(lease, ?)', (now + lease,))
    connection.execute(
        "UPDATE attempt SET lease = min(lease, ?) WHERE state = 'sent'", (now + attempt_lease,)
    )
    connection.execute(
        "UPDATE part SET next = min(next, ?1), not_before = min(not_before, ?1), "
        "asked = min(asked, ?1), since = min(since, ?1), lease = min(lease, ?1)",
        (now,),
    )
    connection.execute("UPDATE batch SET retry = min(retry, ?)", (now,))
    connection.execute("UPDATE pool SET queue_until = min(queue_until, ?)", (now,))


def _write(connection: sqlite3.Connection, outcomes: Iterable[Outcome], moment: Moment) -> None:
    for outcome in outcomes:
        steps.write(connection, outcome, moment)


LEASE_SECONDS: Final = 60.0
ATTEMPT_LEASE_SECONDS: Final = 660.0
# The clock is written no more often than this.
_GRAIN: Final = MICROSECONDS // 10


class Ledger:
    """What is reserved and spent, in one ``Database``. Safe to share between threads.

    What asks the limits takes ``outcomes`` along: they are written in the same commit, before
    anything is asked. ``spool`` has those that nothing waits for.

    ``zone``: the IANA zone of days and months; None takes the file's, UTC for a new one. ``clock``
    returns seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        *,
        zone: str | None = None,
        clock: Callable[[], float] = time.time,
        lease: float = LEASE_SECONDS,
        attempt_lease: float = ATTEMPT_LEASE_SECONDS,
    ) -> None:
        self.database = database
        self._wanted_zone = zone
        self._clock = clock
        self._lease = round(lease * MICROSECONDS)
        self._attempt_lease = round(attempt_lease * MICROSECONDS)
        self.spool = Spool(self)

    def hold(
        self,
        scope: str,
        amount: Amount,
        limits: Sequence[Limit] = (),
        *,
        lane: Lane = "all",
        loose: bool = False,
        final: bool = True,
        leased: bool = True,
        outcomes: Iterable[Outcome] = (),
    ) -> Grant:
        """Set ``amount`` aside in all windows of ``scope``, or raise ``BudgetExceeded``.

        ``loose``: the amount is an upper bound rather than a count. ``final``: the caller has
        nothing tighter; otherwise ``TighterBoundNeeded`` asks for it as soon as the amount is more
        than half of what is left. ``HeldLoosely`` is raised instead of a refusal that is due to
        the loose bounds of others. ``leased=False``: for a batch, which outlives any lease.
        """
        grant = grants.new_grant(scope, lane, limits, loose)
        with self.database.transaction() as connection:
            moment, windows = self.begin_in(connection, scope, lane, outcomes)
            found = grants.look(connection, grant, windows, amount, moment, final=final)
            if found.refusal is None:
                lease = moment.now + self._lease if leased else None
                counters.hold(connection, windows, amount)
                grants.open_grant(connection, grant, windows, amount, moment, lease=lease)
        if found.refusal is not None:
            raise found.refusal
        return found.grant

    def hold_and_send(
        self,
        scope: str,
        amount: Amount,
        limits: Sequence[Limit] = (),
        *,
        lane: Lane = "all",
        loose: bool = False,
        final: bool = True,
        model: str = "",
        inputs: int = 0,
        outcomes: Iterable[Outcome] = (),
    ) -> Attempt:
        """``hold`` and ``send`` for a call of one request, in one commit."""
        (found,) = self.hold_and_send_all(
            scope,
            [(amount, inputs)],
            limits,
            lane=lane,
            loose=loose,
            final=final,
            model=model,
            outcomes=outcomes,
        )
        if isinstance(found, Exception):
            raise found
        return found

    def hold_and_send_all(
        self,
        scope: str,
        wanted: Sequence[tuple[Amount, int]],
        limits: Sequence[Limit] = (),
        *,
        lane: Lane = "all",
        loose: bool = False,
        final: bool = True,
        model: str = "",
        outcomes: Iterable[Outcome] = (),
    ) -> list[Attempt | Exception]:
        """``hold_and_send`` for several calls in one commit: amounts, and texts of each request.

        Each has a grant of its own, or what forbids it in its place; one after the other, so that
        one that is refused takes nothing from the next.
        """
        every: list[Attempt | Exception] = []
        with self.database.transaction() as connection:
            moment, windows = self.begin_in(connection, scope, lane, outcomes)
            lease = moment.now + self._lease
            for amount, inputs in wanted:
                grant = grants.new_grant(scope, lane, limits, loose)
                found = grants.look(connection, grant, windows, amount, moment, final=final)
                if found.refusal is not None:
                    every.append(found.refusal)
                    continue
                grant = found.grant
                counters.hold(connection, windows, amount, requests=1)
                grants.open_grant(connection, grant, windows, Amount(), moment, lease=lease)
                every.append(self._sent(connection, grant, windows, amount, moment, model, inputs))
        return every

    def send(
        self,
        grant: Grant,
        amount: Amount,
        *,
        fresh: bool = False,
        model: str = "",
        inputs: int = 0,
        outcomes: Iterable[Outcome] = (),
    ) -> Attempt:
        """Move a request's amount from the grant to a new attempt. Commit comes before the wire.

        ``fresh``: the grant's share of this request is gone, because an earlier attempt of it was
        charged. That, and a grant whose lease was lost, are reserved anew: ``BudgetExceeded`` if
        the limits no longer allow it. So is the whole rest of a grant at its first ``send`` in
        another day or month; if it is refused there, nothing of it is reserved any more.
        """
        with self.database.transaction() as connection:
            moment = self.moment_in(connection)
            _write(connection, outcomes, moment)
            lease = moment.now + self._lease
            # Before anything expires, or the caller would lose the rest of its own grant.
            grants.renew(connection, grant, lease)
            windows = counters.ids(connection, grant.scope, grant.lane, moment)
            refusal = self._move(connection, grant, windows, moment)
            held = amount
            if refusal is None:
                taken = None if fresh else grants.take(connection, grant, amount, lease)
                if taken is not None:
                    # A batch's grant keeps its day.
                    windows, held = taken, Amount()
                else:
                    grants.end_expired(connection, moment)
                    refusal = grants.check(
                        connection, grant, windows, amount, moment, final=True, waits=False
                    )
            if refusal is None:
                counters.hold(connection, windows, held, requests=1)
                attempt = self._sent(connection, grant, windows, amount, moment, model, inputs)
        if refusal is not None:
            raise refusal
        return attempt

    def _move(
        self, connection: sqlite3.Connection, grant: Grant, windows: str, moment: Moment
    ) -> Exception | None:
        """Money belongs to the day and the month in which it is sent: what forbids it there.

        Only what changes is asked: in total the money is reserved already.
        """
        found = grants.rest_of(connection, grant)
        if found is None or found[0] == windows:
            return None
        before, rest = found
        grants.end_expired(connection, moment)
        counters.release(connection, before, rest)
        changed = counters.changed_limits(grant, before, windows)
        refusal = grants.check(connection, changed, windows, rest, moment, final=True, waits=False)
        if refusal is None:
            counters.hold(connection, windows, rest)
            grants.move(connection, grant, windows)
        else:
            grants.forget(connection, grant)
        return refusal

    def settle(
        self,
        attempt: Attempt,
        actual: Amount,
        *,
        reported: bool = True,
        request_id: str | None = None,
        close: bool = False,
    ) -> list[LimitNear]:
        """The attempt cost ``actual``. Also corrects one that was charged; otherwise once only.

        Returns the limits that are now nearly used up and were not announced yet.
        ``reported``: the provider named the tokens. ``close``: close the grant in the same commit.
        """
        with self.database.transaction() as connection:
            moment = self.moment_in(connection)
            near = steps.settle(
                connection, attempt, actual, moment, reported=reported, request_id=request_id
            )
            if close:
                grants.close_grant(connection, attempt.grant.id)
            return near

    def give_back(
        self,
        attempt: Attempt,
        *,
        note: str = "",
        request_id: str | None = None,
        by_status: bool = False,
    ) -> bool:
        """Proof that nothing was billed: the amount returns to the grant, for a retry or a split.

        If the grant is closed by now, or of another day, it returns to the windows. ``by_status``:
        the proof is the status of the answer alone. Returns whether the grant has it.
        """
        with self.database.transaction() as connection:
            moment = self.moment_in(connection)
            return steps.give_back(
                connection, attempt, moment, note=note, request_id=request_id, by_status=by_status
            )

    def charge(
        self,
        attempt: Attempt,
        *,
        actual: Amount | None = None,
        note: str = "",
        request_id: str | None = None,
    ) -> list[LimitNear]:
        """It is not known whether it was billed: it counts as spent.

        ``actual``: what it would have cost, by a count; what was reserved beyond that is released.
        None: the whole amount.
        """
        with self.database.transaction() as connection:
            moment = self.moment_in(connection)
            return steps.charge(
                connection, attempt, moment, actual=actual, note=note, request_id=request_id
            )

    def write(self, outcomes: Iterable[Outcome], *, within: float | None = None) -> None:
        """Write down what became of attempts and grants. ``within``: seconds for which it may be
        waited for others who have the file; None: as long as for any other step."""
        with self.database.transaction(within=within) as connection:
            _write(connection, outcomes, self.moment_in(connection))

    def end(self) -> None:
        """Nothing more is sent: write down what became of requests, and close the file. The next
        use opens it again."""
        self.spool.flush()
        self.spool.give_up()
        self.database.close()

    def is_timely(self, attempt: Attempt) -> bool:
        """Whether a request that leaves now leaves on the day to which its money is counted.

        For ``hold_and_send``, where something may come between the commit and the wire.
        """
        return self.now() < attempt.until

    def renew(self, grant: Grant) -> None:
        """Prolong the lease while the holder waits without sending."""
        with self.database.transaction() as connection:
            grants.renew(connection, grant, self.moment_in(connection).now + self._lease)

    def close(self, grant: Grant) -> None:
        """Release what is left of the grant. Closing twice is harmless."""
        with self.database.transaction() as connection:
            grants.close_grant(connection, grant.id)

    def record(self, scope: str, amount: Amount, *, model: str = "", note: str = "") -> None:
        """Count something that was spent elsewhere. Unconditional."""
        with self.database.transaction() as connection:
            moment = self.moment_in(connection)
            windows = counters.ids(connection, scope, "all", moment)
            counters.spend(connection, windows, amount)
            counters.count_request(connection, windows)
            grants.log(
                connection, scope, windows, "recorded", amount, moment, model=model, note=note
            )

    def reset(self, scope: str) -> None:
        """Start today's tokens and requests of ``scope`` at zero again, on the record.

        Requests in flight still count when they end; corrections of older ones no longer do.
        """
        flush_all()
        with self.database.transaction() as connection:
            moment = self.moment_in(connection)
            windows = counters.ids(connection, scope, "query", moment)
            spent = counters.reset_day(connection, windows)
            note = f"{spent} tokens of the day taken off by reset"
            grants.log(connection, scope, windows, "reset", Amount(), moment, note=note)

    def differences(self) -> list[crosscheck.Difference]:
        """Counters that are not what the entries add up to."""
        with self.database.read() as connection:
            return crosscheck.counters(connection)

    def recount(self) -> list[crosscheck.Difference]:
        """Set them right, on the record; returns what differed.

        Only after a look at the differences: it may free money as well as take it away.
        """
        with self.database.transaction() as connection:
            return crosscheck.recount(connection, self.moment_in(connection))

    def repair_clock(self) -> tuple[float, float]:
        """Take the high-water clock back to the real time, on the record.

        For a computer whose clock was wrong: until the real time catches up, everything would be
        counted in the future's window. Returns the seconds since 1970 before and after.
        """
        with self.database.transaction() as connection:
            moment, after = self.moment_in(connection), self.now()
            _set_back(connection, after, lease=self._lease, attempt_lease=self._attempt_lease)
            repaired = Moment(now=after, zone=moment.zone)
            windows = counters.ids(connection, ALL_SCOPES, "all", repaired)
            note = f"clock moved from {moment.now} to {after} microseconds by repair"
            grants.log(connection, ALL_SCOPES, windows, "clock", Amount(), moment, note=note)
            return moment.now / MICROSECONDS, after / MICROSECONDS

    def moment(self) -> Moment:
        """The time of the ledger, and the zone of its days. Nothing is written."""
        with self.database.read() as connection:
            seen, now = self._seen(connection), self.now_in(connection)
        if seen is not None:
            return replace(seen, now=now)
        with self.database.transaction() as connection:
            return self.moment_in(connection)

    def close_abandoned(self) -> Moment:
        """Close what was left open by a crash, as the next ``hold`` would: nothing is shown as
        reserved then that will never be sent. What ended in this process is written down. Returns
        the time of the ledger."""
        flush_all()
        with self.database.transaction() as connection:
            moment = self.moment_in(connection)
            grants.end_expired(connection, moment)
            grants.end_ownerless(connection, moment)
            return moment

    def moment_in(self, connection: sqlite3.Connection) -> Moment:
        """The latest time ever seen, that of now included, which becomes it; in the zone that the
        file was first used with. Raises ``ConfigurationError`` if another one is wanted."""
        seen, real = self._seen(connection), self.now()
        if seen is None:
            zone = self._wanted_zone or "UTC"
            zone_named(zone)
            connection.execute("INSERT INTO book (id, zone, clock) VALUES (1, ?, ?)", (zone, real))
            return Moment(now=real, zone=zone)
        if real > seen.now + _GRAIN:
            connection.execute("UPDATE book SET clock = ?", (real,))
        return replace(seen, now=max(real, seen.now))

    def now_in(self, connection: sqlite3.Connection) -> int:
        """The same time, in microseconds since 1970, and nothing is written."""
        seen, real = self._seen(connection), self.now()
        return real if seen is None else max(real, seen.now)

    def _seen(self, connection: sqlite3.Connection) -> Moment | None:
        """The latest time that is written down, and the zone; None in a new file."""
        row = connection.execute("SELECT clock, zone FROM book").fetchone()
        if row is None:
            return None
        wanted, zone = self._wanted_zone, row["zone"]
        if wanted not in (None, zone):
            raise ConfigurationError(
                f"timezone = {wanted!r}, but the ledger has counted its days in {zone!r} since "
                f"its first use: set timezone = {zone!r}, or use another EMBEDCORE_HOME"
            )
        return Moment(now=row["clock"], zone=zone)

    def begin_in(
        self,
        connection: sqlite3.Connection,
        scope: str,
        lane: Lane,
        outcomes: Iterable[Outcome] = (),
    ) -> tuple[Moment, str]:
        """The time and the windows of something new, once ``outcomes`` are written and what a crash
        left open is closed."""
        moment = self.moment_in(connection)
        _write(connection, outcomes, moment)
        grants.end_expired(connection, moment)
        return moment, counters.ids(connection, scope, lane, moment)

    def now(self) -> int:
        """By the clock, in microseconds since 1970."""
        return round(self._clock() * MICROSECONDS)

    def _sent(
        self,
        connection: sqlite3.Connection,
        grant: Grant,
        windows: str,
        amount: Amount,
        moment: Moment,
        model: str,
        inputs: int,
    ) -> Attempt:
        lease = moment.now + self._attempt_lease
        attempt = grants.open_attempt(
            connection, grant, windows, amount, moment, lease=lease, model=model, inputs=inputs
        )
        return replace(attempt, until=day_ends(moment.now, moment.zone))
