"""Batches over one set of texts: who wishes for what, and what is left when they end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils

from embedcore.errors import StorageCorrupt
from embedcore.storage import batches as module, usage
from embedcore.storage.amounts import Amount
from embedcore.storage.batches import Batches, BatchRecord, Wanted
from embedcore.storage.cutting import Cut, Cutter
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.part_money import Ended, PartMoney
from embedcore.storage.parts import Parts
from embedcore.storage.schema import STATE, Schema

CUT = Cut(items=100)
OF = {"scope": "s", "model": "m", "fingerprint": "f", "endpoint": "e", "account": "a"}


@pytest.fixture
def batches(ledger: Ledger) -> Batches:
    return Batches(ledger)


@pytest.fixture
def submit(batches: Batches) -> Callable[..., BatchRecord]:
    """``submit("abc")``: an open batch that wishes for these one-letter texts."""

    def submit(texts: str, *, open_: bool = True, digest: bytes = b"", **how: Any) -> BatchRecord:
        batch = batches.begin(batches.pool(**OF), input_type=None, asked_as="m", **how)
        wanted = [Wanted(key=key_of(text), tokens=2, in_bytes=9) for text in texts]
        batches.want(batch, wanted, rows=len(texts), texts=len(texts), reused=0)
        if open_:
            batches.complete(batch, digest)
        return batches.again(batch)

    return submit


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def end_all(batches: Batches, batch: BatchRecord, *, store: str = "", **ended: Any) -> None:
    """Put what a batch has to submit into a part, and end that with vectors for ``store``."""
    pool = batches.pool_of(batch)
    part, _ = Cutter(batches.ledger, pool).plan(batch, CUT)
    assert part is not None
    jobs = Parts(batches.ledger)
    owned = jobs.take(part)
    assert owned is not None
    keys = [key_of(text) for text in store]
    jobs.store(owned, [identity for _, identity, key, _ in jobs.items(owned) if key in keys])
    PartMoney(jobs, pool).end(owned, Ended(actual=Amount(), most_tries=1, **ended))


def states(batches: Batches) -> dict[bytes, str]:
    with batches.database.read() as connection:
        return dict(connection.execute("SELECT key, state FROM item").fetchall())


def test_a_pool_is_one_for_each_description(batches: Batches) -> None:
    assert batches.pool(**OF) == batches.pool(**OF)
    others = {batches.pool(**{**OF, name: "other"}).id for name in OF}
    assert len({batches.pool(**OF).id, *others}) == 6


def test_a_batch_is_nobodys_until_all_its_rows_are_there(
    batches: Batches, submit: Callable[..., BatchRecord]
) -> None:
    batch = submit("ab", open_=False)
    assert batches.named(batch.name) is None
    assert batches.all() == []
    batches.complete(batch, b"digest")
    assert batches.named(batch.name) == batches.again(batch)
    assert [one.id for one in batches.all()] == [batch.id]


def test_names_are_fit_for_files_and_different(submit: Callable[..., BatchRecord]) -> None:
    names = [submit("a").name for _ in range(50)]
    assert len(set(names)) == 50
    assert all(name.replace("-", "").isalnum() and name.isascii() for name in names)
    assert all(name.startswith("20260115-") for name in names)


def test_texts_are_counted_for_each_who_wishes_for_them(
    batches: Batches, submit: Callable[..., BatchRecord]
) -> None:
    one, other = submit("abc"), submit("bcd")
    assert len(states(batches)) == 4
    assert batches.counts(one).to_submit == batches.counts(other).to_submit == 3
    Cutter(batches.ledger, batches.pool_of(one)).plan(one, CUT)
    assert batches.counts(other).in_flight == 2
    assert batches.counts(other).to_submit == 1
    assert batches.counts(one).open == 3


def test_dropping_one_leaves_the_texts_of_others(
    batches: Batches, submit: Callable[..., BatchRecord]
) -> None:
    one, other = submit("abc"), submit("bcd")
    batches.drop(one)
    assert set(states(batches)) == {key_of(text) for text in "bcd"}
    assert batches.counts(other).to_submit == 3
    with pytest.raises(StorageCorrupt, match="not in the state file any more"):
        batches.again(one)
    batches.drop(one)
    batches.drop(other)
    assert states(batches) == {}


def test_dropping_releases_the_money_that_is_in_no_part(
    batches: Batches, submit: Callable[..., BatchRecord]
) -> None:
    batch = submit("abc")
    cutter = Cutter(batches.ledger, batches.pool_of(batch))
    cutter.hold(batch, CUT)
    batches.drop(batch)
    assert usage.of_scope(batches.ledger, "s", "total").held == Amount()


def test_an_end_keeps_only_the_reasons(
    batches: Batches, submit: Callable[..., BatchRecord]
) -> None:
    batch = submit("abc")
    end_all(batches, batch, store="ab", retry=False, reason="why not")
    batches.set_state(batch, "done")
    ended = batches.again(batch)
    assert (ended.stored, ended.failed) == (2, 1)
    assert ended.ended is not None
    assert batches.reasons(batch) == {key_of("c"): "why not"}
    assert states(batches) == {key_of("c"): "failed"}
    batches.set_state(batch, "abandoned")
    assert (batches.again(batch).stored, batches.again(batch).ended) == (2, ended.ended)


@pytest.mark.parametrize("lost", [False, True])
def test_what_failed_is_tried_again_by_the_next_and_what_is_lost_only_if_it_says_so(
    batches: Batches, submit: Callable[..., BatchRecord], lost: bool
) -> None:
    batch = submit("ab")
    end_all(batches, batch, store="a", retry=False, lost=lost, reason="gone")
    batches.set_state(batch, "done")
    assert batches.counts(submit("ab")).to_submit == (1 if lost else 2)
    assert batches.counts(submit("ab", resubmits_lost=True)).to_submit == 2


def test_who_waits_may_ask_for_what_was_lost_later(
    batches: Batches, submit: Callable[..., BatchRecord]
) -> None:
    batch, other = submit("ab"), submit("c")
    end_all(batches, batch, lost=True, retry=False, reason="gone")
    end_all(batches, other, lost=True, retry=False, reason="gone")
    assert batches.resubmit_lost(batch) == 2
    assert batches.again(batch).resubmits_lost
    assert batches.counts(batch).to_submit == 2
    assert batches.counts(other).failed == 1, "of others nothing is billed again"


def test_a_batch_that_was_dropped_takes_no_more_texts(
    batches: Batches, submit: Callable[..., BatchRecord]
) -> None:
    batch = submit("a", open_=False)
    batches.drop(batch)
    with pytest.raises(StorageCorrupt):
        batches.want(batch, [], rows=1, texts=0, reused=0)
    assert states(batches) == {}


# Calls that are lost with their process


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Who works from now on: a name of another host lives until its lease ends."""
    return lambda name: monkeypatch.setattr(module, "myself", lambda: name)


