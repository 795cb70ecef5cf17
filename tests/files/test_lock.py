"""One output has one run at a time, also while the lock's file comes and goes."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from embedcore.errors import StorageBusy
from embedcore.files.disk import output_lock


def test_never_two_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "v.npy.lock"
    inside: list[int] = []
    most: list[int] = []

    def hold_often() -> None:
        for _ in range(400):
            with suppress(StorageBusy), output_lock(lock, tmp_path / "v.npy"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=hold_often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert not lock.exists()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file keeps its name")
def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening and our locking it the former holder removes the file."""
    lock, output = tmp_path / "v.npy.lock", tmp_path / "v.npy"
    opened = []
    real = os.open

    def remove_after(path: object, *arguments: int) -> int:
        descriptor = real(path, *arguments)
        opened.append(descriptor)
        if len(opened) == 1:
            lock.unlink()
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", remove_after)
        with output_lock(lock, output), pytest.raises(StorageBusy, match=f"process {os.getpid()}"):
            output_lock(lock, output).__enter__()
    assert len(opened) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_that_leaves_the_block_does_not_take_the_name_away(tmp_path: Path) -> None:
    lock, output = tmp_path / "v.npy.lock", tmp_path / "v.npy"
    held = output_lock(lock, output)
    held.__enter__()
    child = os.fork()
    if not child:
        held.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    assert lock.exists()
    held.__exit__(None, None, None)
    assert not lock.exists()
