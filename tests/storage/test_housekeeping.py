"""Is room made without taking what is needed, and without standing in anybody's way?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from embedcore.storage import vector_upkeep as housekeeping
from embedcore.storage.keys import Keys, Origin
from embedcore.storage.vector_upkeep import Contents, contents, prune, verify
from embedcore.storage.vectors import DAY_SECONDS, VectorStore
from embedcore.testing import vectors_of

Open = Callable[..., VectorStore]
WIDTH = 1536


def keys_of(texts: Sequence[str], model: str = "m") -> list[bytes]:
    return Keys(provider="p", model=model, fingerprint="f", input_type=None).of(texts)


def buy(store: VectorStore, texts: Sequence[str], *, model: str = "m", until: float = 0.0) -> None:
    origin = Origin(model=f"p:{model}", fingerprint="f")
    keys, vectors = keys_of(texts, model), vectors_of(texts, WIDTH)
    store.put(keys, vectors, origin, keep_until=until)


def there(store: VectorStore, texts: Sequence[str], model: str = "m") -> list[str]:
    places: list[int] = []
    store.get(keys_of(texts, model), WIDTH, lambda some, _: places.extend(some))
    return [texts[place] for place in places]


def named(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {number}" for number in range(count)]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_is_in_an_empty_store(store: VectorStore) -> None:
    assert contents(store) == Contents(used=contents(store).used, cap=10**9)
    assert 0 < contents(store).used < 500_000


def test_vectors_are_counted_by_model(store: VectorStore) -> None:
    buy(store, named("a", 3))
    buy(store, named("a", 2), model="n")
    assert contents(store).vectors == {"p:m": 3, "p:n": 2}
    assert prune(store, model="p:n") == 2
    assert contents(store).vectors == {"p:m": 3, "p:n": 0}
    assert there(store, named("a", 3)) == named("a", 3)


def test_the_oldest_go_first_and_no_more_than_must(store: VectorStore) -> None:
    for part in range(10):
        buy(store, named(f"part {part}", 100))
    before = store.used
    wanted = before // 2
    gone = prune(store, down_to=wanted)
    assert 0 < gone < 1000
    assert store.used <= wanted
    assert store.used > wanted - 400 * WIDTH * 4, "not much more than needed"
    texts = [text for part in range(10) for text in named(f"part {part}", 100)]
    assert there(store, texts) == texts[gone:]
    assert prune(store, down_to=wanted) == 0


def test_space_is_given_back_to_the_disk(store: VectorStore, vectors_path: Path) -> None:
    buy(store, named("a", 1000))
    store.close()
    before = size_of(vectors_path)
    assert prune(store) == 1000
    store.close()
    assert size_of(vectors_path) < before / 10


def test_age_is_counted_in_days_from_the_day_of_storing(store: VectorStore, clock: Any) -> None:
    buy(store, ["old"])
    clock.now += 10 * DAY_SECONDS
    buy(store, ["new"])
    assert prune(store, older_than=11 * DAY_SECONDS) == 0
    assert prune(store, older_than=10 * DAY_SECONDS) == 1
    assert there(store, ["old", "new"]) == ["new"]
    assert prune(store, older_than=1.0) == 1, "less than a day is no day"


def test_what_is_pinned_goes_too_if_that_is_said(store: VectorStore, clock: Any) -> None:
    buy(store, ["pinned"], until=clock.now + 9 * DAY_SECONDS)
    buy(store, ["not pinned"])
    assert prune(store, model="p:n", even_needed=True) == 0
    assert prune(store, even_needed=True) == 2
    assert there(store, ["pinned", "not pinned"]) == []


@pytest.mark.fault(119)
def test_what_is_pinned_stays_until_its_time_has_passed(store: VectorStore, clock: Any) -> None:
    noon = clock.now
    buy(store, ["pinned at once"], until=noon + DAY_SECONDS)
    buy(store, ["pinned later", "never pinned"])
    store.keep(iter(keys_of(["pinned later", "not there"])), noon + 2 * DAY_SECONDS)
    store.keep(keys_of(["pinned at once"]), noon)
    assert prune(store, down_to=0) == 1
    # In the morning of the day at whose noon the pin ends, it has not ended.
    clock.now = noon + DAY_SECONDS - 6 * 3600
    assert prune(store, down_to=0) == 0
    clock.now = noon + 2 * DAY_SECONDS
    assert prune(store) == 1
    assert there(store, ["pinned at once", "pinned later"]) == ["pinned later"]
    assert housekeeping.prunable(store, even_needed=True) == {"p:m": 1}
    assert housekeeping.prunable(store) == {}
    clock.now = noon + 3 * DAY_SECONDS
    assert prune(store) == 1


def test_many_are_pinned_at_once(store: VectorStore) -> None:
    texts = named("a", 1100)
    buy(store, texts)
    store.keep(keys_of(texts[:1001]), 4e9)
    assert prune(store) == 99


@pytest.mark.fault(119)
def test_others_read_and_write_while_room_is_made(
    store: VectorStore, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = named("a", 1000)
    buy(store, texts)
    other, between = open_store(busy_timeout=0.0), []
    oldest = housekeeping._oldest

    def slowly(*given: Any) -> list[int]:
        # Inside the transaction of the one that prunes, and therefore before its next one.
        between.append(len(there(other, texts)))
        return oldest(*given)

    monkeypatch.setattr(housekeeping, "_oldest", slowly)
    if store.database.journal_mode != "wal":
        pytest.skip("this SQLite is not trusted with WAL")
    assert prune(store) == 1000
    assert between == [1000, 800, 600, 400, 200, 0]


def test_verify_and_writers_get_along(store: VectorStore, open_store: Open) -> None:
    buy(store, named("a", 500))
    other = open_store(busy_timeout=0.0)
    steps = verify(store)
    assert next(steps) == (200, 0)
    buy(other, named("b", 10))
    assert list(steps)[-1] == (510, 0)


def test_prune_and_put_at_the_same_time_lose_no_count(store: VectorStore, open_store: Open) -> None:
    other = open_store()
    writer = threading.Thread(
        target=lambda: [buy(other, named(f"w {part}", 20)) for part in range(20)]
    )
    writer.start()
    gone = 0
    while writer.is_alive():
        gone += prune(store)
    writer.join()
    gone += prune(store)
    assert gone == 400
    assert contents(store).vectors == {"p:m": 0}


def test_what_was_pruned_is_in_no_file_any_more(store: VectorStore) -> None:
    buy(store, named("a", 5))
    store.drop(keys_of(["a 2"])[0])
    gone, kept = (vectors_of([text], WIDTH).tobytes() for text in ("a 2", "a 3"))
    (segment,) = store.path.glob("*.seg")
    assert gone in segment.read_bytes()
    prune(store, model="p:none")
    assert gone not in segment.read_bytes()
    assert kept in segment.read_bytes()
    assert there(store, named("a", 5)) == ["a 0", "a 1", "a 3", "a 4"]


def test_a_segment_that_is_mostly_gaps_is_copied_into_another(store: VectorStore) -> None:
    buy(store, named("a", 5))
    for text in named("a", 3):
        store.drop(keys_of([text])[0])
    prune(store, model="p:none")
    (segment,) = store.path.glob("*.seg")
    assert segment.name == "00000002.seg"
    assert segment.stat().st_size < 3 * WIDTH * 4
    assert there(store, named("a", 5)) == ["a 3", "a 4"]


def test_what_is_moved_while_it_is_looked_up_is_found(
    store: VectorStore, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process copies the segment between the index and the file."""
    buy(store, named("a", 5))
    other, read = open_store(), store.index.vectors_of
    for text in named("a", 3):
        other.drop(keys_of([text])[0])

    def late(*given: Any) -> Any:
        prune(other, model="p:none")
        return read(*given)

    monkeypatch.setattr(store.index, "vectors_of", late)
    assert store.look(keys_of(named("a", 5)), WIDTH).damaged == []
    assert store.get(keys_of(named("a", 5)), WIDTH, lambda *_: None) == 0
    assert there(store, named("a", 5)) == ["a 3", "a 4"]
