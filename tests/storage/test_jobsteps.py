"""The steps that move money: the state and the ledger agree after each, whatever the order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from decimal import Decimal

import pytest
from hypothesis import given, strategies as st

from embedcore.errors import StorageCorrupt
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.storage.batches import Batches, BatchRecord, Wanted
from embedcore.storage.cutting import Cut, Cutter
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.part_money import Ended, PartMoney, Room
from embedcore.storage.parts import Part, Parts
from embedcore.storage.schema import STATE

HELD = Amount(tokens=6, cost=60_000)
ROOM = Room(parts=9)


class Desk:
    """One batch of three texts of two tokens each, in one part."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.batches, self.jobs = Batches(ledger), Parts(ledger)
        self.pool = self.batches.pool(
            scope="s", model="m", fingerprint="f", endpoint="e", account="a"
        )
        self.steps = PartMoney(self.jobs, self.pool)
        self.batch = self.submit("abc")
        self.part = self.plan(self.batch)

    def submit(self, texts: str) -> BatchRecord:
        batch = self.batches.begin(self.pool, input_type=None, asked_as="m")
        wanted = [Wanted(key=key_of(text), tokens=2, in_bytes=9) for text in texts]
        self.batches.want(batch, wanted, rows=len(texts), texts=len(texts), reused=0)
        self.batches.complete(batch, b"")
        return batch

    def plan(self, batch: BatchRecord) -> Part:
        cutter = Cutter(self.ledger, self.pool)
        part, _ = cutter.plan(batch, Cut(items=9, price=Decimal("0.01")))
        assert part is not None
        owned = self.jobs.take(part)
        assert owned is not None
        return owned

    def ask(self) -> Part:
        asked = self.steps.ask(self.part, ROOM)
        assert asked is not None
        return asked

    @property
    def ids(self) -> list[int]:
        return [identity for _, identity, _, _ in self.jobs.items(self.part)]

    @property
    def used(self) -> tuple[Amount, Amount]:
        """Spent and held."""
        found = usage.of_scope(self.ledger, "s", "total")
        return found.spent, found.held


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@pytest.fixture
def desk(ledger: Ledger) -> Desk:
    return Desk(ledger)


def test_to_ask_is_committed_with_its_money(desk: Desk, open_ledger: Callable[..., Ledger]) -> None:
    part = desk.ask()
    assert (part.state, part.asked is not None) == ("creating", True)
    seen = Parts(open_ledger()).again(part)
    assert seen == part, "another process sees it before the call leaves"
    assert desk.used == (Amount(), HELD)
    (row,) = usage.audit(desk.ledger)
    assert (row["state"], row["tokens"], row["inputs"]) == ("sent", 6, 3)


def test_there_is_room_for_so_many_and_so_much(desk: Desk) -> None:
    desk.ask()
    other = desk.plan(desk.submit("d"))
    assert desk.steps.ask(other, Room(parts=1)) is None
    assert desk.steps.ask(other, Room(parts=9, tokens=7)) is None
    assert desk.jobs.again(other).state == "planned"
    assert desk.steps.ask(other, Room(parts=2, tokens=8)) is not None


def test_what_is_too_much_alone_goes_alone(desk: Desk) -> None:
    assert desk.steps.ask(desk.part, Room(parts=1, tokens=1)) is not None


def test_money_that_is_not_held_any_more_sends_nothing(desk: Desk) -> None:
    with desk.ledger.database.transaction() as connection:
        connection.execute('DELETE FROM "grant"')
    with pytest.raises(StorageCorrupt, match="not reserved any more"):
        desk.ask()
    assert desk.jobs.again(desk.part).state == "planned"


