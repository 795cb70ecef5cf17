"""Parts of batches: one owner at a time, and who lost a part changes nothing any more."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from embedcore.storage.amounts import Amount
from embedcore.storage.batches import BatchAccount, Batches, BatchRecord, Wanted
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.cutting import Cut, Cutter
from embedcore.storage.ledger import Ledger
from embedcore.storage.part_money import PartMoney, Room
from embedcore.storage.parts import Part, Parts, Superseded, new_key
from embedcore.storage.standing import standing

OF = {"scope": "s", "model": "m", "fingerprint": "f", "endpoint": "e", "account": "a"}


@pytest.fixture
def pool(ledger: Ledger) -> BatchAccount:
    return Batches(ledger).pool(**OF)


@pytest.fixture
def plan(ledger: Ledger, pool: BatchAccount) -> Callable[..., tuple[BatchRecord, Part]]:
    """``plan("abc")``: a batch that wishes for these texts, and a part with those in no other."""

    def plan(texts: str = "abc", *, pool: BatchAccount = pool) -> tuple[BatchRecord, Part]:
        batches = Batches(ledger)
        batch = batches.begin(pool, input_type=None, asked_as="m")
        wanted = [Wanted(key=key_of(text), tokens=2, in_bytes=9) for text in texts]
        batches.want(batch, wanted, rows=len(texts), texts=len(texts), reused=0)
        batches.complete(batch, b"")
        part, _ = Cutter(ledger, pool).plan(batch, Cut(items=100))
        assert part is not None
        return batches.again(batch), part

    return plan


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def owner(ledger: Ledger, name: str, *, lease: float = 120.0) -> Parts:
    """The table as a process of another host sees it: it lives until its lease ends."""
    return Parts(ledger, owner=lambda: f"{name}:1", lease=lease)


def create(jobs: Parts, pool: BatchAccount, part: Part) -> Part:
    owned = jobs.take(part)
    assert owned is not None
    asked = PartMoney(jobs, pool).ask(owned, Room(parts=99))
    assert asked is not None
    return asked


@pytest.mark.fault(75)
def test_a_part_has_one_owner_until_its_lease_ends(
    ledger: Ledger, plan: Callable[..., Any], clock: Any
) -> None:
    _, part = plan()
    one, other = owner(ledger, "one"), owner(ledger, "other")
    first = one.take(part)
    assert first is not None
    clock.now += 119
    assert other.take(part) is None
    assert one.take(part) is None, "nor twice by the same: threads are two as well"
    clock.now += 2
    second = other.take(part)
    assert second is not None
    assert second.epoch == first.epoch + 1


@pytest.mark.fault(75)
def test_who_lost_a_part_changes_nothing_any_more(
    ledger: Ledger, plan: Callable[..., Any], pool: BatchAccount, clock: Any
) -> None:
    batch, part = plan()
    one, other = owner(ledger, "one"), owner(ledger, "other")
    stale = one.take(part)
    assert stale is not None
    clock.now += 121
    assert other.take(part) is not None
    before = other.again(part)
    steps, ids = PartMoney(one, pool), [identity for _, identity, _, _ in one.items(part)]
    for attempt in (
        lambda: one.note(stale, state="submitted", job="j"),
        lambda: one.store(stale, ids),
        lambda: one.fail(stale, [(ids[0], "why")]),
        lambda: one.renew(stale),
        lambda: steps.ask(stale, Room(parts=9)),
        lambda: steps.dissolve(stale),
        lambda: steps.charge_extra(stale, "j"),
    ):
        with pytest.raises(Superseded):
            attempt()
    one.leave(stale)
    assert other.again(part) == before
    assert one.take(part) is None, "leaving what was lost does not free it"
    assert Batches(ledger).counts(batch).in_flight == 3


def test_every_step_keeps_the_part_for_longer(
    ledger: Ledger, plan: Callable[..., Any], clock: Any
) -> None:
    _, part = plan()
    one, other = owner(ledger, "one"), owner(ledger, "other")
    owned = one.take(part)
    assert owned is not None
    for _ in range(5):
        clock.now += 100
        one.renew(owned)
    assert other.take(part) is None


def test_who_leaves_a_part_frees_it_at_once(ledger: Ledger, plan: Callable[..., Any]) -> None:
    _, part = plan()
    one, other = owner(ledger, "one"), owner(ledger, "other")
    owned = one.take(part)
    assert owned is not None
    one.leave(owned)
    assert other.take(part) is not None


def test_an_ended_part_is_nobodys(
    ledger: Ledger, plan: Callable[..., Any], pool: BatchAccount
) -> None:
    _, part = plan()
    jobs = Parts(ledger)
    owned = jobs.take(part)
    assert owned is not None
    PartMoney(jobs, pool).dissolve(owned)
    assert jobs.take(part) is None
    with pytest.raises(Superseded):
        jobs.note(owned, tries=1)
    assert jobs.live(pool) == []


def test_those_are_waited_for_that_an_open_batch_wants(
    ledger: Ledger, plan: Callable[..., Any]
) -> None:
    batches, jobs = Batches(ledger), Parts(ledger)
    one, part = plan("abc")
    other, _ = plan("cd")
    assert jobs.wanted_by(part) == [one.id, other.id]
    batches.set_state(one, "cancelling")
    assert jobs.wanted_by(part) == [other.id]
    owned = jobs.take(part)
    assert owned is not None
    (identity,) = [one for _, one, key, _ in jobs.items(part) if key == key_of("c")]
    jobs.store(owned, [identity])
    assert jobs.wanted_by(part) == [], "what is stored is waited for by nobody"


def test_the_parts_of_a_batch_are_those_with_its_texts(
    ledger: Ledger, plan: Callable[..., Any]
) -> None:
    jobs = Parts(ledger)
    one, first = plan("abc")
    other, second = plan("cd")
    assert [part.id for part in jobs.of_batch(one)] == [first.id]
    assert [part.id for part in jobs.of_batch(other)] == [first.id, second.id]


def test_only_open_texts_are_stored_and_a_failed_one_stays_failed(
    ledger: Ledger, plan: Callable[..., Any]
) -> None:
    jobs = Parts(ledger)
    batch, part = plan("abc")
    owned = jobs.take(part)
    assert owned is not None
    ids = [identity for _, identity, _, _ in jobs.items(part)]
    jobs.fail(owned, [(ids[0], "why")])
    jobs.store(owned, ids)
    counts = Batches(ledger).counts(batch)
    assert (counts.stored, counts.failed, counts.open) == (2, 1, 0)
    assert Batches(ledger).reasons(batch) == {key_of("a"): "why"}


def test_what_is_in_flight_is_counted_for_all_who_share_the_account(
    ledger: Ledger, plan: Callable[..., Any], pool: BatchAccount
) -> None:
    batches, jobs = Batches(ledger), Parts(ledger)
    elsewhere = batches.pool(**{**OF, "scope": "other", "fingerprint": "g"})
    stranger = batches.pool(**{**OF, "account": "b"})
    for texts, where in (("abc", pool), ("xy", elsewhere), ("z", stranger)):
        _, part = plan(texts, pool=where)
        assert jobs.in_flight(where)[0] == (0 if where is not elsewhere else 1), "not yet"
        create(jobs, where, part)
    assert jobs.in_flight(pool) == jobs.in_flight(elsewhere) == (2, 10)
    assert jobs.in_flight(stranger) == (1, 2)


@pytest.mark.fault(74)
def test_a_full_queue_is_known_to_all_who_share_the_account(
    ledger: Ledger, pool: BatchAccount, clock: Any
) -> None:
    batches, jobs = Batches(ledger), Parts(ledger)
    sibling = batches.pool(**{**OF, "scope": "other"})
    stranger = batches.pool(**{**OF, "model": "n"})
    until = jobs.now() + 60 * MICROSECONDS
    jobs.queue_refused(pool, limit=1_000, until=until)
    jobs.queue_refused(pool, limit=None, until=until + 1)
    for one in (pool, sibling):
        queue = jobs.queue(one, jobs.now())
        assert (queue.limit, queue.until, queue.refusals) == (1_000, until + 1, 2)
    assert jobs.queue(stranger, jobs.now()).until == 0
    jobs.queue_took(sibling)
    queue = jobs.queue(pool, jobs.now())
    assert (queue.limit, queue.refusals) == (1_000, 0)
    assert queue.until <= jobs.now()
    clock.now += 2 * 86_400
    jobs.now()
    assert jobs.queue(pool, jobs.now()).limit is None, "an account may be allowed more by then"


def test_what_a_batch_cost_is_the_sum_of_its_parts(
    ledger: Ledger, plan: Callable[..., Any], pool: BatchAccount
) -> None:
    jobs = Parts(ledger)
    batch, part = plan("abc")
    assert standing(jobs.ledger, batch).spent.held == Amount(tokens=6)
    asked = create(jobs, pool, part)
    assert standing(jobs.ledger, batch).spent.held == Amount(tokens=6)
    PartMoney(jobs, pool).lose(asked, next_at=0, note="nobody knows")
    spent = standing(jobs.ledger, batch).spent
    assert (spent.actual, spent.unconfirmed, spent.held) == (
        Amount(tokens=6),
        Amount(tokens=6),
        Amount(),
    )


def test_old_parts_are_forgotten(
    ledger: Ledger, plan: Callable[..., Any], pool: BatchAccount, clock: Any
) -> None:
    jobs = Parts(ledger)
    _, first = plan("a")
    _, second = plan("b")
    owned = jobs.take(first)
    assert owned is not None
    PartMoney(jobs, pool).dissolve(owned)
    assert jobs.forget(jobs.now()) == 0
    clock.now += 1
    assert jobs.forget(jobs.now()) == 1
    assert [part.id for part in jobs.live(pool)] == [second.id], "what has not ended stays"


def test_a_key_is_like_no_other() -> None:
    keys = {new_key() for _ in range(1_000)}
    assert len(keys) == 1_000
    assert all(key.isalnum() and len(key) <= 64 for key in keys)
