"""Is what was kept found again, by everybody, and is nothing else ever found?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from keeping import ORIGIN, TEXTS, WIDTH, buy, change, count, found, keys_of

from embedcore.errors import (
    StorageBusy,
    StorageCorrupt,
    StorageFull,
    StorageReadOnly,
    StorageTooNew,
)
from embedcore.storage import database as databases, vectors as module
from embedcore.storage.database import driver
from embedcore.storage.keys import Origin
from embedcore.storage.schema import VECTOR_INDEX
from embedcore.storage.vector_upkeep import contents, verify
from embedcore.storage.vectors import VectorStore
from embedcore.testing import vectors_of

Open = Callable[..., VectorStore]
Run = Callable[..., str]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.mark.case("C12")
@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([0, 1, 2]), st.booleans()), max_size=12
    )
)
def test_zeros_are_found_only_by_who_asks_for_them(steps: list[tuple[str, int, bool]]) -> None:
    """The first vector that says something stays; before it, zeros that somebody wants to keep."""
    with tempfile.TemporaryDirectory() as folder:
        store = VectorStore(Path(folder) / "v", cap=10**9)
        model: dict[str, int] = {}
        for text, value, zeros in steps:
            vectors = np.full((1, WIDTH), value, dtype=np.float32)
            store.put(keys_of([text]), vectors, ORIGIN, zeros=zeros)
            if value:
                model[text] = model.get(text) or value
            elif zeros:
                model.setdefault(text, 0)
        for zeros in (False, True):
            seen: dict[str, float] = {}

            def take(places: Sequence[int], vectors: Any, seen: dict[str, float] = seen) -> None:
                seen.update(("abc"[place], vectors[row][0]) for row, place in enumerate(places))

            store.get(keys_of("abc"), WIDTH, take, zeros=zeros)
            assert seen == {text: one for text, one in model.items() if one or zeros}
        there = store.look(keys_of("abc"), WIDTH).there
        assert {"abc"[place] for place in there} == {text for text, one in model.items() if one}
        assert all(damaged == 0 for _, damaged in verify(store))
        assert sum(contents(store).vectors.values()) == len(model)
        store.close()


@pytest.mark.case("C12")
@given(
    vectors=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, 1e-45]), min_size=3, max_size=3), max_size=6
    )
)
def test_what_is_all_zeros_and_what_is_nearly(vectors: list[list[float]]) -> None:
    from embedcore.storage.vector_format import all_zero

    array = np.array(vectors, dtype=np.float32).reshape(-1, 3)
    assert all_zero(array).tolist() == [not any(row) for row in vectors]
    assert all_zero(np.full((2, 4), np.nan, dtype=np.float32)).tolist() == [False, False]


def test_what_was_put_is_found_after_reopening(store: VectorStore, open_store: Open) -> None:
    assert found(store, TEXTS) == set()
    buy(store, TEXTS[:7])
    assert found(store, TEXTS) == set(TEXTS[:7])
    store.close()
    assert found(store, TEXTS[5:]) == set(TEXTS[5:7])
    assert found(open_store(), [*reversed(TEXTS)]) == set(TEXTS[:7])


@pytest.mark.parametrize("texts", [500, 501, 1203])
def test_many_keys_are_looked_up_in_parts(store: VectorStore, texts: int) -> None:
    several = [f"text {number}" for number in range(texts)]
    buy(store, several[::2])
    calls: list[int] = []
    store.get(keys_of(several), WIDTH, lambda places, vectors: calls.append(len(vectors)))
    assert sum(calls) == len(several[::2])
    assert max(calls) <= 500
    assert found(store, several) == set(several[::2])


@pytest.mark.fault(118)
def test_the_first_writer_wins(store: VectorStore, open_store: Open) -> None:
    buy(store, TEXTS[:3])
    buy(open_store(), TEXTS[:5], salt="of another model")
    assert found(store, TEXTS[:3]) == set(TEXTS[:3])
    assert found(store, TEXTS[3:], salt="of another model") == set(TEXTS[3:5])
    assert contents(store).vectors == {"p:m": 5}


@pytest.mark.fault(118)
def test_threads_that_write_the_same(store: VectorStore) -> None:
    errors: list[BaseException] = []

    def write(first: int) -> None:
        try:
            for number in range(10):
                buy(store, [f"text {first + number + place}" for place in range(5)])
        except BaseException as error:  # noqa: BLE001 - seen below
            errors.append(error)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    texts = [f"text {number}" for number in range(30)]
    assert found(store, texts) == set(texts[:21])
    assert contents(store).vectors == {"p:m": 21}


@pytest.mark.fault(118)
def test_processes_that_write_the_same(
    start_python: Start, store: VectorStore, vectors_path: Path, tmp_path: Path
) -> None:
    code = """
