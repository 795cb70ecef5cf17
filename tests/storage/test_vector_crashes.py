"""Is the cache whole at every moment at which a program or a machine can stop?

Each deed is done once while the folder is copied at each step of it: what a kill at that moment
would leave. Then it is done again and again, with an error of the system at one of the steps.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keeping import TEXTS, WIDTH, buy, found, keep_as_before, keys_of

from embedcore.errors import StorageError
from embedcore.storage import segments, vector_index
from embedcore.storage.database import Database
from embedcore.storage.vector_migration import migrate
from embedcore.storage.vector_upkeep import contents, prune, verify
from embedcore.storage.vectors import VectorStore

OLD, NEW = TEXTS[:6], TEXTS[6:12]
Step = Callable[[str], None]


class Deed:
    """What is done to a cache of ``OLD``: which texts it has before, and must have afterwards."""

    def __init__(
        self,
        do: Callable[[VectorStore], object],
        after: list[str],
        *,
        is_old: bool = False,
        to_stay: bool = True,
    ) -> None:
        self.do = do
        self.after = set(after)
        self.is_old = is_old
        self.to_stay = to_stay

    def prepared(self, folder: Path) -> VectorStore:
        if self.is_old:
            keep_as_before(folder, OLD)
        store = VectorStore(folder, cap=10**9, busy_timeout=5.0)
        if not self.is_old:
            for start in range(0, len(OLD), 2):
                buy(store, OLD[start : start + 2], to_stay=self.to_stay)
        return store


def moves(store: VectorStore) -> None:
    list(migrate(store))


def drops(store: VectorStore) -> None:
    for text in OLD[:2]:
        store.drop(keys_of([text])[0])
    # Two thirds of a segment are left, and its gaps are made zeros.
    prune(store, model="p:none")


def most_of_a_segment(store: VectorStore) -> None:
    for text in OLD[:4]:
        store.drop(keys_of([text])[0])
    prune(store, model="p:none")


def finds_damage(store: VectorStore) -> None:
    with (store.path / "00000001.seg").open("r+b") as file:
        file.seek(segments.HEADER_BYTES)
        file.write(b"\xff" * 8)
    list(verify(store))


def lets_go(store: VectorStore) -> None:
    store.let_go([keys_of(OLD)], set(keys_of(OLD[5:])).intersection)


DEEDS = {
    "the first put": Deed(lambda store: buy(store, NEW), [*OLD, *NEW]),
    "a put after others": Deed(
        lambda store: [buy(store, [one]) for one in NEW[:3]], [*OLD, *NEW[:3]]
    ),
    "a put beside the old file": Deed(
        lambda store: buy(store, TEXTS[:12]), [*OLD, *NEW], is_old=True
    ),
    "prune all": Deed(prune, []),
    "prune some": Deed(drops, OLD[2:]),
    "copy what is left": Deed(most_of_a_segment, OLD[4:]),
    "let go of what a batch had": Deed(lets_go, OLD[5:], to_stay=False),
    "damage": Deed(finds_damage, OLD[1:]),
    "move": Deed(moves, OLD, is_old=True),
}


@contextlib.contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Call ``step`` before and after everything that reaches the disk, and in the middle of it."""
    with pytest.MonkeyPatch.context() as patch:
        _around(patch, segments, "_sync", step)
        _around(patch, segments, "sync_folder", step)
        _around(patch, segments, "_opened", step)
        write, unlink, transaction = segments._write, Path.unlink, Database.transaction

        def writes(file: Any, content: Any) -> None:
            step("nothing is written")
            write(file, memoryview(content)[: len(content) // 2 + 1])
            step("half of it is written")
            write(file, memoryview(content)[len(content) // 2 + 1 :])
            step("it is written")

        def unlinks(path: Path, **how: Any) -> None:
            ours = path.suffix == ".seg" or path.name == "vectors.db"
            if ours:
                step(f"{path.name} goes")
            unlink(path, **how)
            if ours:
                step(f"{path.name} is gone")

        @contextlib.contextmanager
        def transacts(database: Database) -> Iterator[Any]:
            with transaction(database) as connection:
                step("begun")
                yield connection
                step("not committed")
            step("ended")

        patch.setattr(segments, "_write", writes)
        patch.setattr(Path, "unlink", unlinks)
        patch.setattr(Database, "transaction", transacts)
        yield


def _around(patch: pytest.MonkeyPatch, owner: Any, name: str, step: Step) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any) -> Any:
        step(f"before {name}")
        result = original(*arguments)
        step(f"after {name}")
        return result

    patch.setattr(owner, name, wrapped)


@pytest.fixture(params=[segments.SEGMENT_BYTES, 200], ids=["one segment", "small segments"])
def segment_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(vector_index, "SEGMENT_BYTES", request.param)
    return int(request.param)


def is_whole(folder: Path, deed: Deed) -> None:
    """It has what was there before or is there afterwards, all of it right, and works."""
    store = VectorStore(folder, cap=10**9, busy_timeout=5.0)
    there = found(store, TEXTS)
    before, after = set(OLD), deed.after
    assert there <= before | after
    assert there >= before & after
    # A second run ends it, whatever was left.
    if deed.do is not DEEDS["damage"].do:
        deed.do(store)
        assert found(store, TEXTS) == after
    *_, (seen, damaged) = [(0, 0), *verify(store)]
    assert (seen, damaged) == (len(found(store, TEXTS)), 0)
    assert sum(contents(store).vectors.values()) == seen
    buy(store, TEXTS)
    assert found(store, TEXTS) == set(TEXTS)
    prune(store)
    assert found(store, TEXTS) == set()
    assert list(folder.glob("*.seg")) == []
    store.close()


def content_of(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", DEEDS)
def test_killed_at_any_moment(name: str, tmp_path: Path, segment_bytes: int) -> None:
    deed, copies = DEEDS[name], []
    home = tmp_path / "home"
    home.mkdir()
    store = deed.prepared(home / "vectors")

    def copy(at: str) -> None:
        # By another process: to close a file here would drop the locks on it.
        subprocess.run(["cp", "-a", home, tmp_path / str(len(copies))], check=True)
        copies.append(at)

    with stepping(copy):
        deed.do(store)
    store.close()
    assert len(copies) >= 3
    last: dict[Path, bytes] = {}
    for number, at in enumerate(copies):
        # At many steps nothing has changed since the step before: that is one moment.
        now = content_of(tmp_path / str(number))
        if now == last:
            continue
        last = now
        try:
            is_whole(tmp_path / str(number) / "vectors", deed)
        except BaseException as error:
            error.add_note(f"killed at step {number}: {at}")
            raise


@pytest.mark.fault(120)
@pytest.mark.parametrize("name", DEEDS)
def test_an_error_of_the_system_at_any_moment(
    name: str, tmp_path: Path, segment_bytes: int
) -> None:
    """It is one of ours, nothing is half done, and the next call works."""
    deed, at, failed = DEEDS[name], 0, True
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    deed.prepared(prepared / "vectors").close()
    while failed:
        home = tmp_path / str(at)
        shutil.copytree(prepared, home)
        store = VectorStore(home / "vectors", cap=10**9, busy_timeout=5.0)
        failed = False
        left = at

        def fail(step: str) -> None:
            nonlocal left, failed
            # What fails after its end has not failed.
            if step.startswith(("after", "ended", "begun", "not")):
                return
            left -= 1
            if left == -1:
                failed = True
                raise OSError(errno.ENOSPC, "no space is left")

        with stepping(fail), contextlib.suppress(StorageError):
            deed.do(store)
        try:
            is_whole(home / "vectors", deed)
        except BaseException as error:
            error.add_note(f"failed at step {at}")
            raise
        store.close()
        shutil.rmtree(home)
        at += 1
    assert at > 1


def test_vectors_are_synced_before_the_index_names_them(store: VectorStore) -> None:
    """Else a power cut leaves rows without vectors."""
    steps: list[str] = []
    with stepping(steps.append):
        buy(store, TEXTS)
        buy(store, ["more"])
    written = [step for step in steps if step != "half of it is written"]
    first, second = "".join(f"{step}, " for step in written).split("ended, ")[:2]
    assert first.index("it is written") < first.index("after sync_folder")
    for each in (first, second):
        assert each.rindex("it is written") < each.rindex("after _sync")
        assert each.rindex("after _sync") < each.rindex("not committed")


def test_a_full_disk_in_the_middle_of_a_segment_keeps_the_place(store: VectorStore) -> None:
    """The half that was written is written over."""
    buy(store, OLD)

    def fails(step: str) -> None:
        if step == "half of it is written":
            raise OSError(errno.ENOSPC, "no space is left")

    with stepping(fails), pytest.raises(StorageError, match="no room"):
        buy(store, NEW)
    buy(store, NEW)
    (only,) = store.path.glob("*.seg")
    assert only.stat().st_size == segments.HEADER_BYTES + 12 * WIDTH * 4
