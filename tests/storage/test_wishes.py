"""What batches wish for, counted and forgotten, whatever overlaps with what."""

from __future__ import annotations

import hashlib

from hypothesis import given, strategies as st

from embedcore.storage.batches import Batches, BatchRecord, Wanted
from embedcore.storage.cutting import Cut, Cutter
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE

steps = st.lists(
    st.tuples(
        st.sampled_from(["submit", "plan", "drop", "end"]),
        st.sets(st.sampled_from("abcdef"), min_size=1),
        st.integers(0, 9),
    ),
    max_size=12,
)


@given(steps=steps)
def test_a_text_is_there_as_long_as_somebody_wants_it_or_a_part_has_it(
    steps: list[tuple[str, set[str], int]],
) -> None:
    ledger = Ledger(Database(None, STATE))
    batches = Batches(ledger)
    pool = batches.pool(scope="s", model="m", fingerprint="f", endpoint="e", account="a")
    cutter = Cutter(ledger, pool)
    wanted: dict[int, tuple[BatchRecord, set[str]]] = {}
    in_part: set[str] = set()
    for step, texts, number in steps:
        if step == "submit":
            batch = batches.begin(pool, input_type=None, asked_as="m")
            some = [Wanted(key=key_of(text), tokens=1, in_bytes=1) for text in sorted(texts)]
            batches.want(batch, some, rows=len(some), texts=len(some), reused=0)
            batches.complete(batch, b"")
            wanted[batch.id] = (batch, texts)
        elif wanted:
            batch, mine = list(wanted.values())[number % len(wanted)]
            if step == "plan":
                cutter.plan(batch, Cut(items=10))
                in_part |= mine
            else:
                if step == "drop":
                    batches.drop(batch)
                else:
                    batches.set_state(batch, "abandoned")
                del wanted[batch.id]
        with ledger.database.read() as connection:
            there = dict(connection.execute("SELECT key, part IS NOT NULL FROM item").fetchall())
        expected = set().union(in_part, *(mine for _, mine in wanted.values()))
        assert there == {key_of(text): text in in_part for text in expected}
        for batch, mine in wanted.values():
            counts = batches.counts(batch)
            assert counts.in_flight == len(mine & in_part)
            assert counts.to_submit == len(mine - in_part)
            assert sorted(batches.open_keys(batch)) == sorted(map(key_of, mine))


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
