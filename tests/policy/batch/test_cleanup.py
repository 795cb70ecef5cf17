"""Once the output of a batch is complete, vectors that are not to be cached go, and no others."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import ConfigurationError
from embedcore.policy.batch.cleanup import left_over

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]
BatchDesk = run_path(str(Path(__file__).with_name("batch_desk.py")))["BatchDesk"]

TEXTS = [f"text {number:02d}" for number in range(8)]
NOT_CACHED = pytest.mark.parametrize("how", [{"cache_cap": 0}, {"cache": False}], ids=str)


def vectors_kept(batch_desk: Any) -> int:
    store = batch_desk.last._context().store
    with store.database.read() as connection:
        (count,) = connection.execute("SELECT count(*) FROM vector").fetchone()
    return int(count)


@NOT_CACHED
def test_what_is_not_to_be_cached_goes_with_its_files(batch_desk: Any, how: Any) -> None:
    job = batch_desk.work(batch_desk.submit(TEXTS, **how))
    batch_desk.check(job, TEXTS)
    batch_desk.check(job, TEXTS)
    assert job.deliver() == len(TEXTS)
    assert vectors_kept(batch_desk) == 0
    assert list((batch_desk.home / "vectors").glob("*.seg")) == []
    assert job.deliver() == 0, "harmless to repeat"
    result = job.result(on_error="keep")
    assert not result.ok.any()
    assert "written to an output before" in str(result.errors[0])
    batch_desk.check_money()


def test_what_is_cached_stays(batch_desk: Any) -> None:
    job = batch_desk.work(batch_desk.submit(TEXTS))
    assert job.deliver() == 0
    batch_desk.check(job, TEXTS)
    assert batch_desk.last.embed(TEXTS).usage.tokens == 0


def test_a_batch_that_goes_on_keeps_what_it_has(batch_desk: Any) -> None:
    job = batch_desk.submit(TEXTS, cache_cap=0)
    with pytest.raises(ConfigurationError, match="has not ended"):
        job.deliver()
    batch_desk.check(batch_desk.work(job), TEXTS)


def test_a_cache_that_other_state_folders_may_share_keeps_everything(
    batch_desk: Any, tmp_path: Path
) -> None:
    job = batch_desk.work(batch_desk.submit(TEXTS, cache=False, cache_dir=tmp_path / "shared"))
    assert job.deliver() == 0
    batch_desk.check(job, TEXTS)


def test_what_is_written_down_at_this_moment_counts(batch_desk: Any) -> None:
    """A submission pins what it finds before it says that it wants it."""
    job = batch_desk.work(batch_desk.submit(TEXTS, cache=False))
    context = batch_desk.last._context()
    reached, submit = [], context.store.keep

    def keep(keys: Any, until: float) -> None:
        submit(keys, until)
        reached.append(job.deliver())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context.store, "keep", keep)
        second = batch_desk.last.submit_batch(TEXTS[:3])
    assert reached == [len(TEXTS) - 3]
    batch_desk.check(second, TEXTS[:3])
    assert len(batch_desk.jobs) == 1
    assert second.deliver() == 3


def test_a_batch_that_is_forgotten_after_its_time_leaves_nothing(batch_desk: Any) -> None:
    batch_desk.work(batch_desk.submit(TEXTS, cache=False, batch={"keep_days": 2.0}))
    assert vectors_kept(batch_desk) == len(TEXTS)
    batch_desk.clock.advance(2.1 * 86_400)
    batch_desk.last.submit_batch(["another"])
    assert vectors_kept(batch_desk) == 0


@settings(max_examples=settings.default.max_examples // 5, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.sampled_from(TEXTS), min_size=1, unique=True), min_size=1, max_size=4
    ),
    data=st.data(),
)
def test_no_batch_loses_what_it_counts_on(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]], data: st.DataObject
) -> None:
    """Whatever texts they share, and in whatever order their outputs are complete."""
    with ExitStack() as opened:
        desk = BatchDesk(tmp_path_factory.mktemp("desk") / "state", opened)
        client = desk.client(cache=False)
        jobs = [client.submit_batch(texts) for texts in batches]
        for job in jobs:
            desk.work(job)
        waiting = list(range(len(jobs)))
        for number in data.draw(st.permutations(waiting)):
            desk.check(jobs[number], batches[number])
            jobs[number].deliver()
            waiting.remove(number)
            counted = {text for one in waiting for text in batches[one]}
            assert vectors_kept(desk) == len(counted)
        desk.check_money()


def test_files_that_another_process_closes_meanwhile_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite deletes its log when the last process closes a file."""
    in_use, old = "20260101-0000000a", "20260101-0000000b"
    names = [f"{in_use}.db", f"{in_use}.db-shm", f"{old}.db", f"{old}.json"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    listed = Path.iterdir

    def closed_after_that(folder: Path) -> list[Path]:
        found = list(listed(folder))
        (tmp_path / f"{in_use}.db-shm").unlink()
        return found

    monkeypatch.setattr(Path, "iterdir", closed_after_that)
    found = list(left_over(tmp_path, lambda name: False))
    assert [path.name for path in found] == [f"{old}.db", f"{old}.json"]
