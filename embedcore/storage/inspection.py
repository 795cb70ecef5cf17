"""Inspection of the state file for ``embedcore doctor``: reads all and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from embedcore import money
from embedcore.storage import crosscheck
from embedcore.storage.amounts import ALL_SCOPES
from embedcore.storage.calendar import PERIODS

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.database import Database

# Of day, month and total: of the scope, of all scopes and, for a query, of the scope's queries.
_LANES: Final = ("all", "all", "query")


class Faults(NamedTuple):
    """``counters`` can be set right by ``Ledger.recount``; for ``others`` there is only a copy
    of before, or a new file."""

    counters: list[crosscheck.Difference]
    others: list[str]


def faults(database: Database, *, sqlite: bool = True) -> Faults:
    """Everything that does not agree with something else in the file. Takes as long as reading it
    some times over. ``sqlite``: look for what SQLite itself calls damage, too."""
    with database.read() as connection:
        others = [fault for check in _CHECKS for fault in check(connection)]
        if sqlite:
            others += _file(connection)
        return Faults(crosscheck.counters(connection), others)


def _file(connection: sqlite3.Connection) -> Iterator[str]:
    for (line,) in connection.execute("PRAGMA integrity_check(20)").fetchall():
        if line != "ok":
            yield f"SQLite finds damage: {line}"
    for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check").fetchall():
        yield f"row {row} of {table} names a row of {parent} that is not there"


def _windows(connection: sqlite3.Connection) -> Iterator[str]:
    """Whether what is counted together belongs together."""
    known = {
        row["id"]: (row["scope"], row["lane"], row["period"], row["start"])
        for row in connection.execute("SELECT id, scope, lane, period, start FROM window")
    }
    named = connection.execute(
        'SELECT scope, windows FROM "grant" UNION SELECT scope, windows FROM attempt '
        "WHERE windows <> ''"
    ).fetchall()
    for scope, windows in named:
        found = [known.get(one) for one in crosscheck.numbers(windows)]
        starts = {one[2]: one[3] for one in found if one is not None}
        owners = (scope, ALL_SCOPES, scope)[: len(found) // len(PERIODS)]
        right = [
            (owner, lane, period, starts.get(period))
            for owner, lane in zip(owners, _LANES, strict=False)
            for period in PERIODS
        ]
        if len(right) < 2 * len(PERIODS) or found != right:
            yield f"an entry of scope {scope!r} is counted in windows {windows}, which are not its"


def _entries(connection: sqlite3.Connection) -> Iterator[str]:
    """Attempts that cannot have become what they are."""
    for what, condition in _IMPOSSIBLE.items():
        rows = connection.execute(
            f"SELECT id FROM attempt WHERE {condition} ORDER BY id LIMIT 20"
        ).fetchall()
        for (identity,) in rows:
            yield f"attempt {identity} {what}"


_IMPOSSIBLE: Final = {
    "belongs to no call": (
        "state IN ('sent', 'settled', 'charged', 'returned') AND \"grant\" IS NULL"
    ),
    "is under way and has an end": (
        "state = 'sent' AND coalesce(actual_tokens, actual_cost, ended) IS NOT NULL"
    ),
    "has ended without an amount": (
        "state IN ('settled', 'charged', 'returned', 'recorded') AND "
        "(actual_tokens IS NULL OR actual_cost IS NULL OR ended IS NULL)"
    ),
    # But for those of calls, whose texts may be counted only then: they have a lease.
    "was charged with another amount than was reserved": (
        "(state = 'recorded' OR (state = 'charged' AND lease IS NULL)) AND "
        "(actual_tokens, actual_cost) <> (tokens, cost)"
    ),
    "was charged in two generations": "state = 'charged' AND counted <> generation",
    "was given back and has a cost": (
        "state = 'returned' AND (actual_tokens, actual_cost) <> (0, 0)"
    ),
    "has a negative amount": (
        "tokens < 0 OR cost < 0 OR actual_tokens < 0 OR actual_cost < 0 OR inputs < 0"
    ),
    "was free by its status and is no refusal": "by_status = 1 AND state <> 'returned'",
}

_LIVE: Final = "('planned', 'creating', 'fenced', 'submitted', 'collecting')"


def _money_of_batches(connection: sqlite3.Connection) -> Iterator[str]:
    """Money without a lease is reserved until its batch ends it: each must have one."""
    rows = connection.execute(
        'SELECT id, tokens FROM "grant" WHERE lease IS NULL AND id NOT IN ('
        "SELECT \"grant\" FROM part WHERE state <> 'done' UNION ALL "
        'SELECT "grant" FROM batch WHERE "grant" IS NOT NULL)'
    ).fetchall()
    for identity, tokens in rows:
        yield f"grant {identity} reserves {tokens:,} tokens for no batch, and will never end"
    rows = connection.execute(
        "SELECT id, tokens FROM attempt WHERE state = 'sent' AND lease IS NULL "
        "AND id NOT IN (SELECT attempt FROM part WHERE attempt IS NOT NULL)"
    ).fetchall()
    for identity, tokens in rows:
        yield f"attempt {identity} reserves {tokens:,} tokens for no batch, and will never end"
    rows = connection.execute(
        'SELECT b.name FROM batch b LEFT JOIN "grant" g ON g.id = b."grant" '
        'WHERE b."grant" IS NOT NULL AND (g.id IS NULL OR g.lease IS NOT NULL)'
    ).fetchall()
    for (name,) in rows:
        yield f"batch {name}: its cost is not reserved any more"


def _parts(connection: sqlite3.Connection) -> Iterator[str]:
    """What is reserved for a part beside what its state says."""
    rows = connection.execute(
        "SELECT p.id, p.state, p.tokens, p.cost, g.id, coalesce(g.tokens, 0), coalesce(g.cost, 0), "
        "a.state, coalesce(a.tokens, 0), coalesce(a.cost, 0), p.attempt "
        'FROM part p LEFT JOIN "grant" g ON g.id = p."grant" AND g.lease IS NULL '
        "LEFT JOIN attempt a ON a.id = p.attempt AND a.lease IS NULL"
    ).fetchall()
    for part, state, *amount, grant, left, left_cost, attempt, sent, sent_cost, named in rows:
        wanted = {"planned": None, "lost": "charged", "stray": "charged"}.get(state, "sent")
        if state == "done":
            has_end = grant is None and attempt != "sent" and (named is None) == (attempt is None)
            if not has_end or (attempt is not None and amount != [sent, sent_cost]):
                yield f"part {part} of a batch has ended, and its money has not"
        elif grant is None or attempt != wanted:
            yield f"part {part} of a batch is {state}, and its money is {attempt or 'not sent'}"
        elif amount != [left + sent, left_cost + sent_cost]:
            yield (
                f"part {part} of a batch needs {amount[0]:,} tokens and "
                f"{money.shown_exactly(amount[1])}, and {left + sent:,} and "
                f"{money.shown_exactly(left_cost + sent_cost)} are reserved for it"
            )


def _texts(connection: sqlite3.Connection) -> Iterator[str]:
    """Texts that are in a part, and outcomes that a batch has counted."""
    rows = connection.execute(
        "SELECT p.id, p.items, count(i.id) FROM part p LEFT JOIN item i ON i.part = p.id "
        f"GROUP BY p.id HAVING count(i.id) <> iif(p.state IN {_LIVE}, p.items, 0)"
    ).fetchall()
    for part, items, found in rows:
        yield f"part {part} of a batch is of {items:,} texts, and {found:,} are in it"
    rows = connection.execute(
        "SELECT name, texts, stored, failed FROM batch WHERE reused > texts OR texts > rows "
        "OR stored + failed <> iif(ended IS NULL, 0, texts)"
    ).fetchall()
    for name, texts, stored, failed in rows:
        yield f"batch {name}: of {texts:,} texts {stored:,} have a vector and {failed:,} have none"


_CHECKS: Final = (_windows, _entries, _money_of_batches, _parts, _texts)