@pytest.mark.parametrize("new_input", [True, False])
def test_a_proof_that_there_is_no_job_takes_it_back(desk: Desk, new_input: bool) -> None:
    part = desk.jobs.note(desk.ask(), input="file-1")
    again = desk.steps.not_created(part, next_at=7, why="refused", new_input=new_input)
    assert (again.state, again.attempt, again.next) == ("planned", None, 7)
    assert again.input == (None if new_input else "file-1")
    assert desk.used == (Amount(), HELD)
    assert desk.steps.ask(again, ROOM) is not None, "with the same money"
    assert desk.used == (Amount(), HELD)


@pytest.mark.fault(58)
def test_what_nobody_knows_is_charged_and_its_texts_are_free(desk: Desk) -> None:
    part = desk.ask()
    desk.steps.lose(part, next_at=5, note="nobody knows")
    assert desk.used == (HELD, Amount())
    assert desk.batches.counts(desk.batch).to_submit == 3
    assert desk.jobs.again(part).state == "lost"
    desk.steps.clear(desk.jobs.again(part))
    assert desk.used == (Amount(), Amount())
    assert desk.jobs.again(part).state == "done"


@pytest.mark.fault(60)
def test_a_job_too_many_is_charged_once(desk: Desk) -> None:
    part = desk.ask()
    for _ in range(2):
        desk.steps.charge_extra(part, "second")
    assert desk.used == (HELD, HELD)
    desk.steps.charge_extra(part, "third")
    assert desk.used[0] == Amount(tokens=12, cost=120_000)
    assert desk.jobs.again(part).jobs == "second,third"


@pytest.mark.parametrize(
    ("actual", "spent", "state"),
    [
        (Amount(tokens=5, cost=50_000), Amount(tokens=5, cost=50_000), "settled"),
        (Amount(tokens=9, cost=90_000), Amount(tokens=9, cost=90_000), "settled"),
        (Amount(), Amount(), "returned"),
        (None, HELD, "charged"),
    ],
)
def test_an_end_settles_the_money(
    desk: Desk, actual: Amount | None, spent: Amount, state: str
) -> None:
    part = desk.jobs.note(desk.ask(), job="job-1")
    desk.steps.end(part, Ended(actual=actual))
    assert desk.used == (spent, Amount())
    (row,) = usage.audit(desk.ledger)
    assert row["state"] == state
    ended = desk.jobs.again(part)
    assert (ended.state, ended.ended is not None) == ("done", True)


def test_a_text_without_an_outcome_is_tried_so_often(desk: Desk) -> None:
    for attempt in range(1, 4):
        part = desk.ask()
        desk.steps.end(part, Ended(actual=Amount(), most_tries=3, reason="nothing came"))
        if attempt < 3:
            assert desk.batches.counts(desk.batch).to_submit == 3
            desk.part = desk.plan(desk.batch)
    assert desk.batches.counts(desk.batch).failed == 3
    assert set(desk.batches.reasons(desk.batch).values()) == {"nothing came"}


def test_an_end_that_does_not_count_is_no_try(desk: Desk) -> None:
    for _ in range(5):
        desk.steps.end(desk.ask(), Ended(actual=Amount(), counts=False, most_tries=1))
        desk.part = desk.plan(desk.batch)
    assert desk.batches.counts(desk.batch).in_flight == 3


def test_an_error_that_may_pass_is_a_try_of_its_own_text_only(desk: Desk) -> None:
    first = desk.ids[0]
    ended = Ended(actual=Amount(), counts=False, most_tries=1)
    desk.steps.end(desk.ask(), ended, [(first, "429: not now")])
    assert desk.batches.reasons(desk.batch) == {key_of("a"): "429: not now"}
    assert desk.batches.counts(desk.batch).to_submit == 2


@pytest.mark.parametrize(("lost", "state"), [(True, "lost"), (False, "failed")])
def test_without_another_try_there_is_an_end(desk: Desk, lost: bool, state: str) -> None:
    part, first = desk.ask(), desk.ids[0]
    desk.jobs.store(part, [first])
    desk.steps.end(part, Ended(actual=None, retry=False, lost=lost, reason="gone"))
    with desk.ledger.database.read() as connection:
        found = connection.execute("SELECT state FROM item ORDER BY id").fetchall()
    assert [name for (name,) in found] == ["stored", state, state]


