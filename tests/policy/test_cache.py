"""Does the store help where it can, and stop nothing where it cannot?"""

from __future__ import annotations

import logging
import shutil
import threading
from collections import namedtuple

import pytest
from waiting import SECONDS, until

from embedcore.errors import StorageBusy, StorageCorrupt, StorageFull
from embedcore.events import CacheProblem
from embedcore.policy import cache
from embedcore.policy.cache import VectorCache
from embedcore.storage.keys import Keys, Origin
from embedcore.storage.vectors import VectorStore
from embedcore.testing import FakeClock, vectors_of

ORIGIN = Origin(model="p:m", fingerprint="f")
GIGABYTE = 10**9


def keys_of(texts):
    return Keys(provider="p", model="m", fingerprint="f", input_type=None).of(texts)


class Broken(VectorStore):
    """Raises what it is told to, and counts how often it was asked."""

    def __init__(self, path, **rest):
        super().__init__(path, cap=rest.pop("cap", GIGABYTE), **rest)
        self.errors = {"get": None, "put": None}
        self.asked = {"get": 0, "put": 0}

    def _ask(self, what):
        self.asked[what] += 1
        if self.errors[what] is not None:
            raise self.errors[what]

    def get(self, keys, width, take, **how):
        self._ask("get")
        return super().get(keys, width, take, **how)

    def put(self, keys, vectors, origin, **rest):
        self._ask("put")
        return super().put(keys, vectors, origin, **rest)


class Desk:
    """A cache over a store that can be broken, with a clock set by hand."""

    def __init__(self, path, store=Broken, **rest):
        self.clock = FakeClock()
        self.told = []
        self.store = store(path, **rest)
        self.cache = VectorCache(
            self.store, observe=self.told.append, monotonic=self.clock.monotonic
        )

    def put(self, *texts):
        self.cache.put(keys_of(texts), vectors_of(texts, 8), ORIGIN)

    def get(self, *texts):
        there = []

        def take(places, vectors):
            chosen = [texts[place] for place in places]
            assert (vectors == vectors_of(chosen, 8)).all()
            there.extend(chosen)

        self.cache.get(keys_of(texts), 8, take)
        return there

    @property
    def messages(self):
        assert all(isinstance(event, CacheProblem) for event in self.told)
        return [event.message for event in self.told]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vectors"


@pytest.fixture
def one(path):
    desk = Desk(path)
    yield desk
    desk.store.database.close()


def test_what_is_kept_is_found(one):
    one.put("a", "b")
    assert one.get("b", "c", "a") == ["b", "a"]
    assert one.told == []


@pytest.mark.fault(120)
def test_a_store_that_cannot_be_used_is_told_of_once_and_left_alone(one):
    one.store.errors = dict.fromkeys(("get", "put"), StorageCorrupt("it is broken"))
    for _ in range(5):
        assert one.get("a") == []
        one.put("a")
    assert one.store.asked == {"get": 1, "put": 0}
    assert one.messages == [
        "it is broken. Until then new vectors are not kept, and would be billed again"
    ]
    assert one.told[0].path == str(one.store.path)
    one.clock.sleep(61)
    assert one.get("a") == []
    assert one.store.asked == {"get": 2, "put": 0}
    assert len(one.told) == 1, "the same trouble still"


@pytest.mark.fault(120)
def test_a_store_that_can_be_used_again_is_used_again(one):
    one.store.errors["put"] = StorageBusy("locked")
    one.put("a")
    assert one.get("a") == []
    one.store.errors["put"] = None
    one.clock.sleep(61)
    one.put("a")
    assert one.get("a") == ["a"]
    one.store.errors["put"] = StorageBusy("locked again")
    one.put("b")
    assert len(one.told) == 2, "trouble that is new is told of"


@pytest.mark.fault(120)
def test_a_full_store_is_still_read(one):
    one.put("a")
    one.store.errors["put"] = StorageFull("no room")
    for text in "bcd":
        one.put(text)
        assert one.get("a", text) == ["a"]
    assert one.store.asked["put"] == 2
    assert len(one.told) == 1


