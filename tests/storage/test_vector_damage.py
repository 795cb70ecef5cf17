"""Does damage anywhere in the cache cost no more than a vector, and never give a wrong one?"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from keeping import TEXTS, WIDTH, buy, change, count, found, keys_of

from embedcore.errors import StorageCorrupt, StorageError
from embedcore.storage.segments import HEADER_BYTES
from embedcore.storage.vector_index import VectorIndex
from embedcore.storage.vector_upkeep import contents, prune, verify
from embedcore.storage.vectors import VectorStore
from embedcore.testing import vectors_of

Open = Callable[..., VectorStore]
WIDE = 64

DAMAGE = {
    "the vector": "",
    "checksum": "checksum = checksum + 1",
    "wider": "width = width * 2",
    "narrower": "width = width / 2",
    "a width for all the memory there is": "width = 1 << 60",
    "no number": "width = 'x'",
    "the other format": "itemsize = 6 - itemsize",
    "a format that is none": "itemsize = 1",
    "the vector of another": "offset = (SELECT offset FROM vector WHERE id = 2)",
    "in the header": "offset = 8",
    "before the file": "offset = -64",
    "past the end": "offset = offset + 1000000",
    "far past the end": "offset = (1 << 62) + 64",
    "a segment that is not there": "segment = 77",
    "no segment": "segment = NULL",
}


def spoil(folder: Path, damage: str, where: str, flip: Callable[..., None]) -> None:
    if DAMAGE[damage]:
        # What the columns forbid can be there all the same, in a file that is damaged.
        loose = "replace(replace(sql, 'STRICT', ''), 'INTEGER NOT NULL', '')"
        change(
            folder / "index.db",
            f"UPDATE sqlite_schema SET sql = {loose} WHERE name = 'vector'",
            schema=True,
        )
        change(folder / "index.db", f"UPDATE vector SET {DAMAGE[damage]} WHERE {where}")
    else:
        flip(folder, where)


@pytest.mark.fault(116)
@pytest.mark.parametrize("known", [WIDTH, None])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_no_hit_and_is_healed_by_the_next_put(
    store: VectorStore,
    vectors_path: Path,
    damage: str,
    known: int | None,
    flip_vectors: Callable[..., None],
) -> None:
    buy(store, TEXTS)
    store.close()
    spoil(vectors_path, damage, "id IN (1, 7)", flip_vectors)
    assert store.look(keys_of(TEXTS), known).there == set(range(20)) - {0, 6}
    damaged = store.get(keys_of(TEXTS), known, lambda places, vectors: None)
    assert damaged == 2
    whole = {*TEXTS} - {TEXTS[0], TEXTS[6]}
    assert found(store, TEXTS, width=known) == whole
    assert contents(store).vectors == {"p:m": 18} == {"p:m": count(vectors_path / "index.db")}
    buy(store, TEXTS)
    assert found(store, TEXTS) == set(TEXTS)


@pytest.mark.fault(116)
@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_what_is_damaged(
    store: VectorStore, vectors_path: Path, damage: str, flip_vectors: Callable[..., None]
) -> None:
    texts = [f"text {number}" for number in range(450)]
    buy(store, texts)
    store.close()
    spoil(vectors_path, damage, "id IN (1, 7, 400)", flip_vectors)
    steps = list(verify(store))
    assert steps[-1] == (450, 3)
    assert [seen for seen, _ in steps] == [200, 400, 450]
    assert list(verify(store))[-1] == (447, 0)
    prune(store, model="p:none")
    assert found(store, texts) == {*texts} - {texts[0], texts[6], texts[399]}


@functools.cache
def sound_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "vectors"
        store = VectorStore(path, cap=10**9)
        buy(store, [f"text {number}" for number in range(60)], width=WIDE)
        store.close()
        return {one.name: one.read_bytes() for one in path.iterdir()}


@functools.cache
def written_bytes(name: str) -> list[int]:
    return [place for place, byte in enumerate(sound_files()[name]) if byte]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def fresh(folder: Path, name: str, content: bytes) -> Path:
    """The sound files, but for one."""
    path = folder / "vectors"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for each, sound in sound_files().items():
        (path / each).write_bytes(content if each == name else sound)
    return path


def use_everything(path: Path) -> None:
    """Whatever is found is right, which ``found`` holds it to."""
    texts = [f"text {number}" for number in range(70)]
    store = VectorStore(path, cap=10**9, busy_timeout=1.0)
    try:
        for width in (WIDE, None):
            found(store, texts, width=width)
        buy(store, texts, width=WIDE)
        found(store, texts, width=WIDE)
        contents(store)
        list(verify(store))
        prune(store, older_than=1.0)
        prune(store, down_to=30_000)
        found(store, texts, width=WIDE)
        prune(store, down_to=0)
    finally:
        store.close()


@pytest.mark.fault(116)
@settings(
    max_examples=settings.default.max_examples,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    name=st.sampled_from(["index.db", "00000001.seg"]),
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_files_with_flipped_bytes_yield_no_wrong_vector(
    folder: Path, name: str, flips: list[tuple[int, int]]
) -> None:
    damaged = bytearray(sound_files()[name])
    for place, bits in flips:
        damaged[written_bytes(name)[place % len(written_bytes(name))]] ^= bits
    with contextlib.suppress(StorageError):
        use_everything(fresh(folder, name, bytes(damaged)))


@settings(
    max_examples=settings.default.max_examples // 2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(share=st.floats(0, 1, exclude_max=True))
def test_an_index_that_was_cut_off_is_a_typed_error(folder: Path, share: float) -> None:
    whole = sound_files()["index.db"]
    path = fresh(folder, "index.db", whole[: int((len(whole) - 4096) * share)])
    with pytest.raises(StorageCorrupt) as corrupt:
        use_everything(path)
    assert "no cached vectors" in str(corrupt.value) or "embedded again" in str(corrupt.value)


@pytest.mark.fault(116)
@settings(
    max_examples=settings.default.max_examples // 2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(length=st.integers(0, HEADER_BYTES + 60 * WIDE * 4))
def test_a_segment_that_was_cut_off_has_what_is_left_of_it(folder: Path, length: int) -> None:
    """An index that points past the end of a segment, as after a power cut on a disk that lies."""
    path = fresh(folder, "00000001.seg", sound_files()["00000001.seg"][:length])
    texts = [f"text {number}" for number in range(60)]
    whole = max(length - HEADER_BYTES, 0) // (WIDE * 4)
    store = VectorStore(path, cap=10**9)
    assert found(store, texts, width=WIDE) == set(texts[:whole])
    buy(store, [*texts, "more"], width=WIDE)
    assert found(store, texts, width=WIDE) == set(texts)
    # Where it should end is a place that it does not reach: what would lie between is not known.
    if length < len(sound_files()["00000001.seg"]):
        assert (path / "00000001.seg").stat().st_size == length
    store.close()


@settings(
    max_examples=settings.default.max_examples // 2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(length=st.integers(1, 3000), byte=st.integers(0, 255))
def test_what_a_writer_that_was_killed_left_behind_the_end_is_written_over(
    folder: Path, length: int, byte: int
) -> None:
    """A torn tail of any length."""
    torn = sound_files()["00000001.seg"] + bytes([byte]) * length
    path = fresh(folder, "00000001.seg", torn)
    store = VectorStore(path, cap=10**9)
    before, more = [f"text {n}" for n in range(60)], [f"more {n}" for n in range(5)]
    buy(store, more, width=WIDE)
    assert found(store, before + more, width=WIDE) == set(before + more)
    assert list(verify(store))[-1] == (65, 0)
    assert sorted(one.name for one in path.glob("*.seg")) == ["00000001.seg"]
    store.close()


def another(folder: Path, texts: list[str]) -> Path:
    store = VectorStore(folder, cap=10**9)
    buy(store, texts, salt="of another model")
    store.close()
    return folder / "00000001.seg"


@pytest.mark.fault(116)
def test_a_segment_of_another_folder_in_its_place_gives_nothing(
    store: VectorStore, vectors_path: Path, tmp_path: Path
) -> None:
    """Also where the texts and their places are the same."""
    buy(store, TEXTS)
    shutil.copy(another(tmp_path / "other", TEXTS), vectors_path / "00000001.seg")
    assert found(store, TEXTS) == set()
    buy(store, TEXTS)
    assert found(store, TEXTS) == set(TEXTS)


def nothing(path: Path) -> None:
    path.unlink()


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def two_names(path: Path) -> None:
    path.with_name("elsewhere").hardlink_to(path)


def another_number(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:22] + b"\7" + content[23:])


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("replace", [nothing, a_link, two_names, another_number])
def test_what_is_not_the_segment_that_is_meant_is_never_written(
    store: VectorStore, vectors_path: Path, replace: Callable[[Path], None]
) -> None:
    buy(store, TEXTS[:5])
    replace(vectors_path / "00000001.seg")
    left = {path: path.read_bytes() for path in vectors_path.iterdir() if path.suffix != ".db-wal"}
    buy(store, TEXTS[5:])
    assert found(store, TEXTS[5:]) == set(TEXTS[5:])
    for path, content in left.items():
        if not path.name.startswith("index"):
            assert path.read_bytes() == content
    assert sorted(path.name for path in vectors_path.glob("*.seg"))[-1] == "00000002.seg"


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes are POSIX ones")
@pytest.mark.parametrize("replace", [a_link, a_pipe, a_folder])
def test_what_is_no_file_is_said_and_deletes_nothing(
    store: VectorStore, vectors_path: Path, replace: Callable[[Path], None]
) -> None:
    """It was moved, perhaps to a larger disk: then it can be moved back."""
    buy(store, TEXTS)
    replace(vectors_path / "00000001.seg")
    with pytest.raises(StorageError, match="no plain file"):
        found(store, TEXTS)
    assert count(vectors_path / "index.db") == 20


def test_a_segment_that_is_gone_is_no_hit_and_its_texts_are_kept_anew(
    store: VectorStore, vectors_path: Path
) -> None:
    buy(store, TEXTS)
    (vectors_path / "00000001.seg").unlink()
    assert found(store, TEXTS) == set()
    assert count(vectors_path / "index.db") == 0
    buy(store, TEXTS)
    assert found(store, TEXTS) == set(TEXTS)


@pytest.mark.parametrize("new_segment", [False, True])
def test_a_commit_that_comes_back_has_its_vectors(
    store: VectorStore, vectors_path: Path, tmp_path: Path, new_segment: bool, monkeypatch: Any
) -> None:
    """The writer was killed when its commit was in the log, and others did not see it yet.

    SQLite lets the next writer go on in its place. If that one is killed as well, the next one who
    opens the file finds the first commit.
    """
    buy(store, TEXTS)
    if new_segment:
        monkeypatch.setattr("embedcore.storage.vector_index.SEGMENT_BYTES", 1)
    seen_by_others = (vectors_path / "index.db-shm").read_bytes()
    first, second = ([f"{name} {n}" for n in range(5)] for name in ("first", "second"))
    buy(store, first)
    with (vectors_path / "index.db-shm").open("r+b") as shared:
        shared.write(seen_by_others)
    assert found(store, [*TEXTS, *first]) == set(TEXTS)
    with monkeypatch.context() as killed:
        killed.setattr(VectorIndex, "append", before_its_commit(VectorIndex.append))
        with pytest.raises(Killed):
            buy(store, second)
    copy = tmp_path / "copy"
    shutil.copytree(vectors_path, copy, ignore=shutil.ignore_patterns("*-shm"))
    after = VectorStore(copy, cap=10**9)
    assert found(after, [*TEXTS, *first]) == {*TEXTS, *first}
    buy(after, TEXTS + (more := [f"more {n}" for n in range(3)]))
    assert found(after, [*TEXTS, *first, *more]) == {*TEXTS, *first, *more}
    assert list(verify(after))[-1] == (28, 0)
    prune(after, model="p:none")
    assert found(after, [*TEXTS, *first, *more]) == {*TEXTS, *first, *more}
    left = b"".join(path.read_bytes() for path in copy.glob("*.seg"))
    assert vectors_of(first, WIDTH).astype(np.float32).tobytes() in left
    assert vectors_of(second, WIDTH).astype(np.float32)[0].tobytes() not in left
    after.close()


class Killed(BaseException):
    pass


def before_its_commit(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def cut_off(*given: Any, **named: Any) -> Any:
        step(*given, **named)
        raise Killed

    return cut_off
