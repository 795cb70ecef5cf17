"""Is an altered number found, and is a sound file never said to be wrong?"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from embedcore.errors import StorageCorrupt
from embedcore.money import shown_exactly
from embedcore.storage import crosscheck, usage
from embedcore.storage.amounts import Amount
from embedcore.storage.batches import BatchAccount, Batches, BatchRecord, Wanted
from embedcore.storage.cutting import Cut, Cutter
from embedcore.storage.database import SPENDING, Database, driver
from embedcore.storage.inspection import faults
from embedcore.storage.ledger import Ledger
from embedcore.storage.part_money import Ended, PartMoney, Room
from embedcore.storage.parts import Parts
from embedcore.storage.schema import STATE

pytestmark = pytest.mark.case("C6")

# Whole numbers that count nothing, by what they are. Every other column must be found out if it is
# altered: a new one belongs to neither until it is checked, or listed here.
IDENTITIES = {
    *("book.id", "window.id", "grant.id", "attempt.id", "attempt.grant", "warning.window"),
    *("pool.id", "batch.id", "batch.pool", "batch.grant", "part.id", "part.pool", "part.batch"),
    *("part.grant", "part.attempt", "item.id", "item.pool", "item.part", "item.ordinal"),
    *("wish.batch", "wish.item", "unread.part", "unread.ordinal"),
}
TIMES = {
    *("book.clock", "book.tight_until", "grant.lease", "grant.opened", "attempt.lease"),
    *("attempt.sent", "attempt.ended", "rate.named", "pool.queue_until", "batch.deadline"),
    *("batch.retry", "batch.waiter_until", "batch.created", "batch.ended", "part.asked"),
    *("part.next", "part.lease", "part.created", "part.ended", "part.since", "part.not_before"),
    "part.missing",
}
FLAGS = {
    *("grant.loose", "attempt.loose", "attempt.reported", "attempt.by_status"),
    *("batch.resubmits_lost", "batch.draining", "part.cancelled", "item.stopped"),
    "item.paid",
    "batch.delivered",
}
SAID_BY_OTHERS = {
    *("warning.amount", "rate.requests", "rate.tokens", "pool.queue", "pool.refusals"),
    *("part.completed", "part.failed", "part.total", "attempt.inputs", "batch.rows"),
}
ONLY_SHOWN = {
    *("batch.drained_tokens", "batch.drained_cost", "item.tokens", "item.bytes"),
    *("item.characters_cut", "item.tokens_cut"),
}
ATTEMPTS_AT_IT = {"part.looks", "part.tries", "part.epoch", "item.tries"}
COUNT_NOTHING = IDENTITIES | TIMES | FLAGS | SAID_BY_OTHERS | ONLY_SHOWN | ATTEMPTS_AT_IT
# Where only some rows have a second witness.
WITNESSED = {
    "attempt.tokens": "state IN ('sent', 'recorded') OR (state = 'charged' AND lease IS NULL)",
    "attempt.cost": "state IN ('sent', 'recorded') OR (state = 'charged' AND lease IS NULL)",
    "attempt.actual_tokens": "state NOT IN ('reset', 'clock')",
    "attempt.actual_cost": "state NOT IN ('reset', 'clock')",
    "attempt.generation": "state = 'charged'",
    "attempt.counted": "state = 'settled' AND counted = 1 AND scope = 's'",
    "part.items": "state IN ('planned', 'submitted')",
    "batch.reused": "reused = texts",
    "batch.texts": "ended IS NOT NULL OR texts = rows",
}
HELD = {
    "window.tokens_held": "1",
    "window.cost_held": "1",
    "grant.tokens": "1",
    "grant.cost": "1",
    "attempt.tokens": "state = 'sent'",
    "attempt.cost": "state = 'sent'",
}


def numbers_of_the_schema() -> list[str]:
    database = Database(None, STATE)
    with database.read() as connection:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '\\_%' ESCAPE "
            "'\\' AND name NOT LIKE 'sqlite%'"
        ).fetchall()
        found = [
            f"{table}.{name}"
            for (table,) in tables
            for _, name, kind, *_ in connection.execute(f'PRAGMA table_info("{table}")')
            if kind == "INTEGER"
        ]
    database.close()
    return found


COLUMNS = [name for name in numbers_of_the_schema() if name not in COUNT_NOTHING]


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def submit(ledger: Ledger, texts: str, *, reused: int = 0) -> tuple[BatchAccount, BatchRecord]:
    batches = Batches(ledger)
    pool = batches.pool(scope="b", model="p:m", fingerprint="f", endpoint="e", account="a")
    batch = batches.begin(pool, input_type=None, asked_as="m")
    wanted = [Wanted(key=key_of(text), tokens=2, in_bytes=9) for text in texts]
    count = len(texts) + reused
    batches.want(batch, wanted, rows=count, texts=count, reused=reused)
    batches.complete(batch, b"")
    return pool, batch


def fill_batches(ledger: Ledger) -> None:
    """Parts that are planned, under way and at their end; and money that is in no part yet."""
    cut, batches, jobs = Cut(items=2, price=Decimal("0.01")), Batches(ledger), Parts(ledger)
    pool, batch = submit(ledger, "abcdefgh")
    steps, cutter = PartMoney(jobs, pool), Cutter(ledger, pool)
    cutter.hold(batch, cut)
    after = 0
    for state in ("planned", "submitted", "lost"):
        part, after = cutter.plan(batch, cut, after=after)
        assert part is not None
        owned = jobs.take(part)
        assert owned is not None
        if state == "planned":
            continue
        asked = steps.ask(owned, Room(parts=9))
        assert asked is not None
        if state == "lost":
            steps.lose(asked, next_at=0, note="nobody knows")
        else:
            jobs.note(asked, state="submitted", job="job")
    pool, ended = submit(ledger, "xy", reused=1)
    part, _ = cutter.plan(ended, cut)
    assert part is not None
    owned = jobs.take(part)
    assert owned is not None
    asked = steps.ask(owned, Room(parts=9))
    assert asked is not None
    jobs.store(asked, [one[1] for one in jobs.items(asked)])
    steps.end(asked, Ended(actual=Amount(tokens=4, cost=40_000)))
    batches.set_state(ended, "done")
    _, whole = submit(ledger, "", reused=2)
    batches.set_state(whole, "done")


def fill(ledger: Ledger, clock: Any) -> None:
    """Everything that can be in the ledger, with resets in the middle of it."""
    amount = Amount(tokens=10, cost=100)
    for scope in ("s", "t", "*"):
        for lane in ("all", "query"):
            attempts = [
                ledger.hold_and_send(scope, amount, lane=lane, model="p:m", inputs=1)
                for _ in range(8)
            ]
            ledger.settle(attempts[0], Amount(tokens=7, cost=70), close=True)
            ledger.charge(attempts[1], note="lost")
            ledger.charge(attempts[2], note="lost")
            ledger.give_back(attempts[3], by_status=True)
            ledger.record(scope, Amount(tokens=3, cost=30))
            if scope != "t":
                ledger.reset(scope)
            ledger.settle(attempts[2], Amount(tokens=2, cost=20))
            ledger.settle(attempts[4], Amount(tokens=12, cost=120))
            ledger.charge(attempts[5], note="lost")
            ledger.record(scope, Amount(tokens=3, cost=30))
            grant = ledger.hold(scope, Amount(tokens=30, cost=300), lane=lane)
            ledger.send(grant, amount)
    fill_batches(ledger)
    clock.now += 86_400
    ledger.close(ledger.hold("s", amount))
    ledger.hold("s", amount)
    ledger.charge(ledger.hold_and_send("s", amount), note="lost")
    ledger.repair_clock()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, new_clock: Callable[[], Any]) -> Any:
    """The file that every test has a copy of, and the time when it was closed."""
    path, clock = tmp_path_factory.mktemp("filled") / "state.db", new_clock()
    ledger = Ledger(Database(path, STATE), clock=clock)
    fill(ledger, clock)
    assert faults(ledger.database) == ([], [])
    ledger.database.close()
    assert list(path.parent.iterdir()) == [path]
    return path, clock.now


@pytest.fixture
def busy(filled: tuple[Path, float], state_path: Path, clock: Any) -> Path:
    path, clock.now = filled
    shutil.copyfile(path, state_path)
    return state_path


class File:
    """The file as a stranger's hand finds it."""

    def __init__(self, path: Path, clock: Any) -> None:
        self.path, self.clock = path, clock
        self.connection = driver().connect(path, isolation_level=None)

    def ask(self, statement: str, *values: object) -> list[Any]:
        return self.connection.execute(statement, values).fetchall()

    def opened(self, *, compare: bool = True) -> Ledger:
        contents = SPENDING if compare else SPENDING._replace(differs=None)
        database = Database(self.path, STATE, contents=contents)
        try:
            database.open()
        except StorageCorrupt:
            database.close()
            raise
        return Ledger(database, clock=self.clock)

    def faults(self) -> list[str]:
        ledger = self.opened(compare=False)
        found = faults(ledger.database)
        ledger.database.close()
        return [*map(str, found.counters), *found.others]