store = new_store()
wait_for(sys.argv[3])
for number in range(20):
    # What differs between two writers is told apart by the salt: one of them wins.
    buy(store, [f"text {number}"], salt=sys.argv[2])
    buy(store, [f"own {number} of {sys.argv[2]}"])
print("done")
"""
    go = tmp_path / "go"
    running = [start_python(code, name, go, path=vectors_path) for name in "abcd"]
    go.touch()
    assert [process.communicate(timeout=300)[0] for process in running] == ["done\n"] * 4
    own = [f"own {number} of {name}" for number in range(20) for name in "abcd"]
    assert found(store, own) == set(own)
    got: dict[int, bytes] = {}
    store.get(
        keys_of(TEXTS),
        WIDTH,
        lambda places, vectors: got.update(
            {place: vectors[row].tobytes() for row, place in enumerate(places)}
        ),
    )
    for place, text in enumerate(TEXTS):
        assert got[place] in {vectors_of([text], WIDTH, salt=name).tobytes() for name in "abcd"}
    assert contents(store).vectors == {"p:m": 100}


def test_killed_in_the_middle_of_writing_leaves_whole_requests_only(
    start_python: Start, vectors_path: Path, open_store: Open
) -> None:
    code = """
store = new_store()
for number in range(10**6):
    buy(store, [f"text {number} {place}" for place in range(40)], width=512)
    print(number, flush=True)