@pytest.mark.fault(120)
def test_while_one_thread_waits_for_a_lock_in_vain_the_others_do_not_queue_up(one):
    waiting, go_on = threading.Event(), threading.Event()

    def put(*_, **__):
        one.store.asked["put"] += 1
        waiting.set()
        assert go_on.wait(120)
        raise StorageBusy("locked")

    one.store.put = put
    threads = [threading.Thread(target=one.put, args=("a",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert waiting.wait(120)
    go_on.set()
    for thread in threads:
        thread.join(120)
    assert one.store.asked["put"] == 1
    assert len(one.told) == 1


class Held(Broken):
    """The first ``put`` waits until it is let go. ``ends_with``: the errors of some of them."""

    def __init__(self, path, **rest):
        super().__init__(path, **rest)
        self.inside, self.go = threading.Event(), threading.Event()
        self.ends_with = {}
        self.rows, self.most_rows = [], GIGABYTE

    def put(self, keys, vectors, origin, **rest):
        self.rows.append(len(keys))
        if len(keys) > self.most_rows:
            raise StorageFull("no room")
        if len(self.rows) == 1:
            self.inside.set()
            assert self.go.wait(SECONDS)
        if (error := self.ends_with.get(len(self.rows))) is not None:
            raise error
        return super().put(keys, vectors, origin, **rest)


def put_beside(desk, puts):
    """The first one is held, the others come meanwhile. What each of them raised."""
    raised = {}

    def work(number, texts, origin):
        try:
            desk.cache.put(keys_of(texts), vectors_of(texts, 8), origin)
        except BaseException as error:  # noqa: BLE001 - looked at below
            raised[number] = error

    threads = [threading.Thread(target=work, args=(at, *one)) for at, one in enumerate(puts)]
    threads[0].start()
    assert desk.store.inside.wait(SECONDS)
    for number, thread in enumerate(threads[1:], start=2):
        thread.start()
        until(lambda number=number: len(desk.cache._to_put) == number)
    desk.store.go.set()
    for thread in threads:
        thread.join(SECONDS)
    assert desk.cache._to_put == []
    return raised


@pytest.fixture
def held(path):
    desk = Desk(path, Held)
    yield desk
    desk.store.close()


def parts_of(texts, count):
    return [(texts[at::count], ORIGIN) for at in range(count)]


def test_what_comes_while_another_thread_writes_is_kept_at_once(held):
    texts = [f"text {number}" for number in range(50)]
    assert put_beside(held, parts_of(texts, 5)) == {}
    assert held.store.rows == [10, 40]
    assert held.get(*texts) == texts


def test_what_has_another_origin_is_kept_by_itself(held):
    other = Origin(model="p:m", fingerprint="other")
    texts = [f"text {number}" for number in range(40)]
    parts = parts_of(texts, 4)
    parts[2] = (parts[2][0], other)
    assert put_beside(held, parts) == {}
    assert sorted(held.store.rows[1:]) == [10, 20]
    assert held.get(*texts) == texts


def test_no_more_is_kept_at_once_than_memory_allows(held, monkeypatch):
    monkeypatch.setattr(cache, "_PUT_TOGETHER", 25)
    texts = [f"text {number}" for number in range(60)]
    assert put_beside(held, parts_of(texts, 6)) == {}
    assert max(held.store.rows) <= 25
    assert held.get(*texts) == texts


def test_who_is_interrupted_takes_nobody_with_it(held):
    held.store.ends_with = {2: KeyboardInterrupt()}
    texts = [f"text {number}" for number in range(40)]
    raised = put_beside(held, parts_of(texts, 4))
    assert held.store.rows == [10, 30, 20]
    ((interrupted, error),) = raised.items()
    assert isinstance(error, KeyboardInterrupt)
    assert held.get(*texts) == [text for at, text in enumerate(texts) if at % 4 != interrupted]


@pytest.mark.fault(120)
def test_what_does_not_fit_together_is_kept_one_by_one(held):
    held.store.most_rows = 10
    texts = [f"text {number}" for number in range(30)]
    assert put_beside(held, parts_of(texts, 3)) == {}
    assert held.store.rows == [10, 20, 10, 10]
    assert held.get(*texts) == texts
    assert held.told == []


def test_what_the_receiver_raises_is_not_the_stores_trouble(one):
    one.put("a")

    def full(places, vectors):
        raise StorageFull("the disk of the output")

    with pytest.raises(StorageFull, match="of the output"):
        one.cache.get(keys_of(["a"]), 8, full)
    assert one.told == []
    assert one.get("a") == ["a"]


@pytest.mark.fault(116)
def test_damaged_rows_are_told_of(one):
    one.put("a", "b", "c")
    with one.store.database.transaction() as connection:
        connection.execute("UPDATE vector SET checksum = 0 WHERE id < 3")
    assert one.get("a", "b", "c") == ["c"]
    assert one.messages == ["2 damaged vectors were found and deleted; they are embedded again"]


@pytest.mark.fault(117)
def test_another_name_in_the_replies_is_told_of(one):
    for number, name in enumerate(["m-1", "m-1", "m-2", "m-2"]):
        origin = Origin(model="p:m", fingerprint="f", answered_as=name)
        one.cache.put(keys_of([str(number)]), vectors_of([str(number)], 8), origin)
    (message,) = one.messages
    assert "p:m answered as 'm-1' before and answers as 'm-2' now" in message
    assert "embedcore cache prune --model p:m" in message


def test_its_place_is_said_once(path, caplog):
    with caplog.at_level(logging.INFO, logger="embedcore"):
        for _ in range(2):
            desk = Desk(path, cap=5 * GIGABYTE)
            for _ in range(2):
                desk.cache.introduce(1536)
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(path) in line
    assert "at most 5.0 GB (cache_cap), about 6.3 GB per million; cache = false" in line


def test_without_a_width_nothing_is_said_of_the_size(path, caplog):
    with caplog.at_level(logging.INFO, logger="embedcore"):
        Desk(path).cache.introduce(None)
    assert "per million" not in caplog.text
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    ("cap", "free", "vectors", "what"),
    [
        (6 * GIGABYTE, 90 * GIGABYTE, 1_000_000, "cache_cap has 6.00 GB left"),
        (90 * GIGABYTE, 6 * GIGABYTE, 1_000_000, "the disk has 6.00 GB left"),
        (8 * GIGABYTE, 8 * GIGABYTE, 1_000_000, None),
        (0, GIGABYTE, 1, "cache_cap has 0.00 MB left"),
    ],
)
def test_what_will_not_fit_is_told_before_it_is_billed(
    path, caplog, monkeypatch, cap, free, vectors, what
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, free))
    desk = Desk(path, cap=cap)
    desk.cache.warn_of_size(vectors, 1536)
    desk.store.database.close()
    if what is None:
        assert caplog.records == []
        return
    assert what in caplog.text
    assert f"{vectors} vectors take about" in caplog.text
    assert str(path) in caplog.text


def test_once_it_is_known_to_be_full_nothing_more_is_said_of_its_size(path, caplog):
    desk = Desk(path, cap=0)
    desk.put("a")
    assert len(desk.told) == 1
    desk.clock.sleep(61)
    desk.cache.warn_of_size(1, 8)
    desk.store.database.close()
    assert caplog.records == []


def test_a_size_that_cannot_be_found_out_is_the_stores_trouble(tmp_path):
    desk = Desk(tmp_path / "vectors")
    desk.store.path.mkdir()
    (desk.store.path / "index.db").write_bytes(
        b"no database, and long enough to be looked at" * 100
    )
    desk.cache.warn_of_size(1, 8)
    assert len(desk.told) == 1
    assert "is damaged" in desk.messages[0]
