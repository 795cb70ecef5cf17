"""Which line belongs to which text: never one of another job, whatever it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from embedcore.storage.batches import Batches
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.parts import Part, Parts, longest_id, new_key
from embedcore.storage.schema import STATE, Schema

ordinals = st.integers(0, 60_000)


def part(**more: Any) -> Part:
    numbers = dict.fromkeys(
        ("id", "pool", "items", "tokens", "cost", "grant", "looks", "tries", "next", "epoch"), 0
    )
    unknown = dict.fromkeys(
        ("batch", "price", "attempt", "input", "job", "asked", "completed", "failed", "total")
    )
    given = {
        **numbers,
        **unknown,
        "key": new_key(),
        "state": "submitted",
        "input_type": "",
        "jobs": "",
        "status": "",
        "trouble": None,
        "created": 0,
        "ended": None,
    }
    return Part(**{**given, **more})


@pytest.mark.case("E1")
@pytest.mark.parametrize("ids", ["key", "ordinal"])
@given(ordinal=ordinals)
def test_an_id_leads_back_to_its_place(ids: Any, ordinal: int) -> None:
    one = part(ids=ids)
    assert one.ordinal_of(one.item_id(ordinal)) == ordinal


@pytest.mark.case("E1")
@given(mine=ordinals, theirs=ordinals, old=st.sampled_from(["key", "ordinal"]))
def test_no_id_of_another_part_leads_anywhere(mine: int, theirs: int, old: Any) -> None:
    one, other = part(), part(ids=old)
    assert one.ordinal_of(other.item_id(theirs)) is None
    assert other.ordinal_of(one.item_id(mine)) is None


@pytest.mark.case("E1")
@given(ordinal=ordinals, change=st.sampled_from(["{}7", "0{}", " {}", "{} ", "{}-", "-{}", "{}.0"]))
def test_an_id_that_is_nearly_right_is_wrong(ordinal: int, change: str) -> None:
    one = part()
    head, _, place = one.item_id(ordinal).rpartition("-")
    wrong = [change.format(one.item_id(ordinal)), f"{head}-0{place}", f"{head[:-1]}-{place}"]
    known = {one.item_id(each) for each in (ordinal, ordinal * 10 + 7)}
    assert all(one.ordinal_of(each) is None for each in wrong if each not in known)


@pytest.mark.case("E1")
@given(st.text() | st.integers() | st.none() | st.floats() | st.from_regex(r"[0-9a-f]{16}-[0-9]+"))
def test_whatever_is_sent_is_nobodys(name: object) -> None:
    assert part().ordinal_of(name) is None


@given(items=st.integers(1, 60_000))
def test_the_longest_id_is_as_long_as_any(items: int) -> None:
    longest = len(longest_id(items))
    assert len(part().item_id(items - 1)) <= longest <= 40


@pytest.mark.case("E1")
def test_parts_of_before_keep_the_form_of_their_ids(tmp_path: Path) -> None:
    """A state file of the version that called a line by its place alone."""
    before = Schema("embedcore.state")
    for migration in STATE._migrations[:3]:
        before(migration)
    database = Database(tmp_path / "state.db", before)
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO pool (scope, model, fingerprint, endpoint, account) "
            "VALUES ('s', 'm', 'f', 'e', 'a')"
        )
        for key, status in (("k1", "in_progress"), ("k2", "CANCELLING")):
            connection.execute(
                "INSERT INTO part (key, pool, state, input_type, items, tokens, cost, "
                "\"grant\", status, created) VALUES (?, 1, 'submitted', '', 3, 9, 0, 1, ?, 0)",
                (key, status),
            )
        connection.executemany(
            "INSERT INTO item (pool, key, state, part, ordinal, tokens, bytes) "
            "VALUES (1, ?, 'open', ?, ?, 3, 100)",
            [(b"1" * 32, 1, 0), (b"2" * 32, None, None)],
        )
    database.close()

    ledger = Ledger(Database(tmp_path / "state.db", STATE))
    pool = Batches(ledger).pool(scope="s", model="m", fingerprint="f", endpoint="e", account="a")
    running, cancelling = Parts(ledger).live(pool)
    assert (running.ids, running.item_id(2), running.ordinal_of("2")) == ("ordinal", "2", 2)
    assert (running.since, running.cancelled) == (None, False)
    assert cancelling.cancelled, "who asked for it was not written down: it was embedcore"
    with ledger.database.read() as connection:
        sizes = connection.execute("SELECT bytes, stopped FROM item ORDER BY id").fetchall()
    assert [*map(tuple, sizes)] == [(100, 0), (122, 0)], (
        "the ids that are still to be given are longer"
    )
    ledger.database.close()
