"""Ways to break the durable batch, each of which the machine must find.

Each is a context in which the code in place is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from embedcore.errors import EmbeddingError, TransientProviderError
from embedcore.policy.batch import collect as collecting
from embedcore.policy.batch.collect import Found
from embedcore.policy.batch.ending import Ending
from embedcore.policy.batch.part import PartWorker
from embedcore.storage import (
    counters,
    grants as entries,
    ledger as outcomes,
    part_money as jobsteps,
)
from embedcore.storage.amounts import Amount
from embedcore.storage.batches import Batches
from embedcore.storage.cutting import Cutter
from embedcore.storage.part_money import PartMoney
from embedcore.storage.parts import Part, Parts, change, ordinal_in

MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
FOUND_BY: dict[str, str] = {}
"""Which machine is to find it: the one that goes deepest there."""


def mutant(
    target: Any, name: str, found_by: str = "lost answers"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function that takes the place of ``target.name``."""

    def register(broken: Callable[..., Any]) -> Callable[..., Any]:
        MUTANTS[broken.__name__] = lambda: mock.patch.object(target, name, broken)
        FOUND_BY[broken.__name__] = found_by
        return broken

    return register


# Looking for what was lost


@mutant(PartWorker, "_creating")
def creates_again_without_looking(self: PartWorker, part: Any) -> Any:
    return self._steps.not_created(part, next_at=0, why="no answer", new_input=False)


@mutant(PartWorker, "_creating")
def looks_only_once(self: PartWorker, part: Any) -> Any:
    found = self._find(part)
    if found:
        return self.adopt(part, found)
    return self._steps.not_created(part, next_at=0, why="not found", new_input=True)


@mutant(PartWorker, "_creating")
def waits_for_no_grace(self: PartWorker, part: Any) -> Any:
    found = self._find(part)
    if found:
        return self.adopt(part, found)
    return self._jobs.note(part, state="fenced", next=0, tries=0)


@mutant(PartWorker, "_fenced")
def has_no_fence(self: PartWorker, part: Any) -> Any:
    self._steps.lose(part, next_at=self._context.later(3_600), note="charged")
    return replace(part, state="lost")


@mutant(PartWorker, "_fenced")
def does_not_look_behind_the_fence(self: PartWorker, part: Any) -> Any:
    self._call(lambda: self._context.strategy.discard(part.input or ""))
    self._steps.lose(part, next_at=self._context.later(3_600), note="charged")
    return replace(part, state="lost")


@mutant(PartWorker, "_lost", "lost answers without fence")
def never_looks_for_what_was_charged(self: PartWorker, part: Any) -> Any:
    self._steps.clear(part)
    return replace(part, state="done")


_asks = PartMoney.ask


@mutant(PartMoney, "ask")
def writes_nothing_down_before_it_creates(self: PartMoney, part: Any, room: Any) -> Any:
    asked = _asks(self, part, room)
    return None if asked is None else self.jobs.note(asked, state="planned")


# Polling


_polls = PartWorker._poll


@mutant(PartWorker, "_poll", "everything")
def drops_the_job_on_a_poll_error(self: PartWorker, part: Any) -> Any:
    try:
        return _polls(self, part)
    except EmbeddingError:
        self._steps.not_created(part, next_at=0, why="the poll failed", new_input=False)
        raise


# Collecting


@mutant(collecting._Reading, "_placed", "results")
def takes_lines_by_their_position(self: Any, outcome: Any) -> int | None:
    self._line = getattr(self, "_line", -1) + 1
    return self._line if self._line < len(self._ids) else None


_waits_since = Ending._waits_since


@mutant(Ending, "_waits_since", "results")
def believes_a_download_that_was_cut(
    self: Ending, part: Any, status: Any, found: Any
) -> int | None:
    broken = isinstance(found.broken, TransientProviderError)
    return None if broken else _waits_since(self, part, status, found)


_ends = PartMoney.end


@mutant(PartMoney, "end", "results")
def gives_up_at_the_first_failure(self: PartMoney, part: Any, ended: Any, *more: Any) -> Any:
    return _ends(self, part, replace(ended, retry=False), *more)


@mutant(PartMoney, "end", "results")
def never_gives_up(self: PartMoney, part: Any, ended: Any, *more: Any) -> Any:
    return _ends(self, part, replace(ended, most_tries=10**6), *more)