@pytest.fixture
def file(busy: Path, clock: Any) -> Iterator[File]:
    file = File(busy, clock)
    yield file
    file.connection.close()


def rows(file: File, column: str, condition: str) -> list[tuple[str, str, int, int | None]]:
    table, _, name = column.partition(".")
    found = file.ask(f'SELECT rowid, "{name}" FROM "{table}" WHERE {condition}')
    return [(table, name, row, value) for row, value in found]


@pytest.mark.parametrize("by", [1, 2**61])
@pytest.mark.parametrize("column", COLUMNS)
def test_no_number_can_be_altered_unnoticed(file: File, column: str, by: int) -> None:
    found = rows(file, column, WITNESSED.get(column, "1"))
    assert found, "a test without a row to alter says nothing"
    # What is too large to be added up is so in any row.
    for table, name, row, value in found if by == 1 else found[::5]:
        change = f'UPDATE "{table}" SET "{name}" = ? WHERE rowid = ?'
        file.ask(change, (value or 0) + by, row)
        assert file.faults(), f"row {row}"
        file.ask(change, value, row)
    assert not file.faults()


def test_what_counts_nothing_is_in_the_schema() -> None:
    assert set(numbers_of_the_schema()) >= COUNT_NOTHING


@pytest.mark.parametrize("by", [1, -1, 2**61])
@pytest.mark.parametrize("column", HELD)
def test_what_is_held_is_looked_at_before_anything_else(file: File, column: str, by: int) -> None:
    for table, name, row, value in rows(file, column, HELD[column]):
        assert value is not None
        if value + by < 0:
            continue
        change = f'UPDATE "{table}" SET "{name}" = ? WHERE rowid = ?'
        file.ask(change, value + by, row)
        with pytest.raises(StorageCorrupt, match="embedcore doctor") as error:
            file.opened()
        assert "embedcore budget recount --repair" in str(error.value)
        assert str(file.path) in str(error.value)
        file.ask(change, value, row)
    file.opened().database.close()