def test_a_call_takes_the_batch_of_one_that_is_gone(
    batches: Batches,
    submit: Callable[..., BatchRecord],
    process: Callable[[str], None],
    clock: Any,
) -> None:
    process("elsewhere:1")
    first = submit("ab", digest=b"same", waiting=100)
    process("elsewhere:2")

    def again(digest: bytes, **how: Any) -> BatchRecord | None:
        batch = submit("ab", open_=False, **how)
        found = batches.take_over(batch, digest)
        if found is None:
            batches.drop(batch)
        return found

    clock.now += 99
    assert again(b"same", waiting=100) is None, "it may be alive"
    clock.now += 2
    assert again(b"other", waiting=100) is None, "other rows"
    assert again(b"same") is None, "who asks for a name gets a batch of his own"
    taken = again(b"same", waiting=100)
    assert taken is not None
    assert taken.id == first.id
    assert [batch.id for batch in batches.all()] == [first.id]
    assert again(b"same", waiting=100) is None, "it is alive again"


def test_who_still_waits_is_believed_for_longer(
    batches: Batches,
    submit: Callable[..., BatchRecord],
    process: Callable[[str], None],
    clock: Any,
) -> None:
    process("elsewhere:1")
    first = submit("ab", digest=b"same", waiting=100)
    clock.now += 90
    batches.still_waiting(first, 100)
    clock.now += 90
    process("elsewhere:2")
    assert batches.take_over(submit("ab", open_=False, waiting=100), b"same") is None


def test_a_batch_with_a_name_is_never_taken(
    batches: Batches,
    submit: Callable[..., BatchRecord],
    process: Callable[[str], None],
    clock: Any,
) -> None:
    process("elsewhere:1")
    first = submit("ab", digest=b"same")
    batches.still_waiting(first, 1)
    clock.now += 10**6
    process("elsewhere:2")
    assert batches.take_over(submit("ab", open_=False, waiting=100), b"same") is None
    assert batches.again(first).state == "open"


def test_what_a_crash_left_half_written_is_found(
    batches: Batches,
    submit: Callable[..., BatchRecord],
    process: Callable[[str], None],
    clock: Any,
) -> None:
    process("elsewhere:1")
    half = submit("ab", open_=False)
    submit("ab")
    assert batches.over(0)[0] == [], "somebody may be writing it"
    clock.now += 86_401
    assert [batch.id for batch in batches.over(0)[0]] == [half.id]
    assert batches.is_known(half.name)
    assert not batches.is_known("20260115-ffffffff")


@pytest.mark.case("E3")
def test_an_older_file_tells_what_was_paid_for_and_lost(tmp_path: Path) -> None:
    """Also of what is being billed again when it is brought up to date."""
    path = tmp_path / "state.db"
    old = sqlite_utils.Database(path)
    before = Schema("embedcore.state")
    for migration in STATE._migrations[:6]:
        before(migration)
    before.apply(old)
    part = {"pool": 1, "input_type": "", "items": 4, "tokens": 4, "cost": 4, "grant": 1}
    old["part"].insert({**part, "id": 7, "key": "k", "state": "done", "created": 1})
    states = {"lost": "lost", "again": "open", "new": "open", "other": "failed", "came": "stored"}
    for number, (name, state) in enumerate(states.items()):
        old["item"].insert(
            {"pool": 1, "key": key_of(name), "state": state, "tokens": 1, "bytes": 1}
        )
        if name in ("lost", "again", "came"):
            old["unread"].insert({"part": 7, "ordinal": number, "key": key_of(name)})
    old.conn.execute("PRAGMA user_version = 6")
    old.conn.commit()
    old.close()
    with Database(path, STATE).read() as connection:
        rows = connection.execute("SELECT key, paid, characters_cut, sent_key FROM item").fetchall()
        (missing,) = connection.execute("SELECT missing FROM part").fetchone()
    assert missing is None
    found = {key: paid for key, paid, *rest in rows if rest == [None, None]}
    assert found == {key_of(name): int(name in ("lost", "again")) for name in states}
