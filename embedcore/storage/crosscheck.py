"""Compares counters of the state file with grants and attempts.

A window counts what grants and attempts are entered for, and nothing is ever entered without being
counted in the same transaction. So they agree at every moment, whatever is under way; a difference
is damage, or was made by hand. Nothing is changed here but by ``recount``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, TypeAlias

from embedcore import money
from embedcore.storage import grants
from embedcore.storage.amounts import ALL_SCOPES, Amount
from embedcore.storage.calendar import PERIODS, Period, window_start

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.counters import Moment

_HELD: Final = ("tokens_held", "cost_held")
_COUNTERS: Final = ("tokens_spent", "cost_spent", *_HELD, "requests")
_LAST: Final = 2**63 - 1
# What counts as a request, and what as spent.
_REQUESTS: Final = "('sent', 'settled', 'charged', 'returned', 'recorded')"
_SPENT: Final = "('settled', 'charged', 'recorded')"

Sums: TypeAlias = defaultdict[int, dict[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One counter of one window. ``counted``: what it says; ``entered``: what the entries add up
    to, or up to ``at_most`` where an older embedcore did not write down enough to be sure.

    ``period`` and what is beside it are empty where the file has no such window.
    """

    window: int
    counter: str
    entered: int
    at_most: int
    counted: int = 0
    scope: str = ""
    lane: str = ""
    period: str = ""
    start: str = ""

    def __str__(self) -> str:
        most = f" to {_shown(self.counter, self.at_most)}" if self.at_most != self.entered else ""
        name = self.counter.replace("held", "reserved").replace("_", " ")
        return (
            f"{name} of {self.where}: the counter says "
            f"{_shown(self.counter, self.counted)}, the entries add up to "
            f"{_shown(self.counter, self.entered)}{most}"
        )

    @property
    def where(self) -> str:
        """The window in words."""
        if not self.period:
            return f"window {self.window}, which is not in the file"
        whom = "all scopes" if self.scope == ALL_SCOPES else f"scope {self.scope!r}"
        queries = "the queries of " if self.lane == "query" else ""
        when = "in total" if self.period == "total" else f"in the {self.period} {self.start}"
        return f"{queries}{whom} {when}"


def held_differs(connection: sqlite3.Connection) -> str | None:
    """What is reserved beside what is open, as a sentence; None: they agree. Reads no attempt
    that has ended."""
    found = held(connection)
    if not found:
        return None
    more = f" ({len(found) - 1:,} more counters differ)" if len(found) > 1 else ""
    return (
        f"its counters do not agree with its entries: {found[0]}{more}. Nothing was sent. "
        "embedcore doctor shows every difference; embedcore budget recount --repair sets the "
        "counters to what the entries add up to; or restore a copy"
    )


def held(connection: sqlite3.Connection) -> list[Difference]:
    """The windows whose reserved amounts are not the sum over the open grants and attempts."""
    sums = _held_sums(connection)
    rows = connection.execute(
        "SELECT id, scope, lane, period, start, tokens_held, cost_held FROM window"
        f" WHERE tokens_held <> 0 OR cost_held <> 0 OR id IN ({_list(sums)})"
    ).fetchall()
    return list(_compare(rows, _HELD, sums, _sums()))


def counters(connection: sqlite3.Connection) -> list[Difference]:
    """The same of every counter, over all that was ever entered. Reads every attempt."""
    sums, unsure = _held_sums(connection), _sums()
    resets = _resets(connection)
    latest = {window: number for number, (_, *those) in enumerate(resets, 1) for window in those}
    marks = [0, *(identity for identity, *_ in resets), _LAST]
    for number, (after, before) in enumerate(pairwise(marks)):
        # Between two resets, so that it is known which of them an entry came after.
        for row in connection.execute(_GROUPS, (after, before)):
            _add_group(sums, unsure, latest, number, *row)
    for window, number in latest.items():
        sums[window]["generation"] = number
    names = (*_COUNTERS, "generation")
    rows = connection.execute(
        f"SELECT id, scope, lane, period, start, {', '.join(names)} FROM window"
    ).fetchall()
    return list(_compare(rows, names, sums, unsure))


def recount(connection: sqlite3.Connection, moment: Moment) -> list[Difference]:
    """Set every counter to what the entries add up to, on the record; returns what differed.

    Where that is not known exactly, the most. Windows that are not in the file come back.
    """
    found = counters(connection)
    restored = {one.window for one in found if not one.period}
    for window in restored:
        _restore(connection, window, moment.zone)
    for one in counters(connection) if restored else found:
        connection.execute(
            f"UPDATE window SET {one.counter} = ? WHERE id = ?", (one.at_most, one.window)
        )
    for one in found:
        note = f"recount: {one}"
        grants.log(connection, ALL_SCOPES, "", "reset", Amount(), moment, note=note)
    return found


# In two halves: a sum that is too large for SQLite is a difference and no error.
_GROUPS: Final = f"""
SELECT windows, state IN {_SPENT}, state = 'recorded', model <> '',
       coalesce(counted, iif(state = 'charged' OR generation > 0, generation, NULL)), count(*),
       sum(actual_tokens >> 32), sum(actual_tokens & 0xFFFFFFFF),
       sum(actual_cost >> 32), sum(actual_cost & 0xFFFFFFFF)
FROM attempt WHERE id > ? AND id < ? AND state IN {_REQUESTS} GROUP BY 1, 2, 3, 4, 5"""