def test_the_error_names_window_unit_and_both_amounts(file: File) -> None:
    file.ask(
        "UPDATE window SET cost_held = cost_held + 1234567 WHERE scope = 't' AND lane = 'query' "
        "AND period = 'month'"
    )
    (held,) = file.ask("SELECT cost_held FROM window WHERE scope = 't' AND lane = 'query' LIMIT 1")
    with pytest.raises(StorageCorrupt) as error:
        file.opened()
    message = str(error.value)
    for part in (
        "cost reserved of the queries of scope 't' in the month 2026-01",
        f"the counter says {shown_exactly(held[0] + 1234567)}",
        f"add up to {shown_exactly(held[0])}",
        "Nothing was sent",
    ):
        assert part in message


def test_what_was_spent_does_not_keep_a_program_from_starting(file: File) -> None:
    """It would have to read every attempt for that."""
    file.ask("UPDATE window SET tokens_spent = tokens_spent + 1")
    file.opened().database.close()
    assert file.faults()


def test_a_start_reads_no_attempt_that_has_ended(file: File) -> None:
    sums = file.ask(f"EXPLAIN QUERY PLAN {crosscheck._OPEN}")
    assert "USING INDEX attempt_open" in str(sums)
    assert "SCAN attempt\n" not in str(sums)


@pytest.mark.parametrize("way", ["held", "all"])
def test_recount_believes_the_entries(file: File, way: str) -> None:
    before = file.ask("SELECT * FROM window ORDER BY id")
    columns = ("tokens_held",) if way == "held" else crosscheck._COUNTERS
    changes = ", ".join(f"{name} = {name} + id % 3" for name in columns)
    file.ask(f"UPDATE window SET {changes}")
    altered = file.ask("SELECT * FROM window ORDER BY id")
    ledger = file.opened(compare=False)
    found = ledger.differences()
    assert ledger.recount() == found
    assert len(found) == sum(row != old for row, old in zip(altered, before, strict=True)) * len(
        columns
    )
    assert file.ask("SELECT * FROM window ORDER BY id") == before
    assert [row["note"] for row in usage.audit(ledger)][-len(found) :] == [
        f"recount: {one}" for one in found
    ]
    assert ledger.recount() == []
    assert faults(ledger.database) == ([], [])
    ledger.database.close()
    file.opened().database.close()


