"""Is what was kept in the one file of before still found, kept, pruned and moved?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keeping import ORIGIN, TEXTS, WIDTH, buy, change, count, found, keep_as_before, keys_of

from embedcore.errors import StorageCorrupt
from embedcore.storage.keys import Origin
from embedcore.storage.vector_migration import Moved, migrate
from embedcore.storage.vector_upkeep import contents, prunable, prune, verify
from embedcore.storage.vectors import DAY_SECONDS, VectorStore
from embedcore.testing import vectors_of

Open = Callable[..., VectorStore]


@pytest.fixture
def old_path(vectors_path: Path) -> Path:
    return vectors_path.with_name("vectors.db")


def test_both_are_looked_up_and_opening_moves_nothing(
    store: VectorStore, vectors_path: Path, old_path: Path
) -> None:
    keep_as_before(vectors_path, TEXTS[:12:2])
    before = old_path.read_bytes()
    buy(store, TEXTS[1:12:2])
    assert found(store, TEXTS) == set(TEXTS[:12])
    assert found(store, TEXTS, width=None) == set(TEXTS[:12])
    assert store.look(keys_of(TEXTS), WIDTH).there == set(range(12))
    assert contents(store).vectors == {"p:m": 12}
    assert contents(store).not_moved == 6
    store.close()
    assert old_path.read_bytes() == before
    assert count(vectors_path / "index.db") == 6


def test_to_look_into_the_old_one_makes_no_new_one(store: VectorStore, vectors_path: Path) -> None:
    keep_as_before(vectors_path, TEXTS)
    assert store.look(keys_of(TEXTS), WIDTH).there == set(range(20))
    assert found(store, TEXTS[:3]) == set(TEXTS[:3])
    assert not vectors_path.exists()


def test_what_is_in_the_old_one_is_not_kept_again(
    store: VectorStore, vectors_path: Path, old_path: Path
) -> None:
    keep_as_before(vectors_path, TEXTS[:5], salt="first")
    buy(store, TEXTS[:8], salt="second")
    assert found(store, TEXTS[:5], salt="first") == set(TEXTS[:5])
    assert found(store, TEXTS[5:], salt="second") == set(TEXTS[5:8])
    assert (count(old_path), count(vectors_path / "index.db")) == (5, 3)


@pytest.mark.case("C12")
@pytest.mark.parametrize("zeros", [False, True])
def test_zeros_in_the_old_one_give_way_to_a_vector(
    store: VectorStore, vectors_path: Path, old_path: Path, zeros: bool
) -> None:
    keep_as_before(vectors_path, ["a", "b"], vectors=np.zeros((2, WIDTH), dtype=np.float32))
    assert found(store, ["a", "b"]) == set()
    nothing = np.zeros((1, WIDTH), dtype=np.float32)
    store.put(keys_of(["b"]), nothing, ORIGIN, zeros=zeros)
    buy(store, ["a"])
    assert found(store, ["a", "b"]) == {"a"}
    assert count(old_path) == 1
    there: list[int] = []
    store.get(keys_of(["a", "b"]), WIDTH, lambda some, _: there.extend(some), zeros=True)
    assert there == [0, 1]


def test_the_room_that_a_caller_lends_is_used_for_either_or_for_none(
    store: VectorStore, vectors_path: Path
) -> None:
    keep_as_before(vectors_path, TEXTS[:5])
    buy(store, TEXTS[5:10])
    lent = np.zeros((20, WIDTH), dtype=np.float32)
    for texts in (TEXTS[:5], TEXTS[5:10], TEXTS[2:8]):
        got: list[Any] = []
        store.get(
            keys_of(texts),
            WIDTH,
            lambda _, vectors: got.append(vectors),  # noqa: B023
            room=lambda places: lent[: len(places)],
        )
        assert (got[0] == vectors_of(texts, WIDTH)).all()


@pytest.mark.fault(116)
def test_a_damaged_row_of_the_old_one_is_deleted_and_kept_anew(
    store: VectorStore, vectors_path: Path, old_path: Path
) -> None:
    keep_as_before(vectors_path, TEXTS)
    change(old_path, "UPDATE vector SET data = zeroblob(length(data)) WHERE id IN (3, 5)")
    change(old_path, "UPDATE vector SET checksum = checksum + 1 WHERE id = 8")
    damaged = store.get(keys_of(TEXTS[:6]), WIDTH, lambda *_: None)
    assert damaged == 2
    assert list(verify(store)) == [(18, 1)]
    buy(store, TEXTS)
    assert found(store, TEXTS) == set(TEXTS)
    assert (count(old_path), count(vectors_path / "index.db")) == (17, 3)


@pytest.mark.fault(119)
def test_pins_drops_and_pruning_reach_both(
    store: VectorStore, vectors_path: Path, clock: Any
) -> None:
    keep_as_before(vectors_path, TEXTS[:10])
    buy(store, TEXTS[10:])
    store.drop(keys_of(TEXTS)[0])
    store.drop(keys_of(TEXTS)[19])
    store.keep(keys_of([TEXTS[1], TEXTS[18]]), clock.now + 5 * DAY_SECONDS)
    assert prunable(store) == {"p:m": 16}
    assert prune(store) == 16
    assert found(store, TEXTS) == {TEXTS[1], TEXTS[18]}
    assert prune(store, even_needed=True) == 2
    assert found(store, TEXTS) == set()


def test_the_oldest_go_first_from_the_old_one(
    store: VectorStore, vectors_path: Path, old_path: Path
) -> None:
    texts = [f"text {number}" for number in range(800)]
    keep_as_before(vectors_path, texts[:400], width=512)
    buy(store, texts[400:], width=512)
    wanted = store.used - 300 * 512 * 4
    said = sum(prunable(store, down_to=wanted).values())
    gone = prune(store, down_to=wanted)
    assert store.used <= wanted
    assert abs(said - gone) <= 200
    assert count(old_path) == 400 - gone
    assert count(vectors_path / "index.db") == 400
    prune(store, down_to=500_000)
    assert count(old_path) == 0
    assert store.used <= 500_000
    assert found(store, texts, width=512) <= set(texts[-200:])


def test_the_cap_counts_both(open_store: Open, vectors_path: Path) -> None:
    keep_as_before(vectors_path, TEXTS, width=512)
    store = open_store(cap=100_000)
    from embedcore.errors import StorageFull

    with pytest.raises(StorageFull, match="cache_cap"):
        buy(store, ["a"])


@pytest.mark.fault(117)
def test_the_name_that_the_model_had_in_the_old_one_is_known(
    store: VectorStore, vectors_path: Path
) -> None:
    before = Origin(model="p:m", fingerprint="f", answered_as="m-1")
    keep_as_before(vectors_path, TEXTS[:3], origin=before)
    now = Origin(model="p:m", fingerprint="f", answered_as="m-2")
    assert store.put(keys_of(["a"]), vectors_of(["a"], WIDTH), now) == "m-1"
    assert store.put(keys_of(["b"]), vectors_of(["b"], WIDTH), now) is None


@pytest.mark.fault(120)
def test_an_old_one_that_is_broken_is_said(store: VectorStore, old_path: Path) -> None:
    old_path.write_bytes(b"no database, and long enough to be looked at" * 100)
    with pytest.raises(StorageCorrupt):
        found(store, TEXTS)


# Moving


def moved(store: VectorStore) -> Moved:
    *_, last = migrate(store)
    return last


def test_everything_is_moved_and_the_file_is_removed(
    store: VectorStore, vectors_path: Path, old_path: Path, clock: Any
) -> None:
    texts = [f"text {number}" for number in range(1203)]
    query = Origin(model="p:n", fingerprint="g", input_type="query", answered_as="n-1")
    keep_as_before(vectors_path, texts[:700], day=19_000)
    keep_as_before(vectors_path, texts[700:1000], until=30_000)
    keep_as_before(vectors_path, texts[1000:1200], origin=query, width=16)
    half = vectors_of(texts[1200:1203], 7).astype(np.float16).astype(np.float32)
    keep_as_before(vectors_path, texts[1200:1203], vectors=half)
    change(old_path, "INSERT INTO tally VALUES (5, 10, 20)")
    change(old_path, "UPDATE vector SET checksum = 0 WHERE id = 9")
    buy(store, texts[:2])
    found(store, ["nothing"])
    steps = list(migrate(store))
    assert [one.moved for one in steps] == [499, 999, 1202, 1202]
    assert steps[-1] == Moved(moved=1202, there=0, damaged=1, removed=True)
    assert list(vectors_path.parent.glob("vectors.db*")) == []
    assert found(store, texts[:1000]) == set(texts[:1000]) - {texts[8]}
    assert found(store, texts[1000:1200], width=16) == set(texts[1000:1200])
    got: list[Any] = []
    store.get(keys_of(texts[1200:]), 7, lambda _, vectors: got.append(vectors))
    assert got[0].tobytes() == half.tobytes()
    known = contents(store)
    assert (known.vectors, known.not_moved) == ({"p:m": 1002, "p:n": 200}, None)
    assert known.hits + known.misses == 30 + 1 + 1203
    clock.now = 19_100 * DAY_SECONDS
    assert prunable(store) == {"p:m": 699}
    answered = Origin(model="p:n", fingerprint="g", input_type="query", answered_as="n-2")
    assert store.put(keys_of(["x"]), vectors_of(["x"], 16), answered) == "n-1"
    assert list(migrate(store)) == []


def test_what_is_there_already_is_not_moved_again(store: VectorStore, vectors_path: Path) -> None:
    buy(store, TEXTS[:5], salt="of the first")
    keep_as_before(vectors_path, TEXTS[:12], salt="of the second")
    assert moved(store) == Moved(moved=7, there=5, removed=True)
    assert found(store, TEXTS[:5], salt="of the first") == set(TEXTS[:5])
    assert found(store, TEXTS[5:], salt="of the second") == set(TEXTS[5:12])


def test_rows_without_an_origin_do_not_hold_it_up(
    store: VectorStore, vectors_path: Path, old_path: Path
) -> None:
    keep_as_before(vectors_path, TEXTS)
    change(old_path, "UPDATE vector SET origin = 77 WHERE id < 4")
    assert moved(store) == Moved(moved=17, damaged=3, removed=True)


def test_while_another_program_has_the_file_open_it_stays_and_is_empty(
    store: VectorStore, open_store: Open, vectors_path: Path, old_path: Path
) -> None:
    keep_as_before(vectors_path, TEXTS)
    other = open_store()
    assert found(other, TEXTS) == set(TEXTS)
    assert moved(store) == Moved(moved=20, removed=False)
    assert found(other, TEXTS) == set(TEXTS)
    assert count(old_path) == 0
    other.close()
    assert moved(store) == Moved(removed=True)
    assert not old_path.exists()
    assert found(other, TEXTS) == set(TEXTS)


def test_what_another_program_keeps_in_the_old_one_meanwhile_is_moved_as_well(
    store: VectorStore, vectors_path: Path
) -> None:
    """One of an earlier version of embedcore, that knows no other."""
    keep_as_before(vectors_path, [f"text {number}" for number in range(600)])
    steps = migrate(store)
    next(steps)
    keep_as_before(vectors_path, ["later"])
    *_, last = steps
    assert last == Moved(moved=601, removed=True)
    assert found(store, ["later"]) == {"later"}


def test_a_program_that_runs_goes_on_when_the_file_goes(
    store: VectorStore, open_store: Open, vectors_path: Path, old_path: Path
) -> None:
    keep_as_before(vectors_path, TEXTS)
    assert found(store, TEXTS) == set(TEXTS)
    for path in vectors_path.parent.glob("vectors.db*"):
        path.unlink()
    assert found(store, TEXTS) == set()
    buy(store, TEXTS)
    assert found(store, TEXTS) == set(TEXTS)
    assert contents(store).not_moved is None
    assert not old_path.exists()