def _add_group(
    sums: Sums,
    unsure: Sums,
    latest: dict[int, int],
    number: int,
    windows: str,
    is_spent: bool,
    is_recorded: bool,
    has_model: bool,
    counted: int | None,
    requests: int,
    *halves: int | None,
) -> None:
    """Add some attempts, all sent after reset ``number`` and before the next one.

    A reset takes the day's tokens and requests off. What ends after it counts, though it was sent
    before; ``counted`` None: when it ended is not written down.
    """
    high_tokens, low_tokens, high_cost, low_cost = (half or 0 for half in halves)
    tokens, cost = (high_tokens << 32) + low_tokens, (high_cost << 32) + low_cost
    for window in _ids(windows):
        reset = latest.get(window, 0)
        mine = sums[window]
        if number >= reset:
            # A second job of a batch is recorded by its model, and was no request of its own.
            (unsure[window] if is_recorded and has_model else mine)["requests"] += requests
        if not is_spent:
            continue
        mine["cost_spent"] += cost
        if number >= reset or (not is_recorded and counted is not None and counted >= reset):
            mine["tokens_spent"] += tokens
        elif counted is None and not is_recorded:
            unsure[window]["tokens_spent"] += tokens


def _held_sums(connection: sqlite3.Connection) -> Sums:
    sums = _sums()
    for row in connection.execute(_OPEN):
        for window in _ids(row["windows"]):
            sums[window]["tokens_held"] += row["tokens"]
            sums[window]["cost_held"] += row["cost"]
    return sums


_OPEN: Final = (
    'SELECT windows, tokens, cost FROM "grant" UNION ALL '
    "SELECT windows, tokens, cost FROM attempt WHERE state = 'sent'"
)


def _resets(connection: sqlite3.Connection) -> list[tuple[int, int, int]]:
    """Each reset: its entry, the day of its scope, and that of the scope's queries."""
    rows = connection.execute(
        "SELECT id, windows FROM attempt WHERE state = 'reset' AND windows <> '' ORDER BY id"
    )
    return [(identity, *_days(windows)) for identity, windows in rows]


def _days(windows: str) -> tuple[int, int]:
    every = numbers(windows)
    return (every[0], every[2 * len(PERIODS)]) if len(every) == 3 * len(PERIODS) else (0, 0)


def _compare(
    rows: Iterable[sqlite3.Row], names: Sequence[str], sums: Sums, unsure: Sums
) -> Iterator[Difference]:
    missing = set(sums)
    for row in rows:
        window = row["id"]
        missing.discard(window)
        for name in names:
            counted, entered = row[name], sums[window][name]
            most = entered + unsure[window][name]
            if not entered <= counted <= most:
                yield Difference(
                    window=window,
                    scope=row["scope"],
                    lane=row["lane"],
                    period=row["period"],
                    start=row["start"],
                    counter=name,
                    counted=counted,
                    entered=entered,
                    at_most=most,
                )
    for window in sorted(missing):
        for name, entered in sums[window].items():
            if entered:
                yield Difference(window=window, counter=name, entered=entered, at_most=entered)


def _restore(connection: sqlite3.Connection, window: int, zone: str) -> None:
    """Make a window anew that entries name and that is not there; if a new one of its description
    came into being meanwhile, the entries are that one's."""
    named = f"instr(',' || windows || ',', ',{window},') > 0"
    entry = connection.execute(
        f"SELECT scope, windows, sent FROM attempt WHERE state <> 'clock' AND {named} UNION ALL "
        f'SELECT scope, windows, opened FROM "grant" WHERE {named} LIMIT 1'
    ).fetchone()
    if entry is None or not window:
        return
    scope, every, when = entry[0], numbers(entry[1]), entry[2]
    place = every.index(window)
    period = PERIODS[place % len(PERIODS)]
    start = _start_beside(connection, every, period) or window_start(period, when, zone)
    owner = ALL_SCOPES if place // len(PERIODS) == 1 else scope
    key = (owner, "query" if place // len(PERIODS) == 2 else "all", period, start)
    connection.execute(
        "INSERT INTO window (id, scope, lane, period, start) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO NOTHING",
        (window, *key),
    )
    (now,) = connection.execute(
        "SELECT id FROM window WHERE (scope, lane, period, start) = (?, ?, ?, ?)", key
    ).fetchone()
    if now != window:
        for table in ('"grant"', "attempt"):
            connection.execute(
                f"UPDATE {table} SET windows = "
                f"trim(replace(',' || windows || ',', ',{window},', ',{now},'), ',') WHERE {named}"
            )


def _start_beside(
    connection: sqlite3.Connection, every: Sequence[int], period: Period
) -> str | None:
    """The start of the windows of that period which the same entry names."""
    beside = every[PERIODS.index(period) :: len(PERIODS)]
    row = connection.execute(
        f"SELECT start FROM window WHERE period = ? AND id IN ({_list(beside)})", (period,)
    ).fetchone()
    return None if row is None else str(row[0])


def numbers(windows: str) -> list[int]:
    """The numbers of windows, in their order; 0 for what is none: no window has that."""
    return [int(one) if one.isascii() and one.isdigit() else 0 for one in windows.split(",")]


def _ids(windows: str) -> set[int]:
    """The same, each once: of all scopes together the windows are named twice."""
    return set(numbers(windows))


def _list(windows: Iterable[int]) -> str:
    return ",".join(map(str, windows))


def _shown(counter: str, number: int) -> str:
    return money.shown_exactly(number) if counter.startswith("cost") else f"{number:,}"


def _sums() -> Sums:
    return defaultdict(lambda: defaultdict(int))