@pytest.mark.parametrize("again", [False, True])
def test_a_window_that_is_gone_is_noticed_and_comes_back(
    file: File, open_ledger: Callable[..., Ledger], again: bool
) -> None:
    """Else its limit would begin anew: whether a call makes a new one meanwhile, or not."""
    columns = "scope, lane, period, start, tokens_spent, cost_spent, tokens_held, cost_held"
    before = file.ask(f"SELECT {columns} FROM window ORDER BY 1, 2, 3, 4")
    running = open_ledger() if again else None
    if running is not None:
        running.database.open()
    for (identity,) in file.ask("SELECT id FROM window"):
        file.ask("DELETE FROM window WHERE id = ?", identity)
        has_open = file.ask(
            "SELECT 1 FROM attempt WHERE state = 'sent' AND "
            f"instr(',' || windows || ',', ',{identity},')"
        )
        if has_open:
            with pytest.raises(StorageCorrupt, match=f"window {identity}, which is not in"):
                file.opened()
        assert file.faults()
        if running is not None:
            for scope in ("s", "t"):
                running.close(running.hold(scope, Amount(), lane="query"))
        ledger = file.opened(compare=False)
        assert ledger.recount()
        assert faults(ledger.database) == ([], [])
        ledger.database.close()
    after = file.ask(f"SELECT {columns} FROM window ORDER BY 1, 2, 3, 4")
    assert [row for row in after if any(row[4:])] == [row for row in before if any(row[4:])]


def test_windows_that_are_not_those_of_the_entry_are_found(file: File) -> None:
    for table in ('"grant"', "attempt"):
        for windows in ("", "x", "1,2", "9999,2,3,4,5,6", "1,2,3,4,5,6,7", "1,1,1,1,1,1"):
            (row,) = file.ask(f"SELECT rowid, windows FROM {table} WHERE windows <> '' LIMIT 1")
            file.ask(f"UPDATE {table} SET windows = ? WHERE rowid = ?", windows, row[0])
            assert file.faults(), windows
            file.ask(f"UPDATE {table} SET windows = ? WHERE rowid = ?", row[1], row[0])
    assert not file.faults()


@pytest.mark.parametrize(
    "damage",
    [
        'DELETE FROM "grant" WHERE lease IS NULL',
        "DELETE FROM attempt WHERE state = 'sent'",
        "DELETE FROM attempt WHERE state = 'settled'",
        "DELETE FROM batch WHERE ended IS NULL",
        "DELETE FROM part WHERE state = 'planned'",
        "DELETE FROM part WHERE state = 'submitted'",
        "UPDATE attempt SET \"grant\" = NULL WHERE state = 'sent'",
        "UPDATE attempt SET state = 'settled' WHERE state = 'sent'",
        "UPDATE attempt SET state = 'returned' WHERE state = 'settled'",
        "UPDATE attempt SET actual_tokens = NULL WHERE state = 'settled'",
        "UPDATE part SET state = 'done' WHERE state = 'submitted'",
        "UPDATE part SET state = 'planned' WHERE state = 'submitted'",
        "UPDATE part SET attempt = 1 WHERE state = 'submitted'",
        "UPDATE item SET part = NULL WHERE part IS NOT NULL",
        "INSERT INTO warning VALUES (99999, 'tokens', 1)",
        "DROP INDEX attempt_sent",
    ],
)
def test_what_belongs_together_and_is_not(file: File, damage: str) -> None:
    file.ask("PRAGMA foreign_keys = OFF")
    file.ask(damage)
    if damage.startswith("DROP"):
        # No number: everything is still there.
        assert not file.faults()
    else:
        assert file.faults()


def test_what_an_older_embedcore_settled_is_given_the_benefit_of_the_doubt(
    ledger: Ledger, state_path: Path, clock: Any
) -> None:
    """It wrote down whether an attempt was charged before a reset, and not whether it ended."""
    attempts = [ledger.hold_and_send("s", Amount(tokens=10)) for _ in range(3)]
    ledger.settle(attempts[0], Amount(tokens=7))
    ledger.charge(attempts[1], note="lost")
    ledger.reset("s")
    ledger.settle(attempts[2], Amount(tokens=7))
    ledger.settle(attempts[1], Amount(tokens=1))
    ledger.settle(ledger.hold_and_send("s", Amount(tokens=10)), Amount(tokens=4))
    with ledger.database.transaction() as connection:
        connection.execute("UPDATE attempt SET counted = NULL")
    assert faults(ledger.database) == ([], [])
    day = usage.of_scope(ledger, "s").spent.tokens
    assert day == 11
    file = File(state_path, clock)
    for wrong in (3, 4 + 7 + 7 + 1 + 1):
        file.ask("UPDATE window SET tokens_spent = ? WHERE id = 1", wrong)
        assert file.faults()
    assert file.ask("SELECT scope, period FROM window WHERE id = 1") == [("s", "day")]
    file.connection.close()


def test_differences_are_shown_as_they_are_written(file: File) -> None:
    file.ask("UPDATE window SET requests = requests + 5 WHERE id = 3")
    assert file.ask("SELECT scope, lane, period FROM window WHERE id = 3") == [
        ("s", "all", "total")
    ]
    ledger = file.opened()
    (found,) = ledger.differences()
    ledger.database.close()
    assert "requests of scope 's' in total: the counter says" in str(found)
    assert found.counted == found.entered + 5
    assert json.dumps(found.counted)