@mutant(Part, "ordinal_of", "results")
def takes_lines_of_other_jobs(self: Part, item: Any) -> int | None:
    return ordinal_in(str(item).rpartition("-")[2])


@mutant(Found, "may_be_paid", "results")
def buys_again_what_has_no_line(self: Found, status: Any, part: Any) -> bool:
    return False


@mutant(Ending, "_waits_since", "results")
def gives_up_results_at_once(self: Ending, part: Any, status: Any, found: Any) -> None:
    return None


@mutant(Ending, "_waits_since", "results")
def waits_for_results_for_ever(self: Ending, part: Any, status: Any, found: Any) -> int | None:
    return self._jobs.now() if found.without_line and status.state == "completed" else None


@mutant(PartMoney, "end", "results")
def sends_again_what_somebody_cancelled(self: PartMoney, part: Any, ended: Any, *more: Any) -> Any:
    return _ends(self, part, replace(ended, stopped=False), *more)


@mutant(PartWorker, "_cancelled", "everything")
def forgets_that_it_cancelled_a_job(self: PartWorker, part: Any) -> Any:
    self._call(lambda: self._context.strategy.cancel(part.job or ""))
    return part


# Money


@mutant(PartMoney, "lose", "lost answers without fence")
def releases_what_is_unconfirmed(
    self: PartMoney, part: Any, *, next_at: int, note: str
) -> list[Any]:
    with self.jobs.step(part) as (connection, moment):
        outcomes.give_back(connection, self._attempt(part), moment, note=note)
        jobsteps._free_items(connection, part)
        change(connection, part, state="lost", next=next_at, tries=0, trouble=note)
        return []


@mutant(PartMoney, "end")
def settles_twice(self: PartMoney, part: Any, ended: Any, *more: Any) -> Any:
    near = _ends(self, part, ended, *more)
    if ended.actual is not None:
        with self.jobs.database.transaction() as connection:
            moment = self.jobs.ledger.moment_in(connection)
            windows = counters.ids(connection, self.pool.scope, "all", moment)
            counters.spend(connection, windows, ended.actual)
    return near


@mutant(PartMoney, "end")
def leaves_the_attempt_open(self: PartMoney, part: Any, ended: Any, *more: Any) -> Any:
    with mock.patch.object(PartMoney, "_account", return_value=[]):
        return _ends(self, part, ended, *more)


@mutant(Cutter, "_hold", "everything")
def plans_without_a_budget(self: Cutter, connection: Any, amount: Amount) -> Any:
    scope = self.pool.scope
    grant = entries.new_grant(scope, "all", self.limits, False)
    moment, windows = self._ledger.begin_in(connection, scope, "all")
    counters.hold(connection, windows, amount)
    entries.open_grant(connection, grant, windows, amount, moment, lease=None)
    return grant, None


@mutant(Batches, "set_state", "everything")
def ends_without_giving_back_the_rest(self: Batches, batch: Any, state: Any) -> None:
    with self.database.transaction() as connection:
        now = self.ledger.moment_in(connection).now
        connection.execute(
            "UPDATE batch SET state = ?, ended = ? WHERE id = ?",
            (state, now if state in ("done", "cancelled", "abandoned") else None, batch.id),
        )


# Who owns what


@contextmanager
def _step_of_anybody(self: Parts, part: Any) -> Iterator[Any]:
    with self.database.transaction() as connection:
        moment = self.ledger.moment_in(connection)
        yield connection, moment


FOUND_BY["lets_a_former_owner_write"] = "lost answers"
MUTANTS["lets_a_former_owner_write"] = lambda: mock.patch.object(Parts, "step", _step_of_anybody)


@mutant(Parts, "leave")
def never_lets_go(self: Parts, part: Any) -> None:
    with self.database.transaction() as connection:
        connection.execute("UPDATE part SET lease = 1 << 62 WHERE id = ?", (part.id,))


# Batches


@mutant(Cutter, "_choose")
def submits_what_is_in_flight(
    self: Cutter, connection: Any, batch: Any, cut: Any, after: int
) -> Any:
    return connection.execute(
        "SELECT i.id, i.tokens, i.bytes FROM wish w JOIN item i ON i.id = w.item "
        "WHERE w.batch = ? AND w.item > ? AND i.state = 'open' ORDER BY w.item LIMIT ?",
        (batch.id, after, cut.items),
    ).fetchall()