def test_what_nobody_asked_for_costs_nothing(desk: Desk) -> None:
    desk.steps.dissolve(desk.part)
    assert desk.used == (Amount(), Amount())
    assert desk.batches.counts(desk.batch).to_submit == 3
    assert usage.audit(desk.ledger) == []


@given(data=st.data())
def test_whatever_happens_to_parts_the_ledger_add_up(data: st.DataObject) -> None:
    """Held is what live parts hold, spent is what ended ones cost, and nothing is left over."""
    desk = Desk(Ledger(Database(None, STATE)))
    spent = 0
    state = "planned"
    for _ in range(data.draw(st.integers(0, 8))):
        moves: dict[str, list[str]] = {
            "planned": ["ask", "dissolve"],
            "creating": ["not_created", "lose", "end", "extra"],
            "lost": ["clear", "end"],
        }
        move = data.draw(st.sampled_from(moves[state]))
        part = desk.jobs.again(desk.part)
        if move == "ask":
            desk.ask()
            state = "creating"
        elif move == "not_created":
            desk.part = desk.steps.not_created(part, next_at=0, why="no", new_input=True)
            state = "planned"
        elif move == "extra":
            desk.steps.charge_extra(part, f"job-{spent}")
            spent += 6
        elif move == "lose":
            desk.steps.lose(part, next_at=0, note="?")
            spent += 6
            state = "lost"
        else:
            tokens: int | None = 0
            if move == "end":
                tokens = data.draw(st.sampled_from([None, 0, 4, 6, 8]))
                actual = None if tokens is None else Amount(tokens=tokens, cost=tokens * 10_000)
                desk.steps.end(part, Ended(actual=actual, most_tries=99))
            else:
                getattr(desk.steps, move)(part)
            spent += (6 if tokens is None else tokens) if state != "lost" else 0
            if state == "lost" and tokens is not None:
                spent += tokens - 6
            desk.part = desk.plan(desk.batch)
            state = "planned"
        held = 0 if state == "lost" else 6
        assert desk.used == (
            Amount(tokens=spent, cost=spent * 10_000),
            Amount(tokens=held, cost=held * 10_000),
        )


def test_a_part_that_is_taken_and_left_is_as_it_was(desk: Desk) -> None:
    before = desk.jobs.again(desk.part)
    desk.jobs.leave(desk.part)
    taken = desk.jobs.take(desk.part)
    assert taken is not None
    assert (taken.state, taken.grant, taken.epoch) == (before.state, before.grant, before.epoch + 1)
    assert desk.used == (Amount(), HELD)


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("gone", ["dropped", "ended"])
def test_what_is_free_again_and_only_ended_batches_know_has_its_outcome_again(
    desk: Desk, lost: bool, gone: str
) -> None:
    """Whoever had a part of it may be gone before the part is."""
    desk.part = desk.ask()
    desk.steps.end(desk.part, Ended(actual=Amount(), retry=False, lost=lost, reason="why"))
    desk.batches.set_state(desk.batch, "done")
    again = desk.submit("abc")
    assert desk.batches.resubmit_lost(again) == (3 if lost else 0)
    desk.part = desk.plan(again)
    assert desk.batches.reasons(desk.batch) == dict.fromkeys(map(key_of, "abc"), "why")
    if gone == "dropped":
        desk.batches.drop(again)
    else:
        desk.batches.set_state(again, "abandoned")
    desk.steps.dissolve(desk.part)
    with desk.ledger.database.read() as connection:
        items = connection.execute("SELECT state, reason, part FROM item").fetchall()
    assert [*map(tuple, items)] == [("lost" if lost else "failed", "why", None)] * 3
    third = desk.batches.counts(desk.submit("abc"))
    assert (third.failed, third.to_submit) == ((3, 0) if lost else (0, 3))