"""
    written = 0
    for pause in (0.0, 0.003, 0.011, 0.02):
        process = start_python(code, path=vectors_path)
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(pause)
        process.kill()
        rest = process.communicate()[0].splitlines()
        written = max([written, 2, *map(int, rest)])
        store = open_store()
        for number in range(written + 2):
            texts = [f"text {number} {place}" for place in range(40)]
            there = found(store, texts, width=512)
            assert there in (set(), set(texts)), "half a request"
            assert there or number > written, "told to be written, and is not there"
        store.close()


@pytest.mark.fault(115)
def test_vectors_of_another_width_are_no_hits_and_go(store: VectorStore) -> None:
    buy(store, TEXTS[:4], width=16)
    assert found(store, TEXTS[:2], width=8) == set()
    assert found(store, TEXTS[:4], width=16) == set(TEXTS[2:4])
    buy(store, TEXTS[:2])
    assert found(store, TEXTS[:4]) == set(TEXTS[:2])


def test_without_a_known_width_what_is_there_decides(store: VectorStore) -> None:
    buy(store, TEXTS[:4], width=16)
    assert found(store, TEXTS, width=None) == set(TEXTS[:4])


def test_a_deleted_file_is_noticed_and_a_new_one_begins_with_a_new_program(
    store: VectorStore, index_path: Path, open_store: Open
) -> None:
    buy(store, TEXTS)
    store.close()
    assert found(store, TEXTS) == set(TEXTS)
    index_path.unlink()
    with pytest.raises(StorageCorrupt, match="was deleted or replaced"):
        buy(store, TEXTS)
    for left in index_path.parent.glob("index.db-*"):
        left.unlink()
    assert found(open_store(), TEXTS) == set()


def test_a_newer_file_is_refused(store: VectorStore, index_path: Path, open_store: Open) -> None:
    store.database.open()
    store.close()
    change(index_path, f"PRAGMA user_version={VECTOR_INDEX.version + 1}")
    with pytest.raises(StorageTooNew):
        found(open_store(), TEXTS)


def test_what_a_killed_program_left_in_its_log_is_there(
    run_python: Run, vectors_path: Path, store: VectorStore
) -> None:
    run_python("buy(new_store(), ['a', 'b']); os._exit(0)", path=vectors_path)
    assert found(store, ["a", "b", "c"]) == {"a", "b"}


@pytest.mark.fault(121)
def test_a_look_up_that_is_not_finished_holds_nothing_back(
    store: VectorStore, open_store: Open, index_path: Path
) -> None:
    if store.database.journal_mode != "wal":
        pytest.skip("this SQLite is not trusted with WAL")
    several = [f"text {number}" for number in range(1200)]
    buy(store, several)
    other = open_store()
    checked: list[tuple[int, int, int]] = []

    def take(places: Sequence[int], vectors: Any) -> None:
        if not checked:
            buy(other, ["another"])
            connection = driver().connect(index_path, timeout=0)
            checked.append(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())
            connection.close()

    store.get(keys_of(several), WIDTH, take)
    steps = verify(store)
    next(steps)
    connection = driver().connect(index_path, timeout=0)
    checked.append(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())
    connection.close()
    assert [busy for busy, *_ in checked] == [0, 0]


# The cap


@pytest.mark.fault(119)
def test_at_the_cap_nothing_is_added_and_nothing_thrown_out(
    open_store: Open, index_path: Path
) -> None:
    store = open_store(cap=600_000)
    kept = 0
    with pytest.raises(StorageFull, match="cache_cap"):
        while True:
            buy(store, [f"text {kept} {place}" for place in range(10)], width=512)
            kept += 1
    assert kept > 5
    assert store.used <= 600_000
    for number in range(kept):
        texts = [f"text {number} {place}" for place in range(10)]
        assert found(store, texts, width=512) == set(texts)
    assert found(store, [f"text {kept} {place}" for place in range(10)], width=512) == set()
    assert contents(store).vectors == {"p:m": kept * 10} == {"p:m": count(index_path)}


def test_a_cap_of_nothing(open_store: Open) -> None:
    store = open_store(cap=0)
    with pytest.raises(StorageFull):
        buy(store, TEXTS)
    assert found(store, TEXTS) == set()


def test_what_somebody_counts_on_is_taken_beyond_the_cap(open_store: Open) -> None:
    store = open_store(cap=0)
    buy(store, TEXTS, keep_until=store.today() * 86_400.0 + 86_400.0)
    assert found(store, TEXTS) == set(TEXTS)
    with pytest.raises(StorageFull):
        buy(store, ["another"])


def test_what_is_beyond_the_cap_counts_for_no_one_else_and_goes_with_its_segments(
    open_store: Open,
) -> None:
    """The cap holds for what is to stay, however much lies beyond it meanwhile."""
    store = open_store(cap=400_000)
    large = [f"large {number}" for number in range(100)]
    until = store.today() * 86_400.0 + 86_400.0
    buy(store, large, width=2_048, keep_until=until)
    assert store.used > 800_000
    assert store.room > 0
    buy(store, TEXTS, width=2_048)
    assert found(store, [*large, *TEXTS], width=2_048) == {*large, *TEXTS}
    (beyond,) = [path for path in store.path.glob("*.seg") if path.stat().st_size > 800_000]
    assert store.let_go([keys_of([*large, *TEXTS])], lambda _: set()) == len(large)
    assert not beyond.exists()
    assert found(store, [*large, *TEXTS], width=2_048) == set(TEXTS)


def test_only_what_is_not_to_stay_goes(open_store: Open) -> None:
    store = open_store()
    buy(store, TEXTS[:5], to_stay=False)
    buy(store, TEXTS[:10])
    assert store.let_go([keys_of(TEXTS)], lambda _: set()) == 5, "what is there stays as it is"
    assert found(store, TEXTS) == set(TEXTS[5:10])


def test_the_size_of_a_vector_is_about_what_is_promised(open_store: Open) -> None:
    texts = [f"text {number}" for number in range(976)]
    whole, half = open_store(), open_store(Path("half").absolute())
    for start in range(0, len(texts), 244):
        chunk = texts[start : start + 244]
        buy(whole, chunk, width=1536)
        short = vectors_of(chunk, 1536).astype(np.float16).astype(np.float32)
        half.put(keys_of(chunk), short, ORIGIN)
    before = used_when_empty(open_store)
    assert (whole.used - before) / len(texts) < 7_000
    assert (half.used - before) / len(texts) < 3_700


def used_when_empty(open_store: Open) -> int:
    return open_store(Path("empty").absolute()).used


# What is known of its contents


def test_how_often_it_helped_is_counted_once(store: VectorStore, open_store: Open) -> None:
    buy(store, TEXTS[:5])
    found(store, TEXTS)
    found(store, TEXTS[:3])
    store.close()
    known = contents(open_store())
    assert (known.hits, known.misses) == (8, 15)
    assert contents(store).hits == 8


@pytest.mark.fault(117)
def test_another_name_in_the_replies_is_reported_once(store: VectorStore) -> None:
    def put(text: str, name: str | None) -> str | None:
        origin = Origin(model="p:m", fingerprint="f", answered_as=name)
        return store.put(keys_of([text]), vectors_of([text], WIDTH), origin)

    assert put("a", "m-1") is None
    assert put("b", "m-1") is None
    assert put("c", None) is None
    assert put("d", "m-2") == "m-1"
    assert put("e", "m-2") is None
    other = Origin(model="p:m", fingerprint="f", input_type="query", answered_as="m-3")
    assert store.put(keys_of(["f"]), vectors_of(["f"], WIDTH), other) is None


# What cannot be used


def test_a_file_that_stays_locked_is_given_up(
    store: VectorStore, open_store: Open, start_python: Start, index_path: Path
) -> None:
    buy(store, ["a"])
    holder = start_python(HOLD_THE_LOCK, path=index_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    other = open_store(busy_timeout=0.2)
    if store.database.journal_mode == "wal":
        assert found(other, ["a", "b"]) == {"a"}, "it can be read nevertheless"
    began = time.monotonic()
    with pytest.raises(StorageBusy):
        buy(other, ["b"])
    assert time.monotonic() - began > 0.1
    holder.kill()
    holder.communicate()
    buy(other, ["b"])
    assert found(store, ["a", "b"]) == {"a", "b"}


HOLD_THE_LOCK = """
connection = driver().connect(PATH, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(3600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX ones")
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_may_not_be_written(run_python: Run, exists: bool) -> None:
    code = """
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    buy(new_store(timeout=1), ["b"])
    print("kept")
except StorageError as error:
    print(type(error).__name__)
"""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "home"
        place.mkdir()
        Path(name).chmod(0o755)
        path = place / "vectors"
        if exists:
            run_python("buy(new_store(), ['a'])", path=path)
            (path / "index.db").chmod(0o666)
            path.chmod(0o555)
        place.chmod(0o555)
        assert run_python(code, path=path) == StorageReadOnly.__name__
        place.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
@pytest.mark.fault(120)
@pytest.mark.parametrize("engine", ["own", "3.40.1"])
def test_no_room_on_the_disk_means_nothing_half_there(
    run_python: Run, vectors_path: Path, open_store: Open, engine: str
) -> None:
    code = """
import resource
if sys.argv[2] != "own":
    databases.engine_version = lambda: sys.argv[2]
store = new_store()
buy(store, ["first"], width=512)
largest = max(path.stat().st_size for path in PATH.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 100_000, resource.RLIM_INFINITY))
done = 0
try:
    while True:
        buy(store, [f"text {done} {place}" for place in range(20)], width=512)
        done += 1
except StorageFull:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
buy(store, ["last"], width=512)
print(done)
"""
    done = int(run_python(code, engine, path=vectors_path))
    store = open_store()
    assert found(store, ["first", "last"], width=512) == {"first", "last"}
    for number in range(done + 1):
        texts = [f"text {number} {place}" for place in range(20)]
        there = found(store, texts, width=512)
        assert there == (set(texts) if number < done else set())


def test_without_wal_everything_works_as_well(
    monkeypatch: pytest.MonkeyPatch, store: VectorStore, open_store: Open
) -> None:
    monkeypatch.setattr(databases, "engine_version", lambda: "3.40.1")
    buy(store, TEXTS[:5])
    assert store.database.journal_mode == "truncate"
    assert found(open_store(), TEXTS) == set(TEXTS[:5])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_a_fork_opens_its_own(store: VectorStore) -> None:
    buy(store, TEXTS[:5])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert found(store, TEXTS) == set(TEXTS[:5])
            buy(store, TEXTS[5:8])
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert found(store, TEXTS) == set(TEXTS[:8])


def test_the_time_to_wait_for_others_is_short(tmp_path: Path) -> None:
    """Of the calls that could go on without it."""
    assert module._BUSY_SECONDS <= 10
    assert VectorStore(tmp_path / "v", cap=1).database._timeout == module._BUSY_SECONDS
